"""Checkpoints: round trips, damage, crashes at every rename, a full disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from neurogen_cy import checkpoint
from neurogen_cy.checkpoint import CheckpointError, Tensors, read, read_meta, write

FILES = ["meta.json", "model.safetensors", "optimizer.safetensors", "state.safetensors"]


def sample(seed: int = 0) -> tuple[Tensors, dict[str, Any]]:
    """Return three groups of tensors and facts that differ with `seed`."""
    rng = np.random.default_rng(seed)
    model = {
        "embedding.weight": rng.normal(size=(5, 3)).astype(np.float32),
        "rows": np.arange(7, dtype=np.int32),
    }
    optimizer = {"m": rng.normal(size=4).astype(np.float32), "v": np.zeros((0, 2), np.float32)}
    state = {
        "v": np.array([np.nan, -0.0, np.inf, 1e-42], np.float32),
        "step": np.array(seed),
        "on": np.array([True]),
    }
    return {"model": model, "optimizer": optimizer, "state": state}, {
        "step": seed,
        "cursor": {"at": 1 / 3, "of": None},
    }


def same(one: tuple[Tensors, dict[str, Any]], other: tuple[Tensors, dict[str, Any]]) -> bool:
    """Say whether two checkpoints agree bit for bit."""
    flat = [
        {(g, k): (a.dtype, a.shape, a.tobytes()) for g, arrays in tensors.items() for k, a in arrays.items()}
        for tensors, _ in (one, other)
    ]
    return flat[0] == flat[1] and one[1] == other[1]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A checkpoint of `sample(0)`."""
    write(tmp_path / "runs" / "last", *sample(0))
    return tmp_path / "runs" / "last"


def test_round_trip_is_exact_and_writable(place: Path) -> None:
    assert same(read(place), sample(0))
    assert read_meta(place) == sample(0)[1]
    assert sorted(os.listdir(place)) == FILES and os.listdir(place.parent) == ["last"]
    assert all(array.flags.writeable for group in read(place)[0].values() for array in group.values())
    np.testing.assert_array_equal(load_file(place / "model.safetensors")["rows"], np.arange(7))


def test_any_memory_order_is_stored_as_the_array_reads(tmp_path: Path) -> None:
    square = np.arange(12, dtype=np.float32).reshape(3, 4)
    write(
        tmp_path / "c", {"model": {"f": np.asfortranarray(square), "t": square.T, "s": square[::2, 1:3]}}, {}
    )
    model = read(tmp_path / "c")[0]["model"]
    for key, expected in {"f": square, "t": square.T, "s": square[::2, 1:3]}.items():
        np.testing.assert_array_equal(model[key], expected)


def test_files_get_the_mode_that_the_umask_asks_for(place: Path) -> None:
    plain = place.parent / "plain"
    plain.touch()
    assert {(place / name).stat().st_mode for name in FILES} == {plain.stat().st_mode}


def test_replacing_leaves_one_checkpoint(place: Path) -> None:
    write(place, *sample(1))
    assert same(read(place), sample(1)) and os.listdir(place.parent) == ["last"]


