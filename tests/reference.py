"""The float64 oracle: the model, its learning rule and its optimizer in plain NumPy, one token at a time.

Nothing here imports the package: both backends are judged by this file, so it shares no code with them.

Shapes: B streams, T tokens, V vocabulary, D width of the embedding and of Broca's output, n neurons of a
region. Projections are made dense, [n_dst, n_src], before use: an oracle may waste memory, not be clever.
The forward equations stand in `_forward`, the adjoints in `_backward`, in the order of their evaluation.
"""

from types import SimpleNamespace

import numpy as np

BLOCK = 32
NORM_EPS = 1e-5  # inside the square root of Broca's normalisation


def heaviside(u):
    """H(u): 1 for u > 0, else 0 (a neuron exactly at threshold is silent)."""
    return (u > 0).astype(np.float64)


def emit(u, cfg):
    """Spike sent at distance `u` to threshold: H(u) * min(1 + u, max_spike), or H(u) when binary."""
    return heaviside(u) * np.minimum(1.0 + u, largest_spike(cfg)) if cfg.graded else heaviside(u)


def largest_spike(cfg):
    """The bound of a graded spike, infinite where the configuration sets none."""
    return np.inf if cfg.max_spike is None else cfg.max_spike


def surrogate(u, k):
    """psi(u), which stands for the derivative of H."""
    return 1.0 / (1.0 + k * np.abs(u)) ** 2


def emission_slope(u, cfg):
    """ds/du: the product rule with psi in place of H'; 1 + u is clipped to the side where a spike exists."""
    psi = surrogate(u, cfg.surrogate_k)
    if not cfg.graded:
        return psi
    bound = largest_spike(cfg)
    return psi * np.minimum(1.0 + np.maximum(u, 0.0), bound) + heaviside(u) * (1.0 + u < bound)


def projection_key(p):
    """Stem of the parameter keys of a projection: ``proj.<src>.<dst>.<kind>.<delay>``."""
    return f"proj.{p.src}.{p.dst}.{p.kind}.{p.delay}"


def history(cfg, name):
    """K: how many past spikes of region `name` its delayed projections can still ask for (0 if none)."""
    return max((p.delay for p in cfg.projections if p.src == name and p.delay >= 1), default=0)


def trainable_keys(cfg):
    """Keys with a gradient, in a fixed order."""
    keys = ["embedding.weight", "decoder.bias"] + ([] if cfg.tie_decoder else ["decoder.weight"])
    keys += [f"region.{r.name}.bias" for r in cfg.regions]
    return keys + [f"{projection_key(p)}.blocks" for p in cfg.projections]


def zero_state(cfg, streams):
    """State of streams that have heard nothing."""
    state = {"broca.o": np.zeros((streams, cfg.dim))}
    for r in cfg.regions:
        state[f"region.{r.name}.v"] = np.zeros((streams, r.neurons))
        state[f"region.{r.name}.w"] = np.zeros((streams, r.neurons))
        state[f"region.{r.name}.spikes"] = np.zeros((streams, history(cfg, r.name), r.neurons))
    return state


def _corners(params, key):
    rows, cols = params[f"{key}.rows"], params[f"{key}.cols"]
    return [(int(i) * BLOCK, int(j) * BLOCK) for i, j in zip(rows, cols, strict=True)]


def _constants(params, name):
    return (params[f"region.{name}.{x}"] for x in ("alpha", "rho", "a", "b"))


def _dense(cfg, params, p):
    """The projection as a full matrix [n_dst, n_src], zero where no block is stored."""
    width = {"embedding": cfg.dim, "broca_out": cfg.dim, **{r.name: r.neurons for r in cfg.regions}}
    matrix = np.zeros((width[p.dst], width[p.src]))
    key = projection_key(p)
    for block, (i, j) in zip(params[f"{key}.blocks"], _corners(params, key), strict=True):
        matrix[i : i + BLOCK, j : j + BLOCK] = block
    return matrix


def _stored(params, key, matrix):
    """The stored blocks of a full matrix, [n_blocks, 32, 32] in the order of the projection."""
    return np.stack([matrix[i : i + BLOCK, j : j + BLOCK] for i, j in _corners(params, key)])


def forward_backward(
    cfg, params, ids, targets, weights=None, resets=None, state=None, *,
    normalize="sum", divisor=None, masks=None, spikes=None,
):  # fmt: skip
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


def _forward(cfg, params, ids, resets, past, masks, forced):
    B, T = ids.shape
    regions = sorted(cfg.regions, key=lambda r: r.level)
    matrices = {projection_key(p): _dense(cfg, params, p) for p in cfg.projections}
    run = SimpleNamespace(matrices=matrices, resets=resets)
    for name in ("u", "s", "drive", "gate", "learning_signals"):
        setattr(run, name, {r.name: np.zeros((B, T, r.neurons)) for r in regions})
    run.sources = {key: np.zeros((B, T, matrix.shape[1])) for key, matrix in matrices.items()}
    run.o, run.broca = np.zeros((B, T, cfg.dim)), np.zeros((B, T, cfg.dim))

    def emitted_at(name, t, delay):
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


def _losses(cfg, params, run, targets, weights, normalize, divisor):
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
    return scale[..., None] * (np.exp(log_p) - one_hot)


def _rate_signal(cfg, run, name):
    """dHomeostasis/du of region `name`, [B, T, n], with psi as the derivative of H."""
    u = run.u[name]  # [B, T, n]: its size is the n * B * T over which the means were taken
    error = run.neuron_rates[name] - cfg.rate_target
    return cfg.rate_weight * 2.0 * error / u.size * surrogate(u, cfg.surrogate_k)


def _backward(cfg, params, run, ids, masks, d_logits):
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
