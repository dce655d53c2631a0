"""What a memory does, as a page: python experiments/page.py FILE.html

The frozen model without and with its memory, every pass of both, in one file that loads nothing:
the template assets/page.html with what was recorded in it. It holds some dozens of the built-in
problems to choose from, or one prompt of your own. Options are those of sample.py.
"""
import argparse
import codecs
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

import shared  # noqa: F401

from diffusion import Report, Sampling, generate
from metastate import MetaState
from model import Tokenizer, ensure, write_atomically
from sample import (ASSETS, DIAL_LENGTH, EXAMPLES, SAMPLING_DEFAULTS, Models, add_model_options,
                    add_sampling_options, choose_models, dial_answer, dial_problems, open_models,
                    prompt_ids, run_program, sampling_settings, slot_changes, start_device,
                    warn_of_length)

N_PROBLEMS = 40                        # beside the prompt, kept out of training
MAX_BYTES = 300_000                    # of the page; where they do not fit it has fewer problems
DEFAULTS = SAMPLING_DEFAULTS | {"tiny": dict(gen_length=DIAL_LENGTH, think=4, steps=1)}
UNSEEN = "\u2591"                      # a mask that a pass does not look at: a later block


def token_texts(tokenizer: Tokenizer, ids: list[int], mask_id: int) -> list[str]:
    """The text of every token. A character of several tokens, an emoji for example, stands at its
    last one; control tokens have no text."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    hidden = dict.fromkeys(tokenizer.hidden, "") | {mask_id: UNSEEN}
    return [hidden[i] if i in hidden else decoder.decode(tokenizer.token_bytes(i)) for i in ids]


class Recorder:
    """Keeps every pass over every row, as the page wants it."""

    def __init__(self, models: Models, memory: MetaState | None, ids: Tensor, words: dict):
        self.tokenizer = models.tokenizer
        self.mask_id = models.backbone.config.mask_id
        self.n_rows, self.n_prompt = ids.shape
        self.slots = memory.initial(self.n_rows) if memory else None   # (B, M, d)
        self.words = words             # text -> its number, of all runs
        self.rows: list[list[dict]] = [[] for _ in ids]

    def on_step(self, canvas: Tensor, report: Report) -> None:
        state = torch.where(canvas == self.mask_id, 0, 2).masked_fill(report.revealed, 1)  # (B, T)
        change = self.changes(report.slots)                            # B lists of M
        for b, passes in enumerate(self.rows):
            if not report.eligible[b].any():
                continue               # it is done, and waits for other rows
            guess = report.guess[b, self.n_prompt:].tolist()
            texts = token_texts(self.tokenizer, guess, self.mask_id)
            passes.append({
                "guess": [self.words.setdefault(text, len(self.words)) for text in texts],
                "state": "".join(map(str, state[b, self.n_prompt:].tolist())),
                "change": change[b],
            })

    def changes(self, slots: Tensor | None) -> list[list[float]]:
        """Those of the slots (B, M, d) since the last call."""
        if self.slots is None:
            return [[]] * self.n_rows
        slots = slots[:self.n_rows]    # with guidance, those that see the prompt
        change = slot_changes(self.slots, slots)                       # (B, M)
        self.slots = slots
        return [[round(x, 2) for x in row] for row in change.tolist()]


def filled(content: dict) -> bytes:
    """The template with the content in it."""
    template = (ASSETS / "page.html").read_text("utf-8")
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")  # ends no script
    return template.replace('"CONTENT"', text, 1).encode()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, metavar="FILE.html")
    add_model_options(parser)
    parser.add_argument("--prompt", help="what the user says (default: an example)")
    add_sampling_options(parser, "the model's own, tiny with --think 4 --steps 1")
    return parser.parse_args()


def main() -> None:
    # 1. what can be wrong without a model
    args = arguments()
    choice = choose_models(args)
    ensure(choice.memory_path, "the page shows what a memory does; give one by --init or --memory")
    prompt = EXAMPLES[choice.kind] if args.prompt is None else args.prompt
    answer = dial_answer(prompt) if choice.kind == "tiny" else None
    asked = [{"question": prompt, "answer": answer}]
    asked += dial_problems("valid", N_PROBLEMS if answer else 0)
    settings = sampling_settings(args, {"remasking": Sampling.remasking, **DEFAULTS[choice.kind]})

    # 2. every pass, without the memory and with it
    device, _ = start_device(args.device, choice.kind)
    models = open_models(choice, args, device)
    tokenizer, c = models.tokenizer, models.backbone.config
    rows = [prompt_ids(tokenizer, one["question"], choice.chat) for one in asked]
    ids = torch.tensor(rows, device=device)                            # (B, P), equally long
    warn_of_length(c, ids.shape[1] + settings["gen_length"])
    words, runs = {}, []
    for memory in (None, models.memory):
        recorder = Recorder(models, memory, ids, words)
        generate(models.backbone, ids, memory=memory, seeds=[args.seed] * len(ids),
                 on_step=recorder.on_step, **settings)
        runs.append(recorder.rows)

    # 3. the page
    about = {"memory": "/".join(choice.memory_path.parts[-2:]), "seed": args.seed, **settings}
    about = ", ".join([choice.name, *(f"{key} {value}" for key, value in about.items())])
    problems = []
    for one, bare, whole in zip(asked, *runs):
        right = answer and token_texts(tokenizer, tokenizer.encode(one["answer"]), c.mask_id)
        problems.append({"prompt": one["question"], "right": right, "without": bare, "with": whole})
    content = {"about": about, "words": list(words), "problems": problems}
    while len(filled(content)) > MAX_BYTES and len(problems) > 1:
        problems.pop()
    write_atomically(args.page, filled(content))
    print(f"{args.page}: open it in a browser", file=sys.stderr)


if __name__ == "__main__":
    run_program(main, if_interrupted="nothing is kept, the same command begins again")
