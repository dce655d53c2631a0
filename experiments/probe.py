"""What the slots know: python experiments/probe.py out/tiny

After every pass over an answer of nothing but masks a linear probe (ridge regression on one-hot
values, 4,000 training problems) reads the result of each press from all slots together. Printed is
its accuracy on 1,000 validation problems, with the memory kept and, as controls, reset before every
pass, and not trained at all; chance is 10 %. Then the loss of every unrolled step on the validation
problems; how many answers are right that are written but for their five digits, after N passes; and
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
from metastate import MetaState, load_checkpoint, load_memory, preset  # noqa: E402
from model import Backbone, Tokenizer, load_backbone, load_tokenizer  # noqa: E402
from sample import Processes, run_program  # noqa: E402

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


def digits_right(backbone: Backbone, memory: MetaState | None, tokenizer: Tokenizer, n_passes: int
                 ) -> float:
    """The words of an answer are given, its five digits are written at once after n_passes: the
    share of 1,000 validation problems where all five are right."""
    problems = dial_problems("valid", 1000)
    gen_length = PROTOCOLS["dial"].settings["gen_length"]
    digits = {tokenizer.encode(f" {digit}")[0] for digit in range(10)}
    prompts = [prompt_ids(tokenizer, PROTOCOLS["dial"], p, []) for p in problems]
    answers = []
    for p in problems:
        ids = tokenizer.encode(p["answer"])
        answers.append(ids + [backbone.config.eos_id] * (gen_length - len(ids)))
    answers = torch.tensor(answers)                                    # (n, gen_length)
    is_digit = torch.isin(answers, torch.tensor(list(digits)))
    blanked = answers.masked_fill(is_digit, backbone.config.mask_id)
    canvas = generate(backbone, torch.cat((torch.tensor(prompts), blanked), 1), memory=memory,
                      answer_start=len(prompts[0]), gen_length=0, think=n_passes - 1, steps=1)
    written = canvas[:, len(prompts[0]):]
    return (written == answers).all(1).float().mean().item()


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
    torch.manual_seed(0)
    untrained = MetaState(preset(backbone))
    for label, who, carry in (("kept", memory, "keep"), ("reset", memory, "reset"),
                              ("untrained", untrained, "keep")):
        slots, results = record(backbone, who, tokenizer, "train", 4000, carry)
        test_slots, want = record(backbone, who, tokenizer, "valid", 1000, carry)
        for n, (x, x_test) in enumerate(zip(slots, test_slots), 1):
            right = [(probe(x, results[:, i], x_test) == want[:, i]).float().mean()
                     for i in range(PRESSES)]
            print(f"| {n} | {label} | {' | '.join(f'{100 * r:.0f} %' for r in right)} |")

    K = int(load_checkpoint(run / "memory.pt")["settings"]["K"])
    texts = [train.read_text(p) for p in dial_problems("valid", 1000)]
    examples = train.tokenise(texts, tokenizer, backbone.config.eos_id, max_length=64)
    args = argparse.Namespace(seed=0, K=K, alpha=1.0, confident=1.0, think=0)
    gen_length = PROTOCOLS["dial"].settings["gen_length"]
    device = torch.device("cpu")
    training = train.Run(args, run, examples, gen_length, Processes(0, 1), device)
    batch = train.Batches(training, 1000, backbone.config.pad_id)(0, slice(None), device)
    print(f"\n| loss of step | {' | '.join(str(k + 1) for k in range(K))} |")
    print("|---" * (K + 1) + "|")
    for carry in CARRY:
        _, dense = train.memory_loss(backbone, lam=0.5, carry=carry)(memory, batch)
        print(f"| {carry} | {' | '.join(f'{x:.3f}' for x in dense.tolist())} |")

    print("\n| words given, N = | 1 | 2 | 3 | 4 | 5 | 6 | 10 |\n|---|---|---|---|---|---|---|---|")
    for label, who in (("MetaState", memory), ("frozen", None)):
        right = [digits_right(backbone, who, tokenizer, n) for n in (1, 2, 3, 4, 5, 6, 10)]
        print(f"| {label} | {' | '.join(f'{100 * r:.1f}' for r in right)} |")

    bench = Bench(backbone, tokenizer, dial_problems("valid", 200), gen_length)
    cells = []
    for n in MANY_PASSES:
        rows = bench.score(Contestant(memory, "keep"), think=n - 1, steps=1)
        cells.append(f"{100 * sum(row['whole'] for row in rows) / len(rows):.1f}")
    print(f"\n| passes without a word | {' | '.join(map(str, MANY_PASSES))} |")
    print("|---" * (len(MANY_PASSES) + 1) + "|")
    print(f"| whole answers right (%) | {' | '.join(cells)} |")


if __name__ == "__main__":
    run_program(main, if_interrupted="nothing is kept")
