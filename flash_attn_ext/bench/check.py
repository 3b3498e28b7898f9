"""Whether a provider's result is right: one head against fp64.

The expected values are computed in blocks of rows, each of which sees all keys, so that there is no
limit to the length. A result may be as far from them as the same plain operations in its own dtype,
times `SLACK`: ways of rounding differ by two or three, a wrong mask or scale by hundreds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .problems import AnyProblem

SLACK = 5.0
ABSOLUTE = 1e-5  # where the plain operations happen to be exact
_BLOCK_ELEMENTS = 1 << 26  # of the score matrix: 512 MB in fp64

Results = dict[str, Tensor]
"""Of the checked head: "out" [group, seqlen_q, head_dim_v]; or "dq", "dk" and "dv"."""


def head(problem: AnyProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The last KV head, and its query heads, of the checked sequence of tensors like q, k, v.

    [group, seqlen, head_dim] each.
    """
    num_heads_kv = problem.num_heads_kv
    parts = []
    for x in tensors:
        part = problem.part(x.detach()).transpose(0, 1)
        parts.append(part[-(part.shape[0] // num_heads_kv) :])
    return parts


def attention(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None, problem: AnyProblem, dtype: torch.dtype
) -> Results:
    """Textbook attention of one KV head, forward and with ``dout`` backward, in ``dtype``."""
    q, k, v = q.to(dtype), k[0].to(dtype), v[0].to(dtype)
    scale = q.shape[-1] ** -0.5
    wide = torch.promote_types(dtype, torch.float32)
    outs, dqs = [], []
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    num_rows = max(1, _BLOCK_ELEMENTS // (q.shape[0] * k.shape[0]))
    for begin in range(0, q.shape[1], num_rows):
        rows = slice(begin, begin + num_rows)
        scores = q[:, rows] @ k.T * scale
        hidden = _hidden(problem, begin, scores)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        p = scores.softmax(-1)
        out = p @ v
        outs.append(out)
        if dout is None:
            continue
        do = dout[:, rows].to(dtype)
        ds = p * (do @ v.T - (do * out).sum(-1, keepdim=True)) * scale
        dqs.append(ds @ k)
        dk += (ds.transpose(1, 2) @ q[:, rows]).sum(0, dtype=wide)
        dv += (p.transpose(1, 2) @ do).sum(0, dtype=wide)
    if dout is None:
        return {"out": torch.cat(outs, 1)}
    return {"dq": torch.cat(dqs, 1), "dk": dk[None], "dv": dv[None]}


def _hidden(problem: AnyProblem, begin: int, scores: Tensor) -> Tensor | None:
    """True where a query of this block, the first of which is ``begin``, does not see a key."""
    left, right = getattr(problem, "window", (-1, -1))
    right = 0 if problem.causal else right
    if left < 0 and right < 0:
        return None
    i = torch.arange(begin, begin + scores.shape[-2], device=scores.device)[:, None]
    j = torch.arange(scores.shape[-1], device=scores.device)
    hidden = torch.zeros_like(i - j, dtype=torch.bool)
    if right >= 0:
        hidden |= j > i + right
    if left >= 0:
        hidden |= j < i - left
    return hidden


def _error(actual: Tensor, exact: Tensor) -> float:
    difference = (actual.double() - exact.double()).abs()
    return torch.nan_to_num(difference, nan=torch.inf).max().item()


class Judge:
    """Knows the expected values of one problem on one set of tensors."""

    def __init__(
        self, problem: AnyProblem, tensors: Sequence[Tensor], dout: Tensor | None = None
    ) -> None:
        """Computes them; with ``dout`` those of dq, dk and dv, else of out."""
        self.problem = problem
        self.names = ("out",) if dout is None else ("dq", "dk", "dv")
        q, k, v = head(problem, tensors)
        dout_head = None if dout is None else head(problem, [dout])[0]
        dtype = tensors[0].dtype
        with torch.no_grad():
            self.exact = attention(q, k, v, dout_head, problem, torch.float64)
            plain = attention(q, k, v, dout_head, problem, dtype)
        self.allowed = {
            name: SLACK * _error(plain[name], self.exact[name]) + ABSOLUTE for name in self.names
        }

    def errors(self, results: Sequence[Tensor]) -> dict[str, float]:
        """Largest difference of out, or of dq, dk and dv; a wrong shape is infinitely far."""
        found = {}
        for name, result in zip(self.names, head(self.problem, results), strict=True):
            exact = self.exact[name]
            found[name] = _error(result, exact) if result.shape == exact.shape else float("inf")
        return found

    def verdict(self, errors: Mapping[str, float]) -> str | None:
        """None if right, else a sentence."""
        wrong = [
            f"{name} is off by {error:.2g}, at most {self.allowed[name]:.2g} is allowed"
            for name, error in errors.items()
            if not error <= self.allowed[name]
        ]
        return "; ".join(wrong) or None
