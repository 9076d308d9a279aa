"""Config: every rule refuses what it should and says why; round trips are exact; presets count right."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurogen_cy.config import Config, Projection, Region
from neurogen_cy.connectome import parameter_shapes, trainable_keys

REGIONS = (Region("low", 32, 0), Region("high", 64, 3))
CHAIN = (Projection("embedding", "low"), Projection("low", "high"), Projection("high", "broca_out"))


def config(*extra: Projection, **fields: Any) -> Config:
    valid = {"vocab_size": 8, "dim": 32, "regions": REGIONS, "projections": CHAIN + extra}
    return Config(**{**valid, **fields})


Case = tuple[dict[str, Any], type[Exception], str]


def bad(error: type[Exception], field: str, rule: str, *values: Any) -> list[Case]:
    """One case per value: the field set to it, and the message that must name field, rule and value."""
    return [({field: value}, error, f"{field}: expected {rule}, got {value!r}") for value in values]


NAN, INF = float("nan"), float("inf")
MULTIPLE = "a multiple of 32 from 32 to 2147483647"
NATURAL, INTEGER = "an integer from 0 to 2147483647", "an integer from 1 to 2147483647"
FINITE, PAIR = "a finite float32 number", "a pair (low, high)"
NOW = "delay: expected 0, the only delay of gates, from embedding and into broca_out, got "
NAMES = ("", "Pfc", "1a", "a-b", "a.b", "a\n", "\u00e9", "_a", "embedding", "broca_out")
UNSORTED = ((0.0, 1.0), (-1.0, 1.0), (2.0, 1.0))
REGION_CASES = [
    *bad(ValueError, "name", "[a-z][a-z0-9_]* and neither embedding nor broca_out", *NAMES),
    *bad(TypeError, "name", "[a-z][a-z0-9_]* and neither embedding nor broca_out", 3),
    *bad(ValueError, "neurons", MULTIPLE, 0, 33, -32, 2**31),
    *bad(TypeError, "neurons", MULTIPLE, 32.0, True, None),
    *bad(ValueError, "level", NATURAL, -1),
    *bad(TypeError, "level", NATURAL, 1.0),
    *[
        case
        for field in ("tau", "tau_adapt")
        for case in bad(ValueError, field, "0 < low <= high", *UNSORTED)
    ],
    *[case for field in ("a", "b") for case in bad(ValueError, field, "low <= high", (1.0, 0.0))],
    *bad(ValueError, "tau", PAIR, (1,), [1, 2, 3]),
    *bad(TypeError, "b", PAIR, "12", 1.0),
    ({"tau": (1, INF)}, ValueError, f"tau: expected {FINITE}, got inf"),
    ({"a": (NAN, 1)}, ValueError, f"a: expected {FINITE}, got nan"),
    ({"a": (False, 1)}, TypeError, f"a: expected {FINITE}, got False"),
    *bad(ValueError, "bias", FINITE, 1e39, NAN, 10**400),
    *bad(TypeError, "bias", FINITE, "0"),
]
PROJECTION_CASES = [
    *bad(ValueError, "src", "embedding or a region", "broca_out"),
    *bad(TypeError, "src", "embedding or a region", 3),
    *bad(ValueError, "dst", "a region or broca_out", "embedding"),
    *bad(TypeError, "dst", "a region or broca_out", None),
    *bad(ValueError, "kind", "drive or gate into b", "drives"),
    *bad(TypeError, "kind", "drive or gate into b", None),
    ({"dst": "broca_out", "kind": "gate"}, ValueError, "kind: expected drive into broca_out, got 'gate'"),
    *bad(ValueError, "delay", NATURAL, -1),
    *bad(TypeError, "delay", NATURAL, 1.0, True),
    ({"delay": 1, "kind": "gate"}, ValueError, NOW + "1"),
    ({"delay": 2, "src": "embedding"}, ValueError, NOW + "2"),
    ({"delay": 3, "dst": "broca_out"}, ValueError, NOW + "3"),
    *bad(ValueError, "density", "a number in (0, 1]", 0.0, -0.5, 1.5),
    *bad(ValueError, "density", FINITE, NAN),
    *bad(TypeError, "density", FINITE, "1"),
    *bad(ValueError, "gain", "a number >= 0", -1.0),
    *bad(ValueError, "gain", FINITE, INF),
    *bad(TypeError, "gain", FINITE, True),
]
UNKNOWN = "projection low -> high (drive, delay 0): "
CONFIG_CASES = [
    *bad(ValueError, "vocab_size", INTEGER, 0, -1, 2**31),
    *bad(TypeError, "vocab_size", INTEGER, "8", 8.0, True),
    *bad(ValueError, "dim", MULTIPLE, 0, 16, 48),
    *bad(TypeError, "regions", "a tuple of Region", REGIONS[0], None),
    ({"regions": ("low",)}, TypeError, "regions[0]: expected a Region, got 'low'"),
    ({"projections": (*CHAIN, {})}, TypeError, "projections[3]: expected a Projection, got {}"),
    ({"regions": ()}, ValueError, "regions: expected at least one Region, got none"),
    ({"regions": (*REGIONS, REGIONS[1])}, ValueError, "regions: expected unique names, got 'high' 2 times"),
    ({"regions": REGIONS[:1]}, ValueError, UNKNOWN + "dst: expected broca_out or one of low, got 'high'"),
    ({"regions": REGIONS[1:]}, ValueError, "dst: expected broca_out or one of high, got 'low'"),
    ({"projections": CHAIN[:2]}, ValueError, "projections: expected at least one into 'broca_out', got none"),
    *bad(TypeError, "graded", "True or False", 1),
    *bad(TypeError, "tie_decoder", "True or False", "no"),
    *bad(ValueError, "surrogate_k", "a number > 0", 0),
    *bad(ValueError, "tau_out", "0 < low <= high", (0.0, 5.0)),
    *bad(ValueError, "rate_target", "a number in [0, 1]", -0.1, 1.1),
    *bad(ValueError, "rate_weight", "a number >= 0", -1),
    *bad(ValueError, "dropout", "a number in [0, 1)", -0.1, 1.0),
    *[case for f in ("surrogate_k", "rate_target", "dropout") for case in bad(ValueError, f, FINITE, NAN)],
]
WIRING_CASES = [
    (Projection("lo", "high"), "drive, delay 0): src: expected embedding or one of low, high, got 'lo'"),
    (CHAIN[1], "drive, delay 0): expected each (src, dst, delay, kind) at most once, got it twice"),
    (Projection("low", "low"), "drive, delay 0): delay: expected at least 1, got 0: 'low' is at level 0"),
    (Projection("high", "low"), "drive, delay 0): delay: expected at least 4, got 0: 'high' is at level 3"),
    (
        Projection("high", "low", 3),
        "drive, delay 3): delay: expected at least 4, got 3: 'high' is at level 3",
    ),
    (
        Projection("high", "low", kind="gate"),
        "gate, delay 0): a gate has delay 0 and needs level(src) < level(dst)",
    ),
    (
        Projection("low", "low", kind="gate"),
        "gate, delay 0): a gate has delay 0 and needs level(src) < level(dst)",
    ),
]


@pytest.mark.parametrize(("fields", "error", "message"), REGION_CASES)
def test_region_refuses(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    where = "region " if "name" in fields else "region 'r': "
    with pytest.raises(error, match=f"^{re.escape(where + message)}$"):
        Region(**{"name": "r", "neurons": 32, "level": 0, **fields})


@pytest.mark.parametrize(("fields", "error", "message"), PROJECTION_CASES)
def test_projection_refuses(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    where = f"projection {fields.get('src', 'a')} -> {fields.get('dst', 'b')} "
    with pytest.raises(error, match=f"^{re.escape(where)}.*: {re.escape(message)}$"):
        Projection(**{"src": "a", "dst": "b", **fields})


@pytest.mark.parametrize(("fields", "error", "message"), CONFIG_CASES)
def test_config_refuses(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{re.escape(message)}$"):
        config(**fields)


@pytest.mark.parametrize(("projection", "message"), WIRING_CASES)
def test_wiring_refused(projection: Projection, message: str) -> None:
    where = f"projection {projection.src} -> {projection.dst} ("
    with pytest.raises(ValueError, match=f"^{re.escape(where + message)}"):
        config(projection)


def test_wiring_allowed() -> None:
    """The least delay itself, parallel projections that differ in delay or kind, forward delays, skips."""
    extra = (
        *(Projection("high", "low", delay) for delay in (4, 5)),
        *(Projection("low", dst, 1) for dst in ("low", "high")),
        *(Projection(src, "high", kind="gate") for src in ("low", "embedding")),
        Projection("low", "broca_out"),
    )
    assert config(*extra).projections == CHAIN + extra


def test_values_are_normalised() -> None:
    values: Any = {"neurons": np.int64(64), "level": np.int8(2), "tau": [1, np.float16(2.5)]}
    region = Region("r", **values)
    assert region == Region("r", 64, 2, tau=(1.0, 2.5))
    assert {type(value) for value in (region.neurons, region.level)} == {int}
    assert {type(value) for value in region.tau} == {float}
    cfg = config(vocab_size=np.int32(8), regions=list(REGIONS), projections=list(CHAIN), tau_out=[1, 2])
    assert cfg == config(tau_out=(1.0, 2.0)) and hash(cfg) == hash(config(tau_out=(1.0, 2.0)))
    assert type(cfg.vocab_size) is int and isinstance(cfg.regions, tuple) and isinstance(cfg.tau_out, tuple)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.dim = 64  # type: ignore[misc]


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
positive = st.floats(1e-3, 1e6)


def spans(values: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[float, float]]:
    return st.tuples(values, values).map(lambda pair: (min(pair), max(pair)))


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Any valid config: regions at any levels, each projection kept or not with any legal delay."""
    name = st.from_regex("[a-z][a-z0-9_]{0,8}", fullmatch=True)
    names = draw(st.lists(name, min_size=1, max_size=4, unique=True))
    width = st.integers(1, 4).map(lambda blocks: 32 * blocks)
    regions = [
        Region(f"r_{name}", draw(width), draw(st.integers(0, 6)), draw(spans(positive)),
               draw(spans(positive)), draw(spans(finite)), draw(spans(finite)), draw(finite))
        for name in names
    ]  # fmt: skip
    level = {region.name: region.level for region in regions}
    wires = [
        wire for name in level for wire in (("embedding", name, 0, "drive"), (name, "broca_out", 0, "drive"))
    ]
    optional = [("embedding", name, 0, "gate") for name in level] + [("embedding", "broca_out", 0, "drive")]
    for (src, above), (dst, below) in itertools.product(level.items(), level.items()):
        optional += [(src, dst, 0, kind) for kind in ("drive", "gate") if above < below]
        optional.append((src, dst, max(1, above - below + 1) + draw(st.integers(0, 3)), "drive"))
    wires += [wire for wire in optional if draw(st.booleans())]
    density, gain = st.floats(0, 1, exclude_min=True), st.none() | st.floats(0, 1e6)
    projections = [Projection(*wire, draw(density), draw(gain)) for wire in wires]
    return Config(
        draw(st.integers(1, 70000)), draw(width), tuple(regions), tuple(projections), draw(st.booleans()),
        draw(positive), draw(spans(positive)), draw(st.booleans()), draw(st.floats(0, 1)),
        draw(st.floats(0, 1e6)), draw(st.floats(0, 1, exclude_max=True)),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(cfg=configs())
def test_round_trips_are_exact(cfg: Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    table = json.loads(json.dumps(cfg.to_dict()))
    assert table == cfg.to_dict() and Config.from_dict(table) == cfg
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    cfg.to_toml(path)
    assert Config.from_toml(path) == Config.from_toml(str(path)) == cfg


@settings(max_examples=60, deadline=None)
@given(cfg=configs())
def test_weights_are_the_trainable_elements(cfg: Config) -> None:
    shapes = parameter_shapes(cfg)
    assert cfg.weights == sum(int(np.prod(shapes[key][0])) for key in trainable_keys(cfg))
    assert len({cfg.key(projection) for projection in cfg.projections}) == len(cfg.projections)


def test_toml_text(tmp_path: Path) -> None:
    config(Projection("low", "low", 1, gain=0.5)).to_toml(tmp_path / "c.toml")
    text = (tmp_path / "c.toml").read_text()
    assert text.startswith("vocab_size = 8\ndim = 32\ngraded = true\n")
    assert text.count("[[regions]]\n") == 2 and text.count("[[projections]]\n") == 4
    assert "tau = [1.0, 30.0]\n" in text and text.count("gain") == 1


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        (lambda t: t.update(droput=1), "config", "unknown key 'droput' for Config, the nearest is 'dropout'"),
        (lambda t: t["regions"][1].update(tau_adpt=1), "regions[1]", "unknown key 'tau_adpt' for Region"),
        (lambda t: t["projections"][0].update({7: 1}), "projections[0]", "unknown key 7 for Projection"),
        (lambda t: t.pop("dim"), "config", "expected the field 'dim', got only ['vocab_size', 'regions'"),
        (lambda t: t["regions"][0].pop("level"), "regions[0]", "expected the field 'level', got only"),
        (lambda t: t["regions"].append("low"), "regions[2]", "expected a table of Region fields, got 'low'"),
        (lambda t: t.update(regions=3), "regions", "expected a tuple of Region, got 3"),
    ],
)  # fmt: skip
def test_from_dict_refuses(change: Any, where: str, message: str) -> None:
    table = config().to_dict()
    change(table)
    error = TypeError if "got 3" in message or "got 'low'" in message else ValueError
    with pytest.raises(error, match=f"^{re.escape(f'{where}: {message}')}"):
        Config.from_dict(table)


