"""Says what would compute a call, and why nothing faster does.

    >>> import flash_attn_ext
    >>> print(flash_attn_ext.explain(q, k, v, causal=True))
    >>> print(flash_attn_ext.explain((2, 4096, 32, 128), (2, 4096, 8, 128), (2, 4096, 8, 128),
    ...                              causal=True, arch="h100"))

The answers are those of ``make_plan`` (csrc/plan/plan.h), the function that chooses at run time,
asked through the introspection module: no GPU is needed to ask about one. ``support_table`` asks it
about every feature.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _call_problem, _checks, _load
from .backends import _problem as tiled
from .backends import chosen_backend
from .errors import UnsupportedError

KERNEL, TORCH_TILED, UNKNOWN = "kernel", "torch_tiled", "unknown"
"""Values of ``Step.backend``: a compiled kernel, PyTorch operations, a plan nobody can ask for."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation of a call and what computes it.

    Attributes:
        family: "fwd", "bwd", "decode", "combine", "bwd_preprocess", "rotary" or "append_kv"; the
            families of norms and losses are in `support_table` alone.
        backend: "kernel", "torch_tiled" or "unknown" (the plan cannot be asked for).
        kernel: name of the kernel, None without one.
        library: kernel library that has it, such as "_sm90".
        tile: (rows, columns) that are computed together: query rows and keys in attention, rows and
            their elements elsewhere; None if unknown.
        tiles: architecture whose tile sizes the kernel runs with, such as "sm89" for a kernel of
            _sm80 on a GPU with 99 KB of shared memory.
        copies_rows: whether attention copies tensors first, because head_dim is not a multiple of 8
            or rows do not begin at multiples of 16 bytes.
        num_threads: threads of a CTA.
        num_ctas: CTAs of the launch.
        num_stages: buffers in flight.
        num_splits: partial results to each row.
        head_splits: CTAs that share the query heads of a key/value head (backward).
        smem_bytes: dynamic shared memory of a CTA.
        workspace_bytes: global memory beside inputs and outputs; None where it is not planned.
        reasons: one sentence for each library that was refused.
    """

    family: str
    backend: str
    kernel: str | None = None
    library: str | None = None
    tile: tuple[int, int] | None = None
    tiles: str | None = None
    copies_rows: bool = False
    num_threads: int | None = None
    num_ctas: int | None = None
    num_stages: int | None = None
    num_splits: int | None = None
    head_splits: int = 1
    smem_bytes: int | None = None
    workspace_bytes: int | None = None
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The step on one line, then each reason on its own."""
        tile = "" if self.tile is None else f", tile {self.tile[0]} x {self.tile[1]}"
        if self.backend == KERNEL:
            if self.tiles is not None and self.library != f"_{self.tiles}":
                tile += f" of {self.tiles}"
            what = (
                f"kernel {self.kernel} of {self.library}{tile}, {self.num_threads} threads, "
                f"{self.num_ctas} CTAs, {self.num_stages} stage(s), {self.num_splits} split(s), "
                f"{self.smem_bytes} B of shared memory, workspace {self.workspace_bytes} B"
                f"{', copies rows first' if self.copies_rows else ''}"
                f"{f', grouped heads shared by {n} CTAs' if (n := self.head_splits) > 1 else ''}"
            )
        elif self.backend == TORCH_TILED:
            what = f"PyTorch operations (backends/torch_tiled.py){tile}"
        else:
            what = "not known"
        return "\n".join([f"{self.family}: {what}", *(f"  - {reason}" for reason in self.reasons)])


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What computes a call, step by step.

    Attributes:
        function: name of the public function.
        device: the GPU or other device that was asked about, in words.
        inputs: shapes, dtype and options, in words.
        problem: sizes and flags of the attention step, as csrc/plan/problem.h names them.
        steps: in the order in which they run.
        notes: sentences about the answer as a whole.
    """

    function: str
    device: str
    inputs: str
    problem: dict[str, Any]
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()

    @property
    def attention(self) -> Step:
        """The forward step."""
        return next(step for step in self.steps if step.family in ("fwd", "decode"))

    @property
    def backend(self) -> str:
        """Backend of the forward step."""
        return self.attention.backend

    @property
    def kernel(self) -> str | None:
        """Kernel of the forward step."""
        return self.attention.kernel

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why faster libraries were refused for the forward step."""
        return self.attention.reasons

    def __str__(self) -> str:
        """Several lines for people."""
        lines = [f"{self.function} on {self.device}", f"  {self.inputs}"]
        for step in self.steps:
            lines += [f"  {line}" for line in str(step).splitlines()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def introspect() -> ModuleType:
    """The introspection module.

    Raises:
        UnsupportedError: it was not built for this Python.
    """
    module = _load.status().introspect
    if module is None:
        raise UnsupportedError(_no_introspect())
    return module


def _no_introspect() -> str:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"plans cannot be asked for: {_load.status().package_dir} has no _introspect module for "
        f"Python {python}; fix: pip install pybind11, then rebuild with "
        "FLASH_ATTN_EXT_FORCE_BUILD=1 pip install ."
    )


