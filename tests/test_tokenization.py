"""Tokenizers of every kind: ids and back, streams of text, bytes that are no UTF-8, files, checkpoints."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizer_makers as makers
from hypothesis import example, given, settings
from hypothesis import strategies as st

import neurogen_cy as ng
from neurogen_cy import checkpoint, tokenization
from neurogen_cy.checkpoint import CheckpointError
from neurogen_cy.tokenization import InvalidTextError, load, load_saved

TEXT = "One  caf\u00e9,\n\ntwo \U0001f468\u200d\U0001f469\u200d\U0001f466 don't stop. \u4e2d\u6587\t<end> "


@pytest.fixture(scope="module", params=makers.KINDS)
def tokenizer(request):
    if request.param.startswith("sp-"):
        pytest.importorskip("sentencepiece", reason="the extra sentencepiece is not installed")
    return makers.make(request.param)


def exact(tokenizer: tokenization.Tokenizer) -> bool:
    return tokenizer.kind == "bytes" or getattr(tokenizer, "_byte_level", False)


def test_ids_are_in_the_vocabulary_and_mean_the_text(tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32 and ids.ndim == 1 and 0 <= ids.min() and ids.max() < tokenizer.vocab_size
    np.testing.assert_array_equal(ids, tokenizer.encode(TEXT.encode()))
    np.testing.assert_array_equal(ids, tokenizer.encode_batch([b"first", TEXT.encode(), b""])[1])
    assert tokenizer.encode("").shape == (0,) and tokenizer.decode([]) == ""
    assert "don" in tokenizer.decode(ids) and "stop" in tokenizer.decode(ids) or tokenizer.vocab_size < 450
    assert (tokenizer.decode(ids) == TEXT) >= exact(tokenizer)


def test_nothing_is_cut_off_filled_up_or_put_around(tokenizer) -> None:
    words = "the class of an object " * 40
    ids = tokenizer.encode(words)
    assert len(ids) >= 5 * 40 and len(tokenizer.encode("the")) < 9
    one, two = tokenizer.encode_batch([b"the", words.encode()])
    assert len(one) < len(two) == len(ids)


@settings(deadline=None)
@given(st.binary(max_size=60))
@example(b"\xed\xa0\x80 \xf4\x90\x80\x80 \xc0\xaf\xe2\x82")
@pytest.mark.parametrize("kind", makers.EXACT)
def test_any_bytes_come_back(kind: str, data: bytes) -> None:
    tokenizer = makers.make(kind)
    ids = tokenizer.encode(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode("utf-8", "replace")


def test_bytes_that_are_no_utf8_become_their_own_tokens_or_are_refused(tokenizer) -> None:
    data = b"good \xff\xc3 bad"
    if getattr(tokenizer, "_byte_ids", None) is None and tokenizer.kind != "bytes":
        with pytest.raises(InvalidTextError, match="expected UTF-8.*got the byte 0xff at offset 5") as caught:
            tokenizer.encode(data)
        assert caught.value.offset == 5
    else:
        ids = tokenizer.encode(data)
        assert "\ufffd\ufffd" in tokenizer.decode(ids) and len(ids) >= 4


def test_many_wrong_bytes_take_no_longer() -> None:
    data = bytes(range(128, 256)) * 2000
    tokenizer = makers.make("byte-level")
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_text_as_it_comes_is_the_text(tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=200))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=len(ids), max_size=len(ids)))
    decoder, said, at = tokenizer.decoder(), "", 0
    for size in sizes:
        said += decoder.push(ids[at : at + size])
        at += size
    assert said + decoder.finish() == tokenizer.decode(ids)
    assert decoder.finish() == ""


def test_no_half_character_is_ever_said(tokenizer) -> None:
    ids = tokenizer.encode((TEXT + "\U0001f680\u20ac ") * 20)
    decoder = tokenizer.decoder()
    said = [decoder.push(int(i)) for i in ids] + [decoder.finish()]
    assert "".join(said) == tokenizer.decode(ids)
    assert ("\ufffd" in "".join(said)) == ("\ufffd" in tokenizer.decode(ids))
    assert sum(bool(part) for part in said) > len(ids) // 3  # it comes as it is written, not at the end


def test_ids_outside_the_vocabulary_are_refused(tokenizer) -> None:
    for bad in (-1, tokenizer.vocab_size, 2**40):
        with pytest.raises(IndexError, match=rf"expected token ids in 0\.\.{tokenizer.vocab_size - 1}, got {bad}"):
            tokenizer.decode([0, bad])


def test_what_stands_between_documents() -> None:
    ends = {"bytes": None, "byte-level": 0, "metaspace": 2, "word-piece": 3, "word-level": None}
    for kind, end in ends.items():
        tokenizer = makers.make(kind)
        assert tokenizer.end == end
        assert tokenizer.separator.tolist() == ([end] if end is not None else tokenizer.encode("\n").tolist())
    assert makers.make("bytes").separator.tolist() == [10]


def test_holes_in_the_ids_decode_to_nothing() -> None:
    tokenizer = makers.make("word-level")
    assert tokenizer.vocab_size == 400 and tokenizer.decode([2, 4, 398]) == ""


def test_surrogate_escapes_of_a_command_line_are_the_bytes() -> None:
    assert makers.make("bytes").encode("a\udcff").tolist() == [97, 255]
    with pytest.raises(ValueError, match="surrogates not allowed"):
        makers.make("bytes").encode("a\ud800")


# ---- files -----------------------------------------------------------------------------------------------------


def test_load_knows_the_kind(tmp_path: Path) -> None:
    assert load(None).kind == load("bytes").kind == "bytes"
    (tmp_path / "my.tok").write_bytes(b" \n" + makers.content("byte-level"))
    assert load(tmp_path / "my.tok").kind == "json"
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "tokenizer.json").write_bytes(makers.content("word-piece"))
    assert load(tmp_path / "hub").sha256 == makers.make("word-piece").sha256


def test_load_knows_sentencepiece(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason="the extra sentencepiece is not installed")
    (tmp_path / "m").write_bytes(makers.content("sp-bpe"))
    assert load(tmp_path / "m").to_dict() == makers.make("sp-bpe").to_dict()
    (tmp_path / "bad.model").write_bytes(b"\nnonsense")
    with pytest.raises(ValueError, match=r"bad\.model: expected a SentencePiece model that can be used, got: "):
        load(tmp_path / "bad.model")


def test_load_without_sentencepiece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "m.model").write_bytes(b"\n\x00")
    with pytest.raises(ModuleNotFoundError, match=r"expected the package sentencepiece.*pip install 'neurogen_cy\["):
        load(tmp_path / "m.model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a tokenizers JSON file or a SentencePiece model, got neither"),
        (b"plain text", "expected a tokenizers JSON file or a SentencePiece model, got neither"),
        (b"{}", "expected a tokenizer that can be used, got: "),
        (b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}', "expected 1 to .* tokens, got 0"),
        (b'{"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 99999999}}}', "expected 1 to .* tokens"),
        (b'{"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"b": 0}}}', "expected a tokenizer that can be"),
        (b'{"a":' * 100_000, "expected a tokenizer that can be used, got: "),
        (b'{"\xff": 1}', "expected a tokenizer that can be used, got: "),
    ],
)
def test_load_refuses_what_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "t")


def test_load_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected the file of a tokenizer, got .*no such file"):
        load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json or tokenizer\.model in this folder"):
        load(tmp_path)


# ---- checkpoints -----------------------------------------------------------------------------------------------

TINY = dict(
    dim=32,
    regions=(ng.Region("a", 32, 0),),
    projections=(ng.Projection("embedding", "a"), ng.Projection("a", "broca_out")),
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tokenizer = makers.make("byte-level")
    model = ng.NeuroGen(ng.Config(vocab_size=tokenizer.vocab_size, **TINY), backend="cpu")
    model.save(tmp_path / "here", tokenizer=tokenizer)
    shutil.move(tmp_path / "here", tmp_path / "there")
    return tmp_path / "there"


def test_a_checkpoint_carries_its_tokenizer(saved: Path) -> None:
    tokenizer = load_saved(saved)
    assert tokenizer.to_dict() == makers.make("byte-level").to_dict() == checkpoint.read_meta(saved)["tokenizer"]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert load(saved).sha256 == tokenizer.sha256  # tokenizer.json is there for others too
    model = ng.NeuroGen.load(saved, backend="cpu")
    model.save(saved, tokenizer=tokenizer)
    assert sorted(p.name for p in saved.iterdir()) == [
        "meta.json", "model.safetensors", "optimizer.safetensors", "state.safetensors", "tokenizer.json"
    ]  # fmt: skip


def test_a_changed_tokenizer_is_refused(saved: Path) -> None:
    raw = (saved / "tokenizer.json").read_bytes()
    for changed in (raw.replace(b'"the"', b'"teh"') + b" ", raw[:-1], raw[:-2] + b"\n}"):
        (saved / "tokenizer.json").write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected (\d+ bytes|sha256)"):
            load_saved(saved)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected (\d+ bytes|sha256)"):
            ng.NeuroGen.load(saved)
    (saved / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected a readable file"):
        load_saved(saved)


def test_other_facts_of_a_tokenizer_are_refused(saved: Path, tmp_path: Path) -> None:
    tensors, meta = checkpoint.read(saved)
    facts, files = meta.pop("tokenizer"), {"tokenizer.json": (saved / "tokenizer.json").read_bytes()}
    other = {"tokenizer.json": makers.content("word-piece")}
    for wrong, content, message in (
        (facts | {"sha256": "00"}, files, "expected the tokenizer .*'sha256': '00'.*got"),
        (facts, other, "expected the tokenizer .*got"),
        (facts | {"kind": "sentencepiece"}, files, r"expected tokenizer\.model in this checkpoint, got"),
        (facts | {"kind": ["json"]}, files, "expected a tokenizer of kind bytes, json, sentencepiece, got"),
        ("json", files, "expected a tokenizer of kind bytes, json, sentencepiece, got 'json'"),
        (facts, {}, r"expected tokenizer\.json in this checkpoint, got"),
        (None, files, "expected a tokenizer in it, or 256 tokens.*600 tokens"),
        (makers.make("bytes").to_dict(), files, "expected a tokenizer of 600 tokens, got 256"),
    ):
        checkpoint.write(tmp_path / "c", tensors, meta | {"tokenizer": wrong}, content)
        with pytest.raises(CheckpointError, match=message):
            load_saved(tmp_path / "c")


def test_a_checkpoint_of_bytes_needs_no_file(tmp_path: Path) -> None:
    model = ng.NeuroGen(ng.Config(vocab_size=256, **TINY), backend="cpu")
    for tokenizer in (None, makers.make("bytes")):
        model.save(tmp_path / "c", tokenizer=tokenizer)
        assert load_saved(tmp_path / "c").kind == "bytes"
        assert not list((tmp_path / "c").glob("tokenizer*"))
    with pytest.raises(ValueError, match="tokenizer: expected one of 256 tokens, as the model has, got 600"):
        model.save(tmp_path / "c", tokenizer=makers.make("byte-level"))
    with pytest.raises(ValueError, match=r"files: expected tokenizer\.json or tokenizer\.model, got .'evil'"):
        checkpoint.write(tmp_path / "d", {}, {}, {"evil": b""})
    (tmp_path / "c" / "meta.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(CheckpointError):
        load_saved(tmp_path / "c")


def test_expect_same() -> None:
    tokenization.expect_same(makers.make("byte-level"), makers.make("byte-level"))
    with pytest.raises(ValueError, match="expected the tokenizer of the checkpoint .json, 600.*got another .bytes"):
        tokenization.expect_same(makers.make("bytes"), makers.make("byte-level"))
