"""How far the scores of evaluations are apart, row by row; a line of JSON for each against the first.

    python -m datasets.tools.pack DoTA /data/DoTA /data/DoTA_320 --short_side 320 --split val
    python run_finetune.py --eval --data_path /data/DoTA     --output_dir runs/eval     ...
    python run_finetune.py --eval --data_path /data/DoTA_320 --output_dir runs/eval_320 ...
    python -m benchmarks.compare_predictions runs/eval/predictions.csv runs/eval_320/predictions.csv

Both must hold the same windows with the same labels, as an original and its pack do. Differences are of scores, which
lie between 0 and 1, and of AUC_ROC in percentage points.
"""

import argparse
import csv
import json
import sys

import numpy as np

from engine.metrics import frame_metrics

KEYS = ("clip", "filename", "frame", "label", "ttc")


def read(path: str) -> tuple[list[tuple[str, ...]], np.ndarray, np.ndarray]:
    """Return (KEYS of each row, scores (n,), labels (n,)) of a predictions.csv."""
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    keys = [tuple(row[k] for k in KEYS) for row in rows]
    return keys, np.array([float(row["score"]) for row in rows]), np.array([int(row["label"]) for row in rows])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="predictions.csv to compare with")
    parser.add_argument("others", nargs="+", help="one or more others")
    args = parser.parse_args()
    keys, scores, labels = read(args.first)
    auroc = frame_metrics(scores, labels)["auroc"]
    for path in args.others:
        other_keys, other, _ = read(path)
        if other_keys != keys:
            sys.exit(f"error: {path}: other windows or labels than {args.first}; evaluate the same split at one step")
        difference, other_auroc = np.abs(other - scores), frame_metrics(other, labels)["auroc"]
        result = {
            "predictions": path,
            "windows": len(scores),
            "auroc": [round(100 * value, 3) for value in (auroc, other_auroc)],
            "auroc_difference": round(100 * (other_auroc - auroc), 3),
            "mean_abs_score_difference": round(float(difference.mean()), 5),
            "max_abs_score_difference": round(float(difference.max()), 5),
            "std_of_scores": round(float(scores.std()), 5),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
