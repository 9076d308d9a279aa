"""How the cost of a train step grows with streams B, tokens T, neurons N and vocabulary V, and the memory it takes.

    python benchmarks/growth.py [--backend cuda|cpu] [--sweeps B T V N] [--row-seconds S] [--seconds S]
    python benchmarks/growth.py --plot            draws docs/growth.png from the record and measures nothing

Each sweep changes one size of the backend's preset (`base` on a GPU, `tiny` on the CPU) and leaves the others. N grows
by the widths of all regions while every neuron keeps its number of inputs: twenty times `base` is `large`. A row is
the median of whole train steps on random ids (forward, loss, e-prop, clipping, AdamW, the wait), and, of a GPU, what
the driver has less after the model was built, beside `memory_plan`. The record is written after every row: a sweep
that is cut short keeps what it has, a size that does not fit is a row that says so, and sweeps that were not asked for
stay as they were recorded. The CPU's record is `growth_cpu.json`, without a plot in docs.
"""

import argparse
import dataclasses
import gc
import json
import math
import statistics
import sys
import time
from pathlib import Path

import common

import neurogen_cy as ng
from neurogen_cy import backend
from neurogen_cy.connectome import BLOCK, initial_parameters

PLOT = Path(__file__).parent.parent / "docs" / "growth.png"
# Values of each sweep, B of its lines (N: factors of the preset's neurons), and T of all but the sweep over it.
SWEEPS = {
    "cuda": {
        "preset": "base", "T": 512,
        "values": {
            "B": (1, 2, 4, 8, 16, 32, 64, 128, 256),
            "T": (16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
            "V": (256, 1024, 4096, 16384, 32000, 65536, 131072),
            "N": (0.1, 0.25, 0.5, 1, 2, 5, 10, 20),
        },
        "streams": {"B": (None,), "T": (1, 64), "V": (1, 64), "N": (1, 16)},
    },
    "cpu": {
        "preset": "tiny", "T": 32,
        "values": {"B": (1, 2, 4, 8), "T": (16, 32, 64), "V": (256, 1024), "N": (0.5, 1, 2)},
        "streams": {"B": (None,), "T": (4,), "V": (4,), "N": (1,)},
    },
}  # fmt: skip
WARM_STEPS, LEAST_STEPS, MOST_STEPS = 2, 3, 50


def scaled(cfg, factor):
    """The connectome with `factor` times the neurons, each of which keeps its number of inputs."""
    old = {region.name: region.neurons for region in cfg.regions}
    new = {name: max(1, round(count * factor / BLOCK)) * BLOCK for name, count in old.items()}
    regions = tuple(dataclasses.replace(region, neurons=new[region.name]) for region in cfg.regions)
    projections = tuple(
        dataclasses.replace(p, density=min(1.0, p.density * old[p.src] / new[p.src])) if p.src in old else p
        for p in cfg.projections
    )
    return dataclasses.replace(cfg, regions=regions, projections=projections)


class Parameters:
    """Initial values of sizes of one preset, drawn once: a tensor of V rows begins the one of a larger vocabulary."""

    def __init__(self, cfg, largest_vocab):
        least = scaled(dataclasses.replace(cfg, vocab_size=largest_vocab), 0)
        drawn = initial_parameters(least, 0)
        self.rows = {key: drawn[key] for key in ("embedding.weight", "decoder.weight", "decoder.bias") if key in drawn}
        self.brain_of, self.brain = None, {}

    def of(self, cfg):
        """What `initial_parameters(cfg, 0)` gives."""
        least = dataclasses.replace(cfg, vocab_size=1)
        if self.brain_of != least:
            self.brain_of, self.brain = least, initial_parameters(least, 0)
        return {**self.brain, **{key: rows[: cfg.vocab_size] for key, rows in self.rows.items()}}


def points(plan, sweeps):
    """(sweep, preset's Config, B, T, Config) of every row."""
    cfg = ng.Config.preset(plan["preset"])
    for sweep in sweeps:
        for value in plan["values"][sweep]:
            for streams in plan["streams"][sweep]:
                size = {"B": streams, "T": plan["T"], "V": cfg.vocab_size, "N": 1, sweep: value}
                sized = dataclasses.replace(cfg, vocab_size=size["V"])
                yield sweep, size["B"], size["T"], sized if size["N"] == 1 else scaled(sized, size["N"])


def free_bytes(module, device=0):
    """What the driver has left, once everything that was dropped is gone."""
    gc.collect()
    return module.free_bytes(device)


def measure(cfg, B, T, module, parameters, row_seconds, backend_name):
    """Time, plan and memory of one size."""
    plan = sum(ng.memory_plan(cfg, B, T, backend_name).values())
    row = {"planned_bytes": plan}
    free = free_bytes(module)
    try:
        model = ng.NeuroGen(cfg, backend_name, streams=B, max_tokens=T, _parameters=parameters.of(cfg))
        data, step = common.batches(cfg.vocab_size, B, T), lambda *batch: model.train_step_batch(*batch).loss
        one = min(common.seconds(step, data, WARM_STEPS))
        count = min(MOST_STEPS, max(LEAST_STEPS, int(row_seconds / one)))
        times = common.seconds(step, data, count)
        taken = free - free_bytes(module) if backend_name == "cuda" else None
    except (MemoryError, RuntimeError) as error:
        return {**row, "error": common.first_line(error)}
    ms = [1e3 * t for t in times]
    return {
        **row, "precision": model.precision, "allocated_bytes": taken, "ms": statistics.median(ms),
        "ms_spread": [min(ms), max(ms)], "tok_s": B * T / statistics.median(times),
        "tok_s_spread": [B * T / max(times), B * T / min(times)], "steps": len(times),
    }  # fmt: skip


def run(args, name, module):
    """Measures every row, and writes the record after each."""
    plan, begin = SWEEPS[name], time.monotonic()
    record_name = "growth" if name == "cuda" else f"growth_{name}"
    path = common.RESULTS / f"{record_name}.json"
    about = common.gpu() if name == "cuda" else common.machine()
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in kept if row["sweep"] not in args.sweeps]
    record = {**about, "preset": plan["preset"], "rows": rows}
    base = ng.Config.preset(plan["preset"])
    parameters = Parameters(base, max(plan["values"]["V"]) if "V" in args.sweeps else base.vocab_size)
    if name == "cuda":  # the context, kernels and what cuBLAS loads are there before memory is compared
        measure(base, 1, 16, module, parameters, 0, name)
    measured = {}
    for sweep, B, T, cfg in points(plan, args.sweeps):
        size = {"B": B, "T": T, "N": sum(region.neurons for region in cfg.regions), "V": cfg.vocab_size}
        key = tuple(size.values())
        if key not in measured:
            late = time.monotonic() - begin > args.seconds
            measured[key] = (
                {"error": f"not measured: {args.seconds:g} seconds were over"} if late
                else measure(cfg, B, T, module, parameters, args.row_seconds, name)
            )  # fmt: skip
        row = {"sweep": sweep, "backend": name, "commit": about["commit"], **size, **measured[key]}
        rows.append(row)
        common.write(record_name, record, say=False)
        print(f"{sweep}: {B:4} x {T:4}, N {size['N']:8,}, V {size['V']:7,}  " + (
            row["error"] if "error" in row else
            f"{row['ms']:9.2f} ms {row['tok_s']:12,.0f} tok/s  planned {row['planned_bytes'] / 1e9:7.3f} GB"
            + (f", allocated {row['allocated_bytes'] / 1e9:7.3f}" if row["allocated_bytes"] is not None else "")
        ), flush=True)  # fmt: skip
    print(f"wrote {path}, {time.monotonic() - begin:.0f} s")


