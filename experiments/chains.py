"""Longer chains than the memory was trained on: python experiments/chains.py out/chains

The backbone is trained on problems of one to eight presses, one memory on one to four, and another,
as a control, on one to eight. Then whole answers of one to eight presses are written at once, after
N passes without a word: does a memory go on with its look-ups when it is given more passes? The
control tells what the slots can hold where they were trained to. Problems of three and more presses
were seen by no training; of one and two there are too few (80 and 640) to leave some out. Dots fill
every question up to one length, so that a press stands as far from its place in the answer whatever
their number; without them one layer did not learn the words. train.py's --seed, --device, --resume
and options of training may follow.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402
from diffusion import Pass, generate  # noqa: E402
from eval_gsm8k import (BUTTONS, PROTOCOLS, WORDS, Bench, Contestant, answer_text,  # noqa: E402
                        dial_problem, prompt_ids)
from metastate import MetaState  # noqa: E402
from model import TINY, Backbone, Tokenizer, tiny_tokenizer, write_atomically  # noqa: E402
from sample import Processes, run_program, start_device  # noqa: E402

LONGEST = 8
TRAINED = 4
LENGTH = 4 * LONGEST + 4               # of every canvas: the longest answer, its end and one more
N_PASSES = 16


def problems(n: int, longest: int, shortest: int, seed: int) -> list[dict[str, str]]:
    """n problems, each with a random number of presses from shortest to longest."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        pressed = rng.integers(len(BUTTONS), size=rng.integers(shortest, longest + 1)).tolist()
        new = dial_problem(int(rng.integers(10)), pressed)
        new["question"] += "." * 4 * (LONGEST - len(pressed))  # a press has four tokens
        found.append(new)
    return found


def whole_by_pass(backbone: Backbone, tokenizer: Tokenizer, test: list[dict[str, str]],
                  memory: MetaState | None) -> list[float]:
    """Whole answers right if pass 1, 2, ... wrote them. One run tells all: over masks a pass does
    the same whether it writes or not."""
    protocol = PROTOCOLS["dial"]
    prompts = [prompt_ids(tokenizer, protocol, problem, []) for problem in test]
    n_prompt = len(prompts[0])
    shares = []

    def score(canvas: Tensor, this_pass: Pass) -> None:
        guesses = this_pass.guess[:, n_prompt:].tolist()
        texts = [answer_text(tokenizer, guess, protocol.stops) for guess in guesses]
        shares.append(float(np.mean([text == p["answer"] for text, p in zip(texts, test)])))

    device = backbone.embedding.weight.device
    generate(backbone, torch.tensor(prompts, device=device), memory=memory, gen_length=LENGTH,
             think=N_PASSES - 1, steps=1, on_step=score)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    given, options = parser.parse_known_args()         # the others are train.py's
    args = train.arguments(options)
    args.max_length = 100
    device, _ = start_device(args.device)
    train.check_options(args, given.out)

    tokenizer = tiny_tokenizer(WORDS)
    tests = {n: problems(500, n, n, seed=2) for n in range(1, LONGEST + 1)}
    held_out = {p["question"] for n in tests if n > 2 for p in tests[n]}

    def run_on(longest: int) -> train.Run:
        texts = [train.read_text(p) for p in problems(30_000, longest, 1, seed=1)
                 if p["question"] not in held_out]
        examples = train.tokenise(texts, tokenizer, TINY.eos_id, args.max_length)
        return train.Run(args, given.out, examples, LENGTH, Processes(0, 1), device)

    backbone = train.train_backbone(run_on(LONGEST), TINY, WORDS)
    memories = {"frozen": None}
    for longest in (TRAINED, LONGEST):
        run = run_on(longest)
        path = given.out / f"memory-{longest}.pt"
        memories[f"memory trained on 1 to {longest}"] = train.train_memory(run, backbone, path,
                                                                           "keep")

    table = {}
    header = " | ".join(f"N = {n}" for n in range(1, N_PASSES + 1))
    for name, memory in memories.items():
        print(f"\n| {name}, presses | {header} | a token a step |")
        print("|---" * (N_PASSES + 2) + "|")
        table[name] = {}
        for presses, test in tests.items():
            by_pass = whole_by_pass(backbone, tokenizer, test, memory)
            rows = Bench(backbone, tokenizer, test, LENGTH).score(Contestant(memory, "keep"),
                                                                  steps=LENGTH)
            one_by_one = float(np.mean([row["whole"] for row in rows]))
            table[name][presses] = {"by_pass": by_pass, "one_by_one": one_by_one}
            cells = " | ".join(f"{100 * x:.1f}" for x in [*by_pass, one_by_one])
            print(f"| {presses} | {cells} |", flush=True)
    write_atomically(given.out / "chains.json", json.dumps(table).encode())


if __name__ == "__main__":
    run_program(main, if_interrupted="finished checkpoints are kept in the folder")
