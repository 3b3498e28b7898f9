"""Rotary position embedding (RoPE) of queries and keys, arXiv:2104.09864.

The first ``rotary_dim`` elements of every head are rotated in pairs; row p of ``cos`` and ``sin``
holds the angles of position p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cache_checks, _checks, _schema
from .._value_checks import Ascending, Bounded, LengthTerms, check
from ..autograd import needs_grad, rotary
from ..backends import raise_refusal_behind
from ..errors import UnsupportedError

_rotary_ = _schema.op("rotary_")


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
) -> Tensor:
    """Rotates the first ``2 * cos.shape[1]`` elements of every head by the angles of its position.

    Args:
        x: [batch, seqlen, num_heads, head_dim]; with cu_seqlens [total, num_heads, head_dim].
        cos: [seqlen_ro, rotary_dim / 2] in x's dtype, rotary_dim <= head_dim.
        sin: as cos.
        interleaved: rotate the pairs (0, 1), (2, 3) ... (GPT-J); else (i, i + rotary_dim / 2)
            (GPT-NeoX, Llama).
        inplace: write the result into x.
        seqlen_offsets: position of the first token of each sequence: an int, or int32 [batch].
        cu_seqlens: int32 [batch + 1], ascending from 0: packed sequences of different lengths.
        max_seqlen: the longest sequence or more; needed with cu_seqlens.

    Returns:
        As x; with ``inplace`` x itself. Computed in fp32 (fp64 for fp64). Differentiable with
        respect to x.

    Raises:
        ValueError: inputs that contradict each other, or positions past the rows of cos.
        UnsupportedError: cos or sin require grad.
    """
    if cu_seqlens is None:
        _checks.layout("x", x, 4, "[batch, seqlen, num_heads, head_dim]")
        batch_size, longest = x.shape[:2]
    else:
        _checks.layout("x", x, 3, "[total, num_heads, head_dim] with cu_seqlens")
        _checks.cumulative("cu_seqlens", cu_seqlens, x)
        batch_size = cu_seqlens.shape[0] - 1
        longest = _checks.max_seqlen("max_seqlen", max_seqlen)
        if _checks.values_readable(cu_seqlens):
            packed = Ascending("cu_seqlens", cu_seqlens, x.shape[0], "max_seqlen", longest)
            check([packed], batch_size, x.device)
    _checks.floating("x", x)
    _cache_checks.rotary_tables(x, cos, sin, "x", prefix="")
    if needs_grad(cos, sin):
        raise UnsupportedError(
            _checks.message("cos", "a tensor that requires grad", "a constant", "detach() it")
        )
    if isinstance(seqlen_offsets, Tensor):
        _checks.per_sequence("seqlen_offsets", seqlen_offsets, batch_size, x)
        offsets = seqlen_offsets
        if _checks.values_readable(offsets):
            limit, text = LengthTerms(cos.shape[0] - longest), "rows of cos less max_seqlen"
            check([Bounded("seqlen_offsets", offsets, limit, text)], batch_size, x.device)
    else:
        # Rows that begin at the offset are a view: no tensor of equal offsets is made.
        cos, sin, offsets = cos[seqlen_offsets:], sin[seqlen_offsets:], None
    if cos.shape[0] < longest:
        raise ValueError(
            _checks.message("cos: rows", cos.shape[0], f"at least max_seqlen = {longest}")
        )

    arguments = (cos, sin, offsets, cu_seqlens, longest, interleaved, False)
    if not inplace:
        return rotary(_checks.last_dim_contiguous(x), *arguments)
    _checks.written_in_place("x", x)
    if needs_grad(x):
        return x.copy_(rotary(x, *arguments))
    try:
        _rotary_(x, *arguments, False)
    except RuntimeError as error:
        raise_refusal_behind(error)
        raise
    return x


apply_rotary_emb_func = apply_rotary_emb
"""Another word for apply_rotary_emb, as in flash-attn."""


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """apply_rotary_emb in the argument order of flash-attn's Triton function.

    ``conjugate`` rotates backwards, which is the gradient. The other arguments, the result and the
    errors are those of apply_rotary_emb.
    """
    return apply_rotary_emb(
        x,
        cos,
        -sin if conjugate else sin,
        interleaved,
        inplace,
        seqlen_offsets,
        cu_seqlens,
        max_seqlen,
    )


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotates the queries and keys in a packed tensor, in place.

    Args:
        qkv: [batch, seqlen, 3, num_heads, head_dim]; or, with num_heads_q,
            [batch, seqlen, num_heads_q + 2 * num_heads_kv, head_dim].
        cos: see apply_rotary_emb.
        sin: see apply_rotary_emb.
        cos_k: for the keys, if they are rotated by other tables than the queries.
        sin_k: as cos_k.
        interleaved: see apply_rotary_emb.
        seqlen_offsets: see apply_rotary_emb.
        num_heads_q: query heads of a 4-dimensional qkv.

    Returns:
        qkv. Differentiable.

    Raises:
        ValueError: as apply_rotary_emb; or one of cos_k and sin_k without the other.
    """
    _checks.packed("qkv", qkv, num_heads_q, False)
    if (cos_k is None) != (sin_k is None):
        raise ValueError(_checks.message("cos_k, sin_k", "one of them", "both or neither"))
    options = {"interleaved": interleaved, "inplace": True, "seqlen_offsets": seqlen_offsets}
    if num_heads_q is None:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
        both = qkv[:, :, :2].flatten(2, 3) if qkv.is_contiguous() else None  # a view then
    else:
        end = (qkv.shape[2] + num_heads_q) // 2
        q, k, both = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q:end], qkv[:, :, :end]
    if cos_k is None and both is not None:
        apply_rotary_emb(both, cos, sin, **options)  # type: ignore[arg-type]
        return qkv
    for x, cos_x, sin_x in ((q, cos, sin), (k, cos_k, sin_k)):
        tables = (cos if cos_x is None else cos_x, sin if sin_x is None else sin_x)
        apply_rotary_emb(x, *tables, **options)  # type: ignore[arg-type]
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotates the keys in a tensor of keys and values, in place.

    Args:
        kv: [batch, seqlen, 2, num_heads_kv, head_dim].
        cos: see apply_rotary_emb.
        sin: see apply_rotary_emb.
        interleaved: see apply_rotary_emb.
        seqlen_offsets: see apply_rotary_emb.

    Returns:
        kv. Differentiable.

    Raises:
        ValueError: as apply_rotary_emb.
    """
    _checks.kv_packed("kv", kv, varlen=False)
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv


class RotaryEmbedding(torch.nn.Module):
    """Rotary embedding with tables that grow with the longest sequence seen.

    With ``scale_base`` the length-extrapolating variant XPos, arXiv:2212.10554: queries are scaled
    by ``scale ** power`` and keys by its inverse, where power grows with the position.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes the frequencies; the tables are made at the first call.

        Args:
            dim: rotary_dim, even, at most head_dim.
            base: pair i turns by ``base ** (-2 i / dim)`` radians a position.
            interleaved: see apply_rotary_emb.
            scale_base: positions after which XPos' power grows by 1; None: no XPos.
            device: of the frequencies.
        """
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._frequencies(device), persistent=False)
        self._tables: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None

    def _frequencies(self, device: torch.device | str | None) -> Tensor:
        pairs = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return self.base ** (-pairs / self.dim)

    def _tables_for(
        self, seqlen: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Cos and sin [>= seqlen, dim / 2] of queries, and of keys with XPos."""
        tables = self._tables
        if tables is not None:
            cos = tables[0]
            if (cos.device, cos.dtype) == (device, dtype) and cos.shape[0] >= seqlen:
                if not (cos.is_inference() and torch.is_grad_enabled()):
                    return tables
        # In fp32 whatever type the module was cast to: positions are large numbers.
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = torch.outer(position, self._frequencies(device))
        cos, sin = angles.cos(), angles.sin()
        if self.scale_base is None:
            self._tables = (cos.to(dtype), sin.to(dtype), None, None)
            return self._tables
        pairs = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        power = (position - seqlen // 2) / self.scale_base
        scale = ((pairs + 0.4 * self.dim) / (1.4 * self.dim)) ** power[:, None]
        scaled = (cos * scale, sin * scale, cos / scale, sin / scale)
        self._tables = tuple(x.to(dtype) for x in scaled)  # type: ignore[assignment]
        assert self._tables is not None
        return self._tables

    def cos_sin(
        self, seqlen: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The tables of the positions from 0, for apply_rotary_emb and flash_attn_with_kvcache.

        Args:
            seqlen: positions.
            device: of the tables.
            dtype: of what they rotate.

        Returns:
            cos and sin, [at least seqlen, dim / 2], made anew only when they have to grow.
        """
        return self._tables_for(seqlen, device, dtype)[:2]

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates in place and returns what it was given.

        Args:
            qkv: as in apply_rotary_emb_qkv_; or, with kv, queries [batch, seqlen, num_heads_q,
                head_dim].
            kv: [batch, seqlen, 2, num_heads_kv, head_dim].
            seqlen_offset: position of the first token: an int, or int32 [batch].
            max_seqlen: the largest position plus one; needed with a tensor as seqlen_offset.
            num_heads_q: query heads of a 4-dimensional qkv.

        Returns:
            qkv, or (q, kv) if kv is given.

        Raises:
            ValueError: as apply_rotary_emb; or a tensor as seqlen_offset without max_seqlen.
        """
        if max_seqlen is None:
            if isinstance(seqlen_offset, Tensor):
                raise ValueError(
                    _checks.message("max_seqlen", None, "an int, because seqlen_offset is a tensor")
                )
            max_seqlen = qkv.shape[1] + seqlen_offset
        cos, sin, cos_k, sin_k = self._tables_for(max_seqlen, qkv.device, qkv.dtype)
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        tables = (cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
        return q, apply_rotary_emb_kv_(kv, *tables, self.interleaved, seqlen_offset)
