"""The build of the native libraries: which toolkit, which GPUs, and what is compiled again."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def load_package():
    """native_build is of the source tree, not of an installation."""
    folder = ROOT / "native_build"
    where = {"submodule_search_locations": [str(folder)]}
    spec = importlib.util.spec_from_file_location("native_build", folder / "__init__.py", **where)
    sys.modules["native_build"] = importlib.util.module_from_spec(spec)
    from native_build import cuda, library

    return cuda, library


cuda, library = load_package()


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """Makes a toolkit of a version, as far as it is looked at; no other one is seen."""
    monkeypatch.setattr(cuda, "FOLDER", tmp_path / "build")
    monkeypatch.setattr(cuda, "PACKAGES", ())
    find = cuda.find_toolkit
    monkeypatch.setattr(cuda, "find_toolkit", lambda environment: find(environment, tmp_path / "usual"))

    def make(name, version="13.0", header=True):
        home = tmp_path / name
        (home / "bin").mkdir(parents=True)
        (home / "include").mkdir()
        (home / "include/cuda_runtime_api.h").touch()
        if header:
            (home / "include/cublasLt.h").touch()
        (home / "bin/nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
        (home / "bin/nvcc").chmod(0o755)
        return home

    return make


def test_the_toolkit_is_the_named_one_or_on_path_or_in_the_usual_place(toolkit, tmp_path):
    with pytest.raises(cuda.Unavailable, match="no nvcc in CUDA_HOME, CUDA_PATH, PATH or .*usual"):
        cuda.find_toolkit({})
    homes = {name: toolkit(name) for name in ("usual", "on path", "path", "home")}
    environment = {}
    assert cuda.find_toolkit(environment).home == homes["usual"]
    environment["PATH"] = f"{tmp_path}:{homes['on path'] / 'bin'}"
    assert cuda.find_toolkit(environment).home == homes["on path"]
    environment["CUDA_PATH"] = str(homes["path"])
    assert cuda.find_toolkit(environment).home == homes["path"]
    environment["CUDA_HOME"] = str(homes["home"])
    found = cuda.find_toolkit(environment)
    assert (found.home, found.version) == (homes["home"], (13, 0))
    environment["CUDA_HOME"] = str(tmp_path / "absent")
    assert cuda.find_toolkit(environment).home == homes["path"]
    wrapper = tmp_path / "wrappers/bin"
    wrapper.mkdir(parents=True)
    (wrapper / "nvcc").symlink_to(homes["on path"] / "bin/nvcc")
    assert cuda.find_toolkit({"PATH": str(wrapper)}).home == homes["on path"]


def test_auto_says_what_is_missing_and_1_fails(toolkit):
    missing = "no nvcc in CUDA_HOME"
    chosen, summary = cuda.choose({})
    assert chosen is None and f"the CPU library alone: {missing}" in summary
    with pytest.raises(SystemExit, match=f"NEUROGEN_CUDA=1, but {missing}"):
        cuda.choose({"NEUROGEN_CUDA": "1"})
    old = {"CUDA_HOME": str(toolkit("old", "11.8"))}
    assert "expected CUDA 12.4 or newer, got CUDA 11.8 in" in cuda.choose(old)[1]
    bare = {"CUDA_HOME": str(toolkit("bare", header=False))}
    assert "no cublasLt.h in CUDA 13.0 in" in cuda.choose(bare)[1]
    assert cuda.requirements(bare) == ["nvidia-cublas>=13"] and cuda.requirements({}) == cuda.requirements(old) == []
    assert cuda.requirements({**bare, "NEUROGEN_CUDA": "0"}) == []
    twelve = {"CUDA_HOME": str(toolkit("twelve", "12.8", header=False))}
    assert cuda.requirements(twelve) == ["nvidia-cublas-cu12>=12.4"]
    whole = {"CUDA_HOME": str(toolkit("whole"))}
    chosen, summary = cuda.choose(whole)
    assert "for sm_80, sm_90a, compute_90, by CUDA 13.0 in" in summary and cuda.requirements(whole) == []
    assert cuda.choose({**whole, "NEUROGEN_CUDA": "1"}) == (chosen, summary)
    assert cuda.choose({**whole, "NEUROGEN_CUDA": "0"})[0] is None
    with pytest.raises(SystemExit, match="NEUROGEN_CUDA: expected auto, 0 or 1, got 'yes'"):
        cuda.choose({"NEUROGEN_CUDA": "yes"})


def test_a_wheels_header_is_copied_and_stays(toolkit, tmp_path, monkeypatch):
    include = tmp_path / "wheel_for_this_test/include"
    include.mkdir(parents=True)
    for name in ("cublasLt.h", "cublas_api.h", "nvblas.h"):
        (include / name).write_text(name)
    found = cuda.find_toolkit({"CUDA_HOME": str(toolkit("bare", header=False))})
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "PACKAGES", ("no_such_package.at_all", "wheel_for_this_test"))
        patch.syspath_prepend(tmp_path)
        kept = cuda.header_folder(found)
    assert sorted(path.name for path in kept.iterdir()) == ["cublasLt.h", "cublas_api.h"]
    assert cuda.header_folder(found) == kept  # the wheel is gone
    commands = [command for _, command in cuda.library(found, {"CXX": "g++-13 -pipe"}).jobs]
    for command in commands:
        kind = "device" if str(found.home) in command[0] else "host"
        last = f"-Xcompiler=-idirafter,{kept}" if kind == "device" else str(kept)
        assert last in command and ("-ccbin=g++-13" in command) == (kind == "device")


@pytest.mark.parametrize(
    ("archs", "codes"),
    [
        ("80;90a", ["compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_90,code=compute_90"]),
        ("89", ["compute_89,code=sm_89", "compute_89,code=compute_89"]),
        ("120a 80", ["compute_120a,code=sm_120a", "compute_80,code=sm_80", "compute_120,code=compute_120"]),
    ],
)
def test_machine_code_for_each_and_portable_ptx_of_the_newest(archs, codes):
    assert cuda.arch_flags(archs) == [f"-gencode=arch={code}" for code in codes]
    assert cuda.arch_flags("native") == ["-arch=native"]


@pytest.mark.parametrize("archs", ["75", "sm_90", "80;x", ";"])
def test_other_capabilities_are_refused(archs):
    with pytest.raises(SystemExit, match="NEUROGEN_CUDA_ARCHS: expected "):
        cuda.arch_flags(archs)


def test_only_what_changed_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "FOLDER", tmp_path / "native")
    sources = {name: tmp_path / f"{name}.cpp" for name in ("one", "other")}
    header = tmp_path / "with space.h"
    header.write_text("inline int f() { return 1; }\n")
    sources["one"].write_text('#include "with space.h"\nint one() { return f(); }\n')
    sources["other"].write_text("int other() { return 2; }\n")
    compiled = []
    run = library.run
    monkeypatch.setattr(library, "run", lambda command: (compiled.append(Path(command[-1]).stem), run(command)))

    def build(*flags):
        """Objects that were compiled, and whether they were archived anew."""
        compiled.clear()
        built = library.StaticLibrary("small")
        for source in sources.values():
            built.add(source, ["g++", *flags])
        archive = Path(built.build())
        assert archive.exists() and archive.name == "libneurogen_small.a"
        return sorted(compiled)

    def change(path):
        newest = max(file.stat().st_mtime_ns for file in (tmp_path / "native").iterdir())
        os.utime(path, ns=(newest + 1, newest + 1))

    archived, *objects = build()[::-1]
    assert len(build()) == 0 and len(objects) == 2 and archived
    change(header)
    assert build() == ["small_one", "small_other"]  # one object, and the archive, whose last member is other
    assert build() == []
    change(sources["other"])
    assert build() == ["small_other", "small_other"]
    assert len(build("-O1")) == 3 and build("-O1") == []
    header.rename(tmp_path / "gone.h")
    sources["one"].write_text("int one() { return 1; }\n")
    assert build("-O1") == ["small_one", "small_other"]


def test_a_failing_compiler_ends_the_build_with_a_message(tmp_path):
    with pytest.raises(SystemExit, match="no-such-compiler' was not found"):
        library.run(["no-such-compiler"])
    failing = tmp_path / "nvcc"
    failing.write_text("#!/bin/sh\nexit 2\n")
    failing.chmod(0o755)
    with pytest.raises(SystemExit, match="nvcc failed with exit status 2; NEUROGEN_CUDA=0 builds without CUDA"):
        library.run([str(failing)])
