"""Print what `make demo` reached; exit with an error where the model did not learn.

python tests/check_demo.py build/demo
"""

import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
auroc = {}
for run in ("untrained", "fine-tuned"):
    metrics = json.loads((folder / run / "metrics.json").read_text())
    auroc[run] = metrics["auroc"]
    print(f"{run:<12} AUC_ROC {100 * metrics['auroc']:.1f}  AUC_MCC {100 * metrics['auc_mcc']:.1f}")
print(f"plots:       {folder}/fine-tuned/plots/")
print(f"TensorBoard: .venv/bin/tensorboard --logdir {folder}/finetune")
if not (auroc["untrained"] < 0.65 and auroc["fine-tuned"] >= 0.90):
    sys.exit("expected AUC_ROC below 65 untrained and at least 90 fine-tuned")
