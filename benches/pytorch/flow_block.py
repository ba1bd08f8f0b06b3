"""One block of the flow transformer.

Legend: B batch, H action horizon, S context tokens, D width, d width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import FastPaths, FlowConfig
from layers import RmsNorm, attend, join_heads, split_heads


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns queries or keys by their position; channel j is paired with j + width / 2.

    Shapes: [B, heads, H, d], tables [at least H, d / 2] -> [B, heads, H, d].
    """
    cos, sin = (table[: x.shape[2]].to(x.dtype) for table in (cos, sin))
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class SelfAttention(nn.Module):
    """Causal attention over the action chunk."""

    def __init__(self, config: FlowConfig, fast: FastPaths):
        super().__init__()
        width, head = config.width, config.width // config.heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.q_norm = RmsNorm(head, config.norm)
        self.k_norm = RmsNorm(head, config.norm)
        pair = torch.arange(0, head, 2, dtype=torch.float32)
        angle = torch.outer(
            torch.arange(config.rope_table_len, dtype=torch.float32),
            config.rope_theta ** (-pair / head),
        )
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.config = config
        self.fast = fast

    def forward(self, x_BHD: Tensor) -> Tensor:
        """Shapes: [B, H, D] -> [B, H, D]."""
        qkv = self.qkv(x_BHD).unflatten(-1, (3, self.config.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q = rotate(self.q_norm(q), self.cos, self.sin)
        k = rotate(self.k_norm(k), self.cos, self.sin)
        dropout = self.config.dropout_attention if self.training else 0.0
        y = attend(q, k, v, sdpa=self.fast.sdpa, causal=True, dropout=dropout)
        return F.dropout(self.proj(join_heads(y)), self.config.dropout_residual, self.training)


class CrossAttention(nn.Module):
    """Attention to the context. Keys and values do not depend on the flow time."""

    def __init__(self, config: FlowConfig, fast: FastPaths):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "proj"):
            setattr(self, name, nn.Linear(config.width, config.width, bias=False))
        self.q_norm = RmsNorm(config.width // config.heads, config.norm)
        self.k_norm = RmsNorm(config.width // config.heads, config.norm)
        self.config = config
        self.fast = fast

    def keys_values(self, context_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes: [B, S, D] -> two of [B, heads, S, d]."""
        k = self.k_norm(split_heads(self.k_proj(context_BSD), self.config.heads))
        return k, split_heads(self.v_proj(context_BSD), self.config.heads)

    def forward(self, x_BHD: Tensor, kv: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Shapes: [B, H, D], two of [B, heads, S, d], [B, 1, 1, S] -> [B, H, D]."""
        q = self.q_norm(split_heads(self.q_proj(x_BHD), self.config.heads))
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        dropout = self.config.dropout_attention if self.training else 0.0
        y = attend(q, *kv, sdpa=self.fast.sdpa, mask=mask, dropout=dropout)
        return F.dropout(self.proj(join_heads(y)), self.config.dropout_residual, self.training)


class GatedMlp(nn.Module):
    """W3 dropout(SiLU(W1 x) * W2 x)."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.hidden(), bias=False)
        self.fc2 = nn.Linear(config.width, config.hidden(), bias=False)
        self.proj = nn.Linear(config.hidden(), config.width, bias=False)
        self.dropout = config.dropout_mlp

    def forward(self, x_BHD: Tensor) -> Tensor:
        """Shapes: [B, H, D] -> [B, H, D]."""
        hidden = F.silu(self.fc1(x_BHD)) * self.fc2(x_BHD)
        return self.proj(F.dropout(hidden, self.dropout, self.training))


def modulate(x_BHD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Shapes: [B, H, D], [B, D], [B, D] -> [B, H, D]."""
    return x_BHD * (1.0 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)


class FlowBlock(nn.Module):
    """Self-attention, cross-attention and MLP; the first and the last are modulated."""

    def __init__(self, config: FlowConfig, fast: FastPaths):
        super().__init__()
        width, rank = config.width, config.modulation_rank
        self.norm1, self.norm2, self.norm3 = (RmsNorm(width, config.norm) for _ in range(3))
        self.self_attn = SelfAttention(config, fast)
        self.cross_attn = CrossAttention(config, fast)
        self.mlp = GatedMlp(config)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(width, rank), nn.Linear(rank, 6 * width)
        )

    def forward(
        self,
        x_BHD: Tensor,
        cond_BD: Tensor,
        kv: tuple[Tensor, Tensor],
        shared: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """`shared` is the modulation that all blocks add to their own.

        Shapes: [B, H, D], [B, D], two of [B, heads, S, d], [B, 6, D], [B, 1, 1, S] -> [B, H, D].
        """
        own = self.adaLN_modulation(cond_BD).unflatten(-1, (6, -1))
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            own if shared is None else own + shared
        ).unbind(1)
        attended = self.self_attn(modulate(self.norm1(x_BHD), shift1, scale1))
        x_BHD = x_BHD + gate1.unsqueeze(1) * attended
        x_BHD = x_BHD + self.cross_attn(self.norm2(x_BHD), kv, mask)
        return x_BHD + gate2.unsqueeze(1) * self.mlp(modulate(self.norm3(x_BHD), shift2, scale2))