DEFAULT_CONNECTOME = """
embedding thalamus drive 0 1 | embedding wernicke drive 0 1 | embedding hippocampus drive 0 1
embedding pfc drive 0 1 | embedding broca drive 0 1 | thalamus wernicke drive 0 1
wernicke hippocampus drive 0 1 | wernicke pfc drive 0 1 | wernicke broca drive 0 1
hippocampus pfc drive 0 1 | pfc basal_ganglia drive 0 1 | pfc broca drive 0 1
basal_ganglia broca gate 0 1 | embedding wernicke gate 0 1 | embedding hippocampus gate 0 1
embedding pfc gate 0 1 | embedding broca gate 0 1 | thalamus thalamus drive 1 2
wernicke wernicke drive 1 2 | hippocampus hippocampus drive 1 2 | pfc pfc drive 1 2
broca broca drive 1 2 | pfc thalamus drive 4 1 | pfc wernicke drive 3 1
wernicke broca_out drive 0 8 | hippocampus broca_out drive 0 8 | pfc broca_out drive 0 8
broca broca_out drive 0 8
"""
EXTRA_GATES = """
thalamus wernicke gate 0 1 | wernicke hippocampus gate 0 1 | wernicke pfc gate 0 1 | pfc broca gate 0 1
"""


def wires(text: str) -> dict[str, int]:
    """Key of each projection and the blocks per row of its sparse form."""
    rows = [line.split() for line in text.replace("|", "\n").strip().splitlines()]
    return {f"proj.{src}.{dst}.{kind}.{delay}": int(blocks) for src, dst, kind, delay, blocks in rows}


