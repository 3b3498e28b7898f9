"""Writes the tables of docs/api.md from the docstrings.

    python tools/api_tables.py docs/api.md [--check]

A section is a module that others may import: every one of the package, its layers/, ops/ and
integrations/, whose name does not begin with an underscore. It lists the public functions and
classes in the order of the source, with the first sentence of each docstring; tools/docs_site.py
adds signatures and whole docstrings to the site. Reads the sources and imports nothing of them.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import blocks

PACKAGE = Path(__file__).resolve().parents[1] / "flash_attn_ext"

FIRST = ["attention", "kvcache", "merge", "plans", "errors", "bert_padding"]
"""Modules at the begin of the page; the others follow by name, the definition at the end."""
LAST = ["reference"]
INTERNAL = {"autograd", "__main__", "__init__"}


def modules() -> list[str]:
    """Public modules, relative to the package: "attention", "layers.rotary" ..."""
    paths = [PACKAGE / "compat/__init__.py"]
    for folder in (".", "layers", "ops", "integrations"):
        paths += (PACKAGE / folder).glob("*.py")
    names = {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in paths
    }
    names = {name.removesuffix(".__init__") for name in names if name not in INTERNAL}
    named = sorted(x for x in names if not x.split(".")[-1].startswith("_"))
    middle = [x for x in named if x not in {*FIRST, *LAST, "layers", "ops", "integrations"}]
    return [*FIRST, *middle, *LAST]


def first_sentence(docstring: str | None, of: str) -> str:
    """In one line, as a cell of a table."""
    paragraph = (docstring or "").split("\n\n")[0].replace("\n", " ").strip()
    if not paragraph:
        raise ValueError(f"{of}: has no docstring")
    sentence = paragraph.split(". ")[0].rstrip(".:")
    return sentence.replace("``", "`").replace("|", "\\|")


def section(name: str, source: str) -> str:
    """The part of the page about one module."""
    tree = ast.parse(source)
    members = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    if not members:
        raise ValueError(f"{name}: has nothing public; begin its name with an underscore")
    full = f"flash_attn_ext.{name}"
    rows = [
        f"| `{node.name}` | {first_sentence(ast.get_docstring(node), f'{full}.{node.name}')} |"
        for node in members
    ]
    names = " ".join(node.name for node in members)
    return "\n".join(
        [
            f"## `{full}`",
            "",
            first_sentence(ast.get_docstring(tree), full) + ".",
            "",
            "| name | what it is |",
            "|---|---|",
            *rows,
            "",
            f"<!-- docstrings: {full} {names} -->",
        ]
    )


def generate() -> str:
    """All sections."""
    sections = []
    for name in modules():
        path = PACKAGE / name.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        sections.append(section(name, file.read_text(encoding="utf-8")))
    return "\n\n".join(sections)


if __name__ == "__main__":
    sys.exit(blocks.update_main(sys.argv[1:], description=__doc__, generators={"api": generate}))
