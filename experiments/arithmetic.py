"""A second setting, not made for a memory: python experiments/arithmetic.py out/arithmetic

Word problems with two to four sums below 21, put and answered as GSM8K's are; tokens are words and
numbers. A backbone of two layers is trained on them, then the memory and its memoryless control
with the settings of train.py. Printed are, on test problems, whole answers after N passes that
write nothing, and final results under the schedules of schedules.py.
"""
import argparse
from dataclasses import replace

import numpy as np

from schedules import compare_schedules, print_schedules
from shared import print_table, training_arguments, training_run

import train
from eval_gsm8k import THINKING_PASSES, percent, whole_by_pass
from model import TINY, tiny_tokenizer
from sample import run_program

NAMES = [" Ann", " Ben", " Eva", " Tom"]
THINGS = [" pens", " nuts", " eggs", " coins"]
MORE = [" buys", " finds", " gets"]
LESS = [" loses", " sells", " eats"]
WORDS = [*NAMES, *THINGS, *MORE, *LESS, " has", " more", ". How many", " are left?", "\n####",
         "\nAnswer:", ".", ",", " +", " -", " =", *(f" {i}" for i in range(20, -1, -1))]
LENGTH = 28                            # the longest answer, its end and one more: it divides well
N_TRAINING = 40_000


def problem(rng: np.random.Generator) -> dict[str, str]:
    who, what = rng.choice(NAMES), rng.choice(THINGS)
    x = int(rng.integers(1, 21))
    question = f"{who} has {x}{what}"
    sums = []
    for d in rng.integers(1, 10, rng.integers(2, 5)).tolist():
        is_more = x + d <= 20 and (x < d or rng.random() < 0.5)
        if is_more:
            question += f".{who}{rng.choice(MORE)} {d} more"
            sums.append(f" {x} + {d} = {x + d}")
            x += d
        else:
            question += f".{who}{rng.choice(LESS)} {d}"
            sums.append(f" {x} - {d} = {x - d}")
            x -= d
    return {"question": f"{question}. How many{what} are left?",
            "answer": f"{','.join(sums)}.\n#### {x}"}


def problems(n: int, seed: int) -> list[dict[str, str]]:
    """n different problems, {question, answer}."""
    rng = np.random.default_rng(seed)
    found = {}
    while len(found) < n:
        new = problem(rng)
        found[new["question"]] = new
    return list(found.values())


def main() -> None:
    args = training_arguments(__doc__, "--max-length", "100")
    tokenizer = tiny_tokenizer(WORDS)
    every = problems(1500 + N_TRAINING, seed=0)
    run = training_run(args, every[1500:], tokenizer, LENGTH)
    backbone = train.train_backbone(run, replace(TINY, n_layer=2), WORDS)
    memory = train.train_memory(run, backbone, run.out / "memory.pt")
    reset = run._replace(args=argparse.Namespace(**vars(args) | {"carry": "reset"}))
    memoryless = train.train_memory(reset, backbone, run.out / "memoryless.pt")

    test, valid = every[:1000][:args.problems], every[1000:1500][:args.problems]
    cells = {}
    for name, its_memory, carry in (
            ("frozen", None, "keep"), ("memory reset", memory, "reset"),
            ("memory shuffled", memory, "shuffle"), ("memoryless", memoryless, "reset"),
            ("MetaState", memory, "keep")):
        right = whole_by_pass(backbone, tokenizer, test, memory=its_memory, carry=carry,
                              n_passes=max(THINKING_PASSES), gen_length=LENGTH)
        cells[name] = [percent(right[n - 1]) for n in THINKING_PASSES]
    print_table("Whole answers right (%) if written at once after N passes over masks, N =",
                [str(n) for n in THINKING_PASSES], cells)
    print_schedules([compare_schedules(backbone, tokenizer, memory, test, valid, LENGTH)])


if __name__ == "__main__":
    run_program(main, if_interrupted="finished checkpoints are kept in the folder")
