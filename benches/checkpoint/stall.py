#!/usr/bin/env python3
"""Trains a model of some hundreds of MB of state for a few steps and says how long each checkpoint
held the training up, beside the time of a step.

    python3 benches/checkpoint/stall.py POLLEN [FOLDER]

POLLEN is the command (target/release/pollen), FOLDER a place on the disk to measure (default: the
temporary folder). One worker on the CPU; what it writes is deleted.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

# About 34M parameters, 12 bytes each in a checkpoint; a save every third step, so that each finds
# the one before it done.
SETS = [
    "model.flow.width=768",
    "model.flow.heads=12",
    "model.flow.layers=3",
    "train.global_batch=8",
    "train.micro_batch=8",
    "train.steps=24",
    "checkpoint.every_steps=4",
    "checkpoint.keep_last=2",
    "eval.frame_stride=1000",
    "eval.samples=1",
    "launch.workers=1",
    "launch.object_server=none",
    'observe.sinks=["events"]',
]


def main() -> None:
    pollen = sys.argv[1]
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        place = [f"data.root=file://{folder}/data", f"run.url=file://{folder}/runs"]
        command = [pollen, "launch", "demo", "--runs", f"{folder}/local"]
        for pair in SETS + place:
            command += ["--set", pair]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        [log] = pathlib.Path(folder, "local").rglob("events.jsonl")
        events = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [sum(e["phases"].values()) for e in events if e["event"] == "step"][2:]
    saves = [e for e in events if e["event"] == "checkpoint"]
    stalls = [e["stall_s"] for e in saves]
    beside = [e["seconds"] - e["stall_s"] for e in saves]
    step, stall = statistics.median(steps), statistics.median(stalls)
    print(f"{saves[0]['bytes'] / 1e6:.0f} MB a checkpoint, {len(saves)} of them")
    print(f"a step takes {step:.2f} s ({min(steps):.2f}-{max(steps):.2f})")
    print(f"a checkpoint holds it up for {stall:.3f} s ({min(stalls):.3f}-{max(stalls):.3f}): "
          f"{100 * stall / step:.0f}% of a step")
    print(f"and is published {statistics.median(beside):.2f} s later, beside the training")


if __name__ == "__main__":
    main()
