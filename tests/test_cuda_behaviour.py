"""Models on the GPU as users run them: every size trains in the memory planned, bits repeat, checkpoints cross."""

import dataclasses
import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gpu_support import free_bytes
from sanitizer_suite import SPARSE
from test_determinism import CONFIG, batch, build, contents, train

import neurogen_cy as ng
from neurogen_cy.connectome import initial_parameters

pytestmark = pytest.mark.gpu
PRECISIONS = ("fp32", "bf16", "fp8")
PAGE = 2 << 20  # bytes: what the driver hands out at a time
PLAN_TOLERANCE = 0.05

BASE = ng.Config.preset("base", vocab_size=256)


def repeated(cfg, B, T):
    """One batch to be learnt by heart."""
    rng = np.random.default_rng(5)
    return tuple(rng.integers(0, cfg.vocab_size, (2, B, T)).astype(np.int32))


@pytest.mark.parametrize(
    ("preset", "B", "T"), [("tiny", 64, 128), ("small", 32, 128), ("base", 4, 64), ("large", 1, 16)]
)
def test_a_preset_trains_in_the_memory_that_was_planned(preset, B, T):
    """What the driver has less after construction is the plan, to 5 % and a page for each allocation; and so it stays.

    Context, kernels and what cuBLAS loads are there already: a first model of the same size has trained and gone.
    """
    cfg = ng.Config.preset(preset)
    arguments = {"backend": "cuda", "streams": B, "max_tokens": T, "_parameters": initial_parameters(cfg, 0)}
    ng.NeuroGen(cfg, **arguments).train_step_batch(*repeated(cfg, B, T))
    gc.collect()
    free = free_bytes()
    model = ng.NeuroGen(cfg, **arguments)
    taken = free - free_bytes()
    plan = ng.memory_plan(cfg, B, T, "cuda")
    planned, pages = sum(plan.values()), model.counters["device_allocations"]
    assert abs(taken - planned) <= PLAN_TOLERANCE * planned + pages * PAGE, (taken, plan)

    losses = [model.train_step_batch(*repeated(cfg, B, T)).loss for _ in range(6)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0], losses
    assert abs(free - free_bytes() - taken) <= PAGE, "training takes no memory of its own"
    assert model.counters["device_allocations"] == pages
    del model
    gc.collect()
    assert abs(free - free_bytes()) <= PAGE, "a model gives its memory back"


@pytest.mark.parametrize(
    ("preset", "precision", "B", "T"),
    [("tiny", "fp32", 3, 31), ("tiny", "bf16", 65, 31), ("base", "bf16", 4, 16), ("tiny", "fp8", 65, 31),
     ("base", "fp8", 4, 16)],
)
def test_two_runs_are_equal_bit_for_bit(preset, precision, B, T):
    cfg = ng.Config.preset(preset, dropout=0.1)
    params, (ids, targets) = initial_parameters(cfg, 1), repeated(cfg, B, T)
    resets = np.random.default_rng(2).random((B, T)) < 0.05
    ends = []
    for _ in range(2):
        model = ng.NeuroGen(
            cfg, backend="cuda", streams=B, max_tokens=T, seed=1, precision=precision, _parameters=params
        )
        results = [model.train_step_batch(ids, targets, resets=resets) for _ in range(5)]
        ends.append((results, contents(model)))
        del model
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("precision", "brain"), [*((precision, "sparse") for precision in PRECISIONS), ("bf16", "dense")]
)
@pytest.mark.parametrize("B", [65, 130])
def test_streams_in_one_group_or_many_give_the_same_bits(monkeypatch, precision, brain, B):
    """In both brain launches; they are not equal to each other, sums have another order."""
    monkeypatch.setenv("NEUROGEN_BRAIN", brain)
    ends, plans = [], []
    for group in (None, "1", "32", "64", "1000"):
        if group is None:
            monkeypatch.delenv("NEUROGEN_STREAM_GROUP", raising=False)
        else:
            monkeypatch.setenv("NEUROGEN_STREAM_GROUP", group)
        model = build("cuda", streams=B, precision=precision)
        results = train(model, range(3))
        model.train_step_batch(*batch(3, B), record=True)
        spikes = [array.tobytes() for region in CONFIG.regions for array in model.recorded(region.name)]
        ends.append((results, spikes, contents(model)))
        plans.append(str(model.execution_plan))
    assert len(set(plans)) >= 4, f"the variable was not obeyed: {plans}"
    assert all(("dense" in plan) == (brain == "dense") for plan in plans)
    assert all(end == ends[0] for end in ends[1:])


