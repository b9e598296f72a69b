"""Optimisers, schedules and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt, model_validator

from vitcli.schema import Schema, wrong

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class OptimConfig(Schema):
    """The update of the weights and how its size changes over training.

    Weight decay is decoupled from the gradient, multiplied by the current learning rate as in torch's AdamW, and
    applied to kernels only. big_vision's decay is not multiplied by the learning rate: divide its number by its
    peak learning rate to get this one (1e-4 at 1e-3 is 0.1).
    """

    name: Literal["adam", "sgd"] = Field("adam", description="adam with weight decay is AdamW")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    warmup_steps: int | None = Field(None, ge=0, description="steps from 0 to the peak")
    warmup_epochs: float | None = Field(None, ge=0, description="the same in epochs")
    end_lr: float = Field(0.0, ge=0, description="learning rate at the end of a cosine or linear schedule")
    timescale: PositiveInt = Field(10_000, description="rsqrt: steps after which the learning rate falls visibly")
    cooldown_steps: int = Field(0, ge=0, description="rsqrt and constant: last steps, linear to end_lr")
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd")
    beta1: float = Field(0.9, ge=0, lt=1, description="adam")
    beta2: float = Field(0.999, ge=0, lt=1, description="adam")
    eps: float = Field(1e-8, gt=0, description="adam")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the whole gradient; null: no clipping")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of a moving average of the weights, scored and kept")

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if self.warmup_steps is not None and self.warmup_epochs is not None:
            raise wrong("warmup_epochs", "give warmup_steps or warmup_epochs, not both")
        return self