def lines(record, sweep, key):
    """Rows of each line of a sweep: {label: [(x, row)]}, the label naming the streams of a sweep that keeps them."""
    out = {}
    for row in record["rows"]:
        if row["sweep"] == sweep:
            label = "" if sweep == "B" else f"B = {row['B']}"
            out.setdefault(label, []).append((row[key], row))
    return out


def draw(axes, record, sweep, quantity):
    """One panel: a line for each number of streams; sizes that could not be run are crosses on the edge."""
    colours = {"": "tab:green", "B = 1": "tab:blue"}
    for label, found in lines(record, sweep, sweep).items():
        colour = colours.get(label, "tab:green")
        good = [(x, row) for x, row in found if "error" not in row]
        refused = [x for x, row in found if "error" in row]
        xs = [x for x, _ in good]
        if quantity == "tok_s":
            middle = [row["tok_s"] for _, row in good]
            axes.fill_between(xs, *zip(*(row["tok_s_spread"] for _, row in good)), color=colour, alpha=0.25, lw=0)
            axes.plot(xs, middle, marker="o", ms=4, color=colour, label=label or None)
        else:
            planned = [(x, row["planned_bytes"] / 1e9) for x, row in found if "planned_bytes" in row]
            axes.plot(*zip(*planned), color=colour, lw=1.2, label=f"memory_plan{label and ', ' + label}")
            taken = [(x, row["allocated_bytes"] / 1e9) for x, row in good if row["allocated_bytes"]]
            if taken:
                axes.plot(*zip(*taken), "o", ms=5, mfc="none", color=colour, label=f"allocated{label and ', ' + label}")
        if refused:
            axes.plot(refused, [0.03] * len(refused), "x", color=colour, transform=axes.get_xaxis_transform(),
                      clip_on=False, label=f"not run{label and ', ' + label}")  # fmt: skip


