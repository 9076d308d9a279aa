"""The float64 oracle: the model and its learning rule in plain NumPy, one token at a time.

Nothing here imports the rest of the package: both backends are judged by this file, by the tests and by `neurogen
selftest`, so it shares no code with them.

Shapes: B streams, T tokens, V vocabulary, D width of the embedding and of Broca's output, n neurons of a
region. Projections are made dense, [n_dst, n_src], before use: an oracle may waste memory, not be clever.
The forward equations stand in `_forward`, the adjoints in `_backward`, in the order of their evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = Mapping[str, Array]

BLOCK = 32
NORM_EPS = 1e-5  # inside the square root of Broca's normalisation


def heaviside(u: Array) -> Array:
    """H(u): 1 for u > 0, else 0 (a neuron exactly at threshold is silent)."""
    return (u > 0).astype(np.float64)


def emit(u: Array, cfg: Any) -> Array:
    """Spike sent at distance `u` to threshold: H(u) * min(1 + u, max_spike), or H(u) when binary."""
    return heaviside(u) * np.minimum(1.0 + u, largest_spike(cfg)) if cfg.graded else heaviside(u)


def largest_spike(cfg: Any) -> float:
    """The bound of a graded spike, infinite where the configuration sets none."""
    return np.inf if cfg.max_spike is None else cfg.max_spike


def surrogate(u: Array, k: float) -> Array:
    """psi(u), which stands for the derivative of H."""
    return 1.0 / (1.0 + k * np.abs(u)) ** 2


def emission_slope(u: Array, cfg: Any) -> Array:
    """ds/du: the product rule with psi in place of H'; 1 + u is clipped to the side where a spike exists."""
    psi = surrogate(u, cfg.surrogate_k)
    if not cfg.graded:
        return psi
    bound = largest_spike(cfg)
    slope: Array = psi * np.minimum(1.0 + np.maximum(u, 0.0), bound) + heaviside(u) * (1.0 + u < bound)
    return slope


def projection_key(p: Any) -> str:
    """Stem of the parameter keys of a projection: ``proj.<src>.<dst>.<kind>.<delay>``."""
    return f"proj.{p.src}.{p.dst}.{p.kind}.{p.delay}"


def history(cfg: Any, name: str) -> int:
    """K: how many past spikes of region `name` its delayed projections can still ask for (0 if none)."""
    return max((p.delay for p in cfg.projections if p.src == name and p.delay >= 1), default=0)


def trainable_keys(cfg: Any) -> list[str]:
    """Keys with a gradient, in a fixed order."""
    keys = ["embedding.weight", "decoder.bias"] + ([] if cfg.tie_decoder else ["decoder.weight"])
    keys += [f"region.{r.name}.bias" for r in cfg.regions]
    return keys + [f"{projection_key(p)}.blocks" for p in cfg.projections]


def zero_state(cfg: Any, streams: int) -> dict[str, Array]:
    """State of streams that have heard nothing."""
    state = {"broca.o": np.zeros((streams, cfg.dim))}
    for r in cfg.regions:
        state[f"region.{r.name}.v"] = np.zeros((streams, r.neurons))
        state[f"region.{r.name}.w"] = np.zeros((streams, r.neurons))
        state[f"region.{r.name}.spikes"] = np.zeros((streams, history(cfg, r.name), r.neurons))
    return state


def _corners(params: Arrays, key: str) -> list[tuple[int, int]]:
    rows, cols = params[f"{key}.rows"], params[f"{key}.cols"]
    return [(int(i) * BLOCK, int(j) * BLOCK) for i, j in zip(rows, cols, strict=True)]


def _constants(params: Arrays, name: str) -> Iterator[Array]:
    return (params[f"region.{name}.{x}"] for x in ("alpha", "rho", "a", "b"))


def _dense(cfg: Any, params: Arrays, p: Any) -> Array:
    """The projection as a full matrix [n_dst, n_src], zero where no block is stored."""
    width = {"embedding": cfg.dim, "broca_out": cfg.dim, **{r.name: r.neurons for r in cfg.regions}}
    matrix = np.zeros((width[p.dst], width[p.src]))
    key = projection_key(p)
    for block, (i, j) in zip(params[f"{key}.blocks"], _corners(params, key), strict=True):
        matrix[i : i + BLOCK, j : j + BLOCK] = block
    return matrix


