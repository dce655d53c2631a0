"""The README's pictures and tables from finished runs: python experiments/plot.py out/seed0 [...]

Draws assets/thinking.png, schedules.png and loss.png: means over the runs, bars from the lowest to
the highest. Prints the same numbers as tables. With --chains a run of chains.py becomes
assets/chains.png, too. Needs matplotlib, for this script only; --table prints and draws nothing,
and does without.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from eval_gsm8k import paired_interval  # noqa: E402
from sample import run_program  # noqa: E402

STYLES = {"MetaState": "C0o-", "frozen": "k--", "memory reset": "C1s:", "memory shuffled": "C3^-",
          "memoryless-trained": "C2d-."}


def spread(values: list[float]) -> str:
    """Mean, and the lowest and the highest where they differ."""
    mean, low, high = (f"{x:.1f}" for x in (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}-{high})"


def thinking_values(tables: list[dict], name: str, key: str) -> dict[str, list[float]]:
    """By number of passes: accuracy (%) of every run."""
    passes = tables[0]["thinking"][name]
    return {n: [100 * np.mean(table["thinking"][name][n][key]) for table in tables]
            for n in passes}


def print_thinking(tables: list[dict], key: str) -> None:
    passes = list(tables[0]["thinking"]["frozen"])
    print(f"| {key}, N = | {' | '.join(passes)} |")
    print("|---" * (len(passes) + 1) + "|")
    for name in STYLES:
        cells = [spread(values) for values in thinking_values(tables, name, key).values()]
        print(f"| {name} | {' | '.join(cells)} |")
    print()


def print_differences(tables: list[dict], n: str) -> None:
    """MetaState minus each other row after n passes: run by run, intervals over problems."""
    for name in STYLES:
        if name == "MetaState":
            continue
        cells = []
        for table in tables:
            rows = table["thinking"]
            mean, low, high = paired_interval(rows[name][n]["whole"], rows["MetaState"][n]["whole"])
            cells.append(f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
        print(f"- MetaState - {name}, whole answers, N = {n}, by run: {', '.join(cells)}")
    print()


def print_schedules(tables: list[dict]) -> None:
    print("| schedule | right (%) | passes |\n|---|---|---|")
    labels = [(name, label) for name in ("frozen", "MetaState")
              for table in tables for label in table["schedules"][name]]
    for name, label in dict.fromkeys(labels):
        found = [table["schedules"][name][label] for table in tables
                 if label in table["schedules"][name]]
        right = [100 * np.mean(schedule["correct"]) for schedule in found]
        passes = [float(np.mean(schedule["passes"])) for schedule in found]
        n_runs = f" ({len(found)} of {len(tables)} runs)" if len(found) < len(tables) else ""
        print(f"| {name}, {label}{n_runs} | {spread(right)} | {np.mean(passes):.2f} |")
    print()


def draw_thinking(axis, tables: list[dict]) -> None:
    """Passes over an unwritten answer: one line climbs, the others cannot."""
    for name, style in STYLES.items():
        values = thinking_values(tables, name, "whole")
        y = np.array(list(values.values()))                            # (passes, runs)
        bars = [y.mean(1) - y.min(1), y.max(1) - y.mean(1)]
        axis.errorbar(range(len(values)), y.mean(1), np.maximum(0, bars), fmt=style, capsize=3)
    axis.set_xticks(range(len(values)), values)
    axis.text(5, 91, "MetaState", color="C0", weight="bold")
    axis.text(3.4, 5, "controls: frozen, memory reset,\n"
              "memory shuffled, memoryless-trained", size=9)
    axis.set_xlabel("passes over an answer of nothing but masks")
    axis.set_ylabel("whole answers right (%)")


def mean_schedules(tables: list[dict], name: str) -> dict[str, tuple[float, float]]:
    """Of every kind of schedule: passes and accuracy (%), means over the runs."""
    found = {}
    for table in tables:
        for label, schedule in table["schedules"][name].items():
            # thresholds and block lengths were chosen by run: one point for each kind
            kind = label if label.startswith("quota") else label.split()[0]
            point = np.mean(schedule["passes"]), 100 * np.mean(schedule["correct"])
            found.setdefault(kind, []).append(point)
        if name == "MetaState":
            for n, values in table["thinking"][name].items():
                point = int(n), 100 * np.mean(values["result"])
                found.setdefault(f"think, {n} passes", []).append(point)
    return {kind: tuple(np.mean(points, 0)) for kind, points in found.items()}


def draw_schedules(axis, tables: list[dict]) -> None:
    """What a model reaches in at most so many passes, by the best of its schedules."""
    markers = {"quota": "o", "blocks": "s", "threshold": "^", "think": "*"}
    for name, color in (("frozen", "k"), ("MetaState", "C0")):
        points = mean_schedules(tables, name)
        for kind, (passes, right) in points.items():
            marker = markers[kind.split(",")[0]]
            axis.plot(passes, right, marker, color=color, alpha=0.5)
        passes, right = np.array(sorted(points.values())).T
        best = np.maximum.accumulate(right)
        axis.step([*passes, 20], [*best, best[-1]], where="post", color=color, label=name)
    for kind, marker in markers.items():
        axis.plot([], [], marker, color="grey", label=kind)
    axis.set_xscale("log")
    axis.set_xticks([1, 2, 3, 4, 5, 6, 8, 10, 20], [1, 2, 3, 4, 5, 6, 8, 10, 20])
    axis.minorticks_off()
    axis.set_xlabel("passes")
    axis.set_ylabel("final results right (%)")
    axis.legend(fontsize=8)


def draw_losses(axes, runs: list[Path]) -> None:
    for axis, name in zip(axes, ("memory", "memoryless")):
        y = np.mean([losses(run, name) for run in runs], 0)            # (steps / 20, K)
        for k in range(y.shape[1]):
            axis.plot(20 * np.arange(len(y)), y[:, k], color=f"C{k}", label=f"k = {k + 1}")
        axis.set_title(name)
        axis.set_xlabel("training step")
    axes[0].set_ylabel("dense loss of unrolled step k")
    axes[0].legend()


def draw_chains(axes, table: dict[str, dict]) -> None:
    """One curve for each number of presses: it climbs after as many passes."""
    memories = [name for name in table if name != "frozen"]
    for axis, name in zip(axes, memories):
        for presses, found in table[name].items():
            right = 100 * np.array(found["by_pass"])
            axis.plot(range(1, len(right) + 1), right, "o-", ms=3, label=presses)
        axis.set_title(f"{name} presses", size=10)
        axis.set_xlabel("passes over an answer of nothing but masks")
    axes[0].set_ylabel("whole answers right (%)")
    axes[1].legend(title="presses", fontsize=8, title_fontsize=8, loc="lower right")


def draw(runs: list[Path], tables: list[dict], chains: dict | None) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures = [("thinking.png", 1, draw_thinking, tables),
                ("schedules.png", 1, draw_schedules, tables),
                ("loss.png", 2, draw_losses, runs)]
    if chains:
        pictures.append(("chains.png", 2, draw_chains, chains))
    for name, n_axes, function, data in pictures:
        figure, axes = plt.subplots(1, n_axes, figsize=(7 + n_axes, 3.6), sharey=True)
        function(axes, data)
        figure.tight_layout()
        figure.savefig(ROOT / "assets" / name, dpi=110)


def losses(run: Path, name: str) -> np.ndarray:
    """Means over 20 steps of training, (steps / 20, K)."""
    lines = (run / f"{name}.log.jsonl").read_text().splitlines()
    y = np.array([json.loads(line)["by_step"] for line in lines])
    return y[:len(y) // 20 * 20].reshape(-1, 20, y.shape[1]).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--chains", type=Path, metavar="FOLDER", help="a run of chains.py")
    parser.add_argument("--table", action="store_true", help="print only")
    args = parser.parse_args()
    tables = [json.loads((run / "tables.json").read_text()) for run in args.runs]
    print_thinking(tables, "whole")
    print_thinking(tables, "result")
    print_differences(tables, "5")
    print_schedules(tables)
    if not args.table:
        chains = json.loads((args.chains / "chains.json").read_text()) if args.chains else None
        draw(args.runs, tables, chains)


if __name__ == "__main__":
    run_program(main, if_interrupted="nothing is kept")
