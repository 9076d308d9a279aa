"""Callbacks of a training run: what they hear, how they stop it, and that none of them loses anything."""

from __future__ import annotations

import dataclasses
import io
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import SETTINGS, AtStep, assert_same_run, begin, resume, untimed

from neurogen_cy import Callback, NeuroGen, Trainer, checkpoint
from neurogen_cy import train as train_module
from neurogen_cy.callbacks import Samples, TimeBudget
from neurogen_cy.progress import ProgressBar
from neurogen_cy.tensorboard import TensorBoard


class Listener(Callback):
    """Notes every call."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda trainer, *what: self.heard.append((name, what[0] if what else trainer.model.step))


class Fails(Callback):
    """Raises once, in one of its methods."""

    def __init__(self, method: str, step: int) -> None:
        self.method, self.step, self.times = method, step, 0
        setattr(self, method, self._fail)

    def _fail(self, trainer: Trainer, *what: Any) -> None:
        if trainer.model.step == self.step:
            self.times += 1
            raise RuntimeError(f"{self.method} at {self.step}")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that went through."""
    out = tmp_path_factory.mktemp("unbroken")
    begin(out).run()
    return out


def test_they_hear_everything_in_order(tmp_path: Path) -> None:
    listener = Listener()
    begin(tmp_path, SETTINGS, listener).run()
    heard = [(name, what if isinstance(what, int) else getattr(what, "name", None)) for name, what in listener.heard]
    assert heard[0] == ("on_begin", 0) and heard[-1] == ("on_end", 12)
    around_five = heard.index(("on_save", "best"))
    assert [name for name, _ in heard[around_five - 1 : around_five + 2]] == ["on_step", "on_save", "on_evaluation"]
    saves = [what for name, what in heard if name == "on_save"]
    assert saves[:2] == ["last", "best"] and saves.count("last") == 3
    records = [what for name, what in listener.heard if name in ("on_step", "on_evaluation")]
    for record in records:
        record.pop("elapsed"), record.pop("tokens_per_s", None)
    assert records == untimed(tmp_path)


@pytest.mark.parametrize(
    ("method", "step"), [("on_step", 5), ("on_step", 7), ("on_evaluation", 5), ("on_save", 8), ("on_save", 12)]
)
def test_an_exception_loses_nothing(tmp_path: Path, unbroken: Path, method: str, step: int) -> None:
    failing, listener = Fails(method, step), Listener()
    with pytest.raises(RuntimeError, match=f"{method} at {step}"):
        begin(tmp_path, SETTINGS, failing, listener).run()
    assert failing.times >= 1
    assert checkpoint.read_meta(tmp_path / "last")["step"] == step
    assert ("on_end", step) in listener.heard
    resume(tmp_path / "last").run()
    assert_same_run(tmp_path, unbroken)


def test_an_exception_at_the_beginning_or_the_end_is_raised(tmp_path: Path, unbroken: Path) -> None:
    with pytest.raises(RuntimeError, match="on_begin at 0"):
        begin(tmp_path / "one", SETTINGS, Fails("on_begin", 0)).run()
    assert not (tmp_path / "one/last").exists()
    with pytest.raises(RuntimeError, match="on_end at 12"):
        begin(tmp_path / "two", SETTINGS, Fails("on_end", 12)).run()
    assert_same_run(tmp_path / "two", unbroken)


def test_a_callback_may_stop_the_run(tmp_path: Path, unbroken: Path) -> None:
    trainer = begin(tmp_path)
    trainer.callbacks.append(AtStep(5, lambda: trainer.stop("enough")))
    trainer.callbacks.append(AtStep(5, lambda: trainer.stop("too late")))
    stop = trainer.run()
    assert (stop.reason, stop.received, trainer.model.step) == ("enough", None, 5)
    assert resume(tmp_path / "last").run().reason is None
    assert_same_run(tmp_path, unbroken)