def _stored(params: Arrays, key: str, matrix: Array) -> Array:
    """The stored blocks of a full matrix, [n_blocks, 32, 32] in the order of the projection."""
    return np.stack([matrix[i : i + BLOCK, j : j + BLOCK] for i, j in _corners(params, key)])


def forward_backward(
    cfg: Any, params: Arrays, ids: Any, targets: Any, weights: Any = None, resets: Any = None,
    state: Arrays | None = None, *, normalize: str = "sum", divisor: float | None = None, masks: Arrays | None = None,
    spikes: Arrays | None = None,
) -> SimpleNamespace:
    """One call over B streams of T tokens: both losses, the gradient of their sum, the state after it.

    Parameters
    ----------
    cfg : object with the attributes of ``Config``
    params : dict of arrays, every model key
    ids, targets : int [B, T]
    weights : float [B, T], optional
        Weight of each token's cross-entropy, 1 by default, 0 masks.
    resets : bool [B, T], optional
        Clear the stream before that token.
    state : dict, optional
        As returned in ``.state``; zeros by default. ``spikes[:, k]`` was emitted at token -1-k, undropped.
    normalize : {"sum", "abs"}
        Divide by sum w (no negative weight then) or by sum |w|.
    divisor : float, optional
        Divide by this number instead. A divisor of 0 gives loss 0 and leaves homeostasis alone.
    masks : dict of [B, T, n], optional
        Inverted-dropout multipliers on what delay-0 receivers and the readout see of a region.
    spikes : dict of u [B, T, n], optional
        Regions whose distance to threshold (hence v and s) is taken from here instead of computed.

    Returns
    -------
    SimpleNamespace
        loss, homeostasis, accuracy, tokens, predictions, rates, logits, broca, u, s, gradients, state; and,
        to check the learning rule by, drive (d), gate (G), learning_signals (dE/ds) and sources (what every
        projection hears), all [B, T, ...].
    """
    params = {key: np.asarray(a, dtype=np.float64) for key, a in params.items()}
    ids, targets = np.asarray(ids), np.asarray(targets)
    resets = np.zeros(ids.shape, bool) if resets is None else np.asarray(resets, bool)
    state = zero_state(cfg, len(ids)) if state is None else state
    past = {key: np.asarray(a, dtype=np.float64) for key, a in state.items()}
    run = _forward(cfg, params, ids, resets, past, masks or {}, spikes or {})
    d_logits = _losses(cfg, params, run, targets, weights, normalize, divisor)
    _backward(cfg, params, run, ids, masks or {}, d_logits)
    return run


