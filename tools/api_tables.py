"""Writes the tables of docs/api.md from the docstrings.

    python tools/api_tables.py docs/api.md [--check]

A group of the page is a module: all of its public functions and classes, in the order of the
source, with the first sentence of each docstring. For the site, tools/docs_site.py adds signatures
and whole docstrings behind each table. Needs the package, no GPU and no build.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import blocks

MODULES = [
    "attention",
    "kvcache",
    "merge",
    "plans",
    "errors",
    "bert_padding",
    "layers.rotary",
    "layers.mha",
    "ops.layer_norm",
    "ops.cross_entropy",
    "ops.activations",
    "integrations.sdpa",
    "integrations.transformers",
    "compat",
    "reference",
]
"""Those with an interface to use; each is a block of the page called api-<module>."""

PACKAGE = "flash_attn_ext"


def public(module: Any) -> list[tuple[str, Any]]:
    """Functions and classes that a module defines for others, in the order of its source."""
    named = [
        (name, item)
        for name, item in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(item) or inspect.isclass(item))
        and item.__module__ == module.__name__
    ]
    return sorted(named, key=lambda pair: inspect.getsourcelines(pair[1])[1])


def first_sentence(item: Any) -> str:
    """Of its docstring; in one line, as a cell of a table."""
    paragraph = (inspect.getdoc(item) or "").split("\n\n")[0].replace("\n", " ")
    if not paragraph:
        raise ValueError(f"{item.__module__}.{item.__qualname__}: has no docstring")
    sentence = paragraph.split(". ")[0].rstrip(".")
    return sentence.replace("``", "`").replace("|", "\\|")


def table(module_name: str) -> str:
    """The table of one module, and the names for tools/docs_site.py."""
    module = importlib.import_module(f"{PACKAGE}.{module_name}")
    members = public(module)
    if not members:
        raise ValueError(f"{module.__name__}: has nothing public")
    rows = [f"| `{name}` | {first_sentence(item)} |" for name, item in members]
    names = " ".join(name for name, _ in members)
    head = ["| name | what it is |", "|---|---|"]
    return "\n".join([*head, *rows, "", f"<!-- docstrings: {module.__name__} {names} -->"])


GENERATORS: dict[str, Callable[[], str]] = {
    f"api-{name}": functools.partial(table, name) for name in MODULES
}

if __name__ == "__main__":
    sys.exit(blocks.update_main(sys.argv[1:], description=__doc__, generators=GENERATORS))
