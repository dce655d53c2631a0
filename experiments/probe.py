"""What the slots know after every pass: python experiments/probe.py out/tiny

After every pass over an answer of nothing but masks a linear probe (ridge regression on one-hot
values) reads the result of each press from all slots together. Printed is its accuracy on
validation problems, with the memory kept and, as controls, reset before every pass, and not trained
at all; chance is 10 %. Then how many answers are right that are written but for their five digits,
after N passes; and how many whole answers stay right over many more passes than the memory was
trained for. Nothing is trained or written.
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
DIGIT_PASSES = (1, 2, 3, 4, 5, 6, 10)
MANY_PASSES = (5, 10, 20, 30, 50, 100, 256)


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


def digits_right(backbone: Backbone, memory: MetaState | None, tokenizer: Tokenizer,
                 problems: list[dict], n_passes: int) -> list[bool]:
    """The words of an answer are given, its five digits are written at once after n_passes: whether
    all five are right."""
    prompts = prompts_of(tokenizer, problems)                          # (n, P)
    rows = [tokenizer.encode(p["answer"]) for p in problems]
    answers = torch.tensor([row + [backbone.config.eos_id] * (DIAL_LENGTH - len(row))
                            for row in rows])                          # (n, DIAL_LENGTH)
    digits = torch.tensor([tokenizer.encode(f" {digit}")[0] for digit in range(10)])
    blanked = answers.masked_fill(torch.isin(answers, digits), backbone.config.mask_id)
    canvas = generate(backbone, torch.cat((prompts, blanked), 1), memory=memory,
                      answer_start=prompts.shape[1], gen_length=0, think=n_passes - 1, steps=1)
    return (canvas[:, prompts.shape[1]:] == answers).all(1).tolist()


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

    cells = {}
    for name, who in (("MetaState", memory), ("frozen", None)):
        cells[name] = [percent(digits_right(backbone, who, tokenizer, problems, n))
                       for n in DIGIT_PASSES]
    print_table("The words are given: answers with five right digits (%) after N passes, N =",
                [str(n) for n in DIGIT_PASSES], cells)

    right = whole_by_pass(backbone, tokenizer, problems[:BATCH], memory=memory,
                          n_passes=max(MANY_PASSES))
    print_table("Whole answers right (%) if written at once after N passes over masks, N =",
                [str(n) for n in MANY_PASSES],
                {"MetaState": [percent(right[n - 1]) for n in MANY_PASSES]})


if __name__ == "__main__":
    run_program(main, if_interrupted="nothing is kept")
