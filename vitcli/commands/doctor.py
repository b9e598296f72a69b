"""`vit doctor`."""

from __future__ import annotations

from vitcli.commands.console import answer, err
from vitcli.commands.options import Json


def doctor(json: Json = False) -> None:
    """Versions, devices, and which ONNX Runtime providers really load, and why not."""
    from vitcli.report import doctor as examination
    from vitcli.report import tables

    with err.status("looking"):
        findings = examination.inspect()
    answer(
        json,
        lambda: tables.findings_json(findings),
        lambda: tables.findings_table(findings),
        lambda: tables.findings_lines(findings),
    )
