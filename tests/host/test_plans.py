"""explain and support_table: right problem, right words, without a GPU and without the module."""

from __future__ import annotations

import re
from types import ModuleType, SimpleNamespace
from typing import Any

import expecttest
import pytest
import torch

import flash_attn_ext
from flash_attn_ext import UnsupportedError, _load, plans

explain = plans.explain

Q, KV = (2, 4096, 32, 128), (2, 4096, 8, 128)
POOL = (99, 16, 8, 128)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLASH_ATTN_EXT_BACKEND", "FLASH_ATTN_EXT_ARCH", "FLASH_ATTN_EXT_SMEM_KB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_load.status(), "arch_libraries", {"sm80": None, "sm90": None})


def expect(explanation: object, expected: str) -> None:
    """Compares with the text of a test; sizes of tiles and of launches are their own business."""
    text = re.sub(r", tile \d+ x \d+", ", tile M x N", str(explanation))
    text = re.sub(
        r"\d+ threads, \d+ CTAs, \d+ stage\(s\), 1 split\(s\), \d+ B of shared",
        "C CTAs and S B of shared",
        text,
    ).replace(", workspace 0 B", "")
    expecttest.TestCase().assertExpectedInline(text, expected, skip=1)


def test_package_attribute_is_the_function() -> None:
    q = torch.zeros(1, 2, 1, 8)
    assert flash_attn_ext.explain(q, q, q) == explain(q, q, q)


@pytest.mark.parametrize("device", ["a100", "rtx3090", "rtx4090", "l40s", "b200", "rtx5090"])
def test_forward_on_each_gpu(with_introspect: ModuleType, device: str) -> None:
    found = explain(Q, KV, KV, causal=True, arch=device)
    assert found.backend == "kernel"
    assert found.kernel == "sm80_fwd_hdim128_bf16"
    assert found.attention.tiles == ("sm80" if device in ("a100", "b200") else "sm89")
    assert not found.attention.copies_rows
    assert found.notes == ()
    assert device in str(found)


def test_forward_on_h100(with_introspect: ModuleType) -> None:
    expect(
        explain(Q, KV, KV, causal=True, arch="h100"),
        """\
flash_attn_func on h100 (compute capability 9.0, 132 SMs, 227 KB of shared memory a CTA)
  q [2, 4096, 32, 128], k [2, 4096, 8, 128], v [2, 4096, 8, 128], bf16, causal
  fwd: kernel sm90_fwd_hdim128_bf16 of _sm90, tile M x N, C CTAs and S B of shared memory""",
    )


def test_forward_on_h100_that_sm80_computes(with_introspect: ModuleType) -> None:
    found = explain(Q, KV, KV, dropout_p=0.1, return_attn_probs=True, arch="h100")
    assert found.kernel == "sm80_fwd_hdim128_bf16"
    assert found.reasons[0].startswith("sm90: dmask")


def test_backward_on_rtx4090(with_introspect: ModuleType) -> None:
    expect(
        explain(Q, KV, KV, window_size=(64, 0), dropout_p=0.1, arch="rtx4090", backward=True),
        """\
flash_attn_func on rtx4090 (compute capability 8.9, 128 SMs, 99 KB of shared memory a CTA)
  q [2, 4096, 32, 128], k [2, 4096, 8, 128], v [2, 4096, 8, 128], bf16, causal, window 64, dropout
  fwd: kernel sm80_fwd_hdim128_bf16 of _sm80, tile M x N of sm89, C CTAs and S B of shared memory
    - sm89: no kernel is written for it; its GPUs run the code of sm80
  bwd_preprocess: kernel sm80_bwd_preprocess_bf16 of _sm80, tile M x N, C CTAs and S B of shared \
memory
    - sm89: no kernel is written for it; its GPUs run the code of sm80
  bwd: kernel sm80_bwd_hdim128_bf16 of _sm80, tile M x N of sm89, C CTAs and S B of shared memory, \
workspace 134217728 B
    - sm89: no kernel is written for it; its GPUs run the code of sm80""",
    )


def test_backward_of_what_no_kernel_takes(with_introspect: ModuleType) -> None:
    expect(
        explain(Q, KV, KV, dtype=torch.float32, arch="a100", backward=True),
        """\
flash_attn_func on a100 (compute capability 8.0, 108 SMs, 163 KB of shared memory a CTA)
  q [2, 4096, 32, 128], k [2, 4096, 8, 128], v [2, 4096, 8, 128], fp32
  fwd: PyTorch operations (backends/torch_tiled.py), tile M x N
    - sm80: dtype=fp32: fwd is built for fp16, bf16
  bwd_preprocess: PyTorch operations (backends/torch_tiled.py)
    - part of the same op as bwd, which no kernel computes
  bwd: PyTorch operations (backends/torch_tiled.py), tile M x N
    - sm80: dtype=fp32: bwd is built for fp16, bf16""",
    )


