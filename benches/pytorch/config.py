"""Sizes and switches of FLOWER, read from `configs/model/*.toml` or from a golden file.

The keys of the dataclasses are those of the `[model]` tables, so a file with an unknown or a
missing key is refused by name.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

SINUSOID_WIDTH = 256
IMAGE_POSITIONS = 50
TEMPORAL_POSITIONS = 100
POSITION_OFFSET = 2
PAD_ID = 1


@dataclass(frozen=True)
class VisionConfig:
    """The image tower (DaViT)."""

    image_size: int
    dims: tuple[int, ...]
    heads: tuple[int, ...]
    groups: tuple[int, ...]
    depths: tuple[int, ...]
    window: int
    stochastic_depth: float = 0.0

    def sides(self) -> list[int]:
        """Returns the side of the feature map of every stage, in cells."""
        side, sides = self.image_size, []
        for stage in range(len(self.dims)):
            kernel, stride, padding = patch_geometry(stage)
            side = (side + 2 * padding - kernel) // stride + 1
            sides.append(side)
        return sides

    def num_tokens(self) -> int:
        """Returns the tokens of one image: the mean and every cell."""
        return 1 + self.sides()[-1] ** 2

    def num_blocks(self) -> int:
        """Returns the number of blocks, spatial and channel ones."""
        return 2 * sum(self.depths)


@dataclass(frozen=True)
class LanguageConfig:
    """The text encoder (BART)."""

    width: int
    layers: int
    heads: int
    ffn: int
    vocab_size: int
    max_positions: int
    dropout: float = 0.0


@dataclass(frozen=True)
class FlowConfig:
    """The flow transformer."""

    width: int
    heads: int
    layers: int
    modulation_rank: int
    rope_theta: float
    rope_table_len: int
    action_horizon: int
    dropout_attention: float = 0.0
    dropout_residual: float = 0.0
    dropout_mlp: float = 0.0
    dropout_proprio: float = 0.0
    norm: str = "rms"

    def hidden(self) -> int:
        """Returns the hidden width of the gated feed-forward layer."""
        return -(-(2 * 4 * self.width // 3) // 256) * 256


@dataclass(frozen=True)
class Space:
    """An action space: its name in the weights, its width, and that of its proprioception."""

    name: str
    dim: int
    proprio_dim: int = 0


FLOWER_SPACES = (
    Space("joint_single", 8),
    Space("eef_delta", 7),
    Space("bimanual_nav", 16, proprio_dim=16),
)


@dataclass(frozen=True)
class FlowerConfig:
    """All sizes and switches of the model.

    `token_order` is `flow_images_text` [P] or `images_flow_text` [C]; `encoder_mask` is
    `text_and_flow` [P] or `none` [C]; `cross_attention_mask` is `additive` [P], `boolean` or
    `none` [C].
    """

    num_cameras: int
    token_order: str
    encoder_mask: str
    cross_attention_mask: str
    vision: VisionConfig
    language: LanguageConfig
    flow: FlowConfig
    token_dropout: float = 0.0
    spaces: tuple[Space, ...] = FLOWER_SPACES

    def __post_init__(self):
        choices = {
            "token_order": ("flow_images_text", "images_flow_text"),
            "encoder_mask": ("text_and_flow", "none"),
            "cross_attention_mask": ("additive", "boolean", "none"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"model.{key} = {getattr(self, key)!r}: use one of {allowed}")
        if self.flow.norm not in ("rms", "variance"):
            raise ValueError(f"model.flow.norm = {self.flow.norm!r}: use rms or variance")

    def context_len(self, text_len: int) -> int:
        """Returns the length of the joined sequence for `text_len` text tokens."""
        return self.num_cameras * self.vision.num_tokens() + 1 + text_len

    def faults(self, text_len: int) -> list[str]:
        """Returns the tables that are too short for `text_len` text tokens."""
        joined, chunk, faults = self.context_len(text_len), self.flow.action_horizon, []
        if joined > self.language.max_positions:
            faults.append(f"{joined} joined tokens: raise language.max_positions")
        if chunk > self.flow.rope_table_len:
            faults.append(f"a chunk of {chunk} steps: raise flow.rope_table_len")
        return faults

    def finetuning(self) -> FlowerConfig:
        """Returns the same sizes with the order and masks of [C]."""
        return replace(
            self,
            token_order="images_flow_text",
            encoder_mask="none",
            cross_attention_mask="none",
        )

    def without_dropout(self) -> FlowerConfig:
        """Returns the same graph with every dropout rate at 0."""

        def zero(part):
            rates = [f.name for f in fields(part) if "drop" in f.name or "stochastic" in f.name]
            return replace(part, **dict.fromkeys(rates, 0.0))

        return replace(
            zero(self), vision=zero(self.vision), language=zero(self.language), flow=zero(self.flow)
        )


@dataclass
class FastPaths:
    """Implementations of the same arithmetic that a run may choose between.

    `sdpa`: fused attention instead of two matrix products and a softmax. `channels_last`: the
    convolutions run on the maps as they lie, [B, H, W, C] in memory, instead of on [B, C, H, W]
    copies. `depthwise`: `conv` calls the library, `shifts` adds nine shifted products, which a
    compiler can fuse into one kernel.
    """

    sdpa: bool = True
    channels_last: bool = True
    depthwise: str = field(default="conv", metadata={"choices": ("conv", "shifts")})


def patch_geometry(stage: int) -> tuple[int, int, int]:
    """Returns kernel, stride and padding of a stage's patch convolution."""
    return (7, 4, 3) if stage == 0 else (3, 2, 1)


