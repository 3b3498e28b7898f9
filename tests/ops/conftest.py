"""The kernels that one GPU can be made to run, for the tests of attention kernels."""

from __future__ import annotations

import pytest
import torch
from helpers import NEEDS_CUDA, NEEDS_LIBRARY, require

from flash_attn_ext import _load

SMALL_SMEM_KB = 99  # of compute capability 8.6, 8.9 and 12.0


def _variants() -> dict[str, dict[str, str]]:
    """Name -> environment of each set of kernels that differs from the others on this GPU.

    "native" is what the GPU runs by itself, "sm80" the kernels of _sm80 where those are others, and
    "sm80_99kb" the same with the tiles for little shared memory. The switches are read at every
    call, so one process can run all of them.
    """
    variants: dict[str, dict[str, str]] = {"native": {}}
    introspect = _load.status().introspect
    if not torch.cuda.is_available() or introspect is None:
        return variants
    major, minor = torch.cuda.get_device_capability()
    own = f"sm{major}{minor}"
    if any(row["arch"] == own and row["family"] == "fwd" for row in introspect.kernels()):
        if own != "sm80":
            variants["sm80"] = {"FLASH_ATTN_EXT_ARCH": "sm80"}
    smem: int = torch.cuda.get_device_properties(0).shared_memory_per_block_optin  # type: ignore[attr-defined]
    if smem > SMALL_SMEM_KB * 1024:
        variants["sm80_99kb"] = {
            "FLASH_ATTN_EXT_ARCH": "sm80",
            "FLASH_ATTN_EXT_SMEM_KB": str(SMALL_SMEM_KB),
        }
    return variants


VARIANTS = _variants()


@pytest.fixture(params=VARIANTS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each set of kernels, by name; a problem that no kernel takes is an error."""
    require(NEEDS_CUDA)
    require(NEEDS_LIBRARY)
    monkeypatch.setenv("FLASH_ATTN_EXT_FALLBACK", "error")
    for name, value in VARIANTS[request.param].items():
        monkeypatch.setenv(name, value)
    return request.param
