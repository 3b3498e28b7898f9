"""Where torch, nvcc and the Python headers are."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

PIP_TOOLKIT = "cuda-toolkit[nvcc,cudart,cccl]==13.0.*"
"""The packages that hold nvcc, its headers and the static CUDA runtime."""

_DRIVER_MIN = {
    12: "525",
    13: "580",
}  # first driver branch of each CUDA major, from its release notes


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that can build the kernel libraries.

    Attributes:
        home: the folder with ``bin/nvcc`` and ``include``.
        version: (major, minor).
        cudart_static: ``libcudart_static.a``.
        origin: how it was found, for the log.
    """

    home: Path
    version: tuple[int, int]
    cudart_static: Path
    origin: str

    @property
    def nvcc(self) -> Path:
        """The compiler itself, never a wrapper script on the PATH."""
        return self.home / "bin" / "nvcc"

    @property
    def driver_min(self) -> str:
        """The oldest driver branch that runs what this toolkit builds."""
        return _DRIVER_MIN.get(self.version[0], "")


def outer_site_packages() -> list[Path]:
    """Returns the folders of the environment that asked for an isolated build.

    pip runs the build with the same interpreter and hides the environment's packages from it, but
    their folders are still where this interpreter's scheme says.
    """
    paths = sysconfig.get_paths()
    return list(dict.fromkeys([Path(paths["purelib"]), Path(paths["platlib"])]))


