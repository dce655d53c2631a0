"""Plots of finished runs: python experiments/plot.py out/seed0 [out/seed1 ...]

Draws into assets/ what the runs hold: passes.svg where ablate.py measured the variants default and
no-thinking, schedules.svg where schedules.py has been, and with --chains FOLDER, of chains.py,
chains.svg. A thin line is a seed, a thick one their mean. Needs matplotlib.
"""
import argparse
import json
from pathlib import Path
from typing import Callable, Sequence

import numpy as np

from ablate import PASSES
from shared import ROOT

from model import blame
from sample import run_program


def draw_seeds(axis, x: Sequence[float], by_seed: Sequence[Sequence[float]], name: str, color: str,
               at: int = -1, offset: tuple[int, int] = (6, 0)) -> None:
    """Shares by seed as thin lines, their mean as a thick one, with its name at one of its points.
    """
    y = 100 * np.array(by_seed)                                        # (seeds, points)
    axis.plot(x, y.T, color=color, linewidth=0.8, alpha=0.5)
    axis.plot(x, y.mean(0), "o-", color=color, markersize=4)
    axis.annotate(name, (x[at], y.mean(0)[at]), offset, textcoords="offset points", color=color,
                  va="center", weight="bold")


def label_axes(axis, title: str, x: str, y: str, ticks: Sequence[int]) -> None:
    axis.set(title=title, xlabel=x, ylabel=y, ylim=(-3, 106), xscale="log")
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()


def draw_passes(axis, runs: list[list[dict]]) -> None:
    """Passes over an unwritten answer, trained with first passes and without."""
    for name, shown, color, at in (("default", "MetaState", "C0", -1),
                                   ("no-thinking", "trained without first passes", "C2", 2),
                                   ("memoryless", "no memory", "C1", -1)):
        found = [row for rows in runs for row in rows if row["name"] == name]
        if found:
            draw_seeds(axis, PASSES, [[row[f"N = {n}"] for n in PASSES] for row in found], shown,
                       color, at, offset=(8, 4))
    label_axes(axis, "What was worked out stays, if training has held it",
               "passes over an answer of nothing but masks", "whole answers right (%)", PASSES)


def draw_schedules(axis, runs: list[dict]) -> None:
    """Quotas, and the best schedule of the frozen backbone."""
    for name, color in (("MetaState", "C0"), ("frozen", "C1")):
        labels = [label for label in runs[0][name] if label.startswith("quota")]
        passes = [np.mean(runs[0][name][label]["passes"]) for label in labels]
        right = [[np.mean(run[name][label]["correct"]) for label in labels] for run in runs]
        draw_seeds(axis, passes, right, f"{name}, fixed quota", color, at=2,
                   offset=(8, -14 if name == "MetaState" else 16))
    blocks = [found for run in runs for label, found in run["frozen"].items() if "blocks" in label]
    x = np.mean([np.mean(found["passes"]) for found in blocks])
    y = 100 * np.mean([np.mean(found["correct"]) for found in blocks])
    axis.plot([x], [y], "s", color="C2")
    axis.annotate("frozen, in blocks", (x, y), (6, -30), textcoords="offset points", color="C2",
                  weight="bold")
    label_axes(axis, "A revealed result is a memory, too: blocks need no other", "passes",
               "final results right (%)", (4, 5, 7, 10, 20))


def draw_chains(axis, by_presses: dict[str, list[float]]) -> None:
    """One curve for each number of presses, darker for longer chains."""
    for presses, right in by_presses.items():
        x = range(1, len(right) + 1)
        color = str(0.75 - 0.09 * int(presses))
        axis.plot(x, 100 * np.array(right), "o-", color=color, markersize=3)
        first = int(np.argmax(np.array(right) >= 0.5))
        axis.annotate(presses, (x[first], 100 * right[first]), (-4, 6), color=color,
                      textcoords="offset points", ha="right")
    label_axes(axis, "A link more of the chain, a pass more (numbers: links)",
               "passes over an answer of nothing but masks", "whole answers right (%)",
               (1, 2, 3, 4, 5, 6, 8, 16))


def draw(path: Path, draw_one: Callable, data: object) -> None:
    with blame("the drawing", "pip install matplotlib"):
        import matplotlib.pyplot as plt
    plt.style.use(Path(__file__).with_name("pictures.mplstyle"))
    figure, axis = plt.subplots()
    draw_one(axis, data)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--chains", type=Path, metavar="FOLDER", help="a run of chains.py")
    parser.add_argument("--assets", type=Path, default=ROOT / "assets", help="of the pictures")
    args = parser.parse_args()
    ablations = [run / "ablations.jsonl" for run in args.runs]
    if all(path.exists() for path in ablations):
        rows = [list(map(json.loads, path.read_text().splitlines())) for path in ablations]
        draw(args.assets / "passes.svg", draw_passes, rows)
    schedules = [run / "schedules.json" for run in args.runs]
    if all(path.exists() for path in schedules):
        draw(args.assets / "schedules.svg", draw_schedules,
             [json.loads(path.read_text()) for path in schedules])
    if args.chains:
        chains = json.loads((args.chains / "chains.json").read_text())
        draw(args.assets / "chains.svg", draw_chains, list(chains.values())[-1])


if __name__ == "__main__":
    run_program(main, if_interrupted="nothing is kept")
