"""Code written for flash-attn, on these kernels: names, results, and who may shadow whom."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import blocks as blocks_of_text
import pytest
import torch
from helpers import (
    NEEDS_TORCH_2_11,
    assert_equals,
    cu_seqlens,
    int32,
    needs_module,
    randn,
    require,
)
from torch import Tensor

import flash_attn_ext as fa
from flash_attn_ext import cli, compat
from flash_attn_ext.cli import _environment
from flash_attn_ext.cli import run as run_command
from flash_attn_ext.compat import blocks
from flash_attn_ext.integrations import sdpa
from flash_attn_ext.layers import rotary

REPOSITORY = Path(__file__).parents[2]

IMPORTED_BY_REAL_CODE = {
    "flash_attn": (
        "__version__ flash_attn_func flash_attn_kvpacked_func flash_attn_qkvpacked_func "
        "flash_attn_varlen_func flash_attn_varlen_kvpacked_func flash_attn_varlen_qkvpacked_func "
        "flash_attn_with_kvcache"
    ),
    "flash_attn.flash_attn_interface": (
        "flash_attn_func flash_attn_varlen_func _flash_attn_forward _flash_attn_backward "
        "_flash_attn_varlen_forward _flash_attn_varlen_backward _wrapped_flash_attn_forward "
        "_wrapped_flash_attn_backward maybe_contiguous"
    ),
    "flash_attn.bert_padding": (
        "index_first_axis index_put_first_axis pad_input unpad_input "
        "unpad_input_for_concatenated_sequences"
    ),
    "flash_attn.layers.rotary": (
        "RotaryEmbedding apply_rotary_emb apply_rotary_emb_func apply_rotary_emb_kv_ "
        "apply_rotary_emb_qkv_"
    ),
    "flash_attn.ops.triton.rotary": "apply_rotary",
    "flash_attn.ops.triton.layer_norm": "RMSNorm layer_norm_fn rms_norm_fn",
    "flash_attn.ops.triton.cross_entropy": "cross_entropy_loss",
    "flash_attn.ops.layer_norm": "DropoutAddLayerNorm dropout_add_layer_norm layer_norm",
    "flash_attn.ops.rms_norm": "DropoutAddRMSNorm RMSNorm dropout_add_rms_norm rms_norm",
    "flash_attn.ops.activations": "swiglu",
    "flash_attn.losses.cross_entropy": "CrossEntropyLoss",
    "flash_attn.modules.mha": (
        "MHA FlashSelfAttention FlashCrossAttention get_alibi_slopes "
        "flash_attn_varlen_kvpacked_func"
    ),
    "flash_attn_2_cuda": "fwd varlen_fwd bwd varlen_bwd fwd_kvcache",
    "flash_attn_interface": (
        "flash_attn_combine flash_attn_func flash_attn_qkvpacked_func flash_attn_varlen_func "
        "flash_attn_with_kvcache get_scheduler_metadata"
    ),
    "flash_attn_3.flash_attn_interface": "flash_attn_func flash_attn_varlen_func",
}


@pytest.fixture(autouse=True)
def _disabled() -> Iterator[None]:
    for name in ("flash_attn", "flash_attn_interface"):
        assert compat.real_module(name) is None, "the tests need an environment without flash-attn"
    yield
    compat.disable()


@pytest.fixture
def enabled() -> None:
    compat.enable(fa3=True)


# ---- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", list(IMPORTED_BY_REAL_CODE))
@pytest.mark.usefixtures("enabled")
def test_names(module: str) -> None:
    imported = importlib.import_module(module)
    assert Path(imported.__file__ or "").is_relative_to(compat.FOLDER)
    for name in IMPORTED_BY_REAL_CODE[module].split():
        assert hasattr(imported, name), name
    for name in getattr(imported, "__all__", []):
        assert hasattr(imported, name), name


@pytest.mark.usefixtures("enabled")
def test_metadata() -> None:
    assert importlib.metadata.version("flash-attn") == "2.8.3"
    assert importlib.metadata.version("flash_attn_3") == "3.0.0"
    names = importlib.metadata.packages_distributions()
    assert names["flash_attn"] == ["flash-attn"]
    assert names["flash_attn_interface"] == ["flash-attn-3"]
    assert importlib.import_module("flash_attn").__flash_attn_ext__


@pytest.mark.usefixtures("enabled")
def test_what_is_missing_fails_to_import() -> None:
    """As in a flash-attn that was built without it, so that code falls back as it does there."""
    with pytest.raises(ImportError):
        importlib.import_module("flash_attn.ops.fused_dense")


@pytest.mark.usefixtures("enabled")
def test_einops_under_the_names_of_bert_padding() -> None:
    padding = importlib.import_module("flash_attn.bert_padding")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        padding.nothing  # noqa: B018
    require(needs_module("einops"))
    assert padding.rearrange(torch.zeros(2, 3), "a b -> b a").shape == (3, 2)


@pytest.mark.usefixtures("enabled")
def test_options_that_transformers_reads_from_the_signature() -> None:
    function = importlib.import_module("flash_attn").flash_attn_varlen_func
    names = inspect.signature(function).parameters
    assert {"dropout_p", "window_size", "softcap", "deterministic", "s_aux"} <= set(names)


# ---- results ----------------------------------------------------------------------------------


def sample(device: str, heads: tuple[int, int] = (4, 2)) -> tuple[Tensor, Tensor, Tensor]:
    new = {"dtype": torch.float32 if device == "cpu" else torch.bfloat16, "device": device}
    return (
        randn(2, 7, heads[0], 16, **new),
        randn(2, 12, heads[1], 16, **new),
        randn(2, 12, heads[1], 16, **new),
    )


@pytest.mark.usefixtures("enabled")
def test_fa2_and_fa3_differ_in_their_fourth_argument(device: str) -> None:
    q, k, v = (x.detach() for x in sample(device))
    fa2 = importlib.import_module("flash_attn")
    fa3 = importlib.import_module("flash_attn_interface")
    expected = fa.flash_attn_func(q, k, v, softmax_scale=0.3, causal=True)
    assert torch.equal(fa2.flash_attn_func(q, k, v, 0.0, 0.3, True), expected)
    assert torch.equal(fa3.flash_attn_func(q, k, v, 0.3, True), expected)
    out, lse = fa3.flash_attn_func(q, k, v, 0.3, True, return_attn_probs=True)
    assert torch.equal(out, expected)
    assert lse.shape == (2, 4, 7)


@pytest.mark.usefixtures("enabled")
def test_fa3_functions(device: str) -> None:
    q, k, v = (x.detach() for x in sample(device))
    fa3 = importlib.import_module("flash_attn_interface")
    lengths = (cu_seqlens([7, 7], device), cu_seqlens([12, 12], device), 7, 12)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    used = int32([3, 12], device)
    out = fa3.flash_attn_varlen_func(*flat, *lengths, None, used, 0.3, True)
    expected = fa.flash_attn_varlen_func(
        *flat, *lengths, seqused_k=used, softmax_scale=0.3, causal=True
    )
    assert torch.equal(out, expected)

    qkv = torch.cat([q, k[:, :7], v[:, :7]], 2)
    out = fa3.flash_attn_qkvpacked_func(qkv, 0.3, True, num_heads_q=4)
    assert torch.equal(out, fa.flash_attn_func(q, k[:, :7], v[:, :7], 0.0, 0.3, True))

    out, lse, *partial = fa3.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=used, causal=True, return_softmax_lse=True
    )
    assert torch.equal(out, fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=used, causal=True))
    assert [x.numel() for x in (lse, *partial)] == [2 * 4 * 7, 0, 0]
    assert torch.equal(
        out, fa3.flash_attn_with_kvcache(q, k, v, None, None, cache_seqlens=used, causal=True)
    )


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    (out, lse), *rest = parts
    for other, other_lse in rest:
        out, lse = fa.merge_states(out, lse, other, other_lse)
    return out, lse


def test_blocks_are_enough_for_ring_attention(device: str) -> None:
    """Forward and backward over two parts of the keys, with the log-sum-exp of both."""
    q, k, v = sample(device)
    options = (0.0, 0.3, False, -1, -1, 0.0, None)
    expected = fa.flash_attn_func(q, k, v, softmax_scale=0.3)
    dout = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (q, k, v), dout)
    with torch.no_grad():
        parts = [(k[:, :5], v[:, :5]), (k[:, 5:], v[:, 5:])]
        states = [blocks.forward(q, x, y, *options, False)[:2] for x, y in parts]
        out, lse = merged(states)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, (x, y) in enumerate(parts):
            rows = slice(0, 5) if i == 0 else slice(5, None)
            part = torch.empty_like(q)
            delta = blocks.backward(
                dout, q, x, y, out, lse, part, dk[:, rows], dv[:, rows], *options, False
            )
            dq += part
    tolerance = 1e-5 if device == "cpu" else 0.03
    assert_equals(out, expected, tolerance)
    assert_equals(delta, (dout.double() * out.double()).sum(-1).transpose(1, 2), tolerance * 10)
    for name, x, y in zip(("dq", "dk", "dv"), (dq, dk, dv), gradients, strict=True):
        assert_equals(x, y, tolerance, name=name)


@pytest.mark.usefixtures("enabled")
def test_compiled_module_with_dropout(device: str) -> None:
    """Packed and padded forms of a call agree; the backward draws the forward's mask again."""
    cuda = importlib.import_module("flash_attn_2_cuda")
    q, k, v = (x.detach() for x in sample(device, heads=(4, 4)))
    options = (True, -1, -1, 0.0)
    torch.manual_seed(1)
    out, lse, dmask, rng = cuda.fwd(q, k, v, None, None, 0.5, 0.3, *options, True, None)
    torch.manual_seed(1)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    lengths = (cu_seqlens([7, 7], device), cu_seqlens([12, 12], device))
    packed = cuda.varlen_fwd(
        *flat, None, *lengths, None, None, None, None, 7, 12, 0.5, 0.3, False, *options, True, None
    )
    assert torch.equal(packed[0].view_as(out), out)
    assert torch.equal(packed[2], dmask)
    assert dmask.shape == (2, 4, 128, 128)
    assert (rng.dtype, rng.shape) == (torch.int64, (2,))

    dout = torch.randn_like(out)
    *gradients, delta = cuda.bwd(
        dout, q, k, v, out, lse, None, None, None, None, 0.5, 0.3, *options, True, None, rng
    )
    buffers = [torch.full_like(x, torch.nan) for x in flat]
    returned = cuda.varlen_bwd(
        dout.flatten(0, 1), *flat, *packed[:2], *buffers, *lengths, None, 7, 12, 0.5, 0.3, False,
        *options, True, None, packed[3],
    )  # fmt: skip
    for x, y, z in zip(gradients, buffers, returned[:3], strict=True):
        assert y is z
        assert torch.equal(x, y.view_as(x))
    assert torch.equal(delta, returned[3].view(4, 2, 7).transpose(0, 1))
    # <dout, out> = <dv, v>, because out is linear in v: only with the same mask.
    forward, backward = (
        (x.double() * y.double()).sum() for x, y in ((dout, out), (gradients[2], v))
    )
    assert abs(forward - backward) < (1e-4 if device == "cpu" else 0.3)

    with pytest.raises(fa.UnsupportedError, match="gen_: got a generator"):
        cuda.fwd(q, k, v, None, None, 0.5, 0.3, *options, True, torch.Generator())
    with pytest.raises(fa.UnsupportedError, match="rng_state: got None with dropout_p"):
        cuda.bwd(dout, q, k, v, out, lse, None, None, None, None, 0.5, 0.3, *options, True, None)
    with pytest.raises(fa.UnsupportedError, match="leftpad_k: got a tensor"):
        blocks.varlen_forward(
            *flat, *lengths, 7, 12, 0.0, 0.3, False, leftpad_k=int32([0, 0], device)
        )


