"""Each job file in a dry run: the torchrun line it comes to. tests/jobs/test_slurm.py runs them."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from background import USR2_PASSES, finetune
from helpers import ROOT

import run_finetune
from utils.flags import dapt_parser, finetune_parser
from utils.predict_flags import predict_parser

FINETUNE = sorted((ROOT / "jobs" / "finetune").glob("*.sh"))
DAPT = sorted((ROOT / "jobs" / "dapt").glob("*.sh"))
PATHS = {"DATA_PATH": "/data/Do TA", "BDD_PATH": "/data/b dd", "CAP_PATH": "/data/cap", "MODEL_PATH": "w.pth"}
PUBLISHED = {
    "VideoMAE-S_DoTA": "AUC_ROC 83.7, AUC_MCC 46.9",
    "VideoMAE-B_DoTA": "AUC_ROC 86.3, AUC_MCC 54.8",
    "VideoMAE-L_D2K": "AUC_ROC 87.2, AUC_MCC 55.4",
    "MVD-B_DoTA": "AUC_ROC 86.1, AUC_MCC 54.7",
    "IV2-S_DoTA": "first version; no row in simple-tad's MODEL_ZOO.md): AUC_MCC 49.7",
}
MODELS = {
    **{f"VideoMAE-{size[0].upper()}": f"vit_{size}_patch16_224" for size in ("small", "base", "large")},
    "MVD-B": "mvd_vit_base_patch16_224",
    "UMT-B": "umt_vit_base_patch16_224",
    "IV2-S": "internvideo2_small_patch14_224",
}
every_job = pytest.mark.parametrize("job", FINETUNE + DAPT, ids=lambda job: job.stem)
every_finetune_job = pytest.mark.parametrize("job", FINETUNE, ids=lambda job: job.stem)


# Quick ones: torchrun --help imports torch.
TORCHRUN = """#!/bin/bash
if [[ $1 == --help ]]; then echo "$TORCHRUN_HELP"; exit; fi
[[ -n $MARKER ]] && mkdir -p "${MARKER%/*}" && touch "$MARKER"
exit "$TORCHRUN_CODE"
"""
SCONTROL = """#!/bin/bash
[[ $* == "show hostnames gpu[07-09]" ]] && printf '%s\\n' gpu07 gpu08 gpu09
[[ $* == "--oneliner show node gpu07" ]] && echo "NodeName=gpu07 NodeAddr=10.0.0.7 NodeHostName=gpu07 Port=6818"
exit 0
"""


@pytest.fixture
def launch(tmp_path):
    """Run a job file outside Slurm, in a dry run unless told otherwise."""
    for name, content in (("torchrun", TORCHRUN), ("scontrol", SCONTROL), ("nvidia-smi", "#!/bin/sh\nexit 9\n")):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)

    def launch(job, *words, **environment):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DRY_RUN": "1", **environment}
        return subprocess.run(["bash", job, *words], cwd=ROOT, env=environment, capture_output=True, text=True)

    return launch


def run_flags(done):
    words = shlex.split(done.stdout)
    script, parser = ("run_dapt.py", dapt_parser) if "run_dapt.py" in words else ("run_finetune.py", finetune_parser)
    return parser("").parse_args(words[words.index(script) + 1 :])


def test_there_are_jobs():
    assert len(FINETUNE) >= 5 and len(DAPT) == 5


@pytest.mark.parametrize(
    ("name", "model", "batch", "gpus", "nodes", "depth"),
    [
        ("pretrain_bdd", "small", [200], 4, 1, 4),
        ("pretrain_capdata", "small", [240, 160], 2, 1, 4),
        ("pretrain_capdata_base", "base", [120, 80], 4, 1, 4),
        ("pretrain_capdata_large", "large", [60, 40], 4, 2, 12),
        ("pretrain_k700", "small", [200], 4, 1, 4),
    ],
)
def test_dapt_settings_are_the_published_ones(name, model, batch, gpus, nodes, depth, launch):
    job = ROOT / "jobs" / "dapt" / f"{name}.sh"
    args, text = run_flags(launch(job, **PATHS)), job.read_text()
    assert args.model == f"pretrain_videomae_{model}_patch16_224" and args.decoder_depth == depth
    assert f"#SBATCH --gpus-per-node={gpus}\n" in text and f"#SBATCH --nodes={nodes}\n" in text
    assert [total / (gpus * nodes) for total in args.total_batch_size] == batch and sum(args.total_batch_size) == 800
    assert (args.lr, args.min_lr, args.warmup_epochs, args.opt_betas) == (3e-4, 3e-5, 1, [0.9, 0.95])
    kinetics = name == "pretrain_k700"
    assert (args.epochs, args.stop_epoch, args.mask_ratio) == ((38, 22, 0.9) if kinetics else (20, 12, 0.75))
    assert args.transforms_finetune_align == (not kinetics) and args.seed == 0
    assert args.nb_samples_per_epoch == (0 if kinetics else 1_000_000)
    if len(batch) == 2:
        assert args.data_set == ["BDD100K", "CAP-DATA"] and args.data_path == ["/data/b dd", "/data/cap"]
        assert args.sampling_rate == [16, 1]


def test_several_nodes_meet_at_the_first(launch):
    slurm = {"SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_ID": "70007", "SLURM_JOB_NODELIST": "gpu[07-09]"}
    job = ROOT / "jobs" / "dapt" / "pretrain_capdata_large.sh"
    words = shlex.split(launch(job, **PATHS, **slurm, SLURM_GPUS_ON_NODE="4").stdout)
    assert {"--nnodes=3", "--nproc_per_node=4", "--rdzv_id=70007", "--rdzv_backend=c10d"} <= set(words)
    assert "--rdzv_endpoint=10.0.0.7:20007" in words and "--standalone" not in words
    assert "--rdzv_endpoint=10.0.0.7:29500" in shlex.split(launch(job, **PATHS, **slurm, RDZV_PORT="29500").stdout)


@every_finetune_job
def test_settings_are_the_published_ones(job, launch):
    args, dada, half = run_flags(launch(job, **PATHS)), "_D2K" in job.stem, job.stem.endswith("half")
    assert (args.data_path, args.finetune, args.output_dir) == ("/data/Do TA", "w.pth", f"runs/{job.stem}")
    assert args.model == MODELS[job.stem.split("_D")[0]]
    assert args.data_set == ("DADA2K" if dada else "DoTA") + "_half" * half
    assert args.total_batch_size * args.num_sample == 56 and args.num_sample == 1 + half
    assert args.nb_samples_per_epoch == (25000 if half and not dada else 50000)
    assert args.lr == (1e-3 if job.stem in ("VideoMAE-S_DoTA", "IV2-S_DoTA") else 5e-4)
    run_finetune.resolve(args, 1)
    frames = (8, 5, 1) if job.stem.startswith(("IV2", "UMT")) else (16, 10, 2)
    assert (args.num_frames, args.view_fps, args.tubelet_size) == frames
    assert (args.epochs, args.warmup_epochs, args.layer_decay, args.drop_path) == (50, 5, 0.6, 0.2)


@every_finetune_job
def test_windows_are_evaluated_as_published_in_training_and_all_of_them_with_eval(job, launch):
    step = 3 if "_D2K" in job.stem else 1
    for words, expected in (([], step), (["--eval"], 1), (["--eval", "--sampling_rate_val", "5"], 5)):
        args = run_flags(launch(job, *words, **PATHS))
        run_finetune.resolve(args, 1)
        assert args.sampling_rate == 1 and args.sampling_rate_val == expected


@every_job
def test_file_says_what_it_is(job):
    text = job.read_text()
    assert f"#SBATCH --job-name={job.stem}\n" in text and "MODEL_ZOO.md" in text and os.access(job, os.X_OK)
    published = "Published, fine-tuned from it" if job in DAPT else PUBLISHED.get(job.stem, "no published row")
    assert published in text


def test_prediction_takes_videos_and_weights(launch):
    done = launch(ROOT / "jobs" / "predict.sh", "--", "--stride", "3", **PATHS, OUTPUT_DIR="/scratch/a b")
    words = shlex.split(done.stdout)
    args = predict_parser("").parse_args(words[words.index("run_predict.py") + 1 :])
    assert (args.inputs, args.weights, args.output_dir) == (["/data/Do TA"], "w.pth", "/scratch/a b")
    assert args.stride == 3
    assert "DATA_PATH: a video, a folder" in launch(ROOT / "jobs" / "predict.sh").stderr


@every_job
def test_more_flags_and_other_paths_reach_the_run(job, launch):
    args = run_flags(launch(job, "--stop_epoch", "3", **PATHS, OUTPUT_DIR="/scratch/a b"))
    assert args.stop_epoch == 3 and args.output_dir == "/scratch/a b"


@every_job
def test_missing_path_is_named(job, launch):
    done = launch(job, MODEL_PATH="w.pth")
    assert done.returncode != 0 and ("_PATH: the root folder of" in done.stderr or "_PATH: the videos" in done.stderr)


@every_job
@pytest.mark.parametrize("options", [[], ["--signals-to-handle"], ["--signals-to-handle", "--shutdown-timeout"]])
def test_torchrun_gets_the_options_it_has(job, options, launch):
    words = shlex.split(launch(job, **PATHS, TORCHRUN_HELP=" X, ".join(options)).stdout)
    assert words[:2] == ["torchrun", "--nproc_per_node=1"] and words.count("--standalone") == 1
    handled = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
    assert (handled in words) == ("--signals-to-handle" in options)
    assert ("--shutdown-timeout=150" in words) == ("--shutdown-timeout" in options)
    assert "\n#SBATCH --signal=USR2@180\n" in job.read_text() and "\n#SBATCH --requeue\n" in job.read_text()


@every_job
def test_flags_may_follow_two_dashes(job, launch):
    assert run_flags(launch(job, "--", "--stop_epoch", "3", **PATHS)).stop_epoch == 3


@pytest.mark.parametrize(
    ("environment", "processes", "workers"),
    [
        ({"SLURM_CPUS_PER_TASK": "16", "SLURM_GPUS_ON_NODE": "4"}, 4, 3),
        ({"SLURM_CPUS_PER_TASK": "16"}, 1, 15),
        ({"SLURM_CPUS_PER_TASK": "16", "NPROC_PER_NODE": "8"}, 8, 1),
        ({"SLURM_CPUS_ON_NODE": "6", "SLURM_GPUS_ON_NODE": "2"}, 2, 2),
        ({"SLURM_CPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "2"}, 2, 0),
    ],
)
def test_processes_and_workers_follow_the_allocation(environment, processes, workers, launch):
    done = launch(FINETUNE[0], **PATHS, SLURM_JOB_ID="7", **environment)
    assert f"--nproc_per_node={processes} " in done.stdout and run_flags(done).num_workers == workers


def test_processes_outside_slurm(launch):
    assert "--nproc_per_node=2 " in launch(FINETUNE[0], **PATHS, CUDA_VISIBLE_DEVICES="0,3").stdout
    assert "--nproc_per_node=1 " in launch(FINETUNE[0], **PATHS, CUDA_VISIBLE_DEVICES="").stdout


@pytest.mark.parametrize(
    ("value", "processes"),
    [("gpu", 2), ("cpu", 8), ("auto", 2), ("08", 8), ("3", 3), ("", 2)],
)
def test_processes_by_torchrun_s_names(value, processes, launch):
    done = launch(FINETUNE[0], **PATHS, SLURM_CPUS_PER_TASK="8", CUDA_VISIBLE_DEVICES="0,3", NPROC_PER_NODE=value)
    assert f"--nproc_per_node={processes} " in done.stdout


@pytest.mark.parametrize(
    ("devices", "processes"),
    [("0, 3", 2), ("2,-1,3", 1), ("-1", 1), ("NoDevFiles", 1), ("GPU-8932f937-d72c,MIG-GPU-8932/1/0,07", 3)],
)
def test_devices_are_counted_as_cuda_does(devices, processes, launch):
    done = launch(FINETUNE[0], **PATHS, CUDA_VISIBLE_DEVICES=devices)
    assert f"--nproc_per_node={processes} " in done.stdout, done.stderr


CHECKED = ["NPROC_PER_NODE", "OMP_NUM_THREADS", "RDZV_PORT", "CUDA_VISIBLE_DEVICES", "DRY_RUN", "SLURM_JOB_ID"]
CHECKED += ["SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST", "SLURM_GPUS_ON_NODE", "SLURM_CPUS_PER_TASK"]
CHECKED += ["SLURM_CPUS_ON_NODE"]


def test_every_variable_that_is_counted_with_is_checked():
    text = (ROOT / "jobs" / "_launch.sh").read_text()
    read = set(re.findall(r"\b(?:SLURM|CUDA|OMP|RDZV|NPROC|DRY|MASTER)_[A-Z_]*[A-Z]", text)) - {"OMP_THREAD_LIMIT"}
    assert read == set(CHECKED)


CODE = ["a[$(touch $T)0]", "$(touch $T)", "`touch $T`", "1; touch $T", "1\n2", "*"]
OTHERS = [(name, value) for name in CHECKED for value in (*CODE, "-2", "1e9")]
OTHERS = [pair for pair in OTHERS if pair not in (("CUDA_VISIBLE_DEVICES", "-2"), ("SLURM_JOB_NODELIST", "1e9"))]


@pytest.mark.parametrize(("name", "value"), OTHERS)
def test_other_values_are_refused_in_a_line_and_never_evaluated(name, value, launch, tmp_path):
    several = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "gpu[07-09]"}
    slurm = {} if name == "CUDA_VISIBLE_DEVICES" else several
    made = tmp_path / "made"
    done = launch(FINETUNE[0], **PATHS | slurm | {"T": str(made), name: value.replace("$T", str(made))})
    assert done.returncode == 2 and not done.stdout and not made.exists()
    assert done.stderr.startswith(f"error: {name} is ") and ": expected " in done.stderr
    assert done.stderr.count("\n") == 1


WORDS = """#!/bin/bash
[[ $1 == --help ]] || printf '%s\\0' "$@" >"$WORDS"
"""


@pytest.mark.parametrize(
    "path",
    ["-x", "--", "-rf a b *", "/d/$(touch $T)`touch $T`", "'\";touch $T;", "a\nb ", "~/[a-z]?{1,2}", "-n", "!!", "é"],
)
def test_paths_go_through_literally(path, launch, tmp_path):
    (tmp_path / "torchrun").write_text(WORDS)
    made, words = tmp_path / "made", tmp_path / "words"
    path = path.replace("$T", str(made))
    environment = {"DRY_RUN": "", "T": str(made), "WORDS": str(words), "OUTPUT_DIR": path, **dict.fromkeys(PATHS, path)}
    for job in (ROOT / "jobs" / "dapt" / "pretrain_capdata.sh", FINETUNE[0]):
        assert launch(job, **environment).returncode == 0
        got = words.read_text().split("\0")[:-1]
        script = next(word for word in got if word.startswith("run_"))
        args = {"run_dapt.py": dapt_parser, "run_finetune.py": finetune_parser}[script]("").parse_args(
            got[got.index(script) + 1 :]
        )
        expected = f"./{path}" if path.startswith("-") else path
        weights = args.from_ckpt if script == "run_dapt.py" else args.finetune
        paths = args.data_path if script == "run_dapt.py" else [args.data_path]
        assert {args.output_dir, weights, *paths} == {expected} and not made.exists()


@pytest.mark.parametrize("folder", ["-n", "-x y", "a\n"])
def test_the_marker_is_found_in_a_folder_of_any_name(folder, launch, tmp_path):
    """The run's own --output_dir wins over that of the environment; a dash before its name is no flag of rm and ls."""
    marker = f"{tmp_path}/{folder}/REQUEUE"
    job = FINETUNE[0].read_text().replace("cd -- ", f"source() {{ builtin source {ROOT}/jobs/_launch.sh; }}; cd -- ")
    (tmp_path / "job.sh").write_text(job)
    environment = {"DRY_RUN": "", "TORCHRUN_CODE": "1", "MARKER": marker, "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = launch(tmp_path / "job.sh", "--", f"--output_dir={folder}", **PATHS, **environment)
    assert done.returncode == 75, done.stderr


@pytest.mark.parametrize(
    ("torchrun", "marker", "left_over", "code"),
    [(0, False, False, 0), (1, False, False, 1), (1, True, False, 75), (1, False, True, 1), (3, True, True, 75)],
)
def test_the_marker_tells_an_interrupted_run_from_a_failed_one(torchrun, marker, left_over, code, launch, tmp_path):
    folder = tmp_path / "a run"
    if left_over:
        folder.mkdir()
        (folder / "REQUEUE").touch()
    environment = {"DRY_RUN": "", "TORCHRUN_CODE": str(torchrun), "MARKER": f"{folder}/REQUEUE" if marker else ""}
    done = launch(FINETUNE[0], "--", f"--output_dir={folder}", **PATHS, **environment)
    assert done.returncode == code, done.stderr


LISTENER = f"""#!{sys.executable}
import os, signal, sys, time
if sys.argv[1] == "--help":
    sys.exit(print(os.environ["TORCHRUN_HELP"]))
got = []
for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), lambda number, _: got.append(signal.Signals(number).name))
print("ready", flush=True)
for _ in range(500):
    time.sleep(0.01 * (not got))
time.sleep(0.2)  # for another
print(*got, flush=True)
sys.exit(7)
"""


@pytest.mark.parametrize("send", [os.kill, os.killpg])
@pytest.mark.parametrize("option", ["", "--signals-to-handle"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_to_the_launcher_alone_reaches_torchrun_once(name, option, send, launch, tmp_path):
    """As `docker stop` and `kill PID` send it, or a terminal, to a group of processes."""
    (tmp_path / "torchrun").write_text(LISTENER)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCHRUN_HELP": option, **PATHS}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    pipes["preexec_fn"] = partial(signal.signal, getattr(signal, name), signal.SIG_DFL)  # nohup and & ignore some
    words = ["bash", str(FINETUNE[0])]
    with subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, **pipes) as job:
        assert job.stdout.readline() == "ready\n"
        send(job.pid, getattr(signal, name))
        told = name if option or "USR" not in name else "SIGTERM"  # what torchrun without the option passes on
        assert job.stdout.read() == f"{told}\n" and job.wait(5) == 7


@pytest.mark.parametrize(
    ("state", "requeued"),
    [
        ("RUNNING None", True),
        ("COMPLETING TimeLimit", True),
        ("COMPLETING None", False),
        ("", True),  # the controller does not answer
    ],
)
def test_a_cancelled_job_is_not_requeued(state, requeued, launch, tmp_path):
    for name, content in (("squeue", f'echo "{state}"'), ("srun", 'exec "${@:5}"'), ("ls", "echo REQUEUE")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{content}\n")
        (tmp_path / name).chmod(0o755)
    done = launch(FINETUNE[0], **PATHS, DRY_RUN="", SLURM_JOB_ID="7", TORCHRUN_CODE="1", MARKER="")
    assert done.returncode == 75 and ("requeueing job 7" in done.stdout) == requeued, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("handled", sorted({USR2_PASSES, False}))
def test_usr2_to_the_launcher_stops_the_run_whatever_the_torch(handled, data, tmp_path):
    """Without Slurm: while it starts to the launcher's group, then to the launcher alone."""
    real = Path(sys.executable).parent / "torchrun"
    stand_in = tmp_path / "bin" / "torchrun"  # of a torch with --signals-to-handle, or of one before it
    stand_in.parent.mkdir()
    option = "--signals-to-handle" if handled else ""
    stand_in.write_text(f'#!/bin/sh\n[ "$1" = --help ] && echo "{option}" && exit\nexec {real} "$@"\n')
    stand_in.chmod(0o755)
    environment = os.environ | {"PATH": f"{stand_in.parent}:{os.environ['PATH']}", "NPROC_PER_NODE": "2"}
    with (tmp_path / "out").open("w") as out:
        words = ["bash", "-c", 'source jobs/_launch.sh; launch "$@"', "launch", *map(str, finetune(data))]
        words += ["--output_dir", str(tmp_path / "run")]
        job = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)
    said = (tmp_path / "out").read_text
    if handled:
        time.sleep(0.5)
        os.killpg(job.pid, signal.SIGUSR2)  # while torchrun starts: it must not die of it
    deadline = time.monotonic() + 200
    while "epoch 0  step 21/" not in said():
        assert time.monotonic() < deadline and job.poll() is None, said()
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGUSR2)
    assert job.wait(120) == 75, said()
    assert f"stopped on SIG{'USR2' if handled else 'TERM'}: epoch 0, " in said()
    assert (tmp_path / "run" / "REQUEUE").exists()