def test_rows_that_are_copied(with_introspect: ModuleType) -> None:
    odd = (2, 100, 4, 59)
    found = explain(odd, odd, odd, arch="a100")
    assert found.attention.copies_rows
    assert "copies rows first" in str(found)
    assert found.kernel == "sm80_fwd_hdim64_bf16"


def cache_call(**options: Any) -> Any:
    new = (4, 1, 8, 128)
    rotary = {"rotary_cos": (4096, 32), "rotary_sin": (4096, 32)}
    call = {"k": new, "v": new, "cache_seqlens": 5, "page_table": (4, 100), **rotary}
    return explain((4, 1, 32, 128), POOL, POOL, **call, causal=True, **options)


def test_cache_on_rtx4090(with_introspect: ModuleType) -> None:
    found = cache_call(arch="rtx4090")
    assert [step.family for step in found.steps] == ["append_kv", "rotary", "decode"]
    assert found.problem["page_size"] == 16
    assert found.problem["seqlen_k"] == 1600
    assert found.function == "flash_attn_with_kvcache"
    assert "sm89: no kernel is written for it" in str(found)
    assert "pages of 16" in found.inputs


class PlannedEverything:
    """An introspection module in whose world every family has a kernel."""

    def __init__(self, real: ModuleType) -> None:
        self.devices, self.kernels, self.asked = real.devices, real.kernels, []

    def make_plan(self, problem: dict[str, Any], device: Any, built: list[str]) -> dict[str, Any]:
        self.asked.append((problem, device, built))
        return {
            "ok": True,
            "reasons": ["sm90: because"],
            "arch": "sm80",
            "kernel": f"sm80_{problem['family']}_bf16",
            "library": "_sm80",
            "tile": (128, 64),
            "tiles": "sm80",
            "num_stages": 2,
            "num_threads": 256,
            "num_ctas": 77,
            "num_splits": 3,
            "head_splits": 1,
            "vectorized": True,
            "smem_bytes": 1024,
            "workspace_bytes": 4096,
        }


@pytest.fixture
def planned(introspect: ModuleType, monkeypatch: pytest.MonkeyPatch) -> PlannedEverything:
    module = PlannedEverything(introspect)
    monkeypatch.setattr(_load.status(), "introspect", module)
    return module


def test_words_of_a_kernel(planned: PlannedEverything) -> None:
    found = explain(Q, KV, KV, arch="h100")
    assert found.kernel == "sm80_fwd_bf16"
    expect(
        found.attention,
        """\
fwd: kernel sm80_fwd_bf16 of _sm80, tile M x N, 256 threads, 77 CTAs, 2 stage(s), 3 split(s), \
1024 B of shared memory, workspace 4096 B
  - sm90: because""",
    )


def test_problems_of_a_cache_call(planned: PlannedEverything, introspect: ModuleType) -> None:
    cache_call(arch="h100", rotary_interleaved=False)
    append, rotary, decode = (problem for problem, _, _ in planned.asked)
    assert append["seqlen_k"] == 1
    assert append["rotary_dim"] == rotary["rotary_dim"] == 64
    assert not append["rotary_interleaved"]
    assert (rotary["num_heads_q"], rotary["seqlen_q"]) == (32, 1)
    assert (decode["family"], decode["seqlen_k"], decode["window_right"]) == ("decode", 1600, 0)
    assert (decode["appends"], decode["leftpad"], decode["broadcast"]) == (True, False, False)
    for problem, device, built in planned.asked:  # the real module knows every field
        assert introspect.make_plan(problem, device, built)["ok"]


def test_problem_of_every_option(planned: PlannedEverything) -> None:
    slopes = torch.zeros(32)
    explain(
        Q, KV, (2, 4096, 8, 64), dtype=torch.float16, arch="h100", softcap=3.0, alibi_slopes=slopes,
        dropout_p=0.5, return_attn_probs=True, deterministic=True, num_splits=7,
        window_size=(None, 5),
    )  # fmt: skip
    problem, device, built = planned.asked[0]
    assert (device, built) == ("h100", ["sm80", "sm90"])
    assert problem == {
        "family": "fwd",
        "dtype": "fp16",
        "batch_size": 2,
        "seqlen_q": 4096,
        "seqlen_k": 4096,
        "total_q": 0,
        "total_k": 0,
        "num_heads_q": 32,
        "num_heads_kv": 8,
        "head_dim": 128,
        "head_dim_v": 64,
        "varlen": False,
        "page_size": 0,
        "leftpad": False,
        "appends": False,
        "broadcast": False,
        "window_left": -1,
        "window_right": 5,
        "softcap": True,
        "alibi": True,
        "dropout": True,
        "dmask": True,
        "positive_scale": True,
        "deterministic": True,
        "num_splits": 7,
        "alignment_bytes": 16,
    }


