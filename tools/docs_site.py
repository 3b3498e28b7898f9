"""Hooks of mkdocs: the documentation reads the same in the repository and as a site.

Pages link to files of the repository by relative paths, which a site that holds `docs/` alone could
not follow. So the pages outside of `docs/` become pages of the site, a source file that a page
links to becomes a page that shows it, and links are rewritten. What does not exist stays as it is,
and `mkdocs build --strict` fails on it.

docs/api.md names functions in tables (tools/api_tables.py); behind each table stands
`<!-- docstrings: MODULE NAME ... -->`, which becomes their signatures and docstrings.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

PAGES = {
    "README.md": "index.md",
    "README.zh-CN.md": "README.zh-CN.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "wheels/README.md": "wheels.md",
}
"""Pages outside of docs/, by their path in the repository: their path in the site."""

_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)(?P<path>[^)#\s]+)(?=[)#])")
_DOCSTRINGS = re.compile(r"<!-- docstrings: (?P<module>\S+) (?P<names>[^>]*?) ?-->")


PICTURES = (".png", ".svg")


def site_path(path: str) -> str:
    """Where the site has a file or the page of it, given by its path in the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(PICTURES) else f"source/{path}.md"


def repository_path(page: str) -> str:
    """The inverse of site_path for a page that is no source file."""
    for path, name in PAGES.items():
        if name == page:
            return path
    return f"docs/{page}"


def linked_files(markdown: str, page: str, root: Path) -> list[str]:
    """Files of the repository that a page links to, by their path in it.

    Args:
        markdown: the page.
        page: its path in the repository.
        root: the repository.
    """
    folder = posixpath.dirname(page)
    paths = [
        posixpath.normpath(posixpath.join(folder, m["path"])) for m in _LINK.finditer(markdown)
    ]
    return [path for path in paths if not path.startswith("..") and (root / path).is_file()]


def rewrite_links(markdown: str, page: str, root: Path) -> str:
    """The page with links as they have to be in the site; arguments as of linked_files."""
    folder = posixpath.dirname(page)
    start = posixpath.dirname(site_path(page))

    def rewritten(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match["path"]))
        if path.startswith("..") or not (root / path).is_file():
            return match["path"]
        return posixpath.relpath(site_path(path), start or ".")

    return _LINK.sub(rewritten, markdown)


def with_docstrings(markdown: str) -> str:
    """The page with a directive of mkdocstrings for each name."""

    def directives(match: re.Match[str]) -> str:
        return "\n".join(f"::: {match['module']}.{name}\n" for name in match["names"].split())

    return _DOCSTRINGS.sub(directives, markdown)


def source_page(path: str, text: str) -> str:
    """A page that shows a source file."""
    return f"# {path}\n\n~~~~text\n{text}\n~~~~\n"


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages outside of docs/, and those of source files that a page links to."""
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent

    def add(path: str, **content: str) -> None:
        files.append(File.generated(config, site_path(path), **content))

    for path in PAGES:
        add(path, content=(root / path).read_text(encoding="utf-8"))
    for file in list(files.documentation_pages()):
        origin = repository_path(file.src_uri)
        for path in linked_files(file.content_string, origin, root):
            if files.get_file_from_path(site_path(path)) is not None:
                continue
            if path.endswith(PICTURES):
                add(path, abs_src_path=str(root / path))
            else:
                add(path, content=source_page(path, (root / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrites the links of a page and brings docstrings in."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    root = Path(config.config_file_path).parent
    return with_docstrings(rewrite_links(markdown, repository_path(page.file.src_uri), root))
