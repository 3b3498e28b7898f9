"""Runs: for each problem every provider, checked, then timed alternately or its peak memory taken.

A row is a dict for JSON: "pass", "problem", the fields of the problem, and by provider "ms",
"tflops" (decode: "gb_per_s", memory: "peak_bytes"), "errors" against fp64, and for those that are
not compared "wrong" and "missing", a sentence each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..errors import UnsupportedError
from . import measure, providers
from .check import Judge
from .measure import Json
from .problems import BWD_FLOPS, AnyProblem, DecodeProblem, PackedProblem, Problem, backward

KINDS = ("fwd", "bwd", "decode", "varlen", "memory")
PASSES = {"varlen": ("fwd", "bwd")}
"""Kind -> what is run; others: the kind itself."""

METRIC = {"decode": "gb_per_s", "memory": "peak_bytes"}
"""Kind -> what is compared; others: "tflops"."""

_TOKENS = {"cuda": 16384, "cpu": 1024}
_HIDDEN = {"cuda": 2048, "cpu": 256}  # heads * head_dim
_SEQLENS = {"cuda": (512, 1024, 2048, 4096, 8192, 16384), "cpu": (128, 256, 512, 1024)}
_MEMORY_SEQLENS = {"cuda": (1024, 4096, 16384, 65536), "cpu": (256, 512, 1024, 2048)}
_CACHE_LENGTHS = {"cuda": (1024, 4096, 16384, 65536), "cpu": (512, 1024, 2048, 4096)}
_NEVER_BY_DEFAULT = {"cuda": (), "cpu": ("flex_attention",)}
"""Who is left out unless named: on the CPU FlexAttention compiles C++ for minutes."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is asked for; None: the default of the device.

    Attributes:
        seqlens: lengths.
        head_dims: head dimensions.
        num_heads: query heads; default: heads * head_dim as in a model.
        num_heads_kv: key/value heads; default num_heads, in decoding a quarter.
        batch_size: default: as many as make the same number of tokens for each length.
        causal: None: both.
    """

    seqlens: Sequence[int] | None = None
    head_dims: Sequence[int] | None = None
    num_heads: int | None = None
    num_heads_kv: int | None = None
    batch_size: int | None = None
    causal: bool | None = None


@dataclasses.dataclass(frozen=True)
class Setup:
    """Where and how."""

    device: torch.device
    dtype: torch.dtype
    repetitions: int = measure.MIN_REPETITIONS


class Progress:
    """A bar on stderr, if that is a terminal."""

    def __init__(self, total: int) -> None:
        """Starts at 0 of ``total``."""
        self._total, self._done, self._width = total, 0, 0
        self._shown = sys.stderr.isatty()

    def step(self, text: str) -> None:
        """Says what is worked on now; the one before is done."""
        if self._shown:
            filled = 24 * self._done // max(self._total, 1)
            line = f"[{'#' * filled}{'.' * (24 - filled)}] {self._done}/{self._total} {text}"[:99]
            print(f"\r{line.ljust(self._width)}", end="", file=sys.stderr, flush=True)
            self._width = len(line)
        self._done += 1

    def close(self) -> None:
        """Removes the bar."""
        if self._shown:
            print(f"\r{' ' * self._width}\r", end="", file=sys.stderr, flush=True)


def table_of(kind: str) -> dict[str, providers.Provider]:
    """The providers of a kind."""
    return {"decode": providers.DECODE, "varlen": providers.VARLEN}.get(kind, providers.DENSE)


def choose(kind: str, names: Sequence[str] | None, device: torch.device) -> list[str]:
    """Names of the providers that are run: ours and those asked for, or all.

    Raises:
        ValueError: a name that the kind does not have.
    """
    known = table_of(kind)
    if names is None:
        left_out = (*_NEVER_BY_DEFAULT[device.type], *(() if kind == "memory" else ("plain",)))
        return [name for name in known if name not in left_out]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--vs: got {', '.join(unknown)}; bench {kind} knows {', '.join(known)}")
    return ["ours", *(name for name in names if name != "ours")]


def problems(kind: str, sizes: Sizes, device: torch.device) -> list[AnyProblem]:
    """What is measured, in order."""
    where = device.type
    head_dims: Sequence[int] = (64, 128) if where == "cuda" else (64,)
    if kind in ("decode", "memory"):
        head_dims = head_dims[-1:]
    head_dims = sizes.head_dims or head_dims
    if kind == "decode":
        return [
            _decode_problem(sizes, seqlen, head_dim, where)
            for head_dim in head_dims
            for seqlen in sizes.seqlens or _CACHE_LENGTHS[where]
        ]
    if kind == "varlen":
        return [
            problem
            for head_dim in head_dims
            for problem in _packed_problems(sizes, head_dim, where)
        ]
    masks = (True,) if kind == "memory" else (False, True)
    seqlens = sizes.seqlens or (_MEMORY_SEQLENS if kind == "memory" else _SEQLENS)[where]
    found: list[AnyProblem] = []
    for head_dim in head_dims:
        for causal in masks if sizes.causal is None else (sizes.causal,):
            for seqlen in seqlens:
                heads = sizes.num_heads or max(1, _HIDDEN[where] // head_dim)
                tokens = 1 if kind == "memory" else _TOKENS[where]
                batch = sizes.batch_size or max(1, tokens // seqlen)
                heads_kv = sizes.num_heads_kv or heads
                found.append(Problem(batch, seqlen, heads, heads_kv, head_dim, causal))
    return found


def _decode_problem(sizes: Sizes, seqlen: int, head_dim: int, where: str) -> DecodeProblem:
    heads = sizes.num_heads or max(4, 2 * _HIDDEN[where] // head_dim)
    batch_size = sizes.batch_size or max(1, 8 * _TOKENS[where] // seqlen)
    return DecodeProblem(batch_size, seqlen, heads, sizes.num_heads_kv or heads // 4, head_dim)


def _packed_problems(sizes: Sizes, head_dim: int, where: str) -> list[PackedProblem]:
    """Mixed, equal and skewed lengths; the same in every run."""
    heads = sizes.num_heads or max(1, _HIDDEN[where] // head_dim)
    longest = max(sizes.seqlens) if sizes.seqlens else _TOKENS[where] // 4
    rng = random.Random(0)
    mixed = tuple(rng.randint(max(1, longest // 16), longest) for _ in range(8))
    short = max(1, longest // 8)
    equal = (short,) * max(16, 2 * _TOKENS[where] // short)
    skewed = (longest, *((max(1, longest // 32),) * 16))
    return [PackedProblem(seqlens, heads, head_dim) for seqlens in (mixed, equal, skewed)]


def environment(kind: str, setup: Setup) -> Json:
    """The environment of a run with the machine's own ceilings."""
    found: Json = {
        **measure.environment(setup.device),
        "flash_attn_ext": __version__,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "kind": kind,
        "repetitions": setup.repetitions,
    }
    if setup.device.type == "cpu":
        found["threads"] = torch.get_num_threads()
    if kind == "decode":
        found["copy_gb_per_s"] = _rounded(measure.copy_gb_per_s(setup.device))
    elif kind != "memory":
        found["matmul_tflops"] = _rounded(measure.matmul_tflops(setup.device, setup.dtype))
    return found


