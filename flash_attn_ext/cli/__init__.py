"""The command line ``python -m flash_attn_ext <command>``; one module for each command.

A command module has a docstring whose first line is its help, ``add_arguments(parser)`` and
``run(args) -> exit code``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from flash_attn_ext._version import __version__
from flash_attn_ext.cli import bench, compat, demo, doctor, explain, info, kernels, run, selftest

COMMANDS = (info, doctor, selftest, explain, kernels, bench, demo, run, compat)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn_ext",
        description="Look at, check and try the installed flash_attn_ext.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        text = (command.__doc__ or "").strip()
        subparser = subparsers.add_parser(
            command.__name__.rpartition(".")[2],
            help=text.partition("\n")[0].rstrip("."),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after ``python -m flash_attn_ext``; None takes them from the process.

    Returns:
        The exit code: 0, or 1 if the command found something wrong. Words that are not understood
        end the process with 2, as argparse does.
    """
    args = build_parser().parse_args(argv)
    code: int = args.run(args)
    return code