def _tiled_tile(problem: dict[str, Any]) -> tuple[int, int] | None:
    """The tile of the PyTorch backend; None for what it computes in one piece."""
    if problem["family"] not in ("fwd", "bwd", "decode"):
        return None
    options = tiled.Options(1.0, -1, -1, 0.0, None, None, 0.0)
    return tiled.Problem(
        input_dtype=torch.float32,
        device=torch.device("cpu"),
        batch=range(problem["batch_size"]),
        num_heads_q=problem["num_heads_q"],
        num_heads_kv=problem["num_heads_kv"],
        lengths_q=tiled.Lengths(problem["seqlen_q"], problem["seqlen_q"]),
        lengths_k=tiled.Lengths(problem["seqlen_k"], problem["seqlen_k"]),
        shift_min=0,
        shift_max=0,
        options=options,
    ).tile_sizes()


def _plan(problem: dict[str, Any], device: str | dict[str, int] | None, built: list[str]) -> Step:
    """The step that computes a problem; ``device`` None: not a CUDA device."""
    family = problem["family"]
    in_torch = Step(family, TORCH_TILED, tile=_tiled_tile(problem))
    if device is None:
        return dataclasses.replace(in_torch, reasons=("kernels need CUDA tensors",))
    if chosen_backend() == "tiled":
        return dataclasses.replace(
            in_torch, reasons=("FLASH_ATTN_EXT_BACKEND=tiled asks for PyTorch operations",)
        )
    module = _load.status().introspect
    if module is None:
        return Step(family, UNKNOWN, reasons=(_no_introspect(),))
    found = module.make_plan(problem, device, built)
    reasons = tuple(found.pop("reasons"))
    if not found.pop("ok"):
        return dataclasses.replace(in_torch, reasons=reasons)
    found.pop("arch")
    copies_rows = not found.pop("vectorized") and family in ("fwd", "bwd")
    return Step(family, KERNEL, reasons=reasons, copies_rows=copies_rows, **found)


def _op_steps(
    problems: list[dict[str, Any]], device: str | dict[str, int] | None, built: list[str]
) -> list[Step]:
    """The steps of one op. PyTorch operations compute an op whole: they start no kernel of ours."""
    steps = [_plan(problem, device, built) for problem in problems]
    attention = steps[-1]
    if attention.backend != TORCH_TILED:
        return steps
    why = (f"part of the same op as {attention.family}, which no kernel computes",)
    return [Step(step.family, TORCH_TILED, reasons=why) for step in steps[:-1]] + [attention]


def _cuda_facts(device: torch.device) -> dict[str, int]:
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks a field
    return {
        "sm_major": properties.major,
        "sm_minor": properties.minor,
        "num_sms": properties.multi_processor_count,
        "max_smem_bytes": properties.shared_memory_per_block_optin,
        "l2_bytes": properties.L2_cache_size,
    }


def _smem_limit() -> int | None:
    """Bytes of FLASH_ATTN_EXT_SMEM_KB, by the rule of csrc/bindings/device.cpp."""
    text = os.environ.get("FLASH_ATTN_EXT_SMEM_KB", "")
    if not text:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise ValueError(f"FLASH_ATTN_EXT_SMEM_KB={text}: expected a number of KB, 1 to 1024")
    return int(text) * 1024


def _limited(facts: dict[str, int]) -> dict[str, int]:
    """The facts of a device with the shared memory that FLASH_ATTN_EXT_SMEM_KB leaves."""
    limit = _smem_limit()
    if limit is None:
        return facts
    return {**facts, "max_smem_bytes": min(limit, facts["max_smem_bytes"])}


