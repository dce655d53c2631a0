"""Accuracy and passes under every kind of schedule: python experiments/schedules.py out/tiny

For the frozen backbone and MetaState of a run: quotas, thinking, blocks, thresholds. Block length
and threshold are chosen for each of the two on validation problems, scored are test problems. The
table is printed, and every result behind it written to RUN/schedules.json, for plot.py.
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shared import ensure_not_shipped, open_run, print_table, score, spread

from metastate import MetaState
from model import Backbone, Tokenizer, write_atomically
from sample import COUNT, DIAL_LENGTH, dial_problems, run_program, start_device

Results = dict[str, dict[str, list]]   # label -> correct and passes, problem by problem


def schedules(length: int) -> dict[str, dict[str, dict]]:
    """Settings of diffusion.Sampling by kind and label, for answers of this length."""
    steps = [math.ceil(length / n) for n in (1, 2, 3, 4, 5)]
    block_lengths = [n for n in range(length // 2, 1, -1) if length % n == 0]
    return {
        "quota": {f"quota, {n} steps": dict(steps=n) for n in steps},
        "think": {f"think, {n} passes": dict(think=n - 1, steps=1) for n in (1, 3, 4, 5, 10)},
        "blocks": {f"blocks of {n}": dict(block_length=n, steps=length // n)
                   for n in block_lengths},
        "threshold": {f"threshold {x}": dict(threshold=x) for x in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)},
    }


def results_of(backbone: Backbone, tokenizer: Tokenizer, problems: list[dict],
               memory: MetaState | None, length: int, by_label: dict[str, dict]) -> Results:
    """Under each of these schedules: whether a final result is right, and in how many passes."""
    results = {}
    for label, settings in tqdm(by_label.items(), "schedules", leave=False, disable=None):
        rows = score(backbone, tokenizer, problems, memory, gen_length=length, **settings)
        results[label] = {key: [row[key] for row in rows] for key in ("correct", "passes")}
    return results


def cheapest(results: Results) -> str:
    """The schedule with the fewest passes among those within a point of the best accuracy."""
    right = {label: np.mean(found["correct"]) for label, found in results.items()}
    good = [label for label in results if right[label] >= max(right.values()) - 0.01]
    return min(good, key=lambda label: np.mean(results[label]["passes"]))


def compare_schedules(backbone: Backbone, tokenizer: Tokenizer, memory: MetaState,
                      problems: list[dict], valid: list[dict], length: int) -> dict[str, Results]:
    """Results on problems; of blocks and of thresholds the one is taken that is best on valid."""
    results = {}
    for name, its_memory in (("frozen", None), ("MetaState", memory)):
        kinds = schedules(length)
        chosen = kinds["quota"] | kinds["think"]
        for by_label in (kinds["blocks"], kinds["threshold"]):
            tried = results_of(backbone, tokenizer, valid, its_memory, length, by_label)
            best = cheapest(tried)
            chosen[best] = by_label[best]
        results[name] = results_of(backbone, tokenizer, problems, its_memory, length, chosen)
    return results


def print_schedules(runs: list[dict[str, Results]]) -> None:
    """Mean and range over runs; what is chosen by run may be in some of them only."""
    cells = {}
    for name in runs[0]:
        for label in dict.fromkeys(label for run in runs for label in run[name]):
            found = [run[name][label] for run in runs if label in run[name]]
            right = [np.mean(results["correct"]) for results in found]
            passes = np.mean([np.mean(results["passes"]) for results in found])
            cells[f"{name}, {label}"] = [spread(right), f"{passes:.2f}", str(len(found))]
    print_table("Final results right (%)", ["right", "passes", "runs"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--problems", type=COUNT, default=1000,
                        help="test problems; chosen is on half as many others (1000)")
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    args = parser.parse_args()
    ensure_not_shipped(args.run)
    device, _ = start_device(args.device, "tiny")
    problems = dial_problems("test", args.problems)
    valid = dial_problems("valid", math.ceil(args.problems / 2))
    results = compare_schedules(*open_run(args.run, device), problems, valid, DIAL_LENGTH)
    print_schedules([results])
    write_atomically(args.run / "schedules.json", json.dumps(results).encode())


if __name__ == "__main__":
    run_program(main, if_interrupted="nothing is kept")
