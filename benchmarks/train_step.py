"""Whole training steps on the GPU, beside those of other libraries in the same run.

    python benchmarks/train_step.py [--more] [--rows PRESET:B:T[:PRECISION] ...] [--peers [lstm] [compiled] [alif]]

Ours is one `train_step_batch`: token ids from the host, forward, loss, e-prop, gradient clipping, AdamW, and the wait
for the loss. The peers (peers.py) are as wide as the preset's embedding (1536 for `base`), with an embedding, a linear
decoder and cross-entropy, trained by full backpropagation through time: torch.nn.LSTM in fp16 with fused AdamW without
clipping, once more without the optimizer, and so with its loss compiled; and a scan of adaptive spiking neurons in JAX,
bf16, without an optimizer. Token ids come from the host there too, and a step ends with the wait for the loss. Times
are of the wall clock around one step, compiled and warmed up, in alternating rounds. Token ids are random: no side does
less work for likelier ones, but every step meets about as many different tokens as it can. A row that names a precision
is measured without peers: they are those of the row of that size before it. The record is written after every row; what
could not be measured is a row with an `error`.
"""

import argparse
import gc
import statistics

import common
from peers import WARM_STEPS, Failed, Peers

import neurogen_cy as ng

ROWS = ("base:1:500", "base:64:512", "base:64:512:fp8")
MORE = ("base:16:512", "base:256:512", "base:256:512:fp8", "small:128:128", "large:1:512")
PEERS = ("lstm", "compiled", "alif")
PEER_OF = "base"  # the preset whose sizes the peers share
ROUND_SECONDS = 0.25
PEER_SECONDS = 60.0  # an answer of a peer, compilation included


def rounds(steps, args):
    """({name: seconds of its steps}, {name: why it has none}) of alternating rounds of {name: count -> seconds}."""
    times, errors, counts = {name: [] for name in steps}, {}, {}
    for number in range(-1, args.rounds):  # the first finds out how many steps make a round
        for name, run in steps.items():
            try:
                if name in errors:
                    continue
                if number < 0:
                    counts[name] = int(min(50, max(2, args.round_seconds / statistics.median(run(WARM_STEPS)))))
                else:
                    times[name] += run(counts[name])
            except Failed as error:
                errors[name] = str(error)
    return {name: found for name, found in times.items() if name not in errors}, errors


def measure(preset, B, T, precision, args, peers):
    """Rows of one size: ours, then the peers'."""
    cfg = ng.Config.preset(preset)
    beside = preset == args.peer_of and precision is None
    if beside:
        peers.build(vocab=cfg.vocab_size, dim=cfg.dim, B=B, T=T)
    try:
        model = ng.NeuroGen(cfg, backend=args.backend, streams=B, max_tokens=T, precision=precision or args.precision)
        data = common.batches(cfg.vocab_size, B, T)
    finally:
        names, errors = peers.ready() if beside else ([], {})
    steps = {None: lambda n: common.seconds(lambda *batch: model.train_step_batch(*batch).loss, data, n)}
    steps.update({name: lambda n, name=name: peers.seconds(name, n) for name in names})
    times, failed = rounds(steps, args)
    size = {"preset": preset, "B": B, "T": T}
    rows = [{**size, "peer": name, "error": error} for name, error in {**errors, **failed}.items()]
    for row in rows:
        print(f"{preset:6} {B:4} x {T:4} {row['peer']}: {row['error']}", flush=True)
    for peer, measured in times.items():
        ms = [1e3 * t for t in measured]
        row = {
            **size, "backend": peer.split()[0] if peer else model.backend,
            "precision": next((p for p in ("float16", "bfloat16", "float32") if p in peer.split()), "")
            if peer else model.precision, "ms": statistics.median(ms), "ms_spread": [min(ms), max(ms)],
            "tok_s": B * T / statistics.median(measured), "steps": len(ms), "peer": peer,
        }  # fmt: skip
        rows.append(row)
        print(f"{preset:6} {B:4} x {T:4} {row['ms']:10.2f} ms ({min(ms):.2f} to {max(ms):.2f}) {row['tok_s']:12,.0f} "
              f"tok/s  {peer or 'neurogen_cy ' + row['precision']}", flush=True)
    return sorted(rows, key=lambda row: row["peer"] is not None)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="PRESET:B:T[:PRECISION]")
    parser.add_argument("--more", action="store_true", help=f"also {' '.join(MORE)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-seconds", type=float, default=ROUND_SECONDS)
    parser.add_argument("--backend", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--precision", help="bf16 (a GPU's default), fp32 or fp8, of rows that name none")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS, help="all of them unless said")
    parser.add_argument("--peer-of", default=PEER_OF, help="preset beside which the peers run")
    parser.add_argument("--peer-seconds", type=float, default=PEER_SECONDS, help="that a peer may be silent")
    args = parser.parse_args(argv)
    specs = args.rows + list(MORE if args.more else ())
    record = {**common.gpu(), "refused": [], "rows": []}
    name = "train_step" if args.backend == "cuda" else f"train_step_{args.backend}"
    with Peers(args.peers, args.backend, args.peer_seconds) as peers:
        for number, spec in enumerate(specs):
            preset, B, T, precision = (*spec.split(":"), None)[:4]
            try:
                record["rows"] += measure(preset, int(B), int(T), precision, args, peers)
            except (MemoryError, RuntimeError) as error:  # of this size: the others still count
                record["refused"].append(spec)
                print(f"{spec}: {common.first_line(error)}", flush=True)
            gc.collect()
            if not any(later.startswith(f"{args.peer_of}:") for later in specs[number + 1 :]):
                peers.close()  # their memory too
            common.write(name, record, say=False)
    print(f"wrote {common.RESULTS / name}.json")


if __name__ == "__main__":
    main()