def test_items_that_go_from_warp_to_warp_give_the_same_bits(monkeypatch):
    """`base` has so many tiles that warps take them in turn at 32 streams, and have their own at 8 (forward.cu)."""
    monkeypatch.setenv("NEUROGEN_BRAIN", "sparse")
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (3, 32, 24), dtype=np.int32)
    ends, plans = [], []
    for group in (None, "8"):
        if group is not None:
            monkeypatch.setenv("NEUROGEN_STREAM_GROUP", group)
        model = ng.NeuroGen(ng.Config.preset("base", vocab_size=256), backend="cuda", streams=32, max_tokens=24)
        results = [model.train_step_batch(part, np.roll(part, -1, 1).copy()) for part in ids]
        ends.append(([(result.loss, result.grad_norm) for result in results], contents(model)))
        plans.append(model.execution_plan["streams at a time"])
        del model
    assert plans == ["32", "8"]
    assert ends[0] == ends[1]


def trained(monkeypatch, brain, cfg, ids, resets, group=None):
    """All that calls with these ids leave behind, and the launch that made it."""
    monkeypatch.setenv("NEUROGEN_BRAIN", brain)
    monkeypatch.setenv("NEUROGEN_STREAM_GROUP", group or "100000")
    model = ng.NeuroGen(cfg, backend="cuda", streams=ids.shape[1], max_tokens=ids.shape[2], seed=1)
    results, spikes = [], []
    for part, cut in zip(ids, resets, strict=True):
        result = model.train_step_batch(part, np.roll(part, -1, 1).copy(), resets=cut, record=True)
        results.append((result.loss, result.grad_norm, result.homeostasis, result.rates))
        spikes += [array.tobytes() for region in cfg.regions for array in model.recorded(region.name)]
    assert any(np.frombuffer(array, np.float32).any() for array in spikes), "a silent brain says nothing"
    return (results, spikes, contents(model)), model.execution_plan["brain launch"]


