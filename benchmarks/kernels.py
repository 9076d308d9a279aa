"""Where a train step's time goes on the GPU: its kernels, the decoder, a tick of the brain; and how fast it generates.

    python benchmarks/kernels.py [--backend cuda|cpu] [--parts generation decoder steps] [--seconds S]

`generation`: tokens a second of `generate` (temperature 1, the whole vocabulary; and greedy), by the wall clock, once
the prompts and the first batch of drawn tokens are behind it.

`decoder`: forward and backward of the decoder of `base` alone. Ours is a `backward_batch` of a model whose brain is one
region of 32 neurons, over few tokens: hardly anything else is left. Its kernels are the library's products (logits,
dE/d broca, dW) and our own of decoder.cu; a row lists what was `counted`. The rate is 6 M V D FLOP over the time in
which at least one of them ran; `at_least` is the same work over the wall time of the whole call. The peer is torch's
F.linear + cross_entropy, compiled and eager, in the same run, by the wall clock of some passes in a row.

`steps`: of one warm `train_step_batch` of each size, launches and time of every kernel, the decoder's rate inside that
step (what else ran at that time is not taken off), and the brain's time a tick: the duration of its launch over
T + levels - 1 ticks.

Kernels are timed by CUPTI through torch's profiler; figures are medians of some traces. The wall clock comes first, as
launches cost more afterwards. The record is written after every row. The CPU's (`kernels_cpu.json`) has no kernels.
"""

import argparse
import gc
import json
import math
import sys
import time
import traceback

import common
import traces
from peers import DECODER_PASSES, Failed, Peers

import neurogen_cy as ng
from neurogen_cy import backend
from neurogen_cy.connectome import BLOCK, initial_parameters
from neurogen_cy.gpu_watch import DeviceClock

SIZES = {
    "cuda": {
        "preset": "base", "generation": (1, 64), "new_tokens": 512,
        "decoder": ((128, 64, None), (512, 64, None), (512, 64, "fp8")),
        "steps": ("base:1:500", "base:16:512", "base:64:512", "base:256:512", "small:128:128", "large:1:512",
                  "base:64:512:fp8", "base:256:512:fp8"),
    },
    "cpu": {
        "preset": "tiny", "generation": (1, 4), "new_tokens": 64, "decoder": ((4, 32, None),), "steps": ("tiny:4:32",),
    },
}  # fmt: skip
WITHOUT_KERNELS = {"cpu": "the model runs on the CPU"}
PARTS = ("generation", "decoder", "steps")  # the wall clock's first
PROMPT, TRACES, ROUNDS, WARM_STEPS = 16, 5, 5, 3


def decoder_flops(cfg, rows):
    return 6 * rows * cfg.vocab_size * cfg.dim


def tflops(work, times):
    """TFLOP/s: median, smallest and largest; None where nothing was timed."""
    return common.spread([work / t / 1e12 for t in times]) if times and min(times) > 0 else None


def in_units(times, unit):
    return common.spread([t * unit for t in times])


