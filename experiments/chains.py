"""Longer chains than the memory was trained on: python experiments/chains.py out/chains [--seed 0]

The backbone is trained on problems of one to eight presses, the memory on one to four. Then whole
answers of one to eight presses are written at once, after N passes without a word: does the memory
go on with its look-ups when it is given more passes? Validation problems, no test split is used.
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
from sample import COUNT, SEED, Processes, run_program  # noqa: E402

LONGEST = 8
TRAINED = 4
LENGTH = 4 * LONGEST + 4               # tokens of the longest answer, and of every canvas
PASSES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16)


def problems(n: int, presses: tuple[int, ...], seed: int) -> list[dict[str, str]]:
    """n problems, each with a random one of these numbers of presses."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        pressed = rng.integers(len(BUTTONS), size=rng.choice(presses)).tolist()
        found.append(dial_problem(int(rng.integers(10)), pressed))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--backbone-iters", type=COUNT, default=3000)
    parser.add_argument("--iters", type=COUNT, default=1500)
    given = parser.parse_args()
    sys.argv = ["train.py", "--seed", str(given.seed), "--device", "cpu", "--iters",
                str(given.iters), "--backbone-iters", str(given.backbone_iters)]
    args = train.arguments()
    args.max_length = 100
    train.check_options(args, given.out)

    tokenizer = tiny_tokenizer(WORDS)

    def run_on(presses: tuple[int, ...]) -> train.Run:
        texts = [train.read_text(p) for p in problems(30_000, presses, seed=1)]
        examples = train.tokenise(texts, tokenizer, TINY.eos_id, args.max_length)
        return train.Run(args, given.out, examples, LENGTH, Processes(0, 1), torch.device("cpu"))

    torch.manual_seed(args.seed)
    backbone = Backbone(TINY)
    train.train_backbone(run_on(tuple(range(1, LONGEST + 1))), backbone, WORDS)
    backbone.requires_grad_(False).eval()
    run = run_on(tuple(range(1, TRAINED + 1)))
    memory = train.new_memory(run, backbone)
    train.train_memory(run, backbone, memory, run.out / "memory.pt", "keep")

    table = {}
    print(f"| presses | frozen, a step a token | {' | '.join(f'N = {n}' for n in PASSES)} |")
    print("|---" * (len(PASSES) + 2) + "|")
    for presses in range(1, LONGEST + 1):
        bench = Bench(backbone, tokenizer, problems(500, (presses,), seed=2), LENGTH)
        frozen = bench.score(Contestant(None, "keep"), steps=LENGTH)
        rows = bench.score(Contestant(memory, "keep"), look_at=PASSES, think=max(PASSES) - 1,
                           steps=1)
        values = [np.mean([row["correct"] for row in frozen])]
        values += [np.mean([row["whole"] for row in rows if row["passes"] == n]) for n in PASSES]
        table[presses] = values
        print(f"| {presses} | {' | '.join(f'{100 * x:.1f}' for x in values)} |", flush=True)
    with write_atomically(run.out / "chains.json") as file:
        file.write(json.dumps(table).encode())


if __name__ == "__main__":
    run_program(main, if_interrupted="finished checkpoints are kept in the folder")
