#!/usr/bin/env python3
"""Turns a PyTorch or Lightning checkpoint (.pt, .pth, .ckpt, .bin) into a safetensors file.

A pickle can run code when it is opened, so `pollen` does not read any; torch's loader is told here to
take tensors and plain containers only. Needs torch and safetensors.

    scripts/pickle-to-safetensors.py last.ckpt flower.safetensors --ema
    pollen weights import flower.safetensors DST --recipe RECIPE ...
"""

import argparse
import sys

import torch
from safetensors.torch import save_file


def averaged(checkpoint, state):
    """Pairs the averaged weights of a Lightning checkpoint with names.

    They are a list in the order of the state dict's values, buffers and tied duplicates included, so
    they are paired by position, and refused when a shape says that the order is another.
    """
    try:
        weights = checkpoint["callbacks"]["EMA"]["ema_weights"]
    except KeyError:
        sys.exit("error: there is no callbacks.EMA.ema_weights in this checkpoint; leave --ema out")
    if len(weights) != len(state):
        sys.exit(f"error: {len(weights)} averaged weights do not pair with {len(state)} names")
    for (name, value), weight in zip(state.items(), weights):
        if value.shape != weight.shape:
            sys.exit(f"error: averaged weight of {name} is {list(weight.shape)}, not {list(value.shape)}")
    return dict(zip(state, weights))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights")
    args = parser.parse_args()
    checkpoint = torch.load(args.source, map_location="cpu", weights_only=True)
    state = checkpoint
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    state = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if args.ema:
        state = averaged(checkpoint, state)
    if not state:
        sys.exit(f"error: {args.source} holds no tensors")
    # Tied tensors share their storage, which a safetensors file cannot.
    save_file({name: value.contiguous().clone() for name, value in state.items()}, args.destination)
    print(f"wrote {len(state)} tensors to {args.destination}")


if __name__ == "__main__":
    main()
