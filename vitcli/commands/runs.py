"""`vit runs`: look at the runs under runs/, compare their curves, delete checkpoints that nothing needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from vitcli.commands.console import answer, tell
from vitcli.errors import RecipeError

runs = typer.Typer(help="The runs under runs/.", invoke_without_command=True)

Json = Annotated[bool, Option("--json", help="One JSON object on stdout.")]


@runs.callback()
def _runs(context: typer.Context, json: Json = False) -> None:
    if context.invoked_subcommand is None:
        list_runs(json)


@runs.command("list")
def list_runs(json: Json = False) -> None:
    """The runs under runs/, the newest last."""
    from vitcli import history
    from vitcli.report import runs as report

    found = [history.summary(path) for path in history.find()]
    if not found:
        tell("no runs under runs/ here")
    answer(json, lambda: report.json(found), lambda: report.table(found), lambda: report.lines(found))


@runs.command()
def compare(
    paths: Annotated[list[Path], Argument(metavar="RUN...", help="Two or more run folders.")],
    output: Annotated[Path | None, Option("-o", "--output", help="Also draw the curves into this PNG.")] = None,
) -> None:
    """The curves of runs side by side, and where their recipes differ.

    vit runs compare runs/quickstart runs/quickstart-2 -o both.png
    """
    from vitcli import history
    from vitcli.report import plots
    from vitcli.report import runs as report

    if len(paths) < 2:
        raise RecipeError("one run cannot be compared", "vit runs compare RUN RUN")
    history.check(paths)
    logs = {str(path): history.rows(path) for path in paths}
    for line in report.comparison(logs, {str(path): history.recipe(path) for path in paths}):
        print(line)
    if output:
        plots.draw_comparison(logs, output)
        tell(f"wrote {output}")


@runs.command()
def prune(
    paths: Annotated[list[Path] | None, Argument(metavar="RUN...", help="Run folders. [dim]All under runs/[/]")] = None,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would go, and delete nothing.")] = False,
) -> None:
    """Delete checkpoints that nothing needs: of a finished run all, of another all but the newest whole one.

    best/ and last/ stay; a run that is running is left alone.
    """
    from vitcli import history

    history.check(paths or [])
    found = [history.summary(path) for path in paths or history.find()]
    doomed = {run.path: history.spare(run.path) for run in found if run.state != "running" or paths}
    doomed = {path: folders for path, folders in doomed.items() if folders}
    size = sum(history.size(folder) for folders in doomed.values() for folder in folders)
    for folders in doomed.values():
        for folder in folders:
            print(folder)
    if not doomed or dry_run:
        tell(f"{size / 1e6:,.1f} MB could go" if doomed else "nothing to delete")
        return
    if not yes:
        typer.confirm(f"Delete these checkpoints, {size / 1e6:,.1f} MB?", abort=True, err=True)
    for path in doomed:
        history.prune(path)
    tell(f"deleted {size / 1e6:,.1f} MB")
