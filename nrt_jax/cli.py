"""The command line: run the verb that its words name, and tell an error."""

import errno
import io
import logging
import os
import sys
import traceback

from nrt_jax import distributed
from nrt_jax.arguments import parse
from nrt_jax.devices import leave_out_absent_tpu
from nrt_jax.errors import InputError, RunFailed
from nrt_jax.local import end_with_parent
from nrt_jax.options import make_parser
from nrt_jax.stop import INTERRUPTED, Interrupts

_WRONG_PATH = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EEXIST, errno.ENOTEMPTY),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; 0 when it worked, 2 for a mistake in the input, 1 for a run that failed.

    After Ctrl-C 130, also for a run that has saved.
    """
    with Interrupts() as interrupts:
        try:
            return _run(argv, interrupts)
        except KeyboardInterrupt:
            return _interrupted(interrupts)
        except SystemExit as stopped:
            distributed.end_all("stopped before its first step", int(stopped.code or 0))
            raise
        except Exception as error:
            if interrupts.seen:
                return _interrupted(interrupts)
            status = _told(error)
            if status is None:
                _end_others(error)
                raise
            return status


def _run(argv: list[str] | None, interrupts: Interrupts) -> int:
    args = parse(make_parser(), sys.argv[1:] if argv is None else argv)
    args.interrupts = interrupts
    _configure_logging()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The text of a model may hold characters that the terminal cannot show.
        sys.stdout.reconfigure(errors="backslashreplace")
    end_with_parent()
    args.tpu_left_out = leave_out_absent_tpu()
    if hasattr(args, "process_id"):
        place = distributed.find_place(args.coordinator, args.process_id, args.processes)
        distributed.initialise(place, args.timeout)
    status = args.verb(args)
    distributed.leave()
    if sys.stdout is not None:
        sys.stdout.flush()
    return status or 0


def _told(error: Exception) -> int | None:
    """Print the line of an expected error; its exit status, None for a mistake of ours."""
    if isinstance(error, InputError):
        return _fail(error, 2)
    if isinstance(error, RunFailed):
        return _fail(error, 1)
    if isinstance(error, BrokenPipeError):
        return _fail("standard output was closed before the end", 1)
    if isinstance(error, OSError):
        return _fail(_os_error(error), 1)
    return None


def _end_others(error: Exception) -> None:
    """End the other processes after a mistake of ours in this one."""
    distributed.hear_others()
    if distributed.process_count() > 1:
        traceback.print_exception(error)
        distributed.end_all(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", 1)


def _interrupted(interrupts: Interrupts) -> int:
    more = interrupts.at_leaving()
    return _fail(f"interrupted; {more}" if more else "interrupted", INTERRUPTED)


def _configure_logging() -> None:
    logging.basicConfig(format="nrt-jax: %(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("nrt_jax").setLevel(logging.INFO)
    logging.getLogger("absl").addFilter(_is_not_raised)


def _is_not_raised(record: logging.LogRecord) -> bool:
    """False for records with a traceback: Orbax also raises these errors, which end in one line."""
    return not record.exc_info


def _fail(message: object, status: int) -> int:
    if (out := sys.stdout) is not None:
        try:
            out.flush()
        except OSError:
            # Closed or full: the exit must not try to write the rest of the output.
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    distributed.hear_others()
    line = " ".join(str(message).split())
    print(f"nrt-jax: error: {line}", file=sys.stderr)
    distributed.end_all(line, status)
    return status


def _os_error(error: OSError) -> str:
    """The file, the system's message, and the remedy."""
    where = error.filename or "a file or the output"
    remedy = "check the path"
    if error.errno not in _WRONG_PATH:
        remedy = (
            "make room or allow access there, then run the same command again: a run continues "
            "from its newest checkpoint"
        )
    return f"{where}: {error.strerror or error}; {remedy}"