@pytest.mark.usefixtures("enabled")
def test_compiled_module_with_cache(device: str) -> None:
    cuda = importlib.import_module("flash_attn_2_cuda")
    q, k, v = (x.detach() for x in sample(device))
    used = int32([9, 12], device)
    buffer = torch.empty_like(q)
    out, lse = cuda.fwd_kvcache(
        q, k, v, None, None, used, None, None, None, None, None, None, buffer, 0.3, True, -1, -1,
        0.0, False, 0,
    )  # fmt: skip
    assert out is buffer
    expected, expected_lse = fa.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=used, softmax_scale=0.3, causal=True, return_softmax_lse=True
    )
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.usefixtures("enabled")
def test_rotary_of_triton_rotates_back(device: str) -> None:
    apply_rotary = importlib.import_module("flash_attn.ops.triton.rotary").apply_rotary
    x = randn(2, 7, 4, 16, dtype=torch.float32, device=device).detach()
    angles = torch.rand(20, 8, device=device) * 6.3
    tables = (angles.cos(), angles.sin())
    offsets = int32([3, 13], device)
    turned = apply_rotary(x, *tables, offsets, interleaved=True)
    assert torch.equal(
        turned, rotary.apply_rotary_emb(x, *tables, interleaved=True, seqlen_offsets=offsets)
    )
    back = apply_rotary(turned, *tables, offsets, interleaved=True, conjugate=True)
    assert_equals(back, x, 1e-5)