def whole(value, _=None):
    """A number of an axis: 512, 39k, 2M."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.0f}{name}"
    return f"{value:.3g}"


def panel(record):
    """The figure: speed against B, T, N and V, memory against B and T."""
    try:
        import matplotlib
    except ImportError as error:
        sys.exit(f"{error}: the plot needs matplotlib (the extra plot)")
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    plan = next(plan for plan in SWEEPS.values() if plan["preset"] == record["preset"])
    names = {"B": "streams B", "T": "tokens of a call T", "N": "neurons N", "V": "vocabulary V"}
    figure, grid = pyplot.subplots(2, 3, figsize=(12.5, 7), layout="constrained")
    cells = [("B", "tok_s"), ("T", "tok_s"), ("N", "tok_s"), ("V", "tok_s"), ("B", "memory"), ("T", "memory")]
    for axes, (sweep, quantity) in zip(grid.flat, cells):
        draw(axes, record, sweep, quantity)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(names[sweep])
        axes.set_ylabel("training, tokens a second" if quantity == "tok_s" else "device memory, GB")
        axes.set_xticks(sorted({row[sweep] for row in record["rows"] if row["sweep"] == sweep}))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(whole if sweep in "NV" else lambda x, _: f"{x:g}"))
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(whole))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.grid(alpha=0.3)
        axes.minorticks_off()
        axes.set_title("" if sweep == "T" else f"T = {plan['T']}", loc="right", fontsize=9, color="dimgrey")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    where = record.get("gpu") or record.get("processor") or "CPU"
    figure.suptitle(f"Whole train steps of `{record['preset']}` as one size grows, {where}", fontsize=12)
    return figure


def plot(record):
    panel(record).savefig(PLOT, dpi=130)
    print(f"wrote {PLOT}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--sweeps", nargs="+", default=["B", "T", "V", "N"], choices=("B", "T", "V", "N"))
    parser.add_argument("--row-seconds", type=float, default=0.25, help="of timed steps in a row")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no row begins later")
    parser.add_argument("--plot", action="store_true", help="only draw the GPU's record")
    args = parser.parse_args(argv)
    if args.plot:
        return plot(json.loads((common.RESULTS / "growth.json").read_text()))
    run(args, *backend.load(args.backend))


if __name__ == "__main__":
    main()
