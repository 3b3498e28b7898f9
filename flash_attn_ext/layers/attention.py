"""An attention layer to copy: projections, grouped heads, rotary positions, KV cache.

    >>> layer = FlashAttentionLayer(512, num_heads_q=8, num_heads_kv=2)
    >>> y = layer(x)  # training: x [batch, seqlen, 512]
    >>> y = layer(x, cu_seqlens=cu_seqlens, max_seqlen=n)  # packed: x [total, 512]
    >>> cache = layer.new_cache(batch_size=4, max_seqlen=1024)
    >>> y = layer(prompt, cache)  # the prompt's keys and values go into the cache
    >>> y = layer(token, cache)  # one token more

Three functions compute attention, and each has its branch in ``FlashAttentionLayer.forward``:
``flash_attn_func``, ``flash_attn_varlen_func`` and ``flash_attn_with_kvcache``. Tensors are
[batch, seqlen, heads, head_dim] or [total, heads, head_dim] throughout, so nothing is transposed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..attention import WindowSize, flash_attn_func, flash_attn_varlen_func
from ..kvcache import flash_attn_with_kvcache
from .rotary import RotaryEmbedding, apply_rotary_emb


@dataclass
class KVCache:
    """Keys and values that one layer has seen.

    Attributes:
        k: [batch, max_seqlen, num_heads_kv, head_dim], already rotated; with page_table
            [num_pages, page_size, num_heads_kv, head_dim].
        v: as k.
        seqlens: int32 [batch], tokens in the cache. The layer adds what it appends.
        page_table: int32 [batch, max_pages], the page of each page_size tokens; it may be shared by
            the layers of a model.
    """

    k: Tensor
    v: Tensor
    seqlens: Tensor
    page_table: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Tokens that a sequence may have."""
        return self.k.shape[1] * (1 if self.page_table is None else self.page_table.shape[1])


