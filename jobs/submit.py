"""Submit a run from the command line or from Python, without a job file (submitit):

    python jobs/submit.py --nodes 2 --gpus_per_node 4 --time 24:00:00 run_dapt.py -- <flags of run_dapt.py>

Like a job file it starts one torchrun per node (jobs/_launch.sh), stops --signal_delay seconds before its time is over
or when it is preempted, and is requeued if and only if its state was saved; a crash is not requeued, nor is a job that
was cancelled. Partition, account and others: --sbatch partition=gpu, or SBATCH_PARTITION, SBATCH_ACCOUNT, ... in the
environment; what is given here wins over those. Nodes that do not find each other: GLOO_SOCKET_IFNAME and
NCCL_SOCKET_IFNAME in the environment name the network interface to use (jobs/_launch.sh).
--cluster local runs it in the background of this machine, --cluster debug in the foreground; both wait for its end.
A local run goes on after a signal up to five times (submitit's limit); then the same command continues it.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.cli import ConfigError, Parser, positive
from utils.exits import report_uncaught
from utils.flags import dapt_parser, finetune_parser
from utils.signals import EXIT_CODE, MARKER

SCRIPTS = {"run_dapt.py": dapt_parser, "run_finetune.py": finetune_parser}
LOCAL_REQUEUE = 144  # submitit.local.local.LOCAL_REQUEUE_RETURN_CODE
SLURM_ONLY = ("cpus_per_node", "signal_delay", "name", "sbatch")
UNUSED = {"slurm": (), "local": SLURM_ONLY, "debug": ("time", *SLURM_ONLY)}  # flags, by cluster
CPUS_PER_GPU = 16  # as in the job files
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
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",  # torchrun of this Python
        }
        process = subprocess.Popen([*command, *self.words], cwd=self.folder, env=environment, start_new_session=True)

        def forward(number: int, _frame: object) -> None:
            if "SLURM_JOB_ID" not in os.environ:  # Slurm tells every process itself
                process.send_signal(number)

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
    if not found or not 0 < seconds < 2**31:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a time like 90, 24:00:00 or 2-12:00:00")
    return -(-seconds // 60)


def option(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE")
    return name.lstrip("-"), value


def submit_parser() -> Parser:
    """The flags before `--`."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("script", choices=SCRIPTS, help="what to run; its flags follow after --")
    add("--cluster", choices=("slurm", "local", "debug"), default="slurm", help="where it runs (default: %(default)s)")
    add("--nodes", type=positive, default=1, help="machines (default: %(default)s)")
    add("--gpus_per_node", type=positive, help="GPUs of each machine; left out: CPUs only")
    add("--cpus_per_node", type=positive, help=f"CPUs of each machine (default: {CPUS_PER_GPU} for each GPU)")
    add("--nproc_per_node", type=positive, help="processes on each machine (default: --gpus_per_node, or 1)")
    add("--time", type=minutes, help="limit, as sbatch takes it (default: 24:00:00)")
    add("--signal_delay", type=positive, help="seconds before the limit to stop (default: 180)")
    add("--name", help="of the job (default: that of the run's --output_dir)")
    add("--folder", type=Path, help="where submitit keeps the job and its log (default: OUTPUT_DIR/submitit)")
    more = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    add("--sbatch", type=option, **more, help="another option of sbatch; may be given several times")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raises ConfigError where the cluster has no use for a flag."""
    if unused := [f"--{name}" for name in UNUSED[args.cluster] if getattr(args, name)]:
        raise ConfigError(f"--cluster {args.cluster} has no use for {', '.join(unused)}")
    if args.cluster != "slurm" and args.nodes > 1:
        raise ConfigError(f"--cluster {args.cluster} is this machine alone: leave out --nodes")


def drop_variables(args: argparse.Namespace) -> None:
    """Remove from the environment the SBATCH_ variables of what is given: sbatch prefers them to submitit's script."""
    flags = {"TIMELIMIT": args.time, "GPUS_PER_NODE": args.gpus_per_node, "SIGNAL": args.signal_delay}
    names = [name for name, value in (flags | {"JOB_NAME": args.name}).items() if value]
    names += ["OUTPUT", "ERROR", "OPEN_MODE"]  # the log is where this says it is, and is kept
    for name in names + [{"time": "timelimit"}.get(name, name) for name, _ in args.sbatch]:
        os.environ.pop(f"SBATCH_{name.upper().replace('-', '_')}", None)


def main(words: list[str]) -> None:
    """Submit; for a local run, wait for its end too."""
    split = words.index("--") if "--" in words else len(words)
    args, flags = submit_parser().parse_args(words[:split]), words[split + 1 :]
    check_flags(args)
    run_parser = SCRIPTS[args.script]("")
    run_parser.prog = args.script
    output_dir = Path(run_parser.parse_args(flags).output_dir)  # a mistake is answered now, not from the queue

    import submitit

    drop_variables(args)
    run = Launch([str(ROOT / args.script), *flags], args.nproc_per_node or args.gpus_per_node or 1)
    try:
        executor = submitit.AutoExecutor(args.folder or output_dir / "submitit", cluster=args.cluster)
        if args.cluster != "debug":
            executor.update_parameters(
                name=args.name or output_dir.absolute().name,
                nodes=args.nodes,
                tasks_per_node=1,
                gpus_per_node=args.gpus_per_node,
                cpus_per_task=args.cpus_per_node or (args.gpus_per_node and CPUS_PER_GPU * args.gpus_per_node),
                timeout_min=args.time or minutes("24:00:00"),
                stderr_to_stdout=True,
                slurm_use_srun=False,  # the launcher does
                slurm_signal_delay_s=args.signal_delay or 180,
                slurm_additional_parameters={"requeue": True, **dict(args.sbatch)},
            )
        job = executor.submit(run)
    except (RuntimeError, ValueError) as e:  # no Slurm here, an option it refuses
        raise ConfigError(f"--cluster {args.cluster}: {e}") from e
    print(f"job {job.job_id}, its log: {job.paths.stdout}", flush=True)
    try:
        error = job.exception() if args.cluster != "slurm" else None
    except SystemExit:  # preempted, in this process: --cluster debug
        sys.exit(EXIT_CODE)
    if error:
        if isinstance(error, submitit.core.utils.UncompletedJobError) and (output_dir / MARKER).exists():
            error = "interrupted six times; the state is saved, the same command continues"
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    report_uncaught()
    try:
        main(sys.argv[1:])
    except ConfigError as e:
        sys.exit(f"error: {e}")
