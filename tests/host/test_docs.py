"""The documentation follows the code: names, arguments, versions, error texts, links."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import api_tables
import blocks
import docs_site
import pytest
import sync_readme

import flash_attn_ext

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
ENGLISH = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CHINESE = (REPOSITORY / "README.zh-CN.md").read_text(encoding="utf-8")

FOREIGN_TEXTS = {
    "ModuleNotFoundError: No module named 'torch'",
    "detected CUDA version mismatches the version that was used to compile PyTorch",
    "Killed",
    "unspecified launch failure",
    "is not a supported wheel on this platform",
    "undefined symbol: ...",
    "version GLIBC_2.xx not found",
    'Specified attn_implementation="flash_attn_ext" is not supported',
    "CUDA driver version is insufficient for CUDA runtime version",
    "no kernel image is available for execution on the device",
}
"""Error texts in docs/troubleshooting.md that are not ours."""


# ------------------------------------------------------------------------------------------- API


def test_the_api_page_is_what_the_docstrings_say() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert blocks.read_block(text, "api").strip() == api_tables.generate(), (
        "docs/api.md is stale; run: python tools/api_tables.py docs/api.md"
    )


def test_every_public_name_is_on_the_api_page() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in flash_attn_ext.__all__:
        assert f"`{name}`" in text, name


def test_public_modules() -> None:
    found = api_tables.modules()
    assert found[0] == "attention"
    assert found[-1] == "reference"
    assert {"compat", "layers.rotary", "ops.layer_norm", "integrations.sdpa"} <= {*found}
    assert not [name for name in found if name.startswith("_") or "._" in name]
    assert len(found) == len({*found})


def test_a_section_of_the_api_page() -> None:
    source = '''"""What it is for. And more."""

def _hidden() -> None: ...

def shown(x: int) -> int:
    """Adds 1 | 2 to ``x``.

    More.
    """

class Thing:
    """A thing."""
'''
    assert api_tables.section("some.module", source).splitlines() == [
        "## `flash_attn_ext.some.module`",
        "",
        "What it is for.",
        "",
        "| name | what it is |",
        "|---|---|",
        "| `shown` | Adds 1 \\| 2 to `x` |",
        "| `Thing` | A thing |",
        "",
        "<!-- docstrings: flash_attn_ext.some.module shown Thing -->",
    ]
    with pytest.raises(ValueError, match=r"flash_attn_ext\.m\.f: has no docstring"):
        api_tables.section("m", '"""A module."""\ndef f() -> None: ...')
    with pytest.raises(ValueError, match="m: has nothing public"):
        api_tables.section("m", '"""A module."""')


# ------------------------------------------------------------------------------------- migration


def arguments(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("section", "functions"),
    [
        ("`flash_attn_func`", ["flash_attn_func", "flash_attn_kvpacked_func"]),
        ("`flash_attn_func`", ["flash_attn_qkvpacked_func"]),
        ("`flash_attn_varlen_func`", ["flash_attn_varlen_func", "flash_attn_varlen_kvpacked_func"]),
        ("`flash_attn_varlen_func`", ["flash_attn_varlen_qkvpacked_func"]),
        ("`flash_attn_with_kvcache`", ["flash_attn_with_kvcache"]),
    ],
)
def test_migration_names_every_argument(section: str, functions: list[str]) -> None:
    """Those of this package and, where it has the function, of flash-attn 3."""
    text = (DOCS / "migration.md").read_text(encoding="utf-8")
    parts = {part.split("\n")[0]: part for part in text.split("\n## ")}
    (head,) = (name for name in parts if name.startswith(section))
    shown = parts[head]
    if "varlen" in section:  # begins with: what stands above, and
        shown += next(part for name, part in parts.items() if name.startswith("`flash_attn_func`"))
    third = importlib.import_module("flash_attn_ext.compat.fa3.flash_attn_interface")
    for name in functions:
        assert f"`{name}`" in text or "packed forms" in head
        both = (getattr(module, name, None) for module in (flash_attn_ext, third))
        names = {x for function in both if function is not None for x in arguments(function)}
        missing = {x for x in names - {"q", "k", "v"} if f"`{x}`" not in shown}
        assert not missing, f"{name}: {sorted(missing)} not in the section {head}"


@pytest.mark.parametrize("page", ["migration.md", "examples.md"])
def test_code_of_a_page_runs(page: str) -> None:
    found = blocks.fenced_code((DOCS / page).read_text(encoding="utf-8"), "python")
    assert len(found) == 2
    for code in found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            exec(compile(code, page, "exec"), {"__name__": "page"})


# ---------------------------------------------------------------------------------- other pages


def test_the_table_of_integrations_has_the_versions_of_ci() -> None:
    requirements = (REPOSITORY / ".ci/requirements.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^(torch|transformers|einops)==(\S+)$", requirements, re.MULTILINE))
    text = (DOCS / "integrations.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.split("## What was run")[1].split("\n")
        if line.startswith("|")
    ]
    in_ci = {row[0]: row[1] for row in rows[2:] if len(row) == 4}
    assert f"torch {pinned['torch']}:" in in_ci["SDPA"]
    assert in_ci["transformers"].startswith(
        f"{pinned['transformers']} with torch {pinned['torch']}:"
    )
    assert f"einops {pinned['einops']}" in in_ci["flash-attn's modules"]
    older = re.search(r"torch==(\d\.\d+)\.\*", (REPOSITORY / ".ci/run").read_text(encoding="utf-8"))
    assert older is not None
    assert in_ci["the wheel alone"].startswith(f"torch {older[1]}:")


def test_every_example_is_listed() -> None:
    text = (DOCS / "examples.md").read_text(encoding="utf-8")
    for path in (REPOSITORY / "flash_attn_ext/examples").glob("[!_]*.py"):
        assert f"(../flash_attn_ext/examples/{path.name})" in text, path.name


def test_error_texts_of_troubleshooting_are_in_the_sources() -> None:
    """So that who searches for a text finds it. `...` stands for what varies."""
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    heads = re.findall(r"\*\*(.+?)\*\*", text, re.DOTALL)
    quoted = [" ".join(x.split()) for head in heads for x in re.findall(r"`([^`]+)`", head)]
    assert len(quoted) > 15
    folders = ("flash_attn_ext", "build_tools", "csrc")
    sources = "".join(
        path.read_text(encoding="utf-8")
        for folder in folders
        for path in (REPOSITORY / folder).rglob("*.py")
    )
    # Literals that are joined across lines, and numbers that come from a format.
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)
    sources = re.sub(r"\{[^{}]*\}", "...", sources)
    for quote in quoted:
        if quote in FOREIGN_TEXTS:
            continue
        for piece in re.split(r"\.\.\.|2\.1\d", quote):
            assert piece.strip(" .:,") in sources, f"{quote!r}: {piece!r} is said nowhere"


# ----------------------------------------------------------------------------------- the README


def test_both_readmes_have_the_same_code_and_blocks() -> None:
    assert sync_readme.synced(CHINESE, ENGLISH) == CHINESE, "run: python tools/sync_readme.py"
    names = re.findall(r"<!-- begin: (\S+) -->", ENGLISH)
    assert len(names) >= 5
    for name in names:
        assert blocks.read_block(CHINESE, name) == blocks.read_block(ENGLISH, name), name


def test_code_and_blocks_are_copied_into_the_translation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    block = "<!-- begin: a -->\n{}\n```sh\n{}\n```\n<!-- end: a -->\n"
    original = "# One\n" + block.format("1", "new") + "text\n```python\nx = 1\n```\n"
    translation = "# Yi\n" + block.format("0", "old") + "wenzi\n```python\nx = 0\n```\n"
    Path("README.md").write_text(original)
    Path("README.zh-CN.md").write_text(translation)
    assert sync_readme.main(["--check"]) == 1
    assert "stale; run: python tools/sync_readme.py" in capsys.readouterr().out
    assert Path("README.zh-CN.md").read_text() == translation
    assert sync_readme.main([]) == 0
    expected = original.replace("One", "Yi").replace("text", "wenzi")
    assert Path("README.zh-CN.md").read_text() == expected
    assert sync_readme.main(["--check"]) == 0
    with pytest.raises(ValueError, match=r"has a; expected as in README\.md: a, code; put what is"):
        sync_readme.synced(translation.split("wenzi")[0], original)


def prose(text: str) -> str:
    """Without generated blocks and code blocks."""
    text = re.sub(r"<!-- begin: (\S+) -->.*?<!-- end: \1 -->", "", text, flags=re.DOTALL)
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def test_both_readmes_say_the_same_facts() -> None:
    """Names in code marks, links and numbers, as far as a program can compare."""
    english, chinese = prose(ENGLISH), prose(CHINESE)
    code = re.compile(r"`([^`]+)`")
    for name in {*code.findall(english)} ^ {*code.findall(chinese)}:
        pytest.fail(f"`{name}` stands in one README only")
    links = re.compile(r"\]\((?!#)([^)]+)\)")
    other = {"README.md", "README.zh-CN.md"}
    assert {*links.findall(english)} - other == {*links.findall(chinese)} - other
    number = re.compile(r"(?<![\w.])\d[\d.,]*\d|(?<![\w.])\d")
    plain = [sorted(number.findall(code.sub("", links.sub("", x)))) for x in (english, chinese)]
    assert plain[0] == plain[1]


def test_readmes_link_to_each_other() -> None:
    assert "(README.zh-CN.md)" in ENGLISH.split("\n## ")[0]
    assert "(README.md)" in CHINESE.split("\n## ")[0]


# -------------------------------------------------------------------------------------- the site


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in ("README.md", "docs/deep/page.md", "docs/other.md", "csrc/a.h", "picture.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text\n")
    return tmp_path


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("README.md", "docs/other.md", "other.md"),
        ("README.md", "docs/other.md#part", "other.md#part"),
        ("README.md", "csrc/a.h", "source/csrc/a.h.md"),
        ("README.md", "picture.png", "source/picture.png"),
        ("docs/other.md", "../README.md", "index.md"),
        ("docs/other.md", "deep/page.md", "deep/page.md"),
        ("docs/deep/page.md", "../../csrc/a.h", "../source/csrc/a.h.md"),
        ("docs/deep/page.md", "../other.md", "../other.md"),
        ("docs/deep/page.md", "../gone.md", "../gone.md"),  # the site's build fails on it
        ("docs/deep/page.md", "../../../outside.md", "../../../outside.md"),
        ("docs/other.md", "https://pytorch.org/docs", "https://pytorch.org/docs"),
        ("docs/other.md", "#part", "#part"),
    ],
)
def test_links_of_the_site(page: str, link: str, expected: str, repository: Path) -> None:
    rewritten = docs_site.rewrite_links(f"see [this]({link}) and that", page, repository)
    assert rewritten == f"see [this]({expected}) and that"


def test_linked_files(repository: Path) -> None:
    text = "[a](../csrc/a.h) [b](../csrc/gone.h) [c](deep/page.md) `x[0](y)` [d](https://a.b/c)"
    assert docs_site.linked_files(text, "docs/other.md", repository) == [
        "csrc/a.h",
        "docs/deep/page.md",
    ]


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "docs/kernels/sm90.md"])
def test_a_page_and_its_place_in_the_site(path: str) -> None:
    assert docs_site.repository_path(docs_site.site_path(path)) == path


def test_docstrings_of_the_site() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="api.md"))
    config = SimpleNamespace(config_file_path=str(REPOSITORY / "mkdocs.yml"))
    text = docs_site.on_page_markdown("x\n<!-- docstrings: a.b c D -->\ny", page, config, None)
    assert text == "x\n::: a.b.c\n\n::: a.b.D\n\ny"
    page.file.src_uri = "source/csrc/a.h.md"
    assert docs_site.on_page_markdown("[x](a.h)", page, config, None) == "[x](a.h)"


def test_the_site_shows_every_page() -> None:
    """What mkdocs itself finds as well, here without it."""
    nav = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    shown = re.findall(r": ([\w./-]+\.md)$", nav, re.MULTILINE)
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(shown) == sorted([*pages, *docs_site.PAGES.values()])
