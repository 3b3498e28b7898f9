"""How much GPU memory attention takes, and how long a sequence fits; neither needs the GPU.

    >>> shape = AttentionShape(num_heads_q=32, num_heads_kv=8, head_dim=128, width=4096)
    >>> print(estimate_memory(shape, batch_size=1, seqlen=32768, arch="h100"))
    >>> max_seqlen(shape, batch_size=1, memory_bytes=80 * 10**9, arch="h100")

Counted is every tensor of the training step (or forward) of `flash_attn_func`, or with ``width`` of
a stack of `FlashAttentionLayer`: parameters and their gradients, input and output with their
gradients, what the forward keeps, and what the backward allocates, in the order in which they come
and go; the kernels' workspace is that of the plan which runs. Not counted: the CUDA context, the
workspace that torch keeps for cuBLAS (8 MB; 32 MB on SM90), the rest of the model, optimizer
states, and what torch's allocator rounds up or has fragmented.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from . import _checks, plans
from .errors import UnsupportedError

_BLOCK_BYTES = 512  # torch's allocator hands out multiples of it
_FLOAT_BYTES = 4
_ROW_ELEMENTS = 8  # 16 bytes of 16-bit elements: the kernels want rows of whole ones
_LONGEST = 1 << 24


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """What does not depend on the batch.

    Attributes:
        num_heads_q: query heads.
        num_heads_kv: key/value heads.
        head_dim: of q, k and v.
        width: of the hidden states of FlashAttentionLayer; None: attention alone, whose inputs
            q, k and v count as given.
        num_layers: layers on top of each other; 1 without width.
        rotary_dim: see FlashAttentionLayer; None: head_dim.
        dtype: of everything.
    """

    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    width: int | None = None
    num_layers: int = 1
    rotary_dim: int | None = None
    dtype: torch.dtype = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the moment when most is allocated.

    Attributes:
        peak_bytes: all of them.
        parts: what they are, largest first.
        kept_bytes: what is allocated between forward and backward.
    """

    peak_bytes: int
    parts: dict[str, int]
    kept_bytes: int

    def __str__(self) -> str:
        """A line for each part."""
        lines = [f"{size / 2**20:10.1f} MiB  {name}" for name, size in self.parts.items()]
        return "\n".join([*lines, f"{self.peak_bytes / 2**20:10.1f} MiB  at the peak"])


