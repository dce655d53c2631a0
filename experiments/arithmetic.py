"""A second setting, not made for a memory: python experiments/arithmetic.py out/arithmetic

Word problems with two to four sums below 21, put and answered as GSM8K's are; tokens are words and
numbers. A backbone of two layers is trained on them, then the memory and its memoryless control
with the settings of train.py, and train.py's two tables are printed for 1,000 test problems.
train.py's --seed, --device, --resume and options of training may follow.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eval_gsm8k  # noqa: E402
import train  # noqa: E402
from model import TINY, tiny_tokenizer  # noqa: E402
from sample import Processes, run_program, start_device  # noqa: E402

NAMES = [" Ann", " Ben", " Eva", " Tom"]
THINGS = [" pens", " nuts", " eggs", " coins"]
MORE = [" buys", " finds", " gets"]
LESS = [" loses", " sells", " eats"]
WORDS = [*NAMES, *THINGS, *MORE, *LESS, " has", " more", ". How many", " are left?", "\n####",
         "\nAnswer:", ".", ",", " +", " -", " =", *(f" {i}" for i in range(20, -1, -1))]
LENGTH = 28                            # the longest answer, its end and one more: it divides well


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    given, options = parser.parse_known_args()         # the others are train.py's
    args = train.arguments(options)
    args.max_length = 100
    device, _ = start_device(args.device)
    train.check_options(args, given.out)

    tokenizer = tiny_tokenizer(WORDS)
    test, valid, rest = np.split(problems(41_500, seed=0), [1000, 1500])
    texts = [train.read_text(p) for p in rest]
    examples = train.tokenise(texts, tokenizer, TINY.eos_id, args.max_length)
    run = train.Run(args, given.out, examples, LENGTH, Processes(0, 1), device)
    backbone = train.train_backbone(run, replace(TINY, n_layer=2), WORDS)
    memory = train.train_memory(run, backbone, run.out / "memory.pt", "keep")
    memoryless = train.train_memory(run, backbone, run.out / "memoryless.pt", "reset")

    # schedules that suit 28 tokens instead of 20
    eval_gsm8k.QUOTA_STEPS = (28, 14, 9, 7, 5)
    eval_gsm8k.BLOCK_LENGTHS = (14, 7, 4, 2)
    train.tables(eval_gsm8k.Bench(backbone, tokenizer, test.tolist(), LENGTH),
                 eval_gsm8k.Bench(backbone, tokenizer, valid.tolist(), LENGTH),
                 memory, memoryless, run.out)


if __name__ == "__main__":
    run_program(main, if_interrupted="finished checkpoints are kept in the folder")
