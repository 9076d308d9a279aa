"""Builds the native libraries and the Cython extensions over them. Metadata is in pyproject.toml.

    src_cuda/common + src_cuda/cpu -> libneurogen_cpu.a -> neurogen_cy._cpu

The inner loops (src_cuda/cpu/kernels.cpp) are compiled once per instruction set and chosen at run time, so one
build serves every x86-64 machine.
"""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = Path("src_cuda")
INCLUDES = [str(SOURCES / "include"), str(SOURCES / "common"), str(SOURCES / "cpu")]
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno",
             "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra"]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl",
               "-mprefer-vector-width=512"],
}


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def extra_flags(name: str) -> list[str]:
    """CXXFLAGS and LDFLAGS of the environment come last (sanitizers, debugging)."""
    return shlex.split(os.environ.get(name, ""))


def run(command: list[str]) -> None:
    print(" ".join(command), flush=True)
    try:
        subprocess.run(command, check=True, cwd=ROOT)
    except FileNotFoundError:
        sys.exit(f"neurogen_cy needs a C++17 compiler with OpenMP: {command[0]!r} was not found (set CXX, or "
                 "install g++)")


class StaticLibrary:
    """Compiles sources to objects in parallel and archives them; an object is kept while its command and every
    source file it may include are older."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.jobs: list[tuple[Path, list[str]]] = []

    def add(self, source: Path, flags: list[str], tag: str = "") -> None:
        target = self.folder / f"{self.name}_{source.stem}{tag}.o"
        includes = [f"-I{path}" for path in INCLUDES]
        self.jobs.append((target, [*compiler(), *CXX_FLAGS, *flags, *includes, *extra_flags("CXXFLAGS"), "-c",
                                   str(source), "-o", str(target)]))

    def build(self) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        newest = max(path.stat().st_mtime for path in (ROOT / SOURCES).rglob("*") if path.is_file())
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: self.compile(*job, newest), self.jobs))
        archive = self.folder / f"libneurogen_{self.name}.a"
        archive.unlink(missing_ok=True)
        run(["ar", "rcs", str(archive), *(str(target) for target, _ in self.jobs)])
        return str(archive)

    @staticmethod
    def compile(target: Path, command: list[str], newest: float) -> None:
        note = target.with_suffix(".cmd")
        fresh = target.exists() and target.stat().st_mtime > newest
        if fresh and note.exists() and note.read_text() == " ".join(command):
            return
        run(command)
        note.write_text(" ".join(command))


def cpu_library(folder: Path) -> str:
    library = StaticLibrary("cpu", folder)
    for source in sorted([*(SOURCES / "common").glob("*.cpp"), *(SOURCES / "cpu").glob("*.cpp")]):
        if source.name == "kernels.cpp":
            for name, flags in INSTRUCTION_SETS.items():
                library.add(source, [*flags, f"-DNG_ISA={name}"], f"_{name}")
        else:
            library.add(source, [])
    return library.build()


class BuildNative(build_ext):
    """Builds the static library of each backend before the extension that wraps it."""

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.build_temp).resolve() / "native"
        ext.extra_objects = [cpu_library(folder)]
        super().build_extension(ext)


def extensions() -> list[Extension]:
    headers = [str(path) for path in (ROOT / SOURCES).rglob("*.h")]
    cpu = Extension(
        "neurogen_cy._cpu",
        ["neurogen_cy/_cpu.pyx"],
        language="c++",
        include_dirs=INCLUDES[:1],
        extra_compile_args=["-std=c++17", "-O2", "-fvisibility=hidden", *extra_flags("CXXFLAGS")],
        extra_link_args=["-fopenmp", *extra_flags("LDFLAGS")],
        depends=[*headers, *(str(path) for path in SOURCES.rglob("*.cpp"))],
    )
    return cythonize([cpu], build_dir="build/cython", include_path=["neurogen_cy"])


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
