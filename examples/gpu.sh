#!/usr/bin/env bash
# Everything that wants a GPU, in one command of at most ten minutes: the tests marked gpu, the kernel bench, a training
# comparison; fails where one of them does. Results go to examples/results/ (or the folder given), keyed by the device's
# name; commit them.
#
#   bash examples/gpu.sh [OUT] [WHEELS]
#
# Uses the python on the PATH with the CUDA build of torch it has; WHEELS is a folder of wheels for what that python lacks
# (jaxtyping, beartype, rich, pytest, hypothesis, bitsandbytes, torchao), where there is no network.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:-examples/results}"
wheels="${2:-}"
mkdir -p "$out"
if [ -n "$wheels" ]; then
    python -m pip install -q --no-index --no-deps --find-links "$wheels" "$wheels"/*.whl
fi
if ! python -m pip install -q --no-deps --no-build-isolation -e .; then
    # Without setuptools here: the installed layout (passes/ and kernels/ inside lrcompile/) made of links.
    links="$PWD/build/links"
    mkdir -p "$links/lrcompile" "$links/lrcompile-0.1.0.dist-info"
    ln -sfn "$PWD"/lrcompile/* "$PWD/passes" "$PWD/kernels" "$links/lrcompile/"
    printf 'Metadata-Version: 2.1\nName: lrcompile\nVersion: 0.1.0\n' >"$links/lrcompile-0.1.0.dist-info/METADATA"
    printf '[torch_dynamo_backends]\nlrcompile = lrcompile.backend:lrcompile\n' >"$links/lrcompile-0.1.0.dist-info/entry_points.txt"
    export PYTHONPATH="$links" PYTHONSAFEPATH=1
fi
if ! python -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'; then
    echo "no GPU that this python's torch can use; without one: lrcompile bench kernels, lrcompile bench aot" >&2
    exit 1
fi
failed=0
timeout 200 python -m pytest -q -p no:cacheprovider --tb=short -m gpu tests 2>&1 | tee "$out/gpu-tests.txt" | tail -40
[ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
timeout 330 python -m lrcompile.cli bench kernels --out "$out" --minutes 4 2>&1 | tee "$out/gpu-bench.txt" | tail -60
[ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
timeout 60 python -m lrcompile.cli bench step 2>&1 | tee "$out/gpu-step.txt"
[ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
exit "$failed"
