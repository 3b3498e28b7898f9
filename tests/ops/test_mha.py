"""The attention modules against the same weights in plain operations, in fp64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_equals, cu_seqlens, int32, randn
from torch import Tensor

import flash_attn_ext as fa
from flash_attn_ext.layers.mha import (
    MHA,
    FlashCrossAttention,
    FlashSelfAttention,
    get_alibi_slopes,
)
from flash_attn_ext.reference import attention_reference, rotary_reference

F64 = torch.float64


def make(device: str, **options: Any) -> MHA:
    return MHA(48, 4, **{"device": device, "dtype": F64, "use_flash_attn": True, **options})


def projected(layer: MHA, x: Tensor, x_kv: Tensor | None = None) -> tuple[Tensor, ...]:
    """q, k, v [batch, seqlen, heads, head_dim] from the layer's weights."""
    heads = [layer.num_heads, layer.num_heads_kv, layer.num_heads_kv]
    if layer.cross_attn:
        q = layer.Wq(x).unflatten(-1, (heads[0], layer.head_dim))
        kv = layer.Wkv(x if x_kv is None else x_kv)
        return q, *kv.unflatten(-1, (2 * heads[1], layer.head_dim)).split(heads[1:], -2)
    return layer.Wqkv(x).unflatten(-1, (sum(heads), layer.head_dim)).split(heads, -2)


