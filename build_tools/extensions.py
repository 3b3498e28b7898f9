"""The shared objects of the package: their sources, flags and what they link to.

_C.abi3.so           torch's stable ABI, one file for every torch >= 2.10 and every Python >= 3.10;
                     no CUDA header, so it is built on every machine
_sm80.abi3.so ...    kernels of one architecture; no torch in it; static CUDA runtime
_introspect.*.so     plans and core functions for Python; one file for each Python version
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension

from .archs import ARCH_LIBRARIES
from .toolchain import PythonTarget, Toolkit

TORCH_MIN = "2.10"
_TORCH_TARGET = "0x020a000000000000"  # TORCH_MIN as torch's headers encode it: major, minor, patch
# torch forbids half and bfloat16 operators in CUDA code; our kernels are compiled as by plain nvcc.
_HALF_OPERATORS = [
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
]
_STD = "-std=c++17"  # torch's stable headers ask for no more; nvcc 12 has no more


class KernelLibrary(Extension):
    """One kernel library: nvcc compiles ``cuda_sources``, the host part is an empty file."""

    cuda_sources: list[str]


class IntrospectModule(Extension):
    """The introspection module for one interpreter.

    Attributes:
        file_name: its file in the package; several interpreters' modules lie side by side.
    """

    file_name: str


def _common_flags(root: Path) -> list[str]:
    # -g0: Python's own CFLAGS ask for -g, which makes the files ten times larger.
    # -fmacro-prefix-map: no path of this machine in error messages.
    return ["-O3", _STD, "-g0", "-DNDEBUG", "-fvisibility=hidden", f"-fmacro-prefix-map={root}/="]


def _relative(root: Path, paths: Sequence[Path]) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def _plan_sources(root: Path) -> list[Path]:
    return sorted((root / "csrc" / "plan").glob("*.cpp"))


def binder(root: Path, torch_dir: Path) -> Extension:
    """The stable-ABI library that registers the CUDA ops.

    It names libtorch_cpu only; libtorch_cuda is looked up at run time, so that the file also loads
    under a torch without CUDA.
    """
    bindings = root / "csrc" / "bindings"
    sources = [
        *sorted(bindings.glob("ops_*.cpp")),
        bindings / "device.cpp",
        *_plan_sources(root),
    ]
    return Extension(
        "flash_attn_ext._C",
        _relative(root, sources),
        include_dirs=[str(root / "csrc"), str(torch_dir / "include")],
        library_dirs=[str(torch_dir / "lib")],
        libraries=["torch_cpu", "dl"],
        extra_compile_args={
            "cxx": [*_common_flags(root), f"-DTORCH_TARGET_VERSION={_TORCH_TARGET}"],
            "nvcc": [],
        },
        extra_link_args=["-Wl,--strip-all"],
        language="c++",
        py_limited_api=True,
    )


def kernel_library(
    root: Path,
    build: Path,
    name: str,
    sources: Sequence[Path],
    toolkit: Toolkit,
    host_compiler: str,
) -> KernelLibrary:
    """The kernels of one architecture.

    Args:
        root: the repository.
        build: folder for the empty host source and the linker's version script.
        name: "sm80".
        sources: its ``.cu`` files.
        toolkit: the CUDA toolkit.
        host_compiler: given to nvcc as -ccbin; "" leaves the choice to nvcc.
    """
    build.mkdir(parents=True, exist_ok=True)
    empty = build / "empty.cpp"
    if not empty.exists():
        empty.write_text("// The host part of a kernel library: everything is in its .cu files.\n")
    exports = build / "kernel_library.map"
    exports.write_text("{ global: fa_get_backend; local: *; };\n")
    nvcc_flags = ["-O3", _STD, "-DNDEBUG", *_HALF_OPERATORS, *ARCH_LIBRARIES[name].gencode]
    nvcc_flags += ["-Xptxas", "-v,--warn-on-spills"]
    nvcc_flags += ["-Xcompiler", f"-fvisibility=hidden,-g0,-fmacro-prefix-map={root}/="]
    if host_compiler:
        nvcc_flags += ["-ccbin", host_compiler]
    library = KernelLibrary(
        f"flash_attn_ext._{name}",
        _relative(root, [empty]),
        include_dirs=[str(root / "csrc"), str(toolkit.home / "include")],
        libraries=["dl", "rt", "pthread"],
        extra_objects=[str(toolkit.cudart_static)],
        extra_compile_args={"cxx": _common_flags(root), "nvcc": nvcc_flags},
        extra_link_args=[
            "-Wl,--exclude-libs,ALL",
            "-Wl,--strip-all",
            f"-Wl,--version-script={exports}",
        ],
        language="c++",
        py_limited_api=True,
    )
    library.cuda_sources = _relative(root, sources)
    return library


def introspect_module(root: Path, pybind11_include: Path, target: PythonTarget) -> IntrospectModule:
    """The introspection module for one interpreter; needs neither torch nor CUDA."""
    sources = [root / "csrc" / "bindings" / "introspect.cpp", *_plan_sources(root)]
    own = target.ext_suffix == sysconfig.get_config_var("EXT_SUFFIX")
    name = "_introspect" if own else "_introspect_" + target.ext_suffix.split("-")[1]
    module = IntrospectModule(
        f"flash_attn_ext.{name}",
        _relative(root, sources),
        # Ahead of the running interpreter's own headers, which setuptools adds at the end.
        include_dirs=[str(root / "csrc"), str(pybind11_include), str(target.include)],
        extra_compile_args={"cxx": _common_flags(root), "nvcc": []},
        extra_link_args=["-Wl,--strip-all"],
        language="c++",
    )
    module.file_name = f"_introspect{target.ext_suffix}"
    return module


def describe(extension: Extension) -> str:
    """Returns the last part of an extension's name: "_sm80"."""
    return str(extension.name).rpartition(".")[2]


def all_sources(extension: Extension) -> list[str]:
    """Returns every source that becomes an object, the .cu files first."""
    return [*getattr(extension, "cuda_sources", []), *extension.sources]


def newest_header(root: Path) -> int:
    """Returns the time of the last change to a header of csrc, in ns."""
    patterns = ("*.h", "*.cuh", "*.def")
    return max(
        (path.stat().st_mtime_ns for p in patterns for path in (root / "csrc").rglob(p)), default=0
    )
