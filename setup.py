"""Builds the native libraries and the Cython extensions over them. Metadata is in pyproject.toml.

    src_cuda/common + src_cuda/cpu -> libneurogen_cpu.a  -> neurogen_cy._cpu
    src_cuda/cuda                  -> libneurogen_cuda.a -> neurogen_cy._cuda   where there is a CUDA toolkit

The inner loops (src_cuda/cpu/kernels.cpp) are compiled once per instruction set and chosen at run time, so one
build serves every x86-64 machine. native_build/cuda.py says which GPUs the other one serves.
"""

import os
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))
from native_build import cuda
from native_build.library import INCLUDES, SOURCES, StaticLibrary, cxx_command, extra_flags

INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl",
               "-mprefer-vector-width=512"],
}
TOOLKIT, SUMMARY = cuda.choose(os.environ)


def cpu_library() -> StaticLibrary:
    command = [*cxx_command(), "-fopenmp", *INCLUDES, f"-I{SOURCES / 'cpu'}"]
    library = StaticLibrary("cpu")
    for source in sorted([*(SOURCES / "common").glob("*.cpp"), *(SOURCES / "cpu").glob("*.cpp")]):
        sets = INSTRUCTION_SETS if source.name == "kernels.cpp" else {"": []}
        for name, flags in sets.items():
            define = [f"-DNG_ISA={name}"] if name else []
            library.add(source, [*command, *flags, *define, *extra_flags("CXXFLAGS")], f"_{name}" if name else "")
    return library


class BuildNative(build_ext):
    """Builds the static library of each backend before the extension that wraps it."""

    def run(self) -> None:
        print(SUMMARY, flush=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        library = cuda.library(TOOLKIT, os.environ) if ext.name.endswith("_cuda") else cpu_library()
        ext.extra_objects = [library.build()]
        ext.depends += ext.extra_objects
        super().build_extension(ext)


def extension(backend: str, link: list[str]) -> Extension:
    parts = (SOURCES / part for part in ("include", "common", backend))
    return Extension(
        f"neurogen_cy._{backend}",
        [f"neurogen_cy/_{backend}.pyx"],
        language="c++",
        include_dirs=[str(SOURCES / "include")],
        extra_compile_args=["-std=c++17", "-O2", "-fvisibility=hidden", *extra_flags("CXXFLAGS")],
        extra_link_args=[*link, *extra_flags("LDFLAGS")],
        depends=[str(path) for part in parts for path in sorted(part.rglob("*.*"))],
    )


def extensions() -> list[Extension]:
    out = [extension("cpu", ["-fopenmp"])]
    if TOOLKIT is not None:
        # The runtime is inside, and its symbols stay there: another copy in the process cannot take its place.
        runtime = [f"-L{TOOLKIT.libraries}", "-lcudart_static", "-ldl", "-lpthread", "-lrt"]
        out.append(extension("cuda", [*runtime, "-Wl,--exclude-libs,ALL"]))
    return cythonize(out, build_dir="build/cython", include_path=["neurogen_cy"])


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
