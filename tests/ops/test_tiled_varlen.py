"""Tiled backend, packed sequences: values, gradients, poisoned rows, pages."""

from __future__ import annotations

import pytest
import torch
from attention_cases import TILED, Case, Packed, check_packed, op
from helpers import assert_equals, cu_seqlens, int32

from flash_attn_ext.backends import _problem
from flash_attn_ext.reference import varlen_attention_reference

pytestmark = pytest.mark.usefixtures("length_reading")

EVERYTHING = {"window": (12, 3), "softcap": 3.0, "alibi": 2, "dropout_p": 0.2}
OPTIONS = {"plain": {}, "causal": {"window": (-1, 0)}, "alibi": {"alibi": 1}, "all": EVERYTHING}

RAGGED = Packed([17, 1, 40], [23, 60, 5])
LENGTHS = {
    "ragged": RAGGED,
    "empty_sequences": Packed([0, 9, 0, 4], [5, 0, 0, 7]),
    "rows_behind": Packed([17, 8, 3], [9, 30, 3], extra=6),
    "seqused": Packed([17, 8, 12], [25, 30, 9], [11, 0, 12], [20, 30, 1], extra=2),
    "seqused_q": Packed([17, 8], [25, 30], used_q=[16, 3]),
    "seqused_k": Packed([17, 8], [25, 30], used_k=[0, 13]),
    "all_empty": Packed([0, 0], [0, 0], extra=3),
    "no_queries": Packed([0, 0], [4, 2]),
    "no_keys": Packed([4, 2], [0, 0]),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("packed", LENGTHS.values(), ids=LENGTHS)
def test_fp64_equals_reference(packed: Packed, options: dict[str, object], device: str) -> None:
    check_packed(Case(batch_size=len(packed.seqlens_q), **options), packed, device, TILED)


def test_no_sequences(device: str) -> None:
    check_packed(Case(batch_size=0), Packed([], [], extra=2), device, TILED)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_small_tiles(
    options: dict[str, object], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_problem, "_MAX_TILE_M", 7)
    monkeypatch.setattr(_problem, "_MAX_TILE_N", 16)
    check_packed(Case(batch_size=3, **options), LENGTHS["seqused"], device, TILED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_error_is_at_most_twice_plain_pytorch(dtype: torch.dtype, device: str) -> None:
    check_packed(
        Case(batch_size=3, head_dim=64, dtype=dtype, window=(-1, 0)), RAGGED, device, TILED
    )


@pytest.mark.parametrize("window", [(-1, 0), (4, 2)], ids=str)
def test_one_cu_seqlens_for_both(window: tuple[int, int], device: str) -> None:
    """Self attention: the same tensor twice tells that the diagonal starts at key 0."""
    case = Case(batch_size=3, window=window)
    seqlens = [17, 1, 40]
    q, k, v = (x.detach() for x in case.packed_inputs(58, 58, device))
    ends = cu_seqlens(seqlens, device)
    lengths = (ends, ends, None, None)
    out, lse, _ = op("varlen_fwd", "tiled")(
        q, k, v, *lengths, None, 40, 40, *case.options(device), False, 0, 0
    )
    starts = ends.tolist()
    ref = varlen_attention_reference(q, k, v, starts, starts, window_size=window)
    assert_equals(out, ref[0], 1e-10)
    assert_equals(lse, ref[1], 1e-10)


def test_dmask(device: str) -> None:
    case = Case(batch_size=3, dropout_p=0.4)
    q, k, v = (x.detach() for x in case.packed_inputs(58, 88, device))
    out, _, dmask = op("varlen_fwd", "tiled")(
        q, k, v, *RAGGED.tensors(device), None, 40, 60, *case.options(device), True, 0, 0
    )
    assert dmask.shape == (3, 4, 128, 128)
    begin_q, begin_k = 0, 0
    for batch, (seqlen_q, seqlen_k) in enumerate(
        zip(RAGGED.seqlens_q, RAGGED.seqlens_k, strict=True)
    ):
        inside = dmask[batch, :, :seqlen_q, :seqlen_k]
        assert_equals(inside.abs().sum(-1), torch.ones_like(inside[..., 0]), 1e-12)
        assert dmask[batch].count_nonzero() == inside.count_nonzero()
        assert not dmask[batch, :, seqlen_q:].signbit().any()
        kept = torch.where(inside.signbit(), 0.0, inside) * (256 / 154)
        v_heads = v[begin_k : begin_k + seqlen_k].repeat_interleave(2, 1)
        expected = torch.einsum("hij,jhd->ihd", kept, v_heads)
        assert_equals(out[begin_q : begin_q + seqlen_q], expected, 1e-10)
        begin_q, begin_k = begin_q + seqlen_q, begin_k + seqlen_k


@pytest.mark.parametrize("given", ["seqused_k", "cu_seqlens_k"])
@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize("options", [{}, {"window": (9, 0), "alibi": 2}], ids=["plain", "window"])
def test_pages(page_size: int, given: str, options: dict[str, object], device: str) -> None:
    """Keys in shuffled pages; page ids past the lengths are absurd and other slots are NaN."""
    case = Case(batch_size=3, **options)
    seqlens_k = RAGGED.seqlens_k
    q, k, v = (x.detach() for x in case.packed_inputs(58, 88, device))
    starts = cu_seqlens(seqlens_k).tolist()
    num_pages = [-(-s // page_size) for s in seqlens_k]
    pages = torch.randperm(sum(num_pages) + 4).tolist()
    table = torch.full((3, max(num_pages) + 1), -(10**6))
    k_pages = k.new_full((len(pages), page_size, *k.shape[1:]), torch.nan)
    v_pages = v.new_full((len(pages), page_size, *v.shape[1:]), torch.nan)
    for batch, begin in enumerate(starts[:-1]):
        for page in range(num_pages[batch]):
            table[batch, page] = pages.pop()
            rows = slice(
                begin + page * page_size, min(begin + (page + 1) * page_size, starts[batch + 1])
            )
            count = rows.stop - rows.start
            k_pages[table[batch, page], :count] = k[rows]
            v_pages[table[batch, page], :count] = v[rows]
    lengths = (
        cu_seqlens(RAGGED.seqlens_q, device),
        cu_seqlens(seqlens_k, device) if given == "cu_seqlens_k" else None,
        None,
        int32(seqlens_k, device) if given == "seqused_k" else None,
    )
    out, lse, _ = op("varlen_fwd", "tiled")(
        *(q, k_pages, v_pages, *lengths, int32(table.tolist(), device), 40, 60),
        *(*case.options(device), False, 0, 0),
    )
    expected = varlen_attention_reference(
        q, k, v, *RAGGED.reference_lengths()[0], **case.reference_options(device, 40, 60)
    )
    assert_equals(out, expected[0], 1e-10)
    assert_equals(lse, expected[1], 1e-10)


def test_out_keeps_its_strides(device: str) -> None:
    case = Case(batch_size=3)
    q, k, v = (x.detach() for x in case.packed_inputs(58, 88, device))
    arguments = (*RAGGED.tensors(device), None, 40, 60, *case.options(device), False, 0, 0)
    expected = op("varlen_fwd", "tiled")(q, k, v, *arguments)
    buffer = q.new_full((4, 58, 48), torch.nan).transpose(0, 1)
    lse, _ = op("varlen_fwd_out")(q, k, v, buffer[..., 24:], *arguments)
    assert torch.equal(buffer[..., 24:], expected[0])
    assert torch.equal(lse, expected[1])
    assert buffer[..., :24].isnan().all()