@pytest.mark.parametrize(
    ("cfg", "B", "T", "groups"),
    [
        (SPARSE, 1, 40, (None,)), (SPARSE, 6, 11, (None,)), (SPARSE, 8, 40, (None,)), (SPARSE, 200, 5, (None, "48")),
        (SPARSE, 1000, 3, (None,)), (BASE, 1, 9, (None,)), (BASE, 5, 6, (None,)), (BASE, 8, 5, (None,)),
        (BASE, 9, 40, (None,)), (BASE, 33, 6, (None, "16")), (BASE, 64, 9, (None, "40")), (BASE, 100, 3, (None, "9")),
    ],
)  # fmt: skip
def test_weights_in_registers_or_in_shared_memory_give_the_same_bits(monkeypatch, cfg, B, T, groups):
    """The brain launches sum in one order, with and without resets."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, cfg.vocab_size, (4, B, T), dtype=np.int32)
    resets = [None, None, rng.random((B, T)) < 0.2, None]
    sparse, plan = trained(monkeypatch, "sparse", cfg, ids, resets)
    assert "a tile" not in plan
    for group in groups:
        end, plan = trained(monkeypatch, "registers", cfg, ids, resets, group)
        assert "a tile" in plan
        assert end == sparse


@pytest.mark.parametrize(("cfg", "B"), [(SPARSE, 900), (BASE, 20)], ids=["sparse", "base"])
def test_calls_of_any_size_one_after_the_other_give_the_same_bits(monkeypatch, cfg, B):
    """Spikes of a call are told from those that earlier ones have left, whatever rows those had."""
    rng = np.random.default_rng(0)
    sizes = (7, 3, 5, 7, 1, 7, 7, 2)  # the second half begins with spikes of -0
    parts = [rng.integers(0, cfg.vocab_size, (B, T), dtype=np.int32) for T in sizes]
    ends = []
    for brain in ("sparse", "registers"):
        monkeypatch.setenv("NEUROGEN_BRAIN", brain)
        model = ng.NeuroGen(cfg, backend="cuda", streams=B, max_tokens=max(sizes), seed=1)
        assert ("a tile" in model.execution_plan["brain launch"]) == (brain == "registers")
        said = []
        for number, part in enumerate(parts):
            if number == len(parts) // 2:
                model.load_state({key: np.where(a == 0, np.float32(-0.0), a) for key, a in model.state().items()})
            result = model.train_step_batch(part, np.roll(part, -1, 1).copy(), record=True)
            spikes = [model.recorded(region.name)[1] for region in cfg.regions]
            assert min(array.min() for array in spikes) == 0.0
            said += [result.loss, result.grad_norm, *(array.tobytes() for array in spikes)]
            if number % 3 == 0:
                said.append(model.evaluate(part, np.roll(part, -1, 1).copy()))
            if number % 3 == 1:
                said += [ids.tolist() for ids in model.generate(part[:, :2].copy(), 11, seed=2)]
        ends.append((said, contents(model)))
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("cfg", "B", "T"),
    [
        (SPARSE, 8, 20), (SPARSE, 33, 7), (SPARSE, 200, 5), (dataclasses.replace(SPARSE, dropout=0.2), 70, 6),
        (BASE, 64, 9), (BASE, 100, 3),
    ],
)  # fmt: skip
def test_credit_in_bulk_or_by_lanes_gives_the_same_bits(monkeypatch, cfg, B, T):
    """Where the device copies in bulk; on an older one, this compares a kernel with itself."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, cfg.vocab_size, (3, B, T), dtype=np.int32)
    ends = []
    for credit in ("lanes", "bulk"):
        monkeypatch.setenv("NEUROGEN_CREDIT", credit)
        model = ng.NeuroGen(cfg, backend="cuda", streams=B, max_tokens=T, seed=1, precision="bf16")
        norms = []
        for part, resets in zip(ids, (None, np.arange(B * T).reshape(B, T) % 7 == 3, None), strict=True):
            norms.append(model.train_step_batch(part, np.roll(part, -1, 1).copy(), resets=resets).grad_norm)
        ends.append((norms, contents(model)))
        del model
    assert ends[0] == ends[1]


def test_an_output_that_hears_the_embedding_itself(monkeypatch):
    """... sums over other things than spikes, which may have a sign of their own in calls of many streams."""
    more = ng.Projection("embedding", "broca_out", density=0.5)
    cfg = dataclasses.replace(SPARSE, projections=(*SPARSE.projections, more))
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (3, 900, 4), dtype=np.int32)
    ends = [trained(monkeypatch, brain, cfg, ids, [None] * 3) for brain in ("sparse", "registers")]
    assert ["a tile" in plan for _, plan in ends] == [False, True]
    assert ends[0][0] == ends[1][0]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_small_has_a_brain_launch_of_its_own(monkeypatch, dropout):
    """Bands of streams share what streams through shared memory, and the last group has fewer of them: same bits. The
    other launch's sums differ by rounding alone."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (2, 100, 12), dtype=np.int32)
    resets = rng.random((100, 12)) < 0.05 if dropout else None
    ends, plans = [], []
    for brain, group in (("", None), ("", "70"), ("", "16"), ("sparse", None)):
        monkeypatch.setenv("NEUROGEN_BRAIN", brain)
        monkeypatch.setenv("NEUROGEN_STREAM_GROUP", group or "100")
        cfg = ng.Config.preset("small", dropout=dropout)
        model = ng.NeuroGen(cfg, backend="cuda", streams=100, max_tokens=12, seed=1)
        results = [model.train_step_batch(part, np.roll(part, -1, 1).copy(), resets=resets) for part in ids]
        ends.append(([(result.loss, result.grad_norm) for result in results], contents(model)))
        plans.append(model.execution_plan["brain launch"])
        del model
    assert ["dense" in plan for plan in plans] == [True, True, True, False]
    assert ends[1] == ends[0] and ends[2] == ends[0]
    assert abs(ends[3][0][0][0] - ends[0][0][0][0]) <= 2e-3 * ends[0][0][0][0]


def test_the_dense_launch_does_not_care_where_calls_are_cut():
    """Single tokens too: a generation goes on from a training call's state."""
    ids = np.random.default_rng(0).integers(0, 256, (32, 6), dtype=np.int32)
    model = ng.NeuroGen(ng.Config.preset("small"), backend="cuda", streams=32, max_tokens=6, seed=1)
    assert "dense" in model.execution_plan["brain launch"]
    ends = []
    for cuts in ((6,), (1, 5), (1,) * 6):
        model.brain.reset()
        at = 0
        for length in cuts:
            part = np.ascontiguousarray(ids[:, at : at + length])
            model.backward_batch(part, part)
            at += length
        ends.append({key: array.tobytes() for key, array in model.state().items() if key != "broca.o"})
    assert ends[1] == ends[0] and ends[2] == ends[0]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tied", [False, True])
