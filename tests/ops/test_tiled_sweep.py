"""Random problems over the whole option space, values and gradients against the reference.

In fp64, where every deviation is a mistake. The rule of twice the error for other types is tested
with realistic sizes: with a single key the plain implementation can be exact, and any rounding of
delta, which the algorithm cancels against dP, would be more than twice nothing.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import TILED, Case, Packed, check_fixed, check_packed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash_attn_ext.backends import _problem

WINDOW_SIDE = st.integers(-1, 40)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_heads_kv = draw(st.integers(1, 3))
    return Case(
        batch_size=draw(st.integers(0, 3)),
        num_heads_q=num_heads_kv * draw(st.integers(1, 3)),
        num_heads_kv=num_heads_kv,
        seqlen_q=draw(st.integers(0, 70)),
        seqlen_k=draw(st.integers(0, 70)),
        head_dim=draw(st.integers(1, 40)),
        head_dim_v=draw(st.integers(1, 40)),
        window=draw(st.sampled_from([(-1, -1), (-1, 0)]) | st.tuples(WINDOW_SIDE, WINDOW_SIDE)),
        softcap=draw(st.sampled_from([0.0, 2.0, 30.0])),
        alibi=draw(st.integers(0, 2)),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.1, 0.6, 0.999])),
        softmax_scale=draw(st.none() | st.floats(0.01, 1.0)),
    )


@st.composite
def packed_sequences(draw: st.DrawFn, batch_size: int) -> Packed:
    def lengths() -> list[int]:
        return draw(st.lists(st.integers(0, 50), min_size=batch_size, max_size=batch_size))

    def used(seqlens: list[int]) -> list[int] | None:
        if not draw(st.booleans()):
            return None
        return [draw(st.integers(0, seqlen)) for seqlen in seqlens]

    seqlens_q, seqlens_k = lengths(), lengths()
    extra = draw(st.integers(0, 3))
    return Packed(seqlens_q, seqlens_k, used(seqlens_q), used(seqlens_k), extra)


@pytest.fixture(params=[None, (16, 32), (9, 13)], ids=["tile_default", "tile_16_32", "tile_9_13"])
def _tile_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(_problem, "_MAX_TILE_M", request.param[0])
        monkeypatch.setattr(_problem, "_MAX_TILE_N", request.param[1])


SWEEP = settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.usefixtures("_tile_sizes")
@SWEEP
@given(case=cases(), seed=st.integers(0, 2**31))
def test_fixed(case: Case, seed: int, device: str) -> None:
    torch.manual_seed(seed)
    check_fixed(case, device, TILED)


@pytest.mark.usefixtures("_tile_sizes", "length_reading")
@SWEEP
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_packed(data: st.DataObject, seed: int, device: str) -> None:
    torch.manual_seed(seed)
    case = data.draw(cases())
    check_packed(case, data.draw(packed_sequences(case.batch_size)), device, TILED)
