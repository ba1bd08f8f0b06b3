"""Golden files: small random-weight runs of the reference, with what must come out.

Tensors are grouped by the first word of their names: `weight`, `input`, and the wanted `output`,
`grad` and `grad_finetune`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


class Golden:
    """A golden file: `config`, `tolerance`, and its tensors by group."""

    def __init__(self, path: Path, device: str):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}
        self.config = json.loads(metadata["config"])
        self.tolerance = json.loads(metadata["tolerance"])
        self.inputs, self.weights, self.wanted = {}, {}, {}
        for name, tensor in tensors.items():
            group, _, rest = name.partition(".")
            if group == "input":
                self.inputs[rest] = tensor
            elif group == "weight":
                self.weights[rest] = tensor
            else:
                self.wanted[name] = tensor

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Returns the weights below a prefix, without it."""
        return {
            n.removeprefix(prefix): t for n, t in self.weights.items() if n.startswith(prefix)
        }

    def faults(self, got: dict[str, Tensor]) -> tuple[list[str], float]:
        """Returns what is missing or outside the tolerance, and the largest relative error."""
        faults, worst = [], 0.0
        for name, want in self.wanted.items():
            if name not in got:
                faults.append(f"{name}: not computed")
                continue
            value = got[name].detach().to(want.dtype)
            if [n for n in value.shape if n > 1] != [n for n in want.shape if n > 1]:
                faults.append(f"{name}: shape {list(value.shape)}, not {list(want.shape)}")
                continue
            value = value.reshape(want.shape)
            grad = "grad_" if name.startswith("grad") else ""
            limit = self.tolerance.get(grad + "rel_l2", self.tolerance["rel_l2"])
            scale, error = want.norm().item(), (value - want).norm().item()
            relative = error / scale if scale > 0.0 else error
            worst = max(worst, relative)
            atol = self.tolerance.get(grad + "atol", self.tolerance["atol"])
            rtol = self.tolerance.get(grad + "rtol", self.tolerance["rtol"])
            close = torch.allclose(value, want, rtol=rtol, atol=atol)
            # Written so that a NaN is a fault; a tensor of zeros must come back as zeros.
            if not (relative <= (limit if scale > 0.0 else 0.0)) or not close:
                faults.append(f"{name}: relative error {relative:.2e}, limit {limit:.0e}")
        return faults, worst