def test_saved_loaded_and_continued_equals_an_unbroken_run(tmp_path, precision, tied):
    """Each precision, tied or not; test_determinism.py does the same on every backend in its default precision."""
    cfg = dataclasses.replace(CONFIG, tie_decoder=tied)
    unbroken, stopped = (build("cuda", cfg, precision=precision) for _ in range(2))
    results = train(unbroken, range(8))
    train(stopped, range(4))
    stopped.save(tmp_path / "at4")
    resumed = ng.NeuroGen.load(tmp_path / "at4", backend="cuda", precision=precision)
    assert train(resumed, range(4, 8)) == results[4:]
    assert contents(resumed) == contents(unbroken)


def test_a_checkpoint_goes_from_cpu_to_gpu_and_back(tmp_path):
    """Weights, moments and state arrive bit for bit, and either machine goes on as the other would have.

    Losses of the following steps may differ by rounding, which Adam's division by sqrt(v) enlarges where a gradient is
    rounding itself: 1e-4 of the loss is a thousand units in the last place.
    """
    start, stay = build("cpu"), build("cpu")
    train(start, range(3))
    expected = train(stay, range(9))
    folders = iter(str(tmp_path / name) for name in "abc")
    model, step = start, 3
    for backend, precision in (("cuda", "fp32"), ("cpu", "fp32")):
        folder = next(folders)
        model.save(folder)
        moved = ng.NeuroGen.load(folder, backend=backend, precision=precision, threads=1)
        assert moved.backend == backend and contents(moved) == contents(model)
        losses = [result.loss for result in train(moved, range(step, step + 3))]
        assert losses == pytest.approx([result.loss for result in expected[step : step + 3]], rel=1e-4)
        model, step = moved, step + 3
    folder = next(folders)
    start.save(folder)
    moved = ng.NeuroGen.load(folder, backend="cuda", precision="bf16")
    mine, theirs = moved.parameters(), start.parameters()
    assert mine.keys() == theirs.keys() and moved.step == start.step
    assert all(np.array_equal(view.numpy(), theirs[key].numpy()) for key, view in mine.items())
    # Few tokens and graded spikes: one spike that rounding tips over is some percent of such a loss.
    losses = [result.loss for result in train(moved, range(3, 6))]
    assert losses == pytest.approx([result.loss for result in expected[3:6]], rel=5e-2)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A checkpoint, written on the CPU, of a model that knows some sentences; and those."""
    text = np.frombuffer(b"the brain hears a word, and says the next one. then it listens. " * 40, np.uint8)
    model = ng.NeuroGen(ng.Config.preset("tiny"), backend="cpu", streams=4, max_tokens=64, seed=2)
    rows = text[: len(text) // 4 * 4].reshape(4, -1).astype(np.int32)
    for t in list(range(0, rows.shape[1] - 64, 64)) * 6:
        model.train_step_batch(*(np.ascontiguousarray(rows[:, t + k : t + k + 64]) for k in (0, 1)))
    folder = tmp_path_factory.mktemp("learnt") / "model"
    model.save(folder)
    return folder, rows


def next_logits(model, ids):
    """Logits after the tokens `ids` of one stream, by the CPU, from zero state."""
    model.brain.reset()
    for token in ids:
        model.brain.step(model.embedding.encode(np.full(model.streams, token, np.int32)))
    out = np.empty((model.streams, model.config.vocab_size), np.float32)
    model.decoder.logits_into(model.brain.broca_output(), out)
    return out[0]


def test_greedy_generation_says_what_the_cpu_says(learnt):
    """The same ids, up to a token where the CPU's best two are within rounding, which is no disagreement."""
    folder, rows = learnt
    cpu = ng.NeuroGen.load(folder, backend="cpu")
    gpu = ng.NeuroGen.load(folder, backend="cuda", precision="fp32")
    prompt, more = rows[0, :17], 200
    said = [np.concatenate(list(m.generate(prompt, more, greedy=True))) for m in (cpu, gpu)]
    assert all(len(ids) == more for ids in said) and len(np.unique(said[0])) > 5
    apart = np.flatnonzero(said[0] != said[1])
    if len(apart):
        logits = next_logits(cpu, [*prompt, *said[0][: apart[0]]])
        one, other = (logits[ids[apart[0]]] for ids in said)
        assert abs(one - other) <= 1e-3 * np.abs(logits).max(), f"token {apart[0]}: {one} against {other}"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_generation_repeats_by_its_seed_and_reads_the_device_in_batches(learnt, precision):
    folder, rows = learnt
    model = ng.NeuroGen.load(folder, backend="cuda", precision=precision)

    def said(seed):
        return np.stack(list(model.generate(rows[:, :9], 96, temperature=1.5, seed=seed)))

    first, syncs = said(1), model.counters["syncs"]
    again, syncs = said(1), model.counters["syncs"] - syncs
    assert np.array_equal(first, again) and not np.array_equal(first, said(2))
    assert syncs < 96 / 2, "sampled tokens stay on the device between steps"


