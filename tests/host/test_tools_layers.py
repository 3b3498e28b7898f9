"""tools/check_layers.py: which includes, assembly and names it refuses, and that csrc/ is clean."""

from __future__ import annotations

from pathlib import Path

import check_layers
import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    """A csrc/ folder with one header in core/, ptx/, kernels/ and plan/."""
    for name in ("core/mask.h", "ptx/math.h", "kernels/sm80/fwd.cuh", "plan/plan.h"):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True)
        path.write_text("#pragma once\n")
    return tmp_path / "csrc"


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("core/split.h", "#include <cstdint>"),
        ("core/split.h", '#include "core/mask.h"'),
        ("kernels/sm90/fwd.cuh", '#include "core/mask.h"\n#include "ptx/math.h"'),
        ("kernels/sm90/fwd.cuh", "#include <cuda_fp16.h>"),
        ("ptx/mma.h", 'asm volatile("mma.sync" ::);'),
        ("plan/plan.cpp", '#include <vector>\n#include "core/mask.h"'),
        (
            "bindings/ops.cpp",
            "#include <torch/csrc/stable/library.h>\nauto x = torch::stable::f();",
        ),
        ("tests/test_core.cpp", '#include <cstdio>\n#include "plan/plan.h"'),
        ("core/split.h", '// #include "ptx/math.h" and asm in a comment\n/* torch:: */'),
        ("core/split.h", 'const char* text = "asm torch::Tensor";'),
    ],
)
def test_allowed(csrc: Path, file: str, code: str) -> None:
    (csrc / file).parent.mkdir(exist_ok=True, parents=True)
    (csrc / file).write_text(code)
    assert list(check_layers.problems(csrc)) == []


@pytest.mark.parametrize(
    ("file", "code", "problem"),
    [
        ("core/split.h", '#include "ptx/math.h"', "ptx/ is a layer above"),
        ("core/split.h", "#include <cuda_fp16.h>", "must not include <cuda_fp16.h>"),
        ("core/split.h", "#include <vector>", "must not include <vector>"),
        ("plan/plan.cpp", '#include "kernels/sm80/fwd.cuh"', "kernels/ is a layer above or beside"),
        ("plan/plan.cpp", "#include <cuda_runtime.h>", "must not include"),
        ("kernels/sm80/bwd.cuh", '#include "plan/plan.h"', "plan/ is a layer above"),
        ("kernels/sm80/bwd.cuh", "#include <torch/extension.h>", "must not include"),
        ("kernels/sm80/bwd.cuh", 'asm("trap;");', "inline assembly outside ptx/"),
        ("kernels/sm80/bwd.cuh", "at::Tensor x;", "at:: outside bindings/"),
        ("bindings/ops.cpp", "#include <torch/extension.h>", "must not include"),
        (
            "bindings/ops.cpp",
            '#include "kernels/sm80/fwd.cuh"',
            "kernels/ is a layer above or beside",
        ),
        ("kernels/sm80/bwd.cuh", '#include "fwd.cuh"', "is not a header of csrc/"),
        ("core/split.h", '#include "core/missing.h"', "is not a header of csrc/"),
        ("misc/a.h", "", "not in a layer folder"),
    ],
)
def test_refused(csrc: Path, file: str, code: str, problem: str) -> None:
    (csrc / file).parent.mkdir(exist_ok=True, parents=True)
    (csrc / file).write_text(f"// first line\n{code}\n")
    (found,) = check_layers.problems(csrc)
    assert problem in found
    assert found.startswith(f"{csrc / file}:{1 if file == 'misc/a.h' else 2}: ")


def test_main(csrc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_layers.main([str(csrc)]) == 0
    assert "layers: ok (4 files)" in capsys.readouterr().out
    (csrc / "core/a.h").write_text('asm("");')
    assert check_layers.main([str(csrc)]) == 1
    assert check_layers.main([str(csrc / "nowhere")]) == 2


def test_repository() -> None:
    assert list(check_layers.problems(REPOSITORY / "csrc")) == []