def _target(q: Any, arch: str | None) -> tuple[str | dict[str, int] | None, str]:
    """The device for make_plan and its description; None: not a CUDA device."""
    if arch is not None:
        module = _load.status().introspect
        if module is None:
            return arch, arch
        devices = module.devices()
        if arch not in devices:
            raise ValueError(_checks.message("arch", repr(arch), f"one of {', '.join(devices)}"))
        facts = _limited(devices[arch])
        return arch if facts == devices[arch] else facts, _describe(arch, facts)
    if isinstance(q, Tensor) and q.is_cuda:
        facts = _limited(_cuda_facts(q.device))
        return facts, _describe(torch.cuda.get_device_name(q.device), facts)
    if isinstance(q, Tensor):
        return None, q.device.type
    raise ValueError(
        _checks.message("arch", None, "the name of a GPU or architecture when q is a shape")
    )


def _describe(name: str, facts: dict[str, int]) -> str:
    return (
        f"{name} (compute capability {facts['sm_major']}.{facts['sm_minor']}, "
        f"{facts['num_sms']} SMs, {facts['max_smem_bytes'] // 1024} KB of shared memory a CTA)"
    )


def _built(arch: str | None) -> tuple[list[str], list[str]]:
    """Kernel libraries to plan with, and notes about them."""
    forced = os.environ.get("FLASH_ATTN_EXT_ARCH", "")
    built = sorted(_load.status().arch_libraries)
    notes = []
    if not built and arch is not None and _load.status().introspect is not None:
        built = _archs_with_kernels()
        notes.append(
            "this installation has no kernel libraries; the answer is that of a full build "
            f"({', '.join(built)})"
        )
    if forced:
        built = [name for name in built if name == forced]
        notes.append(f"FLASH_ATTN_EXT_ARCH={forced} leaves only that library")
    limit = _smem_limit()
    if limit is not None:
        notes.append(f"FLASH_ATTN_EXT_SMEM_KB leaves a CTA {limit // 1024} KB at most")
    return built, notes


def _archs_with_kernels() -> list[str]:
    return sorted({row["arch"] for row in introspect().kernels()})


def explain(
    *args: Any,
    arch: str | None = None,
    form: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    backward: bool | None = None,
    **options: Any,
) -> Explanation:
    """Says which kernels or PyTorch operations a call would use, and why nothing faster.

    Takes the arguments of ``flash_attn_func``, ``flash_attn_varlen_func`` or
    ``flash_attn_with_kvcache``, positional or by keyword. Computes nothing.

    Args:
        *args: positional arguments of the function. Any tensor may be given by its shape alone,
            for instance ``(2, 4096, 32, 128)``; cu_seqlens by their values.
        arch: plan for this GPU ("a100", "rtx4090", "h100", ...) or architecture ("sm80", "sm86",
            "sm89", "sm90", "sm100", "sm120") instead of q's device. Required if q is a shape.
        form: "fixed", "varlen" or "kvcache": which of the three functions is meant. By default it
            follows from the options: any that only ``flash_attn_with_kvcache`` has means that one,
            ``cu_seqlens_q`` means ``flash_attn_varlen_func``.
        dtype: of the tensors, where q is a shape.
        backward: explain the backward too; by default if q, k or v needs a gradient.
        **options: keyword arguments of the function.

    Returns:
        The explanation; ``print`` shows it. Where plans cannot be asked for, because the
        introspection module was not built for this Python, its steps say so and what to do.

    Raises:
        TypeError: an argument that the function does not have.
        ValueError: unknown ``arch`` or ``form``, a wrong rank, or a dtype that nothing computes.
    """
    form, function, call = _call_problem.bind(form, args, options)
    q = call["q"]
    dtype_name = _call_problem.dtype_name(q, dtype)
    if backward is None:
        tensors = (call.get(name) for name in ("q", "k", "v"))
        backward = any(isinstance(x, Tensor) and x.requires_grad for x in tensors)

    device, device_words = _target(q, arch)
    built, notes = _built(arch)
    ops = _call_problem.ops(form, call, dtype_name, backward)
    attention = ops[0][-1]
    return Explanation(
        function=function.__name__,
        device=device_words,
        inputs=_call_problem.in_words(form, call, attention),
        problem=attention,
        steps=tuple(step for problems in ops for step in _op_steps(problems, device, built)),
        notes=() if device is None else tuple(notes),
    )


