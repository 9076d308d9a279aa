"""The float64 oracle: the model and its learning rule (neurogen_cy/reference.py), and what else the tests need.

Eligibility traces, the optimizer, sampling and dropout. Like the model's part it imports nothing of the package.
"""

import numpy as np

from neurogen_cy.reference import (  # noqa: F401
    BLOCK,
    NORM_EPS,
    _constants,
    _corners,
    _dense,
    _rate_signal,
    _stored,
    emission_slope,
    emit,
    forward_backward,
    heaviside,
    history,
    largest_spike,
    projection_key,
    surrogate,
    trainable_keys,
    zero_state,
)


def eligibility_gradients(cfg, params, region, *args, **kwargs):
    """Gradients of a region's incoming blocks and bias by e-prop's forward eligibility traces.

    Every synapse carries a vector (of v, of w) forward in time; ds/du times its first entry is the trace, and
    the gradient is the sum of traces times the learning signal dE/ds. Homeostasis speaks to u itself, not to
    s, so it multiplies the first entry directly. Valid when no region hears `region` within the same token.

    Parameters
    ----------
    region : str
    *args, **kwargs
        As `forward_backward` after `params`: ids, targets, ...

    Returns
    -------
    dict
        Key to gradient, for ``region.<region>.bias`` and the blocks of every projection into it.
    """
    if any(p.src == region and p.delay == 0 and p.dst != "broca_out" for p in cfg.projections):
        raise ValueError(f"{region!r} is heard by another region within the token: traces miss that credit")
    run = forward_backward(cfg, params, *args, **kwargs)
    u, G, d = run.u[region], run.gate[region], run.drive[region]
    B, T, n = u.shape
    columns = (np.asarray(x, dtype=np.float64)[:, None] for x in _constants(params, region))
    alpha, rho, a, b = columns  # [n, 1]: traces are [B, n, n_src]
    slope = emission_slope(u, cfg)
    rate_signal = _rate_signal(cfg, run, region)

    # dI_t / dW_ji = influence_j * source_i
    influences = {"drive": G, "gate": d * G * (1 - G / 2), "delayed": np.ones_like(G)}
    incoming = [(None, G, np.ones((B, T, 1)))]  # the bias: a synapse from a source that always says 1
    for p in (p for p in cfg.projections if p.dst == region):
        role = "delayed" if p.delay >= 1 else p.kind
        incoming.append((p, influences[role], run.sources[projection_key(p)]))

    gradients = {}
    for p, influence, source in incoming:
        trace_v = np.zeros((B, n, source.shape[-1]))
        trace_w, total = np.zeros_like(trace_v), np.zeros(trace_v.shape[1:])
        for t in range(T):
            keep = ~run.resets[:, t, None, None]
            trace_v, trace_w = trace_v * keep, trace_w * keep
            fresh = influence[:, t, :, None] * source[:, t, None, :]
            trace_v = alpha * trace_v - (1 - alpha) * trace_w + np.sqrt(1 - alpha**2) * fresh
            trace = slope[:, t, :, None] * trace_v
            trace_w = rho * trace_w + (1 - rho) * (a * trace_v + b * trace)
            signal, on_u = run.learning_signals[region][:, t, :, None], rate_signal[:, t, :, None]
            total += (signal * trace + on_u * trace_v).sum(axis=0)
        if p is None:
            gradients[f"region.{region}.bias"] = total[:, 0]
        else:
            gradients[f"{projection_key(p)}.blocks"] = _stored(params, projection_key(p), total)
    return gradients


