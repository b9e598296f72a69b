"""`vit export`: the options, the images, the report."""

from __future__ import annotations

import json as jsons
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from vitcli.commands.console import answer, err, tell
from vitcli.commands.options import RESULT, Json, newest
from vitcli.errors import DataError, RecipeError
from vitcli.onnx import Preprocess

if TYPE_CHECKING:
    from PIL.Image import Image

    from vitcli.checkpoint import Trained
    from vitcli.exporters import Report

PARITY, CALIBRATION = 512, 1000  # the most images that are taken of a folder, evenly spread over it
GRAPH, INT8 = "The graph", "INT8"


def _targets(incomplete: str) -> list[str]:
    from vitcli.exporters import targets

    return [name for name in targets() if name.startswith(incomplete)]


def export(
    onnx: Annotated[bool, Option("--onnx", help="Short for --to onnx.")] = False,
    tensorrt: Annotated[bool, Option("--tensorrt", help="Short for --to tensorrt.")] = False,
    to: Annotated[
        str | None,
        Option(metavar="FORMAT", autocompletion=_targets, help="onnx, tensorrt, huggingface, timm, torchvision, …"),
    ] = None,
    ckpt: Annotated[
        Path | None, Option("--ckpt", help="Run folder, checkpoint, .npz, .safetensors or .pth. [dim]The newest run[/]")
    ] = None,
    res: Annotated[int | None, Option(min=1, help="Another resolution; positions are stretched.")] = None,
    parity_images: Annotated[
        Path | None,
        Option(metavar="DIR", help="Images to compare on. [dim]The run's validation images, or photographs[/]"),
    ] = None,
    output: Annotated[
        Path | None, Option("-o", "--output", help="[dim]RUN/export/model.onnx[/]", rich_help_panel=RESULT)
    ] = None,
    fp16: Annotated[
        bool, Option("--fp16", help="Half precision inside; input and output stay fp32.", rich_help_panel=GRAPH)
    ] = False,
    int8: Annotated[bool, Option("--int8", help="8-bit linear layers; needs --calib.", rich_help_panel=GRAPH)] = False,
    opset: Annotated[int | None, Option(help="ONNX operator set, 18 to 25. [dim]20[/]", rich_help_panel=GRAPH)] = None,
    preprocess: Annotated[
        Preprocess,
        Option(help="What the graph does to uint8 images itself; full: resize and crop too.", rich_help_panel=GRAPH),
    ] = "none",
    softmax: Annotated[
        bool, Option("--softmax", help="Probabilities instead of logits.", rich_help_panel=GRAPH)
    ] = False,
    max_batch: Annotated[
        int | None, Option(min=1, help="Largest batch, written into the metadata.", rich_help_panel=GRAPH)
    ] = None,
    calib: Annotated[
        Path | None,
        Option(metavar="DIR", help="Images: half calibrate, half are scored, by class folders.", rich_help_panel=INT8),
    ] = None,
    skip: Annotated[
        list[str] | None, Option(metavar="NAME", help="Layer to leave in fp32, as blocks.0.", rich_help_panel=INT8)
    ] = None,
    percentile: Annotated[
        float | None, Option(min=50, max=100, help="Of activations that fit. [dim]99.999[/]", rich_help_panel=INT8)
    ] = None,
    max_drop: Annotated[
        float | None, Option(min=0, help="Exit 3 above this loss of top-1, in points.", rich_help_panel=INT8)
    ] = None,
    json: Json = False,
) -> None:
    """Write a model for other programs, and check that it answers as the checkpoint does.

    vit export --onnx

    vit export --onnx --ckpt runs/quickstart -o digits.onnx --fp16 --opset 23

    vit export --onnx --ckpt ViT-B_16.npz --int8 --calib imagenet/val --max-drop 1

    vit export --to huggingface --ckpt ViT-B_16.npz
    """
    from vitcli.exporters import target as find

    name = _one(onnx=onnx, tensorrt=tensorrt, to=to)
    target = find(name)
    if fp16 and int8:
        raise RecipeError("--fp16 does not go with --int8", "give one of them")
    if int8 and not calib:
        raise RecipeError("--int8 needs images to calibrate on", "--calib FOLDER, with some hundreds of images")
    of_int8 = {"calib": calib, "skip": skip, "percentile": percentile, "max_drop": max_drop}
    chosen = {"precision": "fp16" if fp16 else "int8" if int8 else None, "opset": opset, "max_batch": max_batch}
    chosen |= {"preprocess": preprocess if preprocess != "none" else None, "softmax": softmax or None} | of_int8
    given: dict[str, Any] = {key: value for key, value in chosen.items() if value is not None}
    known = {field.name for field in fields(target.OPTIONS)} if hasattr(target, "OPTIONS") else set()
    for key, value in given.items():
        flag = value if key == "precision" else key.replace("_", "-")
        if key in of_int8 and not int8:
            raise RecipeError(f"--{flag} has no effect without --int8")
        if key not in known:
            raise RecipeError(f"--{flag} has no effect with --to {name}", "it is for --onnx")

    from vitcli import checkpoint
    from vitcli.report import tables
    from vitcli.report.stages import Stages

    suffix = Path(target.OUTPUT).suffix
    if output and suffix and output.suffix.lower() != suffix:
        raise RecipeError(f"--to {name} writes a {suffix}, not {output.name!r}", f"-o {output.with_suffix(suffix)}")
    ckpt = ckpt or newest()
    trained = checkpoint.load(ckpt)
    folder = ckpt if (ckpt / "checkpoints").is_dir() else None
    usual = folder / "export" / target.OUTPUT if folder else Path(target.OUTPUT.replace("model", ckpt.stem))
    suffixes = [str(part) for part in (res, given.get("precision")) if part]
    place = output or usual.with_stem("_".join([usual.stem, *suffixes]))
    if res:
        from vitcli.exporters._rebuild import at_resolution

        trained = at_resolution(trained, res)
    if calib:
        given["calib"], given["labels"] = _calibration(calib, trained)
    images, origin = _parity_images(parity_images, trained)
    with Stages(err) as stages:
        if known:
            more = {"options": target.OPTIONS(**given), "source": _weights(ckpt), "on_stage": stages.begin}
        else:
            stages.begin(f"export to {name}")
            more = {}
        report: Report = target.export(trained, place, images=images, **more)
    facts = asdict(report) | {"parity_images": origin}
    if name == "onnx" and (line := _trtexec(place, max_batch)):
        facts["trtexec"] = line
    if folder and place.parent == folder / "export":
        _store(place.parent / "report.json", facts)
    answer(
        json,
        lambda: tables.to_json(facts),
        lambda: tables.export_table(report, origin),
        lambda: tables.export_lines(report, origin),
    )
    if not json and report.snippet:
        print(f"\n{report.snippet}")
        if "trtexec" in facts:
            print(f"TensorRT: {facts['trtexec']}")


