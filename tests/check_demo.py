"""Say what `make demo` reached, how long it took and what to open; exit with an error where nothing was learned.

python tests/check_demo.py build/demo

times.txt in the folder has a line for each part: when it began, in seconds, and what it is.
"""

import json
import sys
import time
from pathlib import Path

folder = Path(sys.argv[1])
begun = [line.split(" ", 1) for line in (folder / "times.txt").read_text().splitlines()]
starts = [*(int(seconds) for seconds, _ in begun), int(time.time())]
print("\nWhat took how long")
for (_, words), start, end in zip(begun, starts, starts[1:], strict=False):
    print(f"  {end - start:4d} s  {words}")
print(f"  {starts[-1] - starts[0]:4d} s  in all")

dapt = json.loads((folder / "dapt" / "log.txt").read_text().splitlines()[-1])
loss, trivial = dapt["train_loss"], dapt["train_trivial_loss"]
print("\nWhat was learned")
print(f"  DAPT: loss {loss:.3f}; {trivial:.3f} is that of predicting mean colours")
print(f"  {'on clips not trained on':<26}{'AUC_ROC':>8}{'AUC_MCC':>9}{'AP':>7}")
auroc = {}
for run, words in (("untrained", "untrained, same model"), ("fine-tuned", "after DAPT and fine-tuning")):
    metrics = json.loads((folder / run / "metrics.json").read_text())
    auroc[run] = metrics["auroc"]
    print(f"  {words:<26}{100 * auroc[run]:8.1f}{100 * metrics['auc_mcc']:9.1f}{100 * metrics['ap']:7.1f}")
(evaluation,) = json.loads((folder / "fine-tuned" / "report.json").read_text())["models"]
print(f"  {evaluation['baselines']['verdict']}")

predicted = folder / "predicted"
videos = sorted(path.parent for path in predicted.rglob("overlay.mp4"))
to_open = [
    (folder / "fine-tuned" / "report.html", "the evaluation: intervals, baselines, best and worst clips"),
    (predicted / "report.html", "all scored videos, the riskiest first"),
    *((video / "overlay.mp4", "a video with its risk") for video in videos),
    *((video / "curve.png", "its risk over time") for video in videos),
    (folder / "fine-tuned" / "plots", "ROC, precision and recall, MCC, confusion"),
    (folder / "dapt" / "pictures", "what DAPT reconstructs after each epoch"),
]
print("\nWhat to open")
for path, words in to_open:
    if path.exists():
        print(f"  {str(path):<64} {words}")
print(f"  {f'.venv/bin/tensorboard --logdir {folder}':<64} losses and rates of the runs")

if not (loss < 0.95 * trivial and auroc["untrained"] < 0.65 and auroc["fine-tuned"] >= 0.90):
    sys.exit("expected a DAPT loss 5 % below the trivial one, AUC_ROC below 65 untrained and at least 90 fine-tuned")
if len(videos) != 2 or not all((where / "report.html").exists() for where in (predicted, folder / "fine-tuned")):
    sys.exit("expected curves and overlays of two videos, and a report of them and of the evaluation")
