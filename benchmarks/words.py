"""What 8-bit products in the decoder cost in quality: words learnt with precision bf16 and fp8, side by side.

    python benchmarks/words.py --data FOLDER [options, see --help]

FOLDER has train.txt and valid.txt, words separated by spaces, as WikiText-2 is published. The vocabulary is the 32,000
most frequent words of the first; a word outside it is <unk>, a line's end a word. Preset `base` trains on it from the
same weights and in the same order in each precision, for several seeds, AdamW with a linear warm-up and a cosine to
zero; the curves of validation (16 contiguous streams, in bf16 always) go to results/words.json, beside what a unigram
model of the training text knows.
"""

import argparse
import hashlib
import statistics
import time
from collections import Counter
from itertools import product
from pathlib import Path

import common
import numpy as np

import neurogen_cy as ng
from neurogen_cy.streams import TokenStreams, held_out
from neurogen_cy.tokens import Tokens
from neurogen_cy.train_settings import TrainSettings

END, UNKNOWN = "<eos>", "<unk>"


def words(path):
    return path.read_text(encoding="utf-8").replace("\n", f" {END} ").split()


def as_tokens(ids):
    """One document."""
    start = np.zeros(1, np.int64)
    return Tokens(ids, start, len(ids), hashlib.sha256(ids).hexdigest(), np.zeros((1, 2), np.int64), "words")


def parsed(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train.txt and valid.txt")
    add("--preset", default="base", help="connectome")
    add("--vocab", type=int, default=32000, help="words")
    add("--streams", type=int, default=64, help="B")
    add("--tokens", type=int, default=128, help="T of a step")
    add("--steps", type=int, default=500, help="length of the schedule")
    add("--lr", type=float, default=1e-3, help="highest rate")
    add("--warmup", type=int, default=50, help="steps until then")
    add("--dropout", type=float, default=0.1, help="of spikes")
    add("--seeds", type=int, default=3, help="runs of each precision")
    add("--every", type=int, default=100, help="steps between evaluations")
    add("--backend", default="cuda", help="where")
    add("--precisions", nargs="+", default=["bf16", "fp8"], help="to compare")
    return parser.parse_args(arguments)


def learn(precision, seed, args, training, validation):
    """One row of the record."""
    cfg = ng.Config.preset(args.preset, vocab_size=args.vocab, dropout=args.dropout)
    model = ng.NeuroGen(
        cfg, backend=args.backend, streams=args.streams, max_tokens=args.tokens, seed=seed, precision=precision,
        optimizer=ng.AdamW(lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, clip=1.0),
    )  # fmt: skip
    reader, held = TokenStreams(training, args.streams, args.tokens), held_out(validation)[:2]
    rate = TrainSettings(steps=args.steps, lr=args.lr, warmup=args.warmup).rate
    curve, trained = [], 0.0
    while model.step < args.steps:
        ids, targets, resets = reader.next()
        begin = time.perf_counter()
        result = model.train_step_batch(ids, targets, resets=resets, lr=rate(model.step))
        trained += time.perf_counter() - begin
        if model.step % args.every == 0 or model.step == args.steps:
            curve.append([model.step, round(result.loss, 4), round(model.evaluate(*held), 4)])
    print(f"{precision}, seed {seed}: validation {curve[-1][2]:.4f} nats a word, {trained:.1f} s", flush=True)
    return {"precision": precision, "seed": seed, "train_seconds": round(trained, 2), "curve": curve}


def main(arguments=None):
    args = parsed(arguments)
    texts = {name: words(args.data / f"{name}.txt") for name in ("train", "valid")}
    counts = Counter(texts["train"])
    kept = [word for word, _ in counts.most_common() if word != UNKNOWN][: args.vocab - 1]
    number = {word: i for i, word in enumerate([UNKNOWN, *kept])}
    training, validation = (
        as_tokens(np.array([number.get(word, 0) for word in text], np.int32)) for text in texts.values()
    )
    share = (np.bincount(training.ids, minlength=args.vocab) + 1) / (len(training.ids) + args.vocab)
    unigram = float(-np.log(share[validation.ids]).mean())
    rows = [learn(*which, args, training, validation) for which in product(args.precisions, range(args.seeds))]
    last = {name: [row["curve"][-1][2] for row in rows if row["precision"] == name] for name in args.precisions}
    for name, losses in last.items():
        print(f"{name}: {statistics.mean(losses):.4f} nats a word ({min(losses):.4f} to {max(losses):.4f})")
    common.write("words", {
        **common.gpu(),
        "recipe": {key: value for key, value in vars(args).items() if key not in ("data", "backend", "precisions")},
        "words": {"training": len(training.ids), "validation": len(validation.ids)},
        "unigram_nats": round(unigram, 4),
        "rows": rows,
    })  # fmt: skip


if __name__ == "__main__":
    main()
