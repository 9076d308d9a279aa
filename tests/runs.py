"""A small brain and a short text, as training runs of them are tested."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from neurogen_cy import Callback, Config, NeuroGen, Projection, Region, Trainer, TrainSettings, checkpoint
from neurogen_cy.data import default_corpus
from neurogen_cy.metrics import read_metrics

TEXT = default_corpus()[0]
TRAINING, VALIDATION = TEXT[:1500], TEXT[1500:1700]
SETTINGS = TrainSettings(steps=12, lr=1e-2, warmup=2, evaluate_every=5, save_every=4)
CONFIG = Config(
    vocab_size=256,
    dim=32,
    regions=(Region("thalamus", 32, 0), Region("broca", 32, 1)),
    projections=(
        Projection("embedding", "thalamus"),
        Projection("thalamus", "broca"),
        Projection("broca", "broca", delay=1),
        Projection("broca", "thalamus", delay=2),
        Projection("broca", "broca_out"),
    ),
    dropout=0.1,
)


def begin(out: Path, settings: TrainSettings = SETTINGS, *callbacks: Callback, **model: Any) -> Trainer:
    """Return a new run of the small brain."""
    arguments = {"backend": "cpu", "streams": 3, "max_tokens": 8, "seed": 5, "threads": 1, **model}
    brain = NeuroGen(arguments.pop("config", CONFIG), **arguments)
    return Trainer(brain, TRAINING, VALIDATION, settings, out, {"corpus": "a part"}, callbacks)


def resume(saved: Path, settings: TrainSettings = SETTINGS, *callbacks: Callback, **model: Any) -> Trainer:
    """Return the run that goes on from a checkpoint."""
    brain = NeuroGen.load(saved, **{"backend": "cpu", "streams": 3, "max_tokens": 8, "threads": 1, **model})
    trainer = Trainer(brain, TRAINING, VALIDATION, settings, saved.parent, {"corpus": "a part"}, callbacks)
    trainer.restore(saved)
    return trainer


class AtStep(Callback):
    """Acts once, at this step."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action = step, action

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Act, where it is the step."""
        if record["step"] == self.step:
            self.action()


def untimed(out: Path) -> list[dict[str, Any]]:
    """Return the metrics without what the clock put in."""
    timed = ("elapsed", "tokens_per_s")
    return [{k: v for k, v in record.items() if k not in timed} for record in read_metrics(out / "metrics.jsonl")]


def contents(saved: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors of a checkpoint as bytes, and its facts without what the clock put in."""
    tensors, meta = checkpoint.read(saved)
    del meta["extra"]["run"]["elapsed"]
    return {f"{group}/{key}": a.tobytes() for group, arrays in tensors.items() for key, a in arrays.items()}, meta


def assert_same_run(one: Path, other: Path) -> None:
    """Compare metrics and all checkpoints of two runs bit for bit."""
    assert untimed(one) == untimed(other)
    names = [sorted(path.name for path in out.iterdir()) for out in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        if (one / name).is_dir():
            assert contents(one / name) == contents(other / name), name
