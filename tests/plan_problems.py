"""Devices and problems that make_plan is asked about."""

from __future__ import annotations

from types import ModuleType
from typing import Any

ALL = ["sm80", "sm89", "sm90"]
BUILT = (64, 96, 128, 192, 256)
DEVICES = {
    "a100": (8, 0, 108, 163),
    "rtx3090": (8, 6, 82, 99),
    "rtx4090": (8, 9, 128, 99),
    "l40s": (8, 9, 142, 99),
    "h100": (9, 0, 132, 227),
    "h200": (9, 0, 132, 227),
    "b200": (10, 0, 148, 227),
    "rtx5090": (12, 0, 170, 99),
}
REPRESENTATIVES = {
    "sm80": "a100",
    "sm86": "rtx3090",
    "sm89": "rtx4090",
    "sm90": "h100",
    "sm100": "b200",
    "sm120": "rtx5090",
}
SIZES = {"batch_size": 2, "seqlen_q": 100, "seqlen_k": 100, "num_heads_q": 4, "num_heads_kv": 4}


def problem(family: str, **fields: Any) -> dict[str, Any]:
    """A supported problem of a family, with some fields replaced."""
    base = {"family": family, "dtype": "bf16", **SIZES}
    if family == "combine":
        base["num_splits"] = 4
    if family == "rotary":
        base["rotary_dim"] = 64
    return {**base, **fields}


def reasons(introspect: ModuleType, fields: dict[str, Any], device: Any = "sm80") -> list[str]:
    plan = introspect.make_plan(fields, device, ALL)
    assert not plan["ok"]
    assert set(plan) == {"ok", "reasons"}
    return plan["reasons"]
