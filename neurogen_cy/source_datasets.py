"""Texts of the Hugging Face `datasets` library (the extra of that name), record by record, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neurogen_cy.data import visible_files
from neurogen_cy.sources import Chunk, Source, record_text


class DatasetSource(Source):
    """`hf:name[:config][:split]`; the split is "train" by default, and an empty config is none.

    `name` is a data set of the hub, a folder with files that `datasets` reads, or one that `save_to_disk` wrote.

    Raises
    ------
    ModuleNotFoundError
        If `datasets` is not installed.
    ValueError
        If the specification, the data set or its split cannot be read.
    """

    def __init__(self, spec: str, field: str) -> None:
        parts = spec.split(":")[1:]
        if not 1 <= len(parts) <= 3 or not parts[0]:
            raise ValueError(f"expected hf:name[:config][:split], got {spec!r}")
        name, config, split = (*parts, "", "")[:3]
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{spec}: expected the package datasets to read it, got none: "
                "pip install 'neurogen_cy[datasets]' or pip install datasets"
            ) from error
        self._field = field
        self._folder = Path(name) if Path(name).is_dir() else None
        self.name = spec
        self.place = f"hf:{self._folder.resolve() if self._folder else name}:{config}:{split or 'train'}"
        try:
            self._rows = _open(datasets, name, config, split or "train")
            self._version = None if self._folder else _version(name)
        except Exception as error:  # the library raises of many kinds
            raise ValueError(f"{spec}: expected a data set that can be read, got: {error}") from error

    def chunks(self) -> Iterator[Chunk]:
        """See `Source.chunks`."""
        rows, number = iter(self._rows), -1
        while True:
            number += 1
            where = f"{self.name}: record {number}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the library raises of many kinds
                raise ValueError(f"{where}: expected to read it, got: {error}") from error
            if text := record_text(row, self._field, where):
                yield Chunk(text, True, where, 0)

    def manifest(self) -> Any:
        """See `Source.manifest`; of a data set of the hub, its commit."""
        if self._folder is None:
            return self._version
        stats = [(path, path.stat()) for path in visible_files(self._folder)]
        return [[str(path.relative_to(self._folder)), s.st_size, s.st_mtime_ns] for path, s in stats]

    def size(self, read: bool = True) -> int | None:
        """Return None: a stream is read once."""
        return None


def _open(datasets: Any, name: str, config: str, split: str) -> Any:
    """Return what iterates over the records."""
    if Path(name, "dataset_dict.json").is_file():
        return datasets.load_from_disk(name)[split]
    if Path(name, "state.json").is_file():
        return datasets.load_from_disk(name)
    return datasets.load_dataset(name, config or None, split=split, streaming=True)


def _version(name: str) -> Any:
    from huggingface_hub import HfApi  # datasets brings it

    return HfApi().dataset_info(name).sha
