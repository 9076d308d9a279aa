"""Checkpoint directories: safetensors files and `meta.json`, replaced as one (see `atomic`).

::

    <name>/model.safetensors ...   one file per group of tensors
    <name>/tokenizer.json          or .model: what makes text of the model's tokens, where it needs one
    <name>/meta.json               the caller's facts, `format`, and size and sha256 of each file

Whatever is in the files, reading them takes at most three times their size (and LARGEST_TEXT times thirty), ends, and
gives what was written or a `CheckpointError`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from neurogen_cy import atomic
from neurogen_cy.shown import shown

FORMAT = 1
"""Version of the layout; a reader accepts this one and older ones."""

LARGEST_TEXT = 8 << 20
"""Bytes of `meta.json`, and of the list of tensors in a safetensors file: parsed, text takes many times its size."""

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
        Facts for `meta.json`: what JSON can hold, without the keys `format`, `files` and `checksum`; at most
        LARGEST_TEXT bytes of it.
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
    _text_of(meta)
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
            return _verified(source / name, files[name])
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
    notes.write_bytes(_text_of(facts))
    for name in files:  # safetensors makes its files private to the user, whatever the umask says
        (folder / name).chmod(notes.stat().st_mode)


def _load(folder: Path, groups: Collection[str] | None) -> tuple[Tensors, dict[str, Any]]:
    meta, files = _load_meta(folder)
    tensors: Tensors = {}
    for name, facts in files.items():
        path = folder / name
        if groups is not None and path.stem not in groups:
            continue
        data = _verified(path, facts)
        if name in _ATTACHED:
            continue
        header = int.from_bytes(data[:8], "little")
        if header > LARGEST_TEXT:
            raise CheckpointError(f"{path}: expected a list of tensors of at most {LARGEST_TEXT} bytes, got {header}")
        try:
            arrays = load(data)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: expected a readable file of tensors, got: {error}") from error
        for key, array in arrays.items():
            if array.dtype.name not in _DTYPES:
                raise CheckpointError(f"{path}: {shown(key)}: expected one of {', '.join(_DTYPES)}, got {array.dtype}")
        tensors[path.stem] = arrays
    return tensors, meta


def _verified(path: Path, facts: Mapping[str, Any]) -> bytes:
    """The bytes of a file, which have the size and the hash that were noted when it was written."""
    data = _read(path, facts["bytes"])
    digest = hashlib.sha256(data).hexdigest()
    if digest != facts["sha256"]:
        raise CheckpointError(f"{path}: expected sha256 {facts['sha256']}, got {digest}")
    return data


def _read(path: Path, size: int | None = None) -> bytes:
    """The bytes of a plain file, `size` of them, or else at most LARGEST_TEXT; nothing is read of any other file."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # opening a pipe would wait for its writer
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: expected a plain file, got {stat.filemode(status.st_mode)}")
            if size is None and status.st_size > LARGEST_TEXT:
                raise CheckpointError(f"{path}: expected at most {LARGEST_TEXT} bytes, got {status.st_size}")
            if size is not None and status.st_size != size:
                raise CheckpointError(f"{path}: expected {size} bytes, got {status.st_size}")
            return file.read(status.st_size)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, got: {error}") from error


def _load_meta(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the caller's facts and `{file name: {"bytes", "sha256"}}` of a checkpoint."""
    path = folder / _META
    try:
        parsed = _parse(_read(path))
        facts = parsed if isinstance(parsed, dict) else {}
        stated, counted = facts.pop("checksum", None), _checksum(facts)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a readable JSON file, got: {error}") from error
    version = facts.get("format")
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise CheckpointError(f"{path}: expected format 1 to {FORMAT}, got {shown(version)}")
    if stated != counted:
        raise CheckpointError(f"{path}: expected checksum {counted} of its own text, got {shown(stated)}")
    files = facts.pop("files", None)
    if not isinstance(files, dict) or not all(
        name in _ATTACHED or re.fullmatch(_GROUP + re.escape(_SUFFIX), name) for name in files
    ):
        raise CheckpointError(f"{path}: expected files named {_GROUP}{_SUFFIX}, got {shown(files)}")
    for name, about in files.items():
        size, digest = (about.get("bytes"), about.get("sha256")) if isinstance(about, dict) else (None, None)
        if type(size) is not int or size < 0 or not isinstance(digest, str):
            raise CheckpointError(f"{path}: {name}: expected its bytes and sha256, got {shown(about)}")
    del facts["format"]
    return facts, files


def _text_of(facts: Mapping[str, Any]) -> bytes:
    """Return facts as JSON, once it is sure that they can be read again."""
    try:
        text = (json.dumps(dict(facts), indent=2, allow_nan=False) + "\n").encode("utf-8")
        if len(text) > LARGEST_TEXT:
            raise ValueError(f"meta: expected at most {LARGEST_TEXT} bytes of JSON, got {len(text)}")
        _parse(text)
    except RecursionError as error:
        raise ValueError(f"meta: expected tables and lists less deep in one another, got: {error}") from error
    return text


def _parse(text: bytes) -> Any:
    """Return what JSON says, if it says it once and in numbers that there are; ValueError or RecursionError else."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(table := dict(pairs)) < len(pairs):
            raise ValueError(f"expected each key once, got {shown([key for key, _ in pairs])}")
        return table

    def integer(digits: str) -> int:
        if len(digits) > 100:
            raise ValueError(f"expected an integer of at most 100 digits, got {len(digits)}")
        return int(digits)

    def number(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"expected finite numbers, got {digits[:100]}")
        return value

    return json.loads(
        text.decode("utf-8"), object_pairs_hook=once, parse_int=integer, parse_float=number, parse_constant=number
    )


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
