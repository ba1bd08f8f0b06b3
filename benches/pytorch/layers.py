"""Attention, norms and loading that several parts of the model share.

Legend: B batch, H heads, Q queries, K keys, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Stored in published checkpoints but derived from other values, or read by nothing.
DERIVED = (
    "encoder.embed_tokens.weight",
    "final_logits_bias",
    "pos_idx_to_embed",
    "self_attn.cos",
    "self_attn.sin",
    "action_space_embedder.",
)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sdpa: bool,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Returns softmax(q k^T / sqrt(width) + mask) v.

    Shapes: q [B, H, Q, D], k and v [B, H, K, D] -> [B, H, Q, D]; mask broadcasts to [B, H, Q, K]:
    boolean, where False hides a key, or a number to add to the logit.
    """
    if sdpa:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal
        )
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
        logits = logits.masked_fill(~seen, float("-inf"))
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    elif mask is not None:
        logits = logits + mask
    return F.dropout(logits.softmax(-1), dropout, dropout > 0.0).to(v.dtype) @ v


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Shapes: [B, Q, D] -> [B, heads, Q, D / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Shapes: [B, heads, Q, d] -> [B, Q, heads * d]."""
    return x.transpose(1, 2).flatten(2)


class RmsNorm(nn.Module):
    """Norm without mean subtraction and bias.

    `rms` divides by the root of the mean square; `variance` by that of the unbiased variance, as
    early releases of timm did under the same name.
    """

    def __init__(self, width: int, variant: str = "rms", eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variant = variant
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., D] -> [..., D]."""
        weight = self.weight.to(x.dtype)
        if self.variant == "rms":
            return F.rms_norm(x, (x.shape[-1],), weight, self.eps)
        variance = x.float().var(-1, keepdim=True)
        return (x * torch.rsqrt(variance + self.eps)).to(x.dtype) * weight


def load_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copies tensors of canonical names into a module.

    Refuses a missing or unknown name, and a wrong shape; tensors that can be derived (`DERIVED`)
    may be absent, and the prompt vector is then the mean of the token table.
    """
    missing, unknown = module.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not any(part in name for part in DERIVED)]
    if "prompt_embeds" in missing:
        missing.remove("prompt_embeds")
        module.reset_prompt()
    if missing or unknown:
        raise ValueError(f"weights do not fit: missing {missing[:8]}, unknown {list(unknown)[:8]}")


def num_parameters(module: nn.Module) -> int:
    """Returns the number of parameter values, a tied one counted once."""
    return sum(p.numel() for p in module.parameters())
