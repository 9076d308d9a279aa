"""What ours is measured beside, each peer in a process of its own: a peer that is absent, crashes, compiles for ever or
keeps its memory costs its own figures and nobody else's.

`Peers` is the side of a benchmark. It builds all peers of one size at a time, which compile and warm up meanwhile, and
has them run some steps when it is their turn. Run as a program, this file is such a process: it answers lines of JSON.
"""

import contextlib
import functools
import importlib
import json
import os
import queue
import subprocess
import sys
import threading

import common

LOSS_SCALE = 1024.0  # keeps gradients from vanishing in fp16: zeros would draw less power and run faster
LARGEST_LOSS = 65536  # rows of logits that torch's cross-entropy takes at a time, below 2^31 values
COMPILED_ROWS = 8192  # ... and the compiled one, whose rate is best there
WARM_STEPS = 3
DECODER_PASSES = 8  # of one step, so that launching the first is little beside them


def mean_loss(torch, compiled):
    """Cross-entropy of a linear layer, eager or compiled."""
    functional = torch.nn.functional

    def mean(rows, weight, bias, targets):
        return functional.cross_entropy(functional.linear(rows, weight, bias), targets)

    return torch.compile(mean, dynamic=False) if compiled else mean


def lstm(device, vocab, dim, B, T, compiled=False):
    """torch.nn.LSTM as wide as the embedding: with fused AdamW and without, or without and with its loss compiled."""
    torch = importlib.import_module("torch")
    dtype = torch.float16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(vocab, dim).to(device, dtype)
    core = torch.nn.LSTM(dim, dim).to(device, dtype)
    decoder = torch.nn.Linear(dim, vocab).to(device, dtype)
    parameters = [p for module in (embedding, core, decoder) for p in module.parameters()]
    adam = torch.optim.AdamW(parameters, lr=1e-5, eps=1e-4, fused=True)  # squares of small gradients vanish in fp16
    mean, piece = mean_loss(torch, compiled), COMPILED_ROWS if compiled else LARGEST_LOSS

    def step(ids, targets, optimize):
        adam.zero_grad(set_to_none=True)
        ids, targets = (torch.from_numpy(a).to(device).T.long() for a in (ids, targets))  # [T, B]
        out = core(embedding(ids))[0].flatten(0, 1)
        targets, loss = targets.flatten(), 0.0
        for begin in range(0, len(out), piece):
            part = slice(begin, begin + piece)
            share = len(targets[part]) / len(targets)
            loss = loss + mean(out[part], decoder.weight, decoder.bias, targets[part]).float() * share
        (LOSS_SCALE * loss).backward()
        if optimize:
            adam.step()
        elif device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    name = f"torch {torch.__version__} nn.LSTM({dim}) {str(dtype)[6:]} + Linear + cross-entropy"
    if compiled:
        return {f"{name} (torch.compile), BPTT, no optimizer": functools.partial(step, optimize=False)}
    return {
        f"{name}, BPTT + AdamW(fused)": functools.partial(step, optimize=True),
        f"{name}, BPTT, no optimizer": functools.partial(step, optimize=False),
    }


def alif(device, vocab, dim, B, T):
    """As many adaptive spiking neurons, fully recurrent, in a `lax.scan` under `jit`, by BPTT with a surrogate."""
    jax = importlib.import_module("jax")
    jnp = importlib.import_module("jax.numpy")
    backend = jax.default_backend()
    if (backend == "gpu") != (device == "cuda"):
        raise RuntimeError(f"jax: expected a backend for {device}, got {backend}")
    real = jnp.bfloat16 if device == "cuda" else jnp.float32

    @jax.custom_vjp
    def spike(u):
        return (u > 0).astype(u.dtype)

    spike.defvjp(lambda u: (spike(u), u), lambda u, error: (error * 0.3 * jnp.maximum(1 - jnp.abs(u), 0),))

    def loss(weights, ids, targets):
        def tick(state, drive):
            v, w, s, o = state
            v = 0.95 * v + drive + s @ weights["recurrent"] - s
            w = 0.98 * w + s
            s = spike(v - 1 - 0.05 * w)
            o = 0.9 * o + s
            return (v, w, s, o), o

        silent = (jnp.zeros((B, dim), real),) * 4
        out = jax.lax.scan(tick, silent, weights["embedding"][ids] @ weights["input"])[1].reshape(B * T, dim)
        total = 0.0
        for begin in range(0, B * T, COMPILED_ROWS):
            part = slice(begin, begin + COMPILED_ROWS)
            logits = (out[part] @ weights["decoder"].T).astype(jnp.float32)
            said = jnp.take_along_axis(logits, targets[part, None], axis=1)[:, 0]
            total += jnp.sum(jax.nn.logsumexp(logits, axis=1) - said)
        return total / (B * T)

    sizes = {"embedding": (vocab, 1.0), "input": (dim, 2.0), "recurrent": (dim, 0.5), "decoder": (vocab, 1.0)}
    keys = jax.random.split(jax.random.PRNGKey(0), len(sizes))
    weights = {
        name: (gain / (dim**0.5 if name != "embedding" else 1) * jax.random.normal(key, (rows, dim))).astype(real)
        for key, (name, (rows, gain)) in zip(keys, sizes.items())
    }
    gradient = jax.jit(jax.value_and_grad(loss))

    def step(ids, targets):
        value, gradients = gradient(weights, jnp.asarray(ids.T), jnp.asarray(targets.T.reshape(-1)))
        jax.block_until_ready(gradients)
        return float(value)

    kind = f"jax {jax.__version__} ALIF({dim}) {jnp.dtype(real).name} lax.scan + Linear + cross-entropy"
    return {f"{kind} (jit), surrogate gradient, BPTT, no optimizer": step}


