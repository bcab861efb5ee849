# The launcher of every job file and of jobs/submit.py: torchrun on each node, and a requeue of a preempted job.
#
#   source jobs/_launch.sh
#   launch run_finetune.py FLAGS...        a bare -- among the flags is dropped
#
# In a Slurm job it takes all nodes of the job, elsewhere this machine. It exits with 0 if the run finished; with 75 if
# it stopped on a signal with its state saved (OUTPUT_DIR/REQUEUE, see utils/signals.py), having requeued the job
# unless that was cancelled; with another code if it failed: a job that crashes fails once.
#
# From the environment, each checked before it is used:
#   NPROC_PER_NODE    processes on each node: a number, or gpu, cpu, auto as torchrun has them; default: the GPUs of the
#                     job there, 1 where there are none
#   OMP_NUM_THREADS   threads of each process; default: 1 beside a GPU, else its share of the CPUs
#   RDZV_PORT         port of the first node on which several nodes meet; default: by the job's number
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME
#                     network interfaces (ip addr names them) by which the processes of several nodes talk; default: for
#                     gloo that towards the first node, for NCCL its own choice, InfiniBand first
#   DRY_RUN=1         print the command instead
# For the job files: WORKERS, the loading processes for which a training process has CPUs. Paths in DATA_PATH, BDD_PATH,
# CAP_PATH, MODEL_PATH and OUTPUT_DIR are taken literally.

trap : USR1 USR2 # they are for the run

_refuse() { # end with a line on the variable $1, of which $2 was expected
    local value=${!1-}
    printf 'error: %s is %q: expected %s\n' "$1" "${value:0:80}" "$2" >&2
    exit 2
}

# Arithmetic evaluates whatever a variable holds, array subscripts with commands in them too: only digits may get there.
_whole() { # make the variable $1, if it has a value, a number from $2 to $3 without zeros before it; $4: or what else
    local LC_ALL=C value=${!1-}
    [[ -n $value ]] || return 0
    [[ $value =~ ^[0-9]{1,15}$ ]] && ((10#$value >= $2 && 10#$value <= $3)) ||
        _refuse "$1" "a whole number from $2 to $3${4-}"
    printf -v "$1" %d "$((10#$value))"
}

_visible_gpus() { # count CUDA_VISIBLE_DEVICES up to the first entry that is no device, as CUDA does
    local LC_ALL=C entries=${CUDA_VISIBLE_DEVICES// /} entry='(-?[0-9]{1,9}|(GPU|MIG)-[A-Za-z0-9/-]+)'
    _gpus=0
    [[ -n $entries && $entries != NoDevFiles ]] || return 0
    [[ $entries =~ ^$entry(,$entry)*,?$ ]] || _refuse CUDA_VISIBLE_DEVICES "a list like 0,1 or GPU-<uuid>, or nothing"
    for entry in ${entries//,/ }; do # digits, letters, dashes and slashes alone
        [[ $entry != -* ]] || break
        _gpus=$((_gpus + 1))
    done
}

_whole SLURM_JOB_ID 1 4294967295
_whole SLURM_JOB_NUM_NODES 1 65536
_whole SLURM_GPUS_ON_NODE 0 1024
_whole SLURM_CPUS_PER_TASK 1 65536
_whole SLURM_CPUS_ON_NODE 1 65536
_whole OMP_NUM_THREADS 1 65536
_whole RDZV_PORT 1 65535
[[ ${DRY_RUN:-1} == 1 ]] || _refuse DRY_RUN "1 or nothing"
for _name in DATA_PATH BDD_PATH CAP_PATH MODEL_PATH OUTPUT_DIR; do
    [[ ${!_name-} != -* ]] || printf -v "$_name" ./%s "${!_name}" # else it is taken for a flag
done

if [[ -n ${SLURM_JOB_ID-} ]]; then
    _gpus=${SLURM_GPUS_ON_NODE:-0} _nodes=${SLURM_JOB_NUM_NODES:-1}
else
    _gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true) _nodes=1
    [[ -z ${CUDA_VISIBLE_DEVICES+set} ]] || _visible_gpus
fi
_cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)}}
case ${NPROC_PER_NODE-} in
    gpu)
        ((_gpus > 0)) || _refuse NPROC_PER_NODE "a number or cpu, since there is no GPU here"
        NPROC_PER_NODE=$_gpus
        ;;
    cpu) NPROC_PER_NODE=$_cpus ;;
    auto) NPROC_PER_NODE=$((_gpus > 0 ? _gpus : _cpus)) ;;
    *) _whole NPROC_PER_NODE 1 1024 ", or gpu, cpu, auto" ;;