def adamw(
    params, gradients, moments, step, *,
    lr=2e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, clip=1.0, touched=None,
):  # fmt: skip
    """One AdamW step with decoupled decay, after clipping by the norm of all gradients together.

    Parameters
    ----------
    params, gradients : dict of arrays
        Keys of `gradients` are updated; a model without ``decoder.weight`` among them counts as tied.
    moments : dict of (m, v)
        Empty before the first step.
    step : int
        Steps finished before this one; the bias correction uses ``step + 1``, for rows seen first as well.
    clip : float or None
        Gradients are scaled by ``clip / norm`` where the norm exceeds it.
    touched : bool [V] or int array, optional
        Rows of an untied ``embedding.weight`` to update; by default those with a non-zero gradient.

    Returns
    -------
    params, moments, norm : dict, dict, float
        New dicts, inputs untouched; a norm that is not finite changes nothing.
    """
    norm = float(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradients.values())))
    new_params, new_moments = dict(params), dict(moments)
    if not np.isfinite(norm):
        return new_params, new_moments, norm
    scale = clip / norm if clip is not None and norm > clip else 1.0
    for key, gradient in gradients.items():
        rows = ...
        if key == "embedding.weight" and "decoder.weight" in gradients:
            rows = np.any(gradient != 0, axis=-1) if touched is None else touched
        p = np.array(params[key], dtype=np.float64)
        m, v = (np.array(x) for x in moments.get(key, (np.zeros_like(p), np.zeros_like(p))))
        g = np.asarray(gradient, dtype=np.float64)[rows] * scale
        m[rows] = betas[0] * m[rows] + (1 - betas[0]) * g
        v[rows] = betas[1] * v[rows] + (1 - betas[1]) * g**2
        decayed = key == "decoder.weight" or key.startswith("proj.")
        p[rows] *= 1 - lr * (weight_decay if decayed else 0.0)
        m_hat, v_hat = m[rows] / (1 - betas[0] ** (step + 1)), v[rows] / (1 - betas[1] ** (step + 1))
        p[rows] -= lr * m_hat / (np.sqrt(v_hat) + eps)
        new_params[key], new_moments[key] = p, (m, v)
    return new_params, new_moments, norm


def sampling_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Distribution sampled from, [..., V] float64: softmax, then top-k, then top-p, renormalised.

    Ties are won by the lower id. Top-p keeps the shortest prefix, most probable first, whose share of what
    top-k left reaches `top_p`. ``top_k=0`` and ``top_p=1`` keep everything.
    """
    scaled = np.array(logits, dtype=np.float64, order="C") / temperature
    p = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    for row in p.reshape(-1, p.shape[-1]):  # views: each row is cut in place
        order = np.argsort(-row, kind="stable")
        count = min(top_k, len(row)) if top_k > 0 else len(row)
        if top_p < 1:
            share = np.cumsum(row[order[:count]] / row[order[:count]].sum())
            count = min(count, int(np.searchsorted(share, top_p)) + 1)
        row[order[count:]] = 0.0
    return p / p.sum(axis=-1, keepdims=True)


def philox4x32(counter, key):
    """Philox4x32-10: counters [..., 4] and keys [..., 2], uint32, to random words [..., 4]."""
    c = [np.asarray(counter, dtype=np.uint64)[..., i] for i in range(4)]
    k = [np.asarray(key, dtype=np.uint64)[..., i] for i in range(2)]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high = [first >> np.uint64(32), second >> np.uint64(32)]
        c = [high[1] ^ c[1] ^ k[0], second & low, high[0] ^ c[3] ^ k[1], first & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c, axis=-1).astype(np.uint32)


def dropout_masks(cfg, seed, step, B, T):
    """Inverted-dropout multipliers {region: float32 [B, T, n]}, a pure function of where a neuron stands.

    Counter words: neuron // 4, token in the call, stream, index in ``cfg.regions``; the neuron takes the
    output word neuron % 4. Key words: the seed's low half, and its high half exclusive-or the step.
    """
    low = 0xFFFFFFFF
    key = np.array([seed & low, ((seed >> 32) ^ step) & low], dtype=np.uint32)
    multiplier = np.float32(1.0 / (1.0 - cfg.dropout))
    masks = {}
    for index, r in enumerate(cfg.regions):
        stream, token, quad = np.indices((B, T, r.neurons // 4))
        words = philox4x32(np.stack([quad, token, stream, np.full_like(quad, index)], axis=-1), key)
        uniform = (words.reshape(B, T, r.neurons) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
        masks[r.name] = np.where(uniform >= np.float32(cfg.dropout), multiplier, np.float32(0.0))
    return masks
