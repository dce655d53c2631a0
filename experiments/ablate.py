"""Which part of the memory matters: python experiments/ablate.py out/tiny K=2 1-slot

Trains variants on the frozen backbone of a finished run, one change each and otherwise with the
settings of that run, and appends accuracy on validation problems to RUN/ablations.jsonl: whole
answers after N passes that write nothing, and final results by quota. Without a variant they are
listed. --table prints what was measured, mean and range over several runs:

    python experiments/ablate.py out/s0 --table out/s1 out/s2
"""
import argparse
import difflib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor, nn

from shared import BATCH, ensure_not_shipped, open_run, print_table, score, spread, training_run

import train
from eval_gsm8k import whole_by_pass
from metastate import MetaState, load_checkpoint, preset
from model import Backbone, Tokenizer, blame, ensure
from sample import COUNT, dial_problems, run_program

PASSES = (1, 5, 20, 100, 256)
QUOTA_STEPS = (20, 5)
N_PROBLEMS = 300


# Modules that take the place of ours.

class Overwrite(nn.Module):
    """No Updater: a slot becomes what the Mixer read."""

    def forward(self, slots: Tensor, read: Tensor, t_cond: Tensor) -> Tensor:
        return torch.tanh(read)


class NoGradientBetweenSteps(MetaState):
    """The memory is handed on as numbers: Mixer and Updater get no gradient and stay random."""

    def step(self, backbone, ids, slots, **given):
        h, new_slots = super().step(backbone, ids, slots, **given)
        return h, new_slots.detach()


class GradientOfOneStep(MetaState):
    """Backpropagation truncated to one step: a loss trains what the step before it wrote into the
    memory, and nothing earlier. The next step gets slots whose own past has been cut off."""

    def step(self, backbone, ids, slots, **given):
        h, _ = super().step(backbone, ids, slots, **given)
        _, new_slots = super().step(backbone, ids, slots.detach(), **given)
        return h, new_slots


class Looping(MetaState):
    """Nothing is carried over, but every step makes several passes over the same tokens, from the
    initial slots each time: within a step that is what the memory does, at as many times the cost.
    """
    loops = 5

    def step(self, backbone, ids, slots, **given):
        slots = self.initial(len(ids))
        for _ in range(self.loops):
            h, slots = super().step(backbone, ids, slots, **given)
        return h, slots


# What is changed in a memory before it is trained.

def overwrite(memory: MetaState) -> None:
    memory.updater = Overwrite()


def timeless(memory: MetaState) -> None:
    memory.conditioner.register_forward_hook(lambda _, inputs, t_cond: torch.zeros_like(t_cond))


@dataclass(frozen=True)
class Variant:
    what: str                          # in words
    options: dict = field(default_factory=dict)        # of train.py
    fields: dict = field(default_factory=dict)         # of MemoryConfig
    kind: type = MetaState
    change: Callable[[MetaState], None] | None = None
    times: int = 1                     # so many times the run's iterations
    trained: bool = True               # False: with the weights of the run's memory


RESET = {"carry": "reset"}
VARIANTS = {
    "default": Variant("the run's own memory", trained=False),
    "memoryless": Variant("trained and run with the initial slots in every step", RESET),
    "memoryless-2x": Variant("the same for twice the iterations", RESET, times=2),
    "injector-only": Variant("memoryless, the Injector with as many parameters as a whole memory",
                             RESET, {"d_slot": 148}),
    "looping": Variant("the run's memory, begun anew and run five times in every step",
                       kind=Looping, trained=False),
    "K=2": Variant("steps that are unrolled, instead of 4", {"K": 2}),
    "K=6": Variant("steps that are unrolled, instead of 4", {"K": 6}),
    "no-thinking": Variant("no passes before the first unrolled step", {"think": 0}),
    "one-step-gradient": Variant("a loss trains the step before it, and no earlier one",
                                 kind=GradientOfOneStep),
    "no-gradient": Variant("no gradient between steps: Mixer and Updater stay random",
                           kind=NoGradientBetweenSteps),
    "random-order": Variant("tokens revealed in random order", {"confident": 0.0}),
    "reveal-loss": Variant("loss on the tokens revealed next alone", {"lam": 0.0}),
    "dense-loss": Variant("loss on all masked tokens alone", {"lam": 1.0}),
    "no-updater": Variant("slots are overwritten by what the Mixer read", change=overwrite),
    "no-time": Variant("the modules are not told the time", change=timeless),
    "no-anchors": Variant("all heads free", fields={"n_free_head": 4}),
    "half-free": Variant("half of the heads free", fields={"n_free_head": 2}),
    "1-slot": Variant("instead of 16", fields={"n_slots": 1}),
    "4-slots": Variant("instead of 16", fields={"n_slots": 4}),
    "small-30": Variant("a memory with 30 % of the backbone's parameters",
                        fields={"d_slot": 32, "d_time": 24}),
    "small-10": Variant("a memory with 10 % of the backbone's parameters",
                        fields={"d_slot": 16, "d_time": 8, "n_head": 2}),
}


