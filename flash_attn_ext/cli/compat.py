"""Let `import flash_attn` give these kernels in this whole environment, or no longer.

    python -m flash_attn_ext compat install [--fa3]
    python -m flash_attn_ext compat status
    python -m flash_attn_ext compat remove

One line in one file of site-packages; see `run` for a single command.
"""

from __future__ import annotations

import argparse
import sys

from flash_attn_ext import compat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("action", choices=("install", "remove", "status"))
    parser.add_argument("--fa3", action="store_true", help="flash_attn_interface (FA3) too")
    parser.add_argument("--force", action="store_true", help="beside a real flash-attn, which wins")


def run(args: argparse.Namespace) -> int:
    """Installs, removes or reports; returns 1 if refused."""
    try:
        if args.action == "install":
            file = compat.install(args.fa3, args.force)
            print(f"wrote {file}: import flash_attn gives these kernels")
        elif args.action == "remove":
            removed = compat.remove()
            print(f"removed {compat.installed_file()}" if removed else "nothing was installed")
        else:
            _status()
    except (ImportError, OSError) as error:
        print(f"compat {args.action}: {error}", file=sys.stderr)
        return 1
    return 0


def _status() -> None:
    file = compat.installed_file()
    print(f"{file}: {'installed' if file.exists() else 'not installed'}")
    for name in ("flash_attn", "flash_attn_interface"):
        ours = compat.is_enabled(fa3=name != "flash_attn")
        real = compat.real_module(name)
        found = "these kernels" if ours else str(real) if real else "nothing"
        print(f"import {name}: {found}")
