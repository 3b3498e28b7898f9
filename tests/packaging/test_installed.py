"""The source folder steps aside for an installed build, however the program is started."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from flash_attn_ext import _installed

INIT = """\
from tiny import _installed

if not _installed.redirect(__name__):
    from tiny.where import WHERE
"""
MAIN = "import tiny\nfrom tiny import WHERE\nprint(WHERE, tiny.__file__)\n"


def make_package(folder: Path, where: str, built: bool) -> Path:
    """A package like ours that says where it is."""
    package = folder / "tiny"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(INIT)
    (package / "__main__.py").write_text(MAIN)
    (package / "where.py").write_text(f"WHERE = {where!r}\n")
    (package / "_installed.py").write_text(Path(_installed.__file__).read_text())
    if built:
        (package / "_build_info.json").write_text("{}")
    return package


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_package(tmp_path / "repository", "source", built=False).parent


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return make_package(tmp_path / "site", "installed", built=True).parent


def run(cwd: Path, *arguments: str, path: Path | None = None, **env: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(path or ""), **env}
    variables.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=variables, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("arguments", [("-m", "tiny"), ("-c", MAIN), ("program.py",)])
def test_started_in_the_repository(
    repository: Path, site: Path, arguments: tuple[str, ...]
) -> None:
    (repository / "program.py").write_text(MAIN)
    out = run(repository, *arguments, path=site)
    assert out == f"installed {site / 'tiny' / '__init__.py'}"


def test_started_elsewhere(site: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "-m", "tiny", path=site).startswith("installed")


def test_the_source_tree_can_be_asked_for(repository: Path, site: Path) -> None:
    out = run(repository, "-m", "tiny", path=site, FLASH_ATTN_EXT_SOURCE_TREE="1")
    assert out.startswith("source")
    out = run(repository, "-m", "tiny", path=site, FLASH_ATTN_EXT_SOURCE_TREE="0")
    assert out.startswith("installed")


def test_nothing_installed(repository: Path) -> None:
    assert run(repository, "-m", "tiny").startswith("source")


def test_another_bare_copy_is_no_build(repository: Path, tmp_path: Path) -> None:
    other = make_package(tmp_path / "other", "other", built=False).parent
    assert run(repository, "-m", "tiny", path=other).startswith("source")


def test_a_folder_built_in_place_is_used(repository: Path, site: Path) -> None:
    (repository / "tiny" / "_build_info.json").write_text("{}")
    assert run(repository, "-m", "tiny", path=site).startswith("source")


def test_editable_install_of_another_checkout(repository: Path, tmp_path: Path) -> None:
    """Its finder is not on sys.path; it is asked like any other."""
    checkout = make_package(tmp_path / "checkout", "editable", built=True)
    site = tmp_path / "site_customized"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys\nfrom importlib.util import spec_from_file_location\n"
        "class Finder:\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        if name == 'tiny':\n"
        f"            return spec_from_file_location(name, {str(checkout / '__init__.py')!r},\n"
        f"                submodule_search_locations=[{str(checkout)!r}])\n"
        "sys.meta_path.append(Finder)\n"
    )
    assert run(repository, "-m", "tiny", path=site).startswith("editable")


def test_what_is_left_on_the_package(
    repository: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(repository), str(site), *sys.path])
    monkeypatch.setattr(_installed, "__file__", str(repository / "tiny" / "_installed.py"))
    source = importlib.import_module("tiny")  # its own copy of _installed redirects
    try:
        assert source.WHERE == "installed"
        assert getattr(source, _installed.REDIRECTED_FROM) == str(repository / "tiny")
        assert source.__path__ == [str(site / "tiny")]
        assert source.__spec__.origin == source.__file__ == str(site / "tiny" / "__init__.py")
        assert Path(source._installed.__file__).parent == site / "tiny"
        assert _installed.redirect("tiny")  # the same, by the module under test
        assert source.WHERE == "installed"
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "tiny"]:
            del sys.modules[name]


def test_redirect_declines(repository: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_installed, "__file__", str(site / "tiny" / "_installed.py"))
    assert not _installed.redirect("tiny")  # it is built
    monkeypatch.setattr(_installed, "__file__", str(repository / "tiny" / "_installed.py"))
    monkeypatch.setattr(sys, "path", [str(repository)])
    assert not _installed.redirect("tiny")  # nothing is installed
    monkeypatch.setenv(_installed.SOURCE_TREE_VARIABLE, "1")
    monkeypatch.setattr(sys, "path", [str(repository), str(site)])
    assert not _installed.redirect("tiny")  # not wanted


def test_namespace_folders_are_passed_over(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stray" / "tiny").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "stray")])
    monkeypatch.chdir(repository)
    spec: ModuleSpec | None = _installed.find_installed("tiny", str(repository / "tiny"))
    assert spec is None
