"""The text encoder (BART): post-norm layers over the joined sequence.

Legend: B batch, T text tokens, S tokens of the joined sequence, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import PAD_ID, POSITION_OFFSET, FastPaths, LanguageConfig
from layers import attend, join_heads, split_heads


class EncoderAttention(nn.Module):
    """Attention of every token to every other."""

    def __init__(self, config: LanguageConfig, fast: FastPaths):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(config.width, config.width))
        self.heads = config.heads
        self.dropout = config.dropout
        self.fast = fast

    def forward(self, x_BSD: Tensor, mask: Tensor | None) -> Tensor:
        """Shapes: [B, S, D], boolean [B, 1, 1, S] -> [B, S, D]."""
        q, k, v = (
            split_heads(project(x_BSD), self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(
            join_heads(attend(q, k, v, sdpa=self.fast.sdpa, mask=mask, dropout=dropout))
        )


class EncoderLayer(nn.Module):
    """One layer; norms come after the sums."""

    def __init__(self, config: LanguageConfig, fast: FastPaths):
        super().__init__()
        self.self_attn = EncoderAttention(config, fast)
        self.self_attn_layer_norm = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, config.ffn)
        self.fc2 = nn.Linear(config.ffn, config.width)
        self.final_layer_norm = nn.LayerNorm(config.width)
        self.dropout = config.dropout

    def drop(self, x: Tensor) -> Tensor:
        """Applies the layer's dropout in training."""
        return F.dropout(x, self.dropout, self.training)

    def forward(self, x_BSD: Tensor, mask: Tensor | None = None) -> Tensor:
        """Shapes: [B, S, D], boolean [B, 1, 1, S] -> [B, S, D]."""
        x_BSD = self.self_attn_layer_norm(x_BSD + self.drop(self.self_attn(x_BSD, mask)))
        hidden = self.drop(F.gelu(self.fc1(x_BSD)))
        return self.final_layer_norm(x_BSD + self.drop(self.fc2(hidden)))


class Encoder(nn.Module):
    """The layers with their positions."""

    def __init__(self, config: LanguageConfig, shared: nn.Embedding, fast: FastPaths):
        super().__init__()
        self.embed_tokens = shared
        self.embed_positions = nn.Embedding(config.max_positions + POSITION_OFFSET, config.width)
        self.layernorm_embedding = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(EncoderLayer(config, fast) for _ in range(config.layers))
        self.dropout = config.dropout

    def embed(self, x_BSD: Tensor) -> Tensor:
        """Adds the positions 0, 1, ... and norms.

        Shapes: [B, S, D] -> [B, S, D].
        """
        last = POSITION_OFFSET + x_BSD.shape[1]
        positions = self.embed_positions.weight[POSITION_OFFSET:last]
        x_BSD = self.layernorm_embedding(x_BSD + positions)
        return F.dropout(x_BSD, self.dropout, self.training)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Encodes the joined sequence; keys with mask 0 are not attended.

        Shapes: [B, S, D], [B, S] -> [B, S, D].
        """
        mask = None if mask_BS is None else mask_BS.bool()[:, None, None, :]
        x_BSD = self.embed(x_BSD)
        for layer in self.layers:
            x_BSD = layer(x_BSD, mask)
        return x_BSD


class LanguageModel(nn.Module):
    """Token table and encoder, under the names they have below `vlm.language_model`."""

    def __init__(self, config: LanguageConfig, fast: FastPaths):
        super().__init__()
        shared = nn.Embedding(config.vocab_size, config.width, padding_idx=PAD_ID)
        encoder = Encoder(config, shared, fast)
        self.model = nn.ModuleDict({"shared": shared, "encoder": encoder})
        # A buffer that published checkpoints carry; nothing reads it.
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))

    def token_embeddings(self, ids_BT: Tensor) -> Tensor:
        """Shapes: [B, T] -> [B, T, D]."""
        return self.model["shared"](ids_BT)

    def encode(self, x_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Shapes: [B, S, D], [B, S] -> [B, S, D]."""
        return self.model["encoder"](x_BSD, mask_BS)