def test_examples_of_the_docs() -> None:
    text = (REPOSITORY / "docs" / "integrations.md").read_text(encoding="utf-8")
    examples = blocks_of_text.fenced_code(text, "python")
    assert len(examples) == 2
    require(NEEDS_TORCH_2_11)
    try:
        for code in examples:
            exec(compile(code, "integrations.md", "exec"), {"__name__": "docs"})
    finally:
        sdpa.restore()


# ---- who may shadow whom ----------------------------------------------------------------------


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another flash_attn, installed."""
    folder = tmp_path / "flash_attn"
    folder.mkdir()
    (folder / "__init__.py").write_text("__version__ = '2.7.0'\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_enable_and_disable(capsys: pytest.CaptureFixture[str]) -> None:
    assert not compat.is_enabled()
    compat.enable()
    compat.enable()
    assert capsys.readouterr().err.splitlines() == [
        "flash_attn_ext: import flash_attn gives flash_attn_ext in this process"
    ]
    assert compat.is_enabled()
    assert not compat.is_enabled(fa3=True)
    importlib.import_module("flash_attn.layers.rotary")
    compat.disable()
    assert not compat.is_enabled()
    assert not [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]
    with pytest.raises(ImportError):
        importlib.import_module("flash_attn")


def test_a_real_one_is_not_shadowed_unless_told(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ImportError, match=r"got a real flash_attn in .*pip uninstall flash-attn"):
        compat.enable()
    assert not compat.is_enabled()
    compat.enable(force=True)
    assert compat.is_enabled()
    compat.disable()

    monkeypatch.setattr(compat, "installed_file", lambda: tmp_path / compat.INSTALLED_NAME)
    with pytest.raises(ImportError, match="got a real flash_attn"):
        compat.install()
    assert cli.main(["compat", "install"]) == 1
    assert cli.main(["run", "script.py"]) == 1
    assert not (tmp_path / compat.INSTALLED_NAME).exists()


def test_one_that_was_imported_is_never_replaced(real: Path) -> None:
    importlib.import_module("flash_attn")
    try:
        with pytest.raises(ImportError, match="that has imported flash_attn from"):
            compat.enable(force=True)
    finally:
        del sys.modules["flash_attn"]


def test_a_folder_without_init_is_no_flash_attn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert compat.real_module("flash_attn") is None


def test_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / compat.INSTALLED_NAME
    monkeypatch.setattr(compat, "installed_file", lambda: file)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert cli.main(["compat", "remove"]) == 0
    assert cli.main(["compat", "status"]) == 0
    assert cli.main(["compat", "install", "--fa3"]) == 0
    assert "not installed" in capsys.readouterr().out
    assert file.read_text().splitlines() == [str(x) for x in compat.folders(fa3=True)]
    site.addsitedir(str(tmp_path))  # what Python does with site-packages when it starts
    assert compat.is_enabled(fa3=True)
    assert importlib.metadata.version("flash-attn") == compat.VERSION
    assert importlib.import_module("flash_attn").flash_attn_func is fa.flash_attn_func
    assert cli.main(["compat", "status"]) == 0
    assert "import flash_attn: these kernels" in capsys.readouterr().out
    assert cli.main(["compat", "remove"]) == 0
    assert not file.exists()


def test_doctor_knows_its_own_alias() -> None:
    assert "flash-attn" not in _environment.neighbours()
    compat.enable()
    assert _environment.neighbours()["flash-attn"].startswith("2.8.3 (these kernels")


def test_where_it_is_installed() -> None:
    assert compat.installed_file().parent.name in ("site-packages", "dist-packages")


# ---- python -m flash_attn_ext run -------------------------------------------------------------

PROGRAM = """
import multiprocessing, sys

