"""kill -9 at random moments of a training that saves after every step; after each, what is on the disk goes on.

    python tests/kill_campaign.py [--kills 200] [--backend cpu|cuda] [--seed 0] [--steps 400]

A child process trains and says the number of every step that it has saved. It is killed up to WINDOW seconds after it
had its model. Then the newest checkpoint has to load, to be no older than the last step that was said, and to equal an
unkilled run at that step in every bit of weights, moments, neuron state, counters and cursor; AHEAD steps later it has
to equal it again. The next child goes on from it. Prints a summary in JSON; exit status 1 where anything differed.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

import neurogen_cy as ng
from neurogen_cy import checkpoint, persistence

B, T, V = 4, 16, 64
STEPS = 400  # of the unkilled run; who arrives there starts again; TEXT is that long
AHEAD = 3
WINDOW = {"cpu": 0.15, "cuda": 0.6}  # a GPU's first step takes its time
CONFIG = ng.Config(
    V, 32,
    regions=(ng.Region("thalamus", 64, 0), ng.Region("pfc", 64, 1)),
    projections=(
        ng.Projection("embedding", "thalamus"), ng.Projection("thalamus", "pfc"),
        ng.Projection("thalamus", "pfc", kind="gate"), ng.Projection("pfc", "pfc", delay=1),
        ng.Projection("pfc", "thalamus", delay=3), ng.Projection("pfc", "broca_out"),
    ),
    max_spike=4.0, dropout=0.1,
)  # fmt: skip
TEXT = np.random.default_rng(5).integers(0, V, (B, STEPS * T + 1)).astype(np.int32)


class Run:
    """A model and where it is in the text; `folder` holds its checkpoint `last`."""

    def __init__(self, folder, backend):
        self.place = Path(folder, "last")
        settings = {"backend": backend, "threads": 2}
        if checkpoint_exists(folder):
            self.model = ng.NeuroGen.load(self.place, **settings)
            self.cursor = checkpoint.read_meta(self.place)["cursor"]["at"]
        else:
            self.model, self.cursor = ng.NeuroGen(CONFIG, streams=B, max_tokens=T, **settings), 0

    def step(self):
        part = slice(self.cursor, self.cursor + T)
        ids, targets = TEXT[:, part].copy(), TEXT[:, part.start + 1 : part.stop + 1].copy()
        self.model.train_step_batch(ids, targets, resets=ids == 7)
        self.cursor += T

    def save(self):
        self.model.save(self.place, cursor={"at": self.cursor})

    def digest(self):
        """Of everything that the next step depends on."""
        model = self.model
        digest = hashlib.sha256(str((model.step, model.calls, model.skipped, model.seed, self.cursor)).encode())
        moments = {f"{key}{i}": view for key, pair in model._engine.moments().items() for i, view in enumerate(pair)}
        for arrays in (model.parameters(), moments, model.state()):
            for key, array in sorted(arrays.items()):
                digest.update(key.encode() + persistence._host(array).tobytes())
        return digest.hexdigest()


def checkpoint_exists(folder):
    return any(Path(folder, name).exists() for name in ("last", "last.old"))


def unkilled(backend, steps):
    """Digests of a run that nothing disturbs, by step."""
    with tempfile.TemporaryDirectory() as folder:
        run, digests = Run(folder, backend), []
        while True:
            digests.append(run.digest())
            if run.model.step == steps:
                return digests
            run.step()


def child(folder, backend, steps):
    run = Run(folder, backend)
    print(run.model.step, flush=True)
    while run.model.step < steps:
        run.step()
        run.save()
        print(run.model.step, flush=True)


def command_of(folder, backend, steps):
    return [sys.executable, __file__, "--child", str(folder), "--backend", backend, "--steps", str(steps)]


def strike(folder, backend, steps, rng):
    """Starts a child, kills it; returns the last step that it said it had saved."""
    with subprocess.Popen(command_of(folder, backend, steps), stdout=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        time.sleep(rng.uniform(0, WINDOW[backend]))
        process.send_signal(signal.SIGKILL)
        said = [first, *process.stdout.read().splitlines(keepends=True)]
    if process.returncode not in (-signal.SIGKILL, 0) or not first:
        raise RuntimeError(f"the child ended by itself with status {process.returncode}, having said {said[-1]!r}")
    return int([line for line in said if line.endswith("\n")][-1])


def struck(folder):
    """Where in a save it was, by what is left."""
    names = os.listdir(folder)
    if any(".tmp-" in name for name in names):
        return "between the renames" if "last" not in names and "last.old" in names else "while writing"
    return "while removing the former" if "last.old" in names else "elsewhere"


def check(folder, backend, said, expected):
    """What is wrong with the checkpoint in `folder`, None if nothing is; and its step."""
    if not checkpoint_exists(folder):
        return (f"no checkpoint, step {said} was said" if said else None), 0
    try:
        run = Run(folder, backend)
    except Exception as error:
        return f"{type(error).__name__}: {error}", 0
    step = run.model.step
    if not said <= step <= said + 1:
        return f"expected step {said} or {said + 1}, got {step}", step
    for _ in range(AHEAD + 1):
        if run.digest() != expected[run.model.step]:
            return f"saved at step {step}, other bits at step {run.model.step}", step
        if run.model.step == len(expected) - 1:
            break
        run.step()
    return None, step


def campaign(kills, backend, seed=0, steps=STEPS):
    """Returns the summary; `failures` is empty where everything went on as if nothing had happened."""
    begin, rng, expected = time.perf_counter(), np.random.default_rng(seed), unkilled(backend, steps)
    places, failures, laps, trained = Counter(), [], 0, 0
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top, "run")
        folder.mkdir()
        before = 0
        for kill in range(kills):
            said = strike(folder, backend, steps, rng)
            places[struck(folder)] += 1
            wrong, step = check(folder, backend, said, expected)
            if wrong:
                failures.append(f"kill {kill}: {wrong}")
            trained, before = trained + step - before, step
            if wrong or step == steps:
                shutil.rmtree(folder)
                folder.mkdir()
                laps, before = laps + 1, 0
        subprocess.run(command_of(folder, backend, steps), check=True, stdout=subprocess.DEVNULL)
        wrong, _ = check(folder, backend, steps, expected)
        if wrong or os.listdir(folder) != ["last"]:
            failures.append(f"at the end: {wrong}, {os.listdir(folder)}")
    return {
        "backend": backend, "kills": kills, "struck": dict(places), "steps": trained, "laps": laps,
        "failures": failures, "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--backend", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, choices=range(AHEAD, STEPS + 1), metavar="N")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.backend, args.steps)
    summary = campaign(args.kills, args.backend, args.seed, args.steps)
    print(json.dumps(summary, indent=1))
    sys.exit(bool(summary["failures"]))


if __name__ == "__main__":
    main()
