"""Optimisers, schedules and the moving average of the weights."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Literal, Union

from pydantic import Field, PositiveInt, model_validator

from vitcli.processes import spread
from vitcli.schema import Schema, only_for, wrong

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


Number = Union["float", "Tensor"]  # a tensor, float64 without dimensions, where updates are recorded


class OptimConfig(Schema):
    """The update of the weights and how its size changes over training.

    Weight decay is decoupled from the gradient, multiplied by the current learning rate as in torch's AdamW, and
    applied to kernels only. big_vision's decay is not multiplied by the learning rate: divide its number by its
    peak learning rate to get this one (1e-4 at 1e-3 is 0.1).
    """

    name: Literal["adam", "sgd", "muon"] = Field(
        "adam", description="adam with weight decay is AdamW; muon is Muon for the blocks' matrices, adam for the rest"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    warmup_steps: int | None = Field(None, ge=0, description="steps from 0 to the peak")
    warmup_epochs: float | None = Field(None, ge=0, description="the same in epochs")
    end_lr: float = Field(0.0, ge=0, description="learning rate at the end of a cosine or linear schedule")
    timescale: PositiveInt = Field(10_000, description="rsqrt: steps after which the learning rate falls visibly")
    cooldown_steps: int = Field(0, ge=0, description="rsqrt and constant: last steps, linear to end_lr")
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd and muon")
    beta1: float = Field(0.9, ge=0, lt=1, description="adam and muon")
    beta2: float = Field(0.999, ge=0, lt=1, description="adam and muon")
    eps: float = Field(1e-8, gt=0, description="adam and muon")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the whole gradient; null: no clipping")
    layer_decay: float = Field(1.0, gt=0, le=1, description="a block's learning rate, as a share of the next block's")
    freeze: bool = Field(False, description="train the head alone: a linear probe")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of a moving average of the weights, scored and kept")

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if self.warmup_steps is not None and self.warmup_epochs is not None:
            raise wrong("warmup_epochs", "give warmup_steps or warmup_epochs, not both")
        if self.end_lr > self.lr:
            raise wrong("end_lr", f"{self.end_lr} is more than lr: {self.lr}")
        falling, level = ("cosine", "linear"), ("rsqrt", "constant")
        for key, chosen, needs in (
            ("momentum", self.name, ("sgd", "muon")),
            ("beta1", self.name, ("adam", "muon")),
            ("beta2", self.name, ("adam", "muon")),
            ("eps", self.name, ("adam", "muon")),
            ("timescale", self.schedule, ("rsqrt",)),
            ("cooldown_steps", self.schedule, level),
            ("end_lr", self.schedule, falling + level if self.cooldown_steps else falling),
        ):
            only_for(self, key, chosen, needs)
        return self

    def warmup(self, steps_per_epoch: float) -> int:
        """Steps of warm-up."""
        return self.warmup_steps or round((self.warmup_epochs or 0) * steps_per_epoch)


def learning_rate(config: OptimConfig, step: int, steps: int, warmup: int) -> float:
    """Learning rate of update `step` (0 is the first) of `steps`.

    The shapes are big_vision's: warm-up starts at 0 and multiplies; cosine and linear fall from the end of warm-up to
    `end_lr`; rsqrt is lr / sqrt(1 + (step - warmup) / timescale). Source: big_vision/utils.py,
    create_learning_rate_schedule.
    """
    progress = min(max((step - warmup) / max(1, steps - warmup), 0.0), 1.0)
    if config.schedule == "cosine":
        lr = config.end_lr + (config.lr - config.end_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "linear":
        lr = config.end_lr + (config.lr - config.end_lr) * (1 - progress)
    elif config.schedule == "rsqrt":
        lr = config.lr / math.sqrt(1 + max(0, step - warmup) / config.timescale)
    else:
        lr = config.lr
    if step < warmup:
        lr *= step / warmup
    if config.cooldown_steps and config.schedule in ("rsqrt", "constant"):
        left = min(1.0, (steps - step) / config.cooldown_steps)
        lr = config.end_lr + (lr - config.end_lr) * left
    return lr


def is_kernel(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: matrices and convolutions, not biases, norms, tokens or position tables."""
    return name.endswith("weight") and parameter.ndim > 1


def freeze(model: nn.Module) -> None:
    """Leave only the head to be trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("head.", "head_dist.")))


def layer(name: str, depth: int) -> int:
    """Where a parameter stands: 0 before the first of `depth` blocks, 1 to `depth` in one, depth + 1 behind them.

    Source: util/lr_decay.py of facebookresearch/mae, after BEiT (arXiv 2106.08254).
    """
    if block := _block(name):
        return block
    first = ("patch_embed.", "cls_token", "dist_token", "reg_token", "pos_embed", "norm_pre.")
    return 0 if name.removeprefix("model.").startswith(first) else depth + 1


def _block(name: str) -> int:
    """The number of the encoder's block that a parameter is in, from 1, or 0: the stem has blocks, too."""
    found = re.match(r"(?:model\.)?blocks\.(\d+)\.", name)
    return int(found[1]) + 1 if found else 0


