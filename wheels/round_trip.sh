#!/usr/bin/env bash
# From a folder that wheels/build.sh filled to attention in a fresh environment; then the same from
# the source distribution, without CUDA.
#
#   wheels/round_trip.sh FOLDER [TORCH]     TORCH: what pip installs for torch, default "torch"
#   PYTHON=python3.12 wheels/round_trip.sh dist 'torch==2.11.*'
#
# Run in a git checkout, whose files the source distribution must have. PYTHON needs build, setuptools,
# packaging, ninja, pybind11 and torch; the fresh environment gets torch and the package alone.
set -euo pipefail

folder=$(cd "$1" && pwd)
torch=${2:-torch}
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fresh=$work/environment/bin/python

# Computes there, away from the sources.
compute() {
  (cd "$work" && "$@" && "$fresh" -m flash_attn_ext selftest --quick)
}

"$python" -m venv "$work/environment"
"$fresh" -m pip install --quiet "$torch"

echo "== the wheel that fits, of $folder"
"$fresh" wheels/pick.py --folder "$folder" --install
compute "$fresh" "$root/.ci/import_test.py"

echo "== the source distribution"
"$python" -m build --sdist --no-isolation --outdir "$work" . >"$work/sdist.log" 2>&1 || {
  cat "$work/sdist.log"
  exit 1
}
tar -xzf "$work"/flash_attn_ext-*.tar.gz -C "$work"
mv "$work"/flash_attn_ext-*/ "$work/source"
for part in csrc build_tools flash_attn_ext wheels tests tools docs .ci; do
  diff <(git ls-files "$part") <(cd "$work/source" && find "$part" -type f | LC_ALL=C sort) \
    >"$work/differences" || true
  if grep '^<' "$work/differences"; then
    echo "error: not in the source distribution"
    exit 1
  fi
done
(
  cd "$work/source"
  env -u FLASH_ATTN_EXT_REQUIRE_CUDA -u FLASH_ATTN_EXT_ARCHS FLASH_ATTN_EXT_SKIP_CUDA=1 \
    "$python" -m pip wheel . --quiet --no-deps --no-build-isolation --wheel-dir "$work/cpu"
  "$python" tools/check_wheel.py --no-cuda "$work"/cpu/*.whl
)
"$fresh" -m pip install --quiet --no-deps --force-reinstall "$work"/cpu/*.whl
compute "$fresh" -c 'from flash_attn_ext import _load; s = _load.status(); assert s.binder_loaded, s'
