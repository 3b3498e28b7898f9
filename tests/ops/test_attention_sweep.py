"""Random problems over the whole option space in 16 bits, values and gradients against fp64.

On a GPU 2,500 problems for the kernels, each with one of the sets of tiles; on the CPU a dozen
for the tiled backend (test_tiled_sweep.py tests that in fp64). Sizes are small and lengths often at
the edge of a tile: mistakes are there. With FLASH_ATTN_EXT_TEST_SEED=n every problem is another.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from attention_cases import Case, How, Packed, check_fixed, check_packed
from conftest import seed_of
from helpers import NEEDS_CUDA, NEEDS_LIBRARY, require
from kernel_cases import A100, BF16, DEVICE, FP16, VARIANTS
from tensor_layouts import LAYOUTS

CHUNKS = 25
PROBLEMS_PER_CHUNK = 100
PROBLEMS_ON_CPU = 12
TILES = {**VARIANTS, "a100": A100}


@dataclass(frozen=True)
class Problem:
    """One draw; packed None: sequences of one length."""

    case: Case
    packed: Packed | None
    layout: str
    with_dlse: bool
    deterministic: bool
    variant: str

    def how(self, like_tiled: bool) -> How:
        return How(
            layout=LAYOUTS.get(self.layout, lambda x: x),
            with_dlse=self.with_dlse,
            deterministic=self.deterministic,
            like_tiled=like_tiled,
            roundings=1.0,
        )


def _length(rng: random.Random) -> int:
    edges = [0, 1, 2, 16, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 192, 255, 256, 257]
    return rng.choice(edges) if rng.random() < 0.5 else rng.randrange(300)


def _head_dim(rng: random.Random) -> int:
    return rng.choice([8, 32, 64, 64, 96, 128, 128, 160, 192, 256, rng.randint(1, 256)])


def _window(rng: random.Random) -> tuple[int, int]:
    def side() -> int:
        return rng.choice([-1, 0, rng.randrange(300), rng.randrange(20)])

    return rng.choice([(-1, -1), (-1, 0), (-1, 0), (side(), side()), (side(), side())])


def _packed(rng: random.Random, batch_size: int) -> Packed:
    def used(seqlens: list[int]) -> list[int] | None:
        return None if rng.random() < 0.5 else [rng.randint(0, n) for n in seqlens]

    seqlens_q, seqlens_k = ([_length(rng) for _ in range(batch_size)] for _ in range(2))
    extra = rng.choice([0, 0, 1, 150])
    return Packed(seqlens_q, seqlens_k, used(seqlens_q), used(seqlens_k), extra)


def draw(rng: random.Random) -> Problem:
    """A problem; every option is off or plain about half of the time."""
    num_heads_kv, head_dim = rng.randint(1, 3), _head_dim(rng)
    case = Case(
        batch_size=rng.choice([0, 1, 1, 2, 2, 3]),
        num_heads_q=num_heads_kv * rng.choice([1, 1, 2, 4]),
        num_heads_kv=num_heads_kv,
        seqlen_q=_length(rng),
        seqlen_k=_length(rng),
        head_dim=head_dim,
        head_dim_v=head_dim if rng.random() < 0.7 else _head_dim(rng),
        window=_window(rng),
        softcap=rng.choice([0.0, 0.0, 0.0, 2.0, 30.0]),
        alibi=rng.choice([0, 0, 0, 1, 2]),
        dropout_p=rng.choice([0.0, 0.0, 0.0, 0.1, 0.5, 0.9]),
        softmax_scale=rng.choice([None, None, None, rng.uniform(0.01, 0.5), 0.0, -0.1]),
        dtype=rng.choice([FP16, BF16]),
    )
    return Problem(
        case,
        packed=_packed(rng, case.batch_size) if rng.random() < 0.5 else None,
        layout=rng.choice(["contiguous", "contiguous", *LAYOUTS]),
        with_dlse=rng.random() < 0.5,
        deterministic=rng.random() < 0.5,
        variant=rng.choice([*TILES]),
    )


def check(problem: Problem, seed: int, device: str) -> None:
    """Compares with the reference; a failure shows the problem."""
    torch.manual_seed(seed)
    how = problem.how(like_tiled=device == DEVICE)
    try:
        if problem.packed is None:
            check_fixed(problem.case, device, how)
        else:
            check_packed(problem.case, problem.packed, device, how)
    except Exception as error:
        raise AssertionError(f"seed {seed}, {problem}: {error}") from error


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_kernels(
    chunk: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(NEEDS_CUDA)
    require(NEEDS_LIBRARY)
    monkeypatch.setenv("FLASH_ATTN_EXT_FALLBACK", "error")
    rng = random.Random(seed_of(request.node.nodeid))
    for _ in range(PROBLEMS_PER_CHUNK):
        problem = draw(rng)
        with monkeypatch.context() as context:
            for name, value in TILES[problem.variant].items():
                context.setenv(name, value)
            check(problem, rng.getrandbits(32), DEVICE)


def test_tiled_on_cpu(request: pytest.FixtureRequest) -> None:
    rng = random.Random(seed_of(request.node.nodeid))
    for _ in range(PROBLEMS_ON_CPU):
        check(draw(rng), rng.getrandbits(32), "cpu")