def plain(layer: MHA, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax of all scores, and the last projection; ``mask`` [batch, 1, sq, sk], True = seen."""
    group = layer.num_heads // layer.num_heads_kv
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * layer.head_dim**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    return layer.out_proj(out.flatten(2))


def causal(seqlen_q: int, seqlen_k: int, device: str) -> Tensor:
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    return mask.tril(seqlen_k - seqlen_q)[None, None]


def assert_same(layer: MHA, out: Tensor, expected: Tensor, x: Tensor) -> None:
    """Results, and the gradients of the input and of every parameter that takes part."""
    assert_equals(out, expected, 1e-10)
    leaves = (x, *layer.parameters())
    weight = torch.randn_like(expected)
    ours = torch.autograd.grad((out * weight).sum(), leaves)
    exact = torch.autograd.grad((expected * weight).sum(), leaves)
    for gradient, other in zip(ours, exact, strict=True):
        assert_equals(gradient, other, 1e-9)


@pytest.mark.parametrize("num_heads_kv", [None, 2, 1])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_self_attention(
    num_heads_kv: int | None, is_causal: bool, checkpointing: bool, device: str
) -> None:
    layer = make(device, num_heads_kv=num_heads_kv, causal=is_causal, checkpointing=checkpointing)
    x = randn(2, 9, 48, device=device)
    mask = causal(9, 9, device) if is_causal else None
    assert_same(layer, layer(x), plain(layer, *projected(layer, x), mask), x)


def test_cross_attention(device: str) -> None:
    layer = make(device, cross_attn=True, num_heads_kv=2, return_residual=True)
    x, x_kv = randn(2, 5, 48, device=device), randn(2, 9, 48, device=device)
    out, residual = layer(x, x_kv)
    assert residual is x
    assert_same(layer, out, plain(layer, *projected(layer, x, x_kv)), x)
    first = layer(x, x_kv, mixer_subset=slice(0, 1))[0]
    assert_equals(first, out[:, :1], 1e-10)
    assert_equals(layer(x)[0], layer(x, x)[0], 1e-10)


@pytest.mark.parametrize("num_heads_kv", [4, 2])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(num_heads_kv: int, interleaved: bool, device: str) -> None:
    layer = make(
        device,
        num_heads_kv=num_heads_kv,
        causal=True,
        rotary_emb_dim=8,
        rotary_emb_base=100.0,
        rotary_emb_interleaved=interleaved,
    )
    x = randn(2, 9, 48, device=device)
    out = layer(x)
    cos, sin = layer.rotary_emb._tables[:2]
    positions = torch.arange(9, device=device).expand(2, 9)
    q, k, v = projected(layer, x)
    q, k = (rotary_reference(t, cos, sin, positions, interleaved=interleaved) for t in (q, k))
    assert_same(layer, out, plain(layer, q, k, v, causal(9, 9, device)), x)


def test_packed(device: str) -> None:
    lengths = [4, 0, 7]
    layer = make(device, causal=True)
    x = randn(sum(lengths), 48, device=device)
    out = layer(x, cu_seqlens=cu_seqlens(lengths, device), max_seqlen=7)
    parts = [
        plain(layer, *projected(layer, part[None]), causal(len(part), len(part), device))[0]
        for part in x.split(lengths)
        if len(part)
    ]
    assert_same(layer, out, torch.cat(parts), x)


def test_packed_cross_attention(device: str) -> None:
    lengths, lengths_k = [4, 3], [2, 6]
    layer = make(device, cross_attn=True)
    x, x_kv = randn(7, 48, device=device), randn(8, 48, device=device)
    options = {"cu_seqlens": cu_seqlens(lengths, device), "max_seqlen": 4}
    of_keys = {"cu_seqlens_k": cu_seqlens(lengths_k, device), "max_seqlen_k": 6}
    out = layer(x, x_kv, **options, **of_keys)
    pairs = zip(x.split(lengths), x_kv.split(lengths_k), strict=True)
    parts = [plain(layer, *projected(layer, a[None], b[None]))[0] for a, b in pairs]
    assert_same(layer, out, torch.cat(parts), x)
    with pytest.raises(ValueError, match="cu_seqlens_k: got None"):
        layer(x, x_kv, **options)


@pytest.mark.parametrize("num_heads_kv", [4, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_padded(num_heads_kv: int, is_causal: bool, device: str) -> None:
    layer = make(device, num_heads_kv=num_heads_kv, causal=is_causal)
    x = randn(2, 9, 48, device=device)
    keep = torch.rand(2, 9, device=device) < 0.6
    keep[:, 0] = True  # no row without a key
    mask = keep[:, None, None, :]
    if is_causal:
        mask = mask & causal(9, 9, device)
    expected = plain(layer, *projected(layer, x), mask)
    assert_same(layer, layer(x, key_padding_mask=keep), expected, x)


def test_window_alibi_and_dropout(device: str) -> None:
    layer = make(device, causal=True, window_size=(3, 0), use_alibi=True, dropout=0.5)
    x = randn(2, 9, 48, device=device)
    layer.eval()
    q, k, v = projected(layer, x)
    slopes = torch.tensor(get_alibi_slopes(4), device=device)
    options = {"causal": True, "window_size": (3, 0), "alibi_slopes": slopes}
    expected = layer.out_proj(attention_reference(q, k, v, **options)[0].flatten(2))
    assert_same(layer, layer(x), expected, x)
    layer.train()
    assert (layer(x) - expected).abs().max() > 0.01
    assert "alibi_slopes" not in str(list(layer.state_dict()))
    with pytest.raises(fa.UnsupportedError, match="key_padding_mask: got a tensor"):
        layer(x, key_padding_mask=torch.ones(2, 9, dtype=torch.bool, device=device))


@pytest.mark.parametrize("num_heads_kv", [4, 2])
@pytest.mark.parametrize("lengths", [None, [5, 3]])
def test_generation(num_heads_kv: int, lengths: list[int] | None, device: str) -> None:
    """Prompt, then token by token, equals everything at once."""
    layer = make(device, num_heads_kv=num_heads_kv, causal=True, rotary_emb_dim=12, layer_idx=3)
    x = randn(2, 9, 48, device=device).detach()
    state = SimpleNamespace(
        key_value_memory_dict={}, max_batch_size=4, max_seqlen=16, seqlen_offset=0,
        batch_size_offset=1, lengths_per_sample=None,
    )  # fmt: skip
    with torch.no_grad():
        prompt = layer(x[:, :5], inference_params=state)
        assert_equals(prompt, layer(x)[:, :5], 1e-10)
        assert state.key_value_memory_dict[3].shape == (4, 16, 2, num_heads_kv, 12)
        if lengths is None:
            for state.seqlen_offset in range(5, 9):
                step = layer(x[:, state.seqlen_offset][:, None], inference_params=state)
                expected = layer(x)[:, state.seqlen_offset]
                assert_equals(step[:, 0], expected, 1e-10)
            return
        # Sequences of different lengths: the second goes on after its third token.
        state.lengths_per_sample = int32(lengths, device)
        step = layer(x[:, 5:6], inference_params=state)[:, 0]
        for row, length in enumerate(lengths):
            alone = torch.cat([x[row, :length], x[row, 5:6]])[None]
            assert_equals(step[row], layer(alone)[0, -1], 1e-10)


def test_inner_modules(device: str) -> None:
    qkv = randn(2, 9, 3, 4, 16, device=device)
    q, k, v = qkv.unbind(2)
    inner, cross = FlashSelfAttention(causal=True), FlashCrossAttention(softmax_scale=0.5)
    assert_equals(inner(qkv), attention_reference(q, k, v, causal=True)[0], 1e-10)
    assert_equals(inner(qkv, causal=False), attention_reference(q, k, v)[0], 1e-10)
    expected = attention_reference(q, k, v, softmax_scale=0.5, causal=True)[0]
    assert_equals(cross(q, qkv[:, :, 1:], causal=True), expected, 1e-10)


@pytest.mark.parametrize("nheads", [1, 2, 8, 12, 20])
def test_alibi_slopes(nheads: int) -> None:
    slopes = get_alibi_slopes(nheads)
    assert len(slopes) == nheads
    if nheads == 8:
        assert slopes == [2.0**-i for i in range(1, 9)]
    if nheads == 12:
        assert slopes[8:] == [2.0 ** -(i + 0.5) for i in range(4)]
    assert len(set(slopes)) == nheads


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"dwconv": True}, fa.UnsupportedError, "dwconv: got True"),
        ({"num_heads_kv": 3}, ValueError, "each a multiple of the next"),
        ({"cross_attn": True, "rotary_emb_dim": 8}, ValueError, "rotary_emb_dim: got 8"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make("cpu", **options)


def test_bad_calls() -> None:
    layer = make("cpu", rotary_emb_dim=12)
    x = randn(2, 9, 48)
    lengths = {"cu_seqlens": cu_seqlens([9, 9]), "max_seqlen": 9}
    with pytest.raises(ValueError, match="cu_seqlens: got a tensor"):
        layer(x.flatten(0, 1), **lengths)
    with pytest.raises(ValueError, match="without cross_attn"):
        make("cpu", num_heads_kv=2)(x, x)
    state = SimpleNamespace(key_value_memory_dict={}, max_seqlen=16, seqlen_offset=0)
    with pytest.raises(ValueError, match="layer_idx: got None"):
        layer(x, inference_params=state)
