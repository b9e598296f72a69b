"""What can be made to go wrong inside a command, from outside of the product: called in a forked child before it."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

CHANGES = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod")


def on_change(act, folder: str = "run") -> None:
    """Call `act(n)` before the n-th change that a save makes to the file system, as Python's audit events tell it."""
    count = 0

    def hook(event, args):
        nonlocal count
        if event not in CHANGES or (event == "open" and not saves(args)):
            return
        path, within = str(args[0]), isinstance(args[-1], int) and args[-1] >= 0 and event in ("os.rmdir", "os.remove")
        if within or path.startswith((f"{folder}/checkpoints/", f"{folder}/.tmp-", f"{folder}/.old-")):
            count += 1
            act(count)

    def saves(args):
        return isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)

    sys.addaudithook(hook)


def count_changes(file: str) -> None:
    """Write the number of changes so far into a file."""
    target = os.open(file, os.O_CREAT | os.O_WRONLY)
    on_change(lambda n: os.pwrite(target, f"{n:6}".encode(), 0))


def kill_before_change(number: int) -> None:
    on_change(lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == number else None)


def tear_file(number: int, share: float) -> None:
    """Killed when so much of the n-th file of tensors is written."""
    import safetensors.torch

    save, seen = safetensors.torch.save_file, iter(range(1, 1000))

    def torn(tensors, path, *args, **kwargs):
        save(tensors, path, *args, **kwargs)
        if next(seen) == number:
            os.truncate(path, int(share * Path(path).stat().st_size))
            os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.save_file = torn


def small_disk(kilobytes: int, place: str) -> None:
    """The folder `place` becomes a disk of its own for this process, and this process goes into it."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private, recursive = 0x20000, 0x10000000, 1 << 18, 1 << 14
    user, group = os.getuid(), os.getgid()
    if libc.unshare(new_mounts | (new_user if user else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(None, b"/", None, private | recursive, None):
        raise OSError(ctypes.get_errno(), "private mounts")
    if libc.mount(b"tmpfs", place.encode(), b"tmpfs", 0, f"size={kilobytes}k".encode()):
        raise OSError(ctypes.get_errno(), "tmpfs")
    os.chdir(place)


def full_then_freed(kilobytes: int, place: str) -> None:
    """Run the command on a small disk, free space, run it again, and take the run folder out.

    The first exit code and what it said go to first.txt; the process ends as the second time ends.
    """
    outside = os.open(".", os.O_RDONLY)
    small_disk(kilobytes, place)
    words, pid = list(sys.argv), os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        first = os.open("first.txt", os.O_CREAT | os.O_WRONLY, dir_fd=outside)
        os.write(first, str(os.waitstatus_to_exitcode(status)).encode())
        ctypes.CDLL(None).mount(None, place.encode(), None, 32, b"size=1g")
        pid = os.fork()
        if pid:
            import shutil

            _, status = os.waitpid(pid, 0)
            if Path("run").exists():
                shutil.copytree("run", f"/proc/self/fd/{outside}/run")
            os._exit(os.waitstatus_to_exitcode(status))
        if Path("run/recipe.resolved.yaml").exists():
            sys.argv = [*words[:2], "--resume", "run"]
        elif Path("run").exists():
            import shutil

            shutil.rmtree("run")


def signal_while_scoring(number: int) -> None:
    """SIGTERM comes in the midst of the n-th evaluation."""
    from vitcli.training import keeper

    score, seen = keeper.score, iter(range(1, 1000))

    def scored(*args, **kwargs):
        if next(seen) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(*args, **kwargs)

    keeper.score = scored


def held(step: int) -> None:
    """Training goes on after the update of this step only once the file `go` is there."""
    from vitcli.training.meter import Meter

    add = Meter.add

    def wait(self, at, *rest):
        add(self, at, *rest)
        while at == step and not os.path.exists("go"):
            time.sleep(0.01)

    Meter.add = wait


def hasty_loader(seconds: float) -> None:
    """From SIGUSR1 on, a loader process that does not answer is given up sooner."""
    from vitcli.data import workers

    def hurry(*_):
        workers.HUNG = seconds

    signal.signal(signal.SIGUSR1, hurry)