@pytest.mark.parametrize(
    ("options", "seqlens"),
    [
        ({"cu_seqlens_q": [0, 40, 100]}, (60, 60)),
        ({"cu_seqlens_q": torch.tensor([0, 40, 100]), "cu_seqlens_k": [0, 90, 100]}, (60, 90)),
        ({"cu_seqlens_q": [0, 40, 100], "max_seqlen_q": 64, "max_seqlen_k": 80}, (64, 80)),
        ({"cu_seqlens_q": torch.empty(3, device="meta")}, (100, 100)),
    ],
)
def test_varlen(planned: PlannedEverything, options: dict[str, Any], seqlens: Any) -> None:
    found = explain((100, 32, 128), (100, 8, 128), (100, 8, 128), **options, arch="sm80")
    assert found.function == "flash_attn_varlen_func"
    assert (found.problem["seqlen_q"], found.problem["seqlen_k"]) == seqlens
    assert found.problem["batch_size"] == 2
    assert (found.problem["total_q"], found.problem["total_k"]) == (100, 100)
    assert found.problem["varlen"]


def test_varlen_positional_and_paged(planned: PlannedEverything) -> None:
    q = (100, 32, 128)
    found = explain(q, POOL, POOL, [0, 100], None, 100, block_table=(1, 50), arch="sm80")
    assert found.function == "flash_attn_varlen_func"
    assert (found.problem["page_size"], found.problem["seqlen_k"]) == (16, 800)


def test_varlen_backward_preprocesses_all_tokens_together(planned: PlannedEverything) -> None:
    x = torch.zeros(100, 4, 64, requires_grad=True)
    found = explain(x, x, x, cu_seqlens_q=[0, 40, 100], arch="sm80")
    assert [step.family for step in found.steps] == ["fwd", "bwd_preprocess", "bwd"]
    preprocess = planned.asked[1][0]
    assert (preprocess["batch_size"], preprocess["seqlen_q"]) == (1, 100)


def test_form_can_be_named(planned: PlannedEverything) -> None:
    found = explain((4, 1, 32, 128), KV, KV, form="kvcache", arch="sm80")
    assert found.function == "flash_attn_with_kvcache"
    assert [step.family for step in found.steps] == ["decode"]


@pytest.mark.parametrize(("storage_offset", "expected"), [(0, 16), (8, 16), (4, 8), (2, 4), (1, 2)])
def test_alignment(planned: PlannedEverything, storage_offset: int, expected: int) -> None:
    base = torch.zeros(1000, dtype=torch.bfloat16)
    q = base[storage_offset:].as_strided((1, 2, 2, 16), (64, 32, 16, 1), storage_offset)
    explain(q, q, q, arch="sm80")
    assert planned.asked[0][0]["alignment_bytes"] == expected
    strided = base.as_strided((1, 2, 2, 8), (48, 24, 12, 1))
    explain(strided, strided, strided, arch="sm80")
    assert planned.asked[1][0]["alignment_bytes"] == 8


def test_cpu_tensors() -> None:
    q = torch.zeros(1, 4, 2, 8, requires_grad=True)
    found = explain(q, q, q)
    assert found.device == "cpu"
    assert {step.backend for step in found.steps} == {"torch_tiled"}
    assert found.steps[0].reasons == ("kernels need CUDA tensors",)
    assert "tile 4 x" in str(found)


def test_cuda_tensors_are_planned_with_the_facts_of_their_gpu(
    planned: PlannedEverything, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {
        "major": 9,
        "minor": 0,
        "multi_processor_count": 132,
        "shared_memory_per_block_optin": 232448,
        "L2_cache_size": 50 << 20,
    }
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**facts)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")

    class FakeCuda(torch.Tensor):
        is_cuda = True

    q = torch.zeros(1, 4, 2, 8).as_subclass(FakeCuda)
    found = explain(q, q, q)
    assert found.device.startswith("Some GPU (compute capability 9.0, 132 SMs, 227 KB")
    assert planned.asked[0][1] == {
        "sm_major": 9,
        "sm_minor": 0,
        "num_sms": 132,
        "max_smem_bytes": 232448,
        "l2_bytes": 50 << 20,
    }


