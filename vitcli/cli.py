"""`vit`: the commands under one name.

stdout holds the answer only; all else goes to stderr. torch is loaded inside a command, not with this module.
"""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

from vitcli import __version__
from vitcli.commands import console
from vitcli.commands.bench import bench
from vitcli.commands.data import data_commands
from vitcli.commands.doctor import doctor
from vitcli.commands.evaluate import evaluate
from vitcli.commands.export import export
from vitcli.commands.predict import predict
from vitcli.commands.recipes import recipes
from vitcli.commands.runs import runs
from vitcli.commands.train import finetune, pretrain

app = typer.Typer(
    help="Plain Vision Transformers: pretrain, fine-tune, evaluate, export, predict.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command(rich_help_panel="Train")(pretrain)
app.command(rich_help_panel="Train")(finetune)
app.command("eval", rich_help_panel="Use")(evaluate)
app.command(rich_help_panel="Use")(export)
app.command(rich_help_panel="Use")(predict)
app.command(rich_help_panel="Look")(doctor)
app.add_typer(recipes, name="recipes", rich_help_panel="Look")
app.add_typer(data_commands, name="data", rich_help_panel="Look")
app.add_typer(runs, name="runs", rich_help_panel="Look")
app.add_typer(bench, name="bench", rich_help_panel="Look")


@app.callback(invoke_without_command=True)
def _vit(version: Annotated[bool, Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"vitcli {__version__}")
        raise typer.Exit


def main() -> None:
    """The console command."""
    console.open_standard_streams()
    console.run(app)
