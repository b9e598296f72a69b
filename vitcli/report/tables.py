"""What commands print: a table on a terminal, plain lines elsewhere, JSON, JSON lines, CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from vitcli.exporters import HeldOut, Report
    from vitcli.inference import Answer, Guess
    from vitcli.plan import Plan
    from vitcli.recipe import Recipe
    from vitcli.report.doctor import Finding
    from vitcli.scores import Scores
    from vitcli.train import Outcome

CSV_HEADER = ("path", "rank", "class", "name", "probability", "error")


def printable(text: str) -> str:
    """The text with control characters, and bytes that are no text, as escapes: fit for any terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def to_json(value: Any) -> str:
    """JSON in ASCII. A file name that is no text survives as lone surrogates (`os.fsencode` gives its bytes back)."""
    return json.dumps(value, allow_nan=False)


def answers_table(answers: Iterable[Answer]) -> Table:
    """The answers with a bar for each probability; where an image may be of several classes, * marks its own."""
    table = Table("image", "class", "probability", "", box=None, pad_edge=False)
    for answer in answers:
        path = Text(printable(answer.path), overflow="fold")
        if answer.error is not None:
            table.add_row(path, Text(printable(answer.error), style="red"))
        for guess in answer.top:
            bar = ProgressBar(total=1.0, completed=guess.probability, width=20)
            table.add_row(path, Text(_marked_name(guess)), f"{guess.probability:7.2%}", bar)
            path = Text()
    return table


def answers_lines(answers: Iterable[Answer]) -> Iterator[str]:
    """A line an image: path, then probability and name of each class, with tabs between, and * as in the table."""
    for answer in answers:
        cells = [cell for guess in answer.top for cell in (f"{guess.probability:.4f}", _marked_name(guess))]
        yield "\t".join([printable(answer.path), *(cells or [f"error: {printable(answer.error or '')}"])])


def answers_json(answers: Iterable[Answer], model: str) -> str:
    """All answers as one JSON object."""
    return to_json({"model": model, "images": [_answer(answer) for answer in answers]})


def answers_jsonl(answers: Iterable[Answer]) -> Iterator[str]:
    """A JSON object an image."""
    return (to_json(_answer(answer)) for answer in answers)


def answers_csv(answers: Iterable[Answer], multi_label: bool = False) -> Iterator[str]:
    """A header, then a line a class; a cell that a spreadsheet would take for a formula starts with '.

    Where an image may be of several classes, the last column says whether the class applies.
    """
    last = ("applies",) if multi_label else ()
    yield _csv_line((*CSV_HEADER, *last))
    for answer in answers:
        if answer.error is not None:
            yield _csv_line((answer.path, "", "", "", "", answer.error, *("" for _ in last)))
        for place, guess in enumerate(answer.top, start=1):
            cells = (answer.path, str(place), guess.id, guess.name, f"{guess.probability:.6g}", "")
            yield _csv_line((*cells, *(str(guess.applies).lower() for _ in last)))


def scores_lines(scores: Scores) -> Iterator[str]:
    """The scores, a line each: name, tab, value."""
    return (f"{name}\t{value}" for name, value in _scores(scores))


def scores_table(scores: Scores) -> Table:
    """The scores as a table."""
    table = Table("score", "value", box=None, pad_edge=False, show_header=False)
    for name, value in _scores(scores):
        table.add_row(Text(name), Text(value))
    return table


def scores_json(scores: Scores, model: str) -> str:
    """The scores as one JSON object; shares are between 0 and 1."""
    return to_json({"model": model, **vars(scores), "images_per_second": scores.images_per_second})


def findings_lines(findings: Iterable[Finding]) -> Iterator[str]:
    """A line each: section, item, value, with tabs between; what is wrong is marked."""
    for finding in findings:
        yield f"{finding.section}\t{finding.item}\t{_marked(finding)}"


def findings_table(findings: Iterable[Finding]) -> Table:
    """The findings by section."""
    table = Table("section", "item", "value", box=None, pad_edge=False, show_header=False)
    section = ""
    for finding in findings:
        shown = "" if finding.section == section else finding.section
        section = finding.section
        style = "" if finding.ok else "red"
        table.add_row(Text(shown, style="bold"), Text(finding.item), Text(_marked(finding), style=style))
    return table


def findings_json(findings: Iterable[Finding]) -> str:
    """The findings as one JSON object; `ok` says whether none is a problem."""
    entries = [finding._asdict() for finding in findings]
    return to_json({"ok": all(entry["ok"] for entry in entries), "findings": entries})


def _marked(finding: Finding) -> str:
    return ("" if finding.ok else "PROBLEM: ") + printable(finding.value)


