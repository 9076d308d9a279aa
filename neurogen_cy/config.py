"""What a model is: regions, projections and sizes, checked when they are built, portable as dict and TOML."""

from __future__ import annotations

import difflib
import functools
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from neurogen_cy.connectome import BLOCK, check_connectome
from neurogen_cy.shown import shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RESERVED_NAMES = ("embedding", "broca_out")
_NAME = re.compile("[a-z][a-z0-9_]*")
_INT_MAX = 2**31 - 1
_FLOAT_MAX = float(np.finfo(np.float32).max)
_INTEGERS = (int, np.integer)
_NUMBERS = (int, float, np.integer, np.floating)
_SEQUENCES = (tuple, list)
_LISTS = ("regions", "projections")
_TOML_BYTES, _TOML_LINE = 1 << 18, 4096  # parsing takes quadratic time in the length of a dotted key
_Rule = Callable[[Any], bool]
_T = TypeVar("_T", "Region", "Projection", "Config")


def _check(where: str, value: Any, kinds: Any, expected: str, ok: _Rule | None = None) -> Any:
    """The value; TypeError unless of `kinds` (a bool is no number), ValueError unless it is `ok`."""
    kind_ok = isinstance(value, kinds) and not (isinstance(value, bool) and kinds in (_INTEGERS, _NUMBERS))
    if not kind_ok or (ok is not None and not ok(value)):
        raise (ValueError if kind_ok else TypeError)(f"{where}: expected {expected}, got {shown(value)}")
    return value


def _integer(where: str, value: Any, low: int, multiple: int = 1) -> int:
    expected = f"{'an integer' if multiple == 1 else f'a multiple of {multiple}'} from {low} to {_INT_MAX}"
    ok = lambda n: low <= n <= _INT_MAX and n % multiple == 0
    return int(_check(where, value, _INTEGERS, expected, ok))


def _number(where: str, value: Any, rule: str = "", ok: _Rule | None = None) -> float:
    value = float(value) if isinstance(value, np.floating) else value  # float16 cannot hold the bound
    _check(where, value, _NUMBERS, "a finite float32 number", lambda x: abs(x) <= _FLOAT_MAX)
    return float(_check(where, value, _NUMBERS, f"a number {rule}", ok))


def _range(where: str, value: Any, positive: bool = False) -> tuple[float, float]:
    pair = _check(where, value, _SEQUENCES, "a pair (low, high)", lambda pair: len(pair) == 2)
    low, high = _number(where, pair[0]), _number(where, pair[1])
    rule = "0 < low <= high" if positive else "low <= high"
    _check(where, (low, high), tuple, rule, lambda _: low <= high and (low > 0 or not positive))
    return low, high


def _items(where: str, value: Any, kind: type[_T]) -> tuple[_T, ...]:
    items = _check(where, value, _SEQUENCES, f"a tuple of {kind.__name__}")
    for index, item in enumerate(items):
        _check(f"{where}[{index}]", item, kind, f"a {kind.__name__}")
    return tuple(items)


def _from_table(where: str, table: Any, kind: type[_T]) -> _T:
    _check(where, table, Mapping, f"a table of {kind.__name__} fields")
    known = {field.name: field.default is MISSING for field in fields(kind)}
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(str(name)[:100], known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}: unknown key {shown(name)} for {kind.__name__}, the nearest is {near!r}")
    if missing := [name for name, required in known.items() if required and name not in table]:
        raise ValueError(f"{where}: expected the field {missing[0]!r}, got only {shown(list(table))}")
    return kind(**table)


@dataclass(frozen=True)
class Region:
    """A population of ALIF neurons (adaptive leaky integrate-and-fire, Bellec et al. 2020).

    `name` is `[a-z][a-z0-9_]*`; `neurons` a multiple of 32; `level` >= 0, 0 nearest to the input. The
    pairs (low, high) bound each neuron's constants: `tau` and `tau_adapt` in tokens, drawn log-uniformly, and
    the adaptation's couplings `a` (to the potential) and `b` (to spikes), uniformly; `bias` is initial.
    """

    name: str
    neurons: int
    level: int
    tau: tuple[float, float] = (1.0, 30.0)
    tau_adapt: tuple[float, float] = (3.0, 200.0)
    a: tuple[float, float] = (0.0, 1.0)
    b: tuple[float, float] = (0.0, 3.0)
    bias: float = 0.2

    def __post_init__(self) -> None:
        rule = f"{_NAME.pattern} and neither {' nor '.join(RESERVED_NAMES)}"
        valid = lambda name: name not in RESERVED_NAMES and _NAME.fullmatch(name) is not None
        where = f"region {shown(_check('region name', self.name, str, rule, valid))}: "
        neurons = _integer(where + "neurons", self.neurons, BLOCK, BLOCK)
        level, bias = _integer(where + "level", self.level, 0), _number(where + "bias", self.bias)
        pairs = ("tau", "tau_adapt", "a", "b")
        ranges = {pair: _range(where + pair, getattr(self, pair), pair.startswith("tau")) for pair in pairs}
        self.__dict__.update(neurons=neurons, level=level, bias=bias, **ranges)


