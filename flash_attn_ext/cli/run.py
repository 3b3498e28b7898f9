"""Run a Python program for which `import flash_attn` gives these kernels.

    python -m flash_attn_ext run train.py --epochs 3
    python -m flash_attn_ext run -m package.train --epochs 3
    torchrun --nproc-per-node 8 -m flash_attn_ext run train.py

The program replaces this process; its own child processes see flash_attn too.
"""

from __future__ import annotations

import argparse
import os
import site
import subprocess
import sys
from pathlib import Path

from flash_attn_ext import compat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--fa3", action="store_true", help="flash_attn_interface (FA3) too")
    parser.add_argument("--force", action="store_true", help="shadow a real flash-attn")
    parser.add_argument("-m", dest="module", action="store_true", help="PROGRAM is a module")
    parser.add_argument("program", metavar="PROGRAM", help="a script, or with -m a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed to the program")


def environment(fa3: bool) -> dict[str, str]:
    """The environment of the program: this one with the modules of flash-attn on PYTHONPATH."""
    path = [str(folder) for folder in compat.folders(fa3)]
    path += filter(None, [os.environ.get("PYTHONPATH", "")])
    # A package that is not installed was found through the current folder, which a script loses.
    parent = str(Path(compat.__file__).resolve().parents[2])
    if parent not in {*site.getsitepackages(), site.getusersitepackages()}:
        path.append(parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def run(args: argparse.Namespace) -> int:
    """Starts the program; returns 1 if that is refused."""
    if sys.flags.ignore_environment:
        print("run: got python -E or -I, expected neither: PYTHONPATH is ignored", file=sys.stderr)
        return 1
    try:
        compat.check(args.fa3, args.force)
    except ImportError as error:
        print(error, file=sys.stderr)
        return 1
    # The interpreter's own switches (-O, -X ..., -W ...), as multiprocessing passes them on.
    switches = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    program = ["-m", args.program] if args.module else [args.program]
    command = [sys.executable, *switches, *program, *args.arguments]
    if os.name == "nt":
        return subprocess.call(command, env=environment(args.fa3))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, environment(args.fa3))
