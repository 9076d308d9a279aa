"""State carries: however a text is cut into calls, streams and windows, the brain lives through the same."""

import numpy as np
import pytest
import reference

import neurogen_cy as ng

V, D, B, T = 23, 32, 3, 12
CONFIG = ng.Config(
    vocab_size=V,
    dim=D,
    regions=(ng.Region("high", 64, 3), ng.Region("low", 32, 0), ng.Region("middle", 96, 1)),
    projections=(
        ng.Projection("embedding", "low", gain=2.0),
        ng.Projection("embedding", "high", kind="gate"),
        ng.Projection("low", "middle"),
        ng.Projection("low", "low", delay=2),
        ng.Projection("middle", "middle", delay=1, density=0.5),
        ng.Projection("middle", "high", density=0.4),
        ng.Projection("high", "low", delay=4),
        ng.Projection("high", "middle", delay=3),
        ng.Projection("middle", "broca_out"),
        ng.Projection("high", "broca_out"),
    ),
)
RNG = np.random.default_rng(7)
IDS, TARGETS = RNG.integers(0, V, (2, B, T), np.int32)
RESETS = RNG.random((B, T)) < 0.15
RESETS[0, 0] = RESETS[1, 5] = RESETS[1, 6] = True


@pytest.fixture
def make(backend):
    def make(cfg=CONFIG, **settings):
        settings = {"streams": B, "max_tokens": T, "seed": 4, "threads": 1, "precision": "fp32", **settings}
        return ng.NeuroGen(cfg, backend=backend, **settings)

    return make


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for key, a in expected.items():
        assert np.array_equal(state[key], a), key
    assert any(a.any() for a in expected.values())


def listen(m, cuts, resets=RESETS):
    """Calls that end at `cuts`: losses [T], u of every region [B, T, n], predictions [B, T]."""
    losses, u, said = [], [], []
    for begin, end in zip([0, *cuts], cuts):
        part = slice(begin, end)
        predictions = np.empty((B, end - begin), np.int32)
        result = m.backward_batch(
            IDS[:, part].copy(), TARGETS[:, part].copy(), resets=resets[:, part].copy(),
            predictions_out=predictions, record=True,
        )  # fmt: skip
        losses.append(result.loss * (end - begin))
        u.append([m.recorded(region.name)[0] for region in CONFIG.regions])
        said.append(predictions)
    return sum(losses) / T, [np.concatenate(parts, 1) for parts in zip(*u)], np.concatenate(said, 1)


def cross_entropy(logits, targets):
    top = logits.max(axis=-1, keepdims=True)
    return np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0] - np.take_along_axis(logits, targets, -1)[..., 0]


def step_through(m, ids=IDS, resets=RESETS):
    """Token by token with `brain.step`: logits [T, B, V]."""
    out = np.empty((ids.shape[1], B, V), np.float32)
    for t in range(ids.shape[1]):
        m.brain.reset(np.flatnonzero(resets[:, t]))
        m.brain.step(m.embedding.encode(ids[:, t].copy()))
        m.decoder.logits_into(m.brain.broca_output(), out[t])
    return out.astype(np.float64)


@pytest.mark.parametrize("cuts", [(5, 12), (1, 2, 4, 12), tuple(range(1, 13))])
def test_cutting_a_text_into_calls_changes_nothing(make, cuts):
    whole, parts = make(), make()
    loss, u, said = listen(whole, (T,))
    assert all(0.02 < (a > 0).mean() < 0.6 for a in u)
    loss_of_parts, u_of_parts, said_of_parts = listen(parts, cuts)
    assert all(np.array_equal(a, b) for a, b in zip(u_of_parts, u))  # the brain bit for bit
    assert_same(parts.state(), whole.state())
    assert loss_of_parts == pytest.approx(loss, rel=1e-6)
    assert np.mean(said_of_parts == said) > 0.9  # two tokens at the same height may swap in float32


