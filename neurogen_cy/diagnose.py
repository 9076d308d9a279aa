"""`neurogen diagnose`: the ladder measured on the user's own model and text, as tables, with advice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import psutil

from neurogen_cy import __version__, backend
from neurogen_cy.config import Config
from neurogen_cy.ladder import Plan, measure
from neurogen_cy.ladder_time import PARTS
from neurogen_cy.report import size_text
from neurogen_cy.rungs import BATCHED

Rows = list[dict[str, Any]]
SAME = 1.1  # rates closer than this are the same on a machine that does other things too
ALIKE = 1.5  # rungs closer than this cannot be told apart by somebody's rate
BUSY_MACHINE = 20.0  # percent of its cores that others may take before figures are no longer the model's
WAITING_CPU, BUSY_GPU = 15.0, 90.0  # percent of a core while it waits, and of the time
NAMES = {
    "synchronisation": "waiting for each other", "allocation": "allocation", "copying": "copying vectors",
    "brain_decoder": "brain and decoder", "learning": "learning", "python": "the loop itself",
}  # fmt: skip


def diagnose(
    name: str, config: Config, settings: Mapping[str, Any], data: bytes, corpus: Mapping[str, Any], plan: Plan,
    own_rate: float | None = None, say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure; return the record with its advice, as JSON-able values.

    Parameters
    ----------
    name : str
        What the configuration is called.
    config, settings, data, plan, say
        See `ladder.measure`.
    corpus : dict
        Facts of the text.
    own_rate : float, optional
        Tokens/s of the user's own loop, which the advice then places.
    """
    others = psutil.cpu_percent(0.3)
    memory = psutil.virtual_memory()
    record: dict[str, Any] = {
        "version": __version__, "preset": name, "text": dict(corpus),
        "no_gpu": backend.available()["cuda"] if settings.get("backend") != "cpu" else "--backend cpu was asked for",
        "machine": {"cores": psutil.cpu_count(), "memory_bytes": memory.total, "available_bytes": memory.available,
                    "busy_before_percent": others},
        **measure(config, settings, data, plan, say),
        "own_tok_s": own_rate, "resident_bytes": psutil.Process().memory_info().rss,
    }  # fmt: skip
    record["advice"] = advice(record)
    return record


# ---- tables --------------------------------------------------------------------------------------------------------


def tables(record: Mapping[str, Any]) -> str:
    """The record as text: what was measured, speed and traffic, where the time goes, consecutive steps, advice."""
    rows, steady = record["rows"], record["steady"]
    machine, text = record["machine"], record["text"]
    parts = [
        f"neurogen_cy {record['version']}, {record['preset']}: {record['weights']:,} weights, backend "
        f"{record['backend']} ({record['on']}), {record['precision']}\n"
        f"{text['name']}, {text['bytes']:,} bytes, read as {record['tokens_are']}; {machine['cores']} cores, "
        f"{machine['busy_before_percent']:.0f} % of them busy before",
    ]
    if record["backend"] == "cpu":
        parts.append(f"Measured on the CPU backend: {record['no_gpu']}")
    parts += [_speed(rows), _traffic(rows), _time(rows)]
    parts.append(
        f"consecutive steps, {steady['B']} streams x {steady['T']} tokens: {steady['tok_s']:,.0f} tokens/s, "
        f"{steady['syncs_per_step']:g} synchronisations a step, host CPU {steady['cpu_percent']:.0f} % of one core"
        + ("" if steady["gpu_percent"] is None else f", GPU busy {steady['gpu_percent']:.0f} %")
    )
    notes = {
        "allocations were not counted": record["no_allocation_counts"],
        "the device's own time is not known": record["no_device_time"] if record["backend"] == "cuda" else None,
        "NVML gives no utilisation": steady["no_gpu_percent"] if record["backend"] == "cuda" else None,
    }
    parts += [f"{what}: {reason}" for what, reason in notes.items() if reason]
    parts.append("\n".join(["What to change", *(f"- {line}" for line in record["advice"])]))
    return "\n\n".join(parts)


