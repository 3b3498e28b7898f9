"""Compiles and runs csrc/tests/*.cpp with the sanitizers, and the device probe for every target."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import NEEDS_CXX, NEEDS_NVCC, require

CSRC = Path(__file__).resolve().parents[2] / "csrc"
PROGRAMS = sorted((CSRC / "tests").glob("test_*.cpp"))
HEADERS = sorted((CSRC / "core").glob("*.h"))
STRICT = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
SANITIZE = ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiler() -> str:
    require(NEEDS_CXX)
    return os.environ.get("CXX", "g++")


def nvcc() -> str:
    require(NEEDS_NVCC)
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and os.path.exists(os.path.join(home, "bin", "nvcc")):
            return os.path.join(home, "bin", "nvcc")
    found = shutil.which("nvcc")
    assert found is not None
    return found


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_program(program: Path, tmp_path: Path) -> None:
    sources = [program]
    if program.stem == "test_plan":
        sources += sorted((CSRC / "plan").glob("*.cpp"))
    binary = tmp_path / program.stem
    run(compiler(), *STRICT, *SANITIZE, *sources, "-o", binary)
    printed = run(binary)
    checks, failures = map(int, re.findall(r"(\d+) checks, (\d+) failures", printed)[0])
    assert failures == 0
    assert checks > 1000


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_header_compiles_alone_without_cuda(header: Path, tmp_path: Path) -> None:
    source = tmp_path / "alone.cpp"
    source.write_text(f'#include "core/{header.name}"\n#include "core/{header.name}"\n')
    run(compiler(), *STRICT, "-fsyntax-only", source)


@pytest.mark.parametrize("arch", ["80", "89", "90a"])
def test_device_probe_compiles(arch: str, tmp_path: Path) -> None:
    target = f"arch=compute_{arch},code=sm_{arch}"
    flags = ["-std=c++17", "-O3", "-Werror", "all-warnings", f"-I{CSRC}", "-gencode", target]
    probe = CSRC / "tests/device_probe.cu"
    run(nvcc(), *flags, "-cubin", probe, "-o", tmp_path / "probe.cubin")


def test_device_probe_includes_every_core_header() -> None:
    text = (CSRC / "tests/device_probe.cu").read_text()
    missing = [h.name for h in HEADERS if f'#include "core/{h.name}"' not in text]
    # Reached through another header, or without device code.
    assert set(missing) <= {"arch.h", "backend.h", "host_device.h"}