def load_toml(path: str | Path) -> FlowerConfig:
    """Reads the `[model]` table of a TOML file."""
    table = tomllib.loads(Path(path).read_text())["model"]
    parts = {"vision": VisionConfig, "language": LanguageConfig, "flow": FlowConfig}
    for key, kind in parts.items():
        table[key] = _build(kind, table[key], f"{path}: model.{key}")
    return _build(FlowerConfig, table, f"{path}: model")


def _build(kind, table: dict, where: str):
    known = {f.name for f in fields(kind)} - {"spaces"}
    if unknown := set(table) - known:
        raise ValueError(f"{where} has unknown keys {sorted(unknown)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


# ---- golden files ------------------------------------------------------------------------------


def golden_vision(c: dict) -> VisionConfig:
    """Returns the image tower of a golden file's `config`."""
    return VisionConfig(
        image_size=c["px"],
        dims=tuple(c["dims"]),
        heads=tuple(c["vheads"]),
        groups=tuple(c["groups"]),
        depths=tuple(c["depths"]),
        window=c["window"],
    )


def golden_language(c: dict) -> LanguageConfig:
    """Returns the text encoder of a golden file's `config`."""
    return LanguageConfig(
        width=c["d"],
        layers=c.get("vl", c["layers"]),
        heads=c.get("vh", c.get("heads")),
        ffn=c["ffn"],
        vocab_size=c["vocab"],
        max_positions=c["maxpos"],
    )


def golden_flow(c: dict) -> FlowConfig:
    """Returns the flow transformer of a golden file's `config`; its modulation has rank 256."""
    return FlowConfig(
        width=c["D"],
        heads=c["H"],
        layers=c["layers"],
        modulation_rank=c.get("lora_dim", 256),
        rope_theta=c["theta"],
        rope_table_len=c["qlen"],
        action_horizon=c["L"],
    )


def golden_joined(c: dict) -> FlowerConfig:
    """Returns the whole model of the golden file `joined`, in the form of [P]."""
    return FlowerConfig(
        num_cameras=1,
        token_order="flow_images_text",
        encoder_mask="text_and_flow",
        cross_attention_mask="additive",
        vision=golden_vision(c),
        language=golden_language(c),
        flow=golden_flow(c),
    )
