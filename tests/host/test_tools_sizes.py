"""tools/check_sizes.py and the reader of C++ text below it."""

from __future__ import annotations

from pathlib import Path

import check_sizes
import pytest
from cpp_text import blank, count_top_level, functions, template_params

CODE = """\
#define FA_CASE(x) \\
  if (x) { f(x, 1, 2, 3, 4, 5, 6); }
namespace fa {
template <class T, int kN = (1 > 0)>
struct Tile {
  explicit Tile(int m, int n) : m_(m), n_{n} {
    check(m);
  }
  int m_, n_;
};
template <int kHeadDim, class T>
__global__ void __launch_bounds__(num_threads(kHeadDim), 1)
    fwd_kernel(const __grid_constant__ Params p) {
  auto step = [&](int n_block, auto mask) {
    for (int i = 0; i < 4; ++i) {
      if (i) { mask(i, '{'); }
    }
  };
  const Pair pair{1, 2};
  step(0, "}");  // }
}
int empty() { return 0; }
}  // namespace fa
"""


def test_functions() -> None:
    found = {f.name: f for f in functions(blank(CODE, strings=True))}
    assert set(found) == {"Tile", "fwd_kernel", "step", "empty"}
    kernel, step = found["fwd_kernel"], found["step"]
    assert (kernel.line, kernel.num_lines, kernel.num_params) == (13, 9, 1)
    assert kernel.is_kernel
    assert not step.is_kernel
    assert (step.num_lines, step.num_params, step.nesting) == (5, 2, 2)
    assert kernel.nesting == 3  # the lambda is a block too
    assert (found["empty"].num_params, found["empty"].nesting) == (0, 0)
    assert found["Tile"].num_params == 2


def test_template_params() -> None:
    assert template_params("template <class T, Pair<int, int> kP>\ntemplate <>\n") == [(1, 2)]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("void", 0),
        ("int a", 1),
        ("int a, std::pair<int, int> b, int (*f)(int, int)", 3),
        ("auto (*f)(int) -> int, int b", 2),
    ],
)
def test_count_top_level(text: str, count: int) -> None:
    assert count_top_level(text) == count


def test_blank_keeps_lines_and_numbers() -> None:
    code = "int a = 1'000;  // it's\n/* x\n y */ char c = 'x';"
    assert blank(code).splitlines() == ["int a = 1'000;         ", "    ", "      char c = 'x';"]
    assert blank(code, strings=True).endswith("char c =    ;")
    assert blank('f(R"(a // b)");', strings=True) == "f(           );"


def test_findings(tmp_path: Path) -> None:
    kernel = tmp_path / "csrc/kernels/sm80/fwd.cuh"
    kernel.parent.mkdir(parents=True)
    body = "  x += 1;\n" * 300
    kernel.write_text(
        f"template <int a, int b, int c, int d, int e>\n__global__ void k(int p) {{\n{body}}}\n"
        f"void helper(int a, int b, int c, int d, int e, int f, int g) {{\n{body}}}\n"
    )
    found = {(f.what, f.value): f.look_again for f in check_sizes.cpp_findings(kernel)}
    assert found == {
        ("lines", 605): True,
        ("lines", 302): True,
        ("parameters", 7): False,
        ("template parameters", 5): True,
    }


def test_main_fails_on_columns_and_instances_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    instances = tmp_path / "csrc/kernels/instances"
    instances.mkdir(parents=True)
    module = tmp_path / "flash_attn_ext/big.py"
    module.parent.mkdir()
    module.write_text("x = 1\n" * 700)
    instance = instances / "sm80_fwd.cu"
    instance.write_text("//\n" * 8)
    arguments = ["--root", str(tmp_path)]
    assert check_sizes.main(arguments) == 0
    assert "look again" in capsys.readouterr().out

    instance.write_text("//\n" * 9)
    assert check_sizes.main(arguments) == 1
    assert "9 lines, an instance has at most 8" in capsys.readouterr().out

    instance.write_text("// " + "x" * 98 + "\n")
    assert check_sizes.main([*arguments, "--all"]) == 1
    assert ":1: 101 columns, at most 100" in capsys.readouterr().out
