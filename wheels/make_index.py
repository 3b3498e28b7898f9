"""Writes ``index.json`` for the wheels of a folder, so that pick.py and others can choose from it.

python wheels/make_index.py [FOLDER]     FOLDER defaults to the one of this script
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pick import HERE, entry_from_wheel


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the index; returns 1 if a wheel of the folder cannot be described."""
    parser = argparse.ArgumentParser(description="Describe the wheels of a folder in index.json.")
    parser.add_argument("folder", type=Path, nargs="?", default=HERE)
    folder = parser.parse_args(arguments).folder
    entries, failures = [], 0
    for path in sorted(folder.glob("flash_attn_ext-*.whl")):
        try:
            entries.append(entry_from_wheel(path))
        except ValueError as error:
            print(error, file=sys.stderr)
            failures += 1
    (folder / "index.json").write_text(json.dumps({"wheels": entries}, indent=2) + "\n")
    print(f"{folder / 'index.json'}: {len(entries)} wheels")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
