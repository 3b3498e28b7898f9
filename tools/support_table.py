"""Writes the README's table of what is supported where, from the plans.

    python tools/support_table.py [README.md] [--check]

The rows come from flash_attn_ext.plans.support_markdown(), which asks make_plan; nothing is typed
by hand. Needs the package with its introspection module (no GPU, no nvcc).
"""

from __future__ import annotations

import sys

import blocks


def generate() -> str:
    """The table as Markdown."""
    from flash_attn_ext.plans import support_markdown

    return support_markdown()


if __name__ == "__main__":
    sys.exit(
        blocks.update_main(
            sys.argv[1:], description=__doc__, generators={"support-table": generate}
        )
    )
