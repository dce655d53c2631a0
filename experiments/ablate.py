"""What matters, and what does the same without a memory: python experiments/ablate.py out/tiny

Trains variants on the frozen backbone of a finished run, one change each and otherwise the settings
of train.py, and appends accuracy on the validation problems to RUN/ablations.jsonl: whole answers
after N passes without a word, and final results by quota. --table prints mean and range of runs.

    python experiments/ablate.py out/tiny "K = 4" "1 slot"
    python experiments/ablate.py out/tiny --table out/s1 out/s2
"""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402
from eval_gsm8k import PROTOCOLS, Bench, Contestant, dial_problems  # noqa: E402
from metastate import MetaState, load_checkpoint, preset  # noqa: E402
from model import load_backbone, tiny_tokenizer  # noqa: E402
from plot import spread  # noqa: E402
from sample import Processes, run_program, start_device  # noqa: E402

PASSES = (1, 3, 5, 10, 20)
QUOTAS = (20, 10, 5, 4)


# Modules that take the place of ours.

class Overwrite(nn.Module):
    """No Updater: a slot becomes what the Mixer read."""

    def forward(self, slots: Tensor, read: Tensor, time: Tensor) -> Tensor:
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
    """Looping instead of persistence: nothing is carried over, but every step makes several passes
    over the same tokens, from the initial slots each time. With the weights of the run's memory; a
    step costs `loops` passes, and within a step that is what the memory does."""
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
    memory.time.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))


def not_anchored(memory: MetaState) -> None:
    nn.init.zeros_(memory.sharpness).requires_grad_(False)


def gates_closed(memory: MetaState) -> None:
    nn.init.constant_(memory.updater.from_read.bias[:memory.config.d_slot], -1.0)


def injector_only(memory: MetaState) -> None:
    """Without persistence Mixer and Updater have nothing to do: they are taken away."""
    memory.mixer.requires_grad_(False)
    memory.updater.requires_grad_(False)


@dataclass
class Variant:
    options: dict = field(default_factory=dict)        # of train.py
    fields: dict = field(default_factory=dict)         # of MemoryConfig
    kind: type = MetaState
    change: Callable[[MetaState], None] | None = None
    carry: str = "keep"
    trained: bool = True                               # False: the run's memory as it is


VARIANTS = {
    "default": Variant(trained=False),
    "no thinking passes in training": Variant({"think": 0}),
    **{f"K = {K}": Variant({"K": K}) for K in (1, 2, 3, 4, 8)},
    "no gradient between steps": Variant(kind=NoGradientBetweenSteps),
    "gradient of one step": Variant(kind=GradientOfOneStep),
    "memoryless": Variant(carry="reset"),
    "memoryless, 2 x the steps": Variant({"iters": 2}, carry="reset"),
    "memoryless, 4 x the steps": Variant({"iters": 4}, carry="reset"),
    "Injector only, as many parameters": Variant(fields={"d_slot": 148}, change=injector_only,
                                                 carry="reset"),
    "looping, 5 passes in every step": Variant(kind=Looping, trained=False),
    "no Updater (overwrite)": Variant(change=overwrite),
    "update gates biased to keep": Variant(change=gates_closed),
    "written after the layer": Variant(fields={"write_layer": 1}),
    "read before the layer": Variant(fields={"read_layer": 0}),
    "no time conditioner": Variant(change=timeless),
    "no head anchored": Variant(change=not_anchored),
    "half of the heads anchored": Variant(fields={"n_free_head": 2}),
    "random reveal order": Variant({"confident": 0.0}),
    "half of the rows in random order": Variant({"confident": 0.5}),
    "reveal loss only (lam 0)": Variant({"lam": 0.0}),
    "dense loss only (lam 1)": Variant({"lam": 1.0}),
    "1 slot": Variant(fields={"n_slots": 1}),
    "4 slots": Variant(fields={"n_slots": 4}),
    "64 slots": Variant(fields={"n_slots": 64}),
}


def options_of(run: Path) -> argparse.Namespace:
    """train.py's options for a memory on the backbone of a finished run."""
    seed = load_checkpoint(run / "memory.pt")["settings"]["seed"]
    return train.arguments(["--seed", seed])


def ablate(folder: Path, name: str, device: torch.device) -> None:
    variant = VARIANTS[name]
    args = options_of(folder)
    for key, value in variant.options.items():
        if key == "iters":                             # so many times the steps
            value *= args.iters
        setattr(args, key, value)
    backbone = load_backbone(folder / "backbone", device=device)
    tokenizer = tiny_tokenizer(train.WORDS)
    texts = train.find_texts(args)
    examples = train.tokenise(texts, tokenizer, backbone.config.eos_id, args.max_length)
    gen_length = PROTOCOLS["dial"].settings["gen_length"]
    run = train.Run(args, folder, examples, gen_length, Processes(0, 1), device)

    torch.manual_seed(args.seed)
    memory = variant.kind(replace(preset(backbone), **variant.fields))
    if variant.change:
        variant.change(memory)
    memory.to(device)
    before = [p.detach().clone() for p in memory.parameters()]
    if variant.trained:
        path = folder / "ablations" / f"{name}.pt"
        train.fit_memory(run, backbone, memory, path, variant.carry)
    else:
        memory.load_state_dict(load_checkpoint(folder / "memory.pt")["model"])
    # what no gradient reaches stays as it was; a gradient of zero leaves it to weight decay
    trained = [p for p, b in zip(memory.parameters(), before) if not torch.equal(p, b)]

    bench = Bench(backbone, tokenizer, dial_problems("valid", 1000), gen_length)
    who = Contestant(memory, variant.carry)
    row = {"name": name, "parameters": sum(p.numel() for p in trained)}
    for n in PASSES:
        found = bench.score(who, think=n - 1, steps=1)
        row[f"N = {n}"] = float(np.mean([r["whole"] for r in found]))
    for steps in QUOTAS:
        found = bench.score(who, steps=steps)
        row[f"{steps} steps"] = float(np.mean([r["correct"] for r in found]))
    with open(folder / "ablations.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def print_runs(runs: list[Path]) -> None:
    """One row a variant: mean over the runs, and the lowest and highest where there are more."""
    rows = {}                          # the last one of a variant in each run
    for run in runs:
        for line in (run / "ablations.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(row["name"], {})[run] = row
    columns = [*(f"N = {n}" for n in PASSES), *(f"{steps} steps" for steps in QUOTAS)]
    print(f"| variant | trained parameters | {' | '.join(columns)} | runs |")
    print("|---" * (len(columns) + 3) + "|")
    for name, by_run in rows.items():
        found = list(by_run.values())
        cells = [spread([100 * row[column] for row in found]) for column in columns]
        print(f"| {name} | {found[0]['parameters']:,} | {' | '.join(cells)} | {len(found)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    parser.add_argument("--table", nargs="*", type=Path, help="print the table of RUN and these")
    args = parser.parse_args()
    unknown = [name for name in args.variants if name not in VARIANTS]
    if unknown:
        parser.error(f"{unknown[0]!r} is none of: {', '.join(VARIANTS)}")
    if args.table is not None:
        return print_runs([args.run, *args.table])
    device, _ = start_device(args.device)
    for name in args.variants or VARIANTS:
        ablate(args.run, name, device)


if __name__ == "__main__":
    run_program(main, if_interrupted="finished variants are in ablations.jsonl")