@dataclasses.dataclass
class _Trial:
    """What came out for one problem, so far."""

    calls: dict[str, Callable[[], Any]] = dataclasses.field(default_factory=dict)
    errors: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    wrong: dict[str, str] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)

    def judge(self, name: str, judge: Judge, results: Sequence[Tensor]) -> bool:
        """Keeps the errors; whether they are small enough."""
        errors = judge.errors(results)
        self.errors[name] = {what: _rounded(error) for what, error in errors.items()}
        verdict = judge.verdict(errors)
        if verdict is not None:
            self.wrong[name] = verdict
        return verdict is None

    def row(self, which: str, problem: AnyProblem, **numbers: Json) -> Json:
        return {
            "pass": which,
            "problem": str(problem),
            **dataclasses.asdict(problem),
            **numbers,
            "errors": self.errors,
            "wrong": self.wrong,
            "missing": self.missing,
        }


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The first call of a provider: why a backend is not used is in its error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _rounded(number: float) -> float:
    """Five digits that count."""
    return float(f"{number:.5g}")


def _sentence(error: BaseException) -> str:
    """The first line of an error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:200]


def _refused(name: str, error: Exception) -> str:
    """Why a peer is left out; ours has to work."""
    if name == "ours" and not isinstance(error, torch.OutOfMemoryError):
        raise error
    return _sentence(error)


def timed(setup: Setup, kind: str, which: str, problem: AnyProblem, names: Sequence[str]) -> Json:
    """One row: every provider checked, then those that are right timed alternately."""
    tensors = problem.tensors(setup.device, setup.dtype)
    table, trial = table_of(kind), _Trial()
    is_backward = which == "bwd"
    if not is_backward:
        tensors = [x.detach() for x in tensors]
    dout = torch.randn_like(tensors[0]) if is_backward else None
    judge = Judge(problem, tensors, dout)
    with torch.set_grad_enabled(is_backward):
        for name in names:
            try:
                with _quietly():
                    call: Callable[[], Any] = table[name](problem, tensors)
                    if is_backward:
                        call = backward(call, tensors, dout)
                    results = call()
            except Exception as error:  # whatever a peer raises
                trial.missing[name] = _refused(name, error)
                continue
            if trial.judge(name, judge, results if is_backward else [results]):
                trial.calls[name] = call
            del results
        calls = list(trial.calls.values())
        times = measure.median_ms(calls, setup.device, repetitions=setup.repetitions)
    ms = dict(zip(trial.calls, times, strict=True))
    numbers: dict[str, Json] = {"ms": {name: _rounded(t) for name, t in ms.items()}}
    if isinstance(problem, DecodeProblem):
        size = problem.cache_bytes(setup.dtype)
        numbers["gb_per_s"] = {name: _rounded(size / t / 1e6) for name, t in ms.items()}
    else:
        flops = problem.flops() * (BWD_FLOPS if is_backward else 1)
        numbers["tflops"] = {name: _rounded(flops / t / 1e9) for name, t in ms.items()}
    return trial.row(which, problem, **numbers)


def peaks(setup: Setup, problem: Problem, names: Sequence[str]) -> Json:
    """One row: most memory of forward and backward beside q, k, v and dout; ours estimated too."""
    trial, found = _Trial(), {}
    tensors = problem.tensors(setup.device, setup.dtype)
    dout = torch.randn_like(tensors[0])
    judge = Judge(problem, tensors, dout)
    for name in names:

        def step(name: str = name) -> tuple[Tensor, ...]:
            out = table_of("memory")[name](problem, tensors)()
            return torch.autograd.grad(out, tensors, dout)

        try:
            with _quietly():
                step()  # loads libraries, compiles
            found[name], results = measure.peak_bytes(step, setup.device)
        except Exception as error:  # whatever a peer raises
            trial.missing[name] = _refused(name, error)
            continue
        if not trial.judge(name, judge, results):  # type: ignore[arg-type]
            del found[name]
        del results
    row = trial.row("memory", problem, peak_bytes=found)
    estimate = _estimate(setup, problem)
    return row if estimate is None else {**row, "estimated_bytes": estimate}


def _estimate(setup: Setup, problem: Problem) -> int | None:
    """What estimate_memory says of the same; None where it cannot."""
    if setup.device.type != "cuda":
        return None
    from ..memory import AttentionShape, estimate_memory

    shape = AttentionShape(
        problem.num_heads, problem.num_heads_kv, problem.head_dim, dtype=setup.dtype
    )
    try:
        found = estimate_memory(shape, problem.batch_size, problem.seqlen)
    except UnsupportedError:
        return None
    return found.peak_bytes - found.parts["q, k, v"] - found.parts["dout"]


def run(
    kind: str, setup: Setup, asked: Sequence[AnyProblem], names: Sequence[str]
) -> Iterator[Json]:
    """The rows of all problems, with a progress bar."""
    passes = PASSES.get(kind, (kind,))
    progress = Progress(len(asked) * len(passes))
    try:
        for which in passes:
            for problem in asked:
                progress.step(f"{which} {problem}")
                if isinstance(problem, Problem) and kind == "memory":
                    yield peaks(setup, problem, names)
                else:
                    yield timed(setup, kind, which, problem, names)
    finally:
        progress.close()


def ratio(row: Json, name: str) -> float | None:
    """How many times as fast as a provider ours is; memory: how many times as much it takes."""
    numbers = row.get("ms") or row.get("peak_bytes") or {}
    if name not in numbers or "ours" not in numbers:
        return None
    return float(numbers[name] / numbers["ours"])


def mean_ratio(rows: Sequence[Json], name: str) -> float | None:
    """Geometric mean of `ratio`."""
    found = [r for r in (ratio(row, name) for row in rows) if r]
    return statistics.geometric_mean(found) if found else None