esac
export NPROC_PER_NODE=${NPROC_PER_NODE:-$((_gpus > 0 ? _gpus : 1))}
_share=$((_cpus > NPROC_PER_NODE ? _cpus / NPROC_PER_NODE : 1))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((_gpus > 0 ? 1 : _share))}
WORKERS=$((_share - 1)) # beside the training process

# Run torchrun so that USR1 and USR2, which Slurm sends to it too, cannot kill it: neither while it starts, before it
# handles them, nor where this torch cannot handle them. There it gets TERM instead, which every torch passes on.
_torchrun='
trap "" USR1 USR2
[[ $* == *--signals-to-handle=* ]] && exec "$@"
"$@" & pid=$!
trap "kill -TERM $pid" TERM USR1 USR2
for name in INT HUP QUIT; do trap "kill -$name $pid" $name; done
while wait $pid; code=$?; kill -0 $pid 2>/dev/null; do :; done
exit $code'

_command() { # sets `command` to the words that run $@ on every node
    local help first address
    help=$(torchrun --help) || return
    command=(torchrun --nproc_per_node="$NPROC_PER_NODE")
    if [[ $help == *--signals-to-handle* ]]; then
        command+=(--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2)
    fi
    if [[ $help == *--shutdown-timeout* ]]; then
        command+=(--shutdown-timeout=150)
    fi
    if ((_nodes == 1)); then
        command+=(--standalone)
    else
        [[ ${SLURM_JOB_NODELIST-} =~ ^[A-Za-z0-9][A-Za-z0-9._,-]*(\[[0-9,-]+\][A-Za-z0-9._,-]*)*$ ]] ||
            _refuse SLURM_JOB_NODELIST "nodes like gpu[07-09]"
        first=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || return
        address=$(scontrol --oneliner show node "${first%%$'\n'*}" | grep -o 'NodeAddr=[^ ]*') || return
        command+=(--nnodes="$_nodes" --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID")
        command+=(--rdzv_endpoint="${address#*=}:${RDZV_PORT:-$((20000 + SLURM_JOB_ID % 10000))}")
    fi
    command+=("$@")
}

_output_dir() { # sets `folder` to the last --output_dir among $@
    local word before=
    folder=.
    for word; do
        [[ $before != --output_dir ]] || folder=$word
        [[ $word != --output_dir=* ]] || folder=${word#*=}
        before=$word
    done
}

_here() { # run $@ and pass the signals to this shell on, which may be all that is told
    local name
    for name in TERM INT HUP QUIT USR1 USR2; do
        trap "kill -$name \$! 2>/dev/null || :" $name
    done
    set -m # a process group of its own, so that a signal to that of this shell does not come twice
    "$@" &
    set +m
    while wait $!; kill -0 $! 2>/dev/null; do :; done
    wait $!
}

_run() { # torchrun with $@ on every node; 75 if it was preempted
    local folder code=0
    _output_dir "$@"
    rm -f -- "$folder/REQUEUE" # of an earlier run, should this one fail before it does that itself
    command=(bash -c "$_torchrun" torchrun "${command[@]}")
    if [[ -n ${SLURM_JOB_ID-} ]]; then
        export SRUN_CPUS_PER_TASK=$_cpus # srun does not take it from sbatch
        trap : TERM # Slurm tells every process; this shell must see the end of the run
        srun --nodes="$_nodes" --ntasks="$_nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 "${command[@]}" || code=$?
    else
        _here "${command[@]}" || code=$?
    fi
    # Looked up in the listing: a network file system may remember for a while that there was no such file.
    [[ $'\n'$(ls -- "$folder" 2>/dev/null)$'\n' == *$'\nREQUEUE\n'* ]] && return 75
    return "$code"
}

_cancelled() { # whether Slurm is ending this job, but not for its time limit
    local state
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format='%T %r')
    [[ $state == COMPLETING* && $state != *TimeLimit ]]
}

launch() {
    local word words=() command code=0
    for word; do [[ $word == -- ]] || words+=("$word"); done
    _command "${words[@]}" || exit
    if [[ -n ${DRY_RUN-} ]]; then
        printf '%q ' "${command[@]}"
        echo
        exit
    fi
    _run "${words[@]}" || code=$?
    if ((code == 75)) && [[ -n ${SLURM_JOB_ID-} ]] && ! _cancelled; then
        echo "preempted with its state saved: requeueing job $SLURM_JOB_ID"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