def test_tiled_backend_asked_for(
    with_introspect: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_ATTN_EXT_BACKEND", "tiled")
    found = explain(Q, KV, KV, arch="h100")
    assert found.reasons == ("FLASH_ATTN_EXT_BACKEND=tiled asks for PyTorch operations",)


def test_forced_architecture(planned: PlannedEverything, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_EXT_ARCH", "sm80")
    found = explain(Q, KV, KV, arch="h100")
    assert planned.asked[0][2] == ["sm80"]
    assert found.notes == ("FLASH_ATTN_EXT_ARCH=sm80 leaves only that library",)


def test_less_shared_memory(with_introspect: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_EXT_SMEM_KB", "99")
    found = explain(Q, KV, KV, arch="h100")
    assert found.attention.tiles == "sm89"
    assert "99 KB of shared memory a CTA" in found.device
    assert found.notes == ("FLASH_ATTN_EXT_SMEM_KB leaves a CTA 99 KB at most",)
    monkeypatch.setenv("FLASH_ATTN_EXT_SMEM_KB", "500")  # never more than the device has
    assert explain(Q, KV, KV, arch="h100").attention.tiles == "sm90"
    for text in ("99KB", "0", "-1", "4096"):
        monkeypatch.setenv("FLASH_ATTN_EXT_SMEM_KB", text)
        with pytest.raises(ValueError, match=f"FLASH_ATTN_EXT_SMEM_KB={text}: expected"):
            explain(Q, KV, KV, arch="h100")


def test_installation_without_libraries(
    with_introspect: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_load.status(), "arch_libraries", {})
    (note,) = explain(Q, KV, KV, arch="h100").notes
    assert note.startswith("this installation has no kernel libraries")
    assert note.endswith("full build (sm80, sm90)")


@pytest.mark.usefixtures("without_introspect")
def test_no_introspection_module() -> None:
    found = explain(Q, KV, KV, arch="h100")
    assert found.backend == "unknown"
    assert "no _introspect module for Python 3." in str(found)
    assert "pip install pybind11" in str(found)
    q = torch.zeros(1, 4, 2, 8)
    assert explain(q, q, q).backend == "torch_tiled"  # needs no plan
    with pytest.raises(UnsupportedError, match="pip install pybind11"):
        plans.support_table()


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((Q, KV, KV), {}, ValueError, "arch: got None"),
        ((Q, KV, KV), {"arch": "voodoo2"}, ValueError, "arch: got 'voodoo2', expected one of a100"),
        ((Q, KV, KV), {"arch": "h100", "form": "ring"}, ValueError, "form: got 'ring'"),
        ((Q, KV, KV), {"arch": "h100", "causel": True}, TypeError, "causel"),
        ((Q, KV, KV), {"arch": "h100", "dtype": torch.int8}, ValueError, "torch.int8"),
        (((2, 4, 8), KV, KV), {"arch": "h100"}, ValueError, r"q: got \[2, 4, 8\], expected"),
        (("q", KV, KV), {"arch": "h100"}, TypeError, "q: got str, expected a tensor or its shape"),
    ],
)
def test_bad_arguments(
    with_introspect: ModuleType, args: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        explain(*args, **options)


NOT_SM90 = {"fwd": ("S_dmask",)}
ARCHS = ["sm80", "sm86", "sm89", "sm90", "sm100", "sm120"]


def test_support_table(with_introspect: ModuleType) -> None:
    rows = plans.support_table()
    assert {row["family"] for row in rows} == set(with_introspect.families())
    for row in rows:
        assert list(row) == ["family", "feature", *ARCHS, "cpu"]
        assert row["cpu"] == "PyTorch"
        found = [row[arch] for arch in ARCHS]
        attention = row["family"] in ("fwd", "bwd", "decode")
        if row["feature"] in (("fp32", "fp64") if attention else ("fp64",)):
            assert found == ["PyTorch"] * 6, row
        else:
            own = row["feature"] not in NOT_SM90.get(row["family"], ())
            assert found == ["_sm90" if own and a == "sm90" else "_sm80" for a in ARCHS], row


def test_support_markdown(with_introspect: ModuleType) -> None:
    lines = plans.support_markdown().splitlines()
    assert lines[0] == "| op | features | sm80 | sm86 | sm89 | sm90 | sm100 | sm120 | cpu |"
    assert {line.count("|") for line in lines} == {10}
    assert "| combine | fp16, bf16, fp32 | _sm80 | _sm80 | _sm80 | _sm90" in "\n".join(lines)
