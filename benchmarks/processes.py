"""CPU seconds of training by two processes of two devices over one process of four.

    python -m benchmarks.processes quickstart/nrt model.path=... --steps 12

Each trains `--steps` steps, and two steps; the difference leaves out the start. A run before them
compiles every program, which both then read from the cache of compiled programs; each process reads
them, and that is counted. The machine's CPU does the work of all four devices, so the processes
compute the same in all, and the rest is what they tell each other. A process that waits for another
computes too, so the figure grows with the load of the machine. Overrides follow the config, as for
`nrt-jax train`; evaluations and the diagnosis before the first step are off.
"""

import argparse
import resource
import subprocess
import sys
import tempfile

FEW = 2
"""Steps of a run that is subtracted."""
WORDS = {
    "1 x 4": ["local", "--processes", "1", "--devices-per-process", "4", "--"],
    "2 x 2": ["local", "--processes", "2", "--devices-per-process", "2", "--"],
}


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", nargs="+", help="a config, and overrides")
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    per_step = {}
    for name, words in WORDS.items():
        # Later steps have shapes of their own: the run that compiles must take all of them.
        _, few, many = (cpu_seconds(words, args.config, n) for n in (args.steps, FEW, args.steps))
        per_step[name] = (many - few) / (args.steps - FEW)
        print(f"{name}: {few:.1f} CPU s for {FEW} steps, {many:.1f} for {args.steps}", flush=True)
    ratio = per_step["2 x 2"] / per_step["1 x 4"]
    print(f"per step {per_step['1 x 4']:.2f} and {per_step['2 x 2']:.2f} CPU s, ratio {ratio:.2f}")


def cpu_seconds(words: list[str], config: list[str], steps: int) -> float:
    """CPU seconds of a training of so many steps, all of its processes together."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            *(f"run_dir={folder}/run", f"train.steps={steps}", "train.diagnosis_prompts=0"),
            *("evaluation.examples=0", f"checkpoint.every_steps={steps}"),
        ]
        command = [sys.executable, "-m", "nrt_jax", *words, "train", *config, *overrides]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
