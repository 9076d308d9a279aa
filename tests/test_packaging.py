"""What an installation and its metadata say: one version, extras, typed, stubs that name what the binding has."""

import ast
import re
from importlib import metadata, resources
from pathlib import Path

import pytest
from click.testing import CliRunner

import neurogen_cy as ng
from neurogen_cy import backend, cli, plots
from neurogen_cy.config import tomllib

ROOT = Path(__file__).parent.parent


INTERNAL = {"Arrays", "Borrowed", "Core", "DeviceArray", "Held", "Pack"}
"""Classes of the binding that nothing hands out."""


def test_one_version():
    try:
        assert metadata.version("neurogen_cy") == ng.__version__
    except metadata.PackageNotFoundError:  # on PYTHONPATH, not installed
        pass
    assert CliRunner().invoke(cli.main, ["--version"]).output == f"neurogen, version {ng.__version__}\n"
    assert re.search(rf"^## {re.escape(ng.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    quoted = re.compile(rf"""["']{re.escape(ng.__version__)}["']""")
    sources = [p for folder in ("neurogen_cy", "src_cuda", "native_build") for p in (ROOT / folder).rglob("*.*")]
    texts = [p for p in [*sources, ROOT / "setup.py", ROOT / "pyproject.toml"] if p.suffix not in (".so", ".pyc")]
    places = [path.name for path in texts if quoted.search(path.read_text(encoding="utf-8"))]
    assert places == ["_version.py"]


def test_the_extras_that_messages_name_exist():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    assert {"cuda", "plot", "tensorboard", "pycuda", "sentencepiece", "datasets", "test"} <= extras
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "neurogen_cy").glob("*.py")]
    named = {extra for text in sources for extra in re.findall(r"neurogen_cy\[(\w+)\]", text)}
    assert "plot" in named and named <= extras


def test_the_package_is_typed():
    files = {path.name for path in resources.files("neurogen_cy").iterdir()}
    assert {"py.typed", "_cpu.pyi", "_cuda.pyi"} <= files


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_stubs_name_everything_public(name):
    try:
        module = backend.load(name, built=True)[1]
    except RuntimeError as error:
        pytest.skip(str(error))
    tree = ast.parse((resources.files("neurogen_cy") / "_cpu.pyi").read_text())
    if name == "cuda":
        tree.body += ast.parse((resources.files("neurogen_cy") / "_cuda.pyi").read_text()).body
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for member, thing in vars(module).items():
        if member.startswith("_") or member in INTERNAL or getattr(thing, "__module__", "") != module.__name__:
            continue
        if not isinstance(thing, type):
            assert member in functions, f"{member} is not in the stub"
            continue
        stub = classes[member]
        bases = [classes[base.id] for base in stub.bases if isinstance(base, ast.Name) and base.id in classes]
        known = {name for node in (stub, *bases) for name in map(_name, node.body)}
        missing = {part for part in vars(thing) if not part.startswith("_")} - known
        assert not missing, f"{member} has {missing}, its stub has not"


def _name(node):
    return getattr(node, "name", None) or getattr(getattr(node, "target", None), "id", None)


def test_public_names_are_there_and_documented():
    for module in (ng, plots):
        for name in module.__all__:
            assert hasattr(module, name), name
