"""Holds Pollen's training step and policy against the same graph in PyTorch, on one machine in one run.

    compare.py --python PYTHON-WITH-TORCH [--pollen PROGRAM] [--device cuda] [...]

First both compute the loss of the same weights and batch; a relative difference above 1e-3 ends the
run with exit code 1. Then both train and act at every asked setting, in turns. What is done lies in
--out and is not done again: a run that was cut goes on. A setting that runs out of memory or fails is
a result, not the end. Prints tables in Markdown; ratios are Pollen's speed over PyTorch's best.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import operations

ROOT = Path(__file__).resolve().parents[2]
PYTORCH = ROOT / "benches/pytorch"
SPACES = ["joint_single", "eef_delta", "bimanual_nav"]
LOSS_BOUND = 1e-3
PARTS = ("copies", "vision", "text", "flow", "optimizer")


class Compare:
    """One command line."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.end = time.monotonic() + args.time_limit
        args.out.mkdir(parents=True, exist_ok=True)

    # ---- running the two -----------------------------------------------------------------------

    def lines(self, command: list[str]) -> list[dict]:
        """Runs a program that prints JSON lines; a failure becomes a line with `error`."""
        sys.stderr.write(f"{shlex.join(command)}\n")
        left = max(self.end - time.monotonic(), 1)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left, cwd=ROOT)
        except subprocess.TimeoutExpired:
            return [{"kind": "failure", "error": "time limit"}]
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode != 0:
            told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            said = next((line for line in told if line.startswith("error")), told[-1])
            lines.append({"kind": "failure", "error": said[:300]})
        return lines

    def pollen(self, cameras: int, chunk: int, *more: str) -> list[dict]:
        """Runs `pollen bench`."""
        args = self.args
        command = [str(args.pollen), "bench", "--model", str(args.model), "--device", args.device]
        command += ["--cameras", str(cameras), "--chunk", str(chunk), "--text-len", str(args.text_len)]
        command += ["--seconds", str(args.seconds), *more]
        if "--precision" not in more:
            command += ["--precision", args.precision]
        return self.lines(command)

    def pytorch(self, cameras: int, chunk: int, *more: str) -> list[dict]:
        """Runs `benches/pytorch/bench.py`."""
        args = self.args
        command = [args.python, str(PYTORCH / "bench.py"), "--model", str(args.model)]
        command += ["--device", args.device, "--cameras", str(cameras), "--chunk", str(chunk)]
        command += ["--text-len", str(args.text_len), "--seconds", str(args.seconds), *more]
        command += ["--precision", *args.pytorch_precision]
        if args.device == "cpu":
            command += ["--threads", str(args.threads)]
        return self.lines(command)

    def kept(self, name: str, make) -> list[dict]:
        """Returns what an earlier run measured under `name`, or measures and keeps it."""
        path = self.args.out / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        if time.monotonic() > self.end:
            return [{"kind": "failure", "error": "time limit"}]
        lines = make()
        # What a device cannot do is a result; what was cut off or set up wrongly is tried again.
        lasting = "memory" in str([line["error"] for line in errors(lines)]).lower()
        if lasting or not errors(lines):
            partial = path.with_suffix(".part")
            partial.write_text(json.dumps(lines, indent=1))
            partial.replace(path)
        return lines

    # ---- same numbers --------------------------------------------------------------------------

    def same_loss(self, cameras: int, chunk: int) -> list[dict]:
        """Returns one line with the losses of both on the same weights and batch."""
        args = self.args
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            dump = self.pollen(
                cameras, chunk, "--dump", folder, "--dropout", "off", "--micro-batch", "2",
                "--measure", "none", "--precision", "f32",
            )
            if failure := errors(dump):
                return failure
            ours = json.loads((Path(folder) / "result.json").read_text())
            names = ["weights.safetensors", "batch.safetensors"]
            command = [args.python, str(PYTORCH / "loss.py")]
            command += [str(Path(folder) / name) for name in names]
            command += ["--model", str(args.model), "--spaces", *SPACES, "--device", args.device]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode != 0:
            return [{"kind": "failure", "error": done.stderr.strip()[-300:]}]
        theirs = json.loads(done.stdout)
        return [{
            "kind": "loss",
            "cameras": cameras,
            "chunk": chunk,
            "pollen": ours,
            "pytorch": {key: theirs[key] for key in ("loss", "grad_norm")},
            "relative": {key: abs(ours[key] / theirs[key] - 1) for key in ("loss", "grad_norm")},
        }]

    # ---- all -----------------------------------------------------------------------------------

    def cell(self, cameras: int, chunk: int, size: int) -> dict:
        """Measures training at one setting, `rounds` times in turns."""
        name, micro = f"train-c{cameras}-h{chunk}-b{size}", ("--micro-batch", str(size))
        ours, theirs = [], []
        for turn in range(self.args.rounds):
            ours += self.kept(f"{name}-pollen-{turn}", lambda: self.pollen(
                cameras, chunk, *micro, "--measure", "train"))
            theirs += self.kept(f"{name}-pytorch-{turn}", lambda: self.pytorch(
                cameras, chunk, *micro, "--measure", "train", "parts",
                "--compile", *self.args.compile))
        return {"cameras": cameras, "chunk": chunk, "micro_batch": size,
                "pollen": ours, "pytorch": theirs}

    def latency(self, cameras: int, chunk: int) -> dict:
        """Measures the policy at one setting."""
        name, ours, theirs = f"latency-c{cameras}-h{chunk}", [], []
        for turn in range(self.args.rounds):
            ours += self.kept(f"{name}-pollen-{turn}", lambda: self.pollen(
                cameras, chunk, "--measure", "latency"))
            theirs += self.kept(f"{name}-pytorch-{turn}", lambda: self.pytorch(
                cameras, chunk, "--measure", "latency", "--compile", *self.args.compile))
        return {"cameras": cameras, "chunk": chunk, "pollen": ours, "pytorch": theirs}

    def run(self) -> int:
        """Measures everything and prints the tables; returns the exit code."""
        args = self.args
        views = list(itertools.product(args.cameras, args.chunk))
        losses = [self.kept(f"loss-c{c}-h{h}", lambda c=c, h=h: self.same_loss(c, h))
                  for c, h in views[:1]]
        wrong = [line for lines in losses for line in lines
                 if "error" in line or max(line["relative"].values()) > LOSS_BOUND]
        for line in wrong:
            sys.stderr.write(f"the two compute different things: {json.dumps(line)}\n")
        if wrong:
            return 1
        cells = [self.cell(c, h, b) for (c, h), b in itertools.product(views, args.micro_batch)]
        calls = [self.latency(c, h) for c, h in views]
        summary = {"losses": losses, "train": cells, "latency": calls}
        sys.stdout.write(render(losses, cells, calls))
        if args.operation_batch:
            pytorch, pollen = operations.measure(self)
            summary["operations"] = {"pytorch": pytorch, "pollen": pollen}
            sys.stdout.write(operations.render(pytorch, pollen))
        (args.out / "summary.json").write_text(json.dumps(summary, indent=1))
        measured = any(found(cell[side], "train") for cell in cells for side in ("pollen", "pytorch"))
        return 0 if measured else 1