class Bench:
    """The sizes of a backend, the clock of its device, and initial values, which are drawn once."""

    def __init__(self, args):
        self.name, self.module = backend.load(args.backend)
        self.args, self.sizes, self.drawn, self.clock = args, dict(SIZES[self.name]), {}, DeviceClock()
        if args.steps:
            self.sizes["steps"] = args.steps
        self.clock.reason = WITHOUT_KERNELS.get(self.name)

    def model(self, cfg, B, T, precision=None):
        gc.collect()
        if cfg not in self.drawn:
            self.drawn[cfg] = initial_parameters(cfg, 0)
        return ng.NeuroGen(cfg, self.name, streams=B, max_tokens=T, precision=precision, _parameters=self.drawn[cfg])

    def traces(self, call):
        """What the device did in each of some calls; [] where that cannot be seen, for `clock.reason`."""
        found = [self.clock.events(call) for _ in range(TRACES if self.clock.reason is None else 0)]
        return [events for events in found if events]

    def generation(self):
        """A row for each number of streams and way to draw."""
        for B in self.sizes["generation"]:
            for how, options in (("temperature 1", {}), ("greedy", {"greedy": True})):
                yield {"preset": self.sizes["preset"], "B": B, "how": how, **self.generate(B, options)}

    def generate(self, B, options):
        cfg, new, ahead = ng.Config.preset(self.sizes["preset"]), self.sizes["new_tokens"], self.module.TOKENS_AHEAD
        model, prompts = self.model(cfg, B, PROMPT), common.batches(cfg.vocab_size, B, PROMPT)[0][0]
        steady, whole = [], []
        for number in range(-1, ROUNDS):  # the first warms up
            begin = time.perf_counter()
            ids = model.generate(prompts, new, **options)
            for _ in range(ahead):  # drawn as one batch, with the prompt before them
                next(ids)
            middle = time.perf_counter()
            left = sum(1 for _ in ids)
            end = time.perf_counter()
            if number >= 0:
                steady.append(B * left / (end - middle))
                whole.append(B * new / (end - begin))
        return {
            "precision": model.precision, "prompt": PROMPT, "new_tokens": new, "tok_s": common.spread(steady),
            "tok_s_with_prompt": common.spread(whole),
        }  # fmt: skip

    def decoder(self):
        """A row for each M = B * T."""
        preset = ng.Config.preset(self.sizes["preset"])
        cfg = ng.Config(
            preset.vocab_size, preset.dim, (ng.Region("broca", BLOCK, 0),),
            (ng.Projection("embedding", "broca", density=BLOCK / preset.dim), ng.Projection("broca", "broca_out")),
        )  # fmt: skip
        with Peers(["decoder"], self.name, self.args.peer_seconds) as peers:
            for B, T, precision in self.sizes["decoder"]:
                peers.build(vocab=cfg.vocab_size, dim=cfg.dim, B=B, T=T)
                yield {"M": B * T, "V": cfg.vocab_size, "D": cfg.dim, **self.decode(cfg, B, T, precision, peers)}

    def decode(self, cfg, B, T, precision, peers):
        work, data = decoder_flops(cfg, B * T), common.batches(cfg.vocab_size, B, T)
        model = self.model(cfg, B, T, precision)

        def call(ids=data[0][0], targets=data[0][1]):
            return model.backward_batch(ids, targets).loss

        common.seconds(call, data, WARM_STEPS)
        names, errors = peers.ready()
        wall, times = [], {name: [] for name in names}
        for _ in range(ROUNDS):
            wall += common.seconds(call, data, 2)
            for name in names:
                try:
                    times[name] += [t / DECODER_PASSES for t in peers.seconds(name, 1)]
                except Failed as error:
                    errors[name] = str(error)
        found = self.traces(call)
        row = {"precision": model.precision, "tflops": None, "no_kernels": self.clock.reason, "counted": []}
        if found:
            row["tflops"] = tflops(work, [traces.covered(events, traces.of_decoder) for events in found])
            row["counted"] = traces.table(
                [[event for event in events if traces.of_decoder(event[0])] for events in found]
            )
        measured = [{"peer": name, "tflops": tflops(work, t)} for name, t in times.items() if name not in errors]
        return {
            **row, "at_least": tflops(work, wall),
            "peers": measured + [{"peer": name, "error": error} for name, error in errors.items()],
        }  # fmt: skip

    def steps(self):
        """A row for each size."""
        for spec in self.sizes["steps"]:
            preset, B, T, precision = (*spec.split(":"), None)[:4]
            size = {"preset": preset, "B": int(B), "T": int(T)}
            try:
                found = self.step(**size, precision=precision)
            except (MemoryError, RuntimeError) as error:
                found = {"error": common.first_line(error)}
            yield {**size, **found}

    def step(self, preset, B, T, precision):
        if self.clock.reason is not None:
            return {"error": f"no kernels: {self.clock.reason}"}
        cfg = ng.Config.preset(preset)
        data, model = common.batches(cfg.vocab_size, B, T), self.model(cfg, B, T, precision)

        def call(ids=data[0][0], targets=data[0][1]):
            return model.train_step_batch(ids, targets).loss

        wall = common.seconds(call, data, WARM_STEPS)
        found = self.traces(call)
        if not found:
            return {"error": f"no kernels: {self.clock.reason}"}
        ticks = T + max(region.level for region in cfg.regions)
        brain = [sum(end - begin for name, begin, end in events if traces.of_brain(name)) for events in found]
        decoder = [traces.covered(events, traces.of_decoder) for events in found]
        return {
            "precision": model.precision, "wall_ms": 1e3 * min(wall), "plan": model.execution_plan,
            "device_ms": in_units([traces.covered(events) for events in found], 1e3),
            "span_ms": in_units([traces.span(events) for events in found], 1e3),
            "brain_ms": in_units(brain, 1e3), "ticks": ticks, "us_tick": in_units(brain, 1e6 / ticks),
            "decoder_tflops": tflops(decoder_flops(cfg, B * T), decoder), "kernels": traces.table(found),
        }  # fmt: skip


