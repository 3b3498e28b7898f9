"""List the compiled kernels with registers, spills and shared memory, and the planner's choices."""

from __future__ import annotations

import argparse
from typing import Any

from flash_attn_ext import _load
from flash_attn_ext.cli import _output


def collect() -> dict[str, Any]:
    """Everything that is known about kernels.

    Returns:
        libraries: name -> bytes of the shared object.
        kernels: what ptxas said about each compiled kernel, from the build.
        instances: what the planner can choose, one row of instances.def each; None without the
            introspection module.
    """
    status = _load.status()
    build_info = status.build_info or {}
    return {
        "libraries": {
            name: path.stat().st_size for name, path in sorted(status.arch_libraries.items())
        },
        "kernels": build_info.get("kernels", []),
        "instances": None if status.introspect is None else status.introspect.kernels(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    _output.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the tables; always 0."""
    found = collect()
    if args.json:
        _output.print_json(found)
        return 0
    print("kernel libraries")
    if found["libraries"]:
        rows = [[f"_{name}", size / 1e6] for name, size in found["libraries"].items()]
        print(_output.table(["library", "MB"], [[name, round(mb, 2)] for name, mb in rows]))
    else:
        print("none in this installation; `python -m flash_attn_ext doctor` says why")
    if found["kernels"]:
        print("\ncompiled kernels")
        print(_output.dict_table(found["kernels"]))
    print("\ninstances that the planner chooses from")
    if found["instances"] is None:
        print("not known: there is no _introspect module for this Python")
    else:
        print(_output.dict_table(found["instances"]))
    return 0
