"""Whole training steps on the CPU, beside torch.nn.LSTM of equal size and beside the machine's own sgemm.

    python benchmarks/cpu.py [--threads 2] [--rounds 7]

`tiny`, 16 streams x 64 tokens of Python's help topics: tokens/s of one train step (forward, loss, e-prop, AdamW) and
of the same step of torch.nn.LSTM + Linear + Adam with the same number of weights, in alternating rounds of one process.
`base`, one stream x 512 tokens: tokens/s as a share of what the measured sgemm rate would allow for its 371 MFLOP a
token. And the same model trained token by token (`train_step`) beside `train_step_batch`, one stream.
"""

import argparse
import os
import time

import common
import numpy as np
from scipy.linalg.blas import sgemm

import neurogen_cy as ng
from neurogen_cy import data

BASE_FLOP = 371e6  # forward and backward of preset `base`, dense decoder included, per token


def text_batches(vocab, streams, tokens, count):
    """Consecutive windows of real text: bytes, or bytes spread over a larger vocabulary by their neighbour."""
    text = np.frombuffer(data.default_corpus()[0], np.uint8).astype(np.int64)
    if vocab > 256:  # pairs of bytes: about as many different tokens as words have
        text = (text[:-1] * 257 + text[1:]) % vocab
    length = len(text) // streams
    rows = text[: length * streams].reshape(streams, length)
    starts = [i * tokens for i in range(count)]
    assert starts[-1] + tokens < length
    return [tuple(np.ascontiguousarray(rows[:, i + k : i + k + tokens]) for k in (0, 1)) for i in starts]


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
    warm, each = 60, 20  # steps: past the first surprises, as most of a training is; then what a round times
    batches = text_batches(cfg.vocab_size, 16, 64, warm + rounds * each)
    ours, theirs = [], []
    rate(model.train_step_batch, batches[:warm]), rate(lstm, batches[:warm])
    for number in range(rounds):
        part = batches[warm + number * each : warm + (number + 1) * each]
        ours.append(rate(model.train_step_batch, part))
        theirs.append(rate(lstm, part))
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


def loop(preset, threads, rounds, tokens=500, loop_tokens=50):
    """Token by token, with a copy, a decision and an update for each, against one batched step."""
    cfg = ng.Config.preset(preset)
    model = ng.NeuroGen(cfg, backend="cpu", streams=1, max_tokens=tokens, threads=threads)
    long, short = text_batches(cfg.vocab_size, 1, tokens, 1), text_batches(cfg.vocab_size, 1, loop_tokens, 1)
    batched, looped = [], []
    for number in range(rounds + 1):
        pair = rate(model.train_step_batch, long), rate(model.train_step, short)
        if number:
            batched.append(pair[0])
            looped.append(pair[1])
    ratios = [a / b for a, b in zip(batched, looped)]
    print(f"{preset} 1 x {tokens}: train_step {np.median(looped):,.1f} tok/s, train_step_batch "
          f"{np.median(batched):,.0f} tok/s, ratio {np.median(ratios):.1f} ({min(ratios):.1f}..{max(ratios):.1f})")
    return {"preset": preset, "B": 1, "T": tokens, "weights": cfg.weights, "tok_s": common.spread(batched),
            "peer": f"train_step, token by token ({loop_tokens} tokens measured)",
            "peer_tok_s": common.spread(looped), "ratio": common.spread(ratios)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=["tiny", "base", "loop"])
    args = parser.parse_args()
    rows = []
    if args.only in (None, "tiny"):
        rows.append(tiny(args.threads, args.rounds))
    if args.only in (None, "base"):
        rows.append(base(args.threads, max(2, args.rounds // 2)))
    if args.only in (None, "loop"):
        rows += [loop(preset, args.threads, max(2, args.rounds // 2)) for preset in ("tiny", "base")]
    if args.only is None:
        common.write("cpu", {"machine": common.machine(), "threads": args.threads,
                             "instruction_set": ng._cpu.instruction_set(), "rows": rows})


if __name__ == "__main__":
    main()