@dataclass(frozen=True)
class Projection:
    """Block-sparse synapses from `embedding` or a region onto a region or `broca_out`.

    `delay` is in tokens; `kind` is `drive` (basal, added) or `gate` (apical, multiplied); `density` in (0, 1]
    is the share of the source's blocks in each row of blocks; `gain` scales the initial weights.
    """

    src: str
    dst: str
    delay: int = 0
    kind: str = "drive"
    density: float = 1.0
    gain: float | None = None

    def __post_init__(self) -> None:
        where = f"projection {self}: "
        _check(where + "src", self.src, str, "embedding or a region", lambda name: name != "broca_out")
        _check(where + "dst", self.dst, str, "a region or broca_out", lambda name: name != "embedding")
        kinds = ("drive",) if self.dst == "broca_out" else ("drive", "gate")
        into = f"{' or '.join(kinds)} into {self.dst}"
        _check(where + "kind", self.kind, str, into, lambda kind: kind in kinds)
        delay = _integer(where + "delay", self.delay, 0)
        if self.kind == "gate" or self.src == "embedding" or self.dst == "broca_out":
            rule = "0, the only delay of gates, from embedding and into broca_out"
            _check(where + "delay", delay, int, rule, lambda delay: delay == 0)
        gain = None if self.gain is None else _number(where + "gain", self.gain, ">= 0", lambda x: x >= 0)
        density = _number(where + "density", self.density, "in (0, 1]", lambda x: 0 < x <= 1)
        self.__dict__.update(delay=delay, density=density, gain=gain)

    def __str__(self) -> str:
        values = (self.src, self.dst, self.kind, self.delay)  # not yet checked when a message names them
        src, dst, kind, delay = ((value if isinstance(value, str) else shown(value))[:100] for value in values)
        return f"{src} -> {dst} ({kind}, delay {delay})"


