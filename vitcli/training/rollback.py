"""Gradients that stay NaN or infinite: back to weights from before, and on with other images.

An update whose gradient is not finite is skipped by itself (optim.update). Where that goes on, the weights have come
to a bad place: they are taken back to the last good checkpoint, while the step, and with it the images and the
schedule, goes on, as after a loss spike in PaLM (arXiv 2204.02311, section 5.1).
"""

from __future__ import annotations

import json
from pathlib import Path

from vitcli import storage
from vitcli.checkpoint import saved
from vitcli.errors import CheckpointError, NumericsError
from vitcli.training.state import Position

IN_A_ROW = 3  # skipped updates that are too many
TIMES = 3  # that a run goes back


def is_due(position: Position) -> bool:
    """Whether too many updates in a row were skipped, up to now."""
    return position.skipped_in_a_row >= IN_A_ROW


def target(checkpoints: Path, position: Position, every: int, steps: int) -> Path:
    """The newest whole checkpoint from before the skipped updates.

    One at a multiple of `every` steps: a run that was interrupted has others too, and must come to the same bits.
    Raises NumericsError where there is none, after going back TIMES times, or at the end of all `steps`.
    """
    what = f"the gradient of {position.skipped_in_a_row} updates in a row, up to step {position.step}, was not finite"
    hint = "lower optim.lr, lengthen the warm-up, or try model.qk_norm=true"
    if position.step == steps:
        raise NumericsError(f"{what}, to the end of training", hint)
    if position.rollbacks == TIMES:
        raise NumericsError(f"{what}, after going back to an earlier checkpoint {TIMES} times", hint)
    for folder, step in reversed(saved(checkpoints).items()):
        if step % every == 0 and _is_good(folder):
            return folder
    raise NumericsError(f"{what}, and no checkpoint from before is left to go back to", hint)


def _is_good(folder: Path) -> bool:
    try:
        storage.verify(folder)
    except CheckpointError:
        return False
    return not json.loads((folder / "state.json").read_text())["skipped_in_a_row"]
