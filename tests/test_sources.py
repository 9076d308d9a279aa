"""Where text comes from: files, folders, JSON lines, zstd, data sets; what is damaged is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from neurogen_cy import sources
from neurogen_cy.data import default_corpus
from neurogen_cy.sources import open_source


def documents(source: sources.Source) -> list[bytes]:
    """The documents of a source, its chunks joined; each is where it says."""
    found: list[bytes] = []
    for chunk in source.chunks():
        assert chunk.data
        if chunk.first:
            assert chunk.offset == 0
            found.append(b"")
        assert chunk.offset == len(found[-1])
        found[-1] += chunk.data
    assert source.size() in (None, len(b"\n".join(found)))
    assert source.size(read=False) in (None, source.size())
    assert source.at_most() >= len(b"\n".join(found))
    assert json.loads(json.dumps(source.manifest())) == source.manifest()
    return found


def zst(data: bytes, **settings) -> bytes:
    """Compressed, in a frame that does not say its size."""
    zstandard = pytest.importorskip("zstandard", reason="the extra zstd is not installed")
    packer = zstandard.ZstdCompressor(**settings).compressobj()
    return packer.compress(data) + packer.flush()


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_the_default_corpus_is_one_document() -> None:
    source = open_source(None)
    assert documents(source) == [default_corpus()[0]]
    assert documents(open_source(source.place)) == documents(source)


def test_a_file_is_a_document_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK", 3)
    (tmp_path / "a.txt").write_bytes(b"caf\xc3\xa9\r\n\xff")
    source = open_source(tmp_path / "a.txt")
    assert documents(source) == [b"caf\xc3\xa9\r\n\xff"] and len(list(source.chunks())) == 3
    assert source.name == "a.txt" and documents(open_source(source.place)) == documents(source)


def test_a_folder_in_order_with_everything_in_it(tmp_path: Path) -> None:
    for name, text in {
        "b.txt": b"plain",
        "a/z.jsonl": lines({"text": "first"}, {"text": ""}, {"text": "caf\u00e9\n", "id": 3}) + b"\n  \n",
        "a/y.ndjson": lines({"text": "before"}),
        "c": b"no suffix",
        ".hidden": b"no",
        "empty.txt": b"",
        "d.json": b'{"text": "as it stands"}',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    assert documents(open_source(tmp_path)) == [
        b"before", b"first", "caf\u00e9\n".encode(), b"plain", b"no suffix", b'{"text": "as it stands"}'
    ]  # fmt: skip


def test_zst_of_both_and_many_frames(tmp_path: Path) -> None:
    big = b"the quick brown fox\n" * 100_000
    (tmp_path / "a.txt.zst").write_bytes(zst(big) + zst(b"second frame", write_checksum=True) + zst(b""))
    (tmp_path / "b.jsonl.zst").write_bytes(zst(lines({"text": "one"}, {"text": "two"})))
    (tmp_path / "c.zst").write_bytes(zst(b"plain"))
    (tmp_path / "d.zst").write_bytes(zst(b""))
    assert documents(open_source(tmp_path)) == [big + b"second frame", b"one", b"two", b"plain"]


def test_a_damaged_zst_is_named(tmp_path: Path) -> None:
    whole = zst(b"some text " * 1000, write_checksum=True)
    path = tmp_path / "a.zst"
    for broken, message in (
        (whole[:-1], "expected whole zstd frames, got a file that ends inside one"),
        (whole[: len(whole) // 2], "expected whole zstd frames, got a file that ends inside one"),
        (whole + b"x", "expected (zstd data|whole zstd frames), got"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "expected zstd data, got"),
        (b"not compressed", "expected zstd data, got"),
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"a\.zst: {message}"):
            list(open_source(path).chunks())


def test_zst_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    (tmp_path / "a.zst").write_bytes(b"x")
    with pytest.raises(ModuleNotFoundError, match=r"a\.zst: expected the package zstandard.*'neurogen_cy\[zstd"):
        list(open_source(tmp_path / "a.zst").chunks())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "expected a JSON object, got: "),
        (b'{"text": "\xff"}', "expected a JSON object, got: "),
        (b"[" * 100_000, "expected a JSON object, got: "),
        (b'["text"]', "expected a record with text in its field 'text', got a list"),
        (b'{"body": "x", "a": 1}', r"expected a record with text in its field 'text', got the fields \['a', 'body'\]"),
        (b'{"text": 5}', "expected a record with text in its field 'text', got int there"),
        (b'{"text": null}', "expected a record with text in its field 'text', got NoneType there"),
    ],
)
def test_a_wrong_record_is_named_by_its_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "good"}) + line + b"\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl: line 2: {message}"):
        list(open_source(tmp_path / "a.jsonl").chunks())


def test_a_record_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_RECORD", 50)
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "good"}) + b'{"text": "' + b"x" * 100)
    with pytest.raises(ValueError, match=r"line 2: expected a record of at most 50 bytes, got a longer line"):
        list(open_source(tmp_path / "a.jsonl").chunks())


def test_another_field_and_lone_surrogates(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "a\\ud800", "text": 1}\n')
    assert documents(open_source(tmp_path / "a.jsonl", "body")) == [b"a\xed\xa0\x80"]


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a text file or a directory of text files, got .*absent"):
        open_source(tmp_path / "absent")
    with pytest.raises(ValueError, match="expected text files below .*, got none"):
        open_source(tmp_path)
    (tmp_path / "image").write_bytes(b"x" * (1 << 20) + b"ab\0c")
    with pytest.raises(ValueError, match=r"expected text in .*image, got a NUL byte at offset 1048578"):
        list(open_source(tmp_path).chunks())


def test_the_manifest_changes_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    seen = [open_source(tmp_path).manifest()]
    (tmp_path / "a").write_text("two!")
    seen.append(open_source(tmp_path).manifest())
    (tmp_path / "b").write_text("more")
    seen.append(open_source(tmp_path).manifest())
    assert seen[0] != seen[1] != seen[2]


# ---- data sets -------------------------------------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("datasets", reason="the extra datasets is not installed")


def test_a_data_set_on_disk(tmp_path: Path, datasets) -> None:
    made = datasets.Dataset.from_dict({"text": ["one", "", "two"], "n": [1, 2, 3]})
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": made}).save_to_disk(str(tmp_path / "many"))
    for spec in (f"hf:{tmp_path}/one", f"hf:{tmp_path}/many::test"):
        source = open_source(Path(spec) if spec.endswith("one") else spec)
        assert documents(source) == [b"one", b"two"] and source.size() is None
        assert documents(open_source(source.place)) == [b"one", b"two"]
    with pytest.raises(ValueError, match="record 0: expected a record with text in its field 'n', got int there"):
        list(open_source(f"hf:{tmp_path}/one", "n").chunks())
    with pytest.raises(ValueError, match="many: expected a data set that can be read, got"):
        open_source(f"hf:{tmp_path}/many")


def test_a_folder_streamed_by_datasets(tmp_path: Path, datasets) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_bytes(lines({"text": "one"}, {"text": "two"}))
    assert documents(open_source(f"hf:{tmp_path}/d")) == [b"one", b"two"]


def test_a_data_set_that_breaks_off(tmp_path: Path, datasets, monkeypatch: pytest.MonkeyPatch) -> None:
    made = datasets.Dataset.from_dict({"text": ["one"]})
    made.save_to_disk(str(tmp_path / "one"))
    source = open_source(f"hf:{tmp_path}/one")

    def broken():
        yield {"text": "one"}
        raise RuntimeError("connection lost")

    monkeypatch.setattr(source, "_rows", broken())
    with pytest.raises(ValueError, match="record 1: expected to read it, got: connection lost"):
        list(source.chunks())


def test_a_data_set_of_the_hub_is_known_by_its_commit(datasets, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def load(*name, **settings):
        asked.append((name, settings))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    info = lambda self, name: SimpleNamespace(sha=f"of {name}")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    source = open_source("hf:org/name:en:test")
    assert documents(source) == [b"one", b"two"] and source.manifest() == "of org/name"
    assert asked == [(("org/name", "en"), {"split": "test", "streaming": True})]
    assert source.place == "hf:org/name:en:test" and open_source("hf:org/name").place == "hf:org/name::train"


def test_a_data_set_that_is_not_there(datasets) -> None:
    with pytest.raises(ValueError, match="hf:no/such: expected a data set that can be read, got: "):
        open_source("hf:no/such")
    for spec in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(ValueError, match=r"expected hf:name\[:config\]\[:split\], got"):
            open_source(spec)


def test_data_sets_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"hf:x: expected the package datasets.*pip install 'neurogen_cy\["):
        open_source("hf:x")
