"""Holds single operations against PyTorch's, at the same shapes, so that the slow ones have names."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

MICRO = Path(__file__).resolve().parents[1] / "pytorch/micro.py"


def measure(compare) -> tuple[list[dict], list[dict]]:
    """Returns the lines of both; PyTorch goes first and its shapes are measured here."""
    args = compare.args
    both = ["--device", args.device, "--seconds", str(args.operation_seconds)]

    def theirs() -> list[dict]:
        command = [args.python, str(MICRO), *both, "--model", str(args.model)]
        command += ["--micro-batch", str(args.operation_batch), "--cameras", str(args.cameras[0])]
        command += ["--text-len", str(args.text_len), "--dtype", args.precision]
        command += ["--compile", *[mode for mode in args.compile if not mode.startswith("blocks:")]]
        if args.device == "cpu":
            command += ["--threads", str(args.threads)]
        return compare.lines(command)

    def ours(lines: list[dict]) -> list[dict]:
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl", dir=args.scratch) as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            return compare.lines([str(args.pollen), "bench", *both, "--operations", file.name])

    name = f"operations-{args.precision}-c{args.cameras[0]}-b{args.operation_batch}"
    pytorch = compare.kept(f"{name}-pytorch", theirs)
    pollen = compare.kept(f"{name}-pollen", lambda: ours(pytorch))
    return pytorch, pollen


def render(pytorch: list[dict], pollen: list[dict]) -> str:
    """Returns a table, the operation that loses the most time in a step first."""
    best: dict[tuple, dict] = {}
    for line in pytorch:
        if "shape" not in line:
            continue
        key = (line["kind"], tuple(line["shape"]))
        training = line["forward_ms"] + line["backward_ms"]
        way = best.setdefault(key, {"name": line["name"].split(",")[0], "times": 0,
                                    "forward": float("inf"), "training": float("inf")})
        way["forward"] = min(way["forward"], line["forward_ms"])
        way["training"] = min(way["training"], training)
        way["times"] = max(way["times"], line["times_per_step"])
    rows = []
    for line in pollen:
        way = best.get((line.get("kind"), tuple(line.get("shape", ()))))
        if way and "training_ms" in line:
            lost = (line["training_ms"] - way["training"]) * way["times"]
            rows.append((lost, line, way))
    out = ["\n| operation | shape | times a step | Pollen ms: forward, both passes | PyTorch ms | ratio "
           "| lost ms a step |\n|---|---|---|---|---|---|---|"]
    for lost, line, way in sorted(rows, key=lambda row: -row[0]):
        out.append(
            f"| {line['kind']}, {way['name']} | {' x '.join(map(str, line['shape']))} | {way['times']} "
            f"| {line['forward_ms']:.2f}, {line['training_ms']:.2f} "
            f"| {way['forward']:.2f}, {way['training']:.2f} "
            f"| {way['training'] / line['training_ms']:.2f} | {lost:.1f} |")
    failures = [line["error"] for line in pytorch + pollen if "error" in line]
    out += [f"\nNot measured: {error}" for error in failures]
    return "\n".join(out) + "\n"
