"""Writes docs/API.md, the reference of everything public, from the docstrings: `python docs/api.py`.

tests/test_docs.py fails where the file is not what this script writes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import click

import neurogen_cy
from neurogen_cy import cli

PAGE = Path(__file__).with_name("API.md")
MODULES = ("plots", "backend", "profiling")
"""What `import neurogen_cy as ng` does not bring at once: what is in their `__all__`, or is defined in them."""


def page() -> str:
    """Return the whole reference as Markdown."""
    parts = [
        "# Reference\n",
        "Written from the docstrings by `python docs/api.py`. Shape letters: B streams, T tokens, V vocabulary, D",
        "width of the embedding and of Broca's output, n neurons of a region.\n",
        "## neurogen_cy\n",
        _text(inspect.getdoc(neurogen_cy) or ""),
    ]
    for name in neurogen_cy.__all__:
        thing = getattr(neurogen_cy, name)
        if callable(thing):
            parts += _entry(name, thing, "###")
    for name in MODULES:
        module = import_module(f"neurogen_cy.{name}")
        parts += [f"## neurogen_cy.{name}\n", _text(inspect.getdoc(module) or "")]
        for member, thing in _members(module):
            parts += _entry(member, thing, "###")
    parts += ["## The command line\n", *_commands()]
    return "\n".join(part.rstrip("\n") + "\n" if part.startswith("#") else part for part in parts).rstrip() + "\n"


def _members(module: ModuleType) -> Iterator[tuple[str, Any]]:
    names = getattr(module, "__all__", None) or [
        name for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__
    ]  # fmt: skip
    for name in names:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isroutine(thing):
            yield name, thing


def _entry(name: str, thing: Any, head: str) -> Iterator[str]:
    """A class with what can be called and read on it, or a function."""
    doc = inspect.getdoc(thing)
    if not doc:
        raise ValueError(f"{name}: expected a docstring, got none")
    yield f"{head} {name}\n"
    if not (inspect.isclass(thing) and issubclass(thing, Exception)) and (signature := _signature(thing)):
        yield f"```python\n{name}{signature}\n```\n"
    yield _text(doc)
    if not inspect.isclass(thing):
        return
    for member, value in vars(thing).items():
        plain = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if member.startswith("_") or not (inspect.isroutine(plain) or isinstance(plain, property)):
            continue
        if isinstance(plain, property):
            yield f"{head}# {name}.{member}\n"
        else:
            yield f"{head}# {name}.{member}{_signature(getattr(thing, member))}\n"
        if not (about := inspect.getdoc(plain)):
            raise ValueError(f"{name}.{member}: expected a docstring, got none")
        yield _text(about)


def _signature(thing: Any) -> str:
    """Names and defaults; types are in the text. The methods of an instance lose their self."""
    try:
        signature = inspect.signature(thing)
    except ValueError:
        return ""  # a class of the binding: the model makes them
    shown = [p.replace(annotation=p.empty) for p in signature.parameters.values() if not p.name.startswith("_")]
    if shown and shown[0].name in ("self", "cls"):
        del shown[0]
    text = str(signature.replace(parameters=shown, return_annotation=signature.empty))
    return re.sub(r"<([\w.]+) object at 0x\w+>|<factory>", "...", text)


def _text(doc: str) -> str:
    """A numpydoc docstring as Markdown: headings in bold, parameters as a list, examples as code."""
    lines = doc.splitlines()
    if lines and re.fullmatch(r"[\w.]+\(.*\)", lines[0]):  # Cython repeats the signature
        lines = lines[1:]
    out: list[str] = []
    section = ""
    for line, below in zip(lines, [*lines[1:], ""]):
        if re.fullmatch("-{3,}", line):
            continue
        if line and re.fullmatch("-{3,}", below):
            section = line
            out += [*([""] if out and out[-1] else []), f"**{line}**", ""]
        elif section == "Examples":
            out += [f"    {line}" if line else ""]
        elif section and line and not line.startswith(" "):
            name, colon, kind = line.partition(" : ")
            out.append(f"- `{name}` : {kind}" if colon else f"- {line}" if _is_item(below) else line)
        else:
            out.append(line and (f"  {line.strip()}" if line.startswith("    ") and section else line))
    return "\n".join(out).strip("\n") + "\n"


def _is_item(below: str) -> bool:
    return below.startswith("    ")


def _commands() -> Iterator[str]:
    yield _text(inspect.cleandoc(cli.main.help or ""))
    for name, command in cli.main.commands.items():
        arguments = " ".join(p.metavar or p.name.upper() for p in command.params if isinstance(p, click.Argument))
        yield f"### neurogen {name} {arguments}".rstrip() + "\n"
        yield _text(inspect.cleandoc(command.help or "")).replace("\b\n", "")
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                yield f"- `{_spelling(option)}` {option.help or ''}{_default(option)}"
        yield ""


def _spelling(option: click.Option) -> str:
    names = ", ".join((*option.opts, *option.secondary_opts))
    if option.is_flag:
        return names
    if isinstance(option.type, click.Choice):
        return f"{names} {'|'.join(map(str, option.type.choices))}"
    return f"{names} {option.metavar or option.type.name.upper().replace(' RANGE', '')}"


def _default(option: click.Option) -> str:
    return f" (default: {option.default})" if option.show_default and option.default is not None else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
