#!/usr/bin/env bash
# InternVideo2-S, distilled, fine-tuned on DoTA: 8 frames at 5 fps.
#
#   DATA_PATH=/data/DoTA MODEL_PATH=/weights/S14_dist_1B_stage2.bin \
#       sbatch jobs/finetune/IV2-S_DoTA.sh [-- more flags of run_finetune.py]
#
# Submit from the repository's root with the environment of requirements.txt active. Partition and account: on sbatch's
# command line or in SBATCH_PARTITION, SBATCH_ACCOUNT. Submitting again continues from OUTPUT_DIR/checkpoint-last.
# Weights: InternVideo2-S/14, distilled from the 1B model (Apache-2.0),
#   https://huggingface.co/OpenGVLab/InternVideo2_distillation_models, stage1/S14/S14_dist_1B_stage2/pytorch_model.bin
# Published (arXiv:2507.09338, first version; no row in simple-tad's MODEL_ZOO.md): AUC_MCC 49.7.
#SBATCH --job-name=IV2-S_DoTA
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
OUTPUT_DIR=${OUTPUT_DIR:-runs/IV2-S_DoTA}

launch run_finetune.py \
    --model internvideo2_small_patch14_224 --finetune "$MODEL_PATH" \
    --data_set DoTA --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" \
    --total_batch_size 56 --lr 1e-3 --epochs 50 --warmup_epochs 5 --layer_decay 0.6 --drop_path 0.2 \
    --nb_samples_per_epoch 50000 --sampling_rate 1 --sampling_rate_val 1 --seed 42 \
    --num_workers "$WORKERS" "$@"
