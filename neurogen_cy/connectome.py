"""The wiring rules of a connectome, the shapes of a model's tensors and their initial values."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neurogen_cy.shown import shown

if TYPE_CHECKING:
    from neurogen_cy.config import Config, Projection

BLOCK = 32
"""Side of a block of synapses; every width is a multiple of it."""


def check_connectome(cfg: Config) -> None:
    """Refuse, with a ValueError, regions and projections that no order of levels and tokens can run.

    A projection of delay 0 needs level(src) < level(dst), any other delay >= level(src) - level(dst) + 1:
    then at tick k, when a region of level l works on token k - l, its source is at least one tick old.
    """
    if not cfg.regions:
        raise ValueError("regions: expected at least one Region, got none")
    for name, count in Counter(region.name for region in cfg.regions).items():
        if count > 1:
            raise ValueError(f"regions: expected unique names, got {shown(name)} {count} times")
    levels = {region.name: region.level for region in cfg.regions}
    seen: set[str] = set()
    for projection in cfg.projections:
        where = f"projection {projection}: "
        ends = {"src": (projection.src, "embedding"), "dst": (projection.dst, "broca_out")}
        for end, (name, other) in ends.items():
            if name not in levels and name != other:
                known = ", ".join(levels)[:1000]
                raise ValueError(f"{where}{end}: expected {other} or one of {known}, got {shown(name)}")
        if (key := cfg.key(projection)) in seen:
            raise ValueError(where + "expected each (src, dst, delay, kind) at most once, got it twice")
        seen.add(key)
        if projection.src in levels and projection.dst in levels:
            _check_delay(where, projection, levels[projection.src], levels[projection.dst])
    if all(projection.dst != "broca_out" for projection in cfg.projections):
        raise ValueError("projections: expected at least one into 'broca_out', got none")


def _check_delay(where: str, projection: Projection, src_level: int, dst_level: int) -> None:
    levels = f"{projection.src!r} is at level {src_level} and {projection.dst!r} at level {dst_level}"
    if projection.kind == "gate" and src_level >= dst_level:
        raise ValueError(f"{where}a gate has delay 0 and needs level(src) < level(dst), but {levels}")
    least = src_level - dst_level + 1
    if projection.delay < least:
        raise ValueError(f"{where}delay: expected at least {least}, got {projection.delay}: {levels}")


def parameter_shapes(cfg: Config) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of every model tensor by key, in the order of `initial_parameters`; draws nothing."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (cfg.vocab_size, cfg.dim)}
    if not cfg.tie_decoder:
        shapes["decoder.weight"] = (cfg.vocab_size, cfg.dim)
    shapes |= {"decoder.bias": (cfg.vocab_size,), "broca.kappa": (cfg.dim,)}
    for region in cfg.regions:
        key = f"region.{region.name}"
        shapes |= {f"{key}.{name}": (region.neurons,) for name in ("bias", "alpha", "rho", "a", "b")}
    for projection in cfg.projections:
        count = cfg.width(projection.dst) // BLOCK * cfg.blocks_per_row(projection)
        key = cfg.key(projection)
        shapes |= {f"{key}.blocks": (count, BLOCK, BLOCK), f"{key}.rows": (count,), f"{key}.cols": (count,)}
    return {
        key: (shape, np.dtype(np.int32 if key.endswith((".rows", ".cols")) else np.float32))
        for key, shape in shapes.items()
    }


def trainable_keys(cfg: Config) -> tuple[str, ...]:
    """Keys of the tensors that have a gradient: embedding, decoder, biases and blocks."""
    return tuple(key for key in parameter_shapes(cfg) if key.endswith((".weight", ".bias", ".blocks")))


def longest_delays(cfg: Config) -> dict[str, int]:
    """K of each region: how many of its past spikes its projections can still ask for."""
    out = {region.name: 0 for region in cfg.regions}
    for projection in cfg.projections:
        if projection.delay:
            out[projection.src] = max(out[projection.src], projection.delay)
    return out


def state_shapes(cfg: Config, streams: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the neuron state's float32 arrays by key, as `NeuroGen.state` gives them."""
    shapes: dict[str, tuple[int, ...]] = {"broca.o": (streams, cfg.dim)}
    delays = longest_delays(cfg)
    for region in cfg.regions:
        shapes |= {f"region.{region.name}.{name}": (streams, region.neurons) for name in ("v", "w")}
        shapes[f"region.{region.name}.spikes"] = (streams, delays[region.name], region.neurons)
    return shapes


