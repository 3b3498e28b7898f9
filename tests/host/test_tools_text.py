"""tools/check_text.py and tools/blocks.py."""

from __future__ import annotations

from pathlib import Path

import blocks
import check_text
import pytest


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.cu", 'x();  // printf("%d", x);\n', "commented-out print"),
        ("a.cu", "// std::cout << x;\n", "commented-out print"),
        ("a.py", "    # print(x)\n", "commented-out print"),
        ("a.py", "# TODO: later\n", "no issue named"),
        ("a.h", "// FIXME off by one\n", "no issue named"),
        ("a.md", "see /home/me/notes\n", "path of one machine"),
        ("a.md", "<<<<<<< HEAD\n", "conflict marker"),
        ("a.md", "text \n", "trailing blanks"),
        ("a.md", "text\r\n", "CRLF"),
        ("a.md", "text", "no newline at the end"),
        ("a.md", "text\n\n", "blank line at the end"),
        ("a.txt", "x\n" * 600_000, "1.2 MB, at most 1 MB"),
    ],
)
def test_refused(tmp_path: Path, name: str, text: str, problem: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert any(problem in found for found in check_text.problems(path, name))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", "# TODO(#12): pages of 1 token\nprint(1)\n"),
        ("a.md", "The word TODO in prose, https://example.org/home/page and ../work/x.\n"),
        ("a.cu", 'printf("x");\n'),
        ("a.png", "\0binary \n\n"),
        ("empty", ""),
    ],
)
def test_allowed(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert list(check_text.problems(path, name)) == []


def test_main(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text("fine\n")
    bad.write_text("not fine")
    assert check_text.main([str(good)]) == 0
    assert check_text.main([str(good), str(bad)]) == 1
    assert f"{bad}: no newline" in capsys.readouterr().out


DOCUMENT = """\
# Title
<!-- begin: test-command -->
```sh
pip install '.[test]' && pytest
```
<!-- end: test-command -->
<!-- begin: empty -->
<!-- end: empty -->
```python
x = 1
```
"""


def test_blocks() -> None:
    assert "pytest" in blocks.read_block(DOCUMENT, "test-command")
    changed = blocks.replace_block(DOCUMENT, "empty", "\n| a |\n\n")
    assert blocks.read_block(changed, "empty") == "| a |\n"
    assert blocks.replace_block(changed, "empty", "| a |") == changed
    assert blocks.fenced_code(DOCUMENT, "python") == ["x = 1\n"]
    with pytest.raises(ValueError, match="found 0 times"):
        blocks.read_block(DOCUMENT, "absent")
    with pytest.raises(ValueError, match="found 2 times"):
        blocks.read_block(DOCUMENT * 2, "empty")


def test_blocks_main_prints_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "README.md"
    path.write_text(DOCUMENT)
    assert blocks.main([str(path), "test-command"]) == 0
    assert capsys.readouterr().out == "pip install '.[test]' && pytest\n"


def test_update_main(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "README.md"
    path.write_text(DOCUMENT)

    def update(*options: str) -> int:
        generators = {"empty": lambda: "| new |", "not_here": lambda: "other"}
        return blocks.update_main([str(path), *options], description="", generators=generators)

    assert update("--check") == 1
    assert "stale" in capsys.readouterr().out
    assert path.read_text() == DOCUMENT
    assert update() == 0
    assert update("--check") == 0
    assert "| new |" in path.read_text()
    assert "other" not in path.read_text()
    with pytest.raises(ValueError, match="has none of the blocks not_here"):
        blocks.update_main([str(path)], description="", generators={"not_here": str})
