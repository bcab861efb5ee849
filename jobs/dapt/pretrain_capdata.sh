#!/usr/bin/env bash
# DAPT of VideoMAE ViT-S on BDD100K and CAP-DATA: 240 + 160 clips per step on each of 2 GPUs.
#
#   BDD_PATH=/data/bdd100k/videos CAP_PATH=/data/CAP-DATA MODEL_PATH=/weights/videomae_vit_s_k400_1600e_pretrain.pth \
#       sbatch jobs/dapt/pretrain_capdata.sh [-- more flags of run_dapt.py]
#
# Submit from the repository's root with the environment of requirements.txt active. Partition and account: on sbatch's
# command line or in SBATCH_PARTITION, SBATCH_ACCOUNT. Submitting again continues from OUTPUT_DIR/checkpoint-last.
# Weights to start from: VideoMAE ViT-S, pre-trained on Kinetics-400 for 1600 epochs (the pre-training file),
#   https://github.com/MCG-NJU/VideoMAE/blob/main/MODEL_ZOO.md (CC BY-NC 4.0)
# Published, fine-tuned from it on DoTA (simple-tad's MODEL_ZOO.md): AUC_ROC 86.4, AUC_MCC 54.0.
#SBATCH --job-name=pretrain_capdata
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=32
#SBATCH --time=72:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR2@180
set -euo pipefail
cd -- "${SLURM_SUBMIT_DIR:-.}"
source jobs/_launch.sh

BDD_PATH=${BDD_PATH:?the videos folder of BDD100K, with train/, val/ and test/}
CAP_PATH=${CAP_PATH:?the root folder of CAP-DATA, with annotation/ and frames/}
MODEL_PATH=${MODEL_PATH:?the checkpoint to start from}
OUTPUT_DIR=${OUTPUT_DIR:-runs/pretrain_capdata}

launch run_dapt.py \
    --model pretrain_videomae_small_patch16_224 --from_ckpt "$MODEL_PATH" --decoder_depth 4 \
    --data_set BDD100K CAP-DATA --data_path "$BDD_PATH" "$CAP_PATH" --output_dir "$OUTPUT_DIR" \
    --total_batch_size 480 320 --sampling_rate 16 1 --nb_samples_per_epoch 1000000 \
    --lr 3e-4 --min_lr 3e-5 --epochs 20 --stop_epoch 12 --warmup_epochs 1 --mask_ratio 0.75 \
    --transforms_finetune_align --num_workers "$WORKERS" "$@"
