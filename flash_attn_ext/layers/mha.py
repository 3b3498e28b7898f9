"""Multi-head attention as modules, with flash-attn's constructor arguments and parameter names.

A checkpoint of flash-attn's ``modules.mha.MHA`` loads into `MHA`, whose state is ``Wqkv`` (or
``Wq`` and ``Wkv``) and ``out_proj``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..attention import (
    WindowSize,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from ..errors import UnsupportedError
from ..kvcache import flash_attn_with_kvcache
from .rotary import RotaryEmbedding


def get_alibi_slopes(nheads: int) -> list[float]:
    """The slopes of ALiBi, arXiv:2108.12409.

    Args:
        nheads: number of heads. For a power of two, the geometric sequence from 2^(-8 / nheads)
            with that ratio; else the sequence of the power below, then every second element of the
            one above.

    Returns:
        nheads slopes, for ``alibi_slopes`` of the attention functions.
    """

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]

    below = 1 << (nheads.bit_length() - 1)
    return geometric(below) + geometric(2 * below)[::2][: nheads - below]


class _InnerAttention(nn.Module):
    """What the modules without parameters share: the options, and dropout while training."""

    alibi_slopes: Tensor | None

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: WindowSize = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        """Keeps the options of flash_attn_func under their names there.

        Args:
            causal: see flash_attn_func.
            softmax_scale: see flash_attn_func.
            attention_dropout: dropout_p, used while training.
            window_size: see flash_attn_func.
            alibi_slopes: see flash_attn_func.
            deterministic: see flash_attn_func.
        """
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic

    def _options(self, causal: bool | None) -> dict[str, Any]:
        slopes = self.alibi_slopes
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            # A module-wide .half() converts buffers too.
            "alibi_slopes": None if slopes is None else slopes.float(),
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_InnerAttention):
    """Attention of packed queries, keys and values; no parameters."""

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """See flash_attn_qkvpacked_func and, with cu_seqlens, flash_attn_varlen_qkvpacked_func.

        Args:
            qkv: [batch, seqlen, 3, num_heads, head_dim]; with cu_seqlens
                [total, 3, num_heads, head_dim].
            causal: in place of the module's.
            cu_seqlens: int32 [batch + 1].
            max_seqlen: the longest sequence or more; needed with cu_seqlens.

        Returns:
            [batch, seqlen, num_heads, head_dim], or [total, num_heads, head_dim].
        """
        if cu_seqlens is None:
            out: Tensor = flash_attn_qkvpacked_func(qkv, **self._options(causal))
        else:
            longest = _checks.max_seqlen("max_seqlen", max_seqlen)
            out = flash_attn_varlen_qkvpacked_func(
                qkv, cu_seqlens, longest, **self._options(causal)
            )
        return out


class FlashCrossAttention(_InnerAttention):
    """Attention of queries to packed keys and values; no parameters."""

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """See flash_attn_kvpacked_func and, with cu_seqlens, flash_attn_varlen_kvpacked_func.

        Args:
            q: [batch, seqlen_q, num_heads_q, head_dim]; with cu_seqlens
                [total_q, num_heads_q, head_dim].
            kv: [batch, seqlen_k, 2, num_heads_kv, head_dim]; with cu_seqlens_k
                [total_k, 2, num_heads_kv, head_dim].
            causal: in place of the module's.
            cu_seqlens: int32 [batch + 1], of the queries.
            max_seqlen: the longest query sequence or more.
            cu_seqlens_k: int32 [batch + 1], of the keys.
            max_seqlen_k: the longest key sequence or more.

        Returns:
            As q.

        Raises:
            ValueError: lengths of queries without those of keys.
        """
        options = self._options(causal)
        if cu_seqlens is None:
            out: Tensor = flash_attn_kvpacked_func(q, kv, **options)
            return out
        if cu_seqlens_k is None:
            raise ValueError(_checks.message("cu_seqlens_k", None, "a tensor, as cu_seqlens"))
        longest = _checks.max_seqlen("max_seqlen", max_seqlen)
        longest_k = _checks.max_seqlen("max_seqlen_k", max_seqlen_k)
        out = flash_attn_varlen_kvpacked_func(
            q, kv, cu_seqlens, cu_seqlens_k, longest, longest_k, **options
        )
        return out


class MHA(nn.Module):
    """Projection to queries, keys and values, attention, and projection of the result."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: WindowSize = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes the parameters.

        Args:
            embed_dim: width of the input and of the result; head_dim is embed_dim / num_heads.
            num_heads: query heads.
            num_heads_kv: key/value heads; default num_heads.
            cross_attn: queries from ``x``, keys and values from ``x_kv``.
            qkv_proj_bias: bias of the first projections.
            out_proj_bias: bias of the last one.
            dropout: of attention weights, while training.
            softmax_scale: see flash_attn_func.
            causal: see flash_attn_func.
            layer_idx: key of this layer's cache in ``inference_params``.
            dwconv: must be False.
            rotary_emb_dim: see RotaryEmbedding; 0: none. Not with cross_attn.
            rotary_emb_base: see RotaryEmbedding.
            rotary_emb_scale_base: see RotaryEmbedding.
            rotary_emb_interleaved: see RotaryEmbedding.
            use_alibi: with the slopes of get_alibi_slopes.
            window_size: see flash_attn_func.
            fused_bias_fc: accepted for flash-attn's callers; the result is the same.
            use_flash_attn: accepted for flash-attn's callers; always so here.
            return_residual: ``forward`` returns its input too.
            checkpointing: compute attention again in the backward, instead of keeping its inputs'
                intermediate results.
            device: of the parameters.
            dtype: of the parameters.

        Raises:
            UnsupportedError: dwconv.
            ValueError: numbers of heads that do not divide, or rotary embedding of cross attention.
        """
        super().__init__()
        if dwconv:
            raise UnsupportedError("dwconv: got True, expected False; convolve before the module")
        num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if embed_dim % num_heads or num_heads % num_heads_kv:
            raise ValueError(
                _checks.message(
                    "embed_dim, num_heads, num_heads_kv",
                    (embed_dim, num_heads, num_heads_kv),
                    "each a multiple of the next",
                )
            )
        if cross_attn and rotary_emb_dim > 0:
            raise ValueError(
                _checks.message("rotary_emb_dim", rotary_emb_dim, "0 because cross_attn is True")
            )
        self.embed_dim, self.num_heads, self.num_heads_kv = embed_dim, num_heads, num_heads_kv
        self.head_dim = embed_dim // num_heads
        self.cross_attn = cross_attn
        self.causal = causal
        self.layer_idx = layer_idx
        self.rotary_emb_dim = rotary_emb_dim
        self.return_residual = return_residual
        self.checkpointing = checkpointing
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        kv_dim = 2 * self.head_dim * num_heads_kv
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **new)
            self.Wkv = nn.Linear(embed_dim, kv_dim, bias=qkv_proj_bias, **new)
        else:
            self.Wqkv = nn.Linear(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **new)
        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim,
                rotary_emb_base,
                rotary_emb_interleaved,
                rotary_emb_scale_base,
                device,
            )
        slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
        options = (causal, softmax_scale, dropout, window_size, slopes)
        self.inner_attn = FlashSelfAttention(*options)
        self.inner_cross_attn = FlashCrossAttention(*options)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **new)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """An empty cache, [batch, max_seqlen, 2, num_heads_kv, head_dim]."""
        weight = self.out_proj.weight
        sizes = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return torch.empty(sizes, dtype=dtype or weight.dtype, device=weight.device)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: Any = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The layer's result for x.

        Args:
            x: [batch, seqlen, embed_dim]; with cu_seqlens [total, embed_dim].
            x_kv: [batch, seqlen_k, embed_dim], for cross attention; default x.
            key_padding_mask: bool [batch, seqlen_k], True = valid key. Computed by torch's SDPA
                with a mask; pack the sequences (bert_padding) to have it fast.
            cu_seqlens: int32 [batch + 1]: x is packed. Not with rotary embedding.
            max_seqlen: the longest sequence or more; needed with cu_seqlens.
            mixer_subset: index of the positions that ask, for cross attention; default all.
            inference_params: an object with ``key_value_memory_dict`` (layer_idx -> cache, made
                here if missing), ``max_batch_size``, ``max_seqlen``, ``seqlen_offset`` and, if
                sequences differ, ``lengths_per_sample`` (int32 [batch]): keys and values are
                appended to the cache and attended to.
            kwargs: to the attention module: ``causal``; for packed cross attention ``cu_seqlens_k``
                and ``max_seqlen_k``.

        Returns:
            As x; (result, x) with return_residual.

        Raises:
            ValueError: arguments that exclude each other.
            UnsupportedError: as flash_attn_func; key_padding_mask with a window, ALiBi or a cache.
        """
        if cu_seqlens is not None:
            kwargs |= {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
            if self.rotary_emb_dim > 0 or key_padding_mask is not None or inference_params:
                raise ValueError(
                    _checks.message(
                        "cu_seqlens",
                        "a tensor",
                        "None with rotary_emb_dim, key_padding_mask or inference_params",
                    )
                )
        is_packable = not self.cross_attn and self.num_heads_kv == self.num_heads
        offset = _offset(inference_params)
        if is_packable and key_padding_mask is None and inference_params is None:
            qkv = self.Wqkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
            if self.rotary_emb_dim > 0:
                qkv = self.rotary_emb(qkv)
            context = self._run(self.inner_attn, qkv, **kwargs)
        else:
            q, kv = self._project(x, x_kv, mixer_subset)
            if self.rotary_emb_dim > 0:
                limit = None if inference_params is None else inference_params.max_seqlen
                q, kv = self.rotary_emb(q, kv, offset, max_seqlen=limit)
            if inference_params is not None:
                context = self._with_cache(q, kv, inference_params, offset)
            elif key_padding_mask is not None:
                context = self._masked(q, kv, key_padding_mask, kwargs.get("causal"))
            else:
                context = self._run(self.inner_cross_attn, q, kv, **kwargs)
        out: Tensor = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _project(self, x: Tensor, x_kv: Tensor | None, subset: Any) -> tuple[Tensor, Tensor]:
        if self.cross_attn:
            q = self.Wq(x if subset is None else x[:, subset])
            kv = self.Wkv(x if x_kv is None else x_kv)
        else:
            if x_kv is not None or subset is not None:
                raise ValueError(
                    _checks.message("x_kv, mixer_subset", "a value", "None without cross_attn")
                )
            qkv = self.Wqkv(x)  # slices, because views of split cannot be rotated in place
            q, kv = qkv[..., : self.embed_dim], qkv[..., self.embed_dim :]
        return (
            q.unflatten(-1, (self.num_heads, self.head_dim)),
            kv.unflatten(-1, (2, self.num_heads_kv, self.head_dim)),
        )

    def _run(self, attention: nn.Module, *tensors: Tensor, **kwargs: Any) -> Tensor:
        if self.checkpointing:
            result: Tensor = torch.utils.checkpoint.checkpoint(
                attention, *tensors, use_reentrant=False, **kwargs
            )
            return result
        context: Tensor = attention(*tensors, **kwargs)
        return context

    def _with_cache(
        self, q: Tensor, kv: Tensor, inference_params: Any, offset: int | Tensor
    ) -> Tensor:
        if self.layer_idx is None:
            raise ValueError(_checks.message("layer_idx", None, "an int with inference_params"))
        caches = inference_params.key_value_memory_dict
        if self.layer_idx not in caches:
            caches[self.layer_idx] = self.allocate_inference_cache(
                inference_params.max_batch_size, inference_params.max_seqlen, kv.dtype
            )
        first = getattr(inference_params, "batch_size_offset", 0)
        cache = caches[self.layer_idx][first : first + q.shape[0]]
        inner = self.inner_cross_attn
        slopes = inner.alibi_slopes
        context: Tensor = flash_attn_with_kvcache(
            q,
            cache[:, :, 0],
            cache[:, :, 1],
            kv[:, :, 0],
            kv[:, :, 1],
            cache_seqlens=offset,
            softmax_scale=inner.softmax_scale,
            causal=inner.causal,
            window_size=inner.window_size,
            alibi_slopes=None if slopes is None else slopes.float(),
        )
        return context

    def _masked(self, q: Tensor, kv: Tensor, keep: Tensor, causal: bool | None) -> Tensor:
        """Every query sees the keys that ``keep`` leaves; causal as everywhere, bottom-right."""
        inner = self.inner_cross_attn
        left, right = _checks.window(False, inner.window_size)
        if inner.alibi_slopes is not None or left >= 0 or right >= 0:
            raise UnsupportedError(
                "key_padding_mask: got a tensor, expected None with a window or ALiBi; pack the "
                "sequences (flash_attn_ext.bert_padding) and give cu_seqlens"
            )
        mask = keep[:, None, None, :]
        if inner.causal if causal is None else causal:
            seen = torch.ones(q.shape[1], kv.shape[1], dtype=torch.bool, device=q.device)
            mask = mask & seen.tril(kv.shape[1] - q.shape[1])
        k, v = kv.unbind(2)
        out = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            dropout_p=inner.drop.p if self.training else 0.0,
            scale=inner.softmax_scale or 1.0 / math.sqrt(self.head_dim),
            enable_gqa=self.num_heads != self.num_heads_kv,
        )
        return out.transpose(1, 2)


def _offset(inference_params: Any) -> int | Tensor:
    """How many keys the cache holds: one number, or one for each sequence."""
    if inference_params is None:
        return 0
    lengths = getattr(inference_params, "lengths_per_sample", None)
    offset: int | Tensor = inference_params.seqlen_offset if lengths is None else lengths
    return offset
