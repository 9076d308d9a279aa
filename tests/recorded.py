"""The oracle's gradient from spikes that were recorded elsewhere: every token at once, and optionally rounded.

A neuron close to its threshold fires on one machine and not on another, and from then on the two live different
lives. So a backend's learning is judged on its own life: its recorded u and s, the distance to threshold and the spike
of every neuron at every token, are taken as given, and what follows from them (losses, learning signals, gradients, and
one token ahead the next u) is computed in float64 from the equations of reference.py. test_recorded.py holds the two
together. Arrays inside are time-major: [T, B, ...].
"""

from types import SimpleNamespace

import numpy as np
from reference import (
    NORM_EPS,
    _constants,
    _dense,
    _stored,
    emission_slope,
    heaviside,
    projection_key,
    surrogate,
    zero_state,
)


def to_bf16(x):
    """The nearest bfloat16 numbers (8 significant bits; ties to even), in float64."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


def to_eight(x, *, fraction, lowest):
    """The nearest numbers with so many bits behind the first, down to 2^lowest, in float64 (ties to even); below that,
    multiples of 2^(lowest - fraction). e4m3: 3, -6. e5m2: 2, -14. Nothing is too large here."""
    exponent = np.maximum(np.frexp(np.asarray(x, np.float64))[1] - 1, lowest)
    return np.ldexp(np.round(np.ldexp(x, fraction - exponent)), exponent - fraction)


def to_e4m3(x):
    """With one power of two as the scale of all, that takes the largest magnitude to [128, 256)."""
    up = 2.0 ** (7 - np.floor(np.log2(np.abs(x).max())))
    return to_eight(x * up, fraction=3, lowest=-6) / up


def first_flips(cfg, one, other):
    """(flips, updates) of two recordings {region: (u, s)}: each stream's first flips, and its updates until then.

    Spikes travel by token and, within a token, from lower levels to higher: what comes after a stream's first flips
    may be their doing. Flips of one level at one token are independent.
    """
    T = next(iter(one.values()))[0].shape[1]
    levels = sorted({region.level for region in cfg.regions})
    sizes = [sum(region.neurons for region in cfg.regions if region.level == level) for level in levels]
    counts = np.stack([
        sum(((one[r.name][0] > 0) != (other[r.name][0] > 0)).sum(axis=2) for r in cfg.regions if r.level == level)
        for level in levels
    ], axis=2)  # [B, T, levels]: in the order in which spikes travel
    flips = updates = 0
    for stream in counts.reshape(len(counts), -1):
        at = np.flatnonzero(stream)
        until = at[0] if len(at) else T * len(levels) - 1
        flips += stream[until]
        updates += until // len(levels) * sum(sizes) + sum(sizes[: until % len(levels) + 1])
    return int(flips), int(updates)


def replay(cfg, params, ids, targets, recorded, *, weights=None, resets=None, state=None, masks=None, rounded=None,
           eight=False):
    """What one call must have come to, given what its neurons did.

    Parameters
    ----------
    cfg, params, ids, targets, weights, resets, state, masks
        As `reference.forward_backward`; losses are divided by the sum of weights.
    recorded : dict of (u, s), [B, T, n] each, for every region
    rounded : function of an array, optional
        Applied to both sides of every matrix product, to the logits and to what gates need again (d and G): what a
        program does that computes in 16 bits and sums in more.
    eight : bool
        Whether the decoder's products take 8-bit operands then: e4m3, and e5m2 for the errors of logits.

    Returns
    -------
    SimpleNamespace
        loss; gradients by key; u: {region: [B, T, n]}, the distance to threshold one token after the recorded past.
    """
    r = rounded or (lambda x: x)
    late = lambda x: np.ascontiguousarray(np.asarray(x, np.float64).swapaxes(0, 1))  # [B, T, ..] <-> [T, B, ..]
    params = {key: np.asarray(a, np.float64) for key, a in params.items()}
    ids, targets = np.asarray(ids).T, np.asarray(targets).T
    T, B = ids.shape
    resets = np.zeros((T, B), bool) if resets is None else np.asarray(resets, bool).T
    past = {key: np.asarray(a, np.float64) for key, a in (state or zero_state(cfg, B)).items()}
    run = SimpleNamespace(
        keep=~resets[..., None], past=past, params=params, round=r, eight=eight,
        u={name: late(u) for name, (u, _) in recorded.items()},
        s={name: late(s) for name, (_, s) in recorded.items()},
        masks={name: late(mask) for name, mask in (masks or {}).items()},
        matrices={projection_key(p): r(_dense(cfg, params, p)) for p in cfg.projections},
    )  # fmt: skip
    _hear(cfg, run, ids, resets)
    d_logits = _score(cfg, run, targets, np.ones((T, B)) if weights is None else late(weights))
    _learn(cfg, run, ids, d_logits)
    run.u = {region.name: late(_one_token_ahead(cfg, run, region.name)) for region in cfg.regions}
    return run


def _hear(cfg, run, ids, resets):
    """Sources of every projection, drive d, gate G and Broca's output."""
    T, B = ids.shape
    heard = {"embedding": run.round(run.params["embedding.weight"])[ids]}
    heard.update({name: run.round(s * run.masks.get(name, 1.0)) for name, s in run.s.items()})
    # A delayed spike is heard unless its stream was reset since: last[t, b] is the latest reset no later than t.
    last = np.maximum.accumulate(np.where(resets, np.arange(T)[:, None], -(2**30)), axis=0)
    run.sources = {}
    for p in cfg.projections:
        source = heard[p.src]
        if p.delay:
            carried = run.past[f"region.{p.src}.spikes"][:, : p.delay].swapaxes(0, 1)[::-1]  # the oldest first
            source = run.round(np.concatenate([carried, run.s[p.src]])[:T])
            source = source * (np.arange(T)[:, None] - p.delay >= last)[..., None]
        run.sources[projection_key(p)] = source

    def total(dst, kind, delayed):
        return sum(
            run.sources[projection_key(p)] @ run.matrices[projection_key(p)].T
            for p in cfg.projections if (p.dst, p.kind, p.delay > 0) == (dst, kind, delayed)
        )  # fmt: skip

    run.drive, run.gate, run.delayed = {}, {}, {}
    for region in cfg.regions:
        shape = run.u[region.name].shape
        d = run.params[f"region.{region.name}.bias"] + total(region.name, "drive", False)
        gated = any(p.dst == region.name and p.kind == "gate" for p in cfg.projections)
        g = total(region.name, "gate", False)
        run.drive[region.name] = np.broadcast_to(run.round(d) if gated else d, shape)
        run.gate[region.name] = run.round(2.0 / (1.0 + np.exp(-g))) if gated else np.ones(shape)
        run.delayed[region.name] = np.broadcast_to(total(region.name, "drive", True), shape)

    kappa, o, spoken = run.params["broca.kappa"], run.past["broca.o"], total("broca_out", "drive", False)
    run.o = np.empty((T, B, cfg.dim))
    for t in range(T):
        run.o[t] = o = kappa * (o * run.keep[t]) + (1 - kappa) * spoken[t]
    run.scale = 1.0 / np.sqrt(np.mean(run.o**2, axis=-1, keepdims=True) + NORM_EPS)
    run.broca = run.round(run.o * run.scale)