def losses(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Have evaluations give these losses."""
    given = iter(values)
    monkeypatch.setattr(NeuroGen, "evaluate", lambda *arguments: next(given))


PATIENT = dataclasses.replace(SETTINGS, steps=10, evaluate_every=1, patience=2)


def test_early_stop_counts_on_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses(monkeypatch, [5.0, 4.0, 4.5, 4.1])
    trainer = begin(tmp_path / "whole", PATIENT)
    assert trainer.run().reason == "no better validation in 2 evaluations"
    assert (trainer.model.step, trainer.best_step, trainer.best) == (4, 2, 4.0)
    losses(monkeypatch, [5.0, 4.0, 4.5, 4.1])
    begin(tmp_path / "broken", PATIENT, TimeBudget(1e-12)).run()
    for step in (2, 3, 4):
        assert checkpoint.read_meta(tmp_path / "broken/last")["step"] == step - 1
        resume(tmp_path / "broken/last", PATIENT, TimeBudget(1e-12)).run()
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    before = (tmp_path / "whole/last/meta.json").stat().st_mtime_ns
    stopped = resume(tmp_path / "whole/last", PATIENT).run()
    assert stopped.reason == "no better validation in 2 evaluations"
    assert before == (tmp_path / "whole/last/meta.json").stat().st_mtime_ns


def test_a_time_budget_stops_and_saves(tmp_path: Path, unbroken: Path) -> None:
    settings = dataclasses.replace(SETTINGS, max_minutes=1e-9)
    trainer = begin(tmp_path, settings)
    assert trainer.run().reason == "1e-09 minutes are over" and trainer.model.step == 1
    resume(tmp_path / "last").run()
    assert_same_run(tmp_path, unbroken)


def test_a_token_budget_is_a_number_of_steps(tmp_path: Path) -> None:
    trainer = begin(tmp_path, dataclasses.replace(SETTINGS, max_tokens=24 * 7 + 23))
    assert trainer.settings.steps == 7 and trainer.settings.rate(6) < 0.1 * SETTINGS.lr
    trainer.run()
    assert trainer.tokens == 24 * 7 and trainer.finished
    with pytest.raises(ValueError, match="expected max_tokens of at least a step, 24, got 23"):
        begin(tmp_path, dataclasses.replace(SETTINGS, max_tokens=23))


def test_keep_leaves_the_newest_steps_beside_last_and_best(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, save_every=2, keep=3)
    begin(tmp_path / "whole", settings).run()
    names = ["best", "last", "metrics.jsonl", "step-000008", "step-000010", "step-000012"]
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == names
    broken = tmp_path / "broken"
    with pytest.raises(RuntimeError):
        begin(broken, settings, Fails("on_step", 7)).run()
    assert sorted(path.name for path in broken.iterdir())[3:] == ["step-000002", "step-000004", "step-000006"]
    resume(broken / "last", settings).run()
    assert_same_run(tmp_path / "whole", broken)
    shutil.rmtree(broken / "step-000012")  # as if the process had been killed between the two
    resume(broken / "last", settings).run()
    assert_same_run(tmp_path / "whole", broken)
    # Going on from an earlier one, what was kept of later steps makes room first.
    resume(broken / "step-000008", dataclasses.replace(settings, steps=10, keep=2)).run()
    assert sorted(path.name for path in broken.iterdir())[3:] == ["step-000008", "step-000010"]
    assert (broken / "last/meta.json").samefile(broken / "step-000010/meta.json")
    (broken / ".step-000002.removed").mkdir()  # as a crash leaves it
    resume(broken / "last", settings).run()
    assert sorted(path.name for path in broken.iterdir()) == names


def test_keep_touches_nothing_but_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "step-000001").mkdir()
    (tmp_path / "step-000001/mine.txt").write_text("mine")
    settings = dataclasses.replace(SETTINGS, save_every=2, keep=1)
    begin(tmp_path, settings).run()
    assert (tmp_path / "step-000001/mine.txt").read_text() == "mine" and (tmp_path / "step-000012").exists()
    with pytest.raises(FileExistsError, match="step-000001: expected a checkpoint or nothing, got something else"):
        begin(tmp_path, dataclasses.replace(settings, save_every=1)).run()


def test_save_minutes_saves_between_steps(tmp_path: Path) -> None:
    listener = Listener()
    begin(tmp_path, dataclasses.replace(SETTINGS, save_every=100, save_minutes=1e-9), listener).run()
    assert [what.name for name, what in listener.heard if name == "on_save"].count("last") == 12


def poisoned(trainer: Trainer) -> None:
    """Have every step from here on be not finite: the embedding overflows what hears it."""
    table = np.asarray(trainer.model.parameters()["embedding.weight"])
    trainer.model.load_parameters({"embedding.weight": np.full_like(table, 3e38)})


def test_skipped_steps_are_counted_and_shown(tmp_path: Path) -> None:
    trainer = begin(tmp_path, SETTINGS, nonfinite="skip")
    sound = np.asarray(trainer.model.parameters()["embedding.weight"]).copy()
    listener = Listener()

    class Heals(Callback):
        def on_skip(self, trainer: Trainer, record: dict[str, Any]) -> None:
            if record["skipped"] == 2:
                trainer.model.load_parameters({"embedding.weight": sound})

    trainer.callbacks += [Heals(), listener]
    poisoned(trainer)
    trainer.run()
    skips = [what for name, what in listener.heard if name == "on_skip"]
    assert [(skip["step"], skip["skipped"], skip["tokens"]) for skip in skips] == [(0, 1, 24), (0, 2, 48)]
    assert trainer.model.step == 12 and trainer.tokens == 14 * 24
    assert checkpoint.read_meta(tmp_path / "last")["skipped"] == 2
    assert [r["event"] for r in untimed(tmp_path)][:3] == ["skip", "skip", "step"]


@pytest.mark.parametrize("ending", [SystemExit, RuntimeError])
def test_a_run_resumed_amid_skipped_steps_equals_one_that_went_on(tmp_path: Path, ending: type[BaseException]) -> None:
    """Whether what was skipped had been saved or not, it is in the metrics once."""

    class Poison(Callback):
        """Makes the steps that begin with 96 and 120 tokens read not finite; ends the run after the first, once."""

        def __init__(self, ends: bool) -> None:
            self.ends = ends

        def on_begin(self, trainer: Trainer) -> None:
            self.sound = np.asarray(trainer.model.parameters()["embedding.weight"]).copy()
            self._look(trainer)

        def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
            self.sound = np.asarray(trainer.model.parameters()["embedding.weight"]).copy()
            self._look(trainer)

        def on_skip(self, trainer: Trainer, record: dict[str, Any]) -> None:
            trainer.model.load_parameters({"embedding.weight": self.sound})
            if self.ends:
                self.ends = False
                raise ending("in the middle")
            self._look(trainer)

        def _look(self, trainer: Trainer) -> None:
            if trainer.tokens in (96, 120):
                poisoned(trainer)

    settings = dataclasses.replace(SETTINGS, save_every=3)
    begin(tmp_path / "whole", settings, Poison(False), nonfinite="skip").run()
    with pytest.raises(ending, match="in the middle"):
        begin(tmp_path / "broken", settings, Poison(True), nonfinite="skip").run()
    resume(tmp_path / "broken/last", settings, Poison(False)).run()
    events = [record["event"] for record in untimed(tmp_path / "broken")]
    assert events.count("skip") == 2 and events.count("step") == 12
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_too_many_skipped_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "MOST_SKIPPED", 5)
    trainer = begin(tmp_path, SETTINGS, nonfinite="skip")
    poisoned(trainer)
    with pytest.raises(FloatingPointError, match="step 1: 5 in a row were not finite and were skipped"):
        trainer.run()
    assert not (tmp_path / "last").exists()


def write(model: NeuroGen, seed: int) -> tuple[str, str]:
    """Five bytes after a prompt."""
    ids = [int(step[0]) for step in model.generate(np.frombuffer(b"The ", np.uint8), 5, seed=seed)]
    return "The ", bytes(ids).decode("latin-1")


def test_samples_are_the_same_after_a_resume_and_change_nothing(tmp_path: Path, unbroken: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    begin(one, SETTINGS, Samples(3, write)).run()
    with pytest.raises(RuntimeError):
        begin(other, SETTINGS, Samples(3, write), Fails("on_step", 6)).run()
    resume(other / "last", SETTINGS, Samples(3, write)).run()
    assert_same_run(one, other)
    samples = [record for record in untimed(one) if record["event"] == "sample"]
    assert [sample["step"] for sample in samples] == [3, 6, 9, 12] and len({s["text"] for s in samples}) > 1
    assert [record for record in untimed(one) if record["event"] != "sample"] == untimed(unbroken)


def test_progress_as_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    begin(tmp_path, SETTINGS, ProgressBar(out), Samples(6, write)).run()
    lines = out.getvalue().splitlines()
    assert "\r" not in out.getvalue() and any(line.startswith("step 5: validation ") for line in lines)
    assert any(line.startswith("step 6 writes: The |") for line in lines)
    last = next(line for line in lines if line.startswith("step 12/12: loss "))
    for part in ("bits/byte", "tokens/s", "firing 0.", "grad ", "B"):
        assert part in last
    assert capsys.readouterr() == ("", "")


def test_progress_as_a_bar_on_a_terminal(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    begin(tmp_path, SETTINGS, ProgressBar(out)).run()
    assert "\r" in out.getvalue() and "12/12" in out.getvalue() and "step 5: validation" in out.getvalue()


def test_tensorboard_writes_what_the_metrics_have(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with pytest.raises(RuntimeError):
        begin(tmp_path, SETTINGS, TensorBoard(), Samples(6, write), Fails("on_step", 7)).run()
    resume(tmp_path / "last", SETTINGS, TensorBoard()).run()
    scalars: dict[str, dict[int, float]] = {}
    texts, voids = [], []
    for file in sorted((tmp_path / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            if event.HasField("session_log"):
                voids.append(event.step)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    scalars.setdefault(value.tag, {})[event.step] = value.simple_value
                else:
                    texts.append(event.step)
    records = untimed(tmp_path)
    steps = {record["step"]: record for record in records if record["event"] == "step"}
    assert scalars["training/loss"] == pytest.approx({step: r["loss"] for step, r in steps.items()}, rel=1e-6)
    assert scalars["rates/broca"] == pytest.approx({step: r["rates"]["broca"] for step, r in steps.items()}, rel=1e-6)
    assert set(scalars["validation/loss"]) == {5, 10, 12} and texts == [6] and voids == [1, 8]


def test_tensorboard_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'neurogen_cy\[tensorboard\]'"):
        TensorBoard()
