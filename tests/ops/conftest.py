"""The fixture of the tests of attention kernels."""

from __future__ import annotations

import pytest
from helpers import NEEDS_CUDA, NEEDS_LIBRARY, require
from kernel_cases import VARIANTS


@pytest.fixture(params=VARIANTS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each set of kernels, by name; a problem that no kernel takes is an error."""
    require(NEEDS_CUDA)
    require(NEEDS_LIBRARY)
    monkeypatch.setenv("FLASH_ATTN_EXT_FALLBACK", "error")
    for name, value in VARIANTS[request.param].items():
        monkeypatch.setenv(name, value)
    return request.param
