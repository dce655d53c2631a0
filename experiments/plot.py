"""Pictures and a table of finished runs: python experiments/plot.py out/s0 [out/s1 ...]

Prints the thinking table, mean and range over the runs, and draws assets/thinking.png, loss.png,
and what else there is: schedules.png where every run has been through schedules.py, whose table is
printed, too, and with --chains a run of chains.py as chains.png. Needs matplotlib, for this script
only; --table prints and does without.
"""
import argparse
import json
from pathlib import Path

import numpy as np

from schedules import print_schedules
from shared import ROOT, print_table, spread

from model import blame
from sample import run_program

STYLES = {"MetaState": "C0o-", "frozen": "k--", "memory reset": "C1s:", "memory shuffled": "C3^-"}
SMOOTHED = 20                          # iterations


def shares(tables: list[dict], name: str) -> np.ndarray:
    """Of whole answers right, (passes, runs)."""
    return np.array([[np.mean(table[name][n]) for table in tables] for n in tables[0][name]])


def draw_thinking(axis, tables: list[dict]) -> None:
    """Passes over an unwritten answer: one line climbs, the others cannot."""
    for name, style in STYLES.items():
        y = 100 * shares(tables, name)                                 # (passes, runs)
        bars = np.maximum(0, [y.mean(1) - y.min(1), y.max(1) - y.mean(1)])
        axis.errorbar(range(len(y)), y.mean(1), bars, fmt=style, capsize=3, label=name)
    axis.set_xticks(range(len(y)), tables[0]["frozen"])
    axis.set_xlabel("passes over an answer of nothing but masks")
    axis.set_ylabel("whole answers right (%)")
    axis.legend()


def draw_schedules(axis, tables: list[dict]) -> None:
    """Every schedule of every run."""
    markers = {"quota": "o", "think": "*", "blocks": "s", "threshold": "^"}
    for name, color in (("frozen", "k"), ("MetaState", "C0")):
        for kind, marker in markers.items():
            found = [results for table in tables for label, results in table[name].items()
                     if label.startswith(kind)]
            passes = [np.mean(results["passes"]) for results in found]
            right = [100 * np.mean(results["correct"]) for results in found]
            axis.plot(passes, right, marker, color=color, alpha=0.5, label=f"{name}, {kind}")
    ticks = [1, 2, 3, 4, 5, 7, 10, 20]
    axis.set_xscale("log")
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()
    axis.set_xlabel("passes")
    axis.set_ylabel("final results right (%)")
    axis.legend(fontsize=8)


def draw_losses(axis, logs: list[Path]) -> None:
    """One curve for each unrolled step, mean over the runs."""
    runs = []
    for log in logs:
        y = np.array([json.loads(line)["by_step"] for line in log.read_text().splitlines()])
        pieces = np.array_split(y, max(1, len(y) // SMOOTHED))         # of (iterations, K)
        runs.append([piece.mean(0) for piece in pieces])
    y = np.mean(runs, 0)                                               # (points, K)
    for k in range(y.shape[1]):
        axis.plot(SMOOTHED * np.arange(len(y)), y[:, k], label=f"k = {k + 1}")
    axis.set_xlabel("iteration")
    axis.set_ylabel("dense loss of unrolled step k")
    axis.legend()


def draw_chains(axis, by_presses: dict[str, list[float]]) -> None:
    """One curve for each number of presses: it climbs after as many passes."""
    for presses, right in by_presses.items():
        axis.plot(range(1, len(right) + 1), 100 * np.array(right), "o-", ms=3, label=presses)
    axis.set_xlabel("passes over an answer of nothing but masks")
    axis.set_ylabel("whole answers right (%)")
    axis.legend(title="presses", fontsize=8, title_fontsize=8, loc="lower right")


def draw(path: Path, draw_one, by_title: dict[str, object]) -> None:
    """A picture with an axis for every title."""
    with blame("the drawing", "pip install matplotlib, or give --table"):
        import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(by_title), figsize=(7 + len(by_title), 3.6), sharey=True,
                                squeeze=False)
    for axis, (title, data) in zip(axes[0], by_title.items()):
        draw_one(axis, data)
        axis.set_title(title, size=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--chains", type=Path, metavar="FOLDER", help="a run of chains.py")
    parser.add_argument("--table", action="store_true", help="print only")
    parser.add_argument("--assets", type=Path, default=ROOT / "assets", help="of the pictures")
    args = parser.parse_args()
    tables = [json.loads((run / "table.json").read_text()) for run in args.runs]
    cells = {name: [spread(by_run) for by_run in shares(tables, name)] for name in STYLES}
    print_table(f"Whole answers right (%) if written at once after N passes over masks, "
                f"{len(tables)} runs, N =", list(tables[0]["frozen"]), cells)
    paths = [run / "schedules.json" for run in args.runs]
    schedules = [json.loads(path.read_text()) for path in paths if path.exists()]
    if schedules:
        print_schedules(schedules)
    if args.table:
        return
    draw(args.assets / "thinking.png", draw_thinking, {"": tables})
    logs = [run / "memory.log.jsonl" for run in args.runs]
    draw(args.assets / "loss.png", draw_losses, {"": logs})
    if schedules:
        draw(args.assets / "schedules.png", draw_schedules, {"": schedules})
    if args.chains:
        chains = json.loads((args.chains / "chains.json").read_text())
        del chains["frozen"]
        draw(args.assets / "chains.png", draw_chains, chains)


if __name__ == "__main__":
    run_program(main, if_interrupted="nothing is kept")