def _matrices(name: str, parameter: Tensor) -> int:
    """How many matrices of a block a parameter holds: queries, keys and values are three in one."""
    if not _block(name) or not is_kernel(name, parameter):
        return 0
    return 3 if name.endswith("qkv.weight") else 1


def build(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """The optimiser over the parameters of `module` that are trained, in groups of one decay, one share of the
    learning rate, and, for Muon, as many matrices in each."""
    import torch

    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    depth = max((_block(name) for name, _ in module.named_parameters()), default=0)
    together: dict[tuple[float, float, int], list[Tensor]] = {}
    for name, parameter in sorted(named, key=lambda pair: not is_kernel(*pair)):
        decay = config.weight_decay if is_kernel(name, parameter) else 0.0
        share = config.layer_decay ** (depth + 1 - layer(name, depth))
        matrices = _matrices(name, parameter) if config.name == "muon" else 0
        together.setdefault((decay, share, matrices), []).append(parameter)
    groups = [
        {"params": own, "decay": decay, "share": share, "matrices": matrices}
        for (decay, share, matrices), own in together.items()
    ]
    # Momentum starts at zero here, since torch's would start at random if the first update were skipped.
    # Decay is applied by `update`, the same way for all, so the optimisers themselves are told of none.
    if config.name != "sgd":
        betas, on_gpu = (config.beta1, config.beta2), named[0][1].is_cuda  # there updates may be recorded
        adam: dict[str, Any] = {"lr": 0.0, "betas": betas, "eps": config.eps, "fused": True, "capturable": on_gpu}
        if config.name == "adam":
            return torch.optim.Adam(groups, **adam)
        from vitcli.muon import Muon

        return Muon(groups, config.momentum, **adam)
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, fused=True)
    if config.momentum:
        for _, parameter in named:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def clip(module: nn.Module, norm: float | None) -> Tensor:
    """The norm of the whole gradient, a scalar, which is then scaled down to at most `norm`."""
    import torch

    return torch.nn.utils.clip_grad_norm_(module.parameters(), torch.inf if norm is None else norm)


def update(optimizer: torch.optim.Optimizer, lr: Number, finite: Tensor) -> None:
    """One update with learning rate `lr`, of which a group has its share: decay the kernels by learning rate x weight
    decay, then step on the gradients.

    Where `finite`, a scalar, is false, nothing changes but that the gradients are gone. The device decides: this
    process need not wait for it.
    """
    import torch

    for group in optimizer.param_groups:
        own = lr * group["share"]
        group["lr"] = own if isinstance(own, int | float) else own.float()
        if group["decay"]:
            kept = _either(finite, 1 - own * group["decay"], 1.0, group["params"][0])
            with torch.no_grad():
                torch._foreach_mul_(group["params"], kept)  # pyright: ignore[reportPrivateImportUsage]
    optimizer.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue] (what GradScaler sets)
    optimizer.step()
    optimizer.zero_grad()


def _either(finite: Tensor, yes: Number, no: float, like: Tensor) -> Tensor:
    """One of two numbers, chosen on the device, in the type of `like`."""
    import torch

    if isinstance(yes, int | float):
        yes = finite.new_full((), yes, dtype=like.dtype)
    return torch.where(finite, yes.to(like.dtype), no)


def state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as tensors, by `parameter name/state name`."""
    found = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                found[f"{name}/{key}"] = value
    return found


def load_state(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The inverse of `state`, in place where there is a state already; what `tensors` lack begins at zero again."""
    parameters, live = dict(module.named_parameters()), state(optimizer, module)
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("/", 1)
        parameter = parameters[name]
        if full_name in live:
            live[full_name].copy_(spread(tensor, like=live[full_name]))
        else:
            optimizer.state[parameter][key] = spread(tensor, like=parameter)
    for full_name in live.keys() - tensors.keys():
        live[full_name].zero_()


class Average:
    """A moving average of a module's parameters.

    The decay grows to `decay` as (1 + n) / (10 + n) over the updates n, so that short runs are not held to their
    random start.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.live: dict[str, Tensor] = dict(module.named_parameters())
        self.tensors = {name: p.detach().clone() for name, p in self.live.items()}

    def share(self, step: int) -> float:
        """The weight that the weights after update `step` have in the average."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    def update(self, share: Number, finite: Tensor) -> None:
        """Take in the weights after an update, unless it was skipped because its gradient was not `finite`."""
        import torch

        averages = list(self.tensors.values())
        share = _either(finite, share, 0.0, averages[0])
        with torch.no_grad():
            steps = torch._foreach_sub(list(self.live.values()), averages)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_mul_(steps, share)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(averages, steps)  # pyright: ignore[reportPrivateImportUsage]

    def swap(self) -> None:
        """Exchange the average and the live weights; a second call puts them back."""
        import torch

        with torch.no_grad():
            for name, average in self.tensors.items():
                live = self.live[name]
                kept = live.clone()
                live.copy_(average)
                average.copy_(kept)
