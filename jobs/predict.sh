#!/usr/bin/env bash
# The risk of many videos, shared over the GPUs of one or more nodes.
#
#   DATA_PATH=/data/trips MODEL_PATH=runs/VideoMAE-S_DoTA/checkpoint-best_auroc.pth \
#       sbatch [--nodes=2 --gpus-per-node=4] jobs/predict.sh [-- more flags of run_predict.py]
#
# DATA_PATH is a video, a folder that is searched for videos, or a list of them. Submit from the repository's root with
# the environment of requirements.txt active. Partition and account: on sbatch's command line or in SBATCH_PARTITION,
# SBATCH_ACCOUNT. Submitting again goes on with the videos that are not scored yet, on any number of GPUs.
#SBATCH --job-name=predict
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=48:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR2@180
set -euo pipefail
cd -- "${SLURM_SUBMIT_DIR:-.}"
source jobs/_launch.sh

DATA_PATH=${DATA_PATH:?a video, a folder of videos or a list of them}
MODEL_PATH=${MODEL_PATH:?the weights file of a fine-tuned model}
OUTPUT_DIR=${OUTPUT_DIR:-runs/predict}

launch run_predict.py "$DATA_PATH" \
    --weights "$MODEL_PATH" --output_dir "$OUTPUT_DIR" --num_workers "$WORKERS" "$@"
