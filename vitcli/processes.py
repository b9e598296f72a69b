"""Several processes that train one model: which part is whose, and how they agree.

torchrun, Slurm or `vit pretrain --gpus` start them; each runs the same command and comes to the same decisions at the
same step. The first (rank 0) alone writes and speaks.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from vitcli.errors import ProcessError, RecipeError, UserError
from vitcli.stop import Stop

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

GRACE = 30.0  # seconds in which the others find out that a process has failed, and end
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


@dataclass(frozen=True)
class Processes:
    """This process, number `rank` of `count`; so many `neighbours`, itself among them, share its CPU cores."""

    rank: int = 0
    count: int = 1
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

    A process that does not answer for `timeout` seconds ends the run. An error that several raise alike is told by the
    one that comes first; the others end silently, with the same exit code. Raises RecipeError, ProcessError.
    """
    if "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        os.environ |= {"RANK": os.environ["SLURM_PROCID"], "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"]}
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise RecipeError(
            f"{count} processes are to train together, but these variables are not set: {', '.join(missing)}",
            "torchrun sets them; under Slurm: "
            "export MASTER_ADDR=$(scontrol show hostnames $SLURM_NODELIST | head -1) MASTER_PORT=29500",
        )
    import torch
    import torch.distributed as dist

    if watched := os.environ.pop("VITCLI_LAUNCHER", None):
        threading.Thread(target=_end_with_launcher, args=(int(watched),), daemon=True).start()
    alone = Processes(int(os.environ["RANK"]), count)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    wait = timedelta(seconds=timeout)
    with alone.errors(lambda: "before training"):
        store, *_ = next(iter(dist.rendezvous("env://", timeout=wait)))  # pyright: ignore[reportPrivateImportUsage]
        # Keys of an earlier attempt hold the addresses of processes that are gone.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", store)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=alone.rank, world_size=count, timeout=wait)
        try:
            yield _meet(alone)
        except UserError as error:
            if _is_told(error, store):
                sys.exit(error.exit_code)
            raise
        finally:
            dist.destroy_process_group()


def _meet(alone: Processes) -> Processes:
    """Each process on a machine takes a GPU of those that it sees, and its part of the cores that it may use."""
    import torch

    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    found = alone.all((socket.gethostname(), usable))
    here, cores = found[alone.rank]
    if torch.cuda.is_available():
        before = sum(host == here for host, _ in found[: alone.rank])
        torch.cuda.set_device(before % torch.cuda.device_count())
    return replace(alone, neighbours=sum(host == here and bool(cores & others) for host, others in found))


def _is_told(error: UserError, store: Any) -> bool:
    """Whether another process has met the same error, and tells it."""
    if isinstance(error, ProcessError):
        return False  # the store may be lost, too
    try:
        return store.add(f"{type(error).__name__} {error}", 1) > 1
    except RuntimeError:
        return False


def visible(gpus: int) -> int:
    """`gpus`, if this machine has so many. Raises RecipeError."""
    import torch

    if gpus > torch.cuda.device_count():
        raise RecipeError(
            f"--gpus {gpus}: {torch.cuda.device_count()} are visible here",
            "`vit doctor` says more; torchrun starts processes on CPUs and on several machines",
        )
    return gpus


def launch(words: list[str], count: int, tell: Callable[[str], None], restarts: int = 3) -> int:
    """Run `vit WORDS` in `count` processes of this machine; the exit code that they come to.

    SIGINT and SIGTERM go to all of them. Where one is lost, all are started again, up to `restarts` times, and continue
    from the newest checkpoint; after a mistake they are not, since they would make it again.
    """
    name = uuid.uuid4().hex
    held, watched = socket.socketpair()
    with Stop() as stop, held, watched:
        for attempt in range(restarts + 1):
            variables = {"TORCHELASTIC_RUN_ID": name, "TORCHELASTIC_RESTART_COUNT": str(attempt)}
            codes = _run(words, count, variables, watched.fileno(), stop)
            if mistakes := [code for code in codes if code > 0 and code not in (ProcessError.exit_code, *STOPPED)]:
                return mistakes[0]
            if stop.signal and any(codes):
                return 128 + stop.signal
            if not any(codes) or max(codes) in STOPPED:
                return max(codes)
            killed = [f"process {rank} was ended by signal {-code}" for rank, code in enumerate(codes) if code < 0]
            next_step = "all start again" if attempt < restarts else f"given up after {restarts} new starts"
            tell(f"warning: {', '.join(killed) or 'the processes lost one another'}; {next_step}")
    return ProcessError.exit_code


def _run(words: list[str], count: int, variables: dict[str, str], watched: int, stop: Stop) -> list[int]:
    """The exit codes of the processes, in the order of their ranks. If one fails, the others have to end, too; they all
    end when the descriptor that they have `watched` is at its end."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    # They meet at this process, as torchrun's do at its agent.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    variables = os.environ | variables | {"WORLD_SIZE": str(count), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "VITCLI_LAUNCHER": str(watched)}
    command = [sys.executable, "-m", "vitcli", *words]
    workers = [
        subprocess.Popen(  # noqa: S603
            command, env=variables | {"RANK": str(rank)}, start_new_session=True, pass_fds=[watched]
        )
        for rank in range(count)
    ]
    told, failed = False, None
    while None in (codes := [worker.poll() for worker in workers]):
        time.sleep(0.1)
        if stop.signal and not told:
            for worker in workers:
                worker.send_signal(stop.signal)
            told = True
        if not failed and set(codes) - {None, 0, *STOPPED}:
            failed = time.monotonic()
        if failed and time.monotonic() - failed > GRACE:
            for worker in workers:
                worker.kill()
    return [code for code in codes if code is not None]


def _end_with_launcher(watched: int) -> None:
    """Send SIGTERM to this process when the launcher, which alone has the other end of a socket, is no more."""
    os.read(watched, 1)
    os.kill(os.getpid(), signal.SIGTERM)


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
