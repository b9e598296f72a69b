"""A recipe: everything that decides a training run, as one typed and frozen value."""

from __future__ import annotations

from pydantic import Field, PositiveInt, model_validator

from vitcli.data import DataConfig
from vitcli.model import ViTConfig
from vitcli.objectives import AnyObjective
from vitcli.objectives.classify import Classify
from vitcli.optim import OptimConfig
from vitcli.runtime import RuntimeConfig
from vitcli.schema import Schema, wrong


class Recipe(Schema):
    """The sum of its sections. Length, batch and rhythm of a run stand at the top."""

    model: ViTConfig
    data: DataConfig
    objective: AnyObjective = Classify()
    optim: OptimConfig = OptimConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    epochs: float | None = Field(None, gt=0, description="length of training; or `steps`")
    steps: PositiveInt | None = Field(None, description="length of training in updates")
    batch: PositiveInt = Field(256, description="images in an update, whatever the device holds at a time")
    seed: int = Field(0, ge=0, lt=2**63)

    log_every: PositiveInt = Field(50, description="steps between lines of metrics.jsonl")
    eval_every: PositiveInt | None = Field(None, description="steps between evaluations; null: each epoch")
    save_every: PositiveInt | None = Field(None, description="steps between checkpoints; null: with each evaluation")
    keep_last: PositiveInt = Field(2, description="checkpoints to keep")
    keep_every: PositiveInt | None = Field(None, description="also keep the checkpoints of every so many steps")

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if (self.epochs is None) == (self.steps is None):
            raise wrong("epochs", "give epochs or steps, one of them")
        try:
            self.model.grid(self.data.res)
        except ValueError as error:
            raise wrong("data.res", str(error)) from None
        return self
