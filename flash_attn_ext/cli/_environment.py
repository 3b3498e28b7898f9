"""Everything `info` and `doctor` know about this machine, gathered once into one object.

Gathering asks the operating system, the driver and the installed packages; judging the answers is
the business of the commands. Tests build an `Environment` by hand and change one field.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flash_attn_ext import _load, compat
from flash_attn_ext._version import __version__
from flash_attn_ext.cli._build_tools import jobs, toolchain
from flash_attn_ext.errors import FallbackWarning, UnsupportedError

NEIGHBOURS = (
    "flash-attn",
    "flash-attn-3",
    "xformers",
    "triton",
    "transformers",
    "vllm",
    "sglang",
)


@dataclass(frozen=True)
class Gpu:
    """One GPU, as nvidia-smi (or torch) names it."""

    name: str
    compute_capability: tuple[int, int]
    memory_gib: float


@dataclass(frozen=True)
class Toolkit:
    """The CUDA toolkit that a build would use; see `_build_tools.toolchain`."""

    home: Path
    version: tuple[int, int]
    origin: str


@dataclass(frozen=True)
class Environment:
    """The facts.

    Attributes:
        python: version of the interpreter.
        system: e.g. "Linux x86_64".
        glibc: e.g. "2.36"; None if this is not glibc.
        version: of the imported flash_attn_ext.
        package_dir: folder of the imported flash_attn_ext.
        redirected_from: the bare source tree that was passed over for this installation.
        copies: every other folder that holds an installed flash_attn_ext.
        build_info: what the build wrote down; None in a bare source tree.
        binder_loaded: whether the compiled ops are registered.
        load_problems: why something was not loaded, one sentence with its fix each.
        driver_problem: why the driver cannot run the kernel libraries, or "".
        source_problem: why the libraries do not belong to the sources beside them, or "".
        arch_libraries: kernel libraries present, e.g. ("sm80", "sm90").
        arch_names: kernel libraries that this version has kernels for; None if not known.
        introspect: whether the planner's Python module is there.
        torch_version: e.g. "2.13.0+cpu".
        torch_cuda: CUDA of torch, e.g. "13.0"; None for CPU-only torch.
        torch_cxx11abi: torch's C++ string ABI.
        driver: e.g. "580.95.05"; None without an NVIDIA driver.
        gpus: the GPUs of the machine, visible to torch or not.
        cuda_available: whether torch can use a GPU.
        cuda_error: what went wrong with a first op and a CUDA graph; None if both ran, or if there
            was no GPU to try.
        toolkit: the CUDA toolkit that a build would use.
        toolkit_refused: a sentence for each folder that holds no usable toolkit.
        nvcc_on_path: what the PATH answers to "nvcc"; may be a script in another folder.
        ninja: its version; None if it is missing or does not run.
        num_jobs: how many compilers a build would run at once.
        jobs_reason: why so many.
        memory_gib: memory that a build may still take.
        disk_gib: free in the folder for temporary files, where pip builds.
        neighbours: versions of other packages that matter.
        variables: environment variables that something here reads.
    """

    python: str
    system: str
    glibc: str | None
    version: str
    package_dir: Path
    redirected_from: Path | None
    copies: tuple[Path, ...]
    build_info: dict[str, Any] | None
    binder_loaded: bool
    load_problems: tuple[str, ...]
    driver_problem: str
    source_problem: str
    arch_libraries: tuple[str, ...]
    arch_names: tuple[str, ...] | None
    introspect: bool
    torch_version: str
    torch_cuda: str | None
    torch_cxx11abi: bool
    driver: str | None
    gpus: tuple[Gpu, ...]
    cuda_available: bool
    cuda_error: str | None
    toolkit: Toolkit | None
    toolkit_refused: tuple[str, ...]
    nvcc_on_path: Path | None
    ninja: str | None
    num_jobs: int
    jobs_reason: str
    memory_gib: float
    disk_gib: float
    neighbours: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)


def run_tool(command: Sequence[str], timeout: float = 20.0) -> str | None:
    """Output of a program, both streams; None if it is missing, fails or hangs."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout + result.stderr


