"""torch.compile, torch.export, FLOP counting, and opcheck of every op."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch._dynamo.testing
from helpers import NEEDS_CXX, assert_equals, cu_seqlens, int32, randn, require, rng_state
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import flash_attn_ext as fa
from flash_attn_ext import _flops, _schema
from flash_attn_ext.layers.rotary import apply_rotary_emb

F32 = torch.float32
OPS = torch.ops.flash_attn_ext


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def plain(*shape: int, device: str, dtype: torch.dtype = F32) -> Tensor:
    return randn(*shape, dtype=dtype, device=device).detach()


# ---- opcheck ----------------------------------------------------------------------------------

MASK = (0.35, 3, 0, 0.0)  # softmax_scale, window_left, window_right, softcap


def op_arguments(name: str, device: str) -> list[tuple[Any, ...]]:
    """Sample calls of one op."""

    def x(*shape: int) -> Tensor:
        return plain(*shape, device=device)

    def table() -> Tensor:
        return int32([0, 1, 2, 3, 4, 5], device).view(2, 3)

    fixed = (x(2, 5, 4, 8), x(2, 6, 2, 8), x(2, 6, 2, 16))
    packed = (x(9, 4, 8), x(11, 2, 8), x(11, 2, 16))
    lengths = (cu_seqlens([4, 5], device), cu_seqlens([8, 3], device), None, None)
    slopes, seed = torch.rand(4, device=device), rng_state(device=device)
    fwd = [(None, None, *MASK, 0.0, False, 0, 0), (slopes, seed, *MASK, 0.25, True, 1, 0)]
    bwd = [(None, None, *MASK, 0.0, False, 0), (slopes, seed, *MASK, 0.25, True, 0)]
    seqlens = int32([3, 2], device)
    rotary = (torch.rand(24, 3, device=device), torch.rand(24, 3, device=device), None, True)
    if name == "fwd":
        return [(*fixed, *tail) for tail in fwd]
    if name == "fwd_out":
        return [(*fixed, x(2, 5, 4, 16), *tail) for tail in fwd]
    if name == "varlen_fwd":
        paged = (x(9, 4, 8), x(6, 4, 2, 8), x(6, 4, 2, 16))
        used = (lengths[0], None, int32([3, 5], device), int32([8, 3], device), table(), 5, 8)
        return [*((*packed, *lengths, None, 5, 8, *tail) for tail in fwd), (*paged, *used, *fwd[0])]
    if name == "varlen_fwd_out":
        return [(*packed, x(9, 4, 16), *lengths, None, 5, 8, *tail) for tail in fwd]
    if name == "bwd":
        state = (x(2, 5, 4, 16), x(2, 4, 5))
        dlses = (None, x(2, 4, 5))
        return [
            (x(2, 5, 4, 16), *fixed, *state, dlse, *tail)
            for dlse, tail in zip(dlses, bwd, strict=True)
        ]
    if name == "varlen_bwd":
        state = (x(9, 4, 16), x(4, 9))
        return [
            (x(9, 4, 16), *packed, *state, dlse, *lengths, 5, 8, *tail)
            for dlse, tail in zip((None, x(4, 9)), bwd, strict=True)
        ]
    if name == "bwd_preprocess":
        return [
            (x(2, 5, 4, 16), x(2, 5, 4, 16), None),
            (x(9, 4, 16), x(9, 4, 16), x(4, 9)),
        ]
    if name == "kvcache_fwd":
        contiguous = (x(2, 5, 4, 8), x(2, 12, 2, 8), x(2, 12, 2, 16), seqlens)
        paged = (x(9, 4, 8), x(6, 4, 2, 8), x(6, 4, 2, 16), int32([3, 9], device), table())
        ragged = (*MASK, slopes, None, None, cu_seqlens([4, 5], device), 5)
        return [contiguous, (*contiguous, None, *MASK), (*paged, *ragged)]
    if name == "kvcache_append_fwd":
        contiguous = (x(2, 5, 4, 8), x(2, 12, 2, 8), x(2, 12, 2, 16))
        new = (x(2, 5, 2, 8), x(2, 5, 2, 16), seqlens)
        rest = (None, None, None, 0, 0, 0, seqlens)  # cache_batch_idx ... rotary_seqlens
        return [
            (*contiguous, *new),
            (*contiguous, *new, None, None, True, None, *MASK),
            (*contiguous, *new, *rotary[:2], True, None, *MASK, slopes, *rest),
        ]
    if name == "append_kv":
        new = (x(2, 5, 2, 8), x(2, 5, 2, 16), int32([3, 2], device))
        return [
            (x(2, 12, 2, 8), x(2, 12, 2, 16), *new, None, None, None, None, None, None, True),
            (x(6, 4, 2, 8), x(6, 4, 2, 16), *new, None, table(), None, *rotary),
        ]
    if name in ("rotary", "rotary_"):
        cos, sin = rotary[:2]
        return [
            (x(2, 5, 4, 8), cos, sin, None, None, 5, True, False, False),
            (x(9, 4, 8), cos, sin, int32([1, 2], device), lengths[0], 5, False, True, False),
            (x(2, 5, 4, 8), cos, sin, int32([1, 2], device), None, 5, False, False, True),
        ]
    if name == "norm_fwd":
        rows, weights = (x(6, 24), None, x(24)), (1e-5, 0.0, True, 0.0, False, False)
        wide = (x(6, 24).bfloat16(), x(6, 24), x(24), x(24), torch.rand(6, device=device), seed)
        return [(*rows, None, None, None, *weights), (*wide, 1e-5, 0.3, False, 1.0, True, True)]
    if name == "norm_bwd":
        statistics = (torch.rand(6, device=device), torch.rand(6, device=device))
        plain_rows = (x(6, 24), x(6, 24), None, x(24), None, None, statistics[0][:0], statistics[1])
        wide = (x(6, 24).bfloat16(), x(6, 24), x(6, 24), x(24), torch.rand(6, device=device), seed)
        return [
            (*plain_rows, 0.0, True, 0.0, False, False),
            (*wide, *statistics, 0.3, False, 1.0, True, True),
        ]
    if name.startswith("cross_entropy"):
        labels = torch.tensor([3, -100, 0, 10, 7, 7], device=device)
        loss = (0.1, 0.7, 1e-3, -100)
        if name == "cross_entropy_fwd":
            return [(x(6, 11), labels, given, *loss) for given in (None, x(6))]
        return [(x(6), x(6, 11), labels, x(6), *loss)]
    partial = (x(3, 2, 5, 4, 8), x(3, 2, 5, 4))
    if name == "combine":
        return [(*partial, None), (*partial, torch.bfloat16)]
    assert name == "combine_out"
    return [(*partial, x(2, 5, 4, 8))]


@pytest.mark.parametrize("overload", _schema.OVERLOADS)
@pytest.mark.parametrize("name", list(_schema.SCHEMAS))
@pytest.mark.filterwarnings("ignore::flash_attn_ext.FallbackWarning")
def test_opcheck(name: str, overload: str, device: str) -> None:
    op = getattr(getattr(OPS, name), overload)
    samples = op_arguments(name, device)
    for arguments in samples if overload == "default" else samples[:1]:
        torch.library.opcheck(op, arguments)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_opcheck_of_inputs_that_require_grad(device: str) -> None:
    tail = (None, None, *MASK, 0.0, False, 0, 0)
    q, k, v = (randn(1, 5, 2, 8, dtype=F32, device=device) for _ in range(3))
    torch.library.opcheck(OPS.fwd.default, (q, k, v, *tail))


def test_tags() -> None:
    for name in _schema.SCHEMAS:
        for overload in _schema.OVERLOADS:
            tags = getattr(getattr(OPS, name), overload).tags
            assert {torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides} <= set(tags)


def test_backend_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _schema.op("fwd") is OPS.fwd.default
    monkeypatch.setenv("FLASH_ATTN_EXT_BACKEND", "tiled")
    assert _schema.op("fwd") is OPS.fwd.tiled


# ---- torch.compile ----------------------------------------------------------------------------


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*inputs).square().sum(), inputs)


def fixed_model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = fa.flash_attn_func(
        2 * q, k, v, causal=True, window_size=(4, None), softcap=2.0, return_softmax_lse=True
    )
    return torch.cat([out.flatten(), lse.exp().flatten()])


def lse_model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fa.flash_attn_func(q, k, v, return_softmax_lse=True)[1]


def packed_model(qkv: Tensor) -> Tensor:
    return fa.flash_attn_qkvpacked_func(2 * qkv, causal=True, num_heads_q=4)


def sink_model(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    return fa.flash_attn_func(q, k, v, s_aux=sink, causal=True, deterministic=True)


def rotary_model(x: Tensor) -> Tensor:
    angles = torch.arange(5 * 3, dtype=x.dtype, device=x.device).view(5, 3)
    return apply_rotary_emb(x, angles.cos(), angles.sin(), interleaved=True)


def fixed_inputs(device: str, seqlen: int = 5) -> tuple[Tensor, ...]:
    return tuple(
        randn(2, n, heads, 8, dtype=F32, device=device)
        for n, heads in ((seqlen, 4), (seqlen + 2, 2), (seqlen + 2, 2))
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (fixed_model, [(2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8)]),
        (lse_model, [(2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8)]),
        (packed_model, [(2, 5, 8, 8)]),
        (sink_model, [(2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8), (4,)]),
        (rotary_model, [(2, 5, 4, 8)]),
    ],
)
@pytest.mark.filterwarnings("ignore::flash_attn_ext.FallbackWarning")
def test_compiled_training(
    model: Callable[..., Tensor], shapes: list[tuple[int, ...]], dynamic: bool, device: str
) -> None:
    inputs = [randn(*shape, dtype=F32, device=device) for shape in shapes]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_equals(compiled(*inputs), model(*inputs), 1e-5)
    for actual, expected in zip(
        gradients(compiled, *inputs), gradients(model, *inputs), strict=True
    ):
        assert_equals(actual, expected, 1e-4)


@pytest.mark.filterwarnings("ignore::flash_attn_ext.FallbackWarning")
def test_dynamic_shapes_do_not_recompile(device: str) -> None:
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fixed_model, fullgraph=True, backend=count, dynamic=True)
    compiled(*fixed_inputs(device, 5))
    compilations = count.frame_count
    for seqlen in (9, 14, 21):
        inputs = fixed_inputs(device, seqlen)
        assert_equals(compiled(*inputs), fixed_model(*inputs), 1e-5)
    assert count.frame_count == compilations


def varlen_model(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    return fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 8, causal=True)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.filterwarnings("ignore::flash_attn_ext.FallbackWarning")
def test_compiled_varlen(dynamic: bool, device: str) -> None:
    inputs = [
        randn(*shape, dtype=F32, device=device) for shape in ((9, 4, 8), (11, 2, 8), (11, 2, 8))
    ]
    lengths = cu_seqlens([4, 5], device), cu_seqlens([8, 3], device)

    def model(*inputs: Tensor) -> Tensor:
        return varlen_model(*inputs, *lengths)

    compiled = torch.compile(varlen_model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    actual = gradients(lambda *x: compiled(*x, *lengths), *inputs)
    for a, b in zip(actual, gradients(model, *inputs), strict=True):
        assert_equals(a, b, 1e-4)


@pytest.mark.filterwarnings("ignore::flash_attn_ext.FallbackWarning")
def test_compiled_max_seqlen_tensor(device: str) -> None:
    q, k, v = (plain(9, 2, 8, device=device) for _ in range(3))
    lengths = cu_seqlens([4, 5], device)

    def model(longest: Tensor) -> Tensor:
        return fa.flash_attn_varlen_func(q, k, v, lengths, lengths, longest, longest)

    longest = torch.tensor(5, dtype=torch.int32)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_equals(compiled(longest), model(longest), 1e-6)


@pytest.mark.filterwarnings("ignore::flash_attn_ext.FallbackWarning")
def test_compiled_dropout_follows_the_generator(device: str) -> None:
    q, k, v = fixed_inputs(device)

    def model(*inputs: Tensor) -> Tensor:
        return fa.flash_attn_func(*inputs, dropout_p=0.5)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    first = gradients(compiled, q, k, v)
    torch.manual_seed(1)
    for a, b in zip(first, gradients(compiled, q, k, v), strict=True):
        assert_equals(a, b, 0.0)
    torch.manual_seed(1)
    for a, b in zip(first, gradients(model, q, k, v), strict=True):
        assert_equals(a, b, 1e-5)
    assert not torch.equal(compiled(q, k, v), compiled(q, k, v))


@pytest.mark.filterwarnings("ignore::flash_attn_ext.FallbackWarning")
def test_compiled_out(device: str) -> None:
    q, k, v = (x.detach() for x in fixed_inputs(device))

    def model(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        fa.flash_attn_func(q, k, v, out=out)
        return 2 * out

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = torch.full_like(q, torch.nan)
    assert_equals(compiled(q, k, v, out), 2 * fa.flash_attn_func(q, k, v), 1e-6)
    assert_equals(out, fa.flash_attn_func(q, k, v), 1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.filterwarnings("ignore::flash_attn_ext.FallbackWarning")
def test_compiled_cache(dynamic: bool, device: str) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], n: Tensor) -> Tensor:
        return fa.flash_attn_with_kvcache(q, *cache, k, v, cache_seqlens=n, causal=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    caches = [tuple(torch.zeros(2, 6, 2, 8, device=device) for _ in "kv") for _ in range(2)]
    for n in range(3):
        q, k, v = (plain(2, 1, heads, 8, device=device) for heads in (4, 2, 2))
        lengths = int32([n, n], device)
        expected = step(q, k, v, caches[0], lengths)
        assert_equals(compiled(q, k, v, caches[1], lengths), expected, 1e-6)
    for a, b in zip(*caches, strict=True):
        assert_equals(a, b, 1e-6)


@pytest.mark.filterwarnings("ignore::flash_attn_ext.FallbackWarning")
def test_inductor() -> None:
    require(NEEDS_CXX)
    inputs = fixed_inputs("cpu")
    compiled = torch.compile(fixed_model, fullgraph=True)
    for a, b in zip(gradients(compiled, *inputs), gradients(fixed_model, *inputs), strict=True):
        assert_equals(a, b, 1e-4)


# ---- torch.export -----------------------------------------------------------------------------


class Decoder(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fa.flash_attn_func(q, k, v, causal=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore::flash_attn_ext.FallbackWarning")
def test_export(strict: bool, device: str) -> None:
    q, k, v = (x.detach() for x in fixed_inputs(device))
    length = torch.export.Dim("length", min=2, max=64)
    keys = torch.export.Dim("keys", min=2, max=64)
    program = torch.export.export(
        Decoder(),
        (q, k, v),
        dynamic_shapes={"q": {1: length}, "k": {1: keys}, "v": {1: keys}},
        strict=strict,
    )
    longer = [x.detach() for x in fixed_inputs(device, seqlen=11)]
    assert_equals(program.module()(*longer), Decoder()(*longer), 1e-6)


# ---- FLOP counter -----------------------------------------------------------------------------


def flops(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.filterwarnings("ignore::flash_attn_ext.FallbackWarning")
def test_flops_of_fixed_length(device: str) -> None:
    q, k, v = fixed_inputs(device)
    pairs = 2 * 4 * 5 * 7
    forward, backward = 4 * pairs * 8, 10 * pairs * 8
    assert flops(lambda: fa.flash_attn_func(q.detach(), k.detach(), v.detach())) == forward
    assert flops(lambda: fa.flash_attn_func(q, k, v).sum().backward()) == forward + backward
    narrow = v.detach()[..., :4]
    assert flops(lambda: fa.flash_attn_func(q.detach(), k.detach(), narrow)) == 2 * pairs * 12


@pytest.mark.filterwarnings("ignore::flash_attn_ext.FallbackWarning")
def test_flops_of_varlen(device: str) -> None:
    q, k, v = (randn(n, 2, 8, dtype=F32, device=device) for n in (9, 11, 11))
    lengths = cu_seqlens([4, 5], device), cu_seqlens([8, 3], device)
    pairs = 2 * (4 * 8 + 5 * 3)

    def run(**options: Any) -> Tensor:
        return fa.flash_attn_varlen_func(q, k, v, *lengths, 5, 8, **options)

    assert flops(lambda: run().sum().backward()) == 14 * pairs * 8
    used = 2 * (4 * 2 + 5 * 3)
    with torch.no_grad():
        assert flops(lambda: run(seqused_k=int32([2, 3], device))) == 4 * used * 8
        assert flops(lambda: run(out=torch.empty_like(q))) == 4 * pairs * 8


def test_flops_where_the_counter_came_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counter:
        registered: ClassVar[list[Any]] = []

        @classmethod
        def register_flop_formula(cls, targets: list[Any], get_raw: bool) -> Callable[..., None]:
            assert get_raw
            return lambda formula: cls.registered.extend(targets)

    monkeypatch.setitem(sys.modules, "torch.utils.flop_counter", Counter)
    _flops.register()
    expected = {OPS.fwd, OPS.fwd_out, OPS.bwd, OPS.varlen_fwd, OPS.varlen_fwd_out, OPS.varlen_bwd}
    assert set(Counter.registered) == expected


def test_flops_where_the_counter_comes_later() -> None:
    """The import of the counter is waited for, a search for it is none, and then nobody waits."""
    code = (
        "import sys, flash_attn_ext, importlib.util; from flash_attn_ext import _after_import as a;"
        "name = 'torch.utils.flop_counter'; importlib.util.find_spec(name);"
        "before = a.is_waited_for(name), name in sys.modules;"
        "counter = importlib.import_module(name); op = flash_attn_ext._schema.op('fwd');"
        "print(*before, a.is_waited_for(name), op.overloadpacket in counter.flop_registry)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "False", "False", "True"], done.stderr


def test_flops_without_values_are_the_largest_possible() -> None:
    q, k, v = (torch.empty(n, 2, 8, device="meta") for n in (9, 11, 11))
    lengths = cu_seqlens([4, 5]).to("meta")
    count = flops(lambda: fa.flash_attn_varlen_func(q, k, v, lengths, lengths, 5, 8))
    assert count == 4 * (2 * 2 * 5 * 8) * 8
