"""The CUDA toolkit: where it is, what it should compile for, and cuBLASLt's header.

NEUROGEN_CUDA        auto (default): build the CUDA library where nvcc is found; 1: fail where it cannot be; 0: do not
NEUROGEN_CUDA_ARCHS  compute capabilities, as in "80;90a" (default), or "native": this machine's GPU alone
CUDA_HOME, CUDA_PATH where the toolkit is; else it is looked for on PATH and in /usr/local/cuda
"""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from native_build.library import FOLDER, INCLUDES, SOURCES, StaticLibrary, cxx_command, extra_flags

OLDEST = (12, 4)
ARCHS = "80;90a"  # 8.x, and Hopper with what only it has; newer GPUs compile the PTX
HEADER = "cublasLt.h"
WHEELS = {12: "nvidia-cublas-cu12>=12.4", 13: "nvidia-cublas>=13"}
PACKAGES = ("nvidia.cu13", "nvidia.cublas")  # where the wheels put it, the newer layout first


class Unavailable(Exception):
    """Why the CUDA library cannot be built here."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit on this machine."""

    home: Path
    version: tuple[int, int]

    @property
    def libraries(self) -> Path:
        """Folder of libcudart_static.a."""
        folders = (self.home / "lib64", self.home / "targets/x86_64-linux/lib", self.home / "lib")
        return next((folder for folder in folders if (folder / "libcudart_static.a").exists()), folders[0])

    def __str__(self) -> str:
        return f"CUDA {self.version[0]}.{self.version[1]} in {self.home}"


def mode(environment: Mapping[str, str]) -> str:
    """NEUROGEN_CUDA, checked."""
    value = environment.get("NEUROGEN_CUDA", "") or "auto"
    if value not in ("auto", "0", "1"):
        sys.exit(f"NEUROGEN_CUDA: expected auto, 0 or 1, got {value!r}")
    return value


def find_toolkit(environment: Mapping[str, str], usual: Path = Path("/usr/local/cuda")) -> Toolkit:
    """The toolkit of this environment; Unavailable says what is missing."""
    named = [Path(environment[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    on_path = shutil.which("nvcc", path=environment.get("PATH", ""))
    # A wrapper (ccache, Debian's) is not where the toolkit is; what it stands for may be.
    wrapped = [path.parent.parent for path in (Path(on_path), Path(on_path).resolve())] if on_path else []
    for home in [*named, *wrapped, usual]:
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime_api.h").exists():
            found = Toolkit(home.resolve(), _version(home / "bin/nvcc"))
            if found.version < OLDEST:
                raise Unavailable(f"expected CUDA {OLDEST[0]}.{OLDEST[1]} or newer, got {found}")
            return found
    raise Unavailable(f"no nvcc in CUDA_HOME, CUDA_PATH, PATH or {usual}")


def _version(nvcc: Path) -> tuple[int, int]:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", said)
    if match is None:
        raise Unavailable(f"{nvcc} --version: expected 'release X.Y', got {said!r}")
    return int(match[1]), int(match[2])


def arch_flags(archs: str) -> list[str]:
    """nvcc's flags: machine code for each capability, and PTX of the newest for the GPUs to come.

    PTX of an "a" target (90a) runs nowhere else, so the PTX is of the plain one: compute_90 lets Blackwell use what
    Hopper brought, which compute_80 would not.
    """
    if archs == "native":
        return ["-arch=native"]
    names = [name for name in re.split("[;, ]+", archs) if name]
    for name in names:
        if not re.fullmatch(r"\d{2,3}[af]?", name) or int(name.rstrip("af")) < 80:
            sys.exit(f"NEUROGEN_CUDA_ARCHS: expected capabilities from 80 as in '80;90a', or native, got {archs!r}")
    if not names:
        sys.exit("NEUROGEN_CUDA_ARCHS: expected at least one capability, got none")
    newest = max(int(name.rstrip("af")) for name in names)
    codes = [(name, f"sm_{name}") for name in names] + [(str(newest), f"compute_{newest}")]
    return [f"-gencode=arch=compute_{name},code={code}" for name, code in codes]


def header_folder(toolkit: Toolkit) -> Path | None:
    """Folder of cuBLASLt's header: None where the toolkit has it, else a copy of that of an installed wheel.

    The copy stays: the next build does without the wheel, and its commands do not depend on where a wheel was.
    """
    if (toolkit.home / "include" / HEADER).exists():
        return None
    kept = FOLDER / f"cublas-{toolkit.version[0]}"
    for package in () if (kept / HEADER).exists() else PACKAGES:
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for place in (spec and spec.submodule_search_locations) or ():
            for path in Path(place, "include").glob("cublas*.h"):
                kept.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, kept)
    if not (kept / HEADER).exists():
        raise Unavailable(f"no {HEADER} in {toolkit}, nor an installed wheel with it "
                          f"(pip install '{WHEELS[min(toolkit.version[0], max(WHEELS))]}')")
    return kept


def requirements(environment: Mapping[str, str]) -> list[str]:
    """What pip has to install before the CUDA library can be compiled."""
    if mode(environment) == "0":
        return []
    try:
        toolkit = find_toolkit(environment)
    except Unavailable:  # setup.py says it
        return []
    try:
        header_folder(toolkit)
    except Unavailable:
        return [WHEELS[min(toolkit.version[0], max(WHEELS))]]
    return []


def choose(environment: Mapping[str, str]) -> tuple[Toolkit | None, str]:
    """The toolkit to build with, or None, and the line that says so. NEUROGEN_CUDA=1 ends the build instead of None."""
    wanted = mode(environment)
    if wanted == "0":
        return None, "neurogen_cy: the CPU library alone (NEUROGEN_CUDA=0)"
    try:
        toolkit = find_toolkit(environment)
        header_folder(toolkit)
    except Unavailable as error:
        if wanted == "1":
            sys.exit(f"neurogen_cy: NEUROGEN_CUDA=1, but {error}")
        return None, f"neurogen_cy: the CPU library alone: {error}"
    archs = environment.get("NEUROGEN_CUDA_ARCHS") or ARCHS
    codes = [flag.split("code=")[-1] for flag in arch_flags(archs)]
    return toolkit, f"neurogen_cy: the CPU and the CUDA library for {', '.join(codes)}, by {toolkit}"


def library(toolkit: Toolkit, environment: Mapping[str, str]) -> StaticLibrary:
    """src_cuda/cuda, to be built."""
    includes, kept = [*INCLUDES, f"-I{SOURCES / 'cuda'}"], header_folder(toolkit)
    host = [*cxx_command(), *includes, "-isystem", str(toolkit.home / "include")]
    archs = arch_flags(environment.get("NEUROGEN_CUDA_ARCHS") or ARCHS)
    nvcc = [str(toolkit.home / "bin/nvcc"), "-std=c++17", "-O3", "-lineinfo", *archs, *includes]
    nvcc.append("-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")
    if "CXX" in environment:
        nvcc.append(f"-ccbin={shlex.split(environment['CXX'])[0]}")
    if kept is not None:  # last: a wheel's headers must not stand before the toolkit's
        host += ["-idirafter", str(kept)]
        nvcc.append(f"-Xcompiler=-idirafter,{kept}")
    out = StaticLibrary("cuda")
    for source in sorted((SOURCES / "cuda").glob("*.c*")):
        if source.suffix == ".cu":
            out.add(source, nvcc)
        elif source.suffix == ".cpp":
            out.add(source, [*host, *extra_flags("CXXFLAGS")])
    return out
