"""One function over many tasks in several processes, with few tasks in memory at a time."""

import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from nrt_jax.errors import RunFailed

Task = TypeVar("Task")
Result = TypeVar("Result")
TASKS_PER_WORKER = 2
"""Tasks in memory: one that is worked on and one that waits."""

_function: Callable[[Any], Any] | None = None
"""What this worker does."""


def in_workers(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int, *, threads: int = 1
) -> Iterator[Result]:
    """The results in the order of the tasks; one worker is this process itself.

    The one worker has `threads`: one may compute in Python while another waits for what does not,
    such as a tokenizer or the disk.

    Tasks are read as they are needed. Raises what the function raises, and RunFailed for a worker
    that was killed.
    """
    if workers == 1:
        with _older_objects_aside():
            yield from _in_threads(function, tasks, threads)
        return
    # A forked worker shares the tokenizer's memory and starts at once, but jax has threads.
    forks = sys.platform == "linux" and "jax" not in sys.modules
    context = multiprocessing.get_context("fork" if forks else "spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(function,))
    try:
        # Starts the workers before the tasks' reader has threads.
        pool.submit(os.getpid).result()
        yield from _in_order(pool, _work, tasks, TASKS_PER_WORKER * workers)
    except BrokenProcessPool as error:
        raise RunFailed(
            f"one of {workers} workers was killed, as the system does where memory is short; run "
            "the same command again with fewer --workers: what is finished is kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_threads(
    function: Callable[[Task], Result], tasks: Iterable[Task], threads: int
) -> Iterator[Result]:
    if threads == 1:
        yield from map(function, tasks)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from _in_order(pool, function, tasks, threads + 1)


def _in_order(
    pool: Executor, function: Callable[[Task], Result], tasks: Iterable[Task], most: int
) -> Iterator[Result]:
    """The results of at most so many tasks at a time."""
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) >= most:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


@contextmanager
def _older_objects_aside() -> Iterator[None]:
    """Keep the collection of garbage from all objects that are there: looking through those of the
    libraries again and again takes a tenth of the time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    # Signals of the terminal are for the first process, which ends the workers.
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.disable(logging.WARNING)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()
    _function = function


def _end_with_parent() -> None:
    """A worker would wait forever for the tasks of a process that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)


def _work(task: Any) -> Any:
    assert _function is not None, "_start has set it"
    return _function(task)