class _Ledger:
    """What is allocated now, and what was when most was."""

    def __init__(self) -> None:
        self.live: dict[str, int] = {}
        self.peak: dict[str, int] = {}

    def add(self, name: str, *sizes: int) -> None:
        """Allocates tensors of these bytes under one name."""
        rounded = sum(-(-size // _BLOCK_BYTES) * _BLOCK_BYTES for size in sizes)
        self.live[name] = self.live.get(name, 0) + rounded
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = dict(self.live)

    def drop(self, name: str, *sizes: int) -> None:
        """Frees what `add` allocated."""
        self.live[name] -= sum(-(-size // _BLOCK_BYTES) * _BLOCK_BYTES for size in sizes)

    def estimate(self, kept_bytes: int) -> MemoryEstimate:
        parts = sorted(self.peak.items(), key=lambda part: -part[1])
        return MemoryEstimate(
            sum(self.peak.values()), {name: size for name, size in parts if size}, kept_bytes
        )


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Bytes of the tensors of one layer."""

    q: int  # also out, and the gradients of both
    k: int  # also v
    lse: int  # also delta
    padded_q: int  # 0 unless rows have to be copied into whole 16 bytes
    padded_k: int
    workspace: int  # of the backward
    x: int = 0
    weight_q: int = 0  # also that of the output
    weight_k: int = 0
    table: int = 0  # cos or sin

    @property
    def qkv(self) -> tuple[int, int, int]:
        return self.q, self.k, self.k

    @property
    def weights(self) -> tuple[int, ...]:
        return self.weight_q, self.weight_k, self.weight_k, self.weight_q


def _workspace(
    shape: AttentionShape,
    batch_size: int,
    seqlen: int,
    varlen: bool,
    deterministic: bool,
    arch: str | None,
) -> int:
    """Bytes of the backward's workspace, as planned; refuses what no kernel computes."""
    plans.introspect()  # says what to do if plans cannot be asked for
    rows = (batch_size * seqlen,) if varlen else (batch_size, seqlen)
    k = (*rows, shape.num_heads_kv, shape.head_dim)
    shape_q = (*rows, shape.num_heads_q, shape.head_dim)
    q: Tensor | tuple[int, ...] = shape_q
    if arch is None:
        # One element shown as a tensor of the right shape: it says where, and takes no memory.
        q = torch.empty((), dtype=shape.dtype, device="cuda").expand(shape_q)
    lengths: dict[str, Any] = {}
    if varlen:
        ends = list(range(0, batch_size * seqlen + 1, seqlen))
        lengths = {
            "cu_seqlens_q": ends,
            "cu_seqlens_k": ends,
            "max_seqlen_q": seqlen,
            "max_seqlen_k": seqlen,
        }
    explanation = plans.explain(
        q,
        k,
        k,
        arch=arch,
        dtype=shape.dtype,
        backward=True,
        causal=True,
        deterministic=deterministic,
        **lengths,
    )
    step = next(step for step in explanation.steps if step.family == "bwd")
    if step.backend != plans.KERNEL or step.workspace_bytes is None:
        raise UnsupportedError(
            f"estimate_memory: no kernel computes this on {explanation.device}, and the memory of "
            f"PyTorch operations is not modelled: {'; '.join(step.reasons)}",
            step.reasons,
        )
    return step.workspace_bytes


def _sizes(shape: AttentionShape, batch_size: int, seqlen: int, workspace: int) -> _Sizes:
    tokens, element = batch_size * seqlen, shape.dtype.itemsize
    padded_dim = -(-shape.head_dim // _ROW_ELEMENTS) * _ROW_ELEMENTS
    is_padded = padded_dim != shape.head_dim
    of_head, of_padded = tokens * shape.head_dim * element, tokens * padded_dim * element
    heads_q, heads_kv = shape.num_heads_q, shape.num_heads_kv
    width = shape.width or 0
    rotary_dim = shape.head_dim if shape.rotary_dim is None else shape.rotary_dim
    return _Sizes(
        q=heads_q * of_head,
        k=heads_kv * of_head,
        lse=tokens * heads_q * _FLOAT_BYTES,
        padded_q=heads_q * of_padded if is_padded else 0,
        padded_k=heads_kv * of_padded if is_padded else 0,
        workspace=workspace,
        x=tokens * width * element,
        weight_q=width * heads_q * shape.head_dim * element,
        weight_k=width * heads_kv * shape.head_dim * element,
        table=seqlen * (rotary_dim // 2) * element if width else 0,
    )


_COPIES = "copies with rows of whole 16 bytes"


def _attend(ledger: _Ledger, s: _Sizes) -> None:
    """The attention forward: its results are allocated; lse still has to be kept or dropped."""
    copies = (s.padded_q, s.padded_k, s.padded_k, s.padded_q)
    ledger.add("out", s.q)
    ledger.add("lse", s.lse)
    ledger.add(_COPIES, *copies)
    ledger.drop(_COPIES, *copies)


def _attend_backward(ledger: _Ledger, s: _Sizes) -> None:
    """The attention backward: dq, dk, dv are allocated; what it was given is still there."""
    copies = (s.padded_q, s.padded_q, s.padded_k, s.padded_k, s.padded_q, s.padded_k, s.padded_k)
    ledger.add("delta", s.lse)
    ledger.add("workspace of the backward", s.workspace)
    ledger.add("dq, dk, dv", *s.qkv)
    ledger.add(_COPIES, *copies)
    ledger.drop(_COPIES, *copies)
    ledger.drop("workspace of the backward", s.workspace)
    ledger.drop("delta", s.lse)


def _function(ledger: _Ledger, s: _Sizes, backward: bool) -> int:
    """`flash_attn_func` of given q, k, v; returns what is kept between forward and backward."""
    ledger.add("q, k, v", *s.qkv)
    if backward:
        ledger.add("dout", s.q)
    _attend(ledger, s)
    if not backward:
        ledger.drop("lse", s.lse)
    kept = sum(ledger.live.values())
    if backward:
        _attend_backward(ledger, s)
    return kept


def _layers(ledger: _Ledger, s: _Sizes, num_layers: int, backward: bool) -> int:
    """Layers on top of each other; returns what is kept between forward and backward."""
    for _ in range(num_layers):
        ledger.add("parameters", *s.weights)
    ledger.add("hidden states", s.x)
    if backward:
        ledger.add("gradients of hidden states", s.x)  # of the result, which the caller has
    for layer in range(num_layers):
        _layer_forward(ledger, s, backward)
        if layer > 0 and not backward:
            ledger.drop("hidden states", s.x)
    kept = sum(ledger.live.values())
    if backward:
        for layer in reversed(range(num_layers)):
            _layer_backward(ledger, s, is_last=layer == num_layers - 1)
            if layer > 0:
                ledger.drop("hidden states", s.x)  # its input; that of the first is the caller's
    return kept


def _layer_forward(ledger: _Ledger, s: _Sizes, backward: bool) -> None:
    ledger.add("q, k, v", *s.qkv)
    if s.table:
        ledger.add("rotary tables", s.table, s.table)
        ledger.add("q, k, v", s.q, s.k)  # rotated
        ledger.drop("q, k, v", s.q, s.k)
    _attend(ledger, s)
    if not backward:
        ledger.drop("lse", s.lse)
    ledger.add("hidden states", s.x)
    if not backward:
        ledger.drop("q, k, v", *s.qkv)
        ledger.drop("out", s.q)


def _layer_backward(ledger: _Ledger, s: _Sizes, is_last: bool) -> None:
    ledger.add("dout", s.q)
    ledger.add("gradients of parameters", s.weight_q)
    if not is_last:
        ledger.drop("gradients of hidden states", s.x)
    _attend_backward(ledger, s)
    ledger.drop("dout", s.q)
    ledger.drop("q, k, v", *s.qkv)
    ledger.drop("out", s.q)
    ledger.drop("lse", s.lse)
    if s.table:
        for size in s.qkv[:2]:
            ledger.add("dq, dk, dv", size)  # before the rotation
            ledger.drop("dq, dk, dv", size)
    ledger.add("gradients of hidden states", s.x)  # the sum of three
    for size, weight in zip(reversed(s.qkv), reversed(s.weights[:3]), strict=True):
        ledger.add("gradients of hidden states", s.x)
        ledger.add("gradients of parameters", weight)
        ledger.drop("gradients of hidden states", s.x)
        ledger.drop("dq, dk, dv", size)


def estimate_memory(
    shape: AttentionShape,
    batch_size: int,
    seqlen: int,
    *,
    backward: bool = True,
    varlen: bool = False,
    deterministic: bool = False,
    arch: str | None = None,
) -> MemoryEstimate:
    """GPU memory of one forward, or forward and backward; see the module for what is counted.

    Args:
        shape: of the attention or of the layers.
        batch_size: sequences.
        seqlen: tokens of each.
        backward: with a backward; else under torch.no_grad().
        varlen: the sequences are packed (attention with cu_seqlens).
        deterministic: see flash_attn_func.
        arch: "a100", "h100", "sm90" ..., see ``explain``; default: the GPU of this machine.

    Raises:
        UnsupportedError: no kernel computes it there, or plans cannot be asked for.
        ValueError: sizes that are not positive, layers without width, an unknown arch.
    """
    sizes = {**dataclasses.asdict(shape), "batch_size": batch_size, "seqlen": seqlen}
    for name, size in sizes.items():
        if name not in ("width", "rotary_dim", "dtype") and size < 1:
            raise ValueError(_checks.message(name, size, "at least 1"))
    if shape.width is None and shape.num_layers != 1:
        raise ValueError(
            _checks.message("num_layers", shape.num_layers, "1 because width is None", "give width")
        )
    workspace = _workspace(shape, batch_size, seqlen, varlen, deterministic, arch)
    tensors = _sizes(shape, batch_size, seqlen, workspace)
    ledger = _Ledger()
    if shape.width is None:
        kept = _function(ledger, tensors, backward)
    else:
        kept = _layers(ledger, tensors, shape.num_layers, backward)
    return ledger.estimate(kept)


def max_seqlen(
    shape: AttentionShape,
    batch_size: int,
    memory_bytes: int | None = None,
    *,
    multiple_of: int = 128,
    backward: bool = True,
    varlen: bool = False,
    deterministic: bool = False,
    arch: str | None = None,
) -> int:
    """The length that fits into memory by `estimate_memory`, while the next one does not.

    Args:
        shape: see estimate_memory.
        batch_size: see estimate_memory.
        memory_bytes: default: what the GPU of this machine has free now.
        multiple_of: the result is a multiple of it.
        backward: see estimate_memory.
        varlen: see estimate_memory.
        deterministic: see estimate_memory.
        arch: see estimate_memory.

    Returns:
        The length; 0 if none fits, at most 2^24.

    Raises:
        UnsupportedError: as estimate_memory.
        ValueError: as estimate_memory; or no memory_bytes with an arch.
    """
    if memory_bytes is None:
        if arch is not None:
            raise ValueError(
                _checks.message("memory_bytes", None, "a number of bytes because arch is given")
            )
        memory_bytes = torch.cuda.mem_get_info()[0]

    def fits(steps: int) -> bool:
        estimate = estimate_memory(
            shape,
            batch_size,
            steps * multiple_of,
            backward=backward,
            varlen=varlen,
            deterministic=deterministic,
            arch=arch,
        )
        return estimate.peak_bytes <= memory_bytes

    fitting, too_many = 0, 1
    limit = _LONGEST // (batch_size * multiple_of)  # the kernels count tokens in 32 bits
    while too_many <= limit and fits(too_many):
        fitting, too_many = too_many, 2 * too_many
    too_many = min(too_many, limit + 1)
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(middle) else (fitting, middle)
    return fitting * multiple_of
