"""Seeds, the device fixture, and the rule that only listed skips are allowed."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator

import pytest
import torch
from helpers import ALLOWED_SKIPS, devices, skip_is_allowed
from hypothesis import settings

from flash_attn_ext.backends import _sequences

# Examples of a sweep are fresh in every run; a failing one prints the line that repeats it.
settings.register_profile("flash_attn_ext", deadline=None, print_blob=True, database=None)
settings.load_profile("flash_attn_ext")

# Tests on a GPU use the tiled backend on purpose; those of the warning set this themselves.
os.environ.setdefault("FLASH_ATTN_EXT_FALLBACK", "allow")

BASE_SEED = int(os.environ.get("FLASH_ATTN_EXT_TEST_SEED", "0"))


def seed_of(nodeid: str) -> int:
    """The seed of a test: of its name and FLASH_ATTN_EXT_TEST_SEED, whatever ran before it."""
    return zlib.crc32(nodeid.encode()) ^ BASE_SEED


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    seed = seed_of(request.node.nodeid)
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> str:
    """Each device of this machine, by name."""
    return request.param


def _check_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turns a skip into a failure unless its reason is listed and true on this machine."""
    if report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if skip_is_allowed(reason):
        return
    why = (
        "this machine has what the test says it lacks"
        if reason in ALLOWED_SKIPS
        else "the reason is not in helpers.ALLOWED_SKIPS"
    )
    report.outcome = "failed"
    report.longrepr = f"skipped with {reason!r}: not allowed, {why}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[pytest.TestReport]:
    report = yield
    _check_skip(report)
    if report.failed:
        report.sections.append(
            ("seed", f"{seed_of(item.nodeid)} (FLASH_ATTN_EXT_TEST_SEED={BASE_SEED})")
        )
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[pytest.CollectReport]:
    report = yield
    _check_skip(report)
    return report


@pytest.fixture(params=["lengths_read", "lengths_on_device"])
def length_reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of the tiled backend: reading lengths as on the CPU, and never, as on a GPU."""
    if request.param == "lengths_on_device":
        monkeypatch.setattr(_sequences, "lengths_are_readable", lambda device: False)
