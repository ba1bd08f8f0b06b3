"""A training step and a policy in one choice of precision, compilation and fast paths."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from config import FastPaths, FlowerConfig
from flow_block import FlowBlock
from flower import Batch, Flower, build
from language import EncoderLayer
from optimizer import Ema, MasterWeights, adamw, clip, parameter_groups
from vision import Block

PRECISIONS = ("f32", "tf32", "autocast", "bf16")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Setting:
    """One combination to measure.

    `precision`: `f32`; `tf32`, the same with tf32 products; `autocast`, f32 weights with bf16
    operations; `bf16`, bf16 weights with an f32 master copy in the optimizer. `compile`: `none`, a
    mode of torch.compile for the whole graph, or `blocks:MODE` for one block at a time.
    """

    precision: str = "f32"
    compile: str = "none"
    sdpa: bool = True
    channels_last: bool = True
    depthwise: str = "conv"
    fused_adamw: bool = True

    def __post_init__(self):
        mode = self.compile.removeprefix("blocks:")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r}: use one of {PRECISIONS}")
        if mode not in MODES and self.compile != "none":
            raise ValueError(f"compile {self.compile!r}: use none, blocks:MODE or one of {MODES}")

    def fast_paths(self) -> FastPaths:
        """Returns the choice of implementations."""
        return FastPaths(self.sdpa, self.channels_last, self.depthwise)

    def as_dict(self) -> dict:
        """Returns the fields by name."""
        return asdict(self)

    def autocast(self, device: torch.device):
        """Returns the context to run a forward pass in."""
        if self.precision == "autocast":
            return torch.autocast(device.type, torch.bfloat16)
        return contextlib.nullcontext()


def make_model(config: FlowerConfig, setting: Setting, device: torch.device) -> Flower:
    """Builds a model with random f32 weights and sets the precision of f32 products."""
    torch.set_float32_matmul_precision("high" if setting.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = setting.precision == "tf32"
    return build(config, setting.fast_paths(), device)


def compiled(run, setting: Setting):
    """Returns a function as the setting compiles whole graphs, else the function itself."""
    if setting.compile == "none" or setting.compile.startswith("blocks:"):
        return run
    return torch.compile(run, mode=setting.compile, dynamic=False)


def compile_blocks(model: Flower, setting: Setting) -> None:
    """Compiles every block, in place; equal blocks share their code."""
    # Blocks of all stages and batch sizes are variants of few functions.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 4096
    if setting.compile.startswith("blocks:"):
        mode = setting.compile.removeprefix("blocks:")
        for module in model.modules():
            if isinstance(module, (Block, EncoderLayer, FlowBlock)):
                module.compile(mode=mode, dynamic=False)


def new_step(setting: Setting) -> None:
    """Tells CUDA graphs that the results of the last step are no longer needed."""
    if setting.compile != "none":
        torch.compiler.cudagraph_mark_step_begin()


class TrainStep:
    """Forward, backward, clipping, AdamW and, if asked for, EMA."""

    def __init__(
        self,
        model: Flower,
        setting: Setting,
        device: torch.device,
        stage: str = "pretrain",
        max_norm: float | None = 1.0,
        ema: bool = False,
    ):
        self.model, self.setting, self.device = model.train(), setting, device
        self.max_norm = max_norm
        if setting.precision == "bf16":
            self.weights = MasterWeights(model)
            named = self.weights.named()
        else:
            self.weights = None
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.trained = [p for _, p in named]
        self.optimizer = adamw(parameter_groups(named, stage), setting.fused_adamw)
        self.ema = Ema(self.trained) if ema else None
        self.steps = 0
        compile_blocks(model, setting)
        self.forward = compiled(model, setting)

    def __call__(self, batch: Batch) -> Tensor:
        """Trains on a batch; returns its loss, without waiting."""
        new_step(self.setting)
        with self.setting.autocast(self.device):
            loss = self.forward(batch)
        loss.backward()
        self.update()
        self.model.zero_grad(set_to_none=True)
        return loss.detach()

    def update(self) -> None:
        """Applies the gradients that the model holds."""
        if self.weights is not None:
            self.weights.take_gradients()
        if self.max_norm is not None:
            clip([p for p in self.trained if p.grad is not None], self.max_norm)
        self.optimizer.step()
        if self.weights is not None:
            self.weights.publish()
        self.steps += 1
        if self.ema is not None:
            self.ema.update(self.steps)


class Policy:
    """Observations to actions, without gradients."""

    def __init__(self, model: Flower, setting: Setting, device: torch.device):
        self.model, self.setting, self.device = model.eval(), setting, device
        if setting.precision == "bf16":
            for p in model.parameters():
                p.data = p.data.bfloat16()
        compile_blocks(model, setting)
        model.observe = compiled(model.observe, setting)
        model.velocity = compiled(model.velocity, setting)

    @torch.no_grad()
    def __call__(self, batch: Batch, noise_BHA: Tensor, steps: int) -> Tensor:
        """Returns actions. Shapes: [B, H, A] -> [B, H, A]."""
        new_step(self.setting)
        with self.setting.autocast(self.device):
            return self.model.act(batch, noise_BHA, steps)


def random_batch(
    config: FlowerConfig, size: int, text_len: int, spaces: list[str], device: torch.device
) -> Batch:
    """Draws a batch; with several action spaces its samples take turns.

    Shapes: as `Batch`, for `size` samples.
    """
    names = [space.name for space in config.spaces]
    indices = [names.index(name) for name in spaces]
    width = max(config.spaces[i].dim for i in indices)
    turns = torch.tensor([indices[i % len(indices)] for i in range(size)], device=device)
    v, shape = config.vision, (size, config.flow.action_horizon, width)
    images = (size, config.num_cameras, 3, v.image_size, v.image_size)
    text = (size, text_len)
    return Batch(
        images=torch.randn(images, device=device),
        input_ids=torch.randint(3, config.language.vocab_size, text, device=device),
        text_mask=torch.ones(text, device=device),
        frequency_hz=torch.full((size,), 10.0, device=device),
        spaces=indices[0] if len(indices) == 1 else turns,
        actions=torch.rand(shape, device=device) * 2 - 1,
        noise=torch.randn(shape, device=device),
        t=torch.rand(size, device=device),
    )
