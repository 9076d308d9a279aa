"""Damaged checkpoints and configurations through the loader: none may crash it, hang it, or pass for what it is not.

    python tests/mutate_checkpoints.py [--checkpoints 10000] [--configs 2000] [--seed 0]

Each batch runs in a process of its own with RLIMIT_AS; a case that computes longer than LIMIT seconds, or waits longer
than WALL, ends it. Half of the checkpoints get checksums that fit what they hold, as no accident would make them. Then
a changed weight is another weight, and what counts is that the model holds what the file says, learns from a batch or
says why not, and is whole.
Allowed answers: `CheckpointError` (naming expected and got); MemoryError where the facts ask for a model, or a file,
larger than memory; the unchanged model. Memory at its peak: 3 times the files and 30 times what in them is text
(`meta.json` and lists of tensors, each at most checkpoint.LARGEST_TEXT), the model's own plan, and SLACK.
Prints a summary in JSON; exit status 1 where an answer was another.
"""

import argparse
import ctypes
import faulthandler
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import mutations
import numpy as np
from kill_campaign import CONFIG, TEXT, B, T
from safetensors.numpy import load

import neurogen_cy as ng
from neurogen_cy import checkpoint, persistence

LIMIT, WALL = 10.0, 120.0  # seconds of computing that a case may take, and of waiting
BATCH = 250
SLACK = 16 << 20
ADDRESS_SPACE = 2 << 30
IDS, TARGETS = TEXT[:, :T].copy(), TEXT[:, 1 : T + 1].copy()


def rss(field):
    """VmRSS or VmHWM of this process, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def peak_begins():
    """VmHWM begins anew, at what is in use; returns that."""
    gc.collect()  # what the last case left in cycles: freed between the two readings below, it would count as a peak
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return rss("VmRSS")


def explains(said):
    """Whether a refusal names what was expected (of a wrong key: the nearest; of a gate: the levels) and what came."""
    return "expected" in said or ("unknown key" in said and "nearest" in said) or "needs level" in said


def contents(model):
    """Every array and counter of a model, as bytes."""
    moments = {f"{key}.{i}": view for key, pair in model._engine.moments().items() for i, view in enumerate(pair)}
    arrays = {**model.parameters(), **moments, **model.state()}
    facts = (model.config, model.optimizer, model.streams, model.seed, model.step, model.calls, model.skipped)
    return {key: persistence._host(a).tobytes() for key, a in arrays.items()}, facts, model.nonfinite


def text_bytes(files):
    """Bytes of meta.json and of the lists of tensors, as far as the loader reads them."""
    total = 0
    for name, data in files.items():
        if isinstance(data, bytes):
            total += len(data) if name == mutations.META else min(len(data), int.from_bytes(data[:8], "little"))
    return total


class Checkpoints:
    """Mutations of one checkpoint. `run(number)` returns what came of that one: ("refused" .. , details)."""

    def __init__(self, folder):
        self.place = Path(folder, "last")
        model = ng.NeuroGen(CONFIG, backend="cpu", streams=B, max_tokens=T, threads=1)
        for _ in range(3):
            model.train_step_batch(IDS, TARGETS)
        model.save(self.place, cursor={"at": 48}, extra={"about": ["text", 1.5, None]})
        self.files = {path.name: path.read_bytes() for path in self.place.iterdir()}
        self.contents = contents(model)
        self.facts = checkpoint.read_meta(self.place)
        self.plan = sum(ng.memory_plan(CONFIG, B, T, "cpu", 1).values())

    def run(self, seed):
        rng = np.random.default_rng([seed, 1])
        kind = sorted(mutations.CHECKPOINT)[seed % len(mutations.CHECKPOINT)]
        files = dict(self.files)
        mutations.CHECKPOINT[kind](rng, files)
        sealed = bool(rng.random() < 0.5) and mutations.seal(files)
        shutil.rmtree(self.place)
        self.place.mkdir()
        mutations.put(self.place, files)
        name = f"{kind}, checksums made to fit" if sealed else kind
        before = peak_begins()
        model, error = None, None
        try:
            model = ng.NeuroGen.load(self.place, backend="cpu", threads=1)
        except (checkpoint.CheckpointError, MemoryError) as caught:
            error = caught
        peak = rss("VmHWM") - before
        size = sum(len(data) for data in files.values() if isinstance(data, bytes))
        plan = self.plan if model is None else sum(ng.memory_plan(model.config, model.streams, model.max_tokens, "cpu",
                                                                  1).values())
        if peak > 3 * size + 30 * text_bytes(files) + plan + SLACK:
            return name, f"wrong: {peak} bytes at the peak for files of {size}", peak
        if error is not None:
            said = str(error)
            if isinstance(error, MemoryError) or (explains(said) and len(said) < 3000):
                return name, "refused" if isinstance(error, ValueError) else "MemoryError", peak
            return name, f"wrong: a refusal without expected and got: {said[:300]}", peak
        return name, self.judge(model, files, sealed), peak

    def judge(self, model, files, sealed):
        """A checkpoint was taken: was it rightly?"""
        if contents(model) == self.contents and (sealed or checkpoint.read_meta(self.place) == self.facts):
            return "unchanged"
        if not sealed:
            return "wrong: taken, but not what was saved"
        held = {**load(files["model.safetensors"]), **load(files["state.safetensors"])}
        here = {**model.parameters(), **model.state()}
        if any(np.asarray(here[key]).tobytes() != array.tobytes() for key, array in held.items()):
            return "wrong: the model does not hold what the file says"
        ids = np.zeros((model.streams, min(model.max_tokens, 4)), np.int32)
        before = contents(model)
        try:
            model.train_step_batch(ids, ids)
        except (FloatingPointError, ValueError) as error:  # such weights, or such a rate
            return "another model" if contents(model) == before else f"wrong: {error} left traces"
        finite = all(np.isfinite(np.asarray(array)).all() for array in model.parameters().values())
        return "another model" if finite else "wrong: weights that are not finite"


class Configs:
    """Mutations of configurations in TOML."""

    def __init__(self, folder):
        self.path = Path(folder, "config.toml")
        self.data = []
        for config in (CONFIG, ng.Config.preset("tiny", vocab_size=256), ng.Config.preset("base")):
            config.to_toml(self.path)
            self.data.append(self.path.read_bytes())

    def run(self, seed):
        rng = np.random.default_rng([seed, 2])
        self.path.write_bytes(mutations.toml(rng, mutations.pick(rng, self.data)))
        before = peak_begins()
        try:
            config = ng.Config.from_toml(self.path)
        except (ValueError, TypeError) as error:
            said = str(error)
            good = explains(said) and len(said) < 100_000  # a name of the user's may be long, and is said once or twice
            return "config", "refused" if good else f"wrong: {said[:300]}", rss("VmHWM") - before
        again = ng.Config.from_dict(config.to_dict())
        try:
            ng.memory_plan(config, 1, 1, "cpu", 1)
        except MemoryError:
            pass
        return "config", "taken" if again == config else "wrong: no round trip", rss("VmHWM") - before


def batch(kind, seeds):
    """Runs cases in this process; a line of JSON each."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    with tempfile.TemporaryDirectory() as folder:
        cases = {"checkpoints": Checkpoints, "configs": Configs}[kind](folder)
        for seed in seeds:
            faulthandler.dump_traceback_later(WALL, exit=True)
            signal.setitimer(signal.ITIMER_PROF, LIMIT)  # its signal ends the process
            begin = time.process_time()
            try:
                answer = cases.run(seed)
            except Exception as error:
                answer = "?", f"wrong: {type(error).__name__}: {str(error)[:300]}", 0
            print(json.dumps([seed, *answer, time.process_time() - begin]), flush=True)
        faulthandler.cancel_dump_traceback_later()


