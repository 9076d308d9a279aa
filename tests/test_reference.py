"""The oracle itself: against automatic differentiation with the two cuts, e-prop's traces, known answers."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from connectomes import cases, random_case, retry_off_threshold
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    adamw,
    dropout_masks,
    eligibility_gradients,
    emit,
    forward_backward,
    history,
    largest_spike,
    philox4x32,
    projection_key,
    sampling_probabilities,
    trainable_keys,
    zero_state,
)

TOLERANCE = 1e-10
SEEDS = range(40)


def relative_error(got, expected):
    """Largest difference, as a share of the largest expected entry."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    if expected.size == 0:
        return 0.0
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30))


def oracle(case, **changes):
    return forward_backward(case.cfg, case.params, case.ids, case.targets, **{**case.options, **changes})


@cache
def drawn(seed):
    """A case, with masks where it drops, and the oracle's answer; clear of what float64 rounding can flip."""

    def draw(attempt):
        case = random_case([seed, attempt])
        if case.cfg.dropout:
            case.options["masks"] = dropout_masks(case.cfg, seed, attempt, *case.ids.shape)
        return case

    return retry_off_threshold(draw, oracle, margin=1e-9)[:2]


def autograd(case, masks=None, weights=None, resets=None, state=None, normalize="sum"):
    """Losses, gradients and u by PyTorch, whose graph is cut at delayed spikes and at the soft reset."""
    torch = pytest.importorskip("torch", reason="PyTorch is the second opinion on the oracle's gradients")
    cfg, (B, T) = case.cfg, case.ids.shape

    def psi(u):
        return (1 + cfg.surrogate_k * u.abs()) ** -2

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u):
            ctx.save_for_backward(u)
            return (u > 0).double()

        @staticmethod
        def backward(ctx, grad):
            return grad * psi(*ctx.saved_tensors)

    def spike(u):
        # H(u) (1 + relu(u)) is the graded spike, and its product rule the slope, since relu' is H.
        bound = largest_spike(cfg)
        return Step.apply(u) * (1 + u.relu()).clamp(max=bound) if cfg.graded else Step.apply(u)

    def tensor(a):
        return torch.tensor(np.asarray(a, dtype=np.float64))

    P = {key: tensor(a) if a.dtype.kind == "f" else torch.tensor(a) for key, a in case.params.items()}
    for key in trainable_keys(cfg):
        P[key].requires_grad_()
    state = {key: tensor(a) for key, a in (state or zero_state(cfg, B)).items()}
    alive = tensor(np.ones((B, T)) if resets is None else ~resets)
    ids, targets = torch.tensor(case.ids).long(), torch.tensor(case.targets).long()
    sizes = {r.name: r.neurons for r in cfg.regions} | {"embedding": cfg.dim, "broca_out": cfg.dim}

    def matrix(p):
        grid = torch.zeros(sizes[p.dst] // 32, sizes[p.src] // 32, 32, 32, dtype=torch.float64)
        at = tuple(P[f"{projection_key(p)}.{x}"].long() for x in ("rows", "cols"))
        full = grid.index_put(at, P[f"{projection_key(p)}.blocks"])
        return full.transpose(1, 2).reshape(sizes[p.dst], sizes[p.src])

    W = {projection_key(p): matrix(p) for p in cfg.projections}

    def currents(sources, projections):
        return [sources[p.src] @ W[projection_key(p)].T for p in projections]

    v, w, queue, reset = {}, {}, {}, {}
    for r in cfg.regions:
        v[r.name], w[r.name] = state[f"region.{r.name}.v"], state[f"region.{r.name}.w"]
        queue[r.name] = list(state[f"region.{r.name}.spikes"].unbind(1))  # newest first, as long as is heard
        reset[r.name] = spike(v[r.name] - 1)
    o, us, outputs = state["broca.o"], {r.name: [] for r in cfg.regions}, []
    for t in range(T):
        live = alive[:, t, None]
        out = {"embedding": P["embedding.weight"][ids[:, t]]}
        for r in cfg.regions:
            queue[r.name] = [s * live for s in queue[r.name]]
        emitted = {}
        for r in sorted(cfg.regions, key=lambda r: r.level):
            alpha, rho, a, b = (P[f"region.{r.name}.{x}"] for x in ("alpha", "rho", "a", "b"))
            mine = [p for p in cfg.projections if p.dst == r.name]
            now = [p for p in mine if p.delay == 0]
            drive = P[f"region.{r.name}.bias"] + sum(currents(out, [p for p in now if p.kind == "drive"]))
            gates = currents(out, [p for p in now if p.kind == "gate"])
            current = 2 * torch.sigmoid(sum(gates)) * drive if gates else drive
            for p in mine:
                if p.delay:
                    current = current + queue[p.src][p.delay - 1].detach() @ W[projection_key(p)].T
            leak = alpha * (v[r.name] * live) - (1 - alpha) * (w[r.name] * live)
            v[r.name] = leak + (1 - alpha**2).sqrt() * current - (reset[r.name] * live).detach()
            u = v[r.name] - 1
            emitted[r.name] = reset[r.name] = s = spike(u)
            w[r.name] = rho * (w[r.name] * live) + (1 - rho) * (a * v[r.name] + b * s)
            out[r.name] = s * tensor(masks[r.name][:, t]) if masks else s
            us[r.name].append(u)
        for name, s in emitted.items():
            queue[name] = [s, *queue[name]][: len(queue[name])]
        spoken = sum(currents(out, [p for p in cfg.projections if p.dst == "broca_out"]))
        kappa = P["broca.kappa"]
        o = kappa * (o * live) + (1 - kappa) * spoken
        outputs.append(o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    decoder = P["embedding.weight"] if cfg.tie_decoder else P["decoder.weight"]
    logits = torch.stack(outputs, 1) @ decoder.T + P["decoder.bias"]
    weights = torch.ones(B, T, dtype=torch.float64) if weights is None else tensor(weights)
    divisor = (weights.abs() if normalize == "abs" else weights).sum()
    entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    loss = (weights.flatten() * entropy).sum() / divisor if divisor else 0 * entropy.sum()
    us = {name: torch.stack(u, 1) for name, u in us.items()}
    rates = [Step.apply(u).mean((0, 1)) for u in us.values()]
    homeostasis = cfg.rate_weight * sum((rate - cfg.rate_target).square().mean() for rate in rates)
    (loss + homeostasis).backward()
    unheard = {key: torch.zeros_like(P[key]) for key in trainable_keys(cfg) if P[key].grad is None}
    gradients = {key: unheard.get(key, P[key].grad).numpy() for key in trainable_keys(cfg)}
    state = {"broca.o": o} | {f"region.{name}.v": x for name, x in v.items()}
    state |= {f"region.{name}.w": x for name, x in w.items()}
    state |= {f"region.{n}.spikes": torch.stack(q, 1) for n, q in queue.items() if q}
    return SimpleNamespace(
        loss=loss.item(), homeostasis=homeostasis.item(), gradients=gradients, logits=logits.detach().numpy(),
        u={name: u.detach().numpy() for name, u in us.items()},
        state={key: a.detach().numpy() for key, a in state.items()},
    )  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
def test_matches_autograd_with_the_two_cuts(seed):
    case, got = drawn(seed)
    expected = autograd(case, **case.options)
    assert set(got.gradients) == set(trainable_keys(case.cfg))
    totals = ("loss", "homeostasis", "logits")
    errors = {name: relative_error(getattr(got, name), getattr(expected, name)) for name in totals}
    errors |= {f"u.{name}": relative_error(got.u[name], u) for name, u in expected.u.items()}
    errors |= {key: relative_error(got.gradients[key], g) for key, g in expected.gradients.items()}
    errors |= {f"state.{key}": relative_error(got.state[key], a) for key, a in expected.state.items()}
    print("worst", max(errors.values()), max(errors, key=errors.get))
    assert max(errors.values()) <= TOLERANCE, {k: e for k, e in errors.items() if e > TOLERANCE}


def has_gate(cfg, from_embedding):
    return any(p.kind == "gate" and (p.src == "embedding") == from_embedding for p in cfg.projections)


def test_drawn_cases_cover_the_model():
    """The parity above is worth as much as what its seeds contain."""
    seen = [drawn(seed) for seed in SEEDS]
    has = {
        "binary": lambda c, _: not c.cfg.graded,
        "graded": lambda c, _: c.cfg.graded,
        "bounded spikes": lambda c, r: c.cfg.max_spike and any((u + 1 > c.cfg.max_spike).any() for u in r.u.values()),
        "tied": lambda c, _: c.cfg.tie_decoder,
        "untied": lambda c, _: not c.cfg.tie_decoder,
        "gate": lambda c, _: has_gate(c.cfg, from_embedding=False),
        "embedding gate": lambda c, _: has_gate(c.cfg, from_embedding=True),
        "embedding spoken": lambda c, _: "proj.embedding.broca_out.drive.0.blocks" in c.params,
        "feedback": lambda c, _: any(p.delay > 1 for p in c.cfg.projections),
        "recurrent": lambda c, _: any(p.src == p.dst for p in c.cfg.projections),
        "no history": lambda c, _: any(history(c.cfg, r.name) == 0 for r in c.cfg.regions),
        "resets": lambda c, _: c.options["resets"] is not None and c.options["resets"][:, 1:].any(),
        "masked": lambda c, _: c.options["weights"] is not None and (c.options["weights"] == 0).any(),
        "signed": lambda c, _: c.options["normalize"] == "abs",
        "state": lambda c, _: c.options["state"] is not None,
        "dropout": lambda c, _: "masks" in c.options,
        "sparse": lambda c, r: any((m == 0).mean() >= 0.5 for m in r.matrices.values()),
        "spikes": lambda c, r: all(0 < np.mean(s > 0) < 0.6 for s in r.s.values()),
    }
    count = {name: sum(bool(test(*pair)) for pair in seen) for name, test in has.items()}
    assert min(count.values()) >= 5, count


@pytest.mark.parametrize("seed", SEEDS)
def test_batched_rule_equals_eligibility_traces(seed):
    case, got = drawn(seed)
    top = max(case.cfg.regions, key=lambda r: r.level).name
    traced = eligibility_gradients(case.cfg, case.params, top, case.ids, case.targets, **case.options)
    assert len(traced) == 1 + sum(p.dst == top for p in case.cfg.projections)
    errors = {key: relative_error(g, got.gradients[key]) for key, g in traced.items()}
    print("worst", max(errors.values()), max(errors, key=errors.get))
    assert max(errors.values()) <= TOLERANCE, errors


def test_eligibility_traces_refuse_a_region_that_others_hear():
    case = next(case for case, _ in map(drawn, SEEDS) if has_gate(case.cfg, from_embedding=False))
    heard = next(p.src for p in case.cfg.projections if p.kind == "gate" and p.src != "embedding")
    with pytest.raises(ValueError, match="heard by another region"):
        eligibility_gradients(case.cfg, case.params, heard, case.ids, case.targets)


def cut(options, tokens):
    """The options of a call to those tokens alone."""
    per_token = ("weights", "resets")
    return {k: a[:, tokens] if k in per_token and a is not None else a for k, a in options.items()}


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(0, 11))
def test_two_calls_equal_one(case, first):
    """The carried state is everything that later tokens need of earlier ones."""
    first, weights = min(first, case.ids.shape[1] - 1), case.options["weights"]
    divisor = float(case.ids.size if weights is None else np.abs(weights).sum())
    whole = oracle(case, divisor=divisor)
    state, loss, parts = case.options["state"], 0.0, []
    for tokens in (slice(0, first), slice(first, None)) if first else (slice(0, None),):
        options = {**cut(case.options, tokens), "state": state, "divisor": divisor}
        ids, targets = case.ids[:, tokens], case.targets[:, tokens]
        parts.append(forward_backward(case.cfg, case.params, ids, targets, **options))
        state, loss = parts[-1].state, loss + parts[-1].loss
    assert loss == pytest.approx(whole.loss, rel=1e-12, abs=1e-12)
    for group in ("u", "s"):
        for name, a in getattr(whole, group).items():
            joined = np.concatenate([getattr(part, group)[name] for part in parts], axis=1)
            assert relative_error(joined, a) <= 1e-12, (group, name)
    assert relative_error(np.concatenate([part.broca for part in parts], axis=1), whole.broca) <= 1e-12
    assert set(state) == set(whole.state) == set(zero_state(case.cfg, 1))
    assert max(relative_error(state[key], a) for key, a in whole.state.items()) <= 1e-12
    for r in case.cfg.regions:
        v, kept = (whole.state[f"region.{r.name}.{x}"] for x in ("v", "spikes"))
        assert not kept.size or np.array_equal(kept[:, 0], emit(v - 1, case.cfg))


@settings(max_examples=20, deadline=None)
@given(cases(), st.integers(0, 11))
def test_reset_starts_a_stream_anew(case, start):
    start = min(start, case.ids.shape[1] - 1)
    resets = np.zeros(case.ids.shape, bool)
    resets[:, start] = True
    whole = oracle(case, resets=resets)
    tail = slice(start, None)
    options = {**cut(case.options, tail), "state": None, "resets": None}
    fresh = forward_backward(case.cfg, case.params, case.ids[:, tail], case.targets[:, tail], **options)
    assert relative_error(whole.broca[:, tail], fresh.broca) <= 1e-12
    assert max(relative_error(whole.state[key], a) for key, a in fresh.state.items()) <= 1e-12


def test_forced_spikes():
    case, got = drawn(3)
    again = oracle(case, spikes=got.u)
    assert max(relative_error(g, got.gradients[key]) for key, g in again.gradients.items()) <= 1e-14
    shifted = {name: u + 0.5 for name, u in got.u.items()}
    forced = oracle(case, spikes=shifted)
    for r in case.cfg.regions:
        assert np.array_equal(forced.u[r.name], shifted[r.name])
        assert np.array_equal(forced.s[r.name], emit(shifted[r.name], case.cfg))
        assert np.array_equal(forced.state[f"region.{r.name}.v"], shifted[r.name][:, -1] + 1)
    assert forced.loss != got.loss


def test_normalisation_and_counts():
    case = random_case(5, rate_weight=0.5)
    B, T = case.ids.shape
    weights = np.where(np.arange(B * T).reshape(B, T) % 3 == 0, 0.0, 2.0)
    case.options |= {"weights": weights, "normalize": "sum"}
    got = oracle(case)
    assert got.tokens == (weights != 0).sum()
    assert got.accuracy == np.mean((got.predictions == case.targets)[weights != 0])
    assert oracle(case, divisor=4 * weights.sum()).loss == pytest.approx(got.loss / 4, rel=1e-14)
    assert oracle(case, weights=-weights, normalize="abs").loss == pytest.approx(-got.loss, rel=1e-14)
    with pytest.raises(ValueError, match="negative"):
        oracle(case, weights=-weights)
    silent = oracle(case, weights=0 * weights)
    assert (silent.loss, silent.tokens, silent.accuracy) == (0.0, 0, 0.0)
    assert not silent.gradients["decoder.bias"].any()
    assert silent.homeostasis == got.homeostasis > 0  # weights do not enter it
    assert any(silent.gradients[f"region.{r.name}.bias"].any() for r in case.cfg.regions)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors published with Random123 (Salmon et al. 2011)."""
    words = ([int(word, 16) for word in x.split()] for x in (counter, key, expected))
    counter, key, expected = (np.array(x, np.uint32) for x in words)
    assert np.array_equal(philox4x32(counter, key), expected)
    assert np.array_equal(philox4x32(np.stack([counter] * 3), key), np.stack([expected] * 3))


def test_dropout_masks():
    """Every multiplier by the words its own place gives, one at a time."""
    regions = (SimpleNamespace(name="pfc", neurons=32), SimpleNamespace(name="broca", neurons=64))
    cfg, seed, step, (B, T) = SimpleNamespace(regions=regions, dropout=0.25), 0x123456789ABCDEF0, 7, (2, 3)
    masks = dropout_masks(cfg, seed, step, B, T)
    assert {name: m.shape for name, m in masks.items()} == {"pfc": (B, T, 32), "broca": (B, T, 64)}
    for index, r in enumerate(regions):
        for place in np.ndindex(B, T, r.neurons):
            stream, token, neuron = place
            words = philox4x32([neuron // 4, token, stream, index], [0x9ABCDEF0, 0x12345678 ^ 7])
            kept = (int(words[neuron % 4]) >> 8) >= 0.25 * 2**24
            assert masks[r.name][place] == (np.float32(1 / 0.75) if kept else 0)
    assert masks["pfc"].dtype == np.float32
    kept = dropout_masks(cfg, seed, step, 64, 64)["broca"] > 0
    assert abs(kept.mean() - 0.75) < 5 * np.sqrt(0.25 * 0.75 / kept.size)
    assert not np.array_equal(dropout_masks(cfg, seed, step + 1, B, T)["pfc"], masks["pfc"])


def test_adamw_against_torch():
    torch = pytest.importorskip("torch", reason="PyTorch is the second opinion on AdamW")
    rng, lr, decay = np.random.default_rng(0), 0.01, 0.1
    synapses = "proj.pfc.pfc.drive.1.blocks"
    keys = ["embedding.weight", "decoder.weight", "decoder.bias", "region.pfc.bias", synapses]
    ours = {key: rng.normal(size=(6, 4)) for key in keys}
    theirs = {key: torch.tensor(a, requires_grad=True) for key, a in ours.items()}
    decayed = [theirs[key] for key in ("decoder.weight", synapses)]
    plain = [p for p in theirs.values() if all(p is not q for q in decayed)]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-8)
    moments, clipped = {}, []
    for step in range(6):
        gradients = {key: rng.normal(size=(6, 4)) * (0.02 if step % 2 else 1.0) for key in keys}
        ours, moments, norm = adamw(ours, gradients, moments, step, lr=lr, weight_decay=decay, clip=1.0)
        clipped.append(norm > 1.0)
        assert norm == pytest.approx(np.linalg.norm([np.linalg.norm(g) for g in gradients.values()]))
        for key, p in theirs.items():
            p.grad = torch.tensor(gradients[key] / max(norm, 1.0))
        optimizer.step()
    assert any(clipped) and not all(clipped)
    assert max(relative_error(ours[key], p.detach().numpy()) for key, p in theirs.items()) <= 1e-13


def test_adamw_leaves_unseen_rows_of_an_untied_embedding():
    params = {"embedding.weight": np.ones((3, 2)), "decoder.weight": np.ones((3, 2))}
    first = {"embedding.weight": np.outer([0.1, 0, 0], [1, 1]), "decoder.weight": np.full((3, 2), 0.1)}
    second = {**first, "embedding.weight": np.outer([0, 0.1, 0], [1, 1])}
    one, moments, _ = adamw(params, first, {}, 0, lr=0.1)
    two, after, _ = adamw(one, second, moments, 1, lr=0.1)
    assert np.array_equal(two["embedding.weight"][[0, 2]], one["embedding.weight"][[0, 2]])
    assert np.array_equal(after["embedding.weight"][0][0], moments["embedding.weight"][0][0])
    # Row 1 is new at the second step, yet corrected by the global step: 1 - 0.9^2 and 1 - 0.98^2.
    size = 0.1 * (0.1 / 0.19) / np.sqrt(0.02 / (1 - 0.98**2))
    np.testing.assert_allclose(two["embedding.weight"][1], 1 - size, rtol=1e-6)
    by_ids = adamw(one, second, moments, 1, lr=0.1, touched=np.array([0, 1]))[0]["embedding.weight"]
    assert (by_ids[0] != one["embedding.weight"][0]).all() and (by_ids[2] == 1).all()
    tied = {"embedding.weight": params["embedding.weight"]}
    stepped, moments, _ = adamw(tied, {"embedding.weight": first["embedding.weight"]}, {}, 0)
    stepped_again, _, _ = adamw(stepped, {"embedding.weight": second["embedding.weight"]}, moments, 1)
    assert (stepped_again["embedding.weight"][0] != stepped["embedding.weight"][0]).all()
    frozen, _, norm = adamw(params, {**first, "decoder.weight": np.full((3, 2), np.nan)}, {}, 0)
    assert np.isnan(norm) and all(frozen[key] is params[key] for key in params)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.25, 0.5, 0.125, 0.125]),
        ({"temperature": 0.5}, [0.0625 / 0.34375, 0.25 / 0.34375, 0.015625 / 0.34375, 0.015625 / 0.34375]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 3}, [2 / 7, 4 / 7, 1 / 7, 0]),  # the tie goes to the lower id
        ({"top_k": 9}, [0.25, 0.5, 0.125, 0.125]),
        ({"top_p": 0.0}, [0, 1, 0, 0]),
        ({"top_p": 0.49}, [0, 1, 0, 0]),
        ({"top_p": 0.51}, [1 / 3, 2 / 3, 0, 0]),
        ({"top_p": 0.76}, [2 / 7, 4 / 7, 1 / 7, 0]),
        ({"top_k": 3, "top_p": 0.55}, [0, 1, 0, 0]),  # 4/7 of what top-k left, though only 1/2 of all
    ],
)
def test_sampling_probabilities(options, expected):
    logits = np.log([0.25, 0.5, 0.125, 0.125]) + 3.0
    np.testing.assert_allclose(sampling_probabilities(logits, **options), expected, rtol=1e-14)
    pair = sampling_probabilities(np.stack([np.zeros(4), logits]), **options)
    np.testing.assert_allclose(pair[1], expected, rtol=1e-14)


def test_sampling_ties_and_edges():
    kept = np.flatnonzero(sampling_probabilities(np.arange(64) % 2, top_k=40))
    assert np.array_equal(kept, sorted([*range(1, 64, 2), *range(0, 16, 2)]))
    assert np.flatnonzero(sampling_probabilities(np.zeros(64), top_p=0.5)).size == 32  # 32/64 reaches 0.5
    # 59 rounded shares of 1/59 add up to less than this top_p: no token outside top-k may fill the gap.
    assert np.count_nonzero(sampling_probabilities(np.zeros(118), top_k=59, top_p=np.nextafter(1, 0))) == 59


def test_retry_counts_what_it_throws_away():
    near = [0.0, -9e-5, 1.50009, 0.5, 0.0]  # the third is next to the bound of a graded spike, 1 + u = 2.5
    cases = [SimpleNamespace(u=u, cfg=SimpleNamespace(max_spike=2.5)) for u in near]
    answer_of = lambda case: SimpleNamespace(u={"far": np.ones(2), "near": np.array([1.0, case.u])})
    case, answer, redraws = retry_off_threshold(cases.__getitem__, answer_of)
    assert (case.u, answer.u["near"][1], redraws) == (0.5, 0.5, 3)
    with pytest.raises(RuntimeError, match="3 draws"):
        retry_off_threshold(cases.__getitem__, answer_of, attempts=3)