def _forward(
    cfg: Any, params: Arrays, ids: Array, resets: Array, past: Arrays, masks: Arrays, forced: Arrays,
) -> SimpleNamespace:
    B, T = ids.shape
    regions = sorted(cfg.regions, key=lambda r: r.level)
    matrices = {projection_key(p): _dense(cfg, params, p) for p in cfg.projections}
    run = SimpleNamespace(matrices=matrices, resets=resets)
    for name in ("u", "s", "drive", "gate", "learning_signals"):
        setattr(run, name, {r.name: np.zeros((B, T, r.neurons)) for r in regions})
    run.sources = {key: np.zeros((B, T, matrix.shape[1])) for key, matrix in matrices.items()}
    run.o, run.broca = np.zeros((B, T, cfg.dim)), np.zeros((B, T, cfg.dim))

    def emitted_at(name: str, t: int, delay: int) -> Array:
        """s_{t-delay}; zero for streams that were reset after that token and no later than t."""
        back = t - delay
        s = run.s[name][:, back] if back >= 0 else past[f"region.{name}.spikes"][:, -1 - back]
        return s * ~resets[:, max(back + 1, 0) : t + 1].any(axis=1, keepdims=True)

    v = {r.name: past[f"region.{r.name}.v"] for r in regions}
    w = {r.name: past[f"region.{r.name}.w"] for r in regions}
    last = {name: emit(v[name] - 1.0, cfg) for name in v}  # for the soft reset, whatever K is
    o, kappa = past["broca.o"], params["broca.kappa"]

    for t in range(T):
        keep = ~resets[:, t, None]
        heard = {"embedding": params["embedding.weight"][ids[:, t]]}  # what delay-0 receivers see of a source
        for r in regions:
            alpha, rho, a, b = _constants(params, r.name)
            d = np.tile(params[f"region.{r.name}.bias"], (B, 1))
            g, delayed = np.zeros((B, r.neurons)), np.zeros((B, r.neurons))
            incoming = [p for p in cfg.projections if p.dst == r.name]
            for p in incoming:
                key = projection_key(p)
                run.sources[key][:, t] = emitted_at(p.src, t, p.delay) if p.delay >= 1 else heard[p.src]
                current = run.sources[key][:, t] @ matrices[key].T
                if p.kind == "gate":
                    g += current
                elif p.delay >= 1:
                    delayed += current
                else:
                    d += current
            G = 2.0 / (1.0 + np.exp(-g)) if any(p.kind == "gate" for p in incoming) else np.ones_like(g)
            current = G * d + delayed
            v0, w0, s0 = v[r.name] * keep, w[r.name] * keep, last[r.name] * keep
            u = alpha * v0 - (1 - alpha) * w0 + np.sqrt(1 - alpha**2) * current - s0 - 1.0
            if r.name in forced:
                u = np.asarray(forced[r.name][:, t], dtype=np.float64)
            s = emit(u, cfg)
            v[r.name] = u + 1.0
            w[r.name] = rho * w0 + (1 - rho) * (a * v[r.name] + b * s)
            last[r.name] = s
            heard[r.name] = s * masks[r.name][:, t] if r.name in masks else s
            run.u[r.name][:, t], run.s[r.name][:, t] = u, s
            run.drive[r.name][:, t], run.gate[r.name][:, t] = d, G

        current = np.zeros((B, cfg.dim))
        for p in (p for p in cfg.projections if p.dst == "broca_out"):
            run.sources[projection_key(p)][:, t] = heard[p.src]
            current += heard[p.src] @ matrices[projection_key(p)].T
        o = kappa * (o * keep) + (1 - kappa) * current
        run.o[:, t] = o
        run.broca[:, t] = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + NORM_EPS)

    run.state = {"broca.o": o}
    for r in regions:
        kept = [emitted_at(r.name, T, k + 1) for k in range(history(cfg, r.name))]  # as token T would hear it
        run.state[f"region.{r.name}.v"], run.state[f"region.{r.name}.w"] = v[r.name], w[r.name]
        run.state[f"region.{r.name}.spikes"] = np.stack(kept, 1) if kept else np.zeros((B, 0, r.neurons))
    return run


def _losses(
    cfg: Any, params: Arrays, run: SimpleNamespace, targets: Array, weights: Any, normalize: str, divisor: Any,
) -> Array:
    """Fill the losses and their statistics into `run`; return dCE/dlogits [B, T, V]."""
    B, T = targets.shape
    weights = np.ones((B, T)) if weights is None else np.asarray(weights, dtype=np.float64)
    if normalize not in ("sum", "abs"):
        raise ValueError(f"normalize must be 'sum' or 'abs', got {normalize!r}")
    if normalize == "sum" and (weights < 0).any():
        raise ValueError("normalize='sum' refuses negative weights: use 'abs'")
    if divisor is None:
        divisor = (weights if normalize == "sum" else np.abs(weights)).sum()
    scale = weights / divisor if divisor != 0 else np.zeros((B, T))

    decoder = params["embedding.weight" if cfg.tie_decoder else "decoder.weight"]
    run.logits = run.broca @ decoder.T + params["decoder.bias"]
    shifted = run.logits - run.logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    one_hot = np.eye(cfg.vocab_size)[targets]
    run.loss = float(-(scale * (log_p * one_hot).sum(axis=-1)).sum())

    counted = weights != 0
    run.tokens = int(counted.sum())
    run.predictions = run.logits.argmax(axis=-1).astype(np.int32)  # ties go to the lower id
    run.accuracy = float((run.predictions == targets)[counted].mean()) if run.tokens else 0.0
    run.neuron_rates = {name: heaviside(u).mean(axis=(0, 1)) for name, u in run.u.items()}
    run.rates = {name: float(rate.mean()) for name, rate in run.neuron_rates.items()}
    penalty = sum(np.mean((rate - cfg.rate_target) ** 2) for rate in run.neuron_rates.values())
    run.homeostasis = float(cfg.rate_weight * penalty)
    d_logits: Array = scale[..., None] * (np.exp(log_p) - one_hot)
    return d_logits


