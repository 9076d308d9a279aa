"""The training loop: schedule, metrics, checkpoints, stopping and resuming."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import (
    CONFIG,
    SETTINGS,
    TEXT,
    TRAINING,
    VALIDATION,
    AtStep,
    assert_same_run,
    begin,
    resume,
    untimed,
)

from neurogen_cy import NeuroGen, Trainer, TrainSettings, checkpoint
from neurogen_cy.metrics import MetricsLog, read_metrics
from neurogen_cy.signals import stop_on_signals


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that went through."""
    out = tmp_path_factory.mktemp("unbroken")
    assert begin(out).run().received is None
    return out


def test_rate_rises_then_falls_to_nothing() -> None:
    settings = TrainSettings(steps=100, lr=2.0, warmup=10)
    rates = [settings.rate(step) for step in range(100)]
    np.testing.assert_allclose(rates[:11], 2.0 * np.arange(1, 12) / 11)
    assert np.argmax(rates) == 10 and rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.001
    assert np.all(np.diff(rates[10:]) < 0)
    assert TrainSettings(steps=1, warmup=0, lr=0.5).rate(0) == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "expected steps >= 1, got 0"),
        ({"evaluate_every": 0}, "expected evaluate_every >= 1, got 0"),
        ({"save_every": -1}, "expected save_every >= 1, got -1"),
        ({"warmup": -1}, "expected warmup >= 0, got -1"),
        ({"lr": 0.0}, "expected a finite lr > 0, got 0.0"),
        ({"lr": math.nan}, "expected a finite lr > 0, got nan"),
        ({"lr": math.inf}, "expected a finite lr > 0, got inf"),
        ({"keep": -1}, "expected keep >= 0, got -1"),
        ({"patience": 0}, "expected patience >= 1, got 0"),
        ({"sample_every": 0}, "expected sample_every >= 1, got 0"),
        ({"max_tokens": 0}, "expected max_tokens >= 1, got 0"),
        ({"max_minutes": 0.0}, "expected a finite max_minutes > 0, got 0.0"),
        ({"save_minutes": math.nan}, "expected a finite save_minutes > 0, got nan"),
    ],
)
def test_settings_refuse(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_a_run_leaves_metrics_and_checkpoints(unbroken: Path) -> None:
    records = read_metrics(unbroken / "metrics.jsonl")
    steps = [record for record in records if record["event"] == "step"]
    evaluations = [record for record in records if record["event"] == "evaluation"]
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert [record["tokens"] for record in steps] == [24 * step for step in range(1, 13)]
    assert [record["step"] for record in evaluations] == [5, 10, 12]
    assert [record["lr"] for record in steps] == [SETTINGS.rate(step) for step in range(12)]
    for record in steps:
        assert record["bits_per_byte"] == pytest.approx(record["loss"] / math.log(2))
        assert set(record["rates"]) == {"thalamus", "broca"} and record["tokens_per_s"] > 0
    lowest = min(record["validation_loss"] for record in evaluations)
    assert checkpoint.read_meta(unbroken / "best")["extra"]["run"]["best"] == lowest
    last = checkpoint.read_meta(unbroken / "last")["extra"]
    assert last["run"]["validation"] == evaluations[-1]["validation_loss"] and last["corpus"] == "a part"
    assert sorted(path.name for path in unbroken.iterdir()) == ["best", "last", "metrics.jsonl"]


def test_it_learns(tmp_path: Path) -> None:
    begin(tmp_path, TrainSettings(steps=150, lr=1e-2, evaluate_every=150, save_every=150)).run()
    steps = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["event"] == "step"]
    assert steps[0]["loss"] > 5.0
    assert 3.4 > np.mean([record["loss"] for record in steps[-10:]])


