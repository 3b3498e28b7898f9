"""No tensor of the size of the score matrix: 32k tokens, forward and backward."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from attention_cases import Case, op
from helpers import NEEDS_LINUX, cu_seqlens, require
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flash_attn_ext.backends import _problem, torch_tiled

SEQLEN, HEAD_DIM = 32768, 64
MB = 1 << 20


class LargestTensor(TorchDispatchMode):
    """Records the largest new tensor that any operation returns, bytes of its storage."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.inputs = {x.untyped_storage().data_ptr() for x in inputs}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.inputs:
                    self.bytes = max(self.bytes, storage.nbytes())
        return results


# Peak resident memory of a process that does the work, minus that of one that only has the inputs.
RSS_SCRIPT = """
import json, resource, sys
import torch
import flash_attn_ext
from flash_attn_ext.backends import torch_tiled
torch.set_num_threads(1)
seqlen, head_dim = map(int, sys.argv[1:])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
options = (None, None, head_dim**-0.5, -1, 0, 0.0, 0.0)
def attention(seqlen):
    q, k, v, dout = (torch.randn(1, seqlen, 1, head_dim) for _ in range(4))
    out, lse, _ = torch_tiled.fwd(q, k, v, *options, False, 0, 0)
    torch_tiled.bwd(dout, q, k, v, out, lse, None, *options, False, 0)
with torch.no_grad():
    attention(128)  # libraries are loaded, threads started
    before = peak()
    attention(seqlen)
print(json.dumps(peak() - before))
"""


def test_largest_tensor_grows_linearly(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option at once: no storage is larger than a tile, an input or a result."""
    monkeypatch.setattr(_problem, "_TILE_ELEMENTS", 1 << 16)
    monkeypatch.setattr(_problem, "_GPU_TILE_FACTOR", 1)
    sizes = {}
    for seqlen in (1024, 2048):
        case = Case(
            *(1, 1, 1, seqlen, seqlen, HEAD_DIM, HEAD_DIM),
            window=(-1, 0),
            softcap=5.0,
            alibi=1,
            dropout_p=0.1,
            dtype=torch.float32,
        )
        q, k, v = (x.detach() for x in case.inputs(device))
        ends = cu_seqlens([seqlen], device)
        with LargestTensor() as largest, torch.no_grad():
            options = case.options(device)
            out, lse, _ = torch_tiled.fwd(q, k, v, *options, False, 0, 0)
            torch_tiled.bwd(out, q, k, v, out, lse, None, *options, False, 0)
            torch_tiled.varlen_fwd(
                *(q[0], k[0], v[0], ends, ends, None, None, None, seqlen, seqlen),
                *(*options, False, 0, 0),
            )
        sizes[seqlen] = largest.bytes
    score_matrix = 2048 * 2048 * 4
    assert sizes[2048] < score_matrix / 16
    assert sizes[2048] <= 2 * sizes[1024]


def test_peak_memory_of_32k_tokens_on_the_cpu() -> None:
    """Forward and backward of one head: the score matrix alone would be 4096 MB."""
    require(NEEDS_LINUX)
    run = subprocess.run(
        [sys.executable, "-c", RSS_SCRIPT, str(SEQLEN), str(HEAD_DIM)],
        capture_output=True,
        text=True,
        check=True,
    )
    extra_bytes = json.loads(run.stdout)
    inputs_and_results = 8 * SEQLEN * HEAD_DIM * 4  # q k v dout out dq dk dv
    assert extra_bytes < inputs_and_results + 128 * MB


@pytest.mark.parametrize("page_size", [None, 64])
def test_cache_is_not_copied(page_size: int | None, device: str) -> None:
    """Decoding reads a long cache tile by tile."""
    seqlen = 65536
    shape = (1, seqlen) if page_size is None else (seqlen // page_size, page_size)
    k_cache = torch.zeros(*shape, 4, HEAD_DIM, dtype=torch.bfloat16, device=device)
    table = None
    if page_size is not None:
        table = torch.arange(shape[0], dtype=torch.int32, device=device)[None]
    q = torch.zeros(1, 1, 8, HEAD_DIM, dtype=torch.bfloat16, device=device)
    lengths = torch.tensor([seqlen], dtype=torch.int32, device=device)
    with LargestTensor(k_cache) as largest:
        out, _ = op("kvcache_fwd", "tiled")(q, k_cache, k_cache, lengths, table)
    assert out.shape == q.shape
    assert largest.bytes < k_cache.untyped_storage().nbytes() / 8
