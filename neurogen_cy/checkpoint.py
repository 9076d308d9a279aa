"""Checkpoint directories: safetensors files and `meta.json`, replaced as one (see `atomic`).

::

    <name>/model.safetensors ...   one file per group of tensors
    <name>/tokenizer.json          or .model: what makes text of the model's tokens, where it needs one
    <name>/meta.json               the caller's facts, `format`, and size and sha256 of each file
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from neurogen_cy import atomic

FORMAT = 1
"""Version of the layout; a reader accepts this one and older ones."""

Tensors = dict[str, dict[str, NDArray[Any]]]

_META = "meta.json"
_SUFFIX = ".safetensors"
_GROUP = "[a-z][a-z0-9_]*"
_ATTACHED = ("tokenizer.json", "tokenizer.model")
_RESERVED = ("format", "files", "checksum")
_DTYPES = (
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "float32", "float64"),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: missing, damaged, incomplete or of a newer format."""


def write(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Mapping[str, NDArray[Any]]],
    meta: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a checkpoint, or replace the one that is there.

    Parameters
    ----------
    directory : path
        Place of the checkpoint; parents are made. It may be absent, empty or an earlier checkpoint.
    tensors : {group: {key: array}}
        Group `model` becomes `model.safetensors`. Arrays of any shape, of booleans, integers or floats.
    meta : dict
        Facts for `meta.json`: what JSON can hold, without the keys `format`, `files` and `checksum`.
    files : {name: content}, optional
        Kept beside them as they are: `tokenizer.json` or `tokenizer.model`.

    Raises
    ------
    TypeError, ValueError
        If the tensors or the facts cannot be stored; nothing is written.
    CheckpointError
        If `directory` is a file or holds anything that is no checkpoint; nothing is touched.
    OSError
        If writing fails (disk full); the earlier checkpoint stays and the partial one is removed.
    """
    arrays = {group: _storable(group, members) for group, members in tensors.items()}
    taken = [key for key in _RESERVED if key in meta]
    if taken:
        raise ValueError(f"meta: expected keys other than {', '.join(_RESERVED)}, got {taken}")
    attached = dict(files or {})
    if unknown := sorted(set(attached) - set(_ATTACHED)):
        raise ValueError(f"files: expected {' or '.join(_ATTACHED)}, got {unknown}")
    json.dumps(dict(meta), allow_nan=False)
    target = Path(os.path.realpath(directory))
    for path in (target, atomic.old(target)):
        _refuse_foreign(path)
    atomic.replace(target, lambda folder: _fill(folder, arrays, meta, attached))


def read(
    directory: str | os.PathLike[str], groups: Collection[str] | None = None
) -> tuple[Tensors, dict[str, Any]]:
    """Read and verify a checkpoint.

    Parameters
    ----------
    directory : path
    groups : names of groups, optional
        Only these are read, and verified; all by default.

    Returns
    -------
    tensors : {group: {key: array}}
        Writable arrays of their own, bit for bit as written.
    meta : dict
        The facts given to `write` (tuples have become lists).

    Raises
    ------
    CheckpointError
        Naming the file, what was expected and what was found.
    """
    while True:
        source = _locate(directory)
        before = atomic.identity(source)
        try:
            return _load(source, groups)
        except CheckpointError:
            if before is not None and atomic.identity(source) == before:
                raise  # else it was replaced while being read: read the new one


def read_file(directory: str | os.PathLike[str], name: str) -> bytes:
    """Read and verify one of the files given to `write`; raises CheckpointError as `read`, also where it has none."""
    while True:
        source = _locate(directory)
        before = atomic.identity(source)
        try:
            files = _load_meta(source)[1]
            if name not in files or name not in _ATTACHED:
                raise CheckpointError(f"{source}: expected {name} in this checkpoint, got {sorted(files)}")
            content = (source / name).read_bytes()
            _expect(source / name, files[name], len(content), hashlib.sha256(content).hexdigest())
            return content
        except OSError as error:
            raise CheckpointError(f"{source / name}: expected a readable file, got: {error}") from error
        except CheckpointError:
            if before is not None and atomic.identity(source) == before:
                raise


def read_meta(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the facts alone, as `read` returns them; the tensor files are not opened."""
    return _load_meta(_locate(directory))[0]


