"""Counts the floating-point operations of one sample, matrix product by matrix product.

A multiply-add is two operations. The count is that of the graph as published: windows padded to
their full size, all text positions, every product of the causal attention. Norms, activations and
the softmax are left out, as is usual for model FLOPs utilisation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from config import SINUSOID_WIDTH, FastPaths, FlowerConfig, patch_geometry

# Backward takes two products for each of the forward pass.
TRAIN_FACTOR = 3
PARTS = ("vision", "text", "flow")


@dataclass(frozen=True)
class Product:
    """`times` products [rows, inner] x [inner, cols] of one sample.

    `kind` is `linear` (the rows of a batch stand below each other), `conv` (the same, after
    gathering the patches), `depthwise` or `attention`.
    """

    part: str
    name: str
    kind: str
    rows: int
    inner: int
    cols: int
    times: int

    def flops(self) -> int:
        """Returns the operations of the forward pass."""
        return 2 * self.rows * self.inner * self.cols * self.times


def vision(config: FlowerConfig) -> Iterator[Product]:
    """Yields the products of all cameras of a sample."""
    v, cameras = config.vision, config.num_cameras
    inputs = 3
    for stage, (width, side, depth) in enumerate(zip(v.dims, v.sides(), v.depths)):
        cells, windows = side * side, (-(-side // v.window)) ** 2
        area, head, group = v.window**2, width // v.heads[stage], width // v.groups[stage]

        def product(name, kind, rows, inner, cols, times):
            return Product("vision", f"stage {stage} {name}", kind, rows, inner, cols, times)

        kernel = patch_geometry(stage)[0]
        yield product("patches", "conv", cameras * cells, inputs * kernel**2, width, 1)
        yield product("depthwise", "depthwise", cameras * cells, 9, width, 4 * depth)
        rows = cameras * windows * area
        yield product("window qkv", "linear", rows, width, 3 * width, depth)
        yield product("window proj", "linear", rows, width, width, depth)
        times = cameras * windows * v.heads[stage] * depth
        yield product("window logits", "attention", area, head, area, times)
        yield product("window values", "attention", area, area, head, times)
        rows = cameras * cells
        yield product("channel qkv", "linear", rows, width, 3 * width, depth)
        yield product("channel proj", "linear", rows, width, width, depth)
        times = cameras * v.groups[stage] * depth
        yield product("channel logits", "attention", group, cells, group, times)
        yield product("channel values", "attention", cells, group, group, times)
        yield product("fc1", "linear", rows, width, 4 * width, 2 * depth)
        yield product("fc2", "linear", rows, 4 * width, width, 2 * depth)
        inputs = width
    tokens = cameras * v.num_tokens()
    yield Product("vision", "projection", "linear", tokens, inputs, config.language.width, 1)


def text(config: FlowerConfig, text_len: int) -> Iterator[Product]:
    """Yields the products of the encoder over the joined sequence."""
    c, s = config.language, config.context_len(text_len)
    yield Product("text", "q, k, v, out", "linear", s, c.width, c.width, 4 * c.layers)
    head = c.width // c.heads
    yield Product("text", "logits", "attention", s, head, s, c.heads * c.layers)
    yield Product("text", "values", "attention", s, s, head, c.heads * c.layers)
    yield Product("text", "fc1", "linear", s, c.width, c.ffn, c.layers)
    yield Product("text", "fc2", "linear", s, c.ffn, c.width, c.layers)


def flow(config: FlowerConfig, text_len: int, action_dim: int) -> Iterator[Product]:
    """Yields the products behind the encoder, for one action space."""
    c, s, t = config.flow, config.context_len(text_len), config.flow.action_horizon
    d, n, hidden = c.width, c.layers, c.hidden()

    def product(name, kind, rows, inner, cols, times=n):
        return Product("flow", name, kind, rows, inner, cols, times)

    yield product("context", "linear", s, config.language.width, d, 1)
    yield product("sinusoids, first", "linear", 1, SINUSOID_WIDTH, d, 2)
    yield product("sinusoids, second", "linear", 1, d, d, 2)
    yield product("shared modulation", "linear", 1, d, 9 * d, 1)
    yield product("action encoder, first", "linear", t, action_dim, d, 1)
    yield product("action encoder, second", "linear", t, d, d, 1)
    yield product("action decoder", "linear", t, d, action_dim, 1)
    yield product("modulation, down", "linear", 1, d, c.modulation_rank)
    yield product("modulation, up", "linear", 1, c.modulation_rank, 6 * d)
    yield product("self qkv", "linear", t, d, 3 * d)
    yield product("self and cross proj, cross q", "linear", t, d, d, 3 * n)
    yield product("cross k, v", "linear", s, d, d, 2 * n)
    for name, keys in (("self", t), ("cross", s)):
        yield product(f"{name} logits", "attention", t, d // c.heads, keys, c.heads * n)
        yield product(f"{name} values", "attention", t, keys, d // c.heads, c.heads * n)
    yield product("fc1, fc2", "linear", t, d, hidden, 2 * n)
    yield product("mlp proj", "linear", t, hidden, d)


def products(config: FlowerConfig, text_len: int, action_dim: int = 7) -> list[Product]:
    """Returns all products of one sample's forward pass."""
    return [
        *vision(config),
        *text(config, text_len),
        *flow(config, text_len, action_dim),
    ]


def by_part(config: FlowerConfig, text_len: int, action_dim: int = 7) -> dict[str, int]:
    """Returns the operations of the forward pass of each part."""
    counts = Counter()
    for product in products(config, text_len, action_dim):
        counts[product.part] += product.flops()
    return {part: counts[part] for part in PARTS}


def largest(config: FlowerConfig, text_len: int, count: int = 10) -> list[Product]:
    """Returns the shapes of linear layers with the most work, products of equal shape merged."""
    merged: dict[tuple[int, int, int], Product] = {}
    for p in products(config, text_len):
        if p.kind != "linear":
            continue
        shape = (p.rows, p.inner, p.cols)
        if (first := merged.get(shape)) is not None:
            name, times = f"{first.name} + {p.name}", first.times + p.times
            p = Product(first.part, name, "linear", *shape, times)
        merged[shape] = p
    return sorted(merged.values(), key=Product.flops, reverse=True)[:count]


def compare(config: FlowerConfig, text_len: int) -> tuple[int, int]:
    """Returns our count and that of PyTorch's counter, for one sample of `eef_delta`."""
    from flower import Batch, build

    eef = next(i for i, space in enumerate(config.spaces) if space.name == "eef_delta")
    dim = config.spaces[eef].dim
    fast = FastPaths(sdpa=False, channels_last=False)
    model = build(config, fast, "meta").eval()
    side, horizon = config.vision.image_size, config.flow.action_horizon
    meta = {"device": "meta"}
    ids = torch.zeros(1, text_len, dtype=torch.long, **meta)
    actions = torch.zeros(1, horizon, dim, **meta)
    batch = Batch(
        images=torch.zeros(1, config.num_cameras, 3, side, side, **meta),
        input_ids=ids,
        text_mask=torch.ones_like(ids),
        frequency_hz=torch.zeros(1, **meta),
        spaces=eef,
        actions=actions,
        noise=actions,
        t=torch.zeros(1, **meta),
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch)
    return sum(by_part(config, text_len, dim).values()), counter.get_total_flops()
