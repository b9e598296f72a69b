"""`vit data`: look at data sets, and pack them. None of it loads torch."""

from __future__ import annotations

import json as jsons
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from vitcli.commands.console import print_error, tell
from vitcli.errors import DataError, RecipeError

data_commands = typer.Typer(help="Check data sets, and pack them into shards.", no_args_is_help=True)

Images = Annotated[str, Argument(metavar="SRC", help="Class folders, a .csv or .parquet table, or shards.")]
Jobs = Annotated[int | None, Option(min=1, help="Processes. [dim]The cores[/]")]
Separator = Annotated[str | None, Option(help="What stands between several labels of a table's image.")]
Json = Annotated[bool, Option("--json", help="One JSON object on stdout.")]


@data_commands.command()
def pack(
    source: Images,
    out: Annotated[Path, Argument(metavar="OUT", help="Folder for the shards; an interrupted pack there goes on.")],
    max_side: Annotated[
        int | None, Option(min=16, help="Shrink images whose longer side is more. [dim]Bytes as they are[/]")
    ] = None,
    quality: Annotated[
        int | None, Option("--quality", "-q", min=1, max=100, help="JPEG quality of the shrunk. [dim]90[/]")
    ] = None,
    per_shard: Annotated[int, Option(min=1, help="Images in a shard.")] = 1000,
    jobs: Jobs = None,
    json: Json = False,
) -> None:
    """Pack images into tar shards in WebDataset's layout, with an index.

    vit data pack imagenet/ shards/ --max-side 512

    vit data pack labels.csv shards/
    """
    from vitcli.data import pack as packing
    from vitcli.data.parallel import cores
    from vitcli.data.sources import described, parsed

    if out.resolve() == Path(source).resolve():
        raise RecipeError(f"{out} is the folder that is to be packed", "name another one for the shards")
    if quality and not max_side:
        raise RecipeError("--quality is for images that are shrunk", "add --max-side 512")
    shrink = packing.Shrink(max_side, quality or 90) if max_side else None
    done = packing.pack(parsed(described(source)), out, shrink=shrink, per_shard=per_shard, jobs=jobs or cores())
    if json:
        print(jsons.dumps(asdict(done)))
    else:
        print(f"{done.path}: {done.images:,} images of {done.classes:,} classes in {done.shards:,} shards")
        print(f"{done.megabytes:,} MB, {done.seconds:,} s, {done.images_per_second:,} images/s")
        if done.found:
            print(f"{done.found:,} of the shards were there already")
        print(f"next: vit data check {done.path}")
    if done.bad:
        for line in done.bad[:5]:
            tell(line)
        print_error(f"{len(done.bad):,} images could not be read and are left out")
        raise typer.Exit(1)


@data_commands.command()
def check(
    source: Images,
    separator: Separator = None,
    histogram: Annotated[Path | None, Option(help="Write the sizes of the classes as a PNG.")] = None,
    jobs: Jobs = None,
    json: Json = False,
) -> None:
    """Decode every image; find duplicates, leaks between train and val, and what is odd.

    Exit code 3 if images cannot be read, or the same bytes are trained on and held out, or of two classes.

    vit data check imagenet/ --histogram classes.png

    vit data check shards/ --json
    """
    from vitcli.data import check as checking
    from vitcli.data.parallel import cores
    from vitcli.data.sources import described, parsed
    from vitcli.report import data_check

    tree = described(source, separator)
    if tree["name"] == "shards":
        tree["broken"] = "skip"  # to see all that is wrong
    found = checking.check(parsed(tree), jobs=jobs or cores())
    if histogram:
        data_check.draw(found, histogram)
    if json:
        print(jsons.dumps(asdict(found) | {"sound": found.sound}))
    else:
        print("\n".join(data_check.lines(found)))
    if not found.sound:
        raise DataError(f"{source} has images that cannot be read, or that are where they should not be")
