"""A deeper frozen backbone instead of a memory: python experiments/deeper.py out/deeper

Two layers, and as many parameters as the tiny backbone of train.py and its memory together, trained
on the same problems in the same way. Printed: whole answers after N passes without a word, which
cannot depend on N, and final results by quota, blocks and threshold, on the validation problems.
train.py's --seed, --device, --resume and options of training may follow.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402
from eval_gsm8k import (BLOCK_LENGTHS, PROTOCOLS, QUOTA_STEPS, THRESHOLDS,  # noqa: E402
                        WORDS, Bench, Contestant, dial_problems)
from model import TINY, tiny_tokenizer  # noqa: E402
from sample import Processes, run_program, start_device  # noqa: E402

DEEPER = replace(TINY, n_layer=2, d_model=72, d_ff=224)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    given, options = parser.parse_known_args()         # the others are train.py's
    args = train.arguments(options)
    device, _ = start_device(args.device)
    train.check_options(args, given.out)

    tokenizer = tiny_tokenizer(WORDS)
    length = PROTOCOLS["dial"].settings["gen_length"]
    examples = train.tokenise(train.find_texts(args), tokenizer, TINY.eos_id, args.max_length)
    run = train.Run(args, given.out, examples, length, Processes(0, 1), device)
    backbone = train.train_backbone(run, DEEPER, WORDS)
    print(f"{sum(p.numel() for p in backbone.parameters()):,} parameters")

    bench = Bench(backbone, tokenizer, dial_problems("valid", 1000), length)
    frozen = Contestant(None, "keep")
    for n in (1, 5, 10):
        rows = bench.score(frozen, think=n - 1, steps=1)
        print(f"whole answers, N = {n}: {np.mean([row['whole'] for row in rows]):.1%}")
    schedules = {f"quota, {n} steps": dict(steps=n) for n in QUOTA_STEPS}
    schedules |= {f"blocks of {n}": dict(block_length=n, steps=length // n) for n in BLOCK_LENGTHS}
    schedules |= {f"threshold {x}": dict(threshold=x, steps=1) for x in THRESHOLDS}
    for label, settings in schedules.items():
        rows = bench.score(frozen, **settings)
        right = np.mean([row["correct"] for row in rows])
        passes = np.mean([row["passes"] for row in rows])
        print(f"{label}: {right:.1%} in {passes:.2f} passes")


if __name__ == "__main__":
    run_program(main, if_interrupted="finished checkpoints are kept in the folder")
