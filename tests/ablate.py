"""Which part of the memory matters: python tests/ablate.py out/tiny [VARIANT ...]

Trains variants of the memory, one change each, on the frozen backbone of a finished run with the
settings of train.py, and appends accuracy on the validation problems to RUN/ablations.jsonl.
--table prints what is there, mean and range over the runs given.
"""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402
from eval_gsm8k import PROTOCOLS, dial_problems, evaluate  # noqa: E402
from metastate import MetaState, load_checkpoint, preset  # noqa: E402
from model import load_backbone, tiny_tokenizer  # noqa: E402


class Overwrite(torch.nn.Module):
    """No Updater: a slot becomes what the Mixer read."""

    def forward(self, slots, read, time):
        return torch.tanh(read), torch.ones_like(read)


def overwrite(memory: MetaState) -> None:
    memory.updater = Overwrite()


def timeless(memory: MetaState) -> None:
    memory.time.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))


def unanchored(memory: MetaState) -> None:
    torch.nn.init.zeros_(memory.sharpness).requires_grad_(False)


def gate_bias(value: float, memory: MetaState) -> None:
    torch.nn.init.constant_(memory.updater.from_read.bias[:memory.config.d_slot], value)


# name: options of train.py, fields of MemoryConfig, a change to the new memory
VARIANTS = {
    "default": ({}, {}, None),
    **{f"K = {K}": ({"K": K}, {}, None) for K in (1, 2, 3, 4, 5)},
    "detached between steps": ({"carry": "detach"}, {}, None),
    "memoryless (reset)": ({"carry": "reset"}, {}, None),
    "no Updater (overwrite)": ({}, {}, overwrite),
    "update gates biased to keep (-1)": ({}, {}, partial(gate_bias, -1.0)),
    "an update in every step of sampling": ({}, {"n_updates": None}, None),
    "written after the layer": ({}, {"write_layer": 1}, None),
    "read before the layer": ({}, {"read_layer": 0}, None),
    "no time conditioner": ({}, {}, timeless),
    "slots not anchored": ({}, {}, unanchored),
    "random reveal order": ({"confident": 0.0}, {}, None),
    "half of the rows in random order": ({"confident": 0.5}, {}, None),
    "reveal loss only (lam 0)": ({"lam": 0.0}, {}, None),
    "dense loss only (lam 1)": ({"lam": 1.0}, {}, None),
    **{f"{n} slot{'s' * (n > 1)}": ({}, {"n_slots": n}, None) for n in (1, 4, 64)},
}


def ablate(run: Path, name: str) -> None:
    options, fields, change = VARIANTS[name]
    sys.argv = ["train.py", "--seed", load_checkpoint(run / "memory.pt")["settings"]["seed"]]
    args = train.arguments()
    for key, value in options.items():
        setattr(args, key, value)
    backbone, tokenizer = load_backbone(run / "backbone"), tiny_tokenizer()
    c = backbone.config
    torch.manual_seed(args.seed)
    memory = MetaState(replace(preset(backbone), **{"n_updates": args.K, **fields}))
    if change:
        change(memory)
    examples = train.read_examples(list(enumerate(dial_problems("train", 30_000))), "", tokenizer, c.eos_id,
                                   args.max_length)
    batches = train.Batches(examples, args.batch, seed=args.seed, pad_id=c.pad_id, K=args.K,
                            alpha=args.alpha, confident=args.confident,
                            answer_length=PROTOCOLS["dial"].settings["gen_length"])
    path = run / "ablations" / f"{name}.pt"
    train.fit(memory, partial(train.memory_loss, backbone=backbone, lam=args.lam, carry=args.carry), batches,
              path, {"settings": {}}, args, args.iters, args.lr)
    memory.eval()
    problems = dial_problems("valid", 1000)
    carry = "reset" if args.carry == "reset" else "keep"
    row = {steps: float(np.mean([r["correct"] for r in evaluate(
        backbone, tokenizer, problems, PROTOCOLS["dial"], memory=memory, carry=carry, batch_size=250,
        steps=steps)])) for steps in train.EVAL_STEPS}
    with open(run / "ablations.jsonl", "a") as file:
        file.write(json.dumps({"name": name, "accuracy": row}) + "\n")


def table(runs: list[Path]) -> None:
    rows = [json.loads(line) for run in runs for line in (run / "ablations.jsonl").read_text().splitlines()]
    head = [f"{steps} steps" for steps in train.EVAL_STEPS]
    print(f"| variant | {' | '.join(head)} | runs |\n" + "|---" * (len(head) + 2) + "|")
    for name in VARIANTS:
        found = [row["accuracy"] for row in rows if row["name"] == name]
        if found:
            cells = []
            for steps in train.EVAL_STEPS:
                x = [100 * accuracy[str(steps)] for accuracy in found]
                cells.append(f"{np.mean(x):.1f}" + (f" ({min(x):.1f}-{max(x):.1f})" if len(x) > 1 else ""))
            print(f"| {name} | {' | '.join(cells)} | {len(found)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"of: {', '.join(VARIANTS)}")
    parser.add_argument("--table", nargs="*", type=Path, help="print the table of RUN and these runs")
    args = parser.parse_args()
    if args.table is not None:
        return table([args.run, *args.table])
    for name in args.variants or VARIANTS:
        ablate(args.run, name)


if __name__ == "__main__":
    main()
