"""info, kernels and explain, and the command line itself."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import NEEDS_INTROSPECT, require

from flash_attn_ext import _load
from flash_attn_ext.cli import COMMANDS, _build_tools, _environment, _output, explain, info, main

STATUS = SimpleNamespace(
    build_info={
        "version": "0.1.0",
        "kernels": [{"object": "a.o", "name": "combine", "registers": 40, "spill_store_bytes": 0}],
    },
    arch_libraries={"sm80": Path(__file__)},
    introspect=SimpleNamespace(
        kernels=lambda: [{"arch": "sm80", "family": "combine", "dtype": "fp16", "head_dim": 0}]
    ),
)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for command in COMMANDS:
        assert command.__name__.rpartition(".")[2] in out


@pytest.mark.parametrize("words", [[], ["nonsense"], ["info", "--nonsense"]])
def test_words_that_are_not_understood(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_as_a_process() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "flash_attn_ext", "info", "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    document = json.loads(result.stdout)
    assert document["environment"]["torch_version"] == torch.__version__
    assert document["backends"][0] == {
        "name": "tiled PyTorch on cpu",
        "live": True,
        "reason": "every op",
    }


def test_a_reader_that_stops_early_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "flash_attn_ext", "info"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()  # long before the command prints
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "BrokenPipeError" not in errors


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"torch          {torch.__version__}" in out
    assert "tiled PyTorch on cpu: every op" in out


@pytest.fixture
def gpu_machine() -> dict[str, Any]:
    """Fields of an environment with an H100 and a full build."""
    return {
        "arch_libraries": ("sm80", "sm90"),
        "arch_names": ("sm80", "sm90"),
        "binder_loaded": True,
        "cuda_available": True,
        "torch_cuda": "13.0",
        "gpus": (_environment.Gpu("NVIDIA H100", (9, 0), 80.0),),
        "driver": "580.1",
        "driver_problem": "",
        "build_info": {"local_version": "cu13torch2.10", "archs": ["sm80", "sm90"], "x": [{}]},
    }


def environment(**changes: Any) -> _environment.Environment:
    import dataclasses

    return dataclasses.replace(_environment.collect(), **changes)


def test_info_on_a_gpu_machine(
    gpu_machine: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    env = environment(**gpu_machine)
    monkeypatch.setattr(_environment, "collect", lambda: env)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA H100, sm90, 80 GiB" in out
    assert "flash_attn_ext-0.1.0+cu13torch2.10" in out
    assert "archs: sm80, sm90" in out
    assert all(backend.live for backend in info.backends(env))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arch_libraries": ("sm80",)}, "not in this installation"),
        ({"binder_loaded": False, "load_problems": ("no symbol",)}, "no symbol"),
        ({"binder_loaded": False, "load_problems": ()}, "is not loaded"),
        ({"cuda_available": False}, "torch sees no GPU"),
        ({"cuda_available": False, "torch_cuda": None}, "torch is CPU-only"),
        ({"driver_problem": "driver too old"}, "driver too old"),
        ({"gpus": (_environment.Gpu("A100", (8, 0), 80.0),)}, "no GPU of this machine runs it"),
    ],
)
def test_why_kernels_are_not_live(
    gpu_machine: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    sm90 = info.backends(environment(**gpu_machine | changes))[-1]
    assert sm90.name == "kernels sm90"
    assert not sm90.live
    assert reason in sm90.reason


def test_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_load, "status", lambda: STATUS)
    assert main(["kernels"]) == 0
    out = capsys.readouterr().out
    assert "_sm80" in out
    assert "spill_store_bytes" in out
    assert "family" in out
    assert main(["kernels", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kernels"][0]["registers"] == 40
    assert document["instances"][0]["arch"] == "sm80"
    assert document["libraries"]["sm80"] == Path(__file__).stat().st_size


def test_kernels_of_a_source_tree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = SimpleNamespace(build_info=None, arch_libraries={}, introspect=None)
    monkeypatch.setattr(_load, "status", lambda: bare)
    assert main(["kernels"]) == 0
    out = capsys.readouterr().out
    assert "none in this installation" in out
    assert "there is no _introspect module" in out


def test_explain_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        require(NEEDS_INTROSPECT)
    assert main("explain b=2 h=32 hk=8 sq=4096 d=128 causal backward".split()) == 0
    out = capsys.readouterr().out
    assert "flash_attn_func on" in out
    assert "q [2, 4096, 32, 128], k [2, 4096, 8, 128]" in out
    assert "bwd:" in out


def test_explain_json_for_a_named_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    code = main("explain b=4 sq=1 sk=1000 h=8 page=16 new=1 rotary=64 --arch sm90 --json".split())
    document = json.loads(capsys.readouterr().out)
    assert document["function"] == "flash_attn_with_kvcache"
    assert document["problem"]["page_size"] == 16
    assert [step["family"] for step in document["steps"]] == ["append_kv", "rotary", "decode"]
    unknown = _load.status().introspect is None
    assert code == int(unknown)


def test_support_table(capsys: pytest.CaptureFixture[str]) -> None:
    if _load.status().introspect is None:
        assert main(["explain", "--support"]) == 2
        assert "has no _introspect module" in capsys.readouterr().err
    require(NEEDS_INTROSPECT)
    assert main(["explain", "--support"]) == 0
    assert "combine" in capsys.readouterr().out
    assert main(["explain", "--support", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("d=64 dv=128", {"head_dim": 64, "head_dim_v": 128}),
        ("sq=100 sk=200 varlen b=3", {"seqlen_q": 100, "seqlen_k": 200, "varlen": True}),
        ("window=128,0", {"window_left": 128, "window_right": 0}),
        ("window=7", {"window_left": 7, "window_right": 7}),
        ("softcap=30 alibi dropout=0.1", {"softcap": True, "alibi": True, "dropout": True}),
        ("dtype=fp16 deterministic", {"dtype": "fp16", "deterministic": True}),
        ("cache sq=1 sk=300 splits=4", {"family": "decode", "seqlen_k": 300, "num_splits": 4}),
        ("h=12 hk=3", {"num_heads_q": 12, "num_heads_kv": 3}),
    ],
)
def test_words_become_a_problem(
    words: str, problem: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["explain", *words.split(), "--json"])
    found = json.loads(capsys.readouterr().out)["problem"]
    assert {name: found[name] for name in problem} == problem


@pytest.mark.parametrize(
    "word", ["z=1", "b=two", "causal=1", "dtype=int8", "window=a", "b", "softcap=x"]
)
def test_a_word_that_is_not_understood(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", word]) == 2
    assert f"{word!r} is not understood; expected one of b=" in capsys.readouterr().err


def test_words_that_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "page=16", "backward"]) == 2
    assert "page and backward exclude each other" in capsys.readouterr().err


def test_interleaved_rotary() -> None:
    options = explain.call_options(explain.parse_words(["new=2", "rotary=32", "interleaved"]))
    assert options["rotary_interleaved"] is True
    assert options["rotary_cos"] == (1026, 16)


def test_table() -> None:
    assert _output.table(["name", "n"], [["a", 5], ["long name", None]]).splitlines() == [
        "name       n",
        "---------  -",
        "a          5",
        "long name  -",
    ]


def test_json_of_something_odd_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot write set as JSON"):
        _output.print_json({"a": {1}})


def test_the_tools_of_the_build_are_found() -> None:
    assert _build_tools.archs.libraries_for_capability(9, 0)
    with pytest.raises(ModuleNotFoundError):
        _build_tools._load("no_such_module")


def test_the_package_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["flash_attn_ext", "kernels"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("flash_attn_ext", run_name="__main__")
    assert stopped.value.code == 0
