#!/usr/bin/env bash
# DAPT of VideoMAE ViT-S on BDD100K: 800 clips per step, 200 on each of 4 GPUs.
#
#   DATA_PATH=/data/bdd100k/videos MODEL_PATH=/weights/videomae_vit_s_k400_1600e_pretrain.pth \
#       sbatch jobs/dapt/pretrain_bdd.sh [-- more flags of run_dapt.py]
#
# Submit from the repository's root with the environment of requirements.txt active. Partition and account: on sbatch's
# command line or in SBATCH_PARTITION, SBATCH_ACCOUNT. Submitting again continues from OUTPUT_DIR/checkpoint-last.
# Weights to start from: VideoMAE ViT-S, pre-trained on Kinetics-400 for 1600 epochs (the pre-training file),
#   https://github.com/MCG-NJU/VideoMAE/blob/main/MODEL_ZOO.md (CC BY-NC 4.0)
# Published, fine-tuned from it (arXiv:2507.09338 v1, table 4): AUC_MCC 54.8 on DoTA, 52.0 on DADA-2000.
#SBATCH --job-name=pretrain_bdd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=64
#SBATCH --time=48:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR2@180
set -euo pipefail
cd -- "${SLURM_SUBMIT_DIR:-.}"
source jobs/_launch.sh

DATA_PATH=${DATA_PATH:?the videos folder of BDD100K, with train/, val/ and test/}
MODEL_PATH=${MODEL_PATH:?the checkpoint to start from}
OUTPUT_DIR=${OUTPUT_DIR:-runs/pretrain_bdd}

launch run_dapt.py \
    --model pretrain_videomae_small_patch16_224 --from_ckpt "$MODEL_PATH" --decoder_depth 4 \
    --data_set BDD100K --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" \
    --total_batch_size 800 --sampling_rate 16 --nb_samples_per_epoch 1000000 \
    --lr 3e-4 --min_lr 3e-5 --epochs 20 --stop_epoch 12 --warmup_epochs 1 --mask_ratio 0.75 \
    --transforms_finetune_align --num_workers "$WORKERS" "$@"