def test_stepping_is_the_same_as_one_call(make):
    whole, steps = make(), make()
    loss, _, said = listen(whole, (T,))
    logits = step_through(steps)
    assert_same(steps.state(), whole.state())
    assert np.array_equal(steps.brain.broca_output(), whole.brain.broca_output())
    losses = cross_entropy(logits, TARGETS.T[..., None])
    assert losses.mean() == pytest.approx(loss, rel=1e-6)
    best = np.sort(logits, axis=-1)
    clear = (best[..., -1] - best[..., -2] > 1e-5).T
    assert clear.mean() > 0.9 and np.array_equal(logits.argmax(-1).T[clear], said[clear])


def test_stepping_agrees_with_the_oracle(make):
    m = make()
    params = {key: view.numpy() for key, view in m.parameters().items()}
    expected = reference.forward_backward(CONFIG, params, IDS, TARGETS, resets=RESETS)
    assert min(np.abs(u).min() for u in expected.u.values()) > 1e-4  # else a spike hangs on rounding
    np.testing.assert_allclose(step_through(m).swapaxes(0, 1), expected.logits, rtol=1e-4, atol=1e-4)


def test_a_reset_makes_a_fresh_stream(make):
    m, resets = make(), np.zeros((B, T), bool)
    resets[1, 5] = True
    _, u, _ = listen(m, (T,), resets)
    state = m.state()
    alone = make(streams=1)
    alone.train_step_batch(IDS[1, 5:], TARGETS[1, 5:], record=True)
    for region, parts in zip(CONFIG.regions, u):
        assert np.array_equal(parts[1:2, 5:], alone.recorded(region.name)[0])
    assert_same({key: a[1:2] for key, a in state.items()}, alone.state())
    m.brain.reset([0, 2])
    for key, a in m.state().items():
        assert not a[[0, 2]].any() and np.array_equal(a[1], state[key][1]), key
    m.brain.reset()
    assert not any(a.any() for a in m.state().values())
    assert not m.brain.broca_output().any()


def test_spikes_are_not_negative(make):
    m, other = make(), make()
    listen(m, (7, T))
    state = m.state()
    key = next(key for key, a in state.items() if key.endswith(".spikes") and a.size)
    bad = {**state, key: state[key].copy()}
    bad[key].flat[0] = -1.5
    with pytest.raises(ValueError, match=rf"state: {key}: expected spikes >= 0, got -1\.5"):
        other.load_state(bad)
    assert not any(a.any() for a in other.state().values()), "nothing was loaded"
    other.load_state({key: np.where(a == 0, np.float32(-0.0), a) for key, a in state.items()})
    assert other.backward_batch(IDS, TARGETS).loss == m.backward_batch(IDS, TARGETS).loss


def test_state_goes_to_other_models_and_streams(make):
    m, other = make(), make()
    listen(m, (7, T))
    order = [2, 0, 1]
    other.load_state({key: a[order] for key, a in m.state().items()})
    assert_same({key: a[np.argsort(order)] for key, a in other.state().items()}, m.state())
    for ids in (IDS, TARGETS):
        expected = m.backward_batch(ids, ids, record=True)
        got = other.backward_batch(ids[order], ids[order], record=True)
        assert got.loss == pytest.approx(expected.loss, rel=1e-6) and got.rates == expected.rates
        for region in CONFIG.regions:
            assert np.array_equal(other.recorded(region.name)[0], m.recorded(region.name)[0][order])
    assert_same(other.state(), {key: a[order] for key, a in m.state().items()})


@pytest.mark.parametrize("sizes", [(1, 1), (1, 5), (2, 3), (7, 2), (3, 64)])
def test_evaluate_does_not_depend_on_streams_and_windows(make, sizes):
    shape = (7, 40)
    ids, targets = np.random.default_rng(0).integers(0, V, (2, *shape))
    resets = np.random.default_rng(1).random(shape) < 0.1
    m = make(streams=shape[0], max_tokens=8)
    losses = []
    for begin in range(0, 40, 8):
        window = [a[:, begin : begin + 8].copy() for a in (ids, targets, resets)]
        losses.append(m.backward_batch(*window[:2], resets=window[2]).loss)
    other = make(streams=sizes[0], max_tokens=sizes[1])
    other.brain.step(np.ones((sizes[0], D), np.float32))
    before = other.state()
    assert other.evaluate(ids, targets, resets) == pytest.approx(np.mean(losses), rel=1e-6)
    assert_same(other.state(), before)
    assert (other.step, other.calls) == (0, 0)
    alone = [other.evaluate(ids[i], targets[i], resets[i]) for i in range(7)]
    assert np.mean(alone) == pytest.approx(np.mean(losses), rel=1e-6) and np.ptp(alone) > 1e-3


