"""The image tower (DaViT) and the projection of its last map to tokens.

Maps lie as [B, H, W, C] in memory throughout, so linear layers and norms read them as they are
and a convolution sees them as channels-last.

Legend: B batch, H height, W width, C channels, N cells, G groups, D token width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import IMAGE_POSITIONS, TEMPORAL_POSITIONS, FastPaths, VisionConfig, patch_geometry
from layers import attend


def convolve(conv: nn.Conv2d, x_BHWC: Tensor, fast: FastPaths) -> Tensor:
    """Applies a convolution to a map.

    Shapes: [B, H, W, C] -> [B, H', W', C'].
    """
    x = x_BHWC.permute(0, 3, 1, 2)
    if not fast.channels_last:
        x = x.contiguous(memory_format=torch.contiguous_format)
    return conv(x).permute(0, 2, 3, 1).contiguous()


class Depthwise(nn.Module):
    """A depthwise 3x3 convolution, added to its input."""

    def __init__(self, width: int, fast: FastPaths):
        super().__init__()
        self.fn = nn.ModuleDict({"dw": nn.Conv2d(width, width, 3, padding=1, groups=width)})
        self.fast = fast

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Shapes: [B, H, W, C] -> [B, H, W, C]."""
        conv = self.fn["dw"]
        if self.fast.depthwise == "conv":
            return x_BHWC + convolve(conv, x_BHWC, self.fast)
        height, width = x_BHWC.shape[1:3]
        padded = F.pad(x_BHWC, (0, 0, 1, 1, 1, 1))
        weight = conv.weight.to(x_BHWC.dtype).flatten(1)
        y = x_BHWC + conv.bias.to(x_BHWC.dtype)
        for tap in range(9):
            row, column = divmod(tap, 3)
            y = y + padded[:, row : row + height, column : column + width] * weight[:, tap]
        return y


class WindowAttention(nn.Module):
    """Attention inside windows; what pads the last ones takes part like any other cell."""

    def __init__(self, width: int, heads: int, window: int, fast: FastPaths):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.heads = heads
        self.window = window
        self.fast = fast

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Shapes: [B, H, W, C] -> [B, H, W, C]."""
        batch, height, width, channels = x_BHWC.shape
        w = self.window
        rows, columns = -(-height // w), -(-width // w)
        x = F.pad(x_BHWC, (0, 0, 0, columns * w - width, 0, rows * w - height))
        x = x.view(batch, rows, w, columns, w, channels).transpose(2, 3)
        x = x.reshape(batch * rows * columns, w * w, channels)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = attend(*qkv.unbind(0), sdpa=self.fast.sdpa)
        y = self.proj(y.transpose(1, 2).flatten(2))
        y = y.view(batch, rows, columns, w, w, channels).transpose(2, 3)
        y = y.reshape(batch, rows * w, columns * w, channels)
        return y[:, :height, :width]


class ChannelAttention(nn.Module):
    """Attention among the channels of a group; a channel's vector is its whole map."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.groups = groups

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Shapes: [B, H, W, C] -> [B, H, W, C]."""
        qkv = self.qkv(x_BHWC.flatten(1, 2)).unflatten(-1, (3, self.groups, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, G, N, C / G]
        y = channel_attend(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(y).view(x_BHWC.shape)


def channel_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns (softmax(q^T k / sqrt(N)) v^T)^T for every group.

    Shapes: all [B, G, N, c] -> [B, G, N, c].
    """
    attention = (q * q.shape[2] ** -0.5).transpose(-1, -2) @ k
    return v @ attention.softmax(-1).to(v.dtype).transpose(-1, -2)


class FeedForward(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, width: int):
        super().__init__()
        layers = {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        self.net = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., C] -> [..., C]."""
        return self.net["fc2"](F.gelu(self.net["fc1"](x)))


class Branch(nn.Module):
    """A residual branch that norms first; `keep` scales each sample's share of it."""

    def __init__(self, width: int, fn: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x_BHWC: Tensor, keep_B: Tensor | None) -> Tensor:
        """Shapes: [B, H, W, C], [B] -> [B, H, W, C]."""
        y = self.fn(self.norm(x_BHWC))
        if keep_B is not None:
            y = y * keep_B.to(y.dtype).view(-1, 1, 1, 1)
        return x_BHWC + y


class Block(nn.Module):
    """A spatial or channel block: convolution, attention, convolution, feed-forward layer."""

    def __init__(self, kind: str, width: int, attention: nn.Module, fast: FastPaths):
        super().__init__()
        self.conv1 = Depthwise(width, fast)
        setattr(self, kind, Branch(width, attention))
        self.conv2 = Depthwise(width, fast)
        self.ffn = Branch(width, FeedForward(width))
        self.kind = kind

    def forward(self, x_BHWC: Tensor, keep: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Shapes: [B, H, W, C] -> [B, H, W, C]; `keep` holds one [B] for each branch."""
        first, second = keep if keep is not None else (None, None)
        x_BHWC = getattr(self, self.kind)(self.conv1(x_BHWC), first)
        return self.ffn(self.conv2(x_BHWC), second)


class PatchEmbedding(nn.Module):
    """The convolution that opens a stage, with a norm after it in the first and before it else."""

    def __init__(self, config: VisionConfig, stage: int, fast: FastPaths):
        super().__init__()
        kernel, stride, padding = patch_geometry(stage)
        inputs = 3 if stage == 0 else config.dims[stage - 1]
        self.proj = nn.Conv2d(inputs, config.dims[stage], kernel, stride, padding)
        self.norm = nn.LayerNorm(config.dims[0] if stage == 0 else inputs)
        self.prenorm = stage > 0
        self.fast = fast

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Shapes: [B, H, W, C] -> [B, H', W', C']."""
        if self.prenorm:
            return convolve(self.proj, self.norm(x_BHWC), self.fast)
        return self.norm(convolve(self.proj, x_BHWC, self.fast))


class VisionTower(nn.Module):
    """DaViT without its final norm and classifier."""

    def __init__(self, config: VisionConfig, fast: FastPaths):
        super().__init__()
        stages = range(len(config.dims))
        self.convs = nn.ModuleList(PatchEmbedding(config, stage, fast) for stage in stages)
        self.blocks = nn.ModuleList(
            nn.ModuleList(self._pair(config, stage, fast) for _ in range(config.depths[stage]))
            for stage in stages
        )
        blocks = config.num_blocks()
        step = config.stochastic_depth / max(blocks - 1, 1)
        rates = torch.arange(blocks, dtype=torch.float32) * step
        self.register_buffer("drop_rates", rates, persistent=False)
        self.stochastic_depth = config.stochastic_depth

    @staticmethod
    def _pair(config: VisionConfig, stage: int, fast: FastPaths) -> nn.ModuleDict:
        width = config.dims[stage]
        window = WindowAttention(width, config.heads[stage], config.window, fast)
        channel = ChannelAttention(width, config.groups[stage])
        return nn.ModuleDict({
            "spatial_block": Block("window_attn", width, window, fast),
            "channel_block": Block("channel_attn", width, channel, fast),
        })

    def draw_keep(self, batch: int) -> Tensor | None:
        """Draws the factors of stochastic depth: 0, or 1 / (probability to keep).

        Shapes: -> [blocks, 2, B]; none when nothing is dropped.
        """
        if not self.training or self.stochastic_depth == 0.0:
            return None
        kept = 1.0 - self.drop_rates.view(-1, 1, 1)
        draws = torch.rand(len(self.drop_rates), 2, batch, device=self.drop_rates.device)
        return (draws < kept) / kept

    def forward(self, images: Tensor, trace: dict[str, Tensor] | None = None) -> Tensor:
        """Returns the last map; `trace` collects the maps on the way.

        Shapes: [B, 3, S, S] -> [B, H, W, C].
        """
        x = images.permute(0, 2, 3, 1)
        keep = self.draw_keep(images.shape[0])
        index = 0
        for stage, (conv, pairs) in enumerate(zip(self.convs, self.blocks)):
            x = conv(x)
            if trace is not None:
                trace[f"stage{stage}_conv"] = x
            for pair, blocks in enumerate(pairs):
                for name, block in blocks.items():
                    x = block(x, None if keep is None else keep[index].unbind(0))
                    index += 1
                    if trace is not None and pair == 0 and name == "spatial_block":
                        trace[f"stage{stage}_block0_spatial"] = x
            if trace is not None:
                trace[f"stage{stage}"] = x
        return x


class TemporalTable(nn.Module):
    """Sinusoids of the frame number, stored with the weights; single frames read row 0."""

    def __init__(self, width: int):
        super().__init__()
        position = torch.arange(TEMPORAL_POSITIONS, dtype=torch.float32).unsqueeze(1)
        angle = position * 10000.0 ** (-torch.arange(0, width, 2) / width)
        table = torch.stack((angle.sin(), angle.cos()), -1).flatten(1)
        self.register_buffer("pos_idx_to_embed", table)


class ImageEncoder(nn.Module):
    """Image tower and projection, under the names they have below `vlm`."""

    def __init__(self, config: VisionConfig, width: int, fast: FastPaths):
        super().__init__()
        last = config.dims[-1]
        self.vision_tower = VisionTower(config, fast)
        self.image_projection = nn.Parameter(torch.randn(last, width) * last**-0.5)
        self.image_proj_norm = nn.LayerNorm(width)
        self.image_pos_embed = nn.ModuleDict({
            name: nn.Embedding(IMAGE_POSITIONS, last // 2)
            for name in ("row_embeddings", "column_embeddings")
        })
        self.visual_temporal_embed = TemporalTable(last)

    def project(self, x_BHWC: Tensor) -> Tensor:
        """Returns the mean token and one token per cell, row by row.

        Shapes: [B, H, W, C] -> [B, 1 + H * W, D].
        """
        _, height, width, _ = x_BHWC.shape
        row = self.image_pos_embed["row_embeddings"].weight[:height]
        column = self.image_pos_embed["column_embeddings"].weight[:width]
        columns = column.unsqueeze(0).expand(height, -1, -1)
        rows = row.unsqueeze(1).expand(-1, width, -1)
        frame = self.visual_temporal_embed.pos_idx_to_embed[0].to(row.dtype)
        x = x_BHWC + (torch.cat((columns, rows), -1) + frame)
        x = x.flatten(1, 2)
        x = torch.cat((x.mean(1, keepdim=True), x), 1)
        return self.image_proj_norm(x @ self.image_projection)

    def image_tokens(self, images: Tensor) -> Tensor:
        """Returns the tokens of all cameras, one camera after another.

        Shapes: [B, N, 3, S, S] -> [B, N * (1 + H * W), D].
        """
        batch, cameras = images.shape[:2]
        tokens = self.project(self.vision_tower(images.flatten(0, 1)))
        return tokens.reshape(batch, cameras * tokens.shape[1], -1)