def _grid(head: list[str], body: list[list[str]]) -> str:
    """Columns as wide as their widest cell, all but the first to the right."""
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in [head, *body]
    ]
    return "\n".join(line.rstrip() for line in lines)


def _rung(row: Mapping[str, Any]) -> str:
    return f"{row['rung']} {row['name']}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} %"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _bytes(value: float | None) -> str:
    return "-" if value is None else size_text(round(value))


def _speed(rows: Rows) -> str:
    lengths = sorted({row["T"] for row in rows})
    of = {(row["rung"], row["T"]): row for row in rows}
    head = ["tokens/s, one stream", *(f"T = {T:,}" for T in lengths), "CPU of a core", "GPU busy"]
    body = []
    for rung in sorted({row["rung"] for row in rows}):
        last = of[rung, lengths[-1]]
        rates = [_rate(of[rung, T]["tok_s"]) for T in lengths]
        body.append([_rung(last), *rates, _percent(last["cpu_percent"]), _percent(last["gpu_percent"])])
    return _grid(head, body)


def _traffic(rows: Rows) -> str:
    T = max(row["T"] for row in rows)
    head = [f"a sequence of {T:,} tokens", "syncs", "launches", "to GPU", "from GPU", "host copies", "allocations",
            "bytes", "array buffers", "native"]  # fmt: skip
    body = [
        [_rung(row), _count(row["syncs"]), _count(row["launches"]), _bytes(row["h2d_bytes"]), _bytes(row["d2h_bytes"]),
         _bytes(row["host_copied_bytes"]), _count(row["host_allocs"]), _bytes(row["host_alloc_bytes"]),
         _count(row["array_allocs"]), _count(row["native_allocs"])]
        for row in rows if row["T"] == T
    ]  # fmt: skip
    return _grid(head, body)


def _time(rows: Rows) -> str:
    T = max(row["T"] for row in rows)
    head = [f"where {T:,} tokens' time goes, ms", *(NAMES[part] for part in PARTS), "in all"]
    body = []
    for row in (row for row in rows if row["T"] == T):
        cells = ["-" if row["time"][part] is None else f"{1e3 * row['time'][part]:,.1f}" for part in PARTS]
        body.append([_rung(row), *cells, f"{1e3 * row['seconds']:,.1f}"])
    return _grid(head, body)


# ---- advice --------------------------------------------------------------------------------------------------------


def advice(record: Mapping[str, Any]) -> list[str]:
    """Plain sentences, each with the figure it comes from."""
    rows, steady = record["rows"], record["steady"]
    longest = max(row["T"] for row in rows)
    climb = [next(row for row in rows if row["rung"] == rung and row["T"] == longest) for rung in range(BATCHED + 1)]
    out = []
    if record["backend"] == "cpu":
        out.append(f"These are figures of the CPU backend ({record['no_gpu']}); a GPU gives others.")
    if record["machine"]["busy_before_percent"] > BUSY_MACHINE:
        out.append(f"{record['machine']['busy_before_percent']:.0f} % of the cores were busy with something else: "
                   "measure again on a quiet machine before believing small differences.")  # fmt: skip
    out += [*_place(record["own_tok_s"], climb), _first_thing(climb), *_longer(rows, longest), *_wider(steady, climb)]
    if record["backend"] == "cuda":
        out += _waiting(steady)
    return out


