"""Prints the loss and the gradient norms of given weights on a given batch, as JSON.

Another implementation can be held against these numbers: same weights, same batch, no dropout.

The weights are a safetensors file of canonical names. The batch is a safetensors file with `images`
[B, N, 3, S, S], scaled and normalised; `input_ids` and `text_mask` [B, T]; `actions`, `noise` and
`valid` [B, H, A]; `t` and `frequency_hz` [B]; `spaces` [B], indices into the action spaces; and,
where there are any, `proprio` [B, P] and `camera_present` [B, N].
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from config import FastPaths, load_toml
from flower import Batch, Flower, build, spaces_of
from layers import load_weights
from timing import open_device
from training import Setting


def read_batch(path: Path, device: torch.device) -> Batch:
    """Reads a batch; refuses unknown and missing tensors by name."""
    tensors = load_file(path, device=str(device))
    optional = {"proprio", "camera_present", "valid"}
    wanted = set(Batch._fields)
    if missing := wanted - optional - set(tensors):
        raise ValueError(f"{path} lacks {sorted(missing)}")
    if unknown := set(tensors) - wanted:
        raise ValueError(f"{path} holds {sorted(unknown)}, which nothing reads")
    for name in ("input_ids", "spaces"):
        tensors[name] = tensors[name].long()
    return Batch(**tensors)


def module_of(name: str) -> str:
    """Returns the module whose gradients are summed up under one name."""
    parts = name.split(".")
    if name.startswith("vlm.vision_tower.blocks"):
        return ".".join(parts[:4])
    if name.startswith("vlm.language_model.model.encoder.layers"):
        return ".".join(parts[:6])
    return ".".join(parts[:2])


def norms(model: Flower) -> tuple[dict[str, float], dict[str, float], float]:
    """Returns the norms of the gradients by parameter, by module, and of all together."""
    by_name = {
        name: p.grad.double().norm().item()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    squares: dict[str, float] = defaultdict(float)
    for name, norm in by_name.items():
        squares[module_of(name)] += norm**2
    by_module = {name: math.sqrt(square) for name, square in squares.items()}
    return by_name, by_module, math.sqrt(sum(squares.values()))


def main() -> int:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("weights", type=Path)
    add("batch", type=Path)
    add("--model", type=Path, default=root / "configs/model/flower.toml")
    add("--spaces", nargs="+", help="action spaces in the order of their indices")
    add("--finetune", action="store_true", help="token order and masks of finetuning")
    add("--precision", default="f32", choices=("f32", "tf32", "autocast", "bf16"))
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--plain", action="store_true", help="attention and convolutions without fast paths")
    add("--all", action="store_true", help="also the gradient norm of every parameter")
    args = parser.parse_args()

    weights: dict[str, Tensor] = load_file(args.weights)
    config = replace(load_toml(args.model), spaces=spaces_of(weights, args.spaces))
    if args.finetune:
        config = config.finetuning()
    device, setting = open_device(args.device), Setting(precision=args.precision)
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    fast = FastPaths(sdpa=False, channels_last=False) if args.plain else FastPaths()
    # Dropout is off in evaluation mode; gradients are not.
    model = build(config, fast, device).eval()
    load_weights(model, weights)
    if args.precision == "bf16":
        for p in model.parameters():
            p.data = p.data.bfloat16()
    batch = read_batch(args.batch, device)
    with setting.autocast(device):
        loss = model(batch)
    loss.backward()
    by_name, by_module, total = norms(model)
    result = {
        "loss": loss.item(),
        "grad_norm": total,
        "grad_norm_by_module": by_module,
        "spaces": [space.name for space in config.spaces],
        "precision": args.precision,
    }
    if args.all:
        result["grad_norm_by_parameter"] = by_name
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
