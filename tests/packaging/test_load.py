"""The loader: every misfit is one sentence with cause and fix, and never an exception.

The functions run in this process on a folder that pretends to be the package; the last tests start
fresh interpreters on a copy of the package whose build description was edited.
"""

from __future__ import annotations

import compileall
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flash_attn_ext
from flash_attn_ext import _installed, _load

INFO = {
    "version": "1.2.0",
    "torch_min": "2.10",
    "cxx11abi": True,
    "cuda": "13.0",
    "driver_min": "580",
    "archs": ["sm80"],
    "source_hash": "cpp",
}

Load = Callable[..., _load.LoadStatus]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A package folder with a build description, a binder and a kernel library."""
    package = tmp_path / "flash_attn_ext"
    package.mkdir()
    (package / "_build_info.json").write_text(json.dumps(INFO))
    (package / "_C.abi3.so").write_bytes(b"not a library")
    (package / "_sm80.abi3.so").touch()
    return package


@pytest.fixture
def load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Runs load() on that folder, with the description changed; opening a library succeeds."""
    opened: list[str] = []

    def run(
        open_library: Callable[[str], None] = opened.append, **changes: Any
    ) -> _load.LoadStatus:
        (folder / "_build_info.json").write_text(json.dumps({**INFO, **changes}))
        monkeypatch.setattr(_load, "__file__", str(folder / "_load.py"))
        monkeypatch.setattr(_load, "_status", None)
        monkeypatch.setattr(torch.ops, "load_library", open_library)
        monkeypatch.setattr(_load, "_foreign_kernels", lambda: False)
        # The tests themselves may run from a source tree that was passed over.
        monkeypatch.delitem(vars(flash_attn_ext), _installed.REDIRECTED_FROM, raising=False)
        return _load.status()

    return run


def test_fits(load: Load, folder: Path) -> None:
    opened: list[str] = []
    status = load(opened.append)
    assert opened == [str(folder / "_C.abi3.so")]
    assert status.binder_loaded
    assert status.problems == []
    assert status.arch_libraries == {"sm80": folder / "_sm80.abi3.so"}
    assert status.build_info == INFO
    assert status.redirected_from is None
    assert _load.status() is status


def test_old_torch(load: Load) -> None:
    status = load(pytest.fail, torch_min="99.1")
    assert not status.binder_loaded
    (problem,) = status.problems
    assert problem.startswith(
        f"flash_attn_ext 1.2.0 needs torch >= 99.1 and this environment has {torch.__version__}"
    )
    assert problem.endswith('fix: pip install -U "torch>=99.1".')


def test_cxx11abi(load: Load) -> None:
    (problem,) = load(pytest.fail, cxx11abi=False).problems
    assert "was built with _GLIBCXX_USE_CXX11_ABI=0 and this torch has 1" in problem
    assert "FLASH_ATTN_EXT_FORCE_BUILD=1 pip install ." in problem


def test_binder_is_gone(load: Load, folder: Path) -> None:
    (folder / "_C.abi3.so").unlink()
    (problem,) = load(pytest.fail).problems
    assert "_C.abi3.so is missing although _build_info.json describes a build" in problem


def test_linker_text(load: Load) -> None:
    def refuse(path: str) -> None:
        cause = OSError("libfoo.so.7: cannot open shared object file")
        raise OSError("Could not load this library") from cause

    status = load(refuse)
    assert not status.binder_loaded
    assert status.problems == [
        "_C.abi3.so cannot be opened, so no GPU kernels are loaded: libfoo.so.7: cannot open "
        "shared object file; fix: rebuild for this environment: "
        "FLASH_ATTN_EXT_FORCE_BUILD=1 pip install ."
    ]


def test_a_file_that_is_no_library(load: Load) -> None:
    (problem,) = load(torch.ops.load_library).problems
    assert "_C.abi3.so cannot be opened" in problem
    assert "file too short" in problem or "invalid ELF header" in problem


def test_torch_refuses_the_ops(load: Load) -> None:
    def refuse(path: str) -> None:
        raise RuntimeError("no such schema\nlong trace")

    (problem,) = load(refuse).problems
    assert f"cannot register its ops in torch {torch.__version__}" in problem
    assert "no such schema; fix:" in problem


def test_kernels_of_another_library(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    load()
    monkeypatch.setattr(_load, "_status", None)
    monkeypatch.setattr(_load, "_foreign_kernels", lambda: True)
    (problem,) = _load.status().problems
    assert problem.startswith("another library has already registered CUDA kernels")


def test_foreign_kernels_asks_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "_NAMESPACE", "no_such_namespace")
    assert not _load._foreign_kernels()