def parse_version(text: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu": the leading numbers of a version."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def driver_and_gpus() -> tuple[str | None, tuple[Gpu, ...]]:
    """The driver's version and all GPUs, from nvidia-smi, which needs no CUDA build of torch."""
    output = run_tool(
        [
            "nvidia-smi",
            "--query-gpu=driver_version,compute_cap,memory.total,name",
            "--format=csv,noheader,nounits",
        ]
    )
    driver: str | None = None
    gpus: list[Gpu] = []
    for line in (output or "").splitlines():
        fields = [word.strip() for word in line.split(",", 3)]
        capability = re.fullmatch(r"(\d+)\.(\d+)", fields[1]) if len(fields) == 4 else None
        if capability is None:
            continue
        driver = fields[0]
        memory_gib = float(fields[2]) / 1024 if fields[2].isdigit() else 0.0
        gpus.append(Gpu(fields[3], (int(capability[1]), int(capability[2])), memory_gib))
    return driver, tuple(gpus)


def other_copies(package_dir: Path, paths: Sequence[str]) -> tuple[Path, ...]:
    """Folders on the module path that hold another flash_attn_ext than the imported one.

    A bare source tree is not counted: the package steps aside for an installed copy by itself.
    """
    found: dict[Path, None] = {}
    for entry in paths:
        folder = (Path(entry or ".") / "flash_attn_ext").resolve()
        if (folder / "_build_info.json").is_file() and folder != package_dir.resolve():
            found[folder] = None
    return tuple(found)


def try_cuda() -> str | None:
    """Runs one of our ops on GPU 0, then replays it as a CUDA graph; returns what went wrong."""
    combine = torch.ops.flash_attn_ext.combine.default
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            out_partial = torch.ones(2, 1, 1, 1, 64, device="cuda")
            lse_partial = torch.zeros(2, 1, 1, 1, device="cuda")
            combine(out_partial, lse_partial, None)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out, _ = combine(out_partial, lse_partial, None)
            graph.replay()
        wrong = (out - 1).abs().max().item()
    except (RuntimeError, UnsupportedError) as error:
        return str(error).strip().partition("\n")[0]
    return None if wrong < 1e-6 else f"combine of ones is wrong by {wrong}"


def neighbours() -> dict[str, str]:
    """Versions of the packages in NEIGHBOURS; says which flash-attn is this package's own alias."""
    versions = installed_versions(NEIGHBOURS)
    for name, fa3 in (("flash-attn", False), ("flash-attn-3", True)):
        if name in versions and compat.is_enabled(fa3):
            versions[name] += " (these kernels, see compat status)"
    return versions


def installed_versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of those distributions that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def relevant_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that decide what is built, found or run."""
    names = ("CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST")
    prefixes = ("FLASH_ATTN_EXT_", "FLASH_ATTENTION_")
    return {
        name: value
        for name, value in sorted(environ.items())
        if name in names or name.startswith(prefixes)
    }


def collect() -> Environment:
    """Asks everything. Makes CUDA calls and runs nvidia-smi, nvcc and ninja where they are."""
    status = _load.status()
    driver, gpus = driver_and_gpus()
    cuda_available = torch.cuda.is_available()
    toolkit, refused = toolchain.find_toolkit(os.environ.get("FLASH_ATTN_EXT_NVCC", ""), os.environ)
    build_jobs = jobs.choose_jobs(os.environ)
    root = Path("/")
    nvcc_on_path = shutil.which("nvcc")
    glibc = platform.libc_ver()
    instances = status.introspect.kernels() if status.introspect is not None else None
    return Environment(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        glibc=glibc[1] if glibc[0] == "glibc" else None,
        version=__version__,
        package_dir=status.package_dir,
        redirected_from=status.redirected_from,
        copies=other_copies(status.package_dir, sys.path),
        build_info=status.build_info,
        binder_loaded=status.binder_loaded,
        load_problems=tuple(status.problems),
        driver_problem=_load.driver_problem(),
        source_problem=_load.source_problem(),
        arch_libraries=tuple(sorted(status.arch_libraries)),
        arch_names=None if instances is None else tuple(sorted({i["arch"] for i in instances})),
        introspect=status.introspect is not None,
        torch_version=torch.__version__,
        torch_cuda=torch.version.cuda,
        torch_cxx11abi=torch.compiled_with_cxx11_abi(),
        driver=driver,
        gpus=gpus,
        cuda_available=cuda_available,
        cuda_error=try_cuda() if cuda_available else None,
        toolkit=Toolkit(toolkit.home, toolkit.version, toolkit.origin) if toolkit else None,
        toolkit_refused=tuple(refused),
        nvcc_on_path=Path(nvcc_on_path) if nvcc_on_path else None,
        ninja=(run_tool(["ninja", "--version"]) or "").strip() or None,
        num_jobs=build_jobs.count,
        jobs_reason=build_jobs.reason,
        memory_gib=min(jobs.available_memory_gib(root), jobs.cgroup_memory_gib(root)),
        disk_gib=shutil.disk_usage(tempfile.gettempdir()).free / (1 << 30),
        neighbours=neighbours(),
        variables=relevant_variables(os.environ),
    )
