"""A second setting, not made for a memory: python tests/arithmetic.py out/arithmetic [--seed 0]

Word problems with two to four sums below 21, put and answered as GSM8K's are; tokens are words and
numbers. A backbone of two layers is trained on them, then the memory and its memoryless control with
the settings of train.py, and train.py's table is printed for 1,000 test problems.
"""
import argparse
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402
from metastate import MetaState, preset  # noqa: E402
from model import TINY, Backbone, save_backbone, tiny_tokenizer  # noqa: E402

NAMES, THINGS = [" Ann", " Ben", " Eva", " Tom"], [" pens", " nuts", " eggs", " coins"]
MORE, LESS = [" buys", " finds", " gets"], [" loses", " sells", " eats"]
WORDS = [*NAMES, *THINGS, *MORE, *LESS, " has", " more", ". How many", " are left?", "\n####", "\nAnswer:",
         ".", ",", " +", " -", " =", *(f" {i}" for i in range(20, -1, -1))]
LENGTH = 28                                            # tokens of the longest answer and its end


def problems(n: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """n different problems, {question, answer}."""
    found = {}
    while len(found) < n:
        who, what, x = rng.choice(NAMES), rng.choice(THINGS), int(rng.integers(1, 21))
        question, sums = f"{who} has {x}{what}", []
        for d in rng.integers(1, 10, rng.integers(2, 5)).tolist():
            more = x + d <= 20 and (x < d or rng.random() < 0.5)
            question += f".{who}{rng.choice(MORE if more else LESS)} {d}{' more' * more}"
            y = x + d if more else x - d
            sums.append(f" {x} {'+' if more else '-'} {d} = {y}")
            x = y
        found[f"{question}. How many{what} are left?"] = f"{','.join(sums)}.\n#### {x}"
    return [{"question": question, "answer": answer} for question, answer in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.argv = ["train.py", "--out", str(given.out), "--seed", str(given.seed)]
    args, out = train.arguments(), given.out
    tokenizer, every = tiny_tokenizer(WORDS), problems(41_000, np.random.default_rng(0))
    examples = train.read_examples(list(enumerate(every[1000:])), "", tokenizer, TINY.eos_id, 100)
    batches = partial(train.Batches, examples, seed=args.seed, pad_id=TINY.pad_id, K=args.K, alpha=args.alpha,
                      confident=args.confident, answer_length=LENGTH)
    torch.manual_seed(args.seed)
    backbone = Backbone(replace(TINY, n_layer=2))
    train.fit(backbone, train.backbone_loss, batches(args.backbone_batch), out / "backbone.pt",
              {"settings": {}}, args, args.backbone_iters, args.backbone_lr)
    save_backbone(backbone.requires_grad_(False).eval(), out / "backbone")
    trained = []
    for carry in ("keep", "reset"):
        torch.manual_seed(args.seed)
        config = replace(preset(backbone), n_updates=args.K)
        trained.append(MetaState(config))
        train.fit(trained[-1], partial(train.memory_loss, backbone=backbone, lam=args.lam, carry=carry),
                  batches(args.batch), out / f"{carry}.pt",
                  {"backbone": "arithmetic", "settings": {}, "config": asdict(config)}, args, args.iters, args.lr)
    train.table(backbone, tokenizer, *(m.eval() for m in trained), every[:1000], (LENGTH, 14, 9, 7, 5), out,
                gen_length=LENGTH)


if __name__ == "__main__":
    main()
