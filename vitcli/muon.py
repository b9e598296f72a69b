"""Muon: momentum, made orthogonal, for matrices. Source: kellerjordan.github.io/posts/muon, and arXiv 2502.16982."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

RMS = 0.2  # of a step's entries, at learning rate 1: as AdamW's, whose learning rates then fit (arXiv 2502.16982)
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.Adam):
    """Muon for the groups whose `matrices` is more than 0, Adam for the others.

    Each parameter of such a group is (rows, columns), and `matrices` of one shape on top of each other. `found_inf`
    must be set, a scalar 0.0 or 1.0; where it is 1.0, nothing changes.
    """

    found_inf: Tensor

    def __init__(self, groups: list[dict[str, Any]], momentum: float, **adam: Any):
        super().__init__(groups, **adam)
        self._momentum = momentum
        for group in self.param_groups:
            for parameter in group["params"] if group["matrices"] else []:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] (no closure)
        for group in self.param_groups:
            if group["matrices"]:
                self._step_matrices(group)
        super().step()  # with the gradients that are left

    def _step_matrices(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        finite = self.found_inf == 0
        gradients = [torch.where(finite, p.grad, buffer) for p, buffer in zip(parameters, buffers, strict=True)]
        torch._foreach_lerp_(buffers, gradients, 1 - self._momentum)  # pyright: ignore[reportPrivateImportUsage]
        steps = torch._foreach_lerp(gradients, buffers, self._momentum)  # pyright: ignore[reportPrivateImportUsage]

        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter, step in zip(parameters, steps, strict=True):
            parameter.grad = None
            for own, change in zip(parameter.chunk(group["matrices"]), step.chunk(group["matrices"]), strict=True):
                wide = own.shape[0] <= own.shape[1]
                alike[own.shape if wide else own.T.shape].append((own, change) if wide else (own.T, change.T))
        size = -group["lr"] * RMS * finite
        for (_, columns), pairs in alike.items():
            matrices, steps = zip(*pairs, strict=True)
            changes = orthogonal(torch.stack(steps)) * (size * columns**0.5)
            torch._foreach_add_(matrices, changes.unbind())  # pyright: ignore[reportPrivateImportUsage]


def orthogonal(x: Tensor) -> Tensor:
    """Near the semi-orthogonal matrices nearest to x (n, rows, columns), rows <= columns: singular values 0.68 to 1.14.

    Newton's and Schulz's iteration; the 0 matrix stays. On CUDA in bf16.
    """
    a, b, c = QUINTIC
    y = x.bfloat16() if x.is_cuda else x
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.to(x.dtype)
