#!/usr/bin/env python3
"""The 947M model on the CPU, at most 20 GB a process.

Builds and initialises it, takes a training step at micro-batch 1 and calls the policy. Then trains all of it
for a step of the demo data in a run that is saved, and goes on from what was saved. Needs 21 GB of free
memory, 25 GB of disk and half an hour.

    scripts/test-large.py POLLEN [arguments of `pollen bench`]
"""
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile

LIMIT_MIB = 20e9 / 2**20
RECIPE = """
version = 1
name = "large"
seed = 0
extends = ["model/flower", "mixtures/demo"]
embodiments = ["eef_delta", "bimanual_eef_delta"]

[run]
url = "file://{folder}/checkpoints"
stage_from = "{root}/demo/data"

[data]
root = "file://{folder}/data"
cameras = ["primary", "wrist"]
image_size = 224
tokenizer = "configs/tokenizers/bart.json"
florence_tokens = true
text_length = 50
cache_bytes = "16 MiB"
prefetch_batches = 1

[train]
device = "cpu"
steps = 1
global_batch = 1
micro_batch = 1
clip_norm = 1.0

[train.optimizer.head]
learning_rate = 1e-4
betas = [0.9, 0.95]
weight_decay = 0.1
exempt_norms = true
schedule = {{ kind = "inverse_sqrt", warmup = 1000, timescale = 400000 }}

[train.optimizer.vlm]
learning_rate = 2e-5
betas = [0.9, 0.99]
weight_decay = 0.01
exempt_norms = false
schedule = {{ kind = "inverse_sqrt", warmup = 1000, timescale = 400000 }}

[checkpoint]
every_steps = 1
keep_last = 1

[eval]
frame_stride = 1000000
batch = 1
samples = 1
denoising_steps = 4

[budget]
max_gpu_hours = 4.0

[watchdog]
min_timeout = "30m"
max_timeout = "30m"

[observe]
sinks = ["events"]

[launch]
engine = "local"
workers = 1
max_restarts = 0
"""


def check(wanted, what):
    if not wanted:
        sys.exit(f"test-large: {what}")


def bench(pollen, extra):
    command = [pollen, "bench", "--model", "configs/model/flower.toml", "--device", "cpu", "--micro-batch", "1"]
    command += ["--seconds", "0", "--warmup", "0", *extra]
    kinds = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for text in process.stdout:
            print(text, end="", flush=True)
            line = json.loads(text)
            kinds[line["kind"]] = line
    check(process.returncode == 0, f"`pollen bench` ended with {process.returncode}")
    missing = {"environment", "train", "latency"} - kinds.keys()
    check(not missing, f"no figures of {sorted(missing)}")
    peak = max(kinds[kind]["peak_memory_mib"] for kind in ("train", "latency"))
    check(peak <= LIMIT_MIB, f"peak of memory {peak:,.0f} MiB, above 20 GB ({LIMIT_MIB:,.0f} MiB)")
    parameters, loss = kinds["environment"]["parameters"], kinds["train"]["loss"]
    print(f"step and policy: {parameters:,} parameters, loss {loss:.4f}, peak {peak:,.0f} MiB of {LIMIT_MIB:,.0f}")


def launch(pollen, folder, steps):
    command = [pollen, "launch", folder / "recipes/large.toml", "--runs", folder / "runs", "--set", f"train.steps={steps}"]
    subprocess.run(command, check=True)
    logs = list((folder / "runs").rglob("events.jsonl"))
    check(len(logs) == 1, f"one run was expected, {len(logs)} are there")
    return [json.loads(line) for line in logs[0].read_text().splitlines()]


def save_and_load(pollen, folder):
    text = RECIPE.format(folder=folder, root=pathlib.Path.cwd())
    # A recipe's parts are looked up in `configs` beside its folder.
    (folder / "recipes").mkdir()
    (folder / "recipes/large.toml").write_text(text)
    (folder / "configs").symlink_to(pathlib.Path("configs").resolve())
    events = launch(pollen, folder, 1)
    saved = [event for event in events if event["event"] == "checkpoint"]
    check([event["step"] for event in saved] == [1], f"one checkpoint of step 1 was expected: {saved}")
    size = saved[0]["bytes"]
    run = next(path.parent for path in (folder / "runs").rglob("events.jsonl"))
    subprocess.run([pollen, "checkpoint", "verify", run], check=True)
    events = launch(pollen, folder, 2)
    restored = [event["step"] for event in events if event["event"] == "restore"]
    steps = [event["step"] for event in events if event["event"] == "step"]
    check(restored == [1] and steps[-1] == 2, f"restored {restored}, steps {steps}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    check(peak <= LIMIT_MIB, f"peak of memory {peak:,.0f} MiB, above 20 GB ({LIMIT_MIB:,.0f} MiB)")
    print(
        f"saved {size / 1e9:.1f} GB in {saved[0]['seconds']:.0f} s, loaded, step 2 taken; "
        f"peak of all {peak:,.0f} MiB of {LIMIT_MIB:,.0f}"
    )


if len(sys.argv) < 2:
    sys.exit(__doc__)
pollen = str(pathlib.Path(sys.argv[1]).resolve())
os.chdir(pathlib.Path(__file__).resolve().parent.parent)
meminfo = pathlib.Path("/proc/meminfo").read_text()
available = int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024
check(available >= 20 * 2**30, f"20 GiB of free memory are needed, and {available / 2**30:.0f} are free")
bench(pollen, sys.argv[2:])
with tempfile.TemporaryDirectory() as folder:
    save_and_load(pollen, pathlib.Path(folder))
