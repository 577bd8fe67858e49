#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds the public kvcached from its source archive into a folder, for ENGINE_KVCACHED.
#
#     pip download --no-deps --no-build-isolation --no-binary :all: kvcached==0.1.6   # needs torch
#     sh benchmarks/serving/public_kvcached.sh kvcached-0.1.6.tar.gz TARGET
#
# Needs the CUDA torch it will run with, its compiler (nvcc), setuptools, wheel and ninja; and when
# it runs, posix_ipc and wrapt. Nothing is fetched.
set -eu
archive=$1
mkdir -p "$2"
target=$(cd "$2" && pwd)
python=${PYTHON:-python3}
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
cuda=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$nvcc")")")}
# It links libcuda; where no driver is installed, the toolkit's stub stands in.
for stubs in "$cuda"/lib64/stubs "$cuda"/lib/stubs "$cuda"/targets/*/lib/stubs; do
    [ -d "$stubs" ] && LIBRARY_PATH="$stubs:${LIBRARY_PATH:-}"
done
export CUDA_HOME="$cuda" LIBRARY_PATH="${LIBRARY_PATH:-}" MAX_JOBS="${MAX_JOBS:-8}"
"$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --upgrade \
    --target "$target" "$archive"
# It hooks into engines by a .pth file, which Python reads in site folders only, not on PYTHONPATH.
cat > "$target/sitecustomize.py" <<'PYTHON'
import os
import site

site.addsitedir(os.path.dirname(os.path.abspath(__file__)))
PYTHON
PYTHONPATH="$target${PYTHONPATH:+:$PYTHONPATH}" "$python" -c '
import posix_ipc, wrapt, sys, kvcached.vmm_ops as ops
assert ops.__file__.startswith(sys.argv[1]), ops.__file__
print("public kvcached:", ops.__file__)' "$target"
