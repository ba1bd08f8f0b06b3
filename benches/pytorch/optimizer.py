"""AdamW in the forms of the two stages, gradient clipping, f32 master weights and EMA."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

NO_DECAY = ("bias", "layernorm", "ln", "norm")


def decays(name: str) -> bool:
    """Returns whether a parameter of that name decays; `ln` exempts every modulation matrix."""
    return not any(part in name.lower() for part in NO_DECAY)


def parameter_groups(
    named: Iterable[tuple[str, Tensor]], stage: str, lr: float = 2e-5, weight_decay: float = 0.05
) -> list[dict]:
    """Returns the groups of [C] (`finetune`) or [P] (`pretrain`).

    [P] trains the encoder with its own rate, decay and second beta; its two optimizers are two
    sets of groups in one.
    """
    named = list(named)
    if stage == "pretrain":
        head = [(n, p) for n, p in named if not n.startswith("vlm.")]
        vlm = [p for n, p in named if n.startswith("vlm.")]
        groups = _by_decay(head, 1e-4, 0.1)
        groups.append({"params": vlm, "lr": 2e-5, "weight_decay": 0.01, "betas": (0.9, 0.99)})
    else:
        groups = _by_decay(named, lr, weight_decay)
    return [group for group in groups if group["params"]]


def _by_decay(named: list[tuple[str, Tensor]], lr: float, weight_decay: float) -> list[dict]:
    betas = (0.9, 0.95)
    return [
        {
            "params": [p for n, p in named if decays(n) == wanted],
            "lr": lr,
            "weight_decay": weight_decay if wanted else 0.0,
            "betas": betas,
        }
        for wanted in (True, False)
    ]


def adamw(groups: list[dict], fused: bool) -> torch.optim.AdamW:
    """Returns AdamW with eps 1e-8; not fused, it runs one kernel per operation over all tensors."""
    how = {"fused": True} if fused else {"foreach": True}
    return torch.optim.AdamW(groups, eps=1e-8, **how)


def clip(parameters: Iterable[Tensor], max_norm: float = 1.0) -> Tensor:
    """Scales gradients by min(1, max_norm / (norm + 1e-6)); returns the norm, without waiting."""
    return nn.utils.clip_grad_norm_(list(parameters), max_norm, foreach=True)


class MasterWeights:
    """f32 copies of parameters that live in bf16, for an optimizer to work on."""

    def __init__(self, model: nn.Module):
        """Copies the trained parameters, then casts all of the model's to bf16.

        Buffers stay f32: rotary and sinusoid tables lose too much.
        """
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in trained]
        self.live = [p for _, p in trained]
        self.master = [nn.Parameter(p.detach().clone().float()) for p in self.live]
        self.grads = [torch.zeros_like(p) for p in self.master]
        for p in model.parameters():
            p.data = p.data.bfloat16()

    def named(self) -> list[tuple[str, Tensor]]:
        """Returns the f32 parameters under the names of the model's."""
        return list(zip(self.names, self.master))

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Copies the gradients to f32; a parameter without one keeps none."""
        used = [i for i, p in enumerate(self.live) if p.grad is not None]
        torch._foreach_copy_([self.grads[i] for i in used], [self.live[i].grad for i in used])
        for p in self.master:
            p.grad = None
        for i in used:
            self.master[i].grad = self.grads[i]

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the f32 parameters into the model."""
        torch._foreach_copy_(self.live, self.master)


class Ema:
    """Averaged copies of parameters, with the decay of [C]."""

    def __init__(
        self, parameters: list[Tensor], power: float = 2 / 3, inv_gamma=1.0, ceiling=0.9999
    ):
        self.parameters = parameters
        self.average = [p.detach().clone() for p in parameters]
        self.power, self.inv_gamma, self.ceiling = power, inv_gamma, ceiling

    def decay(self, step: int) -> float:
        """Returns the decay after `step` optimizer steps; the first step copies."""
        decay = 1.0 - (1.0 + max(0, step - 1) / self.inv_gamma) ** -self.power
        return min(max(decay, 0.0), self.ceiling)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the averages towards the parameters after `step` optimizer steps."""
        torch._foreach_lerp_(self.average, self.parameters, 1.0 - self.decay(step))
