"""conftest.py lets a test be skipped only for a listed reason that is true on this machine."""

from __future__ import annotations

import types

import conftest
import helpers
import pytest


def _report(reason: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        outcome="skipped", longrepr=("test_x.py", 3, f"Skipped: {reason}"), wasxfail=None
    )


def _checked(reason: str) -> types.SimpleNamespace:
    report = _report(reason)
    del report.wasxfail
    conftest._check_skip(report)
    return report


@pytest.fixture(autouse=True)
def _lists(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"needs a unicorn": lambda: True, "needs a chair": lambda: False}
    monkeypatch.setattr(helpers, "ALLOWED_SKIPS", reasons)
    monkeypatch.setattr(conftest, "ALLOWED_SKIPS", reasons)
    helpers.skip_is_allowed.cache_clear()


def test_what_is_lacking_may_be_skipped() -> None:
    assert _checked("needs a unicorn").outcome == "skipped"
    assert _checked("needs the Python module no_such_module").outcome == "skipped"


def test_what_is_there_may_not_be_skipped() -> None:
    report = _checked("needs a chair")
    assert report.outcome == "failed"
    assert "this machine has what the test says it lacks" in report.longrepr
    assert _checked("needs the Python module torch").outcome == "failed"


def test_other_reasons_fail() -> None:
    report = _checked("flaky on Mondays")
    assert report.outcome == "failed"
    assert "not in helpers.ALLOWED_SKIPS" in report.longrepr


def test_expected_failures_are_not_skips() -> None:
    report = _report("flaky on Mondays")
    conftest._check_skip(report)
    assert report.outcome == "skipped"


def test_require() -> None:
    helpers.require("needs a chair")
    with pytest.raises(pytest.skip.Exception, match="needs a unicorn"):
        helpers.require("needs a unicorn")


def test_seed_depends_on_the_name_alone() -> None:
    assert conftest.seed_of("a") == conftest.seed_of("a") != conftest.seed_of("b")
