"""The introspection module for the tests of csrc/core and csrc/plan."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

from flash_attn_ext import _load

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def build_introspect(folder: Path) -> ModuleType:
    """Compiles csrc/bindings/introspect.cpp into `folder` and imports it."""
    import pybind11

    sources = [CSRC / "bindings/introspect.cpp", *sorted((CSRC / "plan").glob("*.cpp"))]
    library = folder / f"_introspect{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O0", "-fPIC", "-shared"]
    command += ["-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
    command += [f"-I{include}" for include in includes]
    subprocess.run([*command, *map(str, sources), "-o", str(library)], check=True)
    name = "flash_attn_ext._introspect"
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_file_location(name, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def introspect(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The installed module, else one compiled here from this checkout's sources."""
    installed = _load.status().introspect
    if installed is not None:
        return installed
    return build_introspect(tmp_path_factory.mktemp("introspect"))


@pytest.fixture
def with_introspect(introspect: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Makes flash_attn_ext itself see the module."""
    monkeypatch.setitem(sys.modules, "flash_attn_ext._introspect", introspect)
    monkeypatch.setattr(_load.status(), "introspect", introspect)
    return introspect


@pytest.fixture
def without_introspect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes flash_attn_ext look as if the module was not built for this Python."""
    monkeypatch.setattr(_load.status(), "introspect", None)
