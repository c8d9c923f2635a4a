"""Runs one program under limits; the jail hands this text to Python, as `python -c TEXT LIMITS`.

It reads from standard input a line with a secret and then the program. It writes two lines: the
secret when the program is about to start, and the secret again when the program has run to its end,
or else the error. Nothing of ours can be imported here.
"""

import json
import os
import resource
import sys


def set_limits(limits: dict[str, int]) -> None:
    """Set soft and hard limits, such as {"RLIMIT_CPU": 3}, which the program cannot raise."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def detach() -> int:
    """A descriptor of standard output for us alone; the program's three streams are empty."""
    out, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    return out


def run(program: str) -> str | None:
    """None when the program runs to its last line; else the error, also for exit()."""
    try:
        # As HumanEval's own runner: in no module, so that `if __name__ == "__main__"` is false.
        exec(compile(program, "program", "exec"), {})
    except BaseException as error:
        return " ".join(f"{type(error).__name__}: {str(error)[:1000]}".split())
    return None


def main() -> None:
    secret, _, program = sys.stdin.buffer.read().partition(b"\n")
    out = detach()
    set_limits(json.loads(sys.argv[1]))
    os.write(out, secret + b"\n")
    error = run(program.decode())
    os.write(out, (secret if error is None else error.encode(errors="replace")) + b"\n")
    # No destructor or handler of the program may run after its result.
    os._exit(0)


main()