@pytest.mark.parametrize("options", [{}, {"top_k": 9}], ids=["all", "top_k"])
@pytest.mark.parametrize("streams", [1, 3, 9])
def test_tokens_drawn_in_bf16_are_those_of_the_loop(streams, options):
    """Up to eight streams' logits have a kernel of their own. Where every token may be drawn the draw adds the bias."""
    model, prompts = build("cuda", streams=streams, precision="bf16"), batch(0, streams)[0]
    bias = np.random.default_rng(streams).standard_normal(model.config.vocab_size).astype(np.float32)
    model.load_parameters({"decoder.bias": bias})
    for ids in prompts.T:
        model.brain.step(model.embedding.encode(ids.copy()))
    expected = np.empty((20, streams), np.int32)
    for position, ids in enumerate(expected):
        model.decoder.sample_into(model.brain.broca_output(), ids, seed=5, position=position, **options)
        model.brain.step(model.embedding.encode(ids))
    assert np.array_equal(np.stack(list(model.generate(prompts, 20, seed=5, **options))), expected)
    assert len(np.unique(expected)) > 5


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 1e-2)])
def test_evaluation_is_the_cpus(learnt, precision, tolerance):
    """On the text backwards: what the model knows by heart has next to no loss to compare."""
    folder, rows = learnt
    ids, targets = rows[:, :0:-1].copy(), rows[:, -2::-1].copy()
    cpu = ng.NeuroGen.load(folder, backend="cpu").evaluate(ids, targets)
    gpu = ng.NeuroGen.load(folder, backend="cuda", precision=precision).evaluate(ids, targets)
    assert gpu == pytest.approx(cpu, rel=tolerance) and cpu > 1


def test_the_command_takes_the_gpu_by_itself(tmp_path):
    command = [sys.executable, "-m", "neurogen_cy", "train", "--steps", "3", "--streams", "4", "--tokens", "32"]
    root = Path(ng.__file__).parents[1]
    run = subprocess.run([*command, "--out", str(tmp_path / "run")], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "cuda" in run.stdout and (tmp_path / "run" / "last" / "meta.json").exists()
