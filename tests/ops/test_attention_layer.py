"""The attention layer against the same weights in plain operations, in fp64; prompts in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import NEEDS_CUDA, assert_close_2x, assert_equals, cu_seqlens, randn, require
from torch import Tensor

from flash_attn_ext.layers.attention import FlashAttentionLayer, KVCache
from flash_attn_ext.layers.prefill import chunked_prefill
from flash_attn_ext.reference import attention_reference, rotary_reference

F64 = torch.float64
WIDTH = 48

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"num_heads_kv": 2, "head_dim": 16},
    "window": {"num_heads_kv": 1, "window_size": (3, 0)},
    "softcap": {"softcap": 5.0, "softmax_scale": 0.4},
    "interleaved": {"rotary_interleaved": True, "rotary_dim": 8, "rotary_base": 100.0},
    "no rotary": {"rotary_dim": 0, "bias": True},
}


@pytest.fixture(params=VARIANTS)
def layer(request: pytest.FixtureRequest, device: str) -> FlashAttentionLayer:
    options = {"device": device, "dtype": F64, **VARIANTS[request.param]}
    return FlashAttentionLayer(WIDTH, 4, **options)


def plain(layer: FlashAttentionLayer, x: Tensor, **options: Any) -> Tensor:
    """[batch, seqlen, width] through the projections and the definition of attention."""
    q = layer.q_proj(x).unflatten(-1, (layer.num_heads_q, layer.head_dim))
    k, v = (
        proj(x).unflatten(-1, (layer.num_heads_kv, layer.head_dim))
        for proj in (layer.k_proj, layer.v_proj)
    )
    if layer.rotary_dim:
        cos, sin = layer.rotary.cos_sin(x.shape[1], x.device, x.dtype)
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        q, k = (
            rotary_reference(t, cos, sin, positions, interleaved=layer.rotary.interleaved).to(
                x.dtype
            )
            for t in (q, k)
        )
    out = attention_reference(q, k, v, **{**layer.options, **options}).out
    return layer.o_proj(out.to(x.dtype).flatten(-2))


def test_training(layer: FlashAttentionLayer, device: str) -> None:
    """Results, and the gradients of the input and of every parameter."""
    x = randn(2, 9, WIDTH, device=device)
    out, expected = layer(x), plain(layer, x)
    assert_equals(out, expected, 1e-10)
    leaves = (x, *layer.parameters())
    weight = torch.randn_like(expected)
    ours = torch.autograd.grad((out * weight).sum(), leaves)
    exact = torch.autograd.grad((expected * weight).sum(), leaves)
    for gradient, other in zip(ours, exact, strict=True):
        assert_equals(gradient, other, 1e-9)


def test_packed(layer: FlashAttentionLayer, device: str) -> None:
    lengths = [4, 0, 7]
    x = randn(sum(lengths), WIDTH, device=device)
    out = layer(x, cu_seqlens=cu_seqlens(lengths, device), max_seqlen=7)
    parts = [plain(layer, part[None])[0] for part in x.split(lengths) if len(part)]
    assert_equals(out, torch.cat(parts), 1e-10)


def test_not_causal(device: str) -> None:
    layer = FlashAttentionLayer(WIDTH, 4, causal=False, device=device, dtype=F64)
    x = randn(2, 9, WIDTH, device=device)
    assert_equals(layer(x), plain(layer, x), 1e-10)
    with pytest.raises(ValueError, match="cache: got a KVCache, expected None in a layer with"):
        layer(x, layer.new_cache(2, 9))


def test_dropout_only_in_training(device: str) -> None:
    layer = FlashAttentionLayer(WIDTH, 4, dropout_p=0.5, device=device, dtype=F64)
    x = randn(1, 9, WIDTH, device=device)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert_equals(layer(x), plain(layer, x), 1e-10)


@pytest.mark.parametrize("page_size", [None, 4])
@torch.no_grad()
def test_generation(layer: FlashAttentionLayer, page_size: int | None, device: str) -> None:
    """A prompt, then token by token: what the layer says of the whole at once."""
    x = randn(2, 11, WIDTH, device=device)
    cache = layer.new_cache(2, 11, page_size=page_size)
    assert cache.capacity == (11 if page_size is None else -(-11 // page_size) * page_size)
    steps = [layer(x[:, :5], cache), *(layer(x[:, i : i + 1], cache) for i in range(5, 11))]
    assert_equals(torch.cat(steps, 1), plain(layer, x), 1e-10)
    assert cache.seqlens.tolist() == [11, 11]


def caches(layer: FlashAttentionLayer, batch_size: int, page_size: int | None) -> list[KVCache]:
    """Two of the same form, shuffled pages included."""
    pair = [layer.new_cache(batch_size, 20, page_size=page_size) for _ in range(2)]
    if page_size is not None:
        pages = pair[0].page_table
        assert pages is not None
        shuffled = pages.flatten()[torch.randperm(pages.numel())].view_as(pages)
        for cache in pair:
            cache.page_table = shuffled
    return pair


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("chunk_size", [1, 8, 100])
@torch.no_grad()
def test_prompt_in_pieces(
    layer: FlashAttentionLayer, chunk_size: int, page_size: int | None, device: str
) -> None:
    """Outputs and cache of one prefill, whatever the piece."""
    x = randn(2, 19, WIDTH, device=device)
    once, pieces = caches(layer, 2, page_size)
    expected = layer(x, once)
    sizes = []

    def forward(piece: Tensor) -> Tensor:
        sizes.append(piece.shape[1])
        return layer(piece, pieces)

    out = chunked_prefill(forward, x, chunk_size)
    assert max(sizes) == min(chunk_size, 19)
    assert sum(sizes) == 19
    assert_equals(out, expected, 1e-10)
    assert_equals(out, plain(layer, x), 1e-10)
    for name in ("k", "v", "seqlens"):
        assert_equals(getattr(pieces, name), getattr(once, name), 1e-10, name)
    again = layer.new_cache(2, 20)
    last = chunked_prefill(lambda piece: layer(piece, again), x, chunk_size, last_only=True)
    assert_equals(last, expected[:, -1], 1e-10)


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("chunk_size", [4, 100])
@torch.no_grad()
def test_prompts_of_different_lengths_in_pieces(
    layer: FlashAttentionLayer, chunk_size: int, page_size: int | None, device: str
) -> None:
    """On top of a cache that already holds something."""
    lengths = [6, 0, 13, 1]
    ends = cu_seqlens(lengths, device)
    x = randn(sum(lengths), WIDTH, device=device)
    once, pieces = caches(layer, 4, page_size)
    start = randn(4, 3, WIDTH, device=device)
    for cache in (once, pieces):
        layer(start, cache)
    expected = layer(x, once, cu_seqlens=ends, max_seqlen=13)
    out = chunked_prefill(
        lambda piece, **of_piece: layer(piece, pieces, **of_piece), x, chunk_size, cu_seqlens=ends
    )
    assert_equals(out, expected, 1e-10)
    for name in ("k", "v", "seqlens"):
        assert_equals(getattr(pieces, name), getattr(once, name), 1e-10, name)
    whole = [
        plain(layer, torch.cat([start[i], part])[None])[0, 3:]
        for i, part in enumerate(x.split(lengths))
    ]
    assert_equals(out, torch.cat(whole), 1e-10)

    again = layer.new_cache(4, 20)
    last = chunked_prefill(
        lambda piece, **of_piece: layer(piece, again, **of_piece),
        x,
        chunk_size,
        cu_seqlens=ends,
        last_only=True,
    )
    assert not last[1].any()  # of a sequence without tokens
    for i, part in enumerate(x.split(lengths)):
        if len(part):
            assert_equals(last[i], plain(layer, part[None])[0, -1], 1e-10)


def test_impossible_pieces(device: str) -> None:
    x = torch.zeros(5, 4, device=device)
    with pytest.raises(ValueError, match="chunk_size: got 0, expected at least 1"):
        chunked_prefill(lambda piece: piece, x[None], 0)
    for options in ({}, {"cu_seqlens": cu_seqlens([0, 0], device)}):
        empty = x[:0] if options else x[None, :0]
        with pytest.raises(ValueError, match="expected at least one token"):
            chunked_prefill(lambda piece, **of_piece: piece, empty, 4, **options)
    for lengths in ([4], [6, -1]):
        with pytest.raises(ValueError, match="ascending from 0 to"):
            chunked_prefill(
                lambda piece, **of_piece: piece, x, 4, cu_seqlens=cu_seqlens(lengths, device)
            )


def test_impossible_heads() -> None:
    for sizes in ((48, 5), (48, 4, 3)):
        with pytest.raises(ValueError, match="width, num_heads_q, num_heads_kv: got"):
            FlashAttentionLayer(*sizes)


@pytest.mark.parametrize("page_size", [None, 64])
@torch.no_grad()
def test_a_step_of_generation_in_a_cuda_graph(page_size: int | None) -> None:
    """The cache counts its tokens on the device: a captured step can be replayed."""
    require(NEEDS_CUDA)
    layer = FlashAttentionLayer(512, 8, 2, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 40, 512, device="cuda", dtype=torch.bfloat16)
    eager, captured = (layer.new_cache(2, 64, page_size=page_size) for _ in range(2))
    expected = [layer(x[:, :32], eager), *(layer(x[:, i : i + 1], eager) for i in range(32, 40))]
    layer(x[:, :32], captured)
    token = torch.empty_like(x[:, :1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(token, captured)
    for i in range(32, 40):
        token.copy_(x[:, i : i + 1])
        graph.replay()
        assert torch.equal(out, expected[i - 31])
    assert captured.seqlens.tolist() == [40, 40]
    for name in ("k", "v"):
        assert torch.equal(getattr(captured, name), getattr(eager, name))


@pytest.mark.parametrize("page_size", [None, 64])
@pytest.mark.parametrize("options", [{}, {"window_size": (300, 0)}, {"softcap": 20.0}])
@torch.no_grad()
def test_pieces_on_the_gpu(page_size: int | None, options: dict[str, Any]) -> None:
    """bf16, sizes of a model: no larger an error than plain operations have."""
    require(NEEDS_CUDA)
    exact = FlashAttentionLayer(1024, 8, 2, device="cuda", dtype=F64, **options)
    layer = FlashAttentionLayer(1024, 8, 2, device="cuda", dtype=torch.bfloat16, **options)
    layer.load_state_dict(exact.state_dict())
    exact.load_state_dict(layer.state_dict())  # the same, rounded, weights
    x = torch.randn(2, 1500, 1024, device="cuda", dtype=torch.bfloat16)
    expected = plain(exact, x.double())
    same_dtype = plain(layer, x, upcast=False)
    cache = layer.new_cache(2, 1600, page_size=page_size)
    out = chunked_prefill(lambda piece: layer(piece, cache), x, 400)
    assert_close_2x(out, expected, same_dtype)
    assert_close_2x(layer(x), expected, same_dtype, name="training forward")
