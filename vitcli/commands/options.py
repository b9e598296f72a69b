"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from vitcli import runtime
from vitcli.commands.console import tell

Precision = Annotated[
    runtime.Precision, Option(help="Of a checkpoint: fp32 is the reference, bf16 the fastest on a GPU.")
]
Provider = Annotated[Literal["auto", "cuda", "tensorrt", "cpu"], Option(help="ONNX Runtime's, for .onnx files.")]
RESULT, TRAIN, INPUT = "Result", "Training", "Input"


def _recipe_keys(incomplete: str) -> list[str]:
    from vitcli.recipe import keys

    return [f"{key.dotted}=" for key in keys() if key.dotted.startswith(incomplete)]


Set = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="KEY=VALUE",
        autocompletion=_recipe_keys,
        help="Override a key of the recipe, as optim.lr=3e-4.",
    ),
]
RunFolder = Annotated[
    Path | None, Option("--run", help="Folder of the run. [dim]runs/RECIPE[/]", rich_help_panel=RESULT)
]
Resume = Annotated[
    Path | None, Option(metavar="RUN", help="Continue the run in this folder, to the same bits.", rich_help_panel=TRAIN)
]
Gpus = Annotated[
    int | None, Option(min=1, help="Train on so many GPUs of this machine, a process each.", rich_help_panel=TRAIN)
]
Profile = Annotated[
    int,
    Option(
        metavar="N",
        min=0,
        help="Record N updates: Chrome trace and slowest kernels in the run's profile/.",
        rich_help_panel=TRAIN,
    ),
]
DryRun = Annotated[bool, Option("--dry-run", help="Print size, cost and time of the training, and train nothing.")]
Json = Annotated[bool, Option("--json", help="One JSON object on stdout.", rich_help_panel=RESULT)]
Checkpoint = Annotated[
    Path | None,
    Option("--ckpt", help="Run folder, checkpoint, .npz, .safetensors, .pth or .onnx. [dim]The newest finished run[/]"),
]


def newest() -> Path:
    """The newest finished run, which stderr names: what --ckpt stands for where it is not given."""
    from vitcli import run

    path = run.newest_finished()
    tell(f"using {path}")
    return path
