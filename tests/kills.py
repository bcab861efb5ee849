"""Runs that are killed and signalled at random moments, again and again, beside runs that are left alone.

    PYTHONPATH=. python tests/kills.py [--kills 40] [--signals 40] [--processes 1 2 3]

For each number of processes a fine-tuning run and a DAPT run share the SIGKILLs, and end bit-identical to runs that
nobody touched, or the command fails. So do two of two processes that share the signals USR1, USR2, TERM and INT. The
runs accumulate gradients, average weights, draw two views of a window, mix two data sets, read with two processes, and
save after every step. `make test` runs a few of each.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from background import EVERY_STEP, Run, assert_same_run, dapt, finetune
from helpers import make_data

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def commands(data, *, epochs):
    """{script: its command line}; the batches divide over 1, 2 and 3 processes, and their two passes."""
    both = ["--update_freq", 2, "--num_workers", 2, "--epochs", epochs]
    return {
        "finetune": finetune(data, *both, "--total_batch_size", 12, "--num_sample", 2, "--sampling_rate_val", 8),
        "dapt": dapt(data, *both, "--total_batch_size", 12, 12),
    }


def left_alone(words, folder, *, processes):
    """Let a run finish."""
    attempt = Run(words, folder, processes=processes)
    assert attempt.end(1200) == 0, attempt.output


def killed(words, folder, *, processes, kills, seed):
    """Start a run again and again, each time killed at a random moment, so many times; then let it finish.

    Every fourth time it is killed while it starts, else within a second after it has saved again, one of three in the
    next save. Returns how many of the kills came in the middle of a save.
    """
    rng, in_saves = random.Random(seed), 0
    last = folder / "checkpoint-last" / "state.pth"
    for kill in range(kills):
        before = last.stat().st_mtime_ns if last.exists() else 0
        attempt = Run([*words, *EVERY_STEP], folder, processes=processes)
        if kill % 4 == 3:
            time.sleep(rng.uniform(0, 6))
        else:
            saved = attempt.until(lambda before=before: last.exists() and last.stat().st_mtime_ns != before)
            assert saved, attempt.output
            time.sleep(rng.uniform(0, 1))
        tree = attempt.tree()
        if kill % 4 == 1:
            attempt.until((folder / "checkpoint-last.new").exists)
        assert attempt.process.poll() is None, f"kill {kill} came too late: {attempt.output}"
        attempt.kill(tree)
        in_saves += any((folder / f"checkpoint-last.{part}").exists() for part in ("new", "old"))
    left_alone(words, folder, processes=processes)
    return in_saves


def signalled(words, folder, *, processes, signals, seed):
    """Start a run again and again, each time stopped by a random signal, so many times; then let it finish.

    The signal goes to the launcher or to one rank, within a second after a line of the log. The run ends within a
    minute, with its marker, and no traceback of its own.
    """
    rng = random.Random(seed)
    for number in (rng.choice(SIGNALS) for _ in range(signals)):
        attempt = Run(words, folder, processes=processes)
        attempt.until_said(" step ")
        time.sleep(rng.uniform(0, 1))
        os.kill(rng.choice([attempt.process.pid, *attempt.ranks()]), number)
        assert attempt.end(60) != 0 and (folder / "REQUEUE").exists(), f"{number!r}: {attempt.output}"
        assert "Traceback" not in attempt.output.partition("torch/distributed")[0], attempt.output
    left_alone(words, folder, processes=processes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="for each number of processes (default: 40)")
    parser.add_argument("--signals", type=int, default=40, help="in all (default: 40)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        words = commands(make_data(root / "data"), epochs=8)
        for processes in args.processes:
            for seed, (script, command) in enumerate(words.items()):
                whole, run = root / f"whole_{script}_{processes}", root / f"{script}_{processes}"
                left_alone(command, whole, processes=processes)
                how = {"processes": processes, "kills": args.kills // 2, "seed": seed}
                in_saves = killed(command, run, **how)
                assert_same_run(whole, run)
                print(f"{script}, {processes} processes: {args.kills // 2} of {args.kills // 2} kills survived, "
                      f"{in_saves} in a save; bit-identical", flush=True)  # fmt: skip
        for seed, (script, command) in enumerate(words.items()):
            whole, run = root / f"whole_{script}_2", root / f"{script}_signalled"
            if not whole.exists():
                left_alone(command, whole, processes=2)
            signalled(command, run, processes=2, signals=args.signals // 2, seed=seed)
            assert_same_run(whole, run)
            print(f"{script}: {args.signals // 2} of {args.signals // 2} signals; bit-identical", flush=True)


if __name__ == "__main__":
    main()
