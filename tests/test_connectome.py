"""Initial parameters: keys and shapes, the dealing of block columns, streams per tensor, distributions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from neurogen_cy.config import Config, Projection, Region
from neurogen_cy.connectome import (
    block_columns,
    default_gain,
    initial_parameters,
    parameter_shapes,
    tensor_generator,
    trainable_keys,
)

SLOW = Region("slow", 8192, 2, tau=(5, 60), tau_adapt=(10, 400), a=(-0.5, 0.25), b=(1, 4), bias=-0.75)
CFG = Config(
    vocab_size=300,
    dim=96,
    regions=(Region("fast", 320, 0), SLOW),
    projections=(
        Projection("embedding", "fast"),
        Projection("embedding", "slow", kind="gate", density=0.4),
        Projection("fast", "slow", density=0.3),
        Projection("fast", "slow", kind="gate", density=0.1, gain=0.7),
        Projection("slow", "slow", 1, density=1 / 256),
        Projection("slow", "fast", 3, density=0.01),
        Projection("slow", "broca_out", density=8 / 256),
        Projection("fast", "broca_out"),
    ),
)
PARAMS = initial_parameters(CFG, 0)
SHAPES = st.integers(1, 40).flatmap(lambda c: st.tuples(st.integers(1, 60), st.just(c), st.integers(1, c)))


@settings(max_examples=150, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**32))
@example(shape=(1, 40, 7), seed=0)  # one row
@example(shape=(6, 5, 5), seed=0)  # dense
@example(shape=(9, 5, 4), seed=0)  # every run straddles two permutations
@example(shape=(50, 1, 1), seed=0)
@example(shape=(320, 160, 1), seed=0)
def test_columns_are_dealt_evenly(shape: tuple[int, int, int], seed: int) -> None:
    rows, cols, k = shape
    dealt = block_columns(rows, cols, k, np.random.default_rng(seed))
    assert dealt.shape == (rows, k) and dealt.dtype == np.int32
    assert (np.diff(dealt, axis=1) > 0).all()  # ascending, hence distinct
    degrees = np.bincount(dealt.ravel(), minlength=cols)
    assert degrees.size == cols and np.ptp(degrees) <= 1
    assert rows * k < cols or degrees.min() >= 1


@pytest.mark.parametrize(("rows", "cols", "k"), [(3, 5, 3), (4, 7, 4), (3, 8, 5)])
def test_every_row_is_as_likely_to_hear_every_column(rows: int, cols: int, k: int) -> None:
    """The repair of a run that straddles two permutations must not favour low or high columns."""
    trials = 4000
    rng = np.random.default_rng(1)
    heard = np.zeros((rows, cols))
    for _ in range(trials):
        np.put_along_axis(hit := np.zeros((rows, cols)), block_columns(rows, cols, k, rng), 1, axis=1)
        heard += hit
    sigma = math.sqrt(trials * (k / cols) * (1 - k / cols))
    assert np.abs(heard - trials * k / cols).max() < 4 * sigma


@pytest.mark.parametrize(("rows", "cols", "k"), [(0, 3, 1), (2, 3, 0), (2, 3, 4)])
def test_impossible_deal_is_refused(rows: int, cols: int, k: int) -> None:
    with pytest.raises(
        ValueError, match=f"expected rows >= 1 and 1 <= k <= cols, got rows={rows}, cols={cols}, k={k}"
    ):
        block_columns(rows, cols, k, np.random.default_rng(0))


def test_keys_shapes_and_layout() -> None:
    shapes = parameter_shapes(CFG)
    assert list(PARAMS) == list(shapes)
    for key, (shape, dtype) in shapes.items():
        assert (PARAMS[key].shape, PARAMS[key].dtype) == (shape, dtype), key
        assert PARAMS[key].flags.c_contiguous, key
    regions = [
        f"region.{name}.{part}" for name in ("fast", "slow") for part in ("bias", "alpha", "rho", "a", "b")
    ]
    synapses = [f"{CFG.key(p)}.{part}" for p in CFG.projections for part in ("blocks", "rows", "cols")]
    tables = ["embedding.weight", "decoder.weight", "decoder.bias", "broca.kappa"]
    assert list(shapes) == tables + regions + synapses
    assert shapes["embedding.weight"] == shapes["decoder.weight"] == ((300, 96), np.dtype("f4"))
    assert shapes["decoder.bias"] == ((300,), np.dtype("f4")) and shapes["broca.kappa"] == (
        (96,),
        np.dtype("f4"),
    )
    assert shapes["region.slow.rho"] == ((8192,), np.dtype("f4"))
    assert shapes["proj.fast.slow.drive.0.blocks"] == ((256 * 3, 32, 32), np.dtype("f4"))
    assert shapes["proj.fast.slow.drive.0.cols"] == ((256 * 3,), np.dtype("i4"))
    trained = {*tables[:3], *regions[::5], *synapses[::3]}
    assert set(trainable_keys(CFG)) == trained and len(trainable_keys(CFG)) == len(trained)


def test_block_coordinates_are_row_major() -> None:
    for projection in CFG.projections:
        key, k = CFG.key(projection), CFG.blocks_per_row(projection)
        rows, cols = PARAMS[f"{key}.rows"], PARAMS[f"{key}.cols"]
        assert (np.diff(rows.astype(np.int64) * 2**31 + cols) > 0).all(), key
        assert (np.bincount(rows) == k).all() and rows[-1] == CFG.width(projection.dst) // 32 - 1, key
        assert 0 <= cols.min() and cols.max() < CFG.width(projection.src) // 32, key
    dense = "proj.embedding.fast.drive.0"
    assert PARAMS[f"{dense}.rows"].tolist() == [row for row in range(10) for _ in range(3)]
    assert PARAMS[f"{dense}.cols"].tolist() == [0, 1, 2] * 10


def random_keys() -> list[str]:
    """Tensors that a seed decides: all but constant ones and coordinates that no seed changes."""
    fixed = ("bias", "rows", "embedding.fast.drive.0.cols", "fast.broca_out.drive.0.cols")
    return [key for key in PARAMS if not key.endswith(fixed)]


def test_same_seed_same_bits_other_seed_other_values() -> None:
    again, other = initial_parameters(CFG, np.int64(0)), initial_parameters(CFG, 1)  # type: ignore[arg-type]
    assert all(np.array_equal(PARAMS[key], again[key]) for key in PARAMS)
    assert len(random_keys()) == 3 + 2 * 4 + 8 + 6
    assert not any(np.array_equal(PARAMS[key], other[key]) for key in random_keys())


def test_a_tensor_depends_on_its_own_key_alone() -> None:
    """Dropping and reordering regions and projections leaves the other tensors as they were."""
    regions = (Region("late", 64, 7), *CFG.regions[::-1])
    projections = (Projection("embedding", "late"), *CFG.projections[:3], *CFG.projections[:4:-1])
    changed = initial_parameters(Config(300, 96, regions, projections), 0)
    shared = set(PARAMS) & set(changed)
    assert len(shared) == len(PARAMS) - 2 * 3
    assert all(np.array_equal(PARAMS[key], changed[key]) for key in shared)


def test_streams_of_different_keys_are_independent() -> None:
    long = "proj." + "x" * 90
    keys = [
        (0, "a"),
        (0, "b"),
        (1, "a"),
        (0, "aa"),
        (0, "\0a"),
        (0, ""),
        (0, long + ".cols"),
        (0, long + ".rows"),
    ]
    keys += [(97, ""), (97 << 32, ""), (97 << 32, "a")]  # a seed whose words spell a key
    draws = np.array([tensor_generator(seed, key).standard_normal(4096) for seed, key in keys])
    correlation = np.corrcoef(draws) - np.eye(len(keys))
    assert np.abs(correlation).max() < 4.5 / 64


def test_the_stream_of_a_tensor_never_changes() -> None:
    """Checkpoints and published runs name a seed: these bits are part of the contract."""
    raw: Any = tensor_generator(7, "embedding.weight").bit_generator
    assert [hex(raw.random_raw()) for _ in range(2)] == ["0xd9925af14c67fe64", "0xb775879251108b6"]


@pytest.mark.parametrize("seed", [1.0, True, None, "1"])
def test_seed_type(seed: Any) -> None:
    with pytest.raises(TypeError, match=f"^seed: expected an integer, got {seed!r}$"):
        initial_parameters(CFG, seed)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_range(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"^seed: expected an integer from 0 to 2\*\*64 - 1, got {seed}$"):
        initial_parameters(CFG, seed)


def assert_normal(values: NDArray[Any], std: float) -> None:
    """Mean, spread and shape of N(0, std^2), each within four standard errors."""
    n = values.size
    z = values.astype(np.float64).ravel() / std
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.std() - 1) < 4 / math.sqrt(2 * n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)


def test_initial_weights() -> None:
    assert_normal(PARAMS["embedding.weight"], 1)
    assert_normal(PARAMS["decoder.weight"], 96**-0.5)
    blocks = {
        "embedding.fast.drive.0": (1.0, 3),
        "embedding.slow.gate.0": (1.0, 1),
        "fast.slow.drive.0": (1.5, 3),
        "fast.slow.gate.0": (0.7, 1),
        "slow.slow.drive.1": (0.3, 1),
        "slow.fast.drive.3": (0.3, 3),
        "slow.broca_out.drive.0": (1.0, 8),
        "fast.broca_out.drive.0": (1.0, 10),
    }
    assert {f"proj.{key}" for key in blocks} == {CFG.key(p) for p in CFG.projections}
    for key, (gain, k) in blocks.items():
        assert_normal(PARAMS[f"proj.{key}.blocks"], gain / math.sqrt(32 * k))


def test_tied_embedding() -> None:
    fields = {**{name: getattr(CFG, name) for name in ("vocab_size", "dim", "regions")}, "tie_decoder": True}
    sensory = Projection("embedding", "slow", density=0.01, gain=2.0)
    cfg = Config(projections=(*CFG.projections, sensory), **fields)
    tied = initial_parameters(cfg, 3)
    assert "decoder.weight" not in tied and "decoder.weight" not in trainable_keys(cfg)
    assert_normal(tied["embedding.weight"], 96**-0.5)
    assert_normal(tied["proj.embedding.fast.drive.0.blocks"], 1.0)  # gain sqrt(96), fan-in 96
    assert_normal(tied["proj.embedding.slow.gate.0.blocks"], math.sqrt(96 / 32))
    assert_normal(tied["proj.embedding.slow.drive.0.blocks"], 2 / math.sqrt(32))  # its own gain
    assert_normal(tied["proj.slow.broca_out.drive.0.blocks"], 1 / math.sqrt(256))
    assert default_gain(CFG, cfg.projections[0]) == 1 and default_gain(cfg, cfg.projections[0]) == math.sqrt(
        96
    )


@pytest.mark.parametrize(("name", "low", "high"), [("alpha", 5, 60), ("rho", 10, 400)])
def test_time_constants_are_log_uniform(name: str, low: float, high: float) -> None:
    decay = PARAMS[f"region.slow.{name}"].astype(np.float64)
    log_tau = np.log(-1 / np.log(decay))
    slack = 1e-4  # float32 decays near 1
    assert math.log(low) - slack <= log_tau.min() and log_tau.max() <= math.log(high) + slack
    assert stats.kstest(log_tau, stats.uniform(math.log(low), math.log(high / low)).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("name", "low", "high"), [("a", -0.5, 0.25), ("b", 1, 4)])
def test_couplings_are_uniform(name: str, low: float, high: float) -> None:
    values = PARAMS[f"region.slow.{name}"]
    assert low <= values.min() and values.max() <= high
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_kappa_and_constant_tensors() -> None:
    cfg = Config(2, 8192, (Region("r", 32, 0),), (Projection("embedding", "r", density=0.001),
                 Projection("r", "broca_out")), tau_out=(0.3, 5))  # fmt: skip
    params = initial_parameters(cfg, 0)
    log_tau = np.log(-1 / np.log(params["broca.kappa"].astype(np.float64)))
    assert stats.kstest(log_tau, stats.uniform(math.log(0.3), math.log(5 / 0.3)).cdf).pvalue > 1e-3
    assert (PARAMS["region.slow.bias"] == -0.75).all() and (
        PARAMS["region.fast.bias"] == np.float32(0.2)
    ).all()
    assert not PARAMS["decoder.bias"].any()
