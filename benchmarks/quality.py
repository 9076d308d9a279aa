"""What `neurogen train` reaches on a text, beside n-grams of the same split, and how long it took.

    python benchmarks/quality.py [--data FILE] [--name NAME] [any other option of `neurogen train`]

Runs the command itself in a fresh folder and reads what it left; one record per text in results/quality.json.
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

from neurogen_cy import checkpoint, ngram
from neurogen_cy import data as corpora
from neurogen_cy.metrics import read_metrics


def main():
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


if __name__ == "__main__":
    main()
