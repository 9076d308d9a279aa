"""`neurogen selftest`: right here, and able to say when something is not."""

import json
import time

import numpy as np
from click.testing import CliRunner

from neurogen_cy import checkpoint, reference, selftest, selftest_speed
from neurogen_cy.cli import main


def outcome(backend="cpu", **more):
    record = selftest.run({"backend": backend, "threads": 2, **more}, seconds=0.1)
    return record, {check["name"]: check["passed"] for check in record["checks"]}


def failing(**more):
    return [name for name, passed in outcome(**more)[1].items() if passed is False]


def test_all_is_well_here(backend):
    begin = time.perf_counter()
    record, passed = outcome(backend)
    assert record["passed"] and False not in passed.values(), record["checks"]
    assert [name for name in passed if passed[name]] >= ["gradients, graded spikes"] and len(passed) == 10
    worst = max(check["values"]["gradient"] for check in record["checks"] if check["name"].startswith("gradients"))
    assert 0 < worst < 1e-4 and json.loads(json.dumps(record)) == record
    assert time.perf_counter() - begin < 60


def test_the_command_says_it_and_exits_so(monkeypatch):
    done = CliRunner().invoke(main, ["selftest", "--backend", "cpu", "--threads", "2", "--seconds", "0.1"])
    assert done.exit_code == 0 and done.output.rstrip().endswith("verdict: all is well"), done.output
    monkeypatch.setattr(selftest_speed, "LEAST", 1e9)
    done = CliRunner().invoke(main, ["selftest", "--backend", "cpu", "--seconds", "0.1"])
    assert done.exit_code == 1 and "FAILED  speed" in done.output and "NOT RIGHT here: speed" in done.output
    done = CliRunner().invoke(main, ["selftest", "--backend", "cpu", "--seconds", "0.1", "--json"])
    record = json.loads(done.stdout)
    assert done.exit_code == 1 and not record["passed"] and record["backend"] == "cpu"
    done = CliRunner().invoke(main, ["selftest", "--backend", "cpu", "--precision", "bf16"])
    assert done.exit_code == 2 and "precision: expected" in done.output


def test_a_wrong_gradient_is_seen(monkeypatch):
    surrogate = reference.surrogate
    monkeypatch.setattr(reference, "surrogate", lambda u, k: surrogate(u, k) * 1.001)
    assert failing() == ["gradients, graded spikes", "gradients, binary spikes", "gradients, tied decoder"]


def test_other_bits_are_seen(monkeypatch):
    """A batch that is never twice the same, as a race would make it."""
    batches, rng = selftest._batches, np.random.default_rng()

    def noisy(*arguments):
        for ids, targets, weights, resets in batches(*arguments):
            yield ids, targets, weights + rng.random(dtype=np.float32), resets

    monkeypatch.setattr(selftest, "_batches", noisy)
    assert failing() == ["two runs", "threads"]


def test_a_wrong_checkpoint_is_seen(monkeypatch):
    read = checkpoint.read

    def forgetful(directory):
        tensors, meta = read(directory)
        for array in tensors["optimizer"].values():
            array[...] = 0
        return tensors, meta

    monkeypatch.setattr(checkpoint, "read", forgetful)
    assert failing() == ["checkpoint"]


def test_a_loader_that_takes_anything_is_seen(monkeypatch):
    monkeypatch.setattr(selftest.NeuroGen, "load", lambda *place, **settings: None)
    record, passed = outcome()
    said = {check["name"]: check["detail"] for check in record["checks"]}
    assert said["damaged checkpoint"] == "a changed bit in meta.json was not noticed"
    assert passed["damaged checkpoint"] is passed["checkpoint"] is False


def test_an_error_is_an_answer(monkeypatch):
    def broken(*_):
        raise OSError("no such disk")

    monkeypatch.setattr(checkpoint, "write", broken)
    record, _ = outcome()
    said = {check["name"]: check["detail"] for check in record["checks"] if check["passed"] is False}
    assert said == {"checkpoint": "OSError: no such disk", "damaged checkpoint": "OSError: no such disk"}
