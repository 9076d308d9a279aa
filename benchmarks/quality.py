"""What a brain learns of a text, and how long that takes: on the CPU by `neurogen train`, on a GPU by a recipe.

    python benchmarks/quality.py [--data FILE] [--name NAME] [any other option of `neurogen train`]
    python benchmarks/quality.py gpu --data FILE [options of the recipe, see --help]

The first runs the command itself in a fresh folder, reads what it left, and puts it beside n-grams of the same split;
one record per text in results/quality.json.

The second trains preset `small` on bytes: the first 90 % in many streams that carry their state from step to step,
AdamW with a linear warm-up and a cosine to zero, gradients clipped at norm 1, dropout. The last 10 % validate: cut into
16 contiguous streams, from zero state, every byte counted once. Seconds are those of training (batches included);
evaluations are counted apart, and training stops at its budget. The curve goes to results/quality_gpu.json.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

import neurogen_cy as ng
from neurogen_cy import checkpoint, ngram
from neurogen_cy import data as corpora
from neurogen_cy.metrics import read_metrics
from neurogen_cy.train_settings import TrainSettings


def command():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--name", help="of the record; the text's by default")
    args, options = parser.parse_known_args()
    if args.data is not None:
        options += ["--data", str(args.data)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "neurogen_cy", "train", "--out", str(out), *options], check=True)
        seconds = time.perf_counter() - begin
        records, meta = read_metrics(out / "metrics.jsonl"), checkpoint.read_meta(out / "last")
    evaluations = [record for record in records if record["event"] == "evaluation"]
    text, facts = corpora.default_corpus() if args.data is None else corpora.read_corpus(args.data)
    training, validation = corpora.split(text)
    ngrams = ngram.baselines(training, validation)
    steps = [record for record in records if record["event"] == "step"]
    row = {
        "text": args.name or facts["name"], "bytes": facts["bytes"], "sha256": facts["sha256"],
        "threads": len(os.sched_getaffinity(0)), "seconds": round(seconds, 1), "tokens": steps[-1]["tokens"],
        "settings": {key: value for key, value in meta["extra"]["run"].items() if key in (
            "steps", "lr", "warmup", "streams", "tokens", "seed")},
        "optimizer": meta["optimizer"],
        "validation_bits_per_byte": evaluations[-1]["validation_bits_per_byte"],
        "validation_nats_per_byte": evaluations[-1]["validation_loss"],
        "best_nats_per_byte": min(record["validation_loss"] for record in evaluations),
        "ngram_bits_per_byte": {str(order): bits for order, bits in ngrams.items()},
        "curve": [[record["tokens"], round(record["validation_loss"] / math.log(2), 4)] for record in evaluations],
    }
    path = common.RESULTS / "quality.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [old for old in rows if old["text"] != row["text"]] + [row]
    common.write("quality", {"machine": common.machine(), "rows": rows})


def recipe(arguments):
    parser = argparse.ArgumentParser(
        prog="quality.py gpu", description="Trains on a GPU and records the curve.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--data", type=Path, required=True, help="text to learn")
    add("--preset", default="small", help="connectome")
    add("--streams", type=int, default=128, help="B")
    add("--tokens", type=int, default=128, help="T of a step")
    add("--steps", type=int, default=600, help="length of the schedule")
    add("--lr", type=float, default=2e-3, help="highest rate")
    add("--warmup", type=int, default=50, help="steps until then")
    add("--beta2", type=float, default=0.98, help="AdamW's")
    add("--weight-decay", type=float, default=0.0, help="AdamW's")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--dropout", type=float, default=0.1, help="of spikes")
    add("--seed", type=int, default=0, help="of weights and dropout")
    add("--every", type=int, default=50, help="steps between evaluations")
    add("--budget", type=float, default=90.0, help="seconds of training")
    add("--backend", default="cuda", help="where")
    add("--precision", help="bf16 or fp32; the backend's own if not given")
    return parser.parse_args(arguments)


def on_gpu(arguments):
    args, begun = recipe(arguments), time.perf_counter()
    text, facts = corpora.read_corpus(args.data)
    training, validation = corpora.split(text)
    cfg = ng.Config.preset(args.preset, vocab_size=256, dropout=args.dropout)
    optimizer = ng.AdamW(lr=args.lr, betas=(0.9, args.beta2), weight_decay=args.weight_decay, clip=args.clip)
    model = ng.NeuroGen(
        cfg, backend=args.backend, streams=args.streams, max_tokens=args.tokens, seed=args.seed, optimizer=optimizer,
        precision=args.precision,
    )  # fmt: skip
    schedule = TrainSettings(steps=args.steps, lr=args.lr, warmup=args.warmup)
    reader, held_out = corpora.ByteStreams(training, args.streams, args.tokens), corpora.evaluation_streams(validation)
    curve, trained = [], 0.0
    while model.step < args.steps and trained < args.budget:
        start = time.perf_counter()
        ids, targets, resets = reader.next()
        result = model.train_step_batch(ids, targets, resets=resets, lr=schedule.rate(model.step))
        trained += time.perf_counter() - start
        if model.step % args.every == 0 or model.step == args.steps or trained >= args.budget:
            loss = model.evaluate(*held_out)
            curve.append({
                "step": model.step, "tokens": model.step * ids.size, "train_seconds": round(trained, 2),
                "train_nats": round(result.loss, 4), "validation_nats": round(loss, 4),
            })
            rates = " ".join(f"{name} {rate:.2f}" for name, rate in result.rates.items())
            print(f"step {model.step:5} {trained:6.1f} s: training {result.loss:.3f}, validation {loss:.4f} nats; "
                  f"spikes a neuron and token: {rates}", flush=True)
    best = min(curve, key=lambda point: point["validation_nats"])
    rate = model.step * args.streams * args.tokens / trained
    print(f"best validation {best['validation_nats']:.4f} nats at step {best['step']}, after "
          f"{best['train_seconds']:.1f} s of training, {rate:,.0f} tokens/s")
    common.write("quality_gpu", {
        **common.gpu(),
        "text": facts["name"], "bytes": facts["bytes"], "sha256": facts["sha256"], "weights": cfg.weights,
        "backend": model.backend, "precision": model.precision,
        "recipe": {key: value for key, value in vars(args).items() if key not in ("data", "backend", "precision")},
        "best": best, "steps": model.step, "train_seconds": round(trained, 2),
        "total_seconds": round(time.perf_counter() - begun, 2),
        "train_tok_s": rate,
        "curve": curve,
    })  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["gpu"]:
        on_gpu(sys.argv[2:])
    else:
        command()