_SIZES = {"batch_size": 8, "seqlen_q": 1024, "seqlen_k": 1024, "num_heads_q": 8, "num_heads_kv": 8}
_TYPES = {name: {"dtype": name} for name in ("fp16", "bf16", "fp32", "fp64")}
_ATTENTION_FEATURES: dict[str, dict[str, Any]] = {
    **_TYPES,
    "head_dim 64": {"head_dim": 64, "head_dim_v": 64},
    "head_dim 256": {"head_dim": 256, "head_dim_v": 256},
    "head_dim_v != head_dim": {"head_dim": 192, "head_dim_v": 128},
    "causal": {"window_right": 0},
    "window": {"window_left": 128, "window_right": 0},
    "GQA": {"num_heads_kv": 2},
    "varlen": {"varlen": True},
    "softcap": {"softcap": True},
    "ALiBi": {"alibi": True},
}
_ROTARY_FEATURES = {
    "rotary": {"rotary_dim": 128},
    "interleaved rotary": {"rotary_dim": 128, "rotary_interleaved": True},
}
_NORM_SIZES = {
    "hidden_size 4096": {"head_dim": 4096},
    "hidden_size 8191": {"head_dim": 8191},
}
_VOCABULARIES = {"vocabulary 50257": {"head_dim": 50257}, "vocabulary 128256": {"head_dim": 128256}}
FEATURES: dict[str, dict[str, dict[str, Any]]] = {
    "fwd": {
        **_ATTENTION_FEATURES,
        "dropout": {"dropout": True},
        "S_dmask": {"dropout": True, "dmask": True},
    },
    "bwd": {
        **_ATTENTION_FEATURES,
        "dropout": {"dropout": True},
        "deterministic": {"deterministic": True},
    },
    "decode": {
        **_ATTENTION_FEATURES,
        "paged, pages of 16": {"page_size": 16},
        "paged, pages of 1": {"page_size": 1},
        "split-KV": {"num_splits": 4, "seqlen_q": 1},
    },
    "combine": {**{name: {**kind, "num_splits": 4} for name, kind in _TYPES.items()}},
    "bwd_preprocess": {**_TYPES, "varlen": {"varlen": True}},
    "rotary": {
        **{name: {**kind, "rotary_dim": 128} for name, kind in _TYPES.items()},
        "interleaved": {"rotary_dim": 128, "rotary_interleaved": True},
        "partial": {"rotary_dim": 64},
        "varlen": {"rotary_dim": 128, "varlen": True},
    },
    "append_kv": {
        **_TYPES,
        **_ROTARY_FEATURES,
        "paged, pages of 16": {"page_size": 16},
        "paged, pages of 1": {"page_size": 1},
        "varlen": {"varlen": True},
    },
    "norm_fwd": {**_TYPES, **_NORM_SIZES, "hidden_size 16384": {"head_dim": 16384}},
    "norm_bwd": {
        **_TYPES,
        **_NORM_SIZES,
        "hidden_size 16384": {"head_dim": 16384},
        "bias": {"bias": True, "head_dim": 4096},
    },
    "cross_entropy_fwd": {**_TYPES, **_VOCABULARIES},
    "cross_entropy_bwd": {**_TYPES, **_VOCABULARIES},
}
"""family -> feature -> the fields of a problem that has it."""


def support_table() -> list[dict[str, str]]:
    """What a full build computes with kernels, asked of ``make_plan``.

    Returns:
        One row for each family and feature: "family", "feature", then for each architecture
        ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120") the kernel library that computes it, such
        as "_sm80", or "PyTorch"; "cpu" is always "PyTorch".

    Raises:
        UnsupportedError: the introspection module was not built for this Python.
    """
    module = introspect()
    built = _archs_with_kernels()
    archs = [name for name in module.devices() if name.startswith("sm")]
    rows = []
    for family, features in FEATURES.items():
        for feature, fields in features.items():
            problem = {"family": family, "dtype": "bf16", **_SIZES, **fields}
            row = {"family": family, "feature": feature}
            for arch in archs:
                row[arch] = module.make_plan(problem, arch, built).get("library", "PyTorch")
            row["cpu"] = "PyTorch"
            rows.append(row)
    return rows


def support_markdown() -> str:
    """``support_table`` as Markdown; features of a family that are computed alike share a row."""
    grouped: dict[tuple[str, ...], list[str]] = {}
    columns: list[str] = []
    for row in support_table():
        columns = [name for name in row if name not in ("family", "feature")]
        key = (row["family"], *(row[name] for name in columns))
        grouped.setdefault(key, []).append(row["feature"])
    lines = ["| op | features | " + " | ".join(columns) + " |"]
    lines.append("|---|---" + "|---" * len(columns) + "|")
    for (family, *values), features in grouped.items():
        lines.append(f"| {family} | {', '.join(features)} | " + " | ".join(values) + " |")
    return "\n".join(lines)
