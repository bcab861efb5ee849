"""Print what `make demo` reached; exit with an error where nothing was learned.

python tests/check_demo.py build/demo
"""

import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
dapt = json.loads((folder / "dapt" / "log.txt").read_text().splitlines()[-1])
loss, trivial = dapt["train_loss"], dapt["train_trivial_loss"]
print(f"DAPT         loss {loss:.3f}, {trivial:.3f} without learning; see {folder}/dapt/pictures/")
auroc = {}
for run in ("untrained", "fine-tuned"):
    metrics = json.loads((folder / run / "metrics.json").read_text())
    auroc[run] = metrics["auroc"]
    print(f"{run:<12} AUC_ROC {100 * metrics['auroc']:.1f}  AUC_MCC {100 * metrics['auc_mcc']:.1f}")
report = json.loads((folder / "fine-tuned" / "report.json").read_text())["models"][0]
print(f"evaluation:  {folder}/fine-tuned/report.html, plots/  {report['baselines']['verdict']}")
predicted = folder / "predicted"
videos = sorted(path.parent for path in predicted.rglob("overlay.mp4"))
for video in videos:
    known = json.loads((video / "events.json").read_text())
    print(f"predicted:   {video}/overlay.mp4, curve.png  {len(known['events'])} events")
print(f"report:      {predicted}/report.html  the videos, the riskiest first")
print(f"TensorBoard: .venv/bin/tensorboard --logdir {folder}")
if not (loss < 0.95 * trivial and auroc["untrained"] < 0.65 and auroc["fine-tuned"] >= 0.90):
    sys.exit("expected a DAPT loss 5 % below the trivial one, AUC_ROC below 65 untrained and at least 90 fine-tuned")
if len(videos) != 2 or not all((where / "report.html").exists() for where in (predicted, folder / "fine-tuned")):
    sys.exit("expected curves and overlays of two videos, and a report of them and of the evaluation")