def campaign(kind, count, seed=0):
    """Returns the summary of `count` cases: outcomes by mutation, worst time and memory, and what was wrong."""
    outcomes, wrong, slowest, peak, kinds = Counter(), [], (0.0, ""), 0, {}
    todo = list(range(seed * 1_000_000, seed * 1_000_000 + count))
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    while todo:
        some = todo[:BATCH]
        command = [sys.executable, __file__, "--batch", kind, str(some[0]), str(len(some))]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.endswith("]")]
        for number, name, outcome, memory, seconds in lines:
            label = outcome.split(":")[0]
            outcomes[label] += 1
            kinds.setdefault(name, Counter())[label] += 1
            slowest, peak = max(slowest, (round(seconds, 3), f"{number}, {name}")), max(peak, memory)
            if label == "wrong":
                wrong.append(f"{number}, {name}: {outcome}")
        todo = todo[len(lines) :]
        if done.returncode:  # the case after the last answer did it
            hung = "Timeout" in done.stderr or done.returncode == -signal.SIGPROF
            outcomes["hang" if hung else "crash"] += 1
            wrong.append(f"{todo.pop(0)}: status {done.returncode}: {done.stderr[-800:]}")
    return {
        "cases": count, "outcomes": dict(outcomes), "slowest_cpu_s": slowest,
        "peak_mib": round(peak / 2**20, 1), "wrong": wrong,
        "by_mutation": {k: dict(v) for k, v in sorted(kinds.items())},
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=10_000)
    parser.add_argument("--configs", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batch:
        kind, first, count = args.batch
        return batch(kind, range(int(first), int(first) + int(count)))
    summary = {kind: campaign(kind, getattr(args, kind), args.seed) for kind in ("checkpoints", "configs")}
    print(json.dumps(summary, indent=1))
    sys.exit(any(part["wrong"] for part in summary.values()))


if __name__ == "__main__":
    main()
