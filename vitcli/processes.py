"""Several processes that train one model: which part is whose, and how they agree.

torchrun, Slurm or `vit pretrain --gpus` start them; each runs the same command and comes to the same decisions at the
same step. The first (rank 0) alone writes and speaks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from vitcli.errors import ProcessError, RecipeError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process, number `rank` of `count`; number `local` of `neighbours` on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0
    neighbours: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def share(self, batch: int) -> range:
        """The places of a batch that this process computes. Raises RecipeError if they cannot be equally many."""
        size, left = divmod(batch, self.count)
        if left or not size:
            near = sorted({max(1, size) * self.count, (size + 1) * self.count})
            raise RecipeError(
                f"batch {batch} cannot be shared equally by {self.count} processes",
                f"--set batch={' or '.join(map(str, near))}",
            )
        return range(self.rank * size, (self.rank + 1) * size)

    def all(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def of_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, in all of them; its UserError too."""
        if self.count == 1:
            return make()
        made: Any = None
        if self.first:
            try:
                made = make()
            except Exception as error:
                self.all(error)
                raise
        made = self.all(made)[0]
        if isinstance(made, Exception):
            raise made
        return made

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.count == 1:
            return number
        import torch
        import torch.distributed as dist

        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    @contextmanager
    def errors(self, where: Callable[[], str]) -> Iterator[None]:
        """Say which process lost the others, and `where`, instead of what the network's library says."""
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            lost = ("Timed out", "timed out", "Connection closed", "Connection reset", "NCCL", "Broken pipe", "gloo")
            if self.count == 1 or not any(word in text for word in lost):
                raise
            raise ProcessError(
                f"process {self.rank} of {self.count} lost the others {where()}: {text.splitlines()[0][:200]}",
                "the first error above is the cause; the newest checkpoint is whole: continue with --resume",
            ) from error


ALONE = Processes()


@contextmanager
def start(timeout: float) -> Iterator[Processes]:
    """The processes that torchrun or Slurm started together with this one; this one alone, if nobody did.

    A process that does not answer for `timeout` seconds ends the run.
    """
    env = _slurm() if "SLURM_PROCID" in os.environ and "RANK" not in os.environ else os.environ
    count = int(env.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    found = Processes(int(env["RANK"]), count, int(env["LOCAL_RANK"]), int(env.get("LOCAL_WORLD_SIZE", "1")))
    if torch.cuda.is_available():
        torch.cuda.set_device(found.local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # Keys of an earlier attempt hold the addresses of processes that are gone.
    store, *_ = next(iter(dist.rendezvous("env://")))  # pyright: ignore[reportPrivateImportUsage]
    attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)  # pyright: ignore[reportPrivateImportUsage]
    wait = timedelta(seconds=timeout)
    dist.init_process_group(backend, store=store, rank=found.rank, world_size=count, timeout=wait)
    try:
        yield found
    finally:
        dist.destroy_process_group()


def _slurm() -> dict[str, str]:
    """What torchrun would have set, from Slurm's variables; `srun` must bring MASTER_ADDR and MASTER_PORT."""
    slurm = os.environ
    if "MASTER_ADDR" not in slurm or "MASTER_PORT" not in slurm:
        raise RecipeError(
            "Slurm started several tasks, but MASTER_ADDR and MASTER_PORT are not set",
            "export MASTER_ADDR=$(scontrol show hostnames $SLURM_NODELIST | head -1) MASTER_PORT=29500",
        )
    os.environ |= {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": slurm.get("SLURM_NTASKS_PER_NODE", "1"),
    }
    return dict(os.environ)


def visible(gpus: int) -> int:
    """`gpus`, if this machine has so many. Raises RecipeError."""
    import torch

    if gpus > torch.cuda.device_count():
        raise RecipeError(
            f"--gpus {gpus}: {torch.cuda.device_count()} are visible here",
            "`vit doctor` says more; torchrun starts processes on CPUs and on several machines",
        )
    return gpus


def launch(words: list[str], count: int, restarts: int = 3) -> int:
    """Run `vit WORDS` in `count` processes of this machine; the exit code of the first that failed, or 0.

    This is torchrun's own launcher: where a process is lost, all are started again, up to `restarts` times, and
    continue from the newest checkpoint.
    """
    import sys
    import uuid

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.5,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "vitcli", *words)
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    return 0


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that all processes know, as an ordinary one."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A copy on the CPU of tensors of which each process may hold a part. All processes must call this."""
    return {name: plain(tensor.detach()).to("cpu", copy=True) for name, tensor in tensors.items()}


def spread(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor as `like` is held: on its device, and only the part of it that this process keeps."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(like, DTensor) and tensor.ndim:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)
