"""Reports files, functions and parameter lists that outgrow the guidance of CONTRIBUTING.md.

    python tools/check_sizes.py [--all]

The numbers are guidance: a report line asks for a second look, it does not fail. Two rules do fail:
an instance file (csrc/kernels/instances/*.cu) longer than 8 lines, and a C++ line wider than 100
columns (clang-format leaves string literals and comments alone). --all also lists what is within
twice the aim.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cpp_text import blank, functions, sources, template_params

MAX_COLUMNS = 100
MAX_INSTANCE_LINES = 8


@dataclass(frozen=True)
class Limit:
    """What to aim for, and from where to look again."""

    aim: int
    look_again: int


HEADER_LINES = Limit(200, 300)
KERNEL_FILE_LINES = Limit(450, 600)
PYTHON_FILE_LINES = Limit(400, 600)
KERNEL_BODY_LINES = Limit(150, 250)
FUNCTION_LINES = Limit(40, 60)
TEMPLATE_PARAMS = Limit(3, 4)
FUNCTION_PARAMS = Limit(6, 8)
NESTING = Limit(3, 4)


@dataclass(frozen=True)
class Finding:
    """One measured thing above its aim."""

    where: str
    what: str
    value: int
    limit: Limit

    @property
    def look_again(self) -> bool:
        return self.value > self.limit.look_again

    def __str__(self) -> str:
        return f"{self.where}: {self.what} {self.value} (aim {self.limit.aim})"


def cpp_findings(path: Path) -> Iterator[Finding]:
    """Everything in one C++ or CUDA file that is above its aim."""
    text = path.read_text(encoding="utf-8")
    code = blank(text, strings=True)
    is_header = path.suffix == ".h"
    measured = [
        (str(path), "lines", text.count("\n"), HEADER_LINES if is_header else KERNEL_FILE_LINES)
    ]
    for function in functions(code):
        where = f"{path}:{function.line}: {function.name}"
        lines = KERNEL_BODY_LINES if function.is_kernel else FUNCTION_LINES
        measured += [
            (where, "lines", function.num_lines, lines),
            (where, "parameters", function.num_params, FUNCTION_PARAMS),
            (where, "nesting", function.nesting, NESTING),
        ]
    for line, count in template_params(code):
        measured.append((f"{path}:{line}", "template parameters", count, TEMPLATE_PARAMS))
    for where, what, value, limit in measured:
        if value > limit.aim:
            yield Finding(where, what, value, limit)


def python_findings(path: Path) -> Iterator[Finding]:
    """The length of one Python file, if it is above its aim."""
    lines = path.read_text(encoding="utf-8").count("\n")
    if lines > PYTHON_FILE_LINES.aim:
        yield Finding(str(path), "lines", lines, PYTHON_FILE_LINES)


def errors(path: Path) -> Iterator[str]:
    """The rules that fail: line width everywhere, length of instance files."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_COLUMNS:
            yield f"{path}:{number}: {len(line)} columns, at most {MAX_COLUMNS}"
    if path.suffix == ".cu" and path.parent.name == "instances" and len(lines) > MAX_INSTANCE_LINES:
        yield f"{path}: {len(lines)} lines, an instance has at most {MAX_INSTANCE_LINES}"


def main(argv: list[str]) -> int:
    """Prints the report; 1 if a rule that fails is broken."""
    parser = argparse.ArgumentParser(description="size guidance of csrc/ and the Python code")
    parser.add_argument("--all", action="store_true", help="also list what is just above its aim")
    parser.add_argument("--root", type=Path, default=Path(), help="repository root")
    options = parser.parse_args(argv)

    cpp_files = sources(options.root / "csrc")
    python_files = sorted(
        path
        for folder in ("flash_attn_ext", "tests", "tools", "benchmarks", "examples", "wheels")
        for path in (options.root / folder).rglob("*.py")
    )
    found = [f for path in cpp_files for f in cpp_findings(path)]
    found += [f for path in python_files for f in python_findings(path)]
    broken = [e for path in cpp_files for e in errors(path)]

    shown = [f for f in found if options.all or f.look_again]
    for finding in shown:
        print(f"look again: {finding}" if finding.look_again else f"above aim: {finding}")
    for error in broken:
        print(f"error: {error}")
    print(
        f"sizes: {len(cpp_files)} C++ and {len(python_files)} Python files, "
        f"{len(found)} above aim, {sum(f.look_again for f in found)} to look at again, "
        f"{len(broken)} errors"
    )
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