def tensor_generator(seed: int, key: str) -> np.random.Generator:
    """The random stream of one tensor, a pure function of the seed and the tensor's key.

    PCG64 seeded by `SeedSequence(seed, spawn_key=key's UTF-8 bytes)`: streams of different keys are
    independent, so adding, dropping or reordering regions and projections leaves other tensors as they were.

    Raises
    ------
    TypeError, ValueError
        When `seed` is not an integer in 0 .. 2**64 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed: expected an integer, got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected an integer from 0 to 2**64 - 1, got {seed!r}")
    sequence = np.random.SeedSequence(int(seed), spawn_key=tuple(key.encode()))
    return np.random.Generator(np.random.PCG64(sequence))


def block_columns(rows: int, cols: int, k: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Deal `k` distinct block columns to each row of blocks, every column as often as any other.

    Permutations of the columns are laid end to end and cut into runs of k. A run that straddles two of them
    could hold a column twice, so the later one is stably reordered to start with columns that the run does
    not hold yet. It stays a permutation: over the whole deal the out-degrees differ by at most one, and every
    column is dealt when rows * k >= cols.

    Parameters
    ----------
    rows, cols : int
        Size of the matrix in blocks.
    k : int
        Blocks per row, 1 <= k <= cols.

    Returns
    -------
    int32 array [rows, k], ascending within a row.

    Raises
    ------
    ValueError
        When rows < 1 or k is not in 1 .. cols.
    """
    if rows < 1 or not 1 <= k <= cols:
        raise ValueError(f"block_columns: expected rows >= 1 and 1 <= k <= cols, got {rows=}, {cols=}, {k=}")
    if k == cols:
        return np.tile(np.arange(cols, dtype=np.int32), (rows, 1))
    decks = -(-rows * k // cols)
    dealt = np.empty(decks * cols, np.int32)
    held = np.zeros(cols, np.bool_)
    for start in range(0, decks * cols, cols):
        deck = rng.permutation(cols).astype(np.int32)
        open_run = start % k  # columns already in the run that this permutation completes
        if open_run:
            tail = dealt[start - open_run : start]
            held[tail] = True
            clash = held[deck]
            head = np.flatnonzero(~clash)[: k - open_run]
            deck = np.concatenate([deck[head], np.delete(deck, head)])
            held[tail] = False
        dealt[start : start + cols] = deck
    return np.sort(dealt[: rows * k].reshape(rows, k), axis=1)


def default_gain(cfg: Config, projection: Projection) -> float:
    """Its own gain; else 0.3 delayed, 1 from `embedding` (sqrt(D) if tied), 1 into `broca_out`, else 1.5."""
    if projection.gain is not None:
        return projection.gain
    if projection.delay:
        return 0.3
    if projection.src == "embedding":
        return math.sqrt(cfg.dim) if cfg.tie_decoder else 1.0
    return 1.0 if projection.dst == "broca_out" else 1.5


def initial_parameters(cfg: Config, seed: int) -> dict[str, NDArray[Any]]:
    """Every tensor of a fresh model, the same on every backend.

    Embedding ~ N(0, 1), decoder ~ N(0, 1/D), tied embedding ~ N(0, 1/D); blocks ~ N(0, gain^2 / fan_in) with
    fan_in = 32 k of their projection alone; alpha, rho and kappa = exp(-1/tau), tau log-uniform in its range
    in tokens; a and b uniform. Normal values are drawn as float32, constants in float64 and then rounded.
    Each tensor has its own stream, `tensor_generator(seed, key)`.

    Parameters
    ----------
    seed : int
        0 .. 2**64 - 1; TypeError or ValueError otherwise.

    Returns
    -------
    dict of C-contiguous arrays, float32 except int32 `rows` and `cols`, in the order of `parameter_shapes`.
    """
    shapes = parameter_shapes(cfg)

    def normal(key: str, std: float) -> NDArray[np.float32]:
        values = tensor_generator(seed, key).standard_normal(shapes[key][0], dtype=np.float32)
        values *= np.float32(std)
        return values

    def uniform(key: str, span: tuple[float, float]) -> NDArray[np.float64]:
        return tensor_generator(seed, key).uniform(*span, size=shapes[key][0])

    def decay(key: str, tau: tuple[float, float]) -> NDArray[np.float32]:
        return np.exp(-np.exp(-uniform(key, (math.log(tau[0]), math.log(tau[1]))))).astype(np.float32)

    out: dict[str, NDArray[Any]] = {}
    out["embedding.weight"] = normal("embedding.weight", cfg.dim**-0.5 if cfg.tie_decoder else 1.0)
    if not cfg.tie_decoder:
        out["decoder.weight"] = normal("decoder.weight", cfg.dim**-0.5)
    out["decoder.bias"] = np.zeros(cfg.vocab_size, np.float32)
    out["broca.kappa"] = decay("broca.kappa", cfg.tau_out)
    for region in cfg.regions:
        key = f"region.{region.name}"
        out[f"{key}.bias"] = np.full(region.neurons, region.bias, np.float32)
        out[f"{key}.alpha"] = decay(f"{key}.alpha", region.tau)
        out[f"{key}.rho"] = decay(f"{key}.rho", region.tau_adapt)
        out[f"{key}.a"] = uniform(f"{key}.a", region.a).astype(np.float32)
        out[f"{key}.b"] = uniform(f"{key}.b", region.b).astype(np.float32)
    for projection in cfg.projections:
        key, k = cfg.key(projection), cfg.blocks_per_row(projection)
        rows, cols = cfg.width(projection.dst) // BLOCK, cfg.width(projection.src) // BLOCK
        out[f"{key}.blocks"] = normal(f"{key}.blocks", default_gain(cfg, projection) / math.sqrt(BLOCK * k))
        out[f"{key}.rows"] = np.repeat(np.arange(rows, dtype=np.int32), k)
        out[f"{key}.cols"] = block_columns(rows, cols, k, tensor_generator(seed, f"{key}.cols")).ravel()
    return out
