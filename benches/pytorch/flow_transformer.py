"""The flow transformer: from noisy actions, a flow time and a context to a velocity.

Legend: B batch, H action horizon, A action width, S context tokens, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import SINUSOID_WIDTH, FastPaths, FlowConfig, Space
from flow_block import FlowBlock
from layers import RmsNorm

# What a batch says about its action spaces: one index for all samples, or one for each ([B]).
Spaces = int | Tensor


class SinusoidEmbedder(nn.Module):
    """Sinusoids of a number and two linear layers.

    The frequencies and their product with the number are f32 in this very order; the published
    weights depend on it, because the argument reaches 1000.
    """

    def __init__(self, width: int, base: float, scale: float):
        super().__init__()
        half = SINUSOID_WIDTH // 2
        table = torch.exp(-math.log(base) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequencies", scale * table, persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(SINUSOID_WIDTH, width), nn.SiLU(), nn.Linear(width, width)
        )

    def sinusoid(self, x_B: Tensor) -> Tensor:
        """Shapes: [B] -> [B, 256], the cosines first."""
        angle = x_B.float().unsqueeze(-1) * self.frequencies
        return torch.cat((angle.cos(), angle.sin()), -1)

    def forward(self, x_B: Tensor) -> Tensor:
        """Shapes: [B] -> [B, D]."""
        return self.mlp(self.sinusoid(x_B).to(self.mlp[0].weight.dtype))


class SpaceEmbedder(nn.Module):
    """An embedding of the action space that published weights carry and no output uses."""

    def __init__(self, width: int, spaces: int):
        super().__init__()
        self.action_embeddings = nn.Parameter(0.02 * torch.randn(spaces, SINUSOID_WIDTH))
        self.mlp = nn.Sequential(
            nn.Linear(SINUSOID_WIDTH, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.requires_grad_(False)

    def forward(self, spaces_B: Tensor) -> Tensor:
        """Shapes: [B] -> [B, D]."""
        return self.mlp(self.action_embeddings[spaces_B])


class ActionEncoder(nn.Module):
    """Two linear layers with an exact GELU between; also encodes proprioception."""

    def __init__(self, inputs: int, width: int, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(inputs, width)
        self.fc2 = nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Reads as many channels as it has inputs.

        Shapes: [..., at least inputs] -> [..., D].
        """
        x = x[..., : self.fc1.in_features].to(self.fc1.weight.dtype)
        hidden = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(hidden), self.dropout, self.training)


