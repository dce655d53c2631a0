"""The README's moving picture: python experiments/picture.py [RUN] [--out assets/thinking.svg]

The same frozen model, pass by pass over an answer of nothing but masks, without a memory and with
it: what it would write if it had to, its digits green where they are right. RUN: a run's folder
(default: assets/tiny). An animated SVG, a second and a half a pass.
"""
import argparse
import sys
from html import escape
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from diffusion import Report, generate  # noqa: E402
from metastate import MetaState, load_memory  # noqa: E402
from model import Backbone, Tokenizer, load_backbone, load_tokenizer, write_atomically  # noqa: E402
from sample import DIAL_LENGTH, EXAMPLES, dial_answer, prompt_ids, run_program  # noqa: E402

QUESTION = EXAMPLES["tiny"]
PASSES = 6
SECONDS = 1.5                          # a pass
WIDTH, CHARACTER, ROW = 760, 10.2, 30  # pixels
COLORS = {"right": "#15803d", "wrong": "#b91c1c", "word": "#6b7280"}


def guesses(backbone: Backbone, tokenizer: Tokenizer, memory: MetaState | None) -> list[list[str]]:
    """The tokens of the answer that each pass would write."""
    prompt = torch.tensor([prompt_ids(tokenizer, QUESTION, chat=True)])
    found = []

    def keep(canvas: torch.Tensor, report: Report) -> None:
        ids = report.guess[0, prompt.shape[1]:].tolist()
        found.append([tokenizer.decode([i], skip_special=True) for i in ids])

    generate(backbone, prompt, memory=memory, on_step=keep, gen_length=DIAL_LENGTH,
             think=PASSES - 1, steps=1)
    return found


def text(x: float, y: float, content: str, color: str = "#111827", size: int = 17,
         weight: str = "normal", more: str = "") -> str:
    return (f'<text x="{x:.0f}" y="{y:.0f}" fill="{color}" font-size="{size}" '
            f'font-weight="{weight}" xml:space="preserve" {more}>{escape(content)}</text>')


def answer(tokens: list[str], right: list[str], y: float) -> str:
    """One answer as a row: words grey, digits green or red on a box."""
    parts = []
    x = 30.0
    for token, truth in zip(tokens, right):
        shown = token.replace("\n", " ")
        is_digit = truth.strip().isdigit()
        kind = ("right" if token == truth else "wrong") if is_digit else "word"
        if is_digit:
            parts.append(f'<rect x="{x + 8:.0f}" y="{y - 17:.0f}" width="15" height="23" rx="4" '
                         f'fill="{COLORS[kind]}" fill-opacity="0.18"/>')
        width = CHARACTER * len(truth.replace("\n", " "))      # whatever font there is
        parts.append(text(x, y, shown, COLORS[kind], weight="bold" if is_digit else "normal",
                          more=f'textLength="{width:.1f}"'))
        x += width
    return "".join(parts)


def shown_in(number: int, content: str) -> str:
    """Content that is there during one pass; the last one also where nothing moves."""
    values = ";".join("1" if n == number else "0" for n in range(PASSES))
    opacity = 1 if number == PASSES - 1 else 0
    return (f'<g opacity="{opacity}"><animate attributeName="opacity" values="{values}" '
            f'dur="{PASSES * SECONDS}s" calcMode="discrete" repeatCount="indefinite"/>'
            f'{content}</g>')


def picture(rows: dict[str, list[list[str]]], right: list[str]) -> str:
    sans = 'font-family="system-ui, sans-serif"'
    parts = [text(30, 36, "A memory lets a frozen diffusion model think before it writes", size=21,
                  weight="bold", more=sans),
             text(30, 66, QUESTION, COLORS["word"], size=16, more=sans)]
    y = 110.0
    for name, by_pass in rows.items():
        parts.append(text(30, y, name, size=17, weight="bold", more=sans))
        y += ROW
        for number, tokens in enumerate(by_pass):
            n_right = sum(a == b and b.strip().isdigit() for a, b in zip(tokens, right))
            count = text(WIDTH - 110, y - ROW, f"{n_right} of 5", COLORS["word"], more=sans)
            parts.append(shown_in(number, answer(tokens, right, y) + count))
        y += 1.7 * ROW
    for number in range(PASSES):
        label = f"pass {number + 1}: nothing is written yet, this is what it would write now"
        parts.append(shown_in(number, text(30, y, label, COLORS["word"], size=16, more=sans)))
    height = y + 20
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
            'font-family="ui-monospace, Menlo, Consolas, monospace">'
            f'<rect width="{WIDTH}" height="{height:.0f}" rx="10" fill="#ffffff"/>'
            f'{"".join(parts)}</svg>\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", default=ROOT / "assets" / "tiny")
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "thinking.svg")
    args = parser.parse_args()
    backbone = load_backbone(args.run / "backbone")
    tokenizer = load_tokenizer(args.run / "backbone")
    memory = load_memory(args.run / "memory.pt", backbone)
    right = [tokenizer.decode([i]) for i in tokenizer.encode(dial_answer(QUESTION))]
    rows = {"frozen model": guesses(backbone, tokenizer, None),
            "the same model with its memory": guesses(backbone, tokenizer, memory)}
    write_atomically(args.out, picture(rows, right).encode())
    print(f"{args.out} is written")


if __name__ == "__main__":
    run_program(main, if_interrupted="nothing is kept")
