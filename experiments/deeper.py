"""A deeper frozen backbone instead of a memory: python experiments/deeper.py out/deeper

Two layers, and as many parameters as the tiny backbone and its memory together, trained on the same
problems in the same way. Printed is, on validation problems, every schedule of schedules.py: what
it gets right after N passes that write nothing cannot depend on N.
"""
from dataclasses import replace

from schedules import print_schedules, results_of, schedules
from shared import training_arguments, training_run

import train
from model import TINY, tiny_tokenizer
from sample import DIAL_LENGTH, WORDS, dial_problems, run_program

DEEPER = replace(TINY, n_layer=2, d_model=72, d_ff=224)


def main() -> None:
    args = training_arguments(__doc__)
    tokenizer = tiny_tokenizer(WORDS)
    run = training_run(args, dial_problems("train", 30_000), tokenizer)
    backbone = train.train_backbone(run, DEEPER, WORDS)
    print(f"{sum(p.numel() for p in backbone.parameters()):,} parameters")
    problems = dial_problems("valid", args.problems)
    results = {}
    for by_label in schedules(DIAL_LENGTH).values():
        results |= results_of(backbone, tokenizer, problems, None, DIAL_LENGTH, by_label)
    print_schedules([{"deeper": results}])


if __name__ == "__main__":
    run_program(main, if_interrupted="finished checkpoints are kept in the folder")
