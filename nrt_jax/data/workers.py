"""One function over many tasks in several processes, with few tasks in memory at a time."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from nrt_jax.errors import RunFailed

Task = TypeVar("Task")
Result = TypeVar("Result")
TASKS_PER_WORKER = 2
"""Tasks in memory: one that is worked on and one that waits."""

_function: Callable[[Any], Any] | None = None
"""What this worker does."""


def in_workers(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[Result]:
    """The results in the order of the tasks; one worker is this process itself.

    Tasks are read as they are needed. Raises what the function raises, and RunFailed for a worker
    that was killed.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    # A forked worker shares the tokenizer's memory and starts at once, but jax has threads.
    forks = sys.platform == "linux" and "jax" not in sys.modules
    context = multiprocessing.get_context("fork" if forks else "spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(function,))
    pending: deque = deque()
    try:
        # Starts the workers before the tasks' reader has threads.
        pool.submit(os.getpid).result()
        for task in tasks:
            pending.append(pool.submit(_work, task))
            if len(pending) >= TASKS_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise RunFailed(
            f"one of {workers} workers was killed, as the system does where memory is short; run "
            "the same command again with fewer --workers: what is finished is kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    # Signals of the terminal are for the first process, which ends the workers.
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.disable(logging.WARNING)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
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
