#!/usr/bin/env bash
# Measures the training step and the policy beside the same graph in PyTorch:
#   scripts/bench-step.sh POLLEN [arguments of benches/step/compare.py]
# Installs PyTorch into .pollen/bench-torch (gigabytes) unless POLLEN_BENCH_PYTHON names a Python that
# has it. Without more arguments: flower-tiny on the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
pollen=${1:?usage: scripts/bench-step.sh POLLEN [ARGUMENT...]}
shift
python=${POLLEN_BENCH_PYTHON:-}
if [ -z "$python" ]; then
    venv=.pollen/bench-torch
    python=$venv/bin/python
    requirements=benches/pytorch/requirements.txt
    if ! cmp -s "$requirements" "$venv/requirements.txt"; then
        python3 -m venv "$venv"
        "$venv/bin/pip" install --quiet --requirement "$requirements"
        cp "$requirements" "$venv/requirements.txt"
    fi
fi
exec python3 benches/step/compare.py --pollen "$pollen" --python "$python" "$@"
