"""Whole training steps on the CPU, beside torch.nn.LSTM of equal size and beside the machine's own sgemm.

    python benchmarks/cpu.py [--threads 2] [--rounds 7]

`tiny`, 16 streams x 64 tokens: tokens/s of one train step (forward, loss, e-prop, AdamW) and of the same step of
torch.nn.LSTM + Linear + Adam with the same number of weights, in alternating rounds of one process. `base`, one
stream x 512 tokens: tokens/s as a share of what the measured sgemm rate would allow for its 371 MFLOP a token.
"""

import argparse
import os
import time

import common
import numpy as np
from scipy.linalg.blas import sgemm

import neurogen_cy as ng

BASE_FLOP = 371e6  # forward and backward of preset `base`, dense decoder included, per token


def text_batches(vocab, streams, tokens, count):
    """Zipf-distributed ids: repeats like text's, without a corpus."""
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, vocab + 1)
    ids = rng.choice(vocab, (count, streams, tokens + 1), p=p / p.sum()).astype(np.int64)
    return [(np.ascontiguousarray(x[:, :-1]), np.ascontiguousarray(x[:, 1:])) for x in ids]


def lstm_step(weights, vocab, width, threads):
    """One train step of torch's LSTM with the hidden size that comes nearest to `weights` parameters."""
    import torch

    torch.set_num_threads(threads)
    hidden = max(
        range(32, 2048), key=lambda h: -abs(vocab * width + 4 * h * (width + h + 2) + (h + 1) * vocab - weights)
    )
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(vocab, width)
    lstm = torch.nn.LSTM(width, hidden, batch_first=True)
    decoder = torch.nn.Linear(hidden, vocab)
    parameters = [p for module in (embedding, lstm, decoder) for p in module.parameters()]
    adam = torch.optim.Adam(parameters, lr=2e-3, fused=True)
    carried = [None]

    def step(ids, targets):
        adam.zero_grad(set_to_none=True)
        out, (h, c) = lstm(embedding(torch.from_numpy(ids)), carried[0])
        carried[0] = (h.detach(), c.detach())
        loss = torch.nn.functional.cross_entropy(decoder(out).flatten(0, 1), torch.from_numpy(targets).flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        return float(loss.detach())

    return step, hidden, sum(p.numel() for p in parameters), torch.__version__


def rate(step, batches):
    """Tokens per second over the batches."""
    begin = time.perf_counter()
    for ids, targets in batches:
        step(ids, targets)
    return len(batches) * batches[0][0].size / (time.perf_counter() - begin)


def tiny(threads, rounds):
    cfg = ng.Config.preset("tiny")
    model = ng.NeuroGen(cfg, backend="cpu", streams=16, max_tokens=64, threads=threads)
    lstm, hidden, lstm_weights, version = lstm_step(cfg.weights, cfg.vocab_size, cfg.dim, threads)
    batches = text_batches(cfg.vocab_size, 16, 64, 12)
    ours, theirs = [], []
    for number in range(rounds + 1):
        pair = rate(model.train_step_batch, batches), rate(lstm, batches)
        if number:  # the first round warms both up
            ours.append(pair[0])
            theirs.append(pair[1])
    ratios = [a / b for a, b in zip(ours, theirs)]
    print(f"tiny 16 x 64: {np.median(ours):,.0f} tok/s, LSTM({hidden}) {np.median(theirs):,.0f} tok/s, "
          f"ratio {np.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})")
    return {"preset": "tiny", "B": 16, "T": 64, "weights": cfg.weights, "tok_s": common.spread(ours),
            "peer": f"torch {version} nn.LSTM({hidden}) + Linear + Adam", "peer_weights": lstm_weights,
            "peer_tok_s": common.spread(theirs), "ratio": common.spread(ratios)}


def sgemm_rate(size=2048):
    """FLOP/s of one large product, at BLAS's own number of threads."""
    a = np.asfortranarray(np.random.default_rng(0).standard_normal((size, size)), np.float32)
    begin = time.perf_counter()
    sgemm(1.0, a, a)
    return 2 * size**3 / (time.perf_counter() - begin)


def base(threads, rounds, tokens=512):
    cfg = ng.Config.preset("base")
    model = ng.NeuroGen(cfg, backend="cpu", streams=1, max_tokens=tokens, threads=threads)
    batches = text_batches(cfg.vocab_size, 1, tokens, 1)
    ours, products = [], []
    for number in range(rounds + 1):
        pair = rate(model.train_step_batch, batches), max(sgemm_rate() for _ in range(3))
        if number:
            ours.append(pair[0])
            products.append(pair[1])
    shares = [a * BASE_FLOP / b for a, b in zip(ours, products)]
    print(f"base 1 x {tokens}: {np.median(ours):,.0f} tok/s, sgemm {np.median(products) / 1e9:.0f} GFLOP/s, "
          f"share {np.median(shares):.2f} ({min(shares):.2f}..{max(shares):.2f})")
    return {"preset": "base", "B": 1, "T": tokens, "weights": cfg.weights, "tok_s": common.spread(ours),
            "sgemm_flops": common.spread(products), "share_of_sgemm": common.spread(shares)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=["tiny", "base"])
    args = parser.parse_args()
    rows = []
    if args.only != "base":
        rows.append(tiny(args.threads, args.rounds))
    if args.only != "tiny":
        rows.append(base(args.threads, max(2, args.rounds // 2)))
    if args.only is None:
        common.write("cpu", {"machine": common.machine(), "threads": args.threads,
                             "instruction_set": ng._cpu.instruction_set(), "rows": rows})


if __name__ == "__main__":
    main()