@pytest.mark.parametrize("text", [None, "nonsense", "[]"])
def test_unbuilt_source_folder(load: Load, folder: Path, monkeypatch, text: str | None) -> None:
    load()
    (folder / "_build_info.json").unlink()
    if text is not None:
        (folder / "_build_info.json").write_text(text)
    monkeypatch.setattr(_load, "_status", None)
    status = _load.status()
    assert status.build_info is None
    assert not status.binder_loaded
    (problem,) = status.problems
    assert f"is used from its source folder {folder}, which was not built" in problem


def test_cpu_only_torch_on_a_gpu_machine(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(_load, "_DRIVER_DEVICE", str(tmp_path))
    status = load()
    assert status.binder_loaded  # a notice, no misfit
    assert "is a build without CUDA, so no GPU can be used" in status.problems[0]
    assert "install a torch built for CUDA 13.0 or newer" in status.problems[0]
    monkeypatch.setattr(_load, "_DRIVER_DEVICE", str(tmp_path / "none"))
    assert load().problems == []


class Driver:
    """libcuda of a driver that supports CUDA 12.4."""

    failure = 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 12040
        return self.failure


def test_driver_too_old(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    load()
    problem = _load.driver_problem()
    assert problem.startswith(
        "the kernels were built with CUDA 13.0 and need an NVIDIA driver >= 580, this driver "
        "supports CUDA 12.4 at most; fix: update the driver, or build with a CUDA 12 toolkit"
    )
    load(cuda="12.8")
    assert _load.driver_problem() == ""
    load(archs=[])
    assert _load.driver_problem() == ""


def test_driver_that_does_not_answer(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    load()
    monkeypatch.setattr(Driver, "failure", 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert _load.driver_problem() == ""

    def refuse(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert _load.driver_problem() == ""


def test_built_from_other_sources(load: Load, folder: Path) -> None:
    load()
    assert _load.source_problem() == ""  # no sources beside the package
    (folder.parent / "wheels").mkdir()
    pick = folder.parent / "wheels" / "pick.py"
    pick.write_text("def source_hash(root):\n    return 'cpp'\n")
    assert _load.source_problem() == ""
    pick.write_text("def source_hash(root):\n    return 'edited'\n")
    assert _load.source_problem() == (
        f"the compiled libraries in {folder} were built from other sources than those in "
        f"{folder.parent}; fix: run the installation again there "
        "(FLASH_ATTN_EXT_FORCE_BUILD=1 pip install .)"
    )


def test_second_copy(load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _load.claim_ops()  # this copy's own claim holds
    monkeypatch.setattr(_load, "__file__", str(folder / "_load.py"))
    with pytest.raises(ImportError, match="two copies of flash_attn_ext are in this process"):
        _load.claim_ops()


def test_introspect_is_optional(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_ext._introspect", None)
    assert load().introspect is None


def test_introspect_module(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    module = types.ModuleType("flash_attn_ext._introspect")
    monkeypatch.setitem(sys.modules, "flash_attn_ext._introspect", module)
    assert load().introspect is module


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package in use, in a folder of its own."""
    source = Path(flash_attn_ext.__file__).parent
    target = tmp_path / "site"
    shutil.copytree(source, target / "flash_attn_ext", ignore=shutil.ignore_patterns("__pycache__"))
    return target


def run_python(code: str, path: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=path.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_attention_works_though_the_build_needs_a_newer_torch(copy: Path) -> None:
    info_file = copy / "flash_attn_ext" / "_build_info.json"
    info_file.write_text(json.dumps({**INFO, "torch_min": "99.0"}))
    out = run_python(
        "import torch, flash_attn_ext as fa\n"
        "q = torch.randn(1, 4, 2, 8)\n"
        "print(fa.flash_attn_func(q, q, q).shape)\n"
        "from flash_attn_ext import _load\n"
        "print(_load.status().package_dir, *_load.status().problems)\n",
        copy,
    )
    assert "torch.Size([1, 4, 2, 8])" in out
    assert f"{copy}/flash_attn_ext flash_attn_ext 1.2.0 needs torch >= 99.0" in out


def test_import_makes_no_cuda_call_and_is_quick(copy: Path) -> None:
    code = (
        "import time, torch\n"
        "def refuse(): raise AssertionError('CUDA was initialised')\n"
        "torch.cuda._lazy_init = refuse\n"
        "start = time.process_time()\n"
        "import flash_attn_ext\n"
        "print(1000 * (time.process_time() - start))\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    compileall.compile_dir(copy, quiet=1)  # as an installation does
    assert min(float(run_python(code, copy)) for _ in range(4)) < 60