def run(m, prompts, count, **options):
    return np.stack(list(m.generate(prompts, count, **options)), 1)


PROMPTS = [IDS[0, :1], IDS[1, :9].tolist(), IDS[2, :4], np.tile(IDS[0], 3), IDS[1, :4]]


@pytest.mark.parametrize("sizes", [(1, 5), (2, 4), (5, 36)])
def test_prompts_of_unequal_length_do_not_meet(make, sizes):
    wide = make(streams=1, max_tokens=36)
    alone = np.concatenate([run(wide, [prompt], 8, greedy=True) for prompt in PROMPTS])
    assert len({tuple(row) for row in alone}) == 5 and all(len(set(row)) > 1 for row in alone.tolist())
    m = make(streams=sizes[0], max_tokens=sizes[1])
    m.brain.step(np.ones((sizes[0], D), np.float32))
    before = m.state()
    together = run(m, PROMPTS, 8, greedy=True)  # a prompt longer than max_tokens among them
    assert np.array_equal(together, alone) and together.dtype == np.int32
    assert_same(m.state(), before)


def test_generate_is_the_loop_one_would_write(make):
    m, loop = make(), make()
    expected = np.empty((6, B), np.int32)
    step_through(loop, IDS[:, :4], np.zeros((B, 4), bool))
    for position, row in enumerate(expected):
        loop.decoder.sample_into(loop.brain.broca_output(), row, temperature=0.8, top_k=9, seed=5, position=position)
        loop.brain.step(loop.embedding.encode(row))
    options = {"temperature": 0.8, "top_k": 9}
    assert np.array_equal(run(m, IDS[:, :4], 6, seed=5, **options), expected.T)
    assert np.array_equal(run(m, IDS[:, :4], 6, seed=5, **options), expected.T)  # same seed, same tokens
    assert not np.array_equal(run(m, IDS[:, :4], 6, seed=6, **options), expected.T)
    assert np.array_equal(run(m, IDS[:, :4], 6), run(m, IDS[:, :4], 6, seed=m.seed))


def draws(m, state, broca, counts, seed=5):
    """What the engine draws in calls of these numbers of tokens."""
    out, options = [], {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "greedy": False, "seed": seed}
    for count in counts:
        out.append(m._engine.generate(state, broca, count, position=sum(map(len, out)), **options))
    return np.concatenate(out)


def test_tokens_drawn_ahead_are_those_of_the_loop(make):
    m = make()
    ends = []
    for counts in ([1] * 12, [12], [5, 7]):
        state, broca = m._engine.new_state(4), np.ones((4, D), np.float32)
        ids = draws(m, state, broca, counts)
        assert ids.shape == (12, 4) and ids.dtype == np.int32
        ends.append((ids.tobytes(), broca.tobytes(), {key: a.tobytes() for key, a in state.arrays().items()}))
    assert ends[0] == ends[1] == ends[2] and len(np.unique(ids)) > 5
    state, broca, token = m._engine.new_state(4), np.ones((4, D), np.float32), np.empty(4, np.int32)
    for position, expected in enumerate(ids):
        m.decoder.sample_into(broca, token, temperature=0.8, top_k=9, top_p=0.9, seed=5, position=position)
        assert np.array_equal(token, expected)
        m._engine.advance(state, token[:, None].copy(), broca)
    assert ends[0][1:] == (broca.tobytes(), {key: a.tobytes() for key, a in state.arrays().items()})
    with pytest.raises(ValueError, match="count: expected an integer >= 1, got 0"):
        draws(m, state, broca, [0])


