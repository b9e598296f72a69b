"""Where training runs: device, precision, compilation. The only file that knows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from vitcli.schema import Schema


class RuntimeConfig(Schema):
    """How to compute. Nothing here changes what is computed, beyond rounding."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where it is fast")
    compile: bool | None = Field(None, description="torch.compile the blocks; null: on cuda")
    micro_batch: PositiveInt | None = Field(None, description="images in memory at a time; null: the whole batch")
    threads: PositiveInt | None = Field(None, description="CPU threads; null: the physical cores")
