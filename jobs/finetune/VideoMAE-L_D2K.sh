#!/usr/bin/env bash
# VideoMAE ViT-L fine-tuned on DADA-2000.
#
#   DATA_PATH=/data/DADA2000 MODEL_PATH=/weights/videomae_vit_l_k400_1600e_pretrain.pth \
#       sbatch jobs/finetune/VideoMAE-L_D2K.sh [-- more flags of run_finetune.py]
#
# Submit from the repository's root with the environment of requirements.txt active. Partition and account: on sbatch's
# command line or in SBATCH_PARTITION, SBATCH_ACCOUNT. Submitting again continues from OUTPUT_DIR/checkpoint-last.
# Weights: VideoMAE ViT-L, pre-trained on Kinetics-400 for 1600 epochs (the pre-training file),
#   https://github.com/MCG-NJU/VideoMAE/blob/main/MODEL_ZOO.md (CC BY-NC 4.0)
# Published (simple-tad's MODEL_ZOO.md, best epochs on val): AUC_ROC 87.2, AUC_MCC 55.4.
# While it trains, every third frame is evaluated, as published; with --eval every frame is, as its numbers want it.
#SBATCH --job-name=VideoMAE-L_D2K
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
OUTPUT_DIR=${OUTPUT_DIR:-runs/VideoMAE-L_D2K}

launch run_finetune.py \
    --model vit_large_patch16_224 --finetune "$MODEL_PATH" \
    --data_set DADA2K --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" \
    --total_batch_size 56 --lr 5e-4 --epochs 50 --warmup_epochs 5 --layer_decay 0.6 --drop_path 0.2 \
    --nb_samples_per_epoch 50000 --sampling_rate 1 --seed 42 \
    --num_workers "$WORKERS" "$@"