def say(part, row):
    if "error" in row:
        return f"{part} {row['preset']} {row['B']} x {row['T']}: {row['error']}"
    if part == "generation":
        return f"generation {row['preset']} B={row['B']} {row['how']}: {row['tok_s']['median']:,.0f} tok/s"
    if part == "decoder":
        lines = [f"decoder M={row['M']}: at least {row['at_least']['median']:.3g} TFLOP/s"]
        if row["tflops"]:
            lines[0] += f", its kernels {row['tflops']['median']:.1f}"
        lines += [f"    {peer['peer']}: " + (peer.get("error") or f"{peer['tflops']['median']:.3g}")
                  for peer in row["peers"]]  # fmt: skip
        return "\n".join(lines)
    lines = [f"step {row['preset']} {row['B']} x {row['T']} {row['precision']}: kernels "
             f"{row['device_ms']['median']:.3f} ms of "
             f"{row['span_ms']['median']:.3f}, {row['us_tick']['median']:.2f} us a tick"]  # fmt: skip
    lines += [f"    {kernel['ms']:9.4f} ms {100 * kernel['share']:5.1f} % {kernel['launches']:5}  {kernel['name']}"
              for kernel in row["kernels"][:12]]  # fmt: skip
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--steps", nargs="+", metavar="PRESET:B:T[:PRECISION]", help="not the backend's own sizes")
    parser.add_argument("--peer-seconds", type=float, default=60.0, help="that a peer may be silent")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no row begins later")
    args = parser.parse_args(argv)
    bench, begin = Bench(args), time.monotonic()
    about = common.gpu() if args.backend == "cuda" else common.machine()
    name = "kernels" if args.backend == "cuda" else f"kernels_{args.backend}"
    path = common.RESULTS / f"{name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    record = {**about, **{part: kept.get(part, []) for part in PARTS}}
    failed = 0
    for part in [part for part in PARTS if part in args.parts]:
        rows = record[part] = []
        try:
            for row in getattr(bench, part)():
                rows.append({"commit": about["commit"], **row})
                print(say(part, row), flush=True)
                common.write(name, record, say=False)
                if time.monotonic() - begin > args.seconds:
                    raise TimeoutError(f"{args.seconds:g} seconds were over; what follows was not measured")
        except Exception as error:  # the other parts still count
            failed += 1
            traceback.print_exc()
            rows.append({"error": common.first_line(error)})
            common.write(name, record, say=False)
    print(f"wrote {path}, {time.monotonic() - begin:.0f} s")
    return failed


if __name__ == "__main__":
    sys.exit(main())