@pytest.mark.parametrize("ahead", [1, 2, 5, 100])
def test_generate_does_not_depend_on_how_far_ahead_it_draws(make, monkeypatch, ahead):
    m = make()
    stops = [int(run(m, IDS[:, :4], 9, greedy=True)[0, 3])]
    expected = [run(m, PROMPTS, 9), run(m, IDS[:, :4], 9, greedy=True, stop_ids=stops)]
    monkeypatch.setattr(m._module, "TOKENS_AHEAD", ahead)
    got = [run(m, PROMPTS, 9), run(m, IDS[:, :4], 9, greedy=True, stop_ids=stops)]
    assert all(np.array_equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_what_was_said_before_the_neurons_overflow_is_heard(make, monkeypatch, ahead):
    """A token whose embedding no neuron survives ends a generation, and costs none of the tokens before it."""
    m = make(streams=1)
    monkeypatch.setattr(m._module, "TOKENS_AHEAD", ahead)
    said = run(m, [IDS[0, :3]], 40, temperature=3.0, seed=1)[0]
    deadly = next(int(i) for i in said[5:] if i not in said[:5] and i not in IDS[0, :3])
    before = int(np.flatnonzero(said == deadly)[0])
    rows = m.parameters()["embedding.weight"].numpy()
    rows[deadly] = np.resize([3e38, -3e38], D)
    m.load_parameters({"embedding.weight": rows})
    heard = []
    with pytest.raises(OverflowError, match="neuron state: expected finite values"):
        for ids in m.generate([IDS[0, :3]], 40, temperature=3.0, seed=1):
            heard.append(int(ids[0]))
    assert heard == said[:before].tolist() and before >= 5


def test_a_conversation_goes_on_in_the_models_state(make):
    m, loop, silent = make(), make(), np.zeros((B, 40), bool)
    for turn in range(2):
        prompts = [IDS[0, turn : turn + 3], IDS[1, turn : turn + 1], IDS[2, turn : turn + 2]]
        tokens = m.generate(prompts, 7, carry=True, greedy=True)
        said = np.stack([next(tokens) for _ in range(4)], 1)  # whoever stops listening early has heard all he has
        for stream, prompt in enumerate(prompts):
            heard = np.concatenate([prompt, said[stream]])[None].repeat(B, 0).astype(np.int32)
            others = [s for s in range(B) if s != stream]
            before = {key: a[others] for key, a in loop.state().items()}
            step_through(loop, heard, silent)
            after = loop.state()
            for key, a in after.items():
                a[others] = before[key]
            loop.load_state(after)
        assert_same(m.state(), loop.state())


def test_streams_stop_at_their_stop_id(make):
    m = make()
    free = run(m, IDS[:, :4], 12, greedy=True)
    stops = [int(free[0, 2]), int(free[1, 5]), int(free[2, 3])]
    ends = [int(np.flatnonzero(np.isin(row, stops))[0]) for row in free]
    assert len(set(ends)) > 1
    stopped = run(m, IDS[:, :4], 12, greedy=True, stop_ids=stops)
    assert stopped.shape == (B, max(ends) + 1)
    for row, expected, end in zip(stopped, free, ends):
        assert np.array_equal(row[: end + 1], expected[: end + 1]) and (row[end + 1 :] == -1).all()
    # A conversation has heard no more of a stream than was said.
    talker, loop = make(), make()
    run(talker, IDS[:, :4], 12, greedy=True, stop_ids=stops, carry=True)
    for stream, end in enumerate(ends):
        loop.brain.reset()
        heard = np.concatenate([IDS[stream, :4], free[stream, : end + 1]])[None].repeat(B, 0)
        step_through(loop, heard.astype(np.int32), np.zeros((B, 40), bool))
        state = loop.state()
        assert_same({key: a[[stream]] for key, a in talker.state().items()}, {key: a[[0]] for key, a in state.items()})
