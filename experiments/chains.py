"""Longer chains than the memory was trained on: python experiments/chains.py out/chains

The backbone is trained on problems of one to eight presses, one memory on one to four, and another,
as a control, on one to eight. Then whole answers of one to eight presses are written at once after
N passes that write nothing: does a memory go on with its look-ups when it is given more passes? The
control tells what the slots can hold where they were trained to. Problems of three and more presses
were seen by no training; of one and two there are too few (80 and 640) to leave some out. Dots fill
every question up to one length, so that a press stands as far from its place in the answer whatever
their number; without them one layer did not learn the words.
"""
import json

import numpy as np

from shared import print_table, score, training_arguments, training_run

import train
from eval_gsm8k import percent, whole_by_pass
from model import TINY, tiny_tokenizer, write_atomically
from sample import BUTTONS, WORDS, dial_problem, run_program

LONGEST = 8
TRAINED = 4
LENGTH = 4 * LONGEST + 4               # of every canvas: the longest answer, its end and one more
N_PASSES = 16
N_TRAINING = 30_000


def problems(n: int, shortest: int, longest: int, seed: int) -> list[dict[str, str]]:
    """n problems, each with a random number of presses from shortest to longest."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        pressed = rng.integers(len(BUTTONS), size=rng.integers(shortest, longest + 1)).tolist()
        new = dial_problem(int(rng.integers(10)), pressed)
        new["question"] += "." * 4 * (LONGEST - len(pressed))  # a press has four tokens
        found.append(new)
    return found


def main() -> None:
    args = training_arguments(__doc__, "--max-length", "100", "--problems", "4000")
    tokenizer = tiny_tokenizer(WORDS)
    n_test = max(1, args.problems // LONGEST)
    tests = {n: problems(n_test, n, n, seed=2) for n in range(1, LONGEST + 1)}
    held_out = {p["question"] for n in tests if n > 2 for p in tests[n]}

    def run_on(longest: int) -> train.Run:
        every = problems(N_TRAINING, 1, longest, seed=1)
        unseen = [p for p in every if p["question"] not in held_out]
        return training_run(args, unseen, tokenizer, LENGTH)

    backbone = train.train_backbone(run_on(LONGEST), TINY, WORDS)
    memories = {"frozen": None}
    for longest in (TRAINED, LONGEST):
        memory = train.train_memory(run_on(longest), backbone, args.out / f"memory-{longest}.pt")
        memories[f"memory trained on 1 to {longest}"] = memory

    results = {}
    for name, memory in memories.items():
        results[name] = {}
        cells = {}
        for presses, test in tests.items():
            by_pass = whole_by_pass(backbone, tokenizer, test, memory=memory, n_passes=N_PASSES,
                                    gen_length=LENGTH)                 # (N_PASSES, n_test)
            rows = score(backbone, tokenizer, test, memory, gen_length=LENGTH, steps=LENGTH)
            one_by_one = [row["text"] == p["answer"] for row, p in zip(rows, test)]
            results[name][presses] = by_pass.mean(1).tolist()
            cells[str(presses)] = [*map(percent, by_pass), percent(one_by_one)]
        print_table(f"{name}: whole answers right (%) by presses, after N passes over masks, and "
                    "written token by token", [*map(str, range(1, N_PASSES + 1)), "token"], cells)
    write_atomically(args.out / "chains.json", json.dumps(results).encode())


if __name__ == "__main__":
    run_program(main, if_interrupted="finished checkpoints are kept in the folder")