def plan_lines(plan: Plan, recipe: Recipe) -> Iterator[str]:
    """What a training would take."""
    height, width = recipe.data.res
    hours = plan.seconds / 3600
    time = f"{hours:,.1f} h" if hours >= 1 else f"{plan.seconds:,.0f} s"
    name = recipe.model.variant or "custom"
    yield f"model     {name}, {plan.parameters / 1e6:,.2f} M parameters, {plan.classes:,} classes"
    yield f"image     {height}x{width}, {plan.tokens} tokens, {plan.gflops:,.2f} GFLOPs forward"
    yield f"training  {plan.steps:,} steps of {recipe.batch:,} images, {plan.epochs:.4g} epochs of {plan.images:,}"
    yield f"memory    about {plan.memory / 2**30:,.1f} GiB for {plan.at_a_time:,} images at a time"
    yield f"time      about {time} on {plan.device}{f', {plan.processes} of them' if plan.processes > 1 else ''}"


def outcome_lines(outcome: Outcome) -> Iterator[str]:
    """How a run ended well, and what to type next."""
    best = ""
    if outcome.best_score is not None:
        best = f"best {outcome.measure} {outcome.best_score:.2%} at step {outcome.best_step}"
    yield f"{outcome.run}: {outcome.steps} steps in {outcome.seconds:.0f} s, {best}"
    if outcome.bad_images:
        yield f"{outcome.bad_images} unreadable images were replaced; train.log names them"
    if outcome.skipped:
        yield f"{outcome.skipped} updates were skipped, whose gradient was not finite; train.log names them"
    yield from outcome.balance
    yield f"next: vit export --onnx --ckpt {outcome.run}"


def export_lines(report: Report, images: str) -> Iterator[str]:
    """What was exported, and how it agrees on `images`."""
    parity, details = report.parity, ", ".join(f"{key} {value}" for key, value in report.details.items())
    yield f"wrote {report.file}: {report.megabytes} MB, {report.precision}, {details}, {report.seconds} s"
    yield (
        f"against the checkpoint on {parity.images} images ({images}): largest difference {parity.difference:.2g} "
        f"(largest logit {parity.largest:.3g}), top-1 agreement {parity.agreement:.1%}, SNR {_decibel(parity.snr)}, "
        f"{parity.images_per_second:,g} img/s"
    )
    if report.held_out:
        yield _held_out(report.held_out)


def export_table(report: Report, images: str) -> Table:
    """The same as a table."""
    parity = report.parity
    rows = {
        "file": report.file,
        "size": f"{report.megabytes} MB",
        "precision": report.precision,
        **{key: str(value) for key, value in report.details.items()},
        "compared on": f"{parity.images} images ({images})",
        "max difference": f"{parity.difference:.2g}, largest logit {parity.largest:.3g}",
        "agreement": f"{parity.agreement:.1%} of first classes",
        "SNR": _decibel(parity.snr),
        "rate": f"{parity.images_per_second:,g} img/s on this CPU",
    }
    if report.held_out:
        rows["held out"] = _held_out(report.held_out)
    table = Table("what", "value", box=None, pad_edge=False, show_header=False)
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(printable(value), overflow="fold"))
    return table


def _decibel(snr: float | None) -> str:
    return "without noise" if snr is None else f"{snr:.1f} dB"


def _held_out(scores: HeldOut) -> str:
    what = "top-1" if scores.measure == "labels" else "agreement with fp32"
    return (
        f"{what} on {scores.images} held-out images: fp32 {scores.fp32:.2%}, int8 {scores.exported:.2%}, "
        f"{-scores.drop:+.2f} points"
    )


def _answer(answer: Answer) -> dict[str, Any]:
    if answer.error is not None:
        return {"path": answer.path, "error": answer.error}
    return {"path": answer.path, "top": list(map(_guess, answer.top))}


def _guess(guess: Guess) -> dict[str, Any]:
    facts = {"class": guess.id, "name": guess.name, "probability": guess.probability}
    return facts if guess.applies is None else facts | {"applies": guess.applies}


def _marked_name(guess: Guess) -> str:
    return printable(guess.name) + (" *" if guess.applies else "")


def _csv_line(cells: Iterable[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow([_cell(cell) for cell in cells])  # it quotes these two in a cell
    return line.getvalue().removesuffix("\r\n")


def _cell(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _scores(scores: Scores) -> list[tuple[str, str]]:
    lines = [
        ("images", f"{scores.images:,}"),
        ("classes", f"{scores.seen:,} of {scores.classes:,}"),
        ("loss", f"{scores.loss:.4f}"),
        *((name, f"{value:.2%}") for name, value in scores.shares.items()),
    ]
    if scores.bad:
        lines.append(("unreadable, not scored", f"{len(scores.bad):,}"))
    speed = f"{scores.images_per_second:,.0f} images/s, {scores.waiting / scores.seconds:.0%} of it waiting for data"
    return [*lines, ("speed", speed)]