def fit_variant(run: train.Run, backbone: Backbone, name: str) -> tuple[MetaState, int]:
    """A memory, trained as train_memory does but for the variant's change, and how many of its
    parameters training moved: those that no loss reaches stay as they were."""
    variant = VARIANTS[name]
    torch.manual_seed(run.args.seed)
    memory = variant.kind(replace(preset(backbone), **variant.fields)).to(run.device)
    if variant.change:
        variant.change(memory)
    before = [p.detach().clone() for p in memory.parameters()]
    if variant.trained:
        train.train_memory(run, backbone, run.out / "ablations" / f"{name}.pt", memory)
    else:
        memory.load_state_dict(load_checkpoint(run.out / "memory.pt")["model"])
    moved = [p.numel() for p, old in zip(memory.parameters(), before) if not torch.equal(p, old)]
    return memory, sum(moved)


def measure(run: train.Run, backbone: Backbone, tokenizer: Tokenizer, name: str) -> dict:
    """A line of the results: a variant's size, and its accuracy on validation problems."""
    variant = VARIANTS[name]
    settings = vars(run.args) | variant.options
    settings["iters"] *= variant.times
    run = run._replace(args=argparse.Namespace(**settings))
    memory, n_moved = fit_variant(run, backbone, name)
    problems = dial_problems("valid", N_PROBLEMS)
    carry = run.args.carry
    # what does not persist gives the first answer in every pass, by construction
    n_passes = 1 if carry == "reset" or variant.kind is Looping else max(PASSES)
    right = whole_by_pass(backbone, tokenizer, problems, memory=memory, carry=carry,
                          n_passes=n_passes, batch_size=BATCH)
    row = {"name": name, "iterations": run.args.iters, "parameters": n_moved}
    row |= {f"N = {n}": right[min(n, n_passes) - 1].mean() for n in PASSES}
    for steps in QUOTA_STEPS:
        answers = score(backbone, tokenizer, problems, memory, carry=carry, steps=steps)
        row[f"{steps} steps"] = np.mean([answer["correct"] for answer in answers])
    return row


def print_results(runs: list[Path], names: list[str]) -> None:
    """Mean and range over the runs of what was measured, the last time that it was."""
    found = {}
    for run in runs:
        path = run / "ablations.jsonl"
        with blame(path, "give runs of which some variant was measured"):
            for row in map(json.loads, path.read_text().splitlines()):
                if row["name"] in names:
                    label = f"{row['name']}, {row['iterations']:,} iterations"
                    found.setdefault(label, {})[run] = row
    columns = [*(f"N = {n}" for n in PASSES), *(f"{steps} steps" for steps in QUOTA_STEPS)]
    cells = {}
    for label, by_run in found.items():
        rows = list(by_run.values())
        cells[label] = [f"{rows[0]['parameters']:,}",
                        *(spread([row[column] for row in rows]) for column in columns),
                        str(len(rows))]
    print_table("Whole answers right (%) if written at once after N passes, and final results by "
                f"quota, {N_PROBLEMS} problems", ["trained", *columns, "runs"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="none: list them")
    parser.add_argument("--iters", type=COUNT, help="for a quick look (the run's)")
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    parser.add_argument("--table", nargs="*", type=Path, metavar="RUN",
                        help="print what was measured in this run and in these")
    args = parser.parse_args()
    if args.table is not None:
        return print_results([args.run, *args.table], args.variants or list(VARIANTS))
    for name in args.variants:
        close = difflib.get_close_matches(name, VARIANTS, 1)
        advice = f"did you mean {close[0]}?" if close else "without a variant all are listed"
        ensure(name in VARIANTS, f"there is no variant {name!r}; {advice}")
    if not args.variants:
        for name, variant in VARIANTS.items():
            print(f"{name:18} {variant.what}")
        return

    ensure_not_shipped(args.run)
    backbone, tokenizer, _ = open_run(args.run)
    path = args.run / "memory.pt"
    with blame(path, "give a run that this version of train.py finished"):
        settings = load_checkpoint(path)["settings"] | {"device": args.device}
        settings["iters"] = args.iters or settings["iters"]
    settings = argparse.Namespace(**settings, out=args.run, resume=False)
    run = training_run(settings, dial_problems("train", 30_000), tokenizer)
    backbone.to(run.device)
    for name in args.variants:
        row = measure(run, backbone, tokenizer, name)
        with open(args.run / "ablations.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    print_results([args.run], args.variants)


if __name__ == "__main__":
    run_program(main, if_interrupted="finished variants are in ablations.jsonl")
