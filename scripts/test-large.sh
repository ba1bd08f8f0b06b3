#!/usr/bin/env bash
# Builds and initialises the 947M model on the CPU, takes one training step at micro-batch 1 and calls
# the policy; fails if the process ever held more than 20 GB. Needs 21 GB of free memory and minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
pollen=${1:?usage: scripts/test-large.sh POLLEN}
available=$(awk '/MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)
if [ "$available" -lt 20 ]; then
    echo "test-large needs 20 GiB of free memory, and $available GiB are free" >&2
    exit 1
fi
"$pollen" bench --model configs/model/flower.toml --device cpu --micro-batch 1 --seconds 0 --warmup 0 \
    "${@:2}" | python3 -c '
import json, sys

LIMIT_MIB = 20e9 / 2**20
lines = []
for text in sys.stdin:
    sys.stdout.write(text)
    sys.stdout.flush()
    lines.append(json.loads(text))
kinds = {line["kind"]: line for line in lines}
missing = {"environment", "train", "latency"} - kinds.keys()
if missing:
    sys.exit(f"no figures of {sorted(missing)}")
peak = max(kinds[kind]["peak_memory_mib"] for kind in ("train", "latency"))
parameters = kinds["environment"]["parameters"]
if not peak <= LIMIT_MIB:
    sys.exit(f"peak of memory {peak:,.0f} MiB, above 20 GB ({LIMIT_MIB:,.0f} MiB)")
loss = kinds["train"]["loss"]
print(f"{parameters:,} parameters, loss {loss:.4f}, peak {peak:,.0f} MiB of {LIMIT_MIB:,.0f}")
'
