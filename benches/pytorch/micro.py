"""Times the single operations of the model at its own shapes, one JSON line for each.

Forward and backward are timed apart. Matrix products and convolutions report TFLOP/s, the rest GB/s
of the least traffic. Forward reads every input and writes the output; backward reads the upstream
gradient and the inputs (a softmax its output, of the same size) and writes a gradient of every
input. A depthwise convolution includes the addition of its input. Choose a micro-batch whose maps
exceed the caches, or the figures are those of the caches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flops
from config import FastPaths, FlowerConfig, load_toml
from layers import attend
from timing import emit, environment, median_ms, open_device
from training import MODES
from vision import Depthwise, channel_attend

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
KINDS = ("matmul", "depthwise", "window_attention", "channel_attention", "layer_norm", "softmax")


@dataclass
class Case:
    """One operation: `run` on `inputs`, with its work in the forward pass."""

    kind: str
    name: str
    shape: list[int]
    run: Callable[..., Tensor]
    inputs: list[Tensor]
    flop: float = 0.0
    times_per_step: int = 1


class Micro:
    """The cases of one model, micro-batch and data type."""

    def __init__(self, config: FlowerConfig, size: int, text_len: int, dtype, device):
        self.config, self.size, self.text_len = config, size, text_len
        self.factory = {"dtype": dtype, "device": device}
        self.images = size * config.num_cameras

    def random(self, *shape: int) -> Tensor:
        """Returns normal values that want a gradient."""
        return torch.randn(shape, **self.factory).requires_grad_()

    def stages(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Yields index, width, side, heads and groups of every stage."""
        v = self.config.vision
        yield from zip(range(len(v.dims)), v.dims, v.sides(), v.heads, v.groups)

    def matmul(self) -> Iterator[Case]:
        """Yields the ten shapes of linear layers with the most work in the model."""
        for p in flops.largest(self.config, self.text_len):
            shape = [p.rows * self.size, p.inner, p.cols]
            inputs = [self.random(shape[0], p.inner), self.random(p.cols, p.inner)]
            flop = 2.0 * shape[0] * p.inner * p.cols
            yield Case("matmul", f"{p.part}: {p.name}", shape, F.linear, inputs, flop, p.times)

    def depthwise(self) -> Iterator[Case]:
        """Yields the depthwise convolution of every stage, in each implementation."""
        ways = {
            "conv": FastPaths(channels_last=False),
            "conv, channels-last": FastPaths(channels_last=True),
            "shifts": FastPaths(depthwise="shifts"),
        }
        for stage, width, side, _, _ in self.stages():
            for way, fast in ways.items():
                layer = Depthwise(width, fast).to(**self.factory)
                inputs = [self.random(self.images, side, side, width), *layer.parameters()]
                flop = 2.0 * 9 * inputs[0].numel()
                times = 4 * self.config.vision.depths[stage]
                yield Case(
                    "depthwise",
                    f"stage {stage}, {way}",
                    list(inputs[0].shape),
                    lambda x, *_, layer=layer: layer(x),
                    inputs,
                    flop,
                    times,
                )

    def window_attention(self) -> Iterator[Case]:
        """Yields the attention inside the windows of every stage, fused and not."""
        window = self.config.vision.window
        for stage, width, side, heads, _ in self.stages():
            shape = (self.images * (-(-side // window)) ** 2, heads, window**2, width // heads)
            flop = 4.0 * shape[0] * width * window**4
            for sdpa in (True, False):
                yield Case(
                    "window_attention",
                    f"stage {stage}, {'sdpa' if sdpa else 'plain'}",
                    list(shape),
                    lambda q, k, v, sdpa=sdpa: attend(q, k, v, sdpa=sdpa),
                    [self.random(*shape) for _ in range(3)],
                    flop,
                    self.config.vision.depths[stage],
                )

    def channel_attention(self) -> Iterator[Case]:
        """Yields the attention among the channels of every stage."""
        for stage, width, side, _, groups in self.stages():
            shape = (self.images, groups, side**2, width // groups)
            inputs = [self.random(*shape) for _ in range(3)]
            flop = 4.0 * inputs[0].numel() * shape[-1]
            depth = self.config.vision.depths[stage]
            name = f"stage {stage}"
            yield Case("channel_attention", name, list(shape), channel_attend, inputs, flop, depth)

    def layer_norm(self) -> Iterator[Case]:
        """Yields the norms of every stage and of the text encoder."""
        language, depths = self.config.language, self.config.vision.depths
        rows = {
            f"stage {stage}": (self.images * side**2, width, 4 * depths[stage])
            for stage, width, side, _, _ in self.stages()
        }
        text = self.size * self.config.context_len(self.text_len)
        rows["text"] = (text, language.width, 2 * language.layers + 1)
        for name, (count, width, times) in rows.items():
            norm = nn.LayerNorm(width, **self.factory)
            x = self.random(count, width)
            yield Case(
                "layer_norm",
                name,
                [count, width],
                lambda x, *_, norm=norm: norm(x),
                [x, *norm.parameters()],
                times_per_step=times,
            )

    def softmax(self) -> Iterator[Case]:
        """Yields the softmax of plain attention, in the windows of every stage and in the text."""
        v, language = self.config.vision, self.config.language
        rows = {
            f"stage {stage}, window": (
                self.images * (-(-side // v.window)) ** 2 * heads * v.window**2,
                v.window**2,
                v.depths[stage],
            )
            for stage, _, side, heads, _ in self.stages()
        }
        keys = self.config.context_len(self.text_len)
        rows["text"] = (self.size * language.heads * keys, keys, language.layers)
        for name, (count, width, times) in rows.items():
            x = self.random(count, width)
            run = lambda x: x.softmax(-1)  # noqa: E731
            yield Case("softmax", name, [count, width], run, [x], times_per_step=times)


def measure(case: Case, compile_mode: str, seconds: float) -> dict:
    """Times a case's two passes."""
    device = case.inputs[0].device
    run = case.run
    if compile_mode != "none":
        torch._dynamo.reset()
        run = torch.compile(run, mode=compile_mode, dynamic=False)
    output = run(*case.inputs)
    upstream = torch.randn_like(output)

    def forward():
        with torch.no_grad():
            run(*case.inputs)

    def backward():
        torch.autograd.grad(output, case.inputs, upstream, retain_graph=True, allow_unused=True)

    line = {"kind": case.kind, "name": case.name, "shape": case.shape, "compile": compile_mode}
    line["times_per_step"] = case.times_per_step
    read = sum(x.nbytes for x in case.inputs)
    moved = {"forward": read + output.nbytes, "backward": 2 * read + output.nbytes}
    factor = {"forward": 1, "backward": 2}
    for name, once in (("forward", forward), ("backward", backward)):
        ms = median_ms(once, device, seconds=seconds)
        line[f"{name}_ms"] = ms
        if case.flop:
            line[f"{name}_tflops_per_s"] = factor[name] * case.flop / ms / 1e9
        if case.kind != "matmul":
            line[f"{name}_gb_per_s"] = moved[name] / ms / 1e6
    return line


def main() -> int:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--model", type=Path, default=root / "configs/model/flower.toml")
    add("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    add("--micro-batch", type=int, default=8)
    add("--cameras", type=int, help="cameras of an observation, instead of the model file's")
    add("--text-len", type=int, default=50)
    add("--dtype", nargs="+", default=["bf16"], choices=list(DTYPES))
    add("--compile", nargs="+", default=["none"], choices=("none", *MODES))
    add("--seconds", type=float, default=0.3, help="time to measure each pass for")
    add("--threads", type=int, help="of the CPU")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, config = open_device(args.device), load_toml(args.model)
    if args.cameras:
        config = replace(config, num_cameras=args.cameras)
    emit(environment(device) | {
        "model": args.model.name,
        "micro_batch": args.micro_batch,
        "cameras": config.num_cameras,
        "text_len": args.text_len,
    })
    for dtype in args.dtype:
        micro = Micro(config, args.micro_batch, args.text_len, DTYPES[dtype], device)
        for kind in args.kinds:
            for case in getattr(micro, kind)():
                for mode in args.compile:
                    try:
                        line = measure(case, mode, args.seconds)
                    except torch.OutOfMemoryError:
                        line = {"kind": kind, "name": case.name, "error": "out of memory"}
                    emit(line | {"dtype": dtype})
    return 0


if __name__ == "__main__":
    sys.exit(main())