def _score(cfg, run, targets, weights):
    """Cross-entropy into `run.loss`; dCE/dlogits [T, B, V]."""
    run.decoder = run.round(run.params["embedding.weight" if cfg.tie_decoder else "decoder.weight"])
    if run.eight:
        run.decoder, run.broca = to_e4m3(run.decoder), to_e4m3(run.broca)
    logits = run.round(run.broca @ run.decoder.T + run.params["decoder.bias"])
    logits -= logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    weights = weights / (weights.sum() or 1.0)
    run.loss = float(-(weights * np.take_along_axis(log_p, targets[..., None], -1)[..., 0]).sum())
    d_logits = np.exp(log_p)
    d_logits[(*np.indices(targets.shape), targets)] -= 1.0
    d_logits = run.round(weights[..., None] * d_logits)
    run.d_bias = d_logits.sum(axis=(0, 1))
    if run.eight:  # an error of -1 in a row of the largest weight is -2^14
        up = 2**14 / (weights.max() or 1.0)
        d_logits = to_eight(d_logits * up, fraction=2, lowest=-14) / up
    return d_logits


def _over_time(a, b):
    """Sum over tokens and streams of the outer products of a [T, B, m] and b [T, B, n]: [m, n]."""
    return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])


def _learn(cfg, run, ids, d_logits):
    """Gradients: the readout's adjoint, then the regions from the highest level down."""
    T, B = ids.shape
    # A reset before token t+1 cuts every path from t+1 back to t.
    keep_next = np.concatenate([run.keep[1:], np.ones((1, B, 1), bool)])
    kappa, gradients = run.params["broca.kappa"], {}
    d_broca = d_logits @ run.decoder
    d_o = run.scale * d_broca - run.o * run.scale**3 * np.mean(run.o * d_broca, axis=-1, keepdims=True)
    L = {"embedding": np.zeros((T, B, cfg.dim)), **{name: np.zeros_like(u) for name, u in run.u.items()}}

    def attribute(p, e):
        """To the weights of `p`, and to its source unless that is a delayed spike."""
        key = projection_key(p)
        gradients[f"{key}.blocks"] = _stored(run.params, key, _over_time(e, run.sources[key]))
        if p.delay == 0:
            L[p.src] += e @ run.matrices[key]

    lo = np.zeros((B, cfg.dim))
    for t in reversed(range(T)):
        d_o[t] = lo = kappa * lo * keep_next[t] + d_o[t]
    for p in (p for p in cfg.projections if p.dst == "broca_out"):
        attribute(p, run.round((1 - kappa) * d_o))

    for region in sorted(cfg.regions, key=lambda region: -region.level):
        name, (alpha, rho, a, b) = region.name, _constants(run.params, region.name)
        u, d, G = run.u[name], run.drive[name], run.gate[name]
        rate = heaviside(u).mean(axis=(0, 1))
        psi, slope = surrogate(u, cfg.surrogate_k), emission_slope(u, cfg)
        on_u = cfg.rate_weight * 2.0 * (rate - cfg.rate_target) / u.size * psi
        signal = L[name] * run.masks.get(name, 1.0)
        delta = np.empty_like(u)
        lv, lw = np.zeros_like(u[0]), np.zeros_like(u[0])
        for t in reversed(range(T)):
            lv, lw = lv * keep_next[t], lw * keep_next[t]
            lw = rho * lw - (1 - alpha) * lv
            lv = alpha * lv + (1 - rho) * a * lw + (signal[t] + (1 - rho) * b * lw) * slope[t] + on_u[t]
            delta[t] = np.sqrt(1 - alpha**2) * lv
        gradients[f"region.{name}.bias"] = (delta * G).sum(axis=(0, 1))
        into = {"drive": run.round(delta * G), "gate": run.round(delta * d * G * (1 - G / 2))}
        for p in (p for p in cfg.projections if p.dst == name):
            attribute(p, run.round(delta) if p.delay else into[p.kind])

    embedding = np.zeros_like(run.params["embedding.weight"])
    np.add.at(embedding, ids, L["embedding"])
    decoder = _over_time(d_logits, run.broca)
    gradients["embedding.weight"] = embedding + decoder if cfg.tie_decoder else embedding
    if not cfg.tie_decoder:
        gradients["decoder.weight"] = decoder
    gradients["decoder.bias"] = run.d_bias
    run.gradients = gradients


def _one_token_ahead(cfg, run, name):
    """u at every token from what was recorded before it and what was heard at it, [T, B, n]."""
    alpha, rho, a, b = _constants(run.params, name)
    current = np.sqrt(1 - alpha**2) * (run.gate[name] * run.drive[name] + run.delayed[name])
    v, w = run.past[f"region.{name}.v"], run.past[f"region.{name}.w"]
    bound = np.inf if cfg.max_spike is None else cfg.max_spike
    s = heaviside(v - 1.0) * (np.minimum(v, bound) if cfg.graded else 1.0)  # the soft reset by what was emitted
    ahead = np.empty_like(current)
    for t in range(len(current)):
        keep = run.keep[t]
        w = w * keep
        ahead[t] = alpha * (v * keep) - (1 - alpha) * w + current[t] - s * keep - 1.0
        v, s = run.u[name][t] + 1.0, run.s[name][t]
        w = rho * w + (1 - rho) * (a * v + b * s)
    return ahead
