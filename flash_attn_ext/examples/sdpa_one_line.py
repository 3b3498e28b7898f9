"""A PyTorch model on these kernels: one line, and the model is not touched.

    python -m flash_attn_ext.examples.sdpa_one_line

The model calls ``torch.nn.functional.scaled_dot_product_attention`` and knows nothing of this
package. Compares its output and gradients before and after ``sdpa.activate()``. On a CPU the line
has to name the CPU, where torch's own kernel is the faster one: it is for trying things out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn_ext.integrations import sdpa

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest value


class SelfAttention(nn.Module):
    """Causal, with grouped heads: somebody's code."""

    def __init__(self, width: int, num_heads_q: int, num_heads_kv: int) -> None:
        """Creates the projections."""
        super().__init__()
        self.head_dim = width // num_heads_q
        self.heads = [num_heads_q, num_heads_kv, num_heads_kv]
        self.qkv = nn.Linear(width, sum(self.heads) * self.head_dim)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch_size, seqlen, width] -> the same shape."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split(self.heads, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected


def output_and_gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The model's output, and the gradient of the sum of its squares with respect to x."""
    x = x.detach().requires_grad_()
    out = model(x)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
    return out.detach().float().cpu(), gradient.float().cpu()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see ``--help``. 1 if the results differ by more than rounding."""
    parser = argparse.ArgumentParser(prog="sdpa_one_line", description=__doc__.splitlines()[0])
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    model = SelfAttention(width=512, num_heads_q=8, num_heads_kv=2).to(device, dtype)
    x = torch.randn(2, args.seqlen, 512, device=device, dtype=dtype)

    before = output_and_gradient(model, x)
    sdpa.activate(devices=(device.type,))  # the one line
    try:
        begin = time.perf_counter()
        after = output_and_gradient(model, x)
        print(f"forward and backward: {1000 * (time.perf_counter() - begin):.0f} ms, first call")
    finally:
        sdpa.restore()
    differences = [
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(after, before, strict=True)
    ]
    print("largest differences: output {:.1e}, gradient {:.1e}".format(*differences))
    return int(not max(differences) <= TOLERANCE[dtype])


if __name__ == "__main__":
    sys.exit(main())
