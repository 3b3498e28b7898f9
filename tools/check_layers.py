"""Checks that the layers of csrc/ point one way and that PTX, CUDA and torch stay in their folders.

    python tools/check_layers.py [csrc]

Each file may include headers of the layers named in LAYERS for its own, written relative to csrc/,
and the system headers of its layer. Inline assembly stands in ptx/ alone, torch and pybind11 in
bindings/ alone; core/ and plan/ must compile with plain g++. Exit status 1 if anything is found.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from cpp_text import blank, sources

_STD = (
    r"algorithm|array|atomic|cassert|cctype|cerrno|climits|cmath|cstddef|cstdint|cstdio|cstdlib"
    r"|cstring|functional|initializer_list|iomanip|iostream|iterator|limits|map|memory|mutex"
    r"|numeric|optional|random|set|sstream|stdexcept|string|string_view|tuple|type_traits"
    r"|unordered_map|utility|variant|vector"
)
_DEVICE = r"c?math|cstdint|cstddef|climits|limits|type_traits|utility"
_CUDA = r"cuda\.h|cuda_runtime\.h|cuda_(bf16|fp16|fp8)\.h"

DEVICE_LAYERS = ["core", "ptx", "tile", "attention", "kernels"]
LAYERS: dict[str, set[str]] = {
    **{layer: set(DEVICE_LAYERS[: i + 1]) for i, layer in enumerate(DEVICE_LAYERS)},
    "plan": {"core", "plan"},
    "bindings": {"core", "plan", "bindings"},
    "tests": {*DEVICE_LAYERS, "plan", "tests"},
}
"""Layer -> layers whose headers it may include."""

SYSTEM_HEADERS: dict[str, str] = {
    "core": _DEVICE,
    **{layer: f"{_DEVICE}|{_CUDA}" for layer in DEVICE_LAYERS[1:]},
    # Launch functions are host code; printf is what a debug mode has in a CUDA graph.
    "kernels": f"{_DEVICE}|{_CUDA}|atomic|cstdio|mutex|unordered_map",
    "plan": _STD,
    "bindings": rf"{_STD}|(dlfcn|unistd)\.h|torch/(csrc/(stable|inductor/aoti_torch)|headeronly)/.*"
    r"|pybind11/.*",
    "tests": f"{_STD}|{_CUDA}",
}
"""Layer -> regular expression of the <...> headers that it may include."""

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"(?P<own>[^"]+)"|<(?P<system>[^>]+)>)', re.M)
_ASM = re.compile(r"\b(?:asm|__asm__)\b")
_TORCH = re.compile(r"\b(?:torch|at|c10|pybind11)::")


def include_problem(layer: str, include: re.Match[str], root: Path) -> str | None:
    """What is wrong with one #include in a file of ``layer``, or None."""
    if (system := include["system"]) is not None:
        allowed = re.fullmatch(SYSTEM_HEADERS[layer], system)
        return None if allowed else f"{layer}/ must not include <{system}>"
    own = include["own"]
    target = PurePosixPath(own).parts[0]
    if target not in LAYERS or not (root / own).is_file():
        return f'"{own}" is not a header of csrc/; write the path relative to csrc/'
    if target not in LAYERS[layer]:
        return f"{layer}/ must not include {own}: {target}/ is a layer above or beside it"
    return None


def problems(root: Path) -> Iterator[str]:
    """All violations under ``root``, one ``path:line: sentence`` each."""
    for path in sources(root):
        layer = path.relative_to(root).parts[0]
        if layer not in LAYERS:
            yield f"{path}:1: not in a layer folder; the layers are {', '.join(LAYERS)}"
            continue
        text = path.read_text(encoding="utf-8")
        code, bare = blank(text), blank(text, strings=True)
        found = [(m.start(), include_problem(layer, m, root)) for m in _INCLUDE.finditer(code)]
        if layer != "ptx":
            found += [(m.start(), "inline assembly outside ptx/") for m in _ASM.finditer(bare)]
        if layer != "bindings":
            found += [(m.start(), f"{m[0]} outside bindings/") for m in _TORCH.finditer(bare)]
        for position, problem in sorted(found, key=lambda item: item[0]):
            if problem is not None:
                yield f"{path}:{text.count(chr(10), 0, position) + 1}: {problem}"


def main(argv: list[str]) -> int:
    """Prints the violations under the given folder (default csrc); 1 if there are any."""
    root = Path(argv[0] if argv else "csrc")
    if not root.is_dir():
        print(f"check_layers: {root} is not a folder; run from the repository root")
        return 2
    found = list(problems(root))
    print("\n".join(found) or f"layers: ok ({len(sources(root))} files)")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
