"""Problems for the tests of attention kernels on a GPU, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import Case, Packed
from torch import Tensor

from flash_attn_ext import _load

DEVICE = "cuda"
FP16, BF16 = torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])

HEAD_DIMS = [
    *((d, d) for d in (1, 8, 32, 40, 59, 64, 72, 96, 100, 128, 160, 192, 200, 256)),
    *((192, 128), (64, 128), (128, 64), (256, 8), (8, 256), (40, 59)),
]
LENGTHS = [
    *((n, n) for n in (1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000)),
    *((1, 129), (1, 1000), (65, 1), (129, 7), (64, 256), (257, 128), (100, 1023), (1023, 100)),
]
EVERYTHING = {"window": (70, 9), "softcap": 5.0, "alibi": 2, "dropout_p": 0.2}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"window": (-1, 0)},
    "window": {"window": (100, 20)},
    "window_left": {"window": (33, -1)},
    "window_right": {"window": (-1, 17)},
    "diagonal": {"window": (0, 0)},
    "window_outside": {"window": (5000, 3000)},
    "softcap": {"softcap": 4.0},
    "softcap_large": {"softcap": 50.0, "window": (-1, 0)},
    "alibi": {"alibi": 1},
    "alibi_by_batch": {"alibi": 2, "window": (-1, 0)},
    "dropout": {"dropout_p": 0.17},
    "dropout_most": {"dropout_p": 0.9, "window": (-1, 0)},
    "scale_large": {"softmax_scale": 1.5},
    "scale_zero": {"softmax_scale": 0.0},
    "scale_negative": {"softmax_scale": -0.2, "window": (-1, 0)},
    "scale_negative_alibi": {"softmax_scale": -0.2, "alibi": 1},
    "everything": EVERYTHING,
}
PACKED = {
    "ragged": Packed([170, 1, 400, 64], [230, 600, 5, 64]),
    "empty_sequences": Packed([0, 90, 0, 140], [50, 0, 0, 170]),
    "rows_behind": Packed([170, 80, 3], [90, 300, 3], extra=200),
    "seqused": Packed([170, 80, 128], [250, 300, 90], [110, 0, 128], [200, 300, 1], extra=2),
    "seqused_q": Packed([170, 80], [250, 300], used_q=[160, 3]),
    "seqused_k": Packed([170, 80], [250, 300], used_k=[0, 130]),
    "one_tile_of_keys": Packed(
        [170, 3, 200, 64], [100, 128, 0, 9], [110, 3, 200, 64], [90, 128, 0, 9], extra=300
    ),
    "many_short": Packed([3, 1, 0, 2, 7] * 12, [2, 9, 4, 0, 1] * 12),
    "all_empty": Packed([0, 0], [0, 0], extra=3),
    "no_queries": Packed([0, 0], [4, 2]),
    "no_keys": Packed([140, 2], [0, 0]),
}


def case(dtype: torch.dtype = BF16, **fields: Any) -> Case:
    """150 queries, 200 keys, head_dim 64, with some fields replaced."""
    sizes = {"seqlen_q": 150, "seqlen_k": 200, "head_dim": 64, "head_dim_v": 64}
    return Case(**{**sizes, "dtype": dtype, **fields})


def _along_keys(problem: Case, per_key: Tensor) -> list[Tensor]:
    """Inputs whose score of key j is about per_key[j], the same for every query."""
    q, k, v = (x.detach() for x in problem.inputs(DEVICE))
    q[..., 0] = 8.0
    k *= 0.05
    k[..., 0] = (per_key / (8.0 * problem.scale)).to(k.dtype)[:, None]
    return [x.requires_grad_() for x in (q, k, v)]


def _ramp(slope: float) -> Callable[[Case], list[Tensor]]:
    return lambda problem: _along_keys(
        problem, slope * torch.arange(problem.seqlen_k, device=DEVICE, dtype=torch.float64)
    )


def _equal_keys(problem: Case) -> list[Tensor]:
    q, k, v = (x.detach() for x in problem.inputs(DEVICE))
    k[:] = k[:, :1].clone()
    return [x.requires_grad_() for x in (q, k, v)]


def _outliers(value: float) -> Callable[[Case], list[Tensor]]:
    def inputs(problem: Case) -> list[Tensor]:
        q, k, v = (x.detach() for x in problem.inputs(DEVICE))
        k[:, ::37, :, 3] = value
        q[:, ::11, :, 3] = 1.0
        v[:, 5::41, :, 2] = value
        return [x.requires_grad_() for x in (q, k, v)]

    return inputs


HARD = {
    "rising": _ramp(0.5),
    "falling": _ramp(-0.5),
    "steep": _ramp(20.0),
    "rising_slowly": _ramp(0.01),
    "equal": _equal_keys,
    "outliers": _outliers(1e4),
    "negative_outliers": _outliers(-1e4),
}


STRIDES = {
    # Elements between sequences, tokens and heads of [2, 40, 2, 64]; up to 2.6 * 2^30 in all.
    "batch": (2**31, 2 * 64, 64),
    "token": (64, 2**26, 128),
    "head": (64 * 40, 64, 2**31),
}


def far_apart(stride: tuple[int, int, int], *tensors: Tensor) -> list[Tensor]:
    """Copies of tensors [2, 40, 2, 64] with these strides, in one allocation of 4 to 6 GB."""
    extent = sum((n - 1) * s for n, s in zip((2, 40, 2), stride, strict=True))
    buffer = torch.empty(extent + len(tensors) * 2**13, dtype=BF16, device=DEVICE)
    views = [
        buffer.as_strided((2, 40, 2, 64), (*stride, 1), i * 2**13) for i in range(len(tensors))
    ]
    for view, x in zip(views, tensors, strict=True):
        view.copy_(x)
    return views


SMALLER_SMEM_KB = (163, 99)  # of compute capability 8.0; of 8.6, 8.9 and 12.0


def _variants() -> dict[str, dict[str, str]]:
    """Name -> environment of each set of kernels that differs from the others on this GPU.

    "native" is what the GPU runs by itself, "sm80" the kernels of _sm80 where those are others, and
    "sm80_163kb" and "sm80_99kb" the same with the tiles for less shared memory than it has. The
    switches are read at every call, so one process can run all of them.
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
    for kb in SMALLER_SMEM_KB:
        if smem > kb * 1024:
            variants[f"sm80_{kb}kb"] = {
                "FLASH_ATTN_EXT_ARCH": "sm80",
                "FLASH_ATTN_EXT_SMEM_KB": str(kb),
            }
    return variants


VARIANTS = _variants()

A100 = {"FLASH_ATTN_EXT_ARCH": "sm80", "FLASH_ATTN_EXT_SMEM_KB": "163"}
"""Environment for the tiles of a GPU with 163 KB, which differ from those of larger ones for few
head dimensions only; no variant of its own."""