def find_torch(say: Callable[[str], None]) -> ModuleType | None:
    """Imports torch: the build's own, or that of the environment around an isolated build."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        pass
    for folder in outer_site_packages():
        if not (folder / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            continue
        sys.path.append(str(folder))
        try:
            torch = importlib.import_module("torch")
        except ImportError as error:
            sys.path.remove(str(folder))
            say(f"torch in {folder} cannot be imported here: {error}")
            continue
        say(f"isolated build: using torch {torch.__version__} of {folder}")
        return torch
    return None


def home_of_nvcc(nvcc: Path) -> Path | None:
    """Asks an nvcc where its toolkit is; it may be a script that calls the real one elsewhere."""
    try:
        output = subprocess.run(
            [str(nvcc), "--dryrun", "-x", "cu", os.devnull],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"^#\$ TOP=(.+)$", output.stderr + output.stdout, re.MULTILINE)
    return Path(match[1].strip()).resolve() if match else None


def _toolkit_at(home: Path, origin: str) -> Toolkit | str:
    """Returns the toolkit in a folder, or the sentence why it is none."""
    nvcc = home / "bin" / "nvcc"
    if not nvcc.exists():
        return f"{origin}: {nvcc} does not exist"
    if not (home / "include" / "cuda_runtime.h").exists():
        return f"{origin}: {home} has nvcc but no include/cuda_runtime.h"
    libraries = ["lib64", "lib", f"targets/{platform.machine()}-linux/lib"]
    statics = [home / folder / "libcudart_static.a" for folder in libraries]
    cudart = next((path for path in statics if path.exists()), None)
    if cudart is None:
        return f"{origin}: {home} has no libcudart_static.a in {', '.join(libraries)}"
    try:
        output = subprocess.run(
            [str(nvcc), "--version"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{origin}: {nvcc} does not run: {error}"
    match = re.search(r"release (\d+)\.(\d+)", output)
    if not match:
        return f"{origin}: {nvcc} --version tells no release"
    return Toolkit(home, (int(match[1]), int(match[2])), cudart, origin)


def _pip_toolkit_homes(site_packages: Sequence[Path]) -> list[Path]:
    homes = [home for folder in site_packages for home in sorted(folder.glob("nvidia/cu[0-9]*"))]
    return sorted(homes, key=lambda home: home.name, reverse=True)


def _candidates(
    request: str, env: Mapping[str, str], site_packages: Sequence[Path], root: Path
) -> list[tuple[Path, str]]:
    """Returns (folder, how it was found) in the order of preference."""
    pip_homes = [
        (home, f"nvcc installed by pip in {home}") for home in _pip_toolkit_homes(site_packages)
    ]
    if request == "pip":
        return pip_homes
    if request:
        path = Path(request)
        origin = f"FLASH_ATTN_EXT_NVCC={request}"
        if path.is_dir():
            return [(path, origin)]
        return [(home_of_nvcc(path) or path.parent.parent, origin)]
    found = [
        (Path(env[name]), f"{name}={env[name]}")
        for name in ("CUDA_HOME", "CUDA_PATH")
        if env.get(name)
    ]
    on_path = shutil.which("nvcc", path=env.get("PATH", ""))
    if on_path:
        home = home_of_nvcc(Path(on_path)) or Path(on_path).resolve().parent.parent
        found.append((home, f"nvcc on the PATH ({on_path})"))
    found += pip_homes
    usual = [
        root / "usr/local/cuda",
        *sorted(root.glob("usr/local/cuda-*"), reverse=True),
        root / "opt/cuda",
    ]
    return found + [(home, f"{home} exists") for home in usual if home.exists()]


def find_toolkit(
    request: str,
    env: Mapping[str, str],
    site_packages: Sequence[Path] | None = None,
    root: Path = Path("/"),
) -> tuple[Toolkit | None, list[str]]:
    """Finds a CUDA toolkit.

    The order: FLASH_ATTN_EXT_NVCC (a path, or "pip"), CUDA_HOME, CUDA_PATH, the nvcc on the PATH, a
    toolkit installed by pip, the usual folders.

    Args:
        request: the value of FLASH_ATTN_EXT_NVCC.
        env: the environment.
        site_packages: where to look for pip's toolkit; None means this interpreter's folders.
        root: the root of the file system, for tests.

    Returns:
        The toolkit or None, and a sentence for each folder that was looked at in vain.
    """
    if site_packages is None:
        site_packages = [Path(entry or ".") for entry in sys.path] + outer_site_packages()
    refused: list[str] = []
    for home, origin in _candidates(request, env, site_packages, root):
        result = _toolkit_at(home, origin)
        if isinstance(result, Toolkit):
            return result, refused
        refused.append(result)
    return None, refused


def missing_toolkit_lines(refused: Sequence[str]) -> list[str]:
    """Returns the text that says what is not built without nvcc, and the three ways to get it."""
    return [
        "No CUDA toolkit (nvcc) was found, so the GPU kernels are NOT built.",
        "The package will work; PyTorch operations compute attention on every device.",
        *(f"  tried {sentence}" for sentence in refused),
        "To get the GPU kernels, take one of three ways:",
        "  1. let pip bring a toolkit for this build only, no root needed:",
        "       FLASH_ATTN_EXT_NVCC=pip pip install .",
        "  2. name an installed toolkit (12.3 or newer):",
        "       CUDA_HOME=/usr/local/cuda pip install .",
        "  3. use a prebuilt wheel, if one fits this machine:",
        "       python wheels/pick.py --install",
    ]


@dataclass(frozen=True)
class PythonTarget:
    """An interpreter the introspection module is built for.

    Attributes:
        include: the folder of Python.h.
        ext_suffix: ".cpython-312-x86_64-linux-gnu.so".
    """

    include: Path
    ext_suffix: str


_ASK_PYTHON = (
    "import sysconfig; print(sysconfig.get_paths()['include']);"
    "print(sysconfig.get_config_var('EXT_SUFFIX'))"
)


def python_targets(executables: Sequence[str], say: Callable[[str], None]) -> list[PythonTarget]:
    """Returns the running interpreter and the named ones, each if its Python.h is there."""
    targets: dict[str, PythonTarget] = {}
    for executable in [sys.executable, *executables]:
        try:
            answer = subprocess.run(
                [executable, "-c", _ASK_PYTHON],
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            say(f"introspection module: {executable} does not run ({error}); left out")
            continue
        include, ext_suffix = answer.stdout.split("\n")[:2]
        if not (Path(include) / "Python.h").exists():
            say(
                f"introspection module: no Python.h in {include}; left out for {executable} "
                "(install the python3-dev package to have it)"
            )
            continue
        targets.setdefault(ext_suffix, PythonTarget(Path(include), ext_suffix))
    return list(targets.values())


def pybind11_include(torch: ModuleType) -> Path | None:
    """Returns the folder of the pybind11 headers: pybind11's own, else the copy torch ships."""
    if importlib.util.find_spec("pybind11") is not None:
        return Path(importlib.import_module("pybind11").get_include())
    shipped = Path(str(torch.__file__)).parent / "include"
    return shipped if (shipped / "pybind11" / "pybind11.h").exists() else None


def find_cxx(env: Mapping[str, str]) -> str | None:
    """Returns the C++ compiler: CXX, else c++, g++ or clang++ on the PATH."""
    names = [env["CXX"]] if env.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name.split()[0]))), None)
