"""What `vit bench` prints and draws."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vitcli import __version__
from vitcli.data.parallel import cores
from vitcli.report.doctor import cpu_name
from vitcli.report.plots import drawn
from vitcli.report.tables import printable, to_json

if TYPE_CHECKING:
    from vitcli.bench.measure import Bench, Result
    from vitcli.runtime import Runtime

HEADER = ("contender", "img/s", "slowest-fastest", "TFLOP/s", "of ceiling", "peak GiB", "batch", "settings")


def machine(runtime: Runtime) -> dict[str, str]:
    """What the figures depend on besides the command."""
    facts = runtime.describe()
    return {
        "device": cpu_name() if runtime.device.type == "cpu" else str(facts["device"]),
        "threads": str(facts["threads"]),
        "vitcli": __version__,
        "torch": str(facts["torch"]),
        "Python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def lines(bench: Bench) -> Iterator[str]:
    """A line of facts each, then a header and a line a contender, with tabs between."""
    yield from ("\t".join(fact) for fact in _facts(bench))
    yield "\t".join(HEADER)
    for result in bench.results:
        yield "\t".join(map(printable, _cells(bench, result)))


def table(bench: Bench) -> Table:
    """The contenders with a bar each, under the facts."""
    title = "\n".join(f"{name}: {value}" for name, value in _facts(bench))
    shown = Table(HEADER[0], "", *HEADER[1:], title=Text(title, justify="left"), box=None, pad_edge=False)
    best = max(result.median for result in bench.results if result.blocks)
    for result in bench.results:
        name, *cells = map(Text, map(printable, _cells(bench, result)))
        bar = ProgressBar(total=best, completed=result.median if result.blocks else 0, width=24)
        shown.add_row(name, bar, *cells)
    return shown


def as_json(bench: Bench) -> str:
    """Everything that was measured, each block included, as one JSON object."""
    return to_json(
        {
            "task": bench.task,
            "model": bench.model,
            "flops_per_image": bench.flops,
            "ceiling_flops": bench.ceiling,
            "machine": bench.machine,
            "command": bench.command,
            "results": [_entry(bench, result) for result in bench.results],
        }
    )


def markdown(bench: Bench) -> str:
    """The table for a README, with the facts under it."""
    rows = [HEADER, ("---",) * len(HEADER), *(_cells(bench, result) for result in bench.results)]
    body = "\n".join(f"| {' | '.join(printable(cell).replace('|', '/') for cell in row)} |" for row in rows)
    facts = "  \n".join(f"{name}: {printable(value)}" for name, value in _facts(bench))
    return f"{body}\n\n{facts}\n"


def chart(bench: Bench, form: str) -> bytes:
    """A bar for each contender, with its slowest and fastest block; the facts under it. `form` is png, svg or pdf."""
    from matplotlib.figure import Figure

    shown = [result for result in bench.results if result.blocks][::-1]
    medians = [result.median for result in shown]
    spread = [
        [result.median - min(result.blocks) for result in shown],
        [max(result.blocks) - result.median for result in shown],
    ]
    figure = Figure(figsize=(9, 1.7 + 0.5 * len(shown)), layout="constrained")
    axes = figure.subplots()
    colors = ["#1f6feb" if result is bench.results[0] else "#9aa5b1" for result in shown]
    names = [f"{result.name}\n{result.settings}" for result in shown]
    bars = axes.barh(names, medians, xerr=spread, color=colors, capsize=3, height=0.6)
    axes.bar_label(bars, [_rate(median) for median in medians], padding=6)
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(x=0.12)
    axes.set_xlabel("images a second: median block, slowest and fastest")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{bench.task}: {bench.model}", fontsize=10, loc="left")
    figure.supxlabel("\n".join(value for _, value in _facts(bench)[1:]), fontsize=6.5, color="#57606a", wrap=True)
    return drawn(figure, form)


def _facts(bench: Bench) -> list[tuple[str, str]]:
    size = f", {bench.flops / 1e9:,.4g} GFLOP an image" if bench.flops else ""
    facts = [(bench.task, f"{bench.model}{size}")]
    rest = [f"{name} {value}" for name, value in bench.machine.items() if name != "device"]
    facts += [("machine", ", ".join([bench.machine["device"], *rest]))]
    if bench.ceiling:
        facts += [("ceiling", f"{bench.ceiling / 1e12:,.3g} TFLOP/s in a large matrix product here")]
    return [*facts, ("command", bench.command)]


def _cells(bench: Bench, result: Result) -> tuple[str, ...]:
    if not result.blocks:
        return (result.name, "-", "-", "-", "-", "-", "-", result.failed)
    reached, share = bench.flops_per_second(result), bench.share(result)
    core = f", {_rate(result.median / cores())} img/s a core" if bench.task == "loading" else ""
    tried = "".join(
        f"; at {batch}: {'out of memory' if speed is None else _rate(speed)}"
        for batch, speed in result.tried.items()
        if batch != result.batch
    )
    return (
        result.name,
        _rate(result.median),
        f"{_rate(min(result.blocks))}-{_rate(max(result.blocks))}",
        f"{reached / 1e12:,.3g}" if reached else "-",
        f"{share:.0%}" if share else "-",
        f"{result.memory / 2**30:,.1f}" if result.memory is not None else "-",
        f"{result.batch}",
        result.settings + core + tried,
    )


def _rate(images: float) -> str:
    """Images a second: all digits of a large number, four of a small one."""
    return f"{images:,.0f}" if images >= 1000 else f"{images:.4g}"


def _entry(bench: Bench, result: Result) -> dict[str, Any]:
    known = {
        "images_per_second": result.median,
        "flops": bench.flops_per_second(result),
        "share_of_ceiling": bench.share(result),
        "images_per_second_per_core": result.median / cores(),
    }
    return {**vars(result), **(known if result.blocks else {})}