def _rate_signal(cfg: Any, run: SimpleNamespace, name: str) -> Array:
    """dHomeostasis/du of region `name`, [B, T, n], with psi as the derivative of H."""
    u = run.u[name]  # [B, T, n]: its size is the n * B * T over which the means were taken
    error = run.neuron_rates[name] - cfg.rate_target
    signal: Array = cfg.rate_weight * 2.0 * error / u.size * surrogate(u, cfg.surrogate_k)
    return signal


def _backward(
    cfg: Any, params: Arrays, run: SimpleNamespace, ids: Array, masks: Arrays, d_logits: Array,
) -> None:
    """Fill gradients and learning signals: tokens from the last to the first, levels from the top."""
    B, T = ids.shape
    regions = sorted(cfg.regions, key=lambda r: -r.level)
    kappa = params["broca.kappa"]
    slopes = {n: emission_slope(u, cfg) for n, u in run.u.items()}
    rate_signals = {name: _rate_signal(cfg, run, name) for name in run.u}
    d_matrix = {key: np.zeros_like(matrix) for key, matrix in run.matrices.items()}
    d_bias = {r.name: np.zeros(r.neurons) for r in regions}
    d_embedding = np.zeros_like(params["embedding.weight"])

    output_key = "embedding.weight" if cfg.tie_decoder else "decoder.weight"
    d_broca = d_logits @ params[output_key]
    d_decoder = np.einsum("btv,btd->vd", d_logits, run.broca)

    lv = {r.name: np.zeros((B, r.neurons)) for r in regions}
    lw = {r.name: np.zeros((B, r.neurons)) for r in regions}
    lo = np.zeros((B, cfg.dim))
    for t in range(T - 1, -1, -1):
        # A reset before token t+1 cuts every path from t+1 back to t.
        keep = ~run.resets[:, t + 1, None] if t + 1 < T else np.ones((B, 1))
        L = {r.name: np.zeros((B, r.neurons)) for r in regions}
        L["embedding"] = np.zeros((B, cfg.dim))

        o, grad = run.o[:, t], d_broca[:, t]
        inverse = 1.0 / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + NORM_EPS)
        lo = kappa * lo * keep + inverse * grad - o * inverse**3 * np.mean(o * grad, axis=-1, keepdims=True)
        for p in (p for p in cfg.projections if p.dst == "broca_out"):
            key, e = projection_key(p), (1 - kappa) * lo
            d_matrix[key] += e.T @ run.sources[key][:, t]
            L[p.src] += e @ run.matrices[key]

        for r in regions:
            alpha, rho, a, b = _constants(params, r.name)
            if r.name in masks:
                L[r.name] = L[r.name] * masks[r.name][:, t]
            run.learning_signals[r.name][:, t] = L[r.name]
            lv_next, lw_next = lv[r.name] * keep, lw[r.name] * keep
            lw[r.name] = rho * lw_next - (1 - alpha) * lv_next
            ls = L[r.name] + (1 - rho) * b * lw[r.name]
            through_spike = ls * slopes[r.name][:, t] + rate_signals[r.name][:, t]
            lv[r.name] = alpha * lv_next + (1 - rho) * a * lw[r.name] + through_spike
            delta = np.sqrt(1 - alpha**2) * lv[r.name]  # dE/dI
            d, G = run.drive[r.name][:, t], run.gate[r.name][:, t]
            d_bias[r.name] += (delta * G).sum(axis=0)
            for p in (p for p in cfg.projections if p.dst == r.name):
                key = projection_key(p)
                if p.kind == "gate":
                    e = delta * d * G * (1 - G / 2)
                else:
                    e = delta if p.delay >= 1 else delta * G
                d_matrix[key] += e.T @ run.sources[key][:, t]
                if p.delay == 0:  # a delayed spike is a constant for its receiver
                    L[p.src] += e @ run.matrices[key]
        np.add.at(d_embedding, ids[:, t], L["embedding"])

    run.gradients = {"embedding.weight": d_embedding, "decoder.bias": d_logits.sum(axis=(0, 1))}
    run.gradients[output_key] = run.gradients.get(output_key, 0.0) + d_decoder  # tied: the sum of both uses
    run.gradients.update({f"region.{name}.bias": g for name, g in d_bias.items()})
    run.gradients.update({f"{key}.blocks": _stored(params, key, g) for key, g in d_matrix.items()})