class FlashAttentionLayer(nn.Module):
    """Self-attention from hidden states to hidden states.

    The parameters are ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``, as Llama's are named.
    """

    def __init__(
        self,
        width: int,
        num_heads_q: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        *,
        causal: bool = True,
        window_size: WindowSize = (-1, -1),
        softcap: float = 0.0,
        softmax_scale: float | None = None,
        dropout_p: float = 0.0,
        rotary_dim: int | None = None,
        rotary_base: float = 10000.0,
        rotary_interleaved: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes the parameters.

        Args:
            width: elements of a token's vector, in and out.
            num_heads_q: query heads.
            num_heads_kv: key/value heads, a divisor of num_heads_q; default num_heads_q.
            head_dim: of q, k and v; default width / num_heads_q.
            causal: see flash_attn_func. A cache needs it.
            window_size: see flash_attn_func.
            softcap: see flash_attn_func.
            softmax_scale: see flash_attn_func.
            dropout_p: of attention weights, while training.
            rotary_dim: elements of a head that are rotated; default head_dim; 0: none.
            rotary_base: see RotaryEmbedding.
            rotary_interleaved: see apply_rotary_emb.
            bias: whether the projections have one.
            device: of the parameters.
            dtype: of the parameters.

        Raises:
            ValueError: numbers of heads or widths that do not divide.
        """
        super().__init__()
        num_heads_kv = num_heads_q if num_heads_kv is None else num_heads_kv
        if num_heads_q % num_heads_kv or (head_dim is None and width % num_heads_q):
            raise ValueError(
                _checks.message(
                    "width, num_heads_q, num_heads_kv",
                    (width, num_heads_q, num_heads_kv),
                    "each a multiple of the next",
                    "give head_dim if width is not one of num_heads_q",
                )
            )
        self.num_heads_q, self.num_heads_kv = num_heads_q, num_heads_kv
        self.head_dim = width // num_heads_q if head_dim is None else head_dim
        self.causal, self.dropout_p = causal, dropout_p
        self.options: dict[str, Any] = {
            "softmax_scale": softmax_scale,
            "causal": causal,
            "window_size": window_size,
            "softcap": softcap,
        }
        self.rotary_dim = self.head_dim if rotary_dim is None else rotary_dim
        self.rotary = RotaryEmbedding(self.rotary_dim, rotary_base, rotary_interleaved)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.q_proj = linear(width, num_heads_q * self.head_dim)
        self.k_proj = linear(width, num_heads_kv * self.head_dim)
        self.v_proj = linear(width, num_heads_kv * self.head_dim)
        self.o_proj = linear(num_heads_q * self.head_dim, width)

    def new_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        *,
        page_size: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """An empty cache for this layer.

        Args:
            batch_size: sequences.
            max_seqlen: the most tokens of a sequence.
            page_size: tokens of a page; default: no pages. The pages are dealt out in order here; a
                server deals them out as sequences come and go, and fills page_table itself.
            dtype: default that of the parameters.
        """
        weight = self.k_proj.weight
        rows, pages = (batch_size, max_seqlen), None
        if page_size is not None:
            max_pages = -(-max_seqlen // page_size)
            rows = (batch_size * max_pages, page_size)
            pages = torch.arange(rows[0], dtype=torch.int32, device=weight.device)
            pages = pages.view(batch_size, max_pages)
        k, v = (
            torch.zeros(
                *rows,
                self.num_heads_kv,
                self.head_dim,
                dtype=dtype or weight.dtype,
                device=weight.device,
            )
            for _ in range(2)
        )
        seqlens = torch.zeros(batch_size, dtype=torch.int32, device=weight.device)
        return KVCache(k, v, seqlens, pages)

    def forward(
        self,
        x: Tensor,
        cache: KVCache | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Attends over x; with a cache over what it holds and x, which is appended.

        Args:
            x: [batch, seqlen, width]; with cu_seqlens [total, width].
            cache: from new_cache; there is no gradient with one.
            cu_seqlens: int32 [batch + 1], ascending from 0: packed sequences.
            max_seqlen: the longest of them or more; needed with cu_seqlens.

        Returns:
            As x.

        Raises:
            ValueError: a cache without causal; or as the attention functions.
        """
        q = self.q_proj(x).unflatten(-1, (self.num_heads_q, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_heads_kv, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_heads_kv, self.head_dim))
        if cache is not None:
            out = self._attend_cached(q, k, v, cache, cu_seqlens, max_seqlen)
        else:
            if self.rotary_dim > 0:
                q, k = self._rotate(q, k, cu_seqlens, max_seqlen)
            out = self._attend(q, k, v, cu_seqlens, max_seqlen)
        projected: Tensor = self.o_proj(out.flatten(-2))
        return projected

    def _rotate(
        self, q: Tensor, k: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None
    ) -> tuple[Tensor, Tensor]:
        """Each sequence begins at position 0."""
        longest = q.shape[1] if cu_seqlens is None else _checks.max_seqlen("max_seqlen", max_seqlen)
        tables = self.rotary.cos_sin(longest, q.device, q.dtype)
        options: dict[str, Any] = {
            "interleaved": self.rotary.interleaved,
            "cu_seqlens": cu_seqlens,
            "max_seqlen": longest,
        }
        return apply_rotary_emb(q, *tables, **options), apply_rotary_emb(k, *tables, **options)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None
    ) -> Tensor:
        """Without a cache."""
        dropout_p = self.dropout_p if self.training else 0.0
        if cu_seqlens is None:
            out: Tensor = flash_attn_func(q, k, v, dropout_p, **self.options)
        else:
            ends = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
            out = flash_attn_varlen_func(q, k, v, *ends, dropout_p, **self.options)
        return out

    def _attend_cached(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: KVCache,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
    ) -> Tensor:
        """One call rotates q and k, appends k and v, and attends to all that is in the cache then.

        The causal mask is aligned to the bottom right: the last query sees every key. So it does
        not matter whether a prompt comes in one call or in several.
        """
        if not self.causal:
            raise ValueError(
                _checks.message(
                    "cache", "a KVCache", "None in a layer with causal=False", "leave it out"
                )
            )
        cos = sin = None
        if self.rotary_dim > 0:
            cos, sin = self.rotary.cos_sin(cache.capacity, q.device, q.dtype)
        out: Tensor = flash_attn_with_kvcache(
            q,
            cache.k,
            cache.v,
            k,
            v,
            rotary_cos=cos,
            rotary_sin=sin,
            cache_seqlens=cache.seqlens,
            rotary_interleaved=self.rotary.interleaved,
            page_table=cache.page_table,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k_new=cu_seqlens,
            max_seqlen_q=max_seqlen,
            **self.options,
        )
        cache.seqlens += q.shape[1] if cu_seqlens is None else cu_seqlens.diff()
        return out
