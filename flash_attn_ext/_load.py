"""Finds and opens the compiled libraries, and remembers in one sentence why one cannot be used.

``load()`` runs once when the package is imported. It makes no CUDA call and never raises because of
a library: without one the PyTorch backend computes everything. What is wrong is told by
``status().problems``, which ``python -m flash_attn_ext doctor`` prints.

The libraries (see build_tools/extensions.py): ``_C.abi3.so`` registers the CUDA implementations of
the ops; it opens ``_smXX.abi3.so``, the kernels of one architecture, when a GPU first needs them;
``_introspect.*.so`` gives plans to Python and is imported when first asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from flash_attn_ext._installed import BUILD_INFO, REDIRECTED_FROM

_NAMESPACE = "flash_attn_ext"
_BINDER = "_C.abi3.so"
_DRIVER_DEVICE = "/dev/nvidiactl"  # there if and only if NVIDIA's kernel module is loaded
_REBUILD = "FLASH_ATTN_EXT_FORCE_BUILD=1 pip install ."


@dataclasses.dataclass
class LoadStatus:
    """What was found in the package's folder and what could be opened.

    Attributes:
        package_dir: the folder of the package in use.
        build_info: content of ``_build_info.json``; None in a source folder that was not built.
        binder_loaded: True if the CUDA implementations of the ops are registered.
        problems: one sentence each, with the cause and the fix.
        arch_libraries: kernel libraries that are present, by name ("sm80").
        redirected_from: the source folder that was passed over for this installed build.
    """

    package_dir: Path
    build_info: dict[str, Any] | None = None
    binder_loaded: bool = False
    problems: list[str] = dataclasses.field(default_factory=list)
    arch_libraries: dict[str, Path] = dataclasses.field(default_factory=dict)
    redirected_from: Path | None = None

    @functools.cached_property
    def introspect(self) -> ModuleType | None:
        """The introspection module; None if it was not built for this Python."""
        try:
            return importlib.import_module("flash_attn_ext._introspect")
        except ImportError:
            return None


_status: LoadStatus | None = None


def _numbers(version: str) -> tuple[int, ...]:
    """Returns the leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _read_build_info(package_dir: Path) -> dict[str, Any] | None:
    try:
        info = json.loads((package_dir / BUILD_INFO).read_text())
    except (OSError, ValueError):
        return None
    return info if isinstance(info, dict) else None


def _misfit(info: dict[str, Any], binder: Path) -> str:
    """Returns why the binder must not be opened in this process, or ""."""
    name = f"flash_attn_ext {info.get('version', '')}".strip()
    torch_min = str(info.get("torch_min", ""))
    if _numbers(str(torch.__version__))[:2] < _numbers(torch_min):
        return (
            f"{name} needs torch >= {torch_min} and this environment has {torch.__version__} "
            f"({Path(torch.__file__).parent}), so its GPU kernels are not loaded; "
            f'fix: pip install -U "torch>={torch_min}".'
        )
    built, used = bool(info.get("cxx11abi", True)), bool(torch._C._GLIBCXX_USE_CXX11_ABI)
    if built != used:
        return (
            f"{name} was built with _GLIBCXX_USE_CXX11_ABI={int(built)} and this torch has "
            f"{int(used)}, so its GPU kernels are not loaded; "
            f"fix: install a torch from its official wheels, or rebuild: {_REBUILD}"
        )
    if not binder.exists():
        return (
            f"{binder} is missing although {BUILD_INFO} describes a build, so no GPU kernels are "
            "loaded; fix: pip install --force-reinstall flash_attn_ext."
        )
    return ""


def claim_ops() -> None:
    """Marks the ops of this process as this copy's; called before they are defined.

    Ops belong to the process, not to a module: whoever defines them first owns them.

    Raises:
        ImportError: another copy of the package owns them.
    """
    package_dir = str(Path(__file__).resolve().parent)
    owner = vars(getattr(torch.ops, _NAMESPACE)).setdefault("owner_folder", package_dir)
    if owner != package_dir:
        raise ImportError(
            f"two copies of flash_attn_ext are in this process, {owner} (imported first) and "
            f"{package_dir}, and only one can own the ops; "
            "fix: pip uninstall flash_attn_ext until none is left, then install it once."
        )


