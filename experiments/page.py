"""An answer, pass by pass, as a page: python experiments/page.py FILE.html [--think 4 --steps 1]

One prompt is answered with and without memory, and every pass of both is put into the template
assets/page.html: one file that loads nothing from elsewhere. Options are those of sample.py.
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
from eval_gsm8k import extract, is_correct
from metastate import MetaState
from model import Tokenizer, ensure, write_atomically
from sample import (ASSETS, EXAMPLES, SAMPLING_DEFAULTS, Models, add_model_options,
                    add_sampling_options, choose_models, dial_answer, open_models, prompt_ids,
                    run_program, sampling_settings, start_device, warn_of_length)

KNOWN = {EXAMPLES["llada"]: "48"}      # what is right


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of every token. A character of several tokens, an emoji for example, stands at its
    last one; control tokens have no text."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return ["" if i in tokenizer.hidden else decoder.decode(tokenizer.token_bytes(i)) for i in ids]


def rounded(values: Tensor) -> list[float]:
    return [round(x, 3) for x in values.nan_to_num().tolist()]


class Recorder:
    """Keeps what happens to the first sample, pass by pass, as the page wants it."""

    def __init__(self, models: Models, memory: MetaState | None, n_prompt: int,
                 answer: str | None, remasking: str):
        self.tokenizer = models.tokenizer
        self.mask_id = models.backbone.config.mask_id
        self.slots = memory.initial(1)[0] if memory else None          # (M, d)
        self.part = slice(n_prompt, None)              # the answer's columns
        self.answer = answer
        self.remasking = remasking
        self.passes: list[dict] = []

    def on_step(self, canvas: Tensor, report: Report) -> None:
        guess = report.guess[0, self.part].tolist()
        strength = report.confidence[0]                                # (T,)
        if self.remasking == "entropy":    # below 0; its exponential is like a probability
            strength = strength.exp() * report.eligible[0]
        text = self.tokenizer.answer(guess)
        self.passes.append({
            "texts": token_texts(self.tokenizer, guess),
            "masked": (canvas[0, self.part] == self.mask_id).tolist(),
            "revealed": report.revealed[0, self.part].tolist(),
            "strength": rounded(strength[self.part]),
            "change": [] if self.slots is None else self.slot_changes(report.slots[0]),
            "right": self.answer and is_correct(text, self.answer, "numeric"),
        })

    def slot_changes(self, slots: Tensor) -> list[float]:
        """By how much each slot (M, d) has changed since the last call, against its length."""
        change = (slots - self.slots).norm(dim=-1) / self.slots.norm(dim=-1)       # (M,)
        self.slots = slots
        return rounded(change)


def write_page(path: Path, content: dict) -> None:
    """The template with the content in it, as one file."""
    template = (ASSETS / "page.html").read_text("utf-8")
    text = json.dumps(content).replace("<", "\\u003c")         # no text can end the script
    write_atomically(path, template.replace('"CONTENT"', text, 1).encode())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, metavar="FILE.html")
    add_model_options(parser)
    add = parser.add_argument_group("text").add_argument
    add("--prompt", help="what the user says (default: an example)")
    add("--answer", help="its number is right (default: of a dial problem or an example)")
    add_sampling_options(parser, "the model's own")
    return parser.parse_args()


def main() -> None:
    # 1. what can be wrong without a model
    args = arguments()
    choice = choose_models(args)
    prompt = EXAMPLES[choice.kind] if args.prompt is None else args.prompt
    known = args.answer or KNOWN.get(prompt) or dial_answer(prompt)
    answer = known and extract(known, "numeric")
    ensure(answer != "[invalid]", f"--answer {args.answer!r} holds no number; give the one that is "
           "right")
    defaults = {"remasking": Sampling.remasking, **SAMPLING_DEFAULTS[choice.kind]}
    settings = sampling_settings(args, defaults)

    # 2. the answer with the memory, and without it
    device, _ = start_device(args.device, choice.kind)
    models = open_models(choice, args, device)
    ids = torch.tensor([prompt_ids(models.tokenizer, prompt, choice.chat)], device=device)
    n_prompt = ids.shape[1]
    warn_of_length(models.backbone.config, n_prompt + settings["gen_length"])
    runs = []
    for memory in [models.memory, None] if models.memory else [None]:
        recorder = Recorder(models, memory, n_prompt, answer, settings["remasking"])
        generate(models.backbone, ids, memory=memory, seeds=[args.seed], on_step=recorder.on_step,
                 **settings)
        runs.append({"name": "with memory" if memory else "without memory",
                     "right": recorder.passes[-1]["right"], "passes": recorder.passes})

    # 3. the page
    memory_name = choice.memory_path and "/".join(choice.memory_path.parts[-2:])
    about = {"memory": memory_name, "seed": args.seed, **settings}
    about = ", ".join([choice.name, *(f"{key} {value}" for key, value in about.items())])
    write_page(args.page, {"prompt": prompt, "answer": answer, "about": about,
                           "think": settings.get("think", 0), "runs": runs})
    print(f"{args.page}: open it in a browser", file=sys.stderr)


if __name__ == "__main__":
    run_program(main, if_interrupted="nothing is kept, the same command begins again")
