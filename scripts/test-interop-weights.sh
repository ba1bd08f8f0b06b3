#!/usr/bin/env bash
# Opens exported weights with the real safetensors and transformers packages (about 6 GB with PyTorch,
# into .pollen/) and imports what they write. POLLEN_INTEROP_PYTHON names another Python that has them.
set -euo pipefail
cd "$(dirname "$0")/.."
pollen=${1:?usage: scripts/test-interop-weights.sh POLLEN}
python=${POLLEN_INTEROP_PYTHON:-}
if [ -z "$python" ]; then
    venv=.pollen/interop-weights
    python=$venv/bin/python
    requirements=tests/interop/weights/requirements.txt
    if ! cmp -s "$requirements" "$venv/requirements.txt"; then
        python3 -m venv "$venv"
        "$venv/bin/pip" install --quiet --requirement "$requirements"
        cp "$requirements" "$venv/requirements.txt"
    fi
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 HF_HOME="$work/cache"
POLLEN_INTEROP_DIR=$work "${CARGO:-cargo}" test --quiet --locked --workspace \
    --features pollen-cli/faults --lib -- --ignored --exact interop::write_weights_and_activations
for what in flower vlm; do
    "$pollen" export "$work/weights" "$work/$what" --recipe demo --what "$what" --shard-size '1 MB'
done
"$pollen" export "$work/weights" "$work/flower-bf16" --recipe demo --dtype bf16
"$pollen" weights import "$work/flower" "$work/imported" --recipe demo | tail -1
"$python" tests/interop/weights/check.py "$work"
"$pollen" weights import "$work/resaved" "$work/resaved-imported" --recipe demo --allow-missing head | tail -1
"$python" scripts/pickle-to-safetensors.py "$work/last.ckpt" "$work/averaged.safetensors" --ema
"$python" tests/interop/weights/check.py "$work" --second
