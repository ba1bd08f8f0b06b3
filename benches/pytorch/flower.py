"""FLOWER: images, an instruction and a noisy action chunk to a velocity, a loss, or actions.

    images --vision tower, projection--> image tokens --+
    prompt vector, token table rows ---------------------+--> joined sequence --BART--> features
    features --norm, linear--> context; (noisy actions, time, context) --flow blocks--> velocity

The modules carry the names of published checkpoints, so `load_weights` takes a file as it is. The
forms of pretraining [P] and finetuning [C] differ in `FlowerConfig` alone.

Legend: B batch, N cameras, T text tokens, S joined tokens, H action horizon, A action width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import FastPaths, FlowerConfig, LanguageConfig, Space, VisionConfig
from flow_transformer import Context, FlowHead, Spaces
from language import LanguageModel
from vision import ImageEncoder


class Batch(NamedTuple):
    """Observations, and for training their actions.

    Shapes: images [B, N, 3, S, S]; input_ids and text_mask [B, T]; frequency_hz [B]; spaces one
    index or [B]; actions, noise and valid [B, H, A]; t [B]; proprio [B, P]; camera_present [B, N].
    """

    images: Tensor
    input_ids: Tensor
    text_mask: Tensor
    frequency_hz: Tensor
    spaces: Spaces
    actions: Tensor | None = None
    noise: Tensor | None = None
    t: Tensor | None = None
    valid: Tensor | None = None
    proprio: Tensor | None = None
    camera_present: Tensor | None = None


class Vlm(ImageEncoder):
    """The encoder half of Florence-2."""

    def __init__(self, vision: VisionConfig, language: LanguageConfig, fast: FastPaths):
        super().__init__(vision, language.width, fast)
        self.language_model = LanguageModel(language, fast)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)


class Flower(FlowHead):
    """The whole model."""

    def __init__(self, config: FlowerConfig, fast: FastPaths):
        super().__init__(
            config.flow,
            config.language.width,
            config.spaces,
            fast,
            config.cross_attention_mask,
        )
        self.vlm = Vlm(config.vision, config.language, fast)
        # A constant, saved by us and not by the reference.
        self.register_buffer("prompt_embeds", torch.empty(1, 1, config.language.width))
        self.reset_prompt()
        self.config = config

    def reset_prompt(self) -> None:
        """Sets the prompt vector to the mean of the token table without its last row."""
        table = self.vlm.language_model.model["shared"].weight
        self.prompt_embeds.copy_(table[:-1].detach().float().mean(0).view(1, 1, -1))

    def freeze_token_table(self) -> None:
        """Keeps the token table as it is, as [P] does."""
        self.vlm.language_model.model["shared"].requires_grad_(False)

    # ---- encoder -------------------------------------------------------------------------------

    def join(self, images_BLD: Tensor, ids_BT: Tensor) -> Tensor:
        """Joins image tokens, prompt vector and text in the configured order.

        Shapes: [B, L, D], [B, T] -> [B, S, D].
        """
        text = self.vlm.language_model.token_embeddings(ids_BT)
        prompt = self.prompt_embeds.to(text.dtype).expand(len(ids_BT), -1, -1)
        if self.config.token_order == "flow_images_text":
            return torch.cat((prompt, images_BLD, text), 1)
        return torch.cat((images_BLD, prompt, text), 1)

    def content_mask(self, batch: Batch, image_tokens: int) -> Tensor:
        """Returns 1 at images and words, 0 at the prompt vector, padding and absent cameras.

        Shapes: -> [B, S].
        """
        size, cameras = batch.images.shape[:2]
        text = batch.text_mask.float()
        if batch.camera_present is None:
            images = text.new_ones(size, image_tokens)
        else:
            images = batch.camera_present.float()
            images = images.repeat_interleave(image_tokens // cameras, 1)
        prompt = text.new_zeros(size, 1)
        if self.config.token_order == "flow_images_text":
            return torch.cat((prompt, images, text), 1)
        return torch.cat((images, prompt, text), 1)

    def encode_joined(self, joined_BSD: Tensor, content_BS: Tensor) -> Tensor:
        """Shapes: [B, S, D], [B, S] -> [B, S, D]."""
        mask = content_BS if self.config.encoder_mask == "text_and_flow" else None
        features = self.vlm.language_model.encode(joined_BSD, mask)
        return F.dropout(features, self.config.token_dropout, self.training)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the features and the mask of their content.

        Shapes: -> [B, S, D], [B, S].
        """
        images = self.vlm.image_tokens(batch.images.to(self.cond_linear.weight.dtype))
        joined = self.join(images, batch.input_ids)
        content = self.content_mask(batch, images.shape[1])
        return self.encode_joined(joined, content), content

    # ---- training and inference ----------------------------------------------------------------

    def observe(self, batch: Batch) -> Context:
        """Returns what the flow transformer needs of the observations, for all flow times."""
        features, content = self.encode(batch)
        return self.context(features, content, batch.spaces, batch.frequency_hz, batch.proprio)

    def forward(self, batch: Batch, trace: dict[str, Tensor] | None = None) -> Tensor:
        """Returns the loss of a training batch. Shapes: -> []."""
        context = self.observe(batch)
        return self.flow_loss(batch.actions, batch.noise, batch.t, context, batch.valid, trace)

    def act(self, batch: Batch, noise_BHA: Tensor, steps: int) -> Tensor:
        """Returns actions in [-1, 1]. Shapes: [B, H, A] -> [B, H, A]."""
        return self.denoise(noise_BHA, steps, self.observe(batch))


def build(config: FlowerConfig, fast: FastPaths, device: torch.device | str = "cpu") -> Flower:
    """Builds a model with random weights on a device."""
    with torch.device(device):
        return Flower(config, fast)


def spaces_of(weights: dict[str, Tensor], order: list[str] | None = None) -> tuple[Space, ...]:
    """Returns the action spaces of a file of weights.

    `order` gives their indices; without it those of FLOWER come first, in their own order, then
    the others by name.
    """
    prefix, suffix = "action_decoders.", ".weight"
    dims = {
        name.removeprefix(prefix).removesuffix(suffix): tensor.shape[0]
        for name, tensor in weights.items()
        if name.startswith(prefix) and name.endswith(suffix)
    }
    known = ("joint_single", "eef_delta", "bimanual_nav")
    if order is None:
        order = sorted(dims, key=lambda n: (known.index(n) if n in known else len(known), n))
    if set(order) != set(dims):
        raise ValueError(f"the weights hold the action spaces {sorted(dims)}, not {order}")
    proprio = {name: weights.get(f"proprio_encoders.{name}.fc1.weight") for name in order}
    return tuple(
        Space(name, dims[name], 0 if proprio[name] is None else proprio[name].shape[1])
        for name in order
    )