def _one(*, onnx: bool, tensorrt: bool, to: str | None) -> str:
    """The name of the format."""
    named: dict[str, str] = {"onnx": "--onnx"} if onnx else {}
    named |= {"tensorrt": "--tensorrt"} if tensorrt else {}
    named |= {to: f"--to {to}"} if to and to not in named else {}
    if len(named) > 1:
        raise RecipeError(" does not go with ".join(list(named.values())[:2]), "give one of them")
    if not named:
        raise RecipeError("no format given", "vit export --onnx, or --to huggingface")
    return next(iter(named))


class Files(Sequence):
    """Images of files, each read when it is asked for. Raises BadImage."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image:  # pyright: ignore[reportIncompatibleMethodOverride]
        from vitcli.data.images import decode

        return decode(self.paths[index])


def _files(folder: Path, most: int) -> Files:
    """At most so many images of a folder, evenly spread over it. Raises DataError where there are none."""
    from vitcli.inference import find_images

    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder", "name a folder of images")
    paths = find_images([str(folder)])
    return Files(paths[:: -(-len(paths) // most)])


def _calibration(folder: Path, trained: Trained) -> tuple[Files, list[int] | None]:
    """Images to calibrate on, and their classes in the model, or None where the folder does not tell them."""
    from vitcli.data import imagenet

    files = _files(folder, CALIBRATION)
    parts = [Path(path).relative_to(folder).parts for path in files.paths]
    names = sorted({part[0] for part in parts})
    try:
        columns = dict(zip(names, imagenet.match(names, trained.classes), strict=True))
    except DataError:  # a plain folder, or classes that are not the model's
        return files, None
    return files, [columns[part[0]] for part in parts]


def _parity_images(folder: Path | None, trained: Trained) -> tuple[Sequence[Any] | None, str]:
    """What to compare on, and what it is: a folder, the run's validation images where they are at hand, or None."""
    if folder:
        return _files(folder, PARITY), str(folder)
    if trained.recipe is not None:
        try:
            dataset = trained.recipe.data.source.open("val")
            step = max(1, len(dataset) // 64)
            return [dataset.image(index) for index in range(0, len(dataset), step)], "the run's validation images"
        except DataError as error:
            tell(f"comparing on built-in photographs: {error}")
    return None, "built-in photographs"


def _weights(ckpt: Path) -> Path:
    """The file that holds the weights of a checkpoint, whose SHA-256 the export names."""
    places = [ckpt / "model.safetensors", *(ckpt / name / "model.safetensors" for name in ("best", "last"))]
    return next((place for place in places if place.is_file()), ckpt)


def _trtexec(file: Path, max_batch: int | None) -> str | None:
    from vitcli.exporters import tensorrt

    return tensorrt.command(file, max_batch)


def _store(file: Path, facts: dict[str, Any]) -> None:
    """The newest export's report, beside it."""
    from vitcli import storage

    storage.write_file(file, jsons.dumps(facts, indent=1).encode())
