# ruff: noqa: E501 -- tables of cases, one per line
"""FLASH_ATTN_EXT_DEBUG=1 on a GPU: the checks of values by the kernel, in CUDA graphs too."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from helpers import cu_seqlens, int32
from kernel_cases import BF16, DEVICE
from torch import Tensor
from value_check_cases import NO_PAGE, Calls, first_violation

import flash_attn_ext as fa
from flash_attn_ext import _checks, _value_checks
from flash_attn_ext._value_checks import LengthTerms, Row
from flash_attn_ext.layers.rotary import apply_rotary_emb

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def debug(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debug mode with each set of kernels, here and in processes that are started."""
    monkeypatch.setattr(_checks, "DEBUG", True)
    monkeypatch.setenv("FLASH_ATTN_EXT_DEBUG", "1")


def moved(x: Any) -> Any:
    """Tensors of a row on the GPU."""
    if isinstance(x, LengthTerms):
        return LengthTerms(*map(moved, x))
    return x.to(DEVICE) if isinstance(x, Tensor) else x


@pytest.mark.parametrize("rate", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("form", ["cache", "varlen"])
def test_the_kernel_finds_the_first(
    form: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    for _ in range(100):
        rows = calls.of(form, rate)
        record = _value_checks._launch(
            [Row(*map(moved, row)) for row in rows], calls.batch_size, True
        )
        assert record.tolist() == first_violation(rows, calls.batch_size)


def filled_cache(**changes: Any) -> dict[str, Any]:
    """A sound call: 3 sequences in pages of 16, 3 new tokens each; garbage behind the lengths."""
    new = torch.ones(3, 3, 2, 64, device=DEVICE, dtype=BF16)
    call = {
        "cache_seqlens": [5, 6, 20],
        "page_table": [[0, NO_PAGE], [2, -NO_PAGE], [4, 5]],
        **changes,
    }
    if call.pop("packed", False):
        new = new.flatten(0, 1)
    tensors = {
        name: torch.tensor(x, dtype=torch.int32, device=DEVICE) if isinstance(x, list) else x
        for name, x in call.items()
    }
    caches = torch.zeros(2, 6, 16, 2, 64, device=DEVICE, dtype=BF16)
    return {
        "q": new.repeat_interleave(2, -2),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "k": new,
        "v": new,
        "causal": True,
        **tensors,
    }


PACKED = {"packed": True, "cu_seqlens_q": [0, 3, 6, 9], "max_seqlen_q": 3}
ROTARY = {"rotary_cos": torch.ones(40, 32), "rotary_sin": torch.zeros(40, 32)}
SOUND_CACHES: dict[str, dict[str, Any]] = {
    "pages": {},
    "full": {"cache_seqlens": [13, 13, 29], "cache_leftpad": [16, 0, 32]},
    "empty": {"cache_seqlens": [0, 0, 0]},
    "rows": {"cache_batch_idx": [1, 0, 2]},
    "packed": {**PACKED, "cu_seqlens_k_new": [0, 0, 3, 9], "cache_seqlens": [0, 13, 26]},
    "no_pages": {"page_table": None, "cache_seqlens": [13, 0, 2], "cache_batch_idx": [5, 0, 2]},
    "rotary": {**ROTARY, "rotary_seqlens": [0, 39, 7]},
}
BAD_CACHES: list[tuple[dict[str, Any], str]] = [
    ({"cache_seqlens": [5, 30, 8]}, "cache_seqlens[1]: got 30, expected 0 to 29, what fits the cache; sequence 1"),
    ({"cache_seqlens": [5, 6, -2]}, "cache_seqlens[2]: got -2, expected 0 to 29"),
    ({"cache_seqlens": [-7, 99, -2]}, "cache_seqlens[0]: got -7"),
    ({"cache_seqlens": 30}, "cache_seqlens[0]: got 30, expected 0 to 29"),
    ({"cache_leftpad": [1, 10, 0]}, "cache_leftpad[1]: got 10, expected 0 to 9, the length of the sequence"),
    ({"cache_batch_idx": [0, 3, 2]}, "cache_batch_idx[1]: got 3, expected 0 to 2, a cache row"),
    ({"cache_batch_idx": [0, 1, -1]}, "cache_batch_idx[2]: got -1, expected 0 to 2"),
    ({"page_table": [[0, 1], [2, 3], [4, 77]]}, "page_table[2, 1]: got 77, expected 0 to 5, a page id; sequence 2"),
    ({"page_table": [[0, 1], [-1, 3], [4, 5]]}, "page_table[1, 0]: got -1, expected 0 to 5"),
    ({"page_table": [[4, 6], [2, 3], [0, 1]], "cache_batch_idx": [2, 1, 0]}, "page_table[0, 1]: got 6, expected 0 to 5, a page id; sequence 2"),
    ({"page_table": None, "cache_seqlens": [3, 14, 0]}, "cache_seqlens[1]: got 14, expected 0 to 13"),
    ({**PACKED, "cu_seqlens_k_new": [0, 0, 0, 9], "cache_seqlens": [5, 6, 24]}, "cache_seqlens[2]: got 24, expected 0 to 23"),
    ({**PACKED, "cu_seqlens_k_new": [0, 5, 4, 9]}, "cu_seqlens_k_new[2]: got 4, expected 5 to 9, ascending from 0, at most the rows given; sequence 1"),
    ({**PACKED, "cu_seqlens_k_new": [0, 3, 6, 10]}, "cu_seqlens_k_new[3]: got 10, expected 6 to 9"),
    ({**PACKED, "cu_seqlens_k_new": [0, 3, 6, 9], "cu_seqlens_q": [1, 3, 6, 9]}, "cu_seqlens_q[0]: got 1, expected 0 to 0"),
    ({**PACKED, "cu_seqlens_k_new": [0, 3, 6, 9], "max_seqlen_q": 2}, "length in cu_seqlens_q[0]: got 3, expected 0 to 2, max_seqlen_q; sequence 0"),
    ({**ROTARY, "rotary_seqlens": [0, 40, 7]}, "rotary_seqlens[1]: got 40, expected 0 to 39, a row of rotary_cos"),
]  # fmt: skip


def on_device(call: dict[str, Any]) -> dict[str, Any]:
    """Rotary tables are given in fp32 on the CPU."""
    return {
        name: x.to(DEVICE, BF16) if name.startswith("rotary_") and x.is_floating_point() else x
        for name, x in call.items()
    }


@pytest.mark.parametrize("changes", SOUND_CACHES.values(), ids=SOUND_CACHES)
def test_sound_caches_pass(changes: dict[str, Any]) -> None:
    call = on_device(filled_cache(**changes))
    fa.flash_attn_with_kvcache(**call)
    assert (call["k_cache"] != 0).any()


@pytest.mark.parametrize(("changes", "text"), BAD_CACHES, ids=[x[1] for x in BAD_CACHES])
def test_the_sequence_is_named_and_nothing_written(changes: dict[str, Any], text: str) -> None:
    call = on_device(filled_cache(**changes))
    with pytest.raises(ValueError, match=re.escape(text)):
        fa.flash_attn_with_kvcache(**call)
    assert (call["k_cache"] == 0).all()
    assert (call["v_cache"] == 0).all()


def test_many_sequences_and_pages() -> None:
    """More of both than warps and lanes; pages of one token."""
    pool = torch.zeros(2, 50, 1, 2, 64, device=DEVICE, dtype=BF16)
    table = torch.randint(0, 50, (300, 1000), dtype=torch.int32, device=DEVICE)
    lengths = torch.randint(900, 1000, (300,), dtype=torch.int32, device=DEVICE)
    table[:, 999] = NO_PAGE
    q = torch.ones(300, 1, 4, 64, device=DEVICE, dtype=BF16)
    call = {"cache_seqlens": lengths, "page_table": table}
    fa.flash_attn_with_kvcache(q, *pool, **call)
    for row, column in ((299, 0), (257, 899), (257, 33), (40, 641)):
        table[row, column] = -1
        with pytest.raises(ValueError, match=rf"page_table\[{row}, {column}\]: got -1"):
            fa.flash_attn_with_kvcache(q, *pool, **call)


def test_one_wait_for_the_device() -> None:
    call = filled_cache()
    fa.flash_attn_with_kvcache(**call)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            fa.flash_attn_with_kvcache(**call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(w.message) for w in waits) == 1


def test_varlen() -> None:
    q, k = (torch.zeros(n, 4, 64, device=DEVICE, dtype=BF16) for n in (6, 7))
    pool = torch.zeros(5, 3, 4, 64, device=DEVICE, dtype=BF16)
    starts_q, starts_k = cu_seqlens([4, 2], DEVICE), cu_seqlens([3, 4], DEVICE)
    table = int32([0, 1, 2, NO_PAGE], DEVICE).view(2, 2)
    plain = {"k": k, "v": k, "cu_seqlens_k": starts_k, "max_seqlen_q": 4, "max_seqlen_k": 4}
    paged = {**plain, "k": pool, "v": pool, "cu_seqlens_k": None, "page_table": table}
    paged["seqused_k"] = int32([6, 3], DEVICE)
    paged["max_seqlen_k"] = 6
    cases: list[tuple[dict[str, Any], str | None]] = [
        (plain, None),
        (paged, None),
        ({**plain, "seqused_q": int32([4, 0], DEVICE)}, None),
        ({**plain, "cu_seqlens_k": int32([0, 4, 3], DEVICE)}, "cu_seqlens_k[2]: got 3, expected 4 to 7"),
        ({**plain, "cu_seqlens_k": int32([0, 4, 8], DEVICE)}, "cu_seqlens_k[2]: got 8, expected 4 to 7"),
        ({**plain, "cu_seqlens_q": int32([0, 4, 7], DEVICE)}, "cu_seqlens_q[2]: got 7, expected 4 to 6"),
        ({**plain, "max_seqlen_k": 3}, "length in cu_seqlens_k[1]: got 4, expected 0 to 3, max_seqlen_k"),
        ({**plain, "seqused_q": int32([4, 3], DEVICE)}, "seqused_q[1]: got 3, expected 0 to 2, the length of the sequence"),
        ({**plain, "seqused_k": int32([-1, 3], DEVICE)}, "seqused_k[0]: got -1, expected 0 to 3"),
        ({**paged, "seqused_k": int32([6, 4], DEVICE)}, f"page_table[1, 1]: got {NO_PAGE}, expected 0 to 4"),
        ({**paged, "seqused_k": int32([6, 7], DEVICE)}, "seqused_k[1]: got 7, expected 0 to 6, max_seqlen_k"),
        ({**paged, "seqused_k": int32([7, 1], DEVICE), "max_seqlen_k": 9}, "seqlen_k[0]: got 7, expected 0 to 6, max_pages * page_size; sequence 0"),
    ]  # fmt: skip
    for changes, text in cases:
        call = {"q": q, "cu_seqlens_q": starts_q, "causal": True, **changes}
        if text is None:
            fa.flash_attn_varlen_func(**call)
            continue
        with pytest.raises(ValueError, match=re.escape(text)):
            fa.flash_attn_varlen_func(**call)


def test_rotary() -> None:
    x, cos = torch.zeros(7, 4, 64, device=DEVICE), torch.ones(9, 32, device=DEVICE)
    call = {"cu_seqlens": cu_seqlens([3, 4], DEVICE), "max_seqlen": 4}
    apply_rotary_emb(x, cos, cos, seqlen_offsets=int32([5, 0], DEVICE), **call)
    with pytest.raises(ValueError, match=r"seqlen_offsets\[1\]: got 6, expected 0 to 5"):
        apply_rotary_emb(x, cos, cos, seqlen_offsets=int32([5, 6], DEVICE), **call)
    with pytest.raises(ValueError, match=r"length in cu_seqlens\[1\]: got 4, expected 0 to 3"):
        apply_rotary_emb(x, cos, cos, **{**call, "max_seqlen": 3})


def test_graph_of_a_sound_call() -> None:
    call = filled_cache()
    expected = fa.flash_attn_with_kvcache(**call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fa.flash_attn_with_kvcache(**call)
    for _ in range(3):
        out.zero_()
        graph.replay()
    assert torch.equal(out, expected)


BAD_REPLAY = """
import torch
import flash_attn_ext as fa

caches = torch.zeros(2, 3, 32, 2, 64, device="cuda", dtype=torch.bfloat16)
new = torch.ones(3, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
lengths = torch.tensor([5, 6, 20], dtype=torch.int32, device="cuda")
written = torch.full((2,), -1.0, dtype=torch.bfloat16).pin_memory()

def step():
    fa.flash_attn_with_kvcache(new.repeat(1, 1, 2, 1), *caches, new, new, cache_seqlens=lengths)
    written.copy_(caches[0, 0, 5:7, 0, 0], non_blocking=True)

step()
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    step()
graph.replay()
torch.cuda.synchronize()
print("sound:", written.tolist())
lengths.copy_(torch.tensor([5, 30, 20]))
torch.cuda.synchronize()
written.fill_(-1.0)
try:
    graph.replay()
    torch.cuda.synchronize()
except RuntimeError as error:
    print("replay:", str(error).splitlines()[0])
print("bad:", written.tolist(), flush=True)
"""


def test_replay_of_a_bad_call() -> None:
    """In a process of its own, whose CUDA context is lost."""
    command = [sys.executable, "-c", BAD_REPLAY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert "sound: [1.0, 1.0]" in said
    line = "flash_attn_ext: cache_seqlens[1]: got 30, expected 0 to 29, what fits the cache; sequence 1"
    assert said.count(line) == 1, said
    assert "replay: CUDA error: unspecified launch failure" in said, said
    assert "bad: [-1.0, -1.0]" in said
