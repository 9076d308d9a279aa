"""The user's ladder: from token by token with copies to one batched call, on the same text with the same model.

    python benchmarks/ladder.py [--backend cuda|cpu] [--preset NAME] [--tokens T ...] [--data FILE]
    python benchmarks/ladder.py --plot            draws docs/ladder.png from the record and measures nothing

`base` on a GPU, `tiny` on the CPU, one stream. What the rungs are, and how each figure is measured, is said in the
package: neurogen_cy/rungs.py, ladder.py, ladder_time.py, ladder_counts.py. A loop that would take longer than
--row-seconds at some T is measured over fewer tokens (`measured_tokens`, `counted_tokens` of its row). Rows of the
other backend stay in the record. The figures it is compared with are quoted, each with where it comes from.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import common

import neurogen_cy as ng
from neurogen_cy import backend, data, ladder
from neurogen_cy.rungs import RUNGS

PLOT = Path(__file__).parent.parent / "docs" / "ladder.png"
PRESETS = {"cuda": "base", "cpu": "tiny"}
STEADY = {"cuda": (64, 512), "cpu": (16, 64)}  # streams and tokens of the consecutive steps
# What was there before, and what was promised of it: quoted, not measured here.
REPORT = {
    "today": {
        "source": "the user's report, 500 tokens", "tok_s": 10, "seconds": 50.0, "cpu_percent": 100, "gpu_percent": 10,
        "host_alloc_bytes": 6e6, "synchronisation": 25.0, "allocation": 5.0, "copying": 5.0, "brain_decoder": 7.5,
        "learning": 7.5,
    },
    "promised": {
        "source": "the user's report, 500 tokens", "tok_s": 2500, "seconds": 0.2, "cpu_percent": 15, "gpu_percent": 90,
        "host_alloc_bytes": 100e3,
    },
    "original": {
        "source": "NeuroGen-2.0, 788k neurons, its own train_step on an NVIDIA H200", "tok_s": 815, "seconds": 0.614,
        "cpu_percent": 105, "gpu_percent": 40,
    },
}  # fmt: skip


def measure(args):
    """The record of one backend."""
    name = backend.load(args.backend)[0]
    preset = args.preset or PRESETS[name]
    B, T = STEADY[name]
    plan = ladder.Plan(
        tokens=tuple(args.tokens), row_seconds=args.row_seconds, count_seconds=args.row_seconds / 2,
        steady_streams=args.steady_streams or B, steady_tokens=args.steady_tokens or T,
        steady_seconds=args.steady_seconds,
    )  # fmt: skip
    text, facts = data.read_corpus(args.data) if args.data else data.default_corpus()
    settings = {"backend": name, "precision": args.precision, "threads": args.threads}
    say = lambda line: print(line, flush=True)
    found = ladder.measure(ng.Config.preset(preset), settings, text, plan, say)
    rows = [{**row, "preset": preset} for row in found.pop("rows")]
    about = {key: facts[key] for key in ("name", "bytes", "sha256")}
    run = {**common.gpu(), **common.machine(), "preset": preset, "text": about, "row_seconds": args.row_seconds}
    return name, {**run, **found}, rows


def merged(name, run, rows):
    """The record with one backend's part replaced."""
    path = common.RESULTS / "ladder.json"
    old = json.loads(path.read_text()) if path.exists() else {"runs": {}, "rows": []}
    kept = [row for row in old["rows"] if row["backend"] != name]
    return {"runs": {**old["runs"], name: run}, "rows": kept + rows, "report": REPORT}


def plot(record):
    """Tokens/s of every rung, a line for each T of each backend."""
    try:
        import matplotlib
    except ImportError as error:
        sys.exit(f"{error}: the plot needs matplotlib (the extra plot)")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    colours = {"cuda": "tab:green", "cpu": "tab:blue"}
    for name, run in record["runs"].items():
        rows = [row for row in record["rows"] if row["backend"] == name]
        lengths = sorted({row["T"] for row in rows})
        for number, T in enumerate(lengths):
            rates = {row["rung"]: row["tok_s"] for row in rows if row["T"] == T}
            axes.plot(
                list(rates), list(rates.values()), marker="o", color=colours[name],
                alpha=0.35 + 0.65 * (number + 1) / len(lengths),
                label=f"{run['preset']}, {run['gpu'] or name if name == 'cuda' else 'CPU'}, T = {T:,}",
            )  # fmt: skip
    for key, what in (("today", "the loop as reported"), ("original", "the original on an H200")):
        rate = record["report"][key]["tok_s"]
        axes.axhline(rate, color="grey", linestyle=":", linewidth=1)
        axes.text(0, rate, f"{what}, {rate:,} tokens/s", va="bottom", fontsize=8, color="dimgrey")
    axes.set_yscale("log")
    axes.set_xticks(range(len(RUNGS)), [name.replace(", ", ",\n") for name in RUNGS], fontsize=9)
    axes.set_ylabel("tokens a second, one stream, training")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.0, 0.9))
    figure.savefig(PLOT, dpi=130)
    print(f"wrote {PLOT}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--preset", help="base on a GPU, tiny on the CPU unless said")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(ladder.Plan.tokens), metavar="T")
    parser.add_argument("--row-seconds", type=float, default=1.0)
    parser.add_argument("--steady-streams", type=int)
    parser.add_argument("--steady-tokens", type=int)
    parser.add_argument("--steady-seconds", type=float, default=5.0)
    parser.add_argument("--precision")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--data", default=os.environ.get("NEUROGEN_TEXT"), help="text file (Python's help topics)")
    parser.add_argument("--plot", action="store_true", help="only draw the record")
    args = parser.parse_args()
    if args.plot:
        return plot(json.loads((common.RESULTS / "ladder.json").read_text()))
    record = merged(*measure(args))
    common.write("ladder", record)
    try:
        plot(record)
    except SystemExit as missing:  # the record counts; the picture can be drawn elsewhere
        print(missing)


if __name__ == "__main__":
    main()
