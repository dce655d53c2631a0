"""What the slots know after every pass: python experiments/probe.py out/tiny

After every pass over an answer of nothing but masks a linear probe (ridge regression on one-hot
values) reads the result of each press from all slots together. Printed is its accuracy on
validation problems, with the memory kept and, as controls, reset before every pass, and not trained
at all; chance is 10 %. Then how many whole answers stay right over many more passes than the memory
was trained for. Nothing is trained or written.
"""
import argparse
from pathlib import Path

import torch
from torch import Tensor

from shared import BATCH, open_run, print_table

from diffusion import Report, generate
from eval_gsm8k import PROTOCOLS, percent, problem_ids, whole_by_pass
from metastate import MetaState, preset
from model import Backbone, Tokenizer
from sample import COUNT, DIAL_LENGTH, PRESSES, dial_problems, run_program

PROBED_PASSES = 6
MANY_PASSES = (5, 10, 20, 50, 100, 256, 1024)


def prompts_of(tokenizer: Tokenizer, problems: list[dict]) -> Tensor:
    """(n, P): all questions are equally long."""
    return torch.tensor([problem_ids(tokenizer, PROTOCOLS["dial"], p, ()) for p in problems])


def record(backbone: Backbone, memory: MetaState, tokenizer: Tokenizer, problems: list[dict],
           carry: str) -> tuple[list[Tensor], Tensor]:
    """The slots after each pass, (n, M * d), and the results of every press, (n, PRESSES)."""
    slots = []

    def on_step(canvas: Tensor, report: Report) -> None:
        slots.append(report.slots.flatten(1))

    generate(backbone, prompts_of(tokenizer, problems), memory=memory, carry=carry, on_step=on_step,
             gen_length=DIAL_LENGTH, think=PROBED_PASSES - 1, steps=1)
    hops = [p["answer"].split(".")[0].split(",") for p in problems]
    return slots, torch.tensor([[int(hop[-1]) for hop in row] for row in hops])


def probe(x: Tensor, y: Tensor, x_test: Tensor) -> Tensor:
    """Predicted classes of x_test (N, D), by ridge regression of one-hot y on x."""
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / scale, (x_test - mean) / scale
    target = torch.nn.functional.one_hot(y, 10).float() - 0.1
    ridge = len(x) * 0.01 * torch.eye(x.shape[1])
    weights = torch.linalg.solve(x.T @ x + ridge, x.T @ target)
    return (x_test @ weights).argmax(1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--problems", type=COUNT, default=1000, help="validation problems; four "
                        "times as many train the probe (1000)")
    args = parser.parse_args()
    backbone, tokenizer, memory = open_run(args.run)
    problems = dial_problems("valid", args.problems)
    seen = dial_problems("train", 4 * args.problems)

    torch.manual_seed(0)
    untrained = MetaState(preset(backbone))
    cells = {}
    for name, who, carry in (("kept", memory, "keep"), ("reset", memory, "reset"),
                             ("untrained", untrained, "keep")):
        slots, results = record(backbone, who, tokenizer, seen, carry)
        test_slots, want = record(backbone, who, tokenizer, problems, carry)
        for n, (x, x_test) in enumerate(zip(slots, test_slots), 1):
            right = [probe(x, results[:, i], x_test) == want[:, i] for i in range(PRESSES)]
            cells[f"{name}, pass {n}"] = [percent(of_press.tolist()) for of_press in right]
    print_table("Results of the presses that a linear probe reads from the slots (%)",
                [f"press {i + 1}" for i in range(PRESSES)], cells)

    right = whole_by_pass(backbone, tokenizer, problems[:BATCH], memory=memory,
                          n_passes=max(MANY_PASSES))
    print_table("Whole answers right (%) if written at once after N passes over masks, N =",
                [str(n) for n in MANY_PASSES],
                {"MetaState": [percent(right[n - 1]) for n in MANY_PASSES]})


if __name__ == "__main__":
    run_program(main, if_interrupted="nothing is kept")