def _place(rate: float | None, climb: Rows) -> list[str]:
    """Which rung the user's own rate is on."""
    if rate is None:
        return ["A loop of encode, brain.step and broca_output is on rung 0, one that hands over its own arrays "
                "(encode_into, broca_output_into) on rung 2, train_step_batch on rung 3. `with model.profile() as p` "
                "around your own loop counts its synchronisations and tokens a call; --own-rate places its "
                "tokens/s here."]  # fmt: skip
    slowest = min(row["tok_s"] for row in climb)
    if rate * SAME < slowest:
        return [f"Your {rate:,.0f} tokens/s are below every rung (the slowest gives {slowest:,.0f}): the time goes "
                "outside of the model. Look at what else the loop does: reading, logging, moving data."]  # fmt: skip
    reached = max((row for row in climb if row["tok_s"] <= rate * SAME), key=lambda row: row["tok_s"])
    like = [row["rung"] for row in climb if 1 / ALIKE < row["tok_s"] / reached["tok_s"] < ALIKE]
    rung = f"rung {like[0]}" if len(like) == 1 else f"rungs {like[0]} to {like[-1]}"
    if BATCHED in like:
        return [f"Your {rate:,.0f} tokens/s are those of {rung}: you are at the top already."]
    gain = climb[BATCHED]["tok_s"] / rate
    return [f"Your {rate:,.0f} tokens/s are those of {rung}, token by token: train_step_batch would give "
            f"{gain:,.1f} times as much."]  # fmt: skip


def _first_thing(climb: Rows) -> str:
    """Copies or the loop itself: what a token-by-token loop should change."""
    base, T = climb[0], climb[0]["T"]
    most = max((part for part in PARTS if base["time"][part] is not None), key=lambda part: base["time"][part])
    share = 100 * base["time"][most] / base["seconds"]
    buffers = climb[2]["tok_s"] / base["tok_s"]
    batched = climb[BATCHED]["tok_s"] / base["tok_s"]
    spent = f"Token by token {NAMES[most]} takes {share:.0f} % of the time"
    if buffers > SAME:
        spent += f"; without copies and allocations the loop is {buffers:.2f} times as fast"
    elif buffers > 1 / SAME:
        spent += f"; leaving out copies and allocations changes hardly anything ({buffers:.2f} times)"
    else:
        spent += "; what copies and allocations cost is less than this machine's figures vary"
    if batched > SAME:
        return (f"{spent}. One train_step_batch over {T:,} tokens is {batched:,.1f} times as fast: "
                "change the loop to it first.")  # fmt: skip
    return f"{spent}. A batched call of {T:,} tokens is no faster here: give it more tokens or more streams."


def _longer(rows: Rows, longest: int) -> list[str]:
    """Whether more tokens a call pay."""
    batched = {row["T"]: row["tok_s"] for row in rows if row["rung"] == BATCHED}
    shortest = min(batched)
    if shortest == longest:
        return []
    gain = batched[longest] / batched[shortest]
    if gain > SAME:
        return [f"T = {longest:,} in a call gives {gain:.2f} times the tokens/s of T = {shortest:,}: "
                "raise max_tokens as far as memory allows."]  # fmt: skip
    return [f"T = {longest:,} in a call is no faster than T = {shortest:,} ({gain:.2f} times): shorter calls cost "
            "nothing, and update more often."]  # fmt: skip


def _wider(steady: Mapping[str, Any], climb: Rows) -> list[str]:
    """Whether more streams pay."""
    gain = steady["tok_s"] / climb[BATCHED]["tok_s"]
    if gain > SAME:
        return [f"{steady['B']} streams x {steady['T']} tokens give {steady['tok_s']:,.0f} tokens/s, {gain:.2f} times "
                "one stream: cut the text into streams (streams=B)."]  # fmt: skip
    return [f"{steady['B']} streams x {steady['T']} tokens give {steady['tok_s']:,.0f} tokens/s, {gain:.2f} times one "
            "long stream: one stream already fills this machine."]  # fmt: skip


def _waiting(steady: Mapping[str, Any]) -> list[str]:
    """Host and GPU in consecutive batched steps."""
    out = []
    if steady["cpu_percent"] > WAITING_CPU:
        out.append(f"The host takes {steady['cpu_percent']:.0f} % of a core in consecutive steps: use sync=\"block\" "
                   "and longer calls.")  # fmt: skip
    if steady["gpu_percent"] is not None and steady["gpu_percent"] < BUSY_GPU:
        out.append(f"The GPU is busy {steady['gpu_percent']:.0f} % of the time: give a call more streams or tokens.")
    return out
