"""Texts as tokens: the cache, what makes it anew, the part held out, bits per byte."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizer_makers as makers
from hypothesis import given, settings
from hypothesis import strategies as st

from neurogen_cy import corpus, sources, token_cache
from neurogen_cy.corpus import open_corpus, open_same_corpus
from neurogen_cy.data import default_corpus, split

TOKENIZER = "byte-level"
FILES = ("tokens.bin", "starts.bin", "pieces.bin", "meta.json")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    english = default_corpus()[0]
    for number, size in enumerate((900, 4000, 30, 2500, 1200)):
        (folder / f"{number}.txt").write_bytes(english[number * 5000 :][:size])
    return folder


def caches(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()]


def opened(texts: Path, tmp_path: Path, **more) -> corpus.Corpus:
    return open_corpus(texts, makers.make(TOKENIZER), cache=tmp_path / "cache", **more)


def test_the_default_is_what_it_was() -> None:
    data, facts = default_corpus()
    training, validation = split(data)
    found = open_corpus()
    assert found.training.ids.tobytes() == training and found.validation.ids.tobytes() == validation
    assert found.training.unit == "bytes" and found.training.starts.tolist() == [0]
    assert facts.items() <= found.facts.items() and json.loads(json.dumps(found.facts)) == found.facts
    assert found.text() == (training, validation)
    loss = 1.2201234
    assert found.training.bits_per_byte(loss) == loss / math.log(2)


@pytest.mark.parametrize("kind", ["bytes", TOKENIZER])
def test_the_same_bytes_are_held_out_whatever_the_tokenizer(kind: str, tmp_path: Path) -> None:
    data = default_corpus()[0][:50_000]
    (tmp_path / "a.txt").write_bytes(data)
    found = open_corpus(tmp_path / "a.txt", makers.make(kind), cache=tmp_path / "cache")
    parts = split(data)
    assert tuple(makers.make(kind).decode_bytes(part.ids) for part in (found.training, found.validation)) == parts
    assert (found.training.text_bytes, found.validation.text_bytes) == tuple(len(part) for part in parts)
    assert found.text() == parts
    assert (tmp_path / "cache").exists() == (kind != "bytes")


@pytest.mark.parametrize("kind", ["bytes", TOKENIZER])
def test_documents_are_separated_and_counted(kind: str, texts: Path, tmp_path: Path) -> None:
    tokenizer = makers.make(kind)
    found = open_corpus(texts, tokenizer, validation=texts / "1.txt", cache=tmp_path / "cache")
    documents = [path.read_bytes() for path in sorted(texts.iterdir())]
    whole = b"\n".join(documents)
    assert found.facts["bytes"] == found.training.text_bytes == len(whole) and found.facts["documents"] == 5
    starts = found.training.starts.tolist()
    rows = [found.training.ids[a:b] for a, b in zip(starts, [*starts[1:], None])]
    for number, (row, text) in enumerate(zip(rows, documents, strict=True)):
        before = len(tokenizer.separator) if number else 0
        np.testing.assert_array_equal(row[:before], tokenizer.separator[:before])
        assert tokenizer.decode_bytes(row[before:]) == text
    assert found.validation.ids.dtype == (np.uint8 if kind == "bytes" else np.uint16)
    assert tokenizer.decode_bytes(found.validation.ids) == documents[1]
    assert found.facts["validation"]["name"] == "1.txt"
    assert found.text() == (whole, documents[1])


def test_a_document_that_begins_shortly_before_the_end_is_held_out_whole(texts: Path, tmp_path: Path) -> None:
    for kind in ("bytes", TOKENIZER):
        found = open_corpus(texts, makers.make(kind), cache=tmp_path / "cache")
        size = sum(path.stat().st_size + 1 for path in texts.iterdir()) - 1
        assert found.validation.text_bytes == 1201  # the last, with its separator: more than a tenth, below 15 %
        assert 0.1 * size < 1201 < 0.15 * size
        assert found.training.text_bytes == size - 1201
        assert found.validation.starts.tolist() == [0] and len(found.training.starts) == 4


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text("ab \n\u00e9.", min_size=1, max_size=60), min_size=1, max_size=12))
def test_all_tokens_are_in_one_part(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (folder / "a.jsonl").write_text(lines)
    size = len("\n".join(documents).encode())
    for kind in ("bytes", TOKENIZER):
        try:
            found = open_corpus(folder / "a.jsonl", makers.make(kind), cache=folder / "cache")
        except ValueError as error:
            assert "expected a text long enough" in str(error) and size < 20
            continue
        whole = folder / "a.jsonl"
        alone = open_corpus(whole, makers.make(kind), validation=whole, cache=folder / "cache")
        assert found.training.text_bytes + found.validation.text_bytes == size == alone.training.text_bytes
        assert min(found.training.text_bytes, found.validation.text_bytes) > 0
        joined = np.concatenate([found.training.ids, found.validation.ids])
        assert makers.make(kind).decode_bytes(joined) == makers.make(kind).decode_bytes(alone.training.ids)
        cut = len(found.training)
        starts = {*found.training.starts.tolist(), *(found.validation.starts[1:] + cut).tolist()}
        assert starts | {cut} == {int(n) for n in alone.training.starts} | {cut} or kind != "bytes"
        assert len(starts | {cut}) in (len(documents), len(documents) + 1)


def test_a_text_too_short_to_hold_out(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    for kind in ("bytes", TOKENIZER):
        with pytest.raises(ValueError, match="expected a text long enough to hold the end of it out.*got 1 bytes"):
            open_corpus(tmp_path / "a", makers.make(kind), cache=tmp_path / "c")
    (tmp_path / "a").write_text("")
    with pytest.raises(ValueError, match="expected text in a, got none"):
        open_corpus(tmp_path / "a")
    with pytest.raises(ValueError, match="expected a text that gives tokens, got none"):
        open_corpus(tmp_path / "a", makers.make(TOKENIZER), cache=tmp_path / "c")


@pytest.mark.parametrize("kind", ["bytes", TOKENIZER])
def test_a_text_of_unknown_size_is_cut_at_a_document(kind: str, tmp_path: Path, monkeypatch) -> None:
    lines = [json.dumps({"text": f"document {number} " * 20}) for number in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    wanted = open_corpus(tmp_path / "a.jsonl", makers.make(kind), cache=tmp_path / "one")
    monkeypatch.setattr(sources.FileSource, "size", lambda self, read=True: None)
    monkeypatch.setattr(sources.FileSource, "at_most", lambda self: math.inf)
    found = open_corpus(tmp_path / "a.jsonl", makers.make(kind), cache=tmp_path / "two")
    assert found.facts == wanted.facts and found.validation.ids.tolist() == wanted.validation.ids.tolist()
    assert found.training.ids.tolist() == wanted.training.ids.tolist()


# ---- the cache -------------------------------------------------------------------------------------------------


def test_a_cache_is_used_again(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    seen: list[tuple[int, int | None]] = []
    first = opened(texts, tmp_path, progress=lambda done, total: seen.append((done, total)))
    size = first.facts["bytes"]
    assert seen[-1] == (size, size) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    monkeypatch.setattr(corpus, "tokenised", None)
    again = opened(texts, tmp_path)
    assert isinstance(again.training.ids.base, np.memmap) or isinstance(again.training.ids, np.memmap)
    for one, two in ((first.training, again.training), (first.validation, again.validation)):
        np.testing.assert_array_equal(one.ids, two.ids)
        np.testing.assert_array_equal(one.starts, two.starts)
        assert (one.sha256, one.text_bytes) == (two.sha256, two.text_bytes)
    assert first.facts == again.facts and not caplog.records
    with pytest.raises(ValueError, match="read-only"):
        again.training.ids[0] = 1


def test_a_text_that_changes_is_tokenised_anew(texts: Path, tmp_path: Path, caplog) -> None:
    first = opened(texts, tmp_path)
    (texts / "2.txt").write_text("another text")
    second = opened(texts, tmp_path)
    assert first.facts["sha256"] != second.facts["sha256"] and first.training.sha256 != second.training.sha256
    assert "token cache made anew: " in caplog.text and "expected one of" in caplog.text
    assert len(caches(tmp_path / "cache")) == 1  # in its place


def test_another_tokenizer_field_or_use_has_a_cache_of_its_own(texts: Path, tmp_path: Path) -> None:
    opened(texts, tmp_path)
    opened(texts, tmp_path, validation=texts / "1.txt")
    open_corpus(texts, makers.make("word-piece"), cache=tmp_path / "cache")
    assert len(caches(tmp_path / "cache")) == 4


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "remove", "empty"])
def test_a_damaged_cache_is_never_used(texts: Path, tmp_path: Path, caplog, name: str, damage: str) -> None:
    first = np.array(opened(texts, tmp_path).training.ids)
    path = caches(tmp_path / "cache")[0] / name
    data, times = bytearray(path.read_bytes()), path.stat()
    if damage == "remove":
        path.unlink()
    else:
        if damage == "flip":
            data[len(data) // 2] ^= 4
        path.write_bytes({"flip": data, "truncate": data[:-8], "extend": data + b"12345678", "empty": b""}[damage])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = opened(texts, tmp_path)
    assert "token cache made anew: " in caplog.text and name in caplog.text
    np.testing.assert_array_equal(first, second.training.ids)
    caplog.clear()
    opened(texts, tmp_path)
    assert not caplog.records


def test_a_cache_that_cannot_be_written(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match="expected a folder for token caches, set by NEUROGEN_CACHE, got: "):
        opened(texts, tmp_path)


def test_a_text_that_fails_leaves_nothing(texts: Path, tmp_path: Path) -> None:
    (texts / "3.txt").write_bytes(b"a\0b")
    with pytest.raises(ValueError, match="got a NUL byte at offset 1"):
        opened(texts, tmp_path)
    assert not caches(tmp_path / "cache")


def test_disk_full_while_tokenising(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(texts, tmp_path)
    (texts / "2.txt").write_text("another text")

    def full(self, values) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(token_cache._Writer, "write", full)
        with pytest.raises(OSError, match="No space left"):
            opened(texts, tmp_path)
    assert sorted(path.name for path in caches(tmp_path / "cache")[0].iterdir()) == sorted(FILES)
    assert len(caches(tmp_path / "cache")) == 1
    assert opened(texts, tmp_path).facts["sha256"] != first.facts["sha256"]


def _open(texts: Path, tmp_path: Path, results) -> None:
    found = opened(texts, tmp_path)
    results.put((found.training.sha256, len(found.training), int(found.training.ids[:].sum())))


def test_processes_at_once_make_it_together(texts: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_open, args=(texts, tmp_path, results)) for _ in range(2)]
    for process in processes:
        process.start()
    seen = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(seen) == 1 and len(caches(tmp_path / "cache")) == 1


def test_where_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NEUROGEN_CACHE", str(tmp_path / "own"))
    assert token_cache.folder() == tmp_path / "own"
    monkeypatch.delenv("NEUROGEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert token_cache.folder() == tmp_path / "xdg" / "neurogen"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token_cache.folder() == tmp_path / ".cache" / "neurogen"


def test_wide_vocabularies_have_wide_ids(tmp_path: Path) -> None:
    for size, dtype in ((256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")):
        assert token_cache.TokenCache(tmp_path, {}, None, size)._types["tokens.bin"] == dtype


def test_long_bytes_go_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = default_corpus()[0]
    (tmp_path / "a.txt").write_bytes(data)
    memory = open_corpus(tmp_path / "a.txt", cache=tmp_path / "cache")
    monkeypatch.setattr(corpus, "IN_MEMORY", 1000)
    mapped = open_corpus(tmp_path / "a.txt", cache=tmp_path / "cache")
    assert mapped.facts == memory.facts and len(caches(tmp_path / "cache")) == 1
    for one, two in ((memory.training, mapped.training), (memory.validation, mapped.validation)):
        assert one.ids.tobytes() == two.ids.tobytes() and one.text_bytes == two.text_bytes


# ---- again, and measured ---------------------------------------------------------------------------------------


def test_the_same_text_is_opened_again_and_another_refused(texts: Path, tmp_path: Path) -> None:
    tokenizer = makers.make(TOKENIZER)
    for own in (None, texts / "1.txt"):
        facts = json.loads(json.dumps(opened(texts, tmp_path, validation=own).facts))
        again = open_same_corpus(facts, tokenizer, cache=tmp_path / "cache")
        assert again.facts == facts
        moved = open_same_corpus(facts, tokenizer, spec=texts, validation=own, cache=tmp_path / "cache")
        assert moved.training.sha256 == again.training.sha256
        with pytest.raises(ValueError, match="expected the text that was trained on .texts, .*got 1.txt"):
            open_same_corpus(facts, tokenizer, spec=texts / "1.txt", cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"expected the text that was trained on .1\.txt.*got 2\.txt"):
        open_same_corpus(facts, tokenizer, validation=texts / "2.txt", cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="expected no text for validation"):
        open_same_corpus(facts | {"validation": None}, tokenizer, validation=texts / "2.txt", cache=tmp_path / "cache")


def test_facts_of_earlier_checkpoints_open_the_same_text(texts: Path) -> None:
    _, facts = default_corpus()
    assert open_same_corpus(facts).facts["sha256"] == facts["sha256"]


def test_a_text_that_changed_since_is_not_given(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(texts, tmp_path)
    (texts / "2.txt").write_text("another text")
    with pytest.raises(ValueError, match="expected the text that was trained on"):
        found.text()
    monkeypatch.setattr(corpus, "TEXT_LIMIT", 10)
    assert found.text() is None


def test_bits_per_byte_are_of_the_text_not_of_the_tokens(texts: Path, tmp_path: Path) -> None:
    one = open_corpus(texts, makers.make("bytes")).validation
    two = opened(texts, tmp_path).validation
    assert one.text_bytes == two.text_bytes and len(two) < len(one)
    total = 1000.0  # nats of the whole text
    assert one.bits_per_byte(total / len(one)) == pytest.approx(two.bits_per_byte(total / len(two)), rel=1e-12)
    assert two.bits_per_byte(total / len(two)) == pytest.approx(total / one.text_bytes / math.log(2), rel=1e-12)


def test_the_head_of_a_text_knows_its_bytes(texts: Path, tmp_path: Path) -> None:
    tokenizer = makers.make(TOKENIZER)
    whole = opened(texts, tmp_path, validation=texts / "1.txt").training
    for limit in (1, 500, 2000, len(whole) - 1, len(whole), 10**9):
        head = whole.head(limit)
        assert min(limit, len(whole)) <= len(head) <= len(whole)
        text = tokenizer.decode_bytes(head.ids[head.ids != tokenizer.end])
        assert head.text_bytes == len(text) + len(head.starts) - 1
        assert (head.sha256 == whole.sha256) == (len(head) == len(whole))
    small = open_corpus(texts, makers.make("bytes")).training
    assert len(small.head(100)) == small.head(100).text_bytes == 100


def test_the_cache_speaks_by_logging(caplog) -> None:
    assert token_cache.log.name == "neurogen_cy.token_cache" and token_cache.log.isEnabledFor(logging.WARNING)
