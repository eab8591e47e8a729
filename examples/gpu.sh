#!/usr/bin/env bash
# Everything that wants a GPU, in two commands of at most ten minutes each; a command fails where one of its parts does.
# Results go to examples/results/ (or the folder given), keyed by the device's name; commit them.
#
#   bash examples/gpu.sh [OUT] [WHEELS]            the tests marked gpu (200 s at most), the kernel bench (340 s)
#   bash examples/gpu.sh OUT [WHEELS] train        the training benches: steps of GPT-2 1.5B and Llama 1B against dense
#                                                  torch.compile (350 s at most), finetuning of Llama 3 8B in NF4 against
#                                                  peft (220 s)
#
# The first writes gpu-tests.txt, gpu-bench.txt and kernels-DEVICE.json and .png; the second gpu-step.txt, gpu-finetune.txt,
# step-DEVICE.json and finetune-DEVICE.json. They need 80 GB of GPU memory at most, and less where it is less: batches are halved.
#
# Uses the python on the PATH with the CUDA build of torch it has; WHEELS is a folder of wheels for what that python lacks
# (jaxtyping, beartype, rich, pytest, hypothesis, bitsandbytes, torchao; for train also transformers, accelerate, peft and
# psutil), where there is no network; "" where nothing lacks.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:-examples/results}"
what=first
if [ "${!#}" = train ]; then
    what=train
fi
wheels="${2:-}"
if [ "$wheels" = train ]; then
    wheels=""
fi
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
# part SECONDS FILE COMMAND...: stopped after so long, what it says in FILE too
part() {
    timeout "$1" "${@:3}" 2>&1 | tee "$out/$2" | tail -60
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
}
if [ "$what" = train ]; then
    part 350 gpu-step.txt python -m lrcompile.cli bench step --out "$out" --minutes 0.5
    part 220 gpu-finetune.txt python -m lrcompile.cli bench finetune --out "$out"
else
    part 200 gpu-tests.txt python -m pytest -q -p no:cacheprovider --tb=short -m gpu tests
    part 340 gpu-bench.txt python -m lrcompile.cli bench kernels --out "$out" --minutes 4
fi
exit "$failed"
