"""`vit predict`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer import Argument, Option

from vitcli.commands.console import out, print_error
from vitcli.commands.options import RESULT, Checkpoint, Json, Precision, Provider, newest
from vitcli.errors import RecipeError
from vitcli.runtime import Device


def predict(
    paths: Annotated[
        list[str], Argument(metavar="PATH...", help="Images, folders, patterns; - reads a list from stdin.")
    ],
    ckpt: Checkpoint = None,
    top: Annotated[int, Option(min=1, help="Classes for each image.", rich_help_panel=RESULT)] = 5,
    batch: Annotated[int, Option(min=1)] = 32,
    device: Device = "auto",
    precision: Precision = "fp32",
    provider: Provider = "auto",
    json: Json = False,
    jsonl: Annotated[bool, Option("--jsonl", help="A JSON object for each image.", rich_help_panel=RESULT)] = False,
    csv: Annotated[bool, Option("--csv", help="CSV, a line for each class.", rich_help_panel=RESULT)] = False,
) -> None:
    """Name what is in images.

    vit predict img.jpg

    vit predict photos/ --ckpt model.onnx --top 1 --csv
    """
    from vitcli import inference
    from vitcli.report import tables

    if json + jsonl + csv > 1:
        raise RecipeError("--json, --jsonl and --csv exclude one another")
    images = inference.find_images(paths)
    ckpt = ckpt or newest()
    predictor = inference.open_predictor(ckpt, device=device, provider=provider, precision=precision)
    failed = 0

    def counted() -> Any:
        nonlocal failed
        for found in inference.predict(predictor, images, top=top, batch=batch):
            failed += found.error is not None
            yield found

    if jsonl or csv or not (json or out.is_terminal):
        form = tables.answers_jsonl if jsonl else tables.answers_lines
        answers = counted()
        for line in tables.answers_csv(answers, predictor.thresholds is not None) if csv else form(answers):
            print(line)
    elif json:
        print(tables.answers_json(counted(), str(ckpt)))
    else:
        out.print(tables.answers_table(counted()))
    if failed:
        print_error(f"{failed} of {len(images)} images could not be read")
        raise typer.Exit(1)
