"""Draw the README's pictures from the logs of finished runs: python assets/plot.py out/tiny [...]

Needs matplotlib, for this script only. Accuracy: mean over runs, bars from the lowest to the
highest run. Loss: mean over runs and over 20 steps of training. --table prints the same means and
draws nothing; below them differences, with the paired 95 % interval of all runs together.
"""
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from eval_gsm8k import paired_interval  # noqa: E402

STYLE = {"frozen": "k--", "MetaState": "C0o-", "memory reset": "C1s-", "memory shuffled": "C3^-",
         "memoryless-trained": "C2d-"}


def losses(run: Path, name: str) -> np.ndarray:
    lines = (run / f"{name}.log.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["by_step"] for line in lines])


def summary(tables: list[dict]) -> None:
    by_steps = list(tables[0]["frozen"])
    print(f"| steps | {' | '.join(by_steps)} |\n" + "|---" * (len(by_steps) + 1) + "|")
    for name in STYLE:
        x = np.array([[100 * np.mean(table[name][steps]) for steps in by_steps] for table in tables])
        cells = [f"{y.mean():.1f} ({y.min():.1f} - {y.max():.1f})" for y in x.T]
        print(f"| {name} | {' | '.join(cells)} |")
    print()
    for name, other in [(name, "frozen") for name in list(STYLE)[1:]] + [("MetaState", "memoryless-trained")]:
        cells = []
        for steps in by_steps:
            both = [sum((table[row][steps] for table in tables), []) for row in (other, name)]
            mean, low, high = (100 * x for x in paired_interval(*both))
            cells.append(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]")
        print(f"| {name} - {other} | {' | '.join(cells)} |")


def main(*arguments: str) -> None:
    runs = [Path(argument) for argument in arguments if argument != "--table"]
    tables = [json.loads((run / "table.json").read_text()) for run in runs]
    if "--table" in arguments:
        return summary(tables)
    plt.figure(figsize=(6, 4))
    for name, style in STYLE.items():
        steps = sorted(map(int, tables[0][name]))
        y = np.array([[100 * np.mean(table[name][str(s)]) for s in steps] for table in tables])
        plt.errorbar(steps, y.mean(0), [y.mean(0) - y.min(0), y.max(0) - y.mean(0)], fmt=style, capsize=3,
                     label=name)
    plt.xlabel("denoising steps for 20 tokens")
    plt.ylabel("exact match (%)")
    plt.xscale("log")
    plt.xticks(steps, steps)
    plt.minorticks_off()
    plt.legend()
    plt.tight_layout()
    plt.savefig(HERE / "accuracy.png", dpi=110)

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, (name, title) in zip(axes, (("memory", "MetaState"), ("memoryless", "memoryless-trained"))):
        y = np.mean([losses(run, name) for run in runs], 0)
        y = y[:len(y) // 20 * 20].reshape(-1, 20, y.shape[1]).mean(1)
        for k in range(y.shape[1]):
            axis.plot(20 * np.arange(len(y)), y[:, k], color=plt.cm.viridis(k / y.shape[1]), label=f"k = {k + 1}")
        axis.set_title(title)
        axis.set_xlabel("training step")
    axes[0].set_ylabel("dense loss of unrolled step k")
    axes[1].legend()
    plt.tight_layout()
    plt.savefig(HERE / "loss.png", dpi=110)


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["out/tiny"]))