class SharedModulation(nn.Module):
    """The modulation that all blocks of an action space add to their own; starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.modCX = nn.Sequential(nn.SiLU(), nn.Linear(width, 9 * width, bias=False))
        nn.init.zeros_(self.modCX[1].weight)

    def forward(self, cond_BD: Tensor) -> Tensor:
        """Shapes: [B, D] -> [B, 9, D]; the last three are read by nothing."""
        return self.modCX(cond_BD).unflatten(-1, (9, -1))


class Context(NamedTuple):
    """What the blocks read of an observation, the same at every flow time."""

    keys_values: list[tuple[Tensor, Tensor]]
    mask: Tensor | None
    spaces: Spaces
    # SN(frequency) + SN(proprioception), [B, D].
    static_cond: Tensor


class FlowHead(nn.Module):
    """Everything behind the encoder, under the names it has in checkpoints."""

    def __init__(
        self,
        config: FlowConfig,
        context_width: int,
        spaces: tuple[Space, ...],
        fast: FastPaths,
        cross_attention_mask: str = "none",
    ):
        super().__init__()
        width = config.width
        self.t_embedder = SinusoidEmbedder(width, 10000.0, 1000.0)
        self.frequency_embedder = SinusoidEmbedder(width, 1000.0, 1.0)
        self.action_space_embedder = SpaceEmbedder(width, len(spaces))
        self.cond_norm = RmsNorm(context_width, config.norm)
        self.cond_linear = nn.Linear(context_width, width, bias=False)
        self.adaln = nn.ModuleDict({s.name: SharedModulation(width) for s in spaces})
        self.action_encoders = nn.ModuleDict({s.name: ActionEncoder(s.dim, width) for s in spaces})
        self.action_decoders = nn.ModuleDict({s.name: nn.Linear(width, s.dim) for s in spaces})
        self.proprio_encoders = nn.ModuleDict({
            s.name: ActionEncoder(s.proprio_dim, width, config.dropout_proprio)
            for s in spaces
            if s.proprio_dim
        })
        self.dit = nn.ModuleList(FlowBlock(config, fast) for _ in range(config.layers))
        self.flow, self.spaces, self.fast = config, spaces, fast
        self.cross_attention_mask = cross_attention_mask
        dims = torch.tensor([s.dim for s in spaces])
        valid = torch.arange(max(s.dim for s in spaces)) < dims.unsqueeze(1)
        self.register_buffer("valid_dims", valid.float(), persistent=False)

    # ---- per action space ----------------------------------------------------------------------

    def each(self, compute, spaces: Spaces) -> Tensor:
        """Returns `compute(space)` of every sample's own space.

        A batch of one space computes that one; a mixed batch computes all and selects, which
        keeps every shape static.
        """
        if isinstance(spaces, int):
            return compute(self.spaces[spaces])
        result = compute(self.spaces[0])
        for index, space in enumerate(self.spaces[1:], start=1):
            own = (spaces == index).view(-1, *(1,) * (result.ndim - 1))
            result = torch.where(own, compute(space), result)
        return result

    def action_tokens(self, z_BHA: Tensor, spaces: Spaces) -> Tensor:
        """Shapes: [B, H, A] -> [B, H, D]."""
        missing = self.valid_dims.shape[1] - z_BHA.shape[2]
        if isinstance(spaces, Tensor) and missing > 0:
            z_BHA = F.pad(z_BHA, (0, missing))
        return self.each(lambda space: self.action_encoders[space.name](z_BHA), spaces)

    def shared_modulation(self, cond_BD: Tensor, spaces: Spaces) -> Tensor:
        """Shapes: [B, D] -> [B, 9, D]."""
        return self.each(lambda space: self.adaln[space.name](cond_BD), spaces)

    def decode(self, x_BHD: Tensor, spaces: Spaces, width: int) -> Tensor:
        """Shapes: [B, H, D] -> [B, H, width], zero beyond the action space."""

        def one(space: Space) -> Tensor:
            return F.pad(self.action_decoders[space.name](x_BHD), (0, width - space.dim))

        return self.each(one, spaces)

    def proprio_embed(self, proprio_BP: Tensor | None, spaces: Spaces, batch: int) -> Tensor:
        """Shapes: [B, P] -> [B, D], zero for a space without an encoder."""
        weight = self.cond_linear.weight
        zeros = weight.new_zeros(batch, weight.shape[0])
        if proprio_BP is None:
            return zeros

        def one(space: Space) -> Tensor:
            return self.proprio_encoders[space.name](proprio_BP) if space.proprio_dim else zeros

        return self.each(one, spaces)

    def valid_mask(self, spaces: Spaces, z_BHA: Tensor) -> Tensor:
        """Returns 1 where an entry belongs to the action space.

        Shapes: [B, H, A] -> [B, H, A].
        """
        dims = self.valid_dims[spaces].view(-1, 1, self.valid_dims.shape[1])
        return dims[..., : z_BHA.shape[2]].expand_as(z_BHA)

    # ---- forward -------------------------------------------------------------------------------

    def project_context(self, features_BSD: Tensor) -> Tensor:
        """Shapes: [B, S, context width] -> [B, S, D]."""
        return self.cond_linear(self.cond_norm(features_BSD))

    def context(
        self,
        features_BSD: Tensor,
        content_BS: Tensor | None,
        spaces: Spaces,
        frequency_hz: Tensor,
        proprio_BP: Tensor | None = None,
    ) -> Context:
        """Computes what does not depend on the flow time.

        Shapes: [B, S, D], [B, S], -, [B], [B, P].
        """
        context = self.project_context(features_BSD)
        mask = None
        if content_BS is not None and self.cross_attention_mask != "none":
            mask = content_BS[:, None, None, :]
            mask = mask.bool() if self.cross_attention_mask == "boolean" else mask.float()
        proprio = self.proprio_embed(proprio_BP, spaces, features_BSD.shape[0])
        static = stateless_norm(self.frequency_embedder(frequency_hz)) + stateless_norm(proprio)
        keys_values = [block.cross_attn.keys_values(context) for block in self.dit]
        return Context(keys_values, mask, spaces, static)

    def velocity(
        self,
        z_BHA: Tensor,
        t_B: Tensor,
        context: Context,
        trace: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Returns the velocity at `z`; `trace` collects the values on the way.

        Shapes: [B, H, A], [B] -> f32 [B, H, A].
        """
        cond = stateless_norm(self.t_embedder(t_B)) + context.static_cond
        shared = self.shared_modulation(cond, context.spaces)
        x = tokens = self.action_tokens(z_BHA, context.spaces)
        for block, kv in zip(self.dit, context.keys_values):
            x = block(x, cond, kv, shared[:, :6], context.mask)
        if trace is not None:
            trace.update(global_cond=cond, global_adaln=shared.transpose(0, 1))
            trace.update(action_tokens=tokens, dit_out=x)
        return self.decode(x, context.spaces, z_BHA.shape[2]).float()

    def flow_loss(
        self,
        actions_BHA: Tensor,
        noise_BHA: Tensor,
        t_B: Tensor,
        context: Context,
        valid_BHA: Tensor | None = None,
        trace: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Returns the mean of (noise - actions - velocity)^2 over the valid entries.

        Shapes: [B, H, A], [B, H, A], [B], -, [B, H, A] -> [].
        """
        own = self.valid_mask(context.spaces, actions_BHA)
        noise = noise_BHA.float() * own
        actions = actions_BHA.float() * own
        t = t_B.float().view(-1, 1, 1)
        z = (1.0 - t) * actions + t * noise
        velocity = self.velocity(z, t_B, context, trace)
        valid = own if valid_BHA is None else valid_BHA
        if trace is not None:
            trace.update(z_t=z, velocity=velocity, valid_mask=own)
        return ((noise - actions - velocity).square() * valid).sum() / valid.sum()

    def denoise(
        self,
        noise_BHA: Tensor,
        steps: int,
        context: Context,
        trajectory: list[Tensor] | None = None,
    ) -> Tensor:
        """Takes `steps` Euler steps from noise to actions in [-1, 1].

        Shapes: [B, H, A] -> [B, H, A]; `trajectory` collects the point before every step and the
        last one.
        """
        own = self.valid_mask(context.spaces, noise_BHA)
        z = noise_BHA.float() * own
        for step in range(steps, 0, -1):
            if trajectory is not None:
                trajectory.append(z)
            t = torch.full((z.shape[0],), step / steps, device=z.device)
            z = (z - self.velocity(z, t, context) / steps) * own
        if trajectory is not None:
            trajectory.append(z)
        return z.clamp(-1.0, 1.0)


def stateless_norm(x_BD: Tensor) -> Tensor:
    """Norms without weights; a zero vector stays zero.

    Shapes: [B, D] -> [B, D].
    """
    return F.layer_norm(x_BD, x_BD.shape[-1:], eps=1e-6)
