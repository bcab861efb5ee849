#!/usr/bin/env bash
# MVD ViT-B fine-tuned on DoTA.
#
#   DATA_PATH=/data/DoTA MODEL_PATH=/weights/mvd_b_from_b.pth \
#       sbatch jobs/finetune/MVD-B_DoTA.sh [-- more flags of run_finetune.py]
#
# Submit from the repository's root with the environment of requirements.txt active. Partition and account: on sbatch's
# command line or in SBATCH_PARTITION, SBATCH_ACCOUNT. Submitting again continues from OUTPUT_DIR/checkpoint-last.
# Weights: MVD ViT-B with ViT-B teachers, pre-trained on Kinetics-400 (the pre-training file),
#   https://github.com/ruiwang2021/mvd (CC BY-NC 4.0)
# Published (simple-tad's MODEL_ZOO.md, best epochs on val): AUC_ROC 86.1, AUC_MCC 54.7.
#SBATCH --job-name=MVD-B_DoTA
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
OUTPUT_DIR=${OUTPUT_DIR:-runs/MVD-B_DoTA}

launch run_finetune.py \
    --model mvd_vit_base_patch16_224 --finetune "$MODEL_PATH" \
    --data_set DoTA --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" \
    --total_batch_size 56 --lr 5e-4 --epochs 50 --warmup_epochs 5 --layer_decay 0.6 --drop_path 0.2 \
    --nb_samples_per_epoch 50000 --sampling_rate 1 --sampling_rate_val 1 --seed 42 \
    --num_workers "$WORKERS" "$@"