def errors(lines: list[dict]) -> list[dict]:
    """Returns the lines that tell of a failure."""
    return [line for line in lines if "error" in line]


def found(lines: list[dict], kind: str) -> list[dict]:
    """Returns the measurements of a kind."""
    return [line for line in lines if line.get("kind") == kind and "error" not in line]


def median(lines: list[dict], key: str) -> float | None:
    """Returns the median of a figure over rounds."""
    values = [line[key] for line in lines if key in line]
    return statistics.median(values) if values else None


def by_setting(lines: list[dict], kind: str, key: str, best) -> tuple[float, str] | None:
    """Returns PyTorch's best setting: the median of its figure, and what it was."""
    groups: dict[str, list[float]] = {}
    for line in found(lines, kind):
        groups.setdefault(f"{line['precision']}, compile {line['compile']}", []).append(line[key])
    medians = {name: statistics.median(values) for name, values in groups.items()}
    return best(((value, name) for name, value in medians.items()), default=None)


def number(value: float | None, digits: int = 1) -> str:
    """Formats a figure that may be missing."""
    return "-" if value is None else f"{value:,.{digits}f}"


def why(lines: list[dict]) -> str:
    """Returns why there is no figure."""
    return next((line["error"] for line in lines if "error" in line), "-")


def render(losses: list, cells: list[dict], calls: list[dict]) -> str:
    """Returns the tables."""
    out = []
    for line in itertools.chain.from_iterable(losses):
        worst = max(line["relative"].values())
        out.append(f"Same weights and batch: loss {line['pollen']['loss']:.6f} and "
                   f"{line['pytorch']['loss']:.6f}; loss and gradient norm within {worst:.1e}.\n")
    out.append("| cameras, chunk, micro-batch | Pollen samples/s | PyTorch samples/s (setting) | ratio "
               "| Pollen MiB | PyTorch MiB |\n|---|---|---|---|---|---|")
    for cell in cells:
        ours = median(found(cell["pollen"], "train"), "samples_per_s")
        theirs = by_setting(cell["pytorch"], "train", "samples_per_s", max)
        ratio = ours / theirs[0] if ours and theirs else None
        left = number(ours) if ours else why(cell["pollen"])
        right = f"{number(theirs[0])} ({theirs[1]})" if theirs else why(cell["pytorch"])
        out.append(
            f"| {cell['cameras']}, {cell['chunk']}, {cell['micro_batch']} | {left} | {right} | "
            f"{number(ratio, 2)} | {number(median(found(cell['pollen'], 'train'), 'peak_memory_mib'), 0)} | "
            f"{number(median(found(cell['pytorch'], 'train'), 'peak_memory_mib'), 0)} |")
    out.append("\n| part, ms a step | " + " | ".join(
        f"c{c['cameras']} h{c['chunk']} b{c['micro_batch']}: Pollen, PyTorch" for c in cells) + " |")
    out.append("|---" * (len(cells) + 1) + "|")
    for part in PARTS:
        row = []
        for cell in cells:
            ours = [{"ms": line["parts_ms"][part]} for line in found(cell["pollen"], "train")]
            theirs = median(found(cell["pytorch"], "parts"), f"{part}_ms")
            row.append(f"{number(median(ours, 'ms'))}, {number(theirs)}")
        out.append(f"| {part} | " + " | ".join(row) + " |")
    out.append("\n| policy, batch 1: cameras, chunk | Pollen ms | PyTorch ms (setting) | ratio |\n|---|---|---|---|")
    for call in calls:
        ours = median(found(call["pollen"], "latency"), "ms")
        theirs = by_setting(call["pytorch"], "latency", "ms", min)
        ratio = theirs[0] / ours if ours and theirs else None
        right = f"{number(theirs[0])} ({theirs[1]})" if theirs else why(call["pytorch"])
        out.append(f"| {call['cameras']}, {call['chunk']} | {number(ours) if ours else why(call['pollen'])} "
                   f"| {right} | {number(ratio, 2)} |")
    return "\n".join(out) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pollen", type=Path, default=ROOT / "target/release/pollen", help="the program")
    add("--python", default=sys.executable, help="a Python that has torch and safetensors")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--model", type=Path, default=ROOT / "configs/model/flower-tiny.toml")
    add("--cameras", nargs="+", type=int, default=[2])
    add("--chunk", nargs="+", type=int, default=[10])
    add("--micro-batch", nargs="+", type=int, default=[8])
    add("--text-len", type=int, default=50)
    add("--precision", default="f32", choices=("f32", "bf16"), help="of Pollen")
    add("--pytorch-precision", nargs="+", default=["f32"])
    add("--compile", nargs="+", default=["none"], help="of PyTorch: none, a mode, blocks:MODE")
    add("--operation-batch", type=int, default=0, help="micro-batch of single operations; 0: none")
    add("--operation-seconds", type=float, default=0.3, help="time to measure each pass of them for")
    add("--rounds", type=int, default=3, help="measurements of each, in turns")
    add("--seconds", type=float, default=3.0, help="time to measure each setting for")
    add("--time-limit", type=float, default=36000.0, help="seconds after which nothing is started")
    add("--threads", type=int, default=2, help="of PyTorch on a CPU")
    add("--out", type=Path, default=ROOT / "target/bench-step", help="folder of results")
    add("--scratch", type=Path, help="folder for weights (4 GB at full size); by default the system's")
    return Compare(parser.parse_args()).run()


if __name__ == "__main__":
    sys.exit(main())
