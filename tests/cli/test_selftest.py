"""The selftest passes with the backends as they are and sees a wrong one."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from flash_attn_ext import _load
from flash_attn_ext.cli import main, selftest
from flash_attn_ext.cli.selftest import Backend, Result


def test_quick_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--quick"]) == 0
    out = capsys.readouterr().out
    for case in selftest.CASES:
        assert case.name in out
    assert "tiled on cpu" in out
    assert "0 failed" in out


def test_long_lengths_pass_on_the_cpu() -> None:
    backend = Backend("tiled on cpu", "cpu", "tiled")
    for case in selftest.CASES:
        assert all(r.passed for r in selftest.run_case(backend, case, torch.float32, 300))


def test_a_wrong_backend_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compute = selftest.CASES[0].compute

    def wrong(backend: Backend, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        results = compute(backend, x)
        results["dk"] = results["dk"] * 1.1
        return results

    case = selftest.Case("wrong", selftest.CASES[0].inputs, wrong, selftest.CASES[0].meaning)
    monkeypatch.setattr(selftest, "CASES", (case,))
    monkeypatch.setattr(selftest, "present_backends", lambda: [Backend("b", "cpu", "tiled")])
    assert main(["selftest", "--quick", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is False
    assert {r["tensor"] for r in document["results"] if not r["passed"]} == {"dk"}
    assert main(["selftest", "--quick"]) == 1
    assert "3 failed" in capsys.readouterr().out


def test_the_line_of_a_case_shows_its_failure() -> None:
    good = Result("b", "c", "float16", "out", 0.5, 0.5, True)
    bad = Result("b", "c", "float16", "lse", 0.1, 0.0, False)
    assert selftest._worst([good, bad]) == [bad]


def test_nan_is_an_infinite_error() -> None:
    one, nan = torch.ones(2), torch.tensor([1.0, math.nan])
    infinite = torch.full((2,), -math.inf)
    assert selftest._max_error(nan, one) == math.inf
    assert selftest._max_error(infinite, one) == math.inf
    assert selftest._max_error(infinite, infinite) == 0


def test_backends_follow_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_load, "status", lambda: SimpleNamespace(binder_loaded=True))
    names = [backend.name for backend in selftest.present_backends()]
    assert names == ["tiled on cpu", "tiled on cuda", "kernels on cuda"]
    monkeypatch.setattr(_load, "status", lambda: SimpleNamespace(binder_loaded=False))
    assert len(selftest.present_backends()) == 2