def _foreign_kernels() -> bool:
    """True if another library has already registered CUDA kernels for our ops."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    try:
        return bool(has_kernel(f"{_NAMESPACE}::combine", "CUDA"))
    except RuntimeError:  # the op does not exist yet
        return False


def _open_binder(binder: Path) -> str:
    """Opens the binder; returns the sentence why that failed, or ""."""
    try:
        torch.ops.load_library(str(binder))  # type: ignore[no-untyped-call]
    except OSError as error:
        # torch hides the linker's words behind "Could not load this library".
        cause = str(error.__cause__ or error).strip().rstrip(".")
        return (
            f"{binder.name} cannot be opened, so no GPU kernels are loaded: {cause}; "
            f"fix: rebuild for this environment: {_REBUILD}"
        )
    except RuntimeError as error:
        cause = str(error).strip().partition("\n")[0].rstrip(".")
        return (
            f"{binder.name} cannot register its ops in torch {torch.__version__}, so no GPU "
            f"kernels are loaded: {cause}; fix: rebuild for this environment: {_REBUILD}"
        )
    return ""


def _cpu_only_torch(info: dict[str, Any] | None) -> str:
    if torch.version.cuda is not None or not os.path.exists(_DRIVER_DEVICE):
        return ""
    wanted = f"CUDA {info['cuda']} or newer" if info and info.get("cuda") else "CUDA"
    return (
        f"this machine has an NVIDIA driver, but torch {torch.__version__} is a build without "
        f"CUDA, so no GPU can be used; fix: install a torch built for {wanted} "
        "(pytorch.org, Get started)."
    )


def load() -> None:
    """Opens the binder if it is there and fits; called once, when the package is imported."""
    global _status
    if _status is not None:
        return
    package_dir = Path(__file__).resolve().parent
    passed_over = vars(sys.modules[__package__ or _NAMESPACE]).get(REDIRECTED_FROM)
    state = LoadStatus(
        package_dir,
        build_info=_read_build_info(package_dir),
        arch_libraries={
            path.name[1:].partition(".")[0]: path
            for path in sorted(package_dir.glob("_sm*.abi3.so"))
        },
        redirected_from=Path(passed_over) if passed_over else None,
    )
    _status = state
    if state.build_info is None:
        state.problems.append(
            f"flash_attn_ext is used from its source folder {package_dir}, which was not built, so "
            "PyTorch operations compute everything; fix: pip install . in the folder above it."
        )
        return
    binder = package_dir / _BINDER
    problem = _misfit(state.build_info, binder)
    if not problem and _foreign_kernels():
        problem = (
            "another library has already registered CUDA kernels for flash_attn_ext's ops, so "
            f"{binder} is not opened; fix: keep one of the two."
        )
    problem = problem or _open_binder(binder)
    state.binder_loaded = not problem
    state.problems += [text for text in (problem, _cpu_only_torch(state.build_info)) if text]


def status() -> LoadStatus:
    """Returns what ``load()`` found; runs it if that has not happened yet."""
    load()
    assert _status is not None
    return _status


def driver_problem() -> str:
    """Returns the sentence about a driver that is too old for the kernels, or "".

    Asks the driver for its version, which needs no CUDA context; not called at import.
    """
    import ctypes

    info = status().build_info or {}
    if not info.get("archs"):
        return ""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    version = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return ""
    major, minor = version.value // 1000, version.value % 1000 // 10
    if major >= _numbers(str(info["cuda"]))[0]:
        return ""
    return (
        f"the kernels were built with CUDA {info['cuda']} and need an NVIDIA driver >= "
        f"{info['driver_min']}, this driver supports CUDA {major}.{minor} at most; fix: update the "
        f"driver, or build with a CUDA {major} toolkit: CUDA_HOME=... {_REBUILD}"
    )


def _source_hash(root: Path) -> str:
    """Returns the hash of a repository's C++ and build sources, by the rule of its own pick.py."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("_pick", root / "wheels" / "pick.py")
    assert spec is not None
    assert spec.loader is not None
    pick = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = pick  # dataclasses look their module up
    spec.loader.exec_module(pick)
    return str(pick.source_hash(root))


def source_problem() -> str:
    """Returns the sentence about libraries that were built from other sources, or "".

    Looks at the repository that the package lies in (an editable install) or that was passed over
    for it (a program started in the repository). Reads all of csrc/; not called at import.
    """
    state = status()
    root = (state.redirected_from or state.package_dir).parent
    if state.build_info is None or not (root / "wheels" / "pick.py").is_file():
        return ""
    if _source_hash(root) == state.build_info.get("source_hash"):
        return ""
    return (
        f"the compiled libraries in {state.package_dir} were built from other sources than those "
        f"in {root}; fix: run the installation again there ({_REBUILD})"
    )