def test_relative_path_and_link(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    write(".", *sample(1))
    (place.parent / "link").symlink_to(place)
    write(place.parent / "link", *sample(2))
    assert same(read(place), sample(2)) and (place.parent / "link").is_symlink()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_damage_is_named(place: Path, name: str, damage: str) -> None:
    path = place / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes({"flip": bytes(data), "truncate": path.read_bytes()[:-5], "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=rf"{name}: expected .*got"):
        read(place)


def test_every_changed_fact_is_noticed(place: Path) -> None:
    path = place / "meta.json"
    facts = json.loads(path.read_text())
    for key, value in {"step": 1, "files": {}, "checksum": "", "more": 0, "format": 1.0}.items():
        path.write_text(json.dumps({**facts, key: value}))
        with pytest.raises(CheckpointError, match="meta.json: expected .*got"):
            read(place)
    path.write_text(json.dumps(facts, sort_keys=True))
    assert same(read(place), sample(0))


@pytest.mark.parametrize("version", [checkpoint.FORMAT + 1, 0, "1", None, True])
def test_other_format_is_refused(place: Path, version: object) -> None:
    facts = json.loads((place / "meta.json").read_text())
    (place / "meta.json").write_text(json.dumps({**facts, "format": version}))
    with pytest.raises(CheckpointError, match=r"meta.json: expected format 1 to 1, got"):
        read(place)


def test_files_of_two_checkpoints_do_not_mix(place: Path) -> None:
    write(place.parent / "best", *sample(1))
    os.replace(place.parent / "best" / "model.safetensors", place / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors: expected sha256 .*, got"):
        read(place)


def test_no_checkpoint_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: expected a checkpoint directory, got no such path"):
        read(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="meta.json: expected a readable file, got"):
        read(tmp_path)
    (tmp_path / "file").touch()
    for action in (lambda: read(tmp_path / "file"), lambda: write(tmp_path / "file", *sample())):
        with pytest.raises(CheckpointError, match="file: expected a .*got a file"):
            action()


def test_other_files_are_never_removed(place: Path) -> None:
    (place / "notes.txt").write_text("mine")
    with pytest.raises(
        CheckpointError, match="expected a checkpoint to replace or an empty directory, got .'notes.txt'"
    ):
        write(place, *sample(1))
    with pytest.raises(CheckpointError, match="expected a checkpoint to replace"):
        write(place.parent, *sample(1))
    assert same(read(place), sample(0)) and (place / "notes.txt").read_text() == "mine"
    os.rename(place, place.with_name("other.old"))
    with pytest.raises(CheckpointError, match=r"other.old: expected a checkpoint to replace"):
        write(place.with_name("other"), *sample(1))


@pytest.mark.parametrize(
    ("tensors", "meta", "error", "message"),
    [
        ({"model": {"a": np.array(["text"])}}, {}, TypeError, "model: a: expected one of bool, .*got <U4"),
        ({"model": {"a": np.array([1j])}}, {}, TypeError, "model: a: expected one of .*got complex128"),
        ({"../model": {}}, {}, ValueError, "expected a group of tensors named .*got '../model'"),
        ({}, {"format": 3}, ValueError, "expected keys other than format, files, checksum, got .'format'"),
        ({}, {"loss": float("nan")}, ValueError, "not JSON compliant"),
        ({}, {"path": Path()}, TypeError, "not JSON serializable"),
    ],
)
def test_what_cannot_be_stored_touches_nothing(
    place: Path, tensors: Tensors, meta: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write(place, tensors, meta)
    assert same(read(place), sample(0)) and os.listdir(place.parent) == ["last"]


class Crash(BaseException):
    """The machine stops."""


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", [1, 2])
def test_a_crash_at_a_rename_leaves_a_complete_checkpoint(
    place: Path, monkeypatch: pytest.MonkeyPatch, call: int, after: bool
) -> None:
    calls = 0
    rename = os.rename

    def stop(*paths: Path) -> None:
        nonlocal calls
        calls += 1
        if calls < call or (calls == call and after):
            rename(*paths)
        if calls >= call:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", stop)
        patch.setattr("shutil.rmtree", lambda *args, **keywords: None)  # nothing tidies up after a crash
        with pytest.raises(Crash):
            write(place, *sample(1))
    assert same(read(place), sample(1 if call == 2 and after else 0))
    assert len(os.listdir(place.parent)) == 2
    write(place, *sample(2))
    assert same(read(place), sample(2)) and os.listdir(place.parent) == ["last"]


@pytest.mark.parametrize("name", FILES)
def test_a_crash_while_writing_leaves_the_former(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def stop(path: Path) -> None:
        if path.name == name:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr("neurogen_cy.atomic._fsync", stop)
        patch.setattr("shutil.rmtree", lambda *args, **keywords: None)
        with pytest.raises(Crash):
            write(place, *sample(1))
    assert same(read(place), sample(0)) and len(os.listdir(place.parent)) == 2
    write(place, *sample(2))
    assert same(read(place), sample(2)) and os.listdir(place.parent) == ["last"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_failing_rename_puts_the_former_back(
    place: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    calls = 0
    rename = os.rename

    def fail(*paths: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError("no")
        rename(*paths)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no"):
        write(place, *sample(1))
    assert same(read(place), sample(0)) and os.listdir(place.parent) == ["last"]


def test_an_empty_place_does_not_cost_the_one_set_aside(place: Path) -> None:
    os.rename(place, place.with_name("last.old"))
    assert same(read(place), sample(0))
    place.mkdir()
    write(place, *sample(1))
    assert same(read(place), sample(1)) and os.listdir(place.parent) == ["last"]


def test_reading_while_it_is_replaced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_meta = checkpoint._load_meta

    def replaced_between(folder: Path) -> Any:
        facts = load_meta(folder)
        monkeypatch.setattr(checkpoint, "_load_meta", load_meta)
        write(place, *sample(1))
        return facts

    monkeypatch.setattr(checkpoint, "_load_meta", replaced_between)
    assert same(read(place), sample(1))


def test_a_full_disk_keeps_the_former(place: Path) -> None:
    limit = max(path.stat().st_size for path in place.iterdir()) + 100
    program = (
        "import resource, sys, numpy as np\n"
        "from neurogen_cy.checkpoint import write\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try:\n"
        "    groups = {'model': {'small': np.zeros(1)}, 'optimizer': {'large': np.zeros(9999)}}\n"
        "    write(sys.argv[1], groups, {})\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(place)], capture_output=True, text=True, check=True
    )
    assert "optimizer.safetensors: expected to write the checkpoint, got:" in done.stdout
    assert same(read(place), sample(0)) and os.listdir(place.parent) == ["last"]
