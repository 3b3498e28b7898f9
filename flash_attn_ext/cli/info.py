"""Show versions, how the installation was built, the GPUs, and which backends are live."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from flash_attn_ext.cli import _environment, _output
from flash_attn_ext.cli._build_tools import archs
from flash_attn_ext.cli._environment import Environment


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        name: "tiled PyTorch on cpu", "kernels sm90", ...
        live: whether it can run here, now.
        reason: what it serves, or why it is not live.
    """

    name: str
    live: bool
    reason: str


def _kernel_backend(env: Environment, library: str) -> Backend:
    name = f"kernels {library}"
    if library not in env.arch_libraries:
        return Backend(name, False, "not in this installation")
    if not env.binder_loaded:
        reason = " ".join(env.load_problems) or "the compiled library that calls them is not loaded"
        return Backend(name, False, reason)
    if not env.cuda_available:
        reason = "torch is CPU-only" if env.torch_cuda is None else "torch sees no GPU"
        return Backend(name, False, reason)
    if env.driver_problem:
        return Backend(name, False, env.driver_problem)
    served = [
        gpu.name
        for gpu in dict.fromkeys(env.gpus)
        if library in archs.libraries_for_capability(*gpu.compute_capability)
    ]
    if not served:
        return Backend(name, False, "no GPU of this machine runs it")
    return Backend(name, True, ", ".join(served))


def backends(env: Environment) -> list[Backend]:
    """Every backend of this version, live or not, and why."""
    if env.cuda_available:
        tiled_cuda = Backend("tiled PyTorch on cuda", True, "every op that no kernel takes")
    else:
        why = "torch is CPU-only" if env.torch_cuda is None else "torch sees no GPU"
        tiled_cuda = Backend("tiled PyTorch on cuda", False, why)
    return [
        Backend("tiled PyTorch on cpu", True, "every op"),
        tiled_cuda,
        *(_kernel_backend(env, library) for library in env.arch_names or archs.ARCH_LIBRARIES),
    ]


def wheel_tag(env: Environment) -> str:
    """Name of the wheel this installation is, without platform tags."""
    local = (env.build_info or {}).get("local_version")
    return f"flash_attn_ext-{env.version}" + (f"+{local}" if local else "")


def _build_lines(build_info: dict[str, Any] | None) -> list[str]:
    if build_info is None:
        return ["not built: a source tree"]
    scalars = {
        name: value
        for name, value in build_info.items()
        if value not in (None, "", [], {}) and not isinstance(value, dict)
    }
    lines = []
    for name, value in scalars.items():
        if isinstance(value, list):
            if not all(isinstance(word, str) for word in value):
                continue  # tables have their own command
            value = ", ".join(value)
        lines.append(f"{name}: {value}")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    _output.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Prints what there is; always 0."""
    env = _environment.collect()
    available = backends(env)
    if args.json:
        _output.print_json({"wheel": wheel_tag(env), "environment": env, "backends": available})
        return 0
    cuda = f"CUDA {env.torch_cuda}" if env.torch_cuda else "CPU only"
    print(f"flash_attn_ext {env.version} in {env.package_dir}")
    print(f"wheel          {wheel_tag(env)}")
    print(f"python         {env.python}, {env.system}")
    print(f"torch          {env.torch_version} ({cuda})")
    print(f"driver         {env.driver or 'none'}")
    for gpu in env.gpus:
        major, minor = gpu.compute_capability
        print(f"gpu            {gpu.name}, sm{major}{minor}, {gpu.memory_gib:.0f} GiB")
    print("\nbuild")
    for line in _build_lines(env.build_info):
        print(f"  {line}")
    print("\nbackends")
    for backend in available:
        mark = _output.mark("ok" if backend.live else "info")
        print(f"  {mark} {backend.name}: {backend.reason}")
    return 0
