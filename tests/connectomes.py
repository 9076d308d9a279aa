"""Random valid connectomes with parameters, a carried state and one call's inputs, to compare two answers on.

Every value is a float32 number held in float64, so that the oracle and a backend start from the same bits.
"""

from types import SimpleNamespace

import numpy as np
from hypothesis import strategies as st
from reference import emit, largest_spike, zero_state

from neurogen_cy.config import Config, Projection, Region
from neurogen_cy.connectome import initial_parameters

NAMES = ("thalamus", "wernicke", "hippocampus", "pfc")
NEURON_TOKENS = 10_000  # most values of u in a case; random_case stays below with 4 x 64 x 3 x 12


def _float32(x):
    return np.asarray(x, dtype=np.float32).astype(np.float64)


def random_config(rng, **fixed):
    """A connectome of 1-4 regions in any order of levels; `fixed` overrides fields of `Config`."""
    # Names in random order: the order of cfg.regions says nothing about the order of levels.
    names = rng.permutation(NAMES)[: rng.integers(1, 5)].tolist()
    level = {name: int(rng.choice([0, 1, 2, 5])) for name in names}
    projections = []

    def connect(src, dst, delay=0, kind="drive"):
        density = float(rng.choice([1.0, 0.5, 0.25, 1 - rng.random()]))
        projections.append(Projection(src, dst, delay=int(delay), kind=kind, density=density))

    sensory, spoken = rng.choice(names, 2)
    recurrence = rng.choice([0.03, 0.1, 0.3])
    for dst in names:
        if dst == sensory or rng.random() < 0.4:
            connect("embedding", dst)
        if rng.random() < 0.25:
            connect("embedding", dst, kind="gate")
        for src in names:
            if level[src] < level[dst]:
                for kind, share in (("drive", 0.6), ("gate", 0.35)):
                    if rng.random() < share:
                        connect(src, dst, kind=kind)
            least = max(1, level[src] - level[dst] + 1)
            for delay in range(least, 5):
                if rng.random() < recurrence:
                    connect(src, dst, delay)
        if all(p.dst != dst for p in projections):
            connect("embedding", dst)
    for src in names:
        if src == spoken or rng.random() < 0.4:
            connect(src, "broca_out")
    if rng.random() < 0.3:
        connect("embedding", "broca_out")
    fields = {
        "vocab_size": int(rng.integers(5, 41)),
        "dim": int(rng.choice([32, 64])),
        "regions": tuple(Region(name, int(rng.choice([32, 64])), level[name]) for name in names),
        "projections": tuple(projections[i] for i in rng.permutation(len(projections))),
        "graded": bool(rng.random() < 0.6),
        "surrogate_k": float(rng.choice([0.5, 1.0, 2.0])),
        "tie_decoder": bool(rng.random() < 0.4),
        "rate_weight": float(rng.choice([0.0, 0.5, 2.0])),
        "dropout": float(rng.choice([0.0, 0.25])),
        "max_spike": rng.choice([None, 1.5, 4.0]),
    }
    return Config(**{**fields, **fixed})


def random_params(cfg, rng):
    """Every model key as in a new model, but for the biases, which a new model starts all alike."""
    params = initial_parameters(cfg, int(rng.integers(2**63)))
    for key, a in params.items():
        if key.endswith(".bias"):
            params[key] = a + 0.2 * rng.normal(size=a.shape)
    return {key: a if a.dtype.kind == "i" else _float32(a) for key, a in params.items()}


def random_state(cfg, rng, streams):
    """A state that a run could have left: the newest spike kept is the one that v tells of."""
    state = {key: _float32(rng.normal(size=a.shape)) for key, a in zero_state(cfg, streams).items()}
    for r in cfg.regions:
        state[f"region.{r.name}.w"] = np.abs(state[f"region.{r.name}.w"]) * 0.5
        spikes = state[f"region.{r.name}.spikes"]
        spikes[:] = emit(spikes - 1.0, cfg)
        spikes[:, :1] = emit(state[f"region.{r.name}.v"][:, None] - 1.0, cfg)
    return state


def random_case(seed, **fixed):
    """A connectome and one call to it: cfg, params, ids, targets, and the other arguments as `options`."""
    rng = np.random.default_rng(seed)
    cfg = random_config(rng, **fixed)
    params = random_params(cfg, rng)
    B, T = int(rng.integers(1, 4)), int(rng.integers(1, 13))
    assert sum(r.neurons for r in cfg.regions) * B * T <= NEURON_TOKENS
    ids, targets = (rng.integers(0, cfg.vocab_size, (B, T)).astype(np.int32) for _ in range(2))
    style = rng.choice(["none", "mask", "positive", "signed"])
    weights = {
        "none": None,
        "mask": (rng.random((B, T)) < 0.6).astype(np.float64),
        "positive": _float32(rng.random((B, T))),
        "signed": _float32(rng.normal(size=(B, T))),
    }[style]
    options = {
        "weights": weights,
        "resets": rng.random((B, T)) < 0.15 if rng.random() < 0.6 else None,
        "state": random_state(cfg, rng, B) if rng.random() < 0.6 else None,
        "normalize": "abs" if style == "signed" else "sum",
    }
    return SimpleNamespace(seed=seed, cfg=cfg, params=params, ids=ids, targets=targets, options=options)


def cases(**fixed):
    """Hypothesis strategy over `random_case`: a failure prints the call that brings the case back."""
    return st.builds(random_case, st.integers(0, 2**32 - 1), **{k: st.just(v) for k, v in fixed.items()})


def retry_off_threshold(draw, evaluate, margin=1e-4, attempts=100):
    """Draw until no neuron comes within `margin` of its threshold, where rounding alone decides a spike (or its bound).

    Parameters
    ----------
    draw : callable
        Attempt number 0, 1, ... to case.
    evaluate : callable
        Case to the oracle's answer, whose ``u`` maps regions to arrays.

    Returns
    -------
    case, answer, redraws : the first pair clear of the threshold, and how many were thrown away before it
    """
    for redraws in range(attempts):
        case = draw(redraws)
        answer = evaluate(case)
        bound = largest_spike(case.cfg) - 1.0  # where the slope of a graded spike jumps
        if all(min(np.abs(u).min(), np.abs(u - bound).min()) >= margin for u in answer.u.values()):
            return case, answer, redraws
    raise RuntimeError(f"{attempts} draws, each with a neuron within {margin:g} of its threshold")
