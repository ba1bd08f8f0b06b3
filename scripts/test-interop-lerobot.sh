#!/usr/bin/env bash
# Opens Pollen's datasets with the real lerobot package (about 6 GB with PyTorch, into .pollen/): the
# committed demo, the demo converted again, and a converted RLDS dataset where POLLEN_TEST_DATA has one.
set -euo pipefail
cd "$(dirname "$0")/.."
pollen=${1:?usage: scripts/test-interop-lerobot.sh POLLEN}
venv=.pollen/interop-lerobot
requirements=tests/interop/lerobot/requirements.txt
if ! cmp -s "$requirements" "$venv/requirements.txt"; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --requirement "$requirements"
    cp "$requirements" "$venv/requirements.txt"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r demo/data/lift demo/data/two_arm_handover "$work"
roots=("$work/lift" "$work/two_arm_handover" "$work/lift-converted")
"$pollen" data convert demo/data/lift "$work/lift-converted"
if [ -d "${POLLEN_TEST_DATA:-}/octo-bridge-debug" ]; then
    "$pollen" data convert "$POLLEN_TEST_DATA/octo-bridge-debug" "$work/bridge"
    roots+=("$work/bridge")
else
    echo "NOT CHECKED: octo-bridge-debug is absent; POLLEN_TEST_DATA names its parent" >&2
fi
# Without an index of the hub, a cache of its own, and no words about video decoders.
HF_HUB_OFFLINE=1 HF_HOME="$work/cache" \
    "$venv/bin/python" -W ignore tests/interop/lerobot/check.py "${roots[@]}"