@pytest.mark.parametrize(("number", "threads"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_stopped_and_resumed_equals_unbroken(
    tmp_path: Path, unbroken: Path, number: signal.Signals, threads: int
) -> None:
    stop = begin(tmp_path, SETTINGS, AtStep(7, lambda: signal.raise_signal(number))).run()
    assert stop.received == number
    assert checkpoint.read_meta(tmp_path / "last")["cursor"]["tokens_per_stream"] == 7 * 8
    assert resume(tmp_path / "last", threads=threads).run().received is None
    assert_same_run(tmp_path, unbroken)


@pytest.mark.parametrize("step", [4, 5, 10, 12])
def test_stopping_at_a_save_or_an_evaluation_loses_neither(tmp_path: Path, unbroken: Path, step: int) -> None:
    begin(tmp_path, SETTINGS, AtStep(step, lambda: signal.raise_signal(signal.SIGINT))).run()
    resume(tmp_path / "last").run()
    assert_same_run(tmp_path, unbroken)


@pytest.mark.parametrize("step", [6, 11])
def test_a_crash_is_resumed_from_the_last_save(tmp_path: Path, unbroken: Path, step: int) -> None:
    def crash() -> None:
        raise SystemExit("crash")  # no Exception: nothing is finished or saved any more

    with pytest.raises(SystemExit, match="crash"):
        begin(tmp_path, SETTINGS, AtStep(step, crash)).run()
    assert checkpoint.read_meta(tmp_path / "last")["step"] == step // 4 * 4
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    resume(tmp_path / "last").run()
    assert_same_run(tmp_path, unbroken)


def test_a_finished_run_is_left_alone(unbroken: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.name != "metrics.jsonl"}
    records = untimed(unbroken)
    trainer = resume(unbroken / "last")
    assert trainer.finished and trainer.run().received is None
    assert before == {path: path.stat().st_mtime_ns for path in before} and records == untimed(unbroken)


def test_more_steps_go_on_where_it_ended(tmp_path: Path) -> None:
    begin(tmp_path, dataclasses.replace(SETTINGS, steps=6)).run()
    resume(tmp_path / "last").run()
    steps = [record["step"] for record in untimed(tmp_path) if record["event"] == "step"]
    assert steps == list(range(1, 13))


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background of a shell
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path, SETTINGS, AtStep(2, twice)).run()
    assert not (tmp_path / "last").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    before, seen = signal.getsignal(signal.SIGINT), list[Any]()

    def inside() -> None:
        with stop_on_signals() as stop:
            seen.extend([signal.getsignal(signal.SIGINT), stop.received])

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before, None]


def test_too_short_texts_are_refused(tmp_path: Path) -> None:
    model = NeuroGen(CONFIG, backend="cpu", streams=3, max_tokens=8, threads=1)
    with pytest.raises(ValueError, match=r"3 \* 8 \+ 1 = 25 bytes, got 24"):
        Trainer(model, TEXT[:24], VALIDATION, SETTINGS, tmp_path)
    with pytest.raises(ValueError, match="= 17 bytes to evaluate, got 16"):
        Trainer(model, TRAINING, TEXT[:16], SETTINGS, tmp_path)


def test_other_checkpoints_are_not_resumed(tmp_path: Path, unbroken: Path) -> None:
    trainer = begin(tmp_path)
    trainer.model.save(tmp_path / "plain")
    with pytest.raises(
        ValueError, match="expected a checkpoint of a training run, got one that was saved otherwise"
    ):
        trainer.restore(tmp_path / "plain")
    other = Trainer(trainer.model, TEXT[:999], VALIDATION, SETTINGS, tmp_path)
    with pytest.raises(ValueError, match="expected a cursor with sha256"):
        other.restore(unbroken / "last")


def test_metrics_refuse_a_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    for line in ("nonsense", "[1]", '{"step": 1}', '{"step": 1, "tokens": "1"}'):
        path.write_text('{"step": 1, "tokens": 1}\n' + line + "\n")
        with pytest.raises(ValueError, match="metrics.jsonl: line 2: expected a record with tokens, got"):
            MetricsLog(path, keep=1)
    log = MetricsLog(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write({"step": 1, "loss": math.nan})
    log.close()
    assert read_metrics(path) == []
