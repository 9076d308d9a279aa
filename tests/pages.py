"""Executes the fenced blocks of a page in order, in one folder, as a reader would who copies them.

`sh` goes to bash, line by line; `python` shares one namespace; the first line of `toml` names its file.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import neurogen_cy


def blocks(page):
    """(language, text) of every fenced block of a Markdown page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def shortened(text, shorter):
    """The text with other numbers; each of `shorter` has to be there."""
    for old, new in shorter.items():
        assert old in text, f"{old!r} is not on the page"
        text = text.replace(old, new)
    return text


def execute(page, folder, shorter):
    """Run all blocks of a page in `folder`; return what was printed, block by block."""
    languages, texts = zip(*blocks(page))
    assert set(languages) <= {"sh", "python", "toml"}, "everything on the page is executed"
    mark = "\n\0\n"
    texts = shortened(mark.join(texts), shorter).split(mark)
    environment = _environment(folder)
    names, printed = {}, []
    for number, (language, text) in enumerate(zip(languages, texts)):
        if language == "toml":
            file = re.match(r"# (\S+)\n", text)
            (folder / file[1]).write_text(text)
            printed.append("")
        elif language == "sh":
            shell = ["bash", "-euo", "pipefail", "-c", text]
            run = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True)
            assert run.returncode == 0, f"{text}\n{run.stdout}\n{run.stderr}"
            printed.append(run.stdout)
        else:
            printed.append(_exec(compile(text, f"{page.name}, block {number}", "exec"), names))
    return printed


def _environment(folder):
    """Commands find this interpreter as python and this package as neurogen."""
    tools = folder / ".tools"
    tools.mkdir()
    for name, what in (("python", ""), ("neurogen", "-m neurogen_cy ")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {what}"$@"\n')
        (tools / name).chmod(0o755)
    home = str(Path(neurogen_cy.__file__).parents[1])
    return {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": home}


def _exec(code, names):
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, names)
    return out.getvalue()
