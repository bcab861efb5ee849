#!/usr/bin/env bash
# UMT ViT-B fine-tuned on DADA-2000: 8 frames at 5 fps.
#
#   DATA_PATH=/data/DADA2000 MODEL_PATH=/weights/b16_ptk710_f8_res224.pth \
#       sbatch jobs/finetune/UMT-B_D2K.sh [-- more flags of run_finetune.py]
#
# Submit from the repository's root with the environment of requirements.txt active. Partition and account: on sbatch's
# command line or in SBATCH_PARTITION, SBATCH_ACCOUNT. Submitting again continues from OUTPUT_DIR/checkpoint-last.
# Weights: UMT ViT-B/16, pre-trained on Kinetics-710 (b16_ptk710_f8_res224.pth, MIT),
#   https://github.com/OpenGVLab/unmasked_teacher/blob/main/single_modality/MODEL_ZOO.md
# There is no published row (simple-tad's MODEL_ZOO.md has none).
# While it trains, every third frame is evaluated, as published; with --eval every frame is, as its numbers want it.
#SBATCH --job-name=UMT-B_D2K
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

DATA_PATH=${DATA_PATH:?the root folder of DADA-2000, with annotation/, DADA2K_my_split/ and frames/}
MODEL_PATH=${MODEL_PATH:?the checkpoint to start from}
OUTPUT_DIR=${OUTPUT_DIR:-runs/UMT-B_D2K}

launch run_finetune.py \
    --model umt_vit_base_patch16_224 --finetune "$MODEL_PATH" \
    --data_set DADA2K --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" \
    --total_batch_size 56 --lr 5e-4 --epochs 50 --warmup_epochs 5 --layer_decay 0.6 --drop_path 0.2 \
    --nb_samples_per_epoch 50000 --sampling_rate 1 --seed 42 \
    --num_workers "$WORKERS" "$@"
