"""Submit a run from the command line or from Python, without a job file (submitit):

    python jobs/submit.py --nodes 2 --gpus_per_node 4 --time 24:00:00 run_dapt.py -- <flags of run_dapt.py>

Like a job file it starts one torchrun per node (jobs/_launch.sh), stops --signal_delay seconds before its time is over
or when it is preempted, and is requeued if and only if its state was saved; a crash is not requeued. Partition, account
and others: --sbatch partition=gpu, or SBATCH_PARTITION, SBATCH_ACCOUNT, ... in the environment.
--cluster local runs it in the background of this machine, --cluster debug in the foreground; both wait for its end.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.config import ConfigError, Parser
from utils.flags import dapt_parser, finetune_parser, positive
from utils.preemption import EXIT_CODE

SCRIPTS = {"run_dapt.py": dapt_parser, "run_finetune.py": finetune_parser}
LOCAL_REQUEUE = 144  # submitit.local.local.LOCAL_REQUEUE_RETURN_CODE
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Launch:
    """The run, as submitit calls it in the job: a script and its flags, from the folder it was submitted in.

    submitit's own handler of USR2 requeues because of the signal; here the launcher does, because of the saved state.
    """

    def __init__(self, words: list[str], processes_per_node: int):
        self.words, self.folder, self.processes_per_node = words, Path.cwd(), processes_per_node

    def __call__(self) -> None:
        """Raises RuntimeError where the run fails; SystemExit, of the code that restarts a local job, if preempted."""
        command = ["bash", "-c", 'set -euo pipefail; source "$0"; launch "$@"', str(ROOT / "jobs" / "_launch.sh")]
        environment = os.environ | {
            "NPROC_PER_NODE": str(self.processes_per_node),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # torchrun of this Python
        }
        process = subprocess.Popen([*command, *self.words], cwd=self.folder, env=environment, start_new_session=True)

        def forward(number: int, _frame: object) -> None:
            with contextlib.suppress(ProcessLookupError):
                if "SLURM_JOB_ID" not in os.environ:  # Slurm tells every process itself
                    os.killpg(process.pid, number)

        for number in FORWARDED:
            signal.signal(number, forward)
        code = process.wait()
        if code == EXIT_CODE:
            sys.exit(LOCAL_REQUEUE)
        if code:
            raise RuntimeError(f"the run failed with code {code}; its own message stands above")


def minutes(text: str) -> int:
    """Slurm's notations of time (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in minutes, rounded up."""
    if found := re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", text):
        parts = [int(part) for part in found[2].split(":")]
        parts = (parts if found[1] or len(parts) == 3 else [0, *parts]) + [0, 0]
        seconds = 86400 * int(found[1] or 0) + 3600 * parts[0] + 60 * parts[1] + parts[2]
    if not found or not seconds:
        raise argparse.ArgumentTypeError(f"'{text}' is not a time like 90, 24:00:00 or 2-12:00:00")
    return -(-seconds // 60)


def option(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE")
    return name.lstrip("-"), value


def submit_parser() -> Parser:
    """The flags before `--`."""
    parser = Parser(__doc__, retired={})
    add = parser.add_argument
    add("script", choices=SCRIPTS, help="what to run; its flags follow after --")
    add("--cluster", choices=("slurm", "local", "debug"), default="slurm", help="where it runs (default: %(default)s)")
    add("--nodes", type=positive, default=1, help="machines (default: %(default)s)")
    add("--gpus_per_node", type=positive, help="GPUs of each machine; left out: CPUs only")
    add("--cpus_per_node", type=positive, help="CPUs of each machine (default: what the cluster gives)")
    add("--nproc_per_node", type=positive, help="processes on each machine (default: --gpus_per_node, or 1)")
    add("--time", type=minutes, default="24:00:00", help="limit, as sbatch takes it (default: %(default)s)")
    add("--signal_delay", type=positive, default=180, help="seconds before the limit to stop (default: %(default)s)")
    add("--name", help="of the job (default: that of the run's --output_dir)")
    add("--folder", type=Path, help="where submitit keeps the job and its log (default: OUTPUT_DIR/submitit)")
    more = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    add("--sbatch", type=option, **more, help="another option of sbatch; may be given several times")
    return parser


def main(words: list[str]) -> None:
    """Submit; for a local run, wait for its end too."""
    split = words.index("--") if "--" in words else len(words)
    args, flags = submit_parser().parse_args(words[:split]), words[split + 1 :]
    run_parser = SCRIPTS[args.script]("")
    run_parser.prog = args.script
    output_dir = Path(run_parser.parse_args(flags).output_dir)  # a mistake is answered now, not from the queue

    import submitit

    for name, _ in args.sbatch:  # sbatch prefers these to the script that submitit writes
        os.environ.pop(f"SBATCH_{name.upper().replace('-', '_')}", None)
    run = Launch([str(ROOT / args.script), *flags], args.nproc_per_node or args.gpus_per_node or 1)
    try:
        executor = submitit.AutoExecutor(args.folder or output_dir / "submitit", cluster=args.cluster)
        if args.cluster != "debug":
            executor.update_parameters(
                name=args.name or output_dir.name,
                nodes=args.nodes,
                tasks_per_node=1,
                gpus_per_node=args.gpus_per_node,
                cpus_per_task=args.cpus_per_node,
                timeout_min=args.time,
                stderr_to_stdout=True,
                slurm_use_srun=False,  # the launcher does
                slurm_signal_delay_s=args.signal_delay,
                slurm_additional_parameters={"requeue": True, **dict(args.sbatch)},
            )
        job = executor.submit(run)
    except (RuntimeError, ValueError) as e:  # no Slurm here, an option it refuses, several nodes of one machine
        raise ConfigError(f"--cluster {args.cluster}: {e}") from e
    print(f"job {job.job_id}, its log: {job.paths.stdout}", flush=True)
    if args.cluster != "slurm" and (error := job.exception()):
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as e:
        sys.exit(f"error: {e}")
