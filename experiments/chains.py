"""Longer chains than the memory was trained on: python experiments/chains.py out/chains

The backbone is trained on problems of one to eight presses, one memory on one to four, and another,
as a control, on one to eight. Then whole answers of one to eight presses are written at once, after
N passes without a word: does a memory go on with its look-ups when it is given more passes? The
control tells what the slots can hold where they were trained to. Problems of three and more presses
were seen by no training; of one and two there are too few (80 and 640) to leave some out. Options
of train.py are taken, too, --seed and --backbone-iters above all.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402
from eval_gsm8k import BUTTONS, WORDS, Bench, Contestant, dial_problem  # noqa: E402
from model import TINY, Backbone, tiny_tokenizer, write_atomically  # noqa: E402
from sample import Processes, run_program  # noqa: E402

LONGEST = 8
TRAINED = 4
LENGTH = 4 * LONGEST + 4               # of every canvas: the longest answer, its end and one more
PASSES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16)


def problems(n: int, longest: int, shortest: int, seed: int) -> list[dict[str, str]]:
    """n problems, each with a random number of presses from shortest to longest."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        pressed = rng.integers(len(BUTTONS), size=rng.integers(shortest, longest + 1)).tolist()
        found.append(dial_problem(int(rng.integers(10)), pressed))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    given, options = parser.parse_known_args()         # the others are train.py's
    sys.argv = ["train.py", "--device", "cpu", *options]
    args = train.arguments()
    args.max_length = 100
    train.check_options(args, given.out)

    tokenizer = tiny_tokenizer(WORDS)
    tests = {n: problems(500, n, n, seed=2) for n in range(1, LONGEST + 1)}
    held_out = {p["question"] for n in tests if n > 2 for p in tests[n]}

    def run_on(longest: int) -> train.Run:
        texts = [train.read_text(p) for p in problems(30_000, longest, 1, seed=1)
                 if p["question"] not in held_out]
        examples = train.tokenise(texts, tokenizer, TINY.eos_id, args.max_length)
        return train.Run(args, given.out, examples, LENGTH, Processes(0, 1), torch.device("cpu"))

    torch.manual_seed(args.seed)
    backbone = Backbone(TINY)
    train.train_backbone(run_on(LONGEST), backbone, WORDS)
    backbone.requires_grad_(False)
    contestants = {"frozen": Contestant(None, "keep")}
    for longest in (TRAINED, LONGEST):
        run = run_on(longest)
        memory = train.train_memory(run, backbone, given.out / f"memory-{longest}.pt", "keep")
        contestants[f"memory trained on 1 to {longest}"] = Contestant(memory, "keep")

    table = {}
    for name, who in contestants.items():
        print(f"\n| {name}, presses | {' | '.join(f'N = {n}' for n in PASSES)} | a step a token |")
        print("|---" * (len(PASSES) + 2) + "|")
        for presses, test in tests.items():
            bench = Bench(backbone, tokenizer, test, LENGTH)
            schedules = [dict(think=n - 1, steps=1) for n in PASSES] + [dict(steps=LENGTH)]
            values = [np.mean([row["whole"] for row in bench.score(who, **settings)])
                      for settings in schedules]
            table[f"{name}, {presses}"] = values
            cells = " | ".join(f"{100 * x:.1f}" for x in values)
            print(f"| {presses} | {cells} |", flush=True)
    write_atomically(given.out / "chains.json", json.dumps(table).encode())


if __name__ == "__main__":
    run_program(main, if_interrupted="finished checkpoints are kept in the folder")
