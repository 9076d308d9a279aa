"""Static libraries from C++ and CUDA sources, compiled in parallel; what has not changed is kept."""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = os.environ.get("NEUROGEN_SANITIZE", "")  # for gcc's -fsanitize, as in "address,undefined"
# pip compiles in a new temporary folder each time: objects would never be kept.
FOLDER = ROOT / "build" / "-".join(["native", *filter(None, SANITIZERS.split(","))])
SOURCES = Path("src_cuda")
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
             "-ffp-contract=fast", "-Wall", "-Wextra"]
INCLUDES = [f"-I{SOURCES / 'include'}", f"-I{SOURCES / 'common'}"]


def extra_flags(name: str) -> list[str]:
    """CXXFLAGS and LDFLAGS of the environment come last, and the flags of NEUROGEN_SANITIZE with them."""
    flags = shlex.split(os.environ.get(name, ""))
    if SANITIZERS:
        flags.append(f"-fsanitize={SANITIZERS}")
        if name == "CXXFLAGS":
            flags += ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]
    return flags


def cxx_command() -> list[str]:
    """The C++ compiler with the flags of every source."""
    return [*shlex.split(os.environ.get("CXX", "g++")), *CXX_FLAGS]


class StaticLibrary:
    """`libneurogen_<name>.a`, of all sources that were added."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.jobs: list[tuple[Path, list[str]]] = []

    def add(self, source: Path, command: list[str], tag: str = "") -> None:
        """`command` compiles; source and outputs are added to it. `tag` tells two objects of one source apart."""
        target = FOLDER / f"{self.name}_{source.stem}{tag}.o"
        outputs = ["-MMD", "-MF", str(target.with_suffix(".d")), "-c", str(source), "-o", str(target)]
        self.jobs.append((target, [*command, *outputs]))

    def build(self) -> str:
        """Path of the archive."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: renew(*job), self.jobs))
        archive = FOLDER / f"libneurogen_{self.name}.a"
        objects = [str(target) for target, _ in self.jobs]
        command = ["ar", "rcs", str(archive), *objects]
        if not is_fresh(archive, command, objects):
            archive.unlink(missing_ok=True)
            make(archive, command)
        return str(archive)


def renew(target: Path, command: list[str]) -> None:
    """Compiles an object unless it is fresh."""
    rule = target.with_suffix(".d")
    if not rule.exists() or not is_fresh(target, command, prerequisites(rule.read_text())):
        make(target, command)


def make(target: Path, command: list[str]) -> None:
    """Runs the command, and notes how the target was made."""
    note = target.with_suffix(".cmd")
    note.unlink(missing_ok=True)
    run(command)
    note.write_text(shlex.join(command))


def is_fresh(target: Path, command: list[str], read: list[str]) -> bool:
    """Whether the target was made by this very command from files that have not changed since."""
    note = target.with_suffix(".cmd")
    if not (target.exists() and note.exists() and note.read_text() == shlex.join(command)):
        return False
    made = target.stat().st_mtime_ns
    paths = [ROOT / path for path in read]
    return all(path.exists() and path.stat().st_mtime_ns < made for path in paths)


def prerequisites(rule: str) -> list[str]:
    """Files behind the colon of a make rule."""
    return shlex.split(rule.replace("\\\n", " ").split(":", 1)[1])


def run(command: list[str]) -> None:
    """Runs a compiler; ends the build with a message where it is missing or fails."""
    print(shlex.join(command), flush=True)
    try:
        subprocess.run(command, check=True, cwd=ROOT)
    except FileNotFoundError:
        sys.exit(f"neurogen_cy needs a C++17 compiler with OpenMP: {command[0]!r} was not found (set CXX, or "
                 "install g++)")
    except subprocess.CalledProcessError as error:
        hint = "; NEUROGEN_CUDA=0 builds without CUDA" if "nvcc" in command[0] else ""
        sys.exit(f"neurogen_cy: {command[0]} failed with exit status {error.returncode}{hint}")
