#!/usr/bin/env bash
# VideoMAE ViT-S fine-tuned on half of DoTA's training clips.
#
#   DATA_PATH=/data/DoTA MODEL_PATH=/weights/videomae_vit_s_k400_1600e_pretrain.pth \
#       sbatch jobs/finetune/VideoMAE-S_DoTA-half.sh [-- more flags of run_finetune.py]
#
# Submit from the repository's root with the environment of requirements.txt active. Partition and account: on sbatch's
# command line or in SBATCH_PARTITION, SBATCH_ACCOUNT. Submitting again continues from OUTPUT_DIR/checkpoint-last.
# Weights: VideoMAE ViT-S, pre-trained on Kinetics-400 for 1600 epochs (the pre-training file),
#   https://github.com/MCG-NJU/VideoMAE/blob/main/MODEL_ZOO.md (CC BY-NC 4.0)
# Settings of simple-tad's job file, no published row. Two views of each window: a batch of 28 is 56 clips.
#SBATCH --job-name=VideoMAE-S_DoTA-half
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

DATA_PATH=${DATA_PATH:?the root folder of DoTA, with dataset/ and frames/}
MODEL_PATH=${MODEL_PATH:?the checkpoint to start from}
OUTPUT_DIR=${OUTPUT_DIR:-runs/VideoMAE-S_DoTA-half}

launch run_finetune.py \
    --model vit_small_patch16_224 --finetune "$MODEL_PATH" \
    --data_set DoTA_half --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" \
    --total_batch_size 28 --num_sample 2 --lr 5e-4 --epochs 50 --warmup_epochs 5 --layer_decay 0.6 --drop_path 0.2 \
    --nb_samples_per_epoch 25000 --sampling_rate 1 --sampling_rate_val 1 --seed 42 \
    --num_workers "$WORKERS" "$@"