@dataclass(frozen=True)
class Config:
    """A model's sizes, connectome and loss constants, immutable and valid: every field is checked when built.

    Raises TypeError for a field of the wrong type and ValueError for a wrong value; the message names the
    field, what was expected and what was got. Lists are taken for tuples and NumPy integers for int.
    `tau_out` (low, high) in tokens is the range of Broca's output integrator; `surrogate_k` the k of
    psi(u) = 1 / (1 + k|u|)^2 (Zenke and Ganguli 2018); `rate_target` in spikes per token.
    `max_spike` bounds a graded spike, s = H(u) min(1 + u, max_spike), with slope 0 of the factor above the bound
    (None: no bound; recurrent loops can then run away in training, so the presets set 4).

    Examples
    --------
    >>> from neurogen_cy.config import Config
    >>> cfg = Config.preset("tiny", dropout=0.1)
    >>> Config.from_dict(cfg.to_dict()) == cfg
    True
    """

    vocab_size: int
    dim: int
    regions: tuple[Region, ...]
    projections: tuple[Projection, ...]
    graded: bool = True
    surrogate_k: float = 1.0
    tau_out: tuple[float, float] = (0.3, 5.0)
    tie_decoder: bool = False
    rate_target: float = 0.1
    rate_weight: float = 0.5
    dropout: float = 0.0
    max_spike: float | None = None

    def __post_init__(self) -> None:
        self.__dict__.update(
            vocab_size=_integer("vocab_size", self.vocab_size, 1),
            dim=_integer("dim", self.dim, BLOCK, BLOCK),
            regions=_items("regions", self.regions, Region),
            projections=_items("projections", self.projections, Projection),
            graded=_check("graded", self.graded, bool, "True or False"),
            surrogate_k=_number("surrogate_k", self.surrogate_k, "> 0", lambda x: x > 0),
            tau_out=_range("tau_out", self.tau_out, positive=True),
            tie_decoder=_check("tie_decoder", self.tie_decoder, bool, "True or False"),
            rate_target=_number("rate_target", self.rate_target, "in [0, 1]", lambda x: 0 <= x <= 1),
            rate_weight=_number("rate_weight", self.rate_weight, ">= 0", lambda x: x >= 0),
            dropout=_number("dropout", self.dropout, "in [0, 1)", lambda x: 0 <= x < 1),
            max_spike=None if self.max_spike is None else _number("max_spike", self.max_spike, "> 1", lambda x: x > 1),
        )
        check_connectome(self)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Config:
        """The six regions at the size `tiny`, `small`, `base` or `large`; overrides: any fields of Config."""
        from neurogen_cy.presets import preset_fields

        dim = _integer("dim", overrides["dim"], BLOCK, BLOCK) if "dim" in overrides else None
        return _from_table(f"preset {name!r}", {**preset_fields(name, dim), **overrides}, cls)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, equal to their own JSON round trip."""
        return dict(json.loads(json.dumps(asdict(self))))

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Config:
        """The inverse of `to_dict`; ValueError names an unknown key and the nearest field."""
        values = dict(_check("config", table, Mapping, "a table of Config fields"))
        for name, kind in zip(_LISTS, (Region, Projection)):
            if isinstance(items := values.get(name), _SEQUENCES):
                values[name] = [_from_table(f"{name}[{i}]", item, kind) for i, item in enumerate(items)]
        return _from_table("config", values, cls)

    def to_toml(self, path: str | Path) -> None:
        """Write the fields, then a `[[regions]]` or `[[projections]]` table each; a None gain is left out."""
        table, text = self.to_dict(), ""
        parts = [(f"\n[[{name}]]\n", item) for name in _LISTS for item in table.pop(name)]
        for head, part in [("", table), *parts]:
            # Flags, numbers, names and flat lists of numbers are spelt alike in JSON and TOML.
            text += head + "".join(f"{k} = {json.dumps(v)}\n" for k, v in part.items() if v is not None)
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def from_toml(cls, path: str | Path) -> Config:
        """The inverse of `to_toml`, exact to the last bit of every number.

        Raises
        ------
        TypeError, ValueError
            The message names the file or the field, expected and got.
        OSError
            If the file cannot be read.
        """
        with Path(path).open("rb") as file:
            data = file.read(_TOML_BYTES + 1)
        if len(data) > _TOML_BYTES:
            raise ValueError(f"{path}: expected a configuration of at most {_TOML_BYTES} bytes, got more")
        try:
            text = data.decode("utf-8")
            if (longest := max(map(len, text.splitlines()), default=0)) > _TOML_LINE:
                raise ValueError(f"expected lines of at most {_TOML_LINE} characters, got one of {longest}")
            table = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: expected a configuration in TOML, got: {error}") from error
        return cls.from_dict(table)

    def region(self, name: str) -> Region:
        """The region of that name; ValueError when there is none."""
        if not isinstance(name, str) or name not in self._regions:
            _check("region", name, str, f"one of {', '.join(self._regions)}", lambda name: False)
        return self._regions[name]

    @functools.cached_property
    def _regions(self) -> dict[str, Region]:
        return {region.name: region for region in self.regions}

    def width(self, name: str) -> int:
        """Length of the vector at one end of a projection: `dim` or the region's neurons."""
        return self.dim if name in RESERVED_NAMES else self.region(name).neurons

    def blocks_per_row(self, projection: Projection) -> int:
        """Stored blocks in each row of blocks, max(1, round(density * n_src / 32))."""
        return max(1, round(projection.density * self.width(projection.src) / BLOCK))

    @staticmethod
    def key(projection: Projection) -> str:
        """The prefix of the projection's parameters, `proj.<src>.<dst>.<kind>.<delay>`."""
        return f"proj.{projection.src}.{projection.dst}.{projection.kind}.{projection.delay}"

    @property
    def weights(self) -> int:
        """Number of trainable parameters: synapses, biases, embedding and decoder."""
        blocks = sum(self.width(p.dst) // BLOCK * self.blocks_per_row(p) for p in self.projections)
        tables = (1 if self.tie_decoder else 2) * self.vocab_size * self.dim + self.vocab_size
        return tables + sum(region.neurons for region in self.regions) + BLOCK**2 * blocks
