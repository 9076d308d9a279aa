"""Whole training steps on the GPU, beside torch's LSTM in the same run.

    python benchmarks/train_step.py [--more] [--rows PRESET:B:T ...]

Ours is one `train_step_batch`: token ids from the host, forward, loss, e-prop, gradient clipping, AdamW, and the wait
for the loss. The peer is torch.nn.LSTM as wide as the preset's embedding (1536 for `base`) with an embedding, a linear
decoder and cross-entropy, all in fp16, trained by full backpropagation through time: token ids from the host, forward,
loss, backward, fused AdamW without clipping, and the wait for the loss; and once more without the optimizer. Times are
of the wall clock around one step, warmed up, in alternating rounds of one process. Token ids are random: neither side
does less work for likelier ones, but every step meets about as many different tokens as it can.
"""

import argparse
import gc
import statistics
import sys
import time

import common
import numpy as np

import neurogen_cy as ng

ROWS = ("base:1:500", "base:64:512")
MORE = ("base:16:512", "base:256:512", "small:128:128", "large:1:512")
PEER_OF = "base"  # the preset whose sizes the peer shares
BATCHES = 4  # different ones, in turn
ROUND_SECONDS = 0.4
WARM_STEPS = 3
LOSS_SCALE = 1024.0  # keeps gradients of the peer from vanishing in fp16: zeros would draw less power and run faster
LARGEST_LOSS = 65536  # rows of logits that torch's cross-entropy takes at a time, below 2^31 values


def batches(vocab, B, T):
    rng = np.random.default_rng(B)
    return [tuple(rng.integers(0, vocab, (2, B, T)).astype(np.int32)) for _ in range(BATCHES)]


def lstm_steps(cfg, device):
    """{name: step} of the peer, with its optimizer and without."""
    import torch

    dtype, width = torch.float16 if device == "cuda" else torch.float32, cfg.dim
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(cfg.vocab_size, width).to(device, dtype)
    lstm = torch.nn.LSTM(width, width).to(device, dtype)
    decoder = torch.nn.Linear(width, cfg.vocab_size).to(device, dtype)
    parameters = [p for module in (embedding, lstm, decoder) for p in module.parameters()]
    adam = torch.optim.AdamW(parameters, lr=1e-5, eps=1e-4, fused=True)  # squares of small gradients vanish in fp16

    def step(ids, targets, optimize):
        adam.zero_grad(set_to_none=True)
        ids, targets = (torch.from_numpy(a).to(device).T.long() for a in (ids, targets))  # [T, B]
        out = lstm(embedding(ids))[0].flatten(0, 1)
        targets, loss = targets.flatten(), 0.0
        for begin in range(0, len(out), LARGEST_LOSS):
            part = slice(begin, begin + LARGEST_LOSS)
            mean = torch.nn.functional.cross_entropy(decoder(out[part]), targets[part])
            loss = loss + mean.float() * (len(targets[part]) / len(targets))
        (LOSS_SCALE * loss).backward()
        if optimize:
            adam.step()
        elif device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    name = f"torch {torch.__version__} nn.LSTM({width}) {str(dtype)[6:]} + Linear + cross-entropy, BPTT"
    return {
        f"{name} + AdamW(fused)": lambda ids, targets: step(ids, targets, True),
        f"{name}, no optimizer": lambda ids, targets: step(ids, targets, False),
    }


def seconds(step, data, count):
    """Wall-clock time of each of `count` steps."""
    out = []
    for number in range(count):
        begin = time.perf_counter()
        loss = step(*data[number % len(data)])
        out.append(time.perf_counter() - begin)
        if not np.isfinite(loss):
            raise FloatingPointError(f"expected a finite loss, got {loss}")
    return out


def measure(preset, B, T, args):
    """Rows of one size: ours, then the peer's."""
    cfg = ng.Config.preset(preset)
    data = batches(cfg.vocab_size, B, T)
    model = ng.NeuroGen(cfg, backend=args.backend, streams=B, max_tokens=T, precision=args.precision)
    steps = {None: lambda ids, targets: model.train_step_batch(ids, targets).loss}
    if args.peer and preset == args.peer_of:
        steps.update(lstm_steps(cfg, "cuda" if model.backend == "cuda" else "cpu"))
    counts = {}
    for peer, step in steps.items():
        one = statistics.median(seconds(step, data, WARM_STEPS))
        counts[peer] = int(min(50, max(2, args.round_seconds / one)))
    times = {peer: [] for peer in steps}
    for _ in range(args.rounds):
        for peer, step in steps.items():
            times[peer] += seconds(step, data, counts[peer])
    rows = []
    for peer, measured in times.items():
        ms = [1e3 * t for t in measured]
        row = {
            "preset": preset, "backend": "torch" if peer else model.backend,
            "precision": ("fp16" if model.backend == "cuda" else "fp32") if peer else model.precision,
            "B": B, "T": T, "ms": statistics.median(ms), "ms_spread": [min(ms), max(ms)],
            "tok_s": B * T / statistics.median(measured), "steps": len(ms), "peer": peer,
        }  # fmt: skip
        rows.append(row)
        print(f"{preset:6} {B:4} x {T:4} {row['ms']:10.2f} ms ({min(ms):.2f} to {max(ms):.2f}) {row['tok_s']:12,.0f} "
              f"tok/s  {peer or 'neurogen_cy ' + row['precision']}", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="PRESET:B:T")
    parser.add_argument("--more", action="store_true", help=f"also {' '.join(MORE)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-seconds", type=float, default=ROUND_SECONDS)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--precision", help="bf16 (a GPU's default) or fp32")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peer-of", default=PEER_OF, help="preset beside which the peer runs")
    args = parser.parse_args()
    rows, refused = [], []
    for spec in args.rows + list(MORE if args.more else ()):
        preset, B, T = spec.split(":")
        try:
            rows += measure(preset, int(B), int(T), args)
        except (MemoryError, RuntimeError) as error:  # of this size, on either side: the others still count
            refused.append(spec)
            print(f"{spec}: {type(error).__name__}: {error}", flush=True)
        gc.collect()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()
    common.write("train_step", {**common.gpu(), "refused": refused, "rows": rows})


if __name__ == "__main__":
    main()
