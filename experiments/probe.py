"""What the slots know: python experiments/probe.py out/tiny

After every pass over an answer of nothing but masks a linear probe (ridge regression on one-hot
values, 4,000 training problems) reads the result of each press from all slots together. Printed is
its accuracy on 1,000 validation problems, with the memory kept and, as a control, reset before
every pass; chance is 10 %. Then the loss of every unrolled step on the validation problems, and
how many whole answers stay right over many more passes than the memory was trained for.
"""
import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402
from diffusion import CARRY, Pass, generate  # noqa: E402
from eval_gsm8k import (PRESSES, PROTOCOLS, Bench, Contestant, dial_problems,  # noqa: E402
                        prompt_ids)
from metastate import MetaState, load_checkpoint, load_memory  # noqa: E402
from model import Backbone, Tokenizer, load_backbone, load_tokenizer  # noqa: E402
from sample import run_program  # noqa: E402

PASSES = 6
MANY_PASSES = (5, 10, 20, 30, 50, 100, 256)


def record(backbone: Backbone, memory: MetaState, tokenizer: Tokenizer, split: str, n: int,
           carry: str) -> tuple[list[Tensor], Tensor]:
    """The slots after each pass, (n, M * d), and the results of every press, (n, PRESSES)."""
    problems = dial_problems(split, n)
    prompts = [prompt_ids(tokenizer, PROTOCOLS["dial"], p, []) for p in problems]
    slots = []

    def on_step(canvas: Tensor, found: Pass) -> None:
        slots.append(found.slots.flatten(1))

    generate(backbone, torch.tensor(prompts), memory=memory, carry=carry, on_step=on_step,
             gen_length=PROTOCOLS["dial"].settings["gen_length"], think=PASSES - 1, steps=1)
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
    run = parser.parse_args().run
    backbone, tokenizer = load_backbone(run / "backbone"), load_tokenizer(run / "backbone")
    memory = load_memory(run / "memory.pt", backbone)
    print(f"| pass | memory | {' | '.join(f'result {i + 1}' for i in range(PRESSES))} |")
    print("|---" * (PRESSES + 2) + "|")
    for carry in ("keep", "reset"):
        slots, results = record(backbone, memory, tokenizer, "train", 4000, carry)
        test_slots, want = record(backbone, memory, tokenizer, "valid", 1000, carry)
        for n, (x, x_test) in enumerate(zip(slots, test_slots), 1):
            right = [(probe(x, results[:, i], x_test) == want[:, i]).float().mean()
                     for i in range(PRESSES)]
            print(f"| {n} | {carry} | {' | '.join(f'{100 * r:.0f} %' for r in right)} |")

    K = int(load_checkpoint(run / "memory.pt")["settings"]["K"])
    texts = [train.read_text(p) for p in dial_problems("valid", 1000)]
    examples = train.tokenise(texts, tokenizer, backbone.config.eos_id, max_length=64)
    batches = train.Batches(examples, 1000, seed=0, pad_id=backbone.config.pad_id, K=K, alpha=1.0,
                            confident=1.0, think=0,
                            answer_length=PROTOCOLS["dial"].settings["gen_length"])
    batch = batches(0, slice(None), torch.device("cpu"))
    print(f"\n| loss of step | {' | '.join(str(k + 1) for k in range(K))} |")
    print("|---" * (K + 1) + "|")
    for carry in CARRY:
        _, dense = train.memory_loss(backbone, lam=0.5, carry=carry)(memory, batch)
        print(f"| {carry} | {' | '.join(f'{x:.3f}' for x in dense.tolist())} |")

    bench = Bench(backbone, tokenizer, dial_problems("valid", 200),
                  PROTOCOLS["dial"].settings["gen_length"])
    rows = bench.score(Contestant(memory, "keep"), look_at=MANY_PASSES, think=max(MANY_PASSES) - 1,
                       steps=1)
    print(f"\n| passes without a word | {' | '.join(map(str, MANY_PASSES))} |")
    print("|---" * (len(MANY_PASSES) + 1) + "|")
    whole = [[row["whole"] for row in rows if row["passes"] == n] for n in MANY_PASSES]
    cells = [f"{100 * sum(values) / len(values):.1f}" for values in whole]
    print(f"| whole answers right (%) | {' | '.join(cells)} |")


if __name__ == "__main__":
    run_program(main, if_interrupted="nothing is kept")
