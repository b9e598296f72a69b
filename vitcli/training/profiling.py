"""`--profile N`: where the time of N updates goes, as a Chrome trace and a table of the slowest kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WARMUP = 5  # updates before, which compile, fill caches and record CUDA graphs
ROWS = 15


@contextmanager
def profiled(folder: Path, updates: int, device: torch.device, tell: Callable[[str], None]) -> Iterator[Callable]:
    """Gives what is to be called after each update. `updates` of them, after a few, are recorded into `folder`:

    trace.json for chrome://tracing or ui.perfetto.dev, and kernels.txt, which `tell` shows too.
    """
    from torch.profiler import ProfilerActivity, profile, schedule

    if not updates:
        yield lambda: None
        return
    kind = "cuda" if device.type == "cuda" else "cpu"
    written = False

    def write(recorded: profile) -> None:
        nonlocal written
        written, done = True, recorded.step_num - WARMUP  # fewer than asked for where the run ends
        folder.mkdir(exist_ok=True)
        recorded.export_chrome_trace(str(folder / "trace.json"))
        table = recorded.key_averages().table(
            sort_by=f"self_{kind}_time_total", row_limit=ROWS, max_name_column_width=60
        )
        (folder / "kernels.txt").write_text(table)
        tell(f"{done} updates profiled, the slowest kernels first:\n{table}\n{folder / 'trace.json'}")

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (kind == "cuda")
    plan = schedule(skip_first=WARMUP - 1, wait=0, warmup=1, active=updates, repeat=1)
    # There is one cycle, whose events need not be kept beyond it; torch warns of those that are not.
    with profile(activities=kinds, schedule=plan, on_trace_ready=write, acc_events=True) as profiler:
        yield profiler.step
    if not written:
        tell(f"warning: nothing was profiled: --profile {updates} begins after {WARMUP} updates")