def decoder(device, vocab, dim, B, T):
    """Linear layer and cross-entropy of B * T rows alone, forward and backward, DECODER_PASSES times a step."""
    torch = importlib.import_module("torch")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    rows = torch.randn(B * T, dim, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, dim, device=device) / dim**0.5).to(dtype).requires_grad_()

    def step(_, targets, mean):
        targets = torch.from_numpy(targets).to(device).long().flatten()
        for _ in range(DECODER_PASSES):
            rows.grad = weight.grad = None
            loss = mean(rows, weight, None, targets)
            loss.backward()
        return loss.item()  # waits

    name = f"torch {torch.__version__} F.linear + cross_entropy {str(dtype)[6:]}"
    return {
        name + how: functools.partial(step, mean=mean_loss(torch, compiled))
        for how, compiled in ((" (torch.compile)", True), (", eager", False))
    }


KINDS = {
    "lstm": lstm, "compiled": functools.partial(lstm, compiled=True), "alif": alif, "decoder": decoder,
}  # fmt: skip


def answer(command, kind, device, now):
    """What the process says to one command; `now` holds the steps and data of the size that was built last."""
    if "run" in command:
        return {"seconds": common.seconds(now["steps"][command["run"]], now["data"], command["count"])}
    now.clear()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()
    now["data"] = common.batches(command["vocab"], command["B"], command["T"])
    now["steps"] = KINDS[kind](device, **command)
    errors = {}
    for name, step in now["steps"].items():
        try:
            common.seconds(step, now["data"], WARM_STEPS)
        except Exception as error:  # of this variant alone
            errors[name] = common.first_line(error)
    return {"names": list(now["steps"]), "errors": errors}


def serve(kind, device):
    """Answers every line of standard input; what libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    now = {}
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), kind, device, now)
        except Exception as error:  # the answer: this peer cannot be measured at this size
            reply = {"error": common.first_line(error)}
        replies.write(json.dumps(reply) + "\n")


class Failed(Exception):
    """A peer gave no figures; the message says why."""


class Process:
    """One peer; it starts when it is first told something, and again after a failure that ended it."""

    def __init__(self, kind, device, limit):
        self.kind, self.device, self.limit, self.process = kind, device, limit, None

    def tell(self, command):
        if self.process is None:
            settings = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # JAX would take three quarters of the GPU's memory
            if self.device == "cpu":
                settings["JAX_PLATFORMS"] = "cpu"
            self.process = subprocess.Popen(
                [sys.executable, __file__, self.kind, self.device], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, env={**os.environ, **settings},
            )  # fmt: skip
            self.replies = queue.Queue()
            threading.Thread(target=self.listen, args=(self.process.stdout, self.replies), daemon=True).start()
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it is gone, which answer() finds out

    @staticmethod
    def listen(stream, replies):
        with stream:
            for line in stream:
                replies.put(line)
        replies.put(None)

    def answer(self):
        try:
            line = self.replies.get(timeout=self.limit)
        except queue.Empty:
            self.close()
            raise Failed(f"no answer within {self.limit:g} s") from None
        if line is None:
            status = self.process.wait()
            self.close()
            raise Failed(f"its process ended with status {status}")
        reply = json.loads(line)
        if "error" in reply:
            raise Failed(reply["error"])
        return reply

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            with contextlib.suppress(OSError):  # of what it has not read
                self.process.stdin.close()
            self.process = None


class Peers:
    """Some kinds of peers, all at one size at a time.

        with Peers(["lstm", "alif"], "cuda", limit=60) as peers:
            peers.build(vocab=32000, dim=1536, B=64, T=512)  # does not wait
            names, errors = peers.ready()  # of those that can be measured, and of those that cannot
            peers.seconds(names[0], count=5)  # Failed: why it could not
    """

    def __init__(self, kinds, device, limit):
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"peer: expected one of {', '.join(KINDS)}, got {kind!r}")
        self.processes = [Process(kind, device, limit) for kind in kinds]
        self.of = {}

    def build(self, **sizes):
        for process in self.processes:
            process.tell(sizes)

    def ready(self):
        """Names in order, and {name or kind: why it is missing}."""
        self.of, errors = {}, {}
        for process in self.processes:
            try:
                reply = process.answer()
            except Failed as error:
                errors[process.kind] = str(error)
                continue
            errors.update(reply["errors"])
            self.of.update({name: process for name in reply["names"] if name not in reply["errors"]})
        return list(self.of), errors

    def seconds(self, name, count):
        """Wall-clock time of each of `count` steps."""
        self.of[name].tell({"run": name, "count": count})
        return self.of[name].answer()["seconds"]

    def close(self):
        for process in self.processes:
            process.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


if __name__ == "__main__":
    serve(*sys.argv[1:])
