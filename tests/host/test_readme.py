"""The README and docs are true: every example runs, every link and variable exists."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import blocks
import pytest

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    REPOSITORY / "README.md",
    REPOSITORY / "README.zh-CN.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
EXAMPLES = blocks.fenced_code(README, "python")


@pytest.mark.parametrize("code", EXAMPLES, ids=[f"example{i}" for i in range(len(EXAMPLES))])
def test_example_runs(code: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # FallbackWarning where a GPU lacks a kernel
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_there_are_examples_for_training_varlen_and_cache() -> None:
    text = "".join(EXAMPLES)
    for function in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        assert f"{function}(" in text


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("demo-command", "pip install '.[demo]' && python -m flash_attn_ext demo\n"),
        ("test-command", "pip install '.[test]' && pytest\n"),
    ],
)
def test_the_two_commands(name: str, command: str) -> None:
    assert blocks.fenced_code(blocks.read_block(README, name), "sh") == [command]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links(document: Path) -> None:
    for target in re.findall(
        r"\]\((?!https?://|#)([^)#\s]+)", document.read_text(encoding="utf-8")
    ):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document: Path) -> None:
    """Paths of the repository that a document names in code marks."""
    folders = "flash_attn_ext|csrc|tools|tests|benchmarks|docs|wheels|build_tools"
    pattern = rf"(?:^|[`\s(])((?:{folders})/[\w./-]*\w\.(?:py|h|cpp|cuh|cu|def|txt|md)\b)"
    for name in re.findall(pattern, document.read_text(encoding="utf-8"), re.MULTILINE):
        assert (REPOSITORY / name).exists(), name


def test_variables_exist() -> None:
    """Every FLASH_ATTN_EXT_ variable that a document names is read somewhere."""
    sources = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("flash_attn_ext", "build_tools", "csrc")
        for suffix in ("py", "cpp", "h")
        for path in (REPOSITORY / folder).rglob(f"*.{suffix}")
    )
    for document in DOCUMENTS:
        for name in re.findall(r"\bFLASH_ATTN_EXT_\w+", document.read_text(encoding="utf-8")):
            assert name in sources, f"{document.name}: {name}"
