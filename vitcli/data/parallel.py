"""Processes that share work, and how they are started. No torch is loaded here: much of the work goes without."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from vitcli.errors import DataError
from vitcli.stop import Stop

Task = TypeVar("Task")
Result = TypeVar("Result")

FEW = 1000  # images that are fewer are loaded by the process that wants them
MOST_LOADERS = 16  # beyond, handing over costs more than another process brings

# A fork of the process itself would copy its threads in an undefined state.
METHOD = "spawn" if sys.platform == "win32" else "forkserver"


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(work: Callable[[Task], Result], tasks: Sequence[Task], jobs: int) -> Iterator[Result]:
    """`work` of each task as it is done, in `jobs` processes, or in this one if that is 1.

    `work` goes to the processes by pickle, once. They end with this process, and when the iterator is closed. Raises
    DataError if one of them is killed.
    """
    if jobs == 1 or len(tasks) < 2:
        yield from map(work, tasks)
        return
    start_server_with([])
    context = multiprocessing.get_context(METHOD)
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), context, initializer=_begin, initargs=(work,))
    try:
        with uninterrupted():
            asked = [pool.submit(_do, task) for task in tasks]
        for done in as_completed(asked):
            yield done.result()
    except BrokenProcessPool as error:
        raise DataError("a process was killed, perhaps for want of memory", "take fewer: --jobs 1") from error
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
            process.join()


def loaders(wanted: int | None, easy: bool, images: int, neighbours: int = 1) -> int:
    """Loader processes: as wanted; else none where they do not pay, and otherwise this process's cores but one."""
    if wanted is not None:
        return wanted
    if images < FEW or easy:
        return 0
    return min(max(0, cores() // neighbours - 1), MOST_LOADERS)


def expect_loaders() -> None:
    """Begin to start the process that they are forked from; it takes as long as importing all that they need."""
    start_server_with(["vitcli.data.loader", "vitcli.data.decoder"])


def start_server_with(modules: list[str]) -> None:
    """Begin to start the process that others are forked from, deaf to signals, with modules that they need."""
    if METHOD != "forkserver":
        return
    from multiprocessing import forkserver, resource_tracker

    resource_tracker.ensure_running()  # it would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        multiprocessing.set_forkserver_preload(modules)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGINT and SIGTERM wait for the end of this: a process that was told half of what it needs fails aloud."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    stop = Stop()
    try:
        with stop:
            yield
    finally:
        if stop.signal:
            signal.raise_signal(stop.signal)


_work: Callable[[Any], Any]


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    follow_parent()


def _do(task: Any) -> Any:
    return _work(task)


def follow_parent() -> None:
    """The first act of a process: leave signals to the one that started it, and end when that does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_join_parent, daemon=True).start()


def _join_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)