@pytest.mark.parametrize(
    ("name", "neurons", "weights", "synapses", "readout"),
    [
        ("tiny", 1088, 1_279_296, 1_097_728, 114_688),
        ("small", 4352, 19_665_408, 17_563_648, 1_835_008),
        ("base", 39_424, 107_206_400, 7_258_112, 1_572_864),
        ("large", 788_480, 245_859_584, 145_162_240, 1_572_864),
    ],
)
def test_preset(name: str, neurons: int, weights: int, synapses: int, readout: int) -> None:
    cfg, dense = Config.preset(name), name in ("tiny", "small")
    assert sum(region.neurons for region in cfg.regions) == neurons and cfg.weights == weights
    assert [(region.name, region.level) for region in cfg.regions] == [
        ("thalamus", 0), ("wernicke", 1), ("hippocampus", 2), ("pfc", 3), ("basal_ganglia", 4), ("broca", 5)
    ]  # fmt: skip
    for region in cfg.regions:
        slow = region.name == "hippocampus"
        assert (region.tau, region.tau_adapt) == (((5, 60), (10, 400)) if slow else ((1, 30), (3, 200)))
    expected = wires(DEFAULT_CONNECTOME) | (wires(EXTRA_GATES) if dense else {})
    if dense:
        expected = {cfg.key(p): cfg.width(p.src) // 32 for p in cfg.projections if cfg.key(p) in expected}
    assert {cfg.key(p): cfg.blocks_per_row(p) for p in cfg.projections} == expected
    assert len(expected) == (32 if dense else 28)
    blocks = {p: 1024 * cfg.blocks_per_row(p) * cfg.width(p.dst) // 32 for p in cfg.projections}
    assert sum(n for p, n in blocks.items() if p.dst == "broca_out") == readout
    assert sum(n for p, n in blocks.items() if p.dst != "broca_out") == synapses


def test_preset_overrides() -> None:
    cfg = Config.preset("base", vocab_size=1000, dim=256, graded=False)
    assert (cfg.vocab_size, cfg.dim, cfg.graded) == (1000, 256, False)
    sensory = [p for p in cfg.projections if p.src == "embedding"]
    assert len(sensory) == 9 and all(cfg.blocks_per_row(p) == 1 for p in sensory)
    unknown = "preset 'tiny': unknown key 'dropot' for Config, the nearest is 'dropout'"
    cases: list[Case] = [*bad(ValueError, "dim", MULTIPLE, 33), *bad(TypeError, "dim", MULTIPLE, None)]
    cases.append(({"dropot": 1}, ValueError, unknown))
    for fields, error, message in cases:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            Config.preset("tiny", **fields)
    with pytest.raises(ValueError, match="^preset: expected one of tiny, small, base, large, got 'huge'$"):
        Config.preset("huge")


@pytest.mark.parametrize(("density", "blocks"), [(1, 5), (0.1, 1), (1e-9, 1), (0.5, 2), (0.7, 4), (0.71, 4)])
def test_blocks_per_row_rounds_like_python(density: float, blocks: int) -> None:
    """0.5 * 5 = 2.5 and 0.7 * 5 = 3.5 round to even; never below one block."""
    cfg = config(dim=160)
    assert cfg.blocks_per_row(Projection("embedding", "low", density=density)) == blocks


def test_lookup() -> None:
    cfg = config()
    assert cfg.region("high") is REGIONS[1]
    assert [cfg.width(name) for name in ("embedding", "broca_out", "high")] == [32, 32, 64]
    with pytest.raises(ValueError, match="^region: expected one of low, high, got 'hi'$"):
        cfg.region("hi")
