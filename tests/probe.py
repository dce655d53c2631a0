"""What the slots know: python tests/probe.py out/tiny

After every denoising step a linear probe (ridge regression on one-hot values, 4,000 training
problems) reads the result of each press from all slots together. Printed is its accuracy on those
of 1,000 validation problems where that result is not revealed yet, with the memory kept and, as a
control, reset before every step; chance is 10 %. Beside it the mean update gate of the step. Then
the loss of every unrolled step on the validation problems, with the memory kept, reset, shuffled.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402
from diffusion import generate  # noqa: E402
from eval_gsm8k import PRESSES, PROTOCOLS, dial_problems, prompt_ids  # noqa: E402
from metastate import MetaState, load_checkpoint, load_memory  # noqa: E402
from model import Backbone, Config, Tokenizer, load_backbone, tiny_tokenizer  # noqa: E402

PLACES = [2 + 4 * i for i in range(PRESSES)]           # of the results in the answer


def record(backbone: Backbone, memory: MetaState, tokenizer: Tokenizer, split: str, n: int, carry: str
           ) -> tuple[list, list, list, torch.Tensor]:
    """By step: slots (n, M * d), which results are masked (n, PRESSES), gate; and the results."""
    slots, masked, gates, problems = [], [], [], dial_problems(split, n)

    def on_step(canvas, revealed, confidence, trace):
        masked.append((canvas == backbone.config.mask_id)[:, prompts.shape[1]:][:, PLACES])
        gates.append(trace[0]["update_gate"].mean().item())

    prompts = torch.tensor([prompt_ids(tokenizer, PROTOCOLS["dial"], p, []) for p in problems])
    handle = memory.updater.register_forward_hook(lambda module, inputs, output: slots.append(output[0].flatten(1)))
    generate(backbone, prompts, memory=memory, carry=carry, on_step=on_step, **PROTOCOLS["dial"].settings)
    handle.remove()
    results = [[int(hop[-1]) for hop in p["answer"].split(".")[0].split(",")] for p in problems]
    return slots, masked, gates, torch.tensor(results)


def probe(x: torch.Tensor, y: torch.Tensor, x_test: torch.Tensor) -> torch.Tensor:
    """Predicted classes of x_test (N, D), by ridge regression of one-hot y on x."""
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x, x_test = ((z - mean) / scale for z in (x, x_test))
    target = torch.nn.functional.one_hot(y, 10).float() - 0.1
    weights = torch.linalg.solve(x.T @ x + len(x) * 0.01 * torch.eye(x.shape[1]), x.T @ target)
    return (x_test @ weights).argmax(1)


def validation(c: Config, tokenizer: Tokenizer, K: int) -> dict[str, torch.Tensor]:
    """The validation problems as one batch of unroll, rows by confidence."""
    examples = train.read_examples(list(enumerate(dial_problems("valid", 1000))), "", tokenizer, c.eos_id, 64)
    batches = train.Batches(examples, 1000, seed=0, pad_id=c.pad_id, K=K, alpha=1.0, confident=1.0,
                            answer_length=PROTOCOLS["dial"].settings["gen_length"])
    return batches(0, slice(None), torch.device("cpu"))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    backbone, tokenizer = load_backbone(run / "backbone"), tiny_tokenizer()
    memory, K = load_memory(run / "memory.pt", backbone), int(load_checkpoint(run / "memory.pt")["settings"]["K"])
    head = " | ".join(f"result {i + 1}" for i in range(PRESSES))
    print(f"| after step | memory | {head} | gate |\n|---|---|{'---|' * PRESSES}---|")
    for carry in ("keep", "reset"):
        slots, _, _, results = record(backbone, memory, tokenizer, "train", 4000, carry)
        test_slots, masked, gates, want = record(backbone, memory, tokenizer, "valid", 1000, carry)
        for k, (x, x_test, hidden, gate) in enumerate(zip(slots, test_slots, masked, gates)):
            cells = []
            for i in range(PRESSES):
                right = (probe(x, results[:, i], x_test) == want[:, i])[hidden[:, i]]
                cells.append(f"{100 * right.float().mean():.0f} %" if len(right) > 50 else "revealed")
            print(f"| {k + 1} | {carry} | {' | '.join(cells)} | {gate:.2f} |")
    print(f"\n| loss of step | {' | '.join(str(k + 1) for k in range(K))} |\n|{'---|' * (K + 1)}")
    batch = validation(backbone.config, tokenizer, K)
    for carry in ("keep", "reset", "shuffle"):
        _, dense = train.memory_loss(memory, backbone=backbone, lam=0.5, carry=carry, **batch)
        print(f"| {carry} | {' | '.join(f'{x:.3f}' for x in dense.tolist())} |")


if __name__ == "__main__":
    main()