import torch

def outside(value):
    from flash_attn import flash_attn_func
    x = torch.full((1, 3, 1, 8), value)
    return flash_attn_func(x, x, x, causal=True).sum().item()

if __name__ == "__main__":
    import flash_attn
    from flash_attn.bert_padding import unpad_input
    from importlib.metadata import version
    print(flash_attn.__flash_attn_ext__, version("flash-attn"), unpad_input.__module__)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        total = pool.map(outside, [2.0])
    print(sys.argv[1:], total, sys.flags.optimize)
    sys.exit(3)
"""


def test_run_a_script(tmp_path: Path) -> None:
    """As a fresh interpreter with its arguments, exit status, switches and child processes."""
    script = tmp_path / "train.py"
    script.write_text(PROGRAM)
    done = subprocess.run(
        [
            sys.executable,
            "-O",
            "-m",
            "flash_attn_ext",
            "run",
            str(script),
            "--fa3",
            "-x",
            "1",
        ],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "FLASH_ATTN_EXT_SOURCE_TREE": "1"},
        check=False,
    )
    assert done.stdout.splitlines() == [
        "True 2.8.3 flash_attn_ext.bert_padding",
        "['--fa3', '-x', '1'] [48.0] 1",
    ], done.stderr
    assert done.returncode == 3


def test_command_of_run(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], str]] = []
    monkeypatch.setattr(
        os, "execve", lambda path, command, env: started.append((command, env["PYTHONPATH"]))
    )
    monkeypatch.setenv("PYTHONPATH", "mine")
    cli.main(["run", "--fa3", "-m", "package.train", "--epochs", "3"])
    ((command, path),) = started
    assert command[0] == sys.executable
    assert command[-4:] == ["-m", "package.train", "--epochs", "3"]
    assert path.split(os.pathsep)[:3] == [*map(str, compat.folders(fa3=True)), "mine"]
    assert run_command.environment(False)["PYTHONPATH"].split(os.pathsep)[1] == "mine"
