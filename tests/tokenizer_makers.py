"""Small tokenizers of every kind, made here: no network, a second in all."""

from __future__ import annotations

import functools
import io

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from neurogen_cy.data import default_corpus
from neurogen_cy.sources import DefaultSource
from neurogen_cy.tokenization import ByteTokenizer, Tokenizer, from_bytes
from neurogen_cy.tokenizer_training import train_bpe

MORE = "na\u00efve caf\u00e9 \U0001f600 \u4e2d\u6587 don't. "
KINDS = ("bytes", "byte-level", "metaspace", "word-piece", "word-level", "sp-unigram", "sp-bpe")
EXACT = ("bytes", "byte-level")
"""Whose texts come back byte for byte."""


def text() -> str:
    """Some 60 kB of English with a little else."""
    return default_corpus()[0][:60_000].decode() + MORE * 5


def make(kind: str) -> Tokenizer:
    """A tokenizer of that kind; those of SentencePiece need the package."""
    if kind == "bytes":
        return ByteTokenizer()
    raw = content(kind)
    return from_bytes("sentencepiece" if kind.startswith("sp-") else "json", raw, kind)


@functools.cache
def content(kind: str) -> bytes:
    """The file of such a tokenizer."""
    if kind == "byte-level":
        return train_bpe(DefaultSource(), 600).raw
    if kind.startswith("sp-"):
        return _sentencepiece(kind[3:])
    return {"metaspace": _metaspace, "word-piece": _word_piece, "word-level": _word_level}[kind]().to_str().encode()


def _sentencepiece(model_type: str) -> bytes:
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text().splitlines()), model_writer=out, vocab_size=700, model_type=model_type,
        byte_fallback=model_type == "bpe", hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


def _metaspace() -> tokenizers.Tokenizer:
    """As Llama 2's: white space as a character, single bytes for what the vocabulary lacks."""
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    library.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    library.train_from_iterator(
        [text()], trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    )
    return library


def _word_piece() -> tokenizers.Tokenizer:
    """As BERT's, with truncation, padding and tokens put around, none of which may be used."""
    library = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    library.train_from_iterator(
        [text()], trainers.WordPieceTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    )
    library.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    library.enable_truncation(7)
    library.enable_padding(length=9)
    return library


def _word_level() -> tokenizers.Tokenizer:
    """Words alone: no decoder, no end of a document, holes in the ids."""
    words = sorted(set(text().split()))[:200]
    ids = {"<unk>": 0} | {word: 2 * i + 1 for i, word in enumerate(words)}
    library = tokenizers.Tokenizer(models.WordLevel(ids, "<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return library
