"""The pages of docs/ do what they say, and the reference is what the docstrings say."""

import importlib.util
import os
import re
from pathlib import Path

import pytest
from pages import blocks, execute

import neurogen_cy as ng

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SHORTER = {
    "for name in sorted(topics))": "for name in sorted(topics)[:16])",
    "--steps 1200": "--steps 12 --no-pictures", "--steps 1500": "--steps 15 --no-pictures",
    "--steps 400": "--steps 4 --no-pictures", "--only raster\n": "--only raster --format png\n", "steps=300": "steps=6",
    "warmup=30, evaluate_every=100": "warmup=1, evaluate_every=3", "--tokens 200": "--tokens 20",
    "--vocab-size 1024": "--vocab-size 300",
}  # fmt: skip


def test_every_block_of_the_tutorial(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    full = os.environ.get("NEUROGEN_TUTORIAL") == "full"
    printed = execute(DOCS / "TUTORIAL.md", tmp_path, {} if full else SHORTER)
    if full:
        print(*printed, sep="\n----\n")
    text = "\n".join(printed)
    right = [float(value) for value in re.findall(r"trial +\d+: (\d\.\d+) right", text)]
    assert right[0] < 0.3 and right[-1] > 0.9, "reward alone has taught it"
    pictures = [f"{name}.{kind}" for name in ng.plots.KINDS for kind in ng.plots.FORMATS]
    assert sorted(os.listdir("runs/topics/pictures")) == sorted(pictures)
    assert sorted(os.listdir("looked")) == ["gates.png", "gates.svg", "raster.png", "raster.svg"]
    for made in ("connectome.svg", "sentence.svg", "same.toml", "runs/loop/best", "runs/words/pictures/raster.png"):
        assert Path(made).exists(), made
    assert "bits/byte" in text and "step 6:" in text or full


def test_the_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("docs_api", DOCS / "api.py")
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    assert api.page() == (DOCS / "API.md").read_text(encoding="utf-8"), "run: python docs/api.py"


PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("benchmarks/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        if not re.match(r"https?:", target):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_command_of_the_readme_exists():
    from neurogen_cy import cli

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"(?:^|bin/|`)neurogen ([a-z]+)", text, flags=re.M)
    assert {"train", "generate", "eval", "plot", "info"} <= set(commands) <= set(cli.main.commands)
    assert blocks(ROOT / "README.md")
