"""Reading C++ and CUDA sources as text: enough for the checkers, far from a parser."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = frozenset({".h", ".cuh", ".cu", ".cpp", ".def"})

_COMMENT_OR_STRING = re.compile(
    r"""
      //[^\n]*                              # line comment
    | /\*.*?\*/                             # block comment
    | R"(?P<mark>[^()\s\\]{0,16})\(.*?\)(?P=mark)"   # raw string
    | "(?:\\.|[^"\\\n])*"                   # string
    | (?<![0-9A-Za-z_])'(?:\\.|[^'\\\n])+'  # character; the look-behind keeps 1'000 a number
    """,
    re.DOTALL | re.VERBOSE,
)

_FUNCTION_HEAD = re.compile(
    r"(?P<name>operator\W{1,3}|~?\w+)\s*\((?P<params>[^;{}]*)\)"
    r"\s*(?:const|noexcept|mutable|override|->\s*[\w:<>*& ]+|\s)*"
    r"(?::\s[^;{}]*(?:\{[^{};]*\}[^;{}]*)*)?$"
)
_ATTRIBUTE = re.compile(
    r"\b(?:__launch_bounds__|__attribute__|alignas)\s*\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
)
_NOT_A_FUNCTION = frozenset({"if", "for", "while", "switch", "catch", "return"})
_LAMBDA_HEAD = re.compile(r"(?P<name>\w+)\s*=\s*\[[^\]]*\]\s*(?:\((?P<params>[^{};]*)\))?\s*$")


@dataclass(frozen=True)
class Function:
    """A function, kernel or named lambda with a body."""

    name: str
    line: int  # of the opening brace, from 1
    num_lines: int
    num_params: int
    nesting: int  # blocks inside blocks of the body; 0 for a straight body
    is_kernel: bool


def sources(root: Path) -> list[Path]:
    """All C++ and CUDA files under ``root``, sorted; or ``root`` itself if it is a file."""
    if root.is_file():
        return [root]
    return sorted(p for p in root.rglob("*") if p.suffix in SUFFIXES and p.is_file())


def blank(text: str, *, strings: bool = False) -> str:
    """Replaces comments, and the contents of strings if asked, by spaces; lines stay in place."""

    def spaces(match: re.Match[str]) -> str:
        found = match[0]
        if not found.startswith("/") and not strings:
            return found
        return re.sub(r"[^\n]", " ", found)

    return _COMMENT_OR_STRING.sub(spaces, text)


def count_top_level(text: str) -> int:
    """Number of comma-separated items outside brackets; 0 for blank text.

    >>> count_top_level("int a, std::pair<int, int> b, int (*f)(int, int)")
    3
    """
    if text.strip() in {"", "void"}:
        return 0
    depth, items = 0, 1
    for before, character in zip(" " + text, text, strict=False):
        if character in "([{<":
            depth += 1
        elif character in ")]}" or (character == ">" and before != "-"):
            depth -= 1
        elif character == "," and depth == 0:
            items += 1
    return items


def template_params(code: str) -> list[tuple[int, int]]:
    """(line, number of parameters) of every ``template <...>`` in blanked code."""
    found = []
    for match in re.finditer(r"\btemplate\s*<", code):
        depth, end = 1, match.end()
        while depth and end < len(code):
            depth += {"<": 1, ">": -1}.get(code[end], 0)
            end += 1
        count = count_top_level(code[match.end() : end - 1])
        if count:
            found.append((code.count("\n", 0, match.start()) + 1, count))
    return found


def functions(code: str) -> list[Function]:
    """Every function and named lambda with a body, in blanked code (comments and strings)."""
    code = re.sub(r"^[ \t]*#.*(?:\\\n.*)*", lambda m: re.sub(r"[^\n]", " ", m[0]), code, flags=re.M)
    found: list[Function] = []
    open_blocks: list[tuple[int, Function | None]] = []  # (deepest block inside, head)
    statement_begin = paren_depth = 0
    for position, character in enumerate(code):
        if character in "()":
            paren_depth += 1 if character == "(" else -1
        elif character == ";" and paren_depth == 0:
            statement_begin = position + 1
        elif character == "{":
            open_blocks.append((0, _head(code, statement_begin, position)))
            statement_begin = position + 1
            paren_depth = 0
        elif character == "}" and open_blocks:
            deepest, head = open_blocks.pop()
            if head is not None:
                num_lines = code.count("\n", 0, position) + 2 - head.line
                found.append(Function(**{**vars(head), "num_lines": num_lines, "nesting": deepest}))
            if open_blocks:
                outer_deepest, outer = open_blocks[-1]
                open_blocks[-1] = (max(outer_deepest, deepest + 1), outer)
            statement_begin = position + 1
            paren_depth = 0
    return sorted(found, key=lambda f: f.line)


def _head(code: str, begin: int, brace: int) -> Function | None:
    """The function whose body opens at ``brace``, or None if another kind of block opens."""
    text = _ATTRIBUTE.sub("", code[begin:brace])
    match = _LAMBDA_HEAD.search(text) or _FUNCTION_HEAD.search(text)
    if match is None or match["name"] in _NOT_A_FUNCTION:
        return None
    return Function(
        name=match["name"],
        line=code.count("\n", 0, brace) + 1,
        num_lines=0,
        num_params=count_top_level(match["params"] or ""),
        nesting=0,
        is_kernel="__global__" in text,
    )