def _locate(directory: str | os.PathLike[str]) -> Path:
    try:
        path = atomic.current(Path(os.path.realpath(directory)))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory}: expected a checkpoint directory, got no such path") from error
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint directory, got a file")
    return path


def _storable(group: str, members: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the arrays contiguous, as safetensors wants them, or refuse them by name."""
    if not re.fullmatch(_GROUP, group):
        raise ValueError(f"expected a group of tensors named {_GROUP}, got {group!r}")
    arrays = {key: np.asarray(array, order="C") for key, array in members.items()}
    for key, array in arrays.items():
        if array.dtype.name not in _DTYPES:
            raise TypeError(f"{group}: {key}: expected one of {', '.join(_DTYPES)}, got {array.dtype}")
    return arrays


def _refuse_foreign(path: Path) -> None:
    """Raise unless replacing `path` destroys nothing but a checkpoint."""
    if not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a directory or nothing, got a file")
    others = sorted(p.name for p in path.iterdir() if p.name not in (_META, *_ATTACHED) and p.suffix != _SUFFIX)
    if others:
        raise CheckpointError(
            f"{path}: expected a checkpoint to replace or an empty directory, got {others[:3]}"
        )


def _fill(folder: Path, arrays: Tensors, meta: Mapping[str, Any], attached: Mapping[str, bytes]) -> None:
    """Write all files of a checkpoint into an empty folder."""
    files = {}
    for name, content in attached.items():
        (folder / name).write_bytes(content)
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for group, members in arrays.items():
        path = folder / (group + _SUFFIX)
        try:
            save_file(members, path)
        except SafetensorError as error:
            raise OSError(f"{path}: expected to write the checkpoint, got: {error}") from error
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    facts = {**meta, "format": FORMAT, "files": files}
    facts["checksum"] = _checksum(facts)
    notes = folder / _META
    notes.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for name in files:  # safetensors makes its files private to the user, whatever the umask says
        (folder / name).chmod(notes.stat().st_mode)


def _load(folder: Path, groups: Collection[str] | None) -> tuple[Tensors, dict[str, Any]]:
    meta, files = _load_meta(folder)
    tensors: Tensors = {}
    for name, facts in files.items():
        path = folder / name
        if groups is not None and path.stem not in groups:
            continue
        try:
            _expect(path, facts, path.stat().st_size, _sha256(path))
            if name not in _ATTACHED:
                tensors[path.stem] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: expected a readable file of tensors, got: {error}") from error
    return tensors, meta


def _expect(path: Path, facts: Mapping[str, Any], size: int, digest: str) -> None:
    """Raise unless a file has the size and the hash that were noted when it was written."""
    if size != facts["bytes"]:
        raise CheckpointError(f"{path}: expected {facts['bytes']} bytes, got {size}")
    if digest != facts["sha256"]:
        raise CheckpointError(f"{path}: expected sha256 {facts['sha256']}, got {digest}")


def _load_meta(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the caller's facts and `{file name: {"bytes", "sha256"}}` of a checkpoint."""
    path = folder / _META
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a readable JSON file, got: {error}") from error
    version = facts.get("format") if isinstance(facts, dict) else None
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise CheckpointError(f"{path}: expected format 1 to {FORMAT}, got {version!r}")
    stated = facts.pop("checksum", None)
    counted = _checksum(facts)
    if stated != counted:
        raise CheckpointError(f"{path}: expected checksum {counted} of its own text, got {stated}")
    files = facts.pop("files", None)
    if not isinstance(files, dict) or not all(
        name in _ATTACHED or re.fullmatch(_GROUP + re.escape(_SUFFIX), name) for name in files
    ):
        raise CheckpointError(f"{path}: expected files named {_GROUP}{_SUFFIX}, got {files!r}")
    del facts["format"]
    return facts, files


def _checksum(facts: Mapping[str, Any]) -> str:
    """Return the sha256 of facts, whatever their order and spacing in the file."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
