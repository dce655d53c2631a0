"""Score GSM8K-style problems: python eval_gsm8k.py [--init llada] [--data test.jsonl]

Without arguments: the newest checkpoint on the built-in problems. Every answer is appended to a
JSONL file, which another run continues from; --compare A B pairs two such files. Prompts and
answer rules are those of lm-evaluation-harness (tasks gsm8k and gsm8k_cot).
"""
import argparse
import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from tqdm import tqdm

from diffusion import generate
from metastate import MetaState, model_arguments, open_models
from model import (Backbone, Tokenizer, blame, cache_folder, download, ensure, run_program,
                   start_device, write_atomically)

# The built-in problems: a dial shows a digit, and each button has a rule that takes every digit to
# another. The rules are fixed random permutations, so that nothing shortens the chain of look-ups.
BUTTONS = ["red", "blue", "gold", "green", "black", "white", "pink", "brown"]
RULES = [np.random.default_rng((7, i)).permutation(10).tolist() for i in range(len(BUTTONS))]
PRESSES = 4
SPLITS = {"test": (0, 1000), "valid": (1000, 2000), "train": (2000, 10 * len(BUTTONS) ** PRESSES)}

def dial_problems(split: str, n: int | None = None) -> list[dict[str, str]]:
    """The first n problems of a split, {question, answer}. All that exist stand in one fixed random
    order which the splits cut up: no question is in two of them."""
    order, problems = np.random.default_rng(13).permutation(SPLITS["train"][1]), []
    for number in order[slice(*SPLITS[split])][:n].tolist():
        number, digit = divmod(number, 10)
        pressed = [number // len(BUTTONS) ** i % len(BUTTONS) for i in range(PRESSES)]
        names = ", then press ".join(BUTTONS[i] for i in pressed)
        question, hops = f"The dial shows {digit}. Press {names}.", []
        for i in pressed:
            digit = RULES[i][digit]
            hops.append(f" {BUTTONS[i]} gives {digit}")
        problems.append({"question": question, "answer": f"{','.join(hops)}.\n#### {digit}"})
    return problems

@dataclass(frozen=True)
class Protocol:
    """How a problem is put, denoised and scored; settings go to diffusion.generate."""
    question: str                          # the text of one question
    rule: str                              # see extract
    stops: tuple[str, ...]                 # the answer ends at the first of these
    shots: int = 0                         # solved examples before it, from the train file
    chat: bool = False                     # all of it as one user turn of the chat template
    start: str = ""                        # control token before the text
    settings: dict = field(default_factory=dict)

PLAIN, COT, LONG = "Question: {}\nAnswer:", "Q: {}\nA:", dict(gen_length=256, steps=256)
STOPS, END = ("</s>", "<|im_end|>"), "<|endoftext|>"
PROTOCOLS = {
    "dial": Protocol("{}", "strict", (END,), chat=True, settings=dict(gen_length=20, steps=5)),
    # lm-eval gsm8k, 5-shot: LLaDA-Base
    "gsm8k": Protocol(PLAIN, "flexible", ("Question:", *STOPS), shots=5, settings=LONG),
    # lm-eval gsm8k_cot, 8-shot: Dream-Base (there with eight fixed examples of its own)
    "gsm8k-cot": Protocol(COT, "cot_strict", ("Q:", *STOPS, END), shots=8, start="<|beginoftext|>",
                          settings=dict(LONG, remasking="entropy", top_p=0.95)),
    # gsm8k_cot, zero-shot, chat template: Dream-Instruct
    "chat": Protocol(COT, "flexible", ("Q:", *STOPS, END), chat=True, settings=dict(
        LONG, remasking="entropy", temperature=0.1, top_p=0.9)),
    # lm-eval gsm8k, 5-shot in one user turn, as Fast-dLLM runs it: LLaDA-Instruct and 1.5
    "chat-few-shot": Protocol(PLAIN, "flexible", ("Question:", *STOPS), shots=5, chat=True,
                              settings=dict(LONG, block_length=32)),
}
DEFAULT_PROTOCOL = {"tiny": "dial", "llada-base": "gsm8k", "llada": "chat-few-shot",
                    "llada-1.5": "chat-few-shot", "dream-base": "gsm8k-cot", "dream": "chat"}
ANSWER_RULES = {                           # pattern, which match
    "strict": (r"#### (\-?[0-9\.\,]+)", 0),
    "cot_strict": (r"The answer is (\-?[0-9\.\,]+).", 0),
    "flexible": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
    "numeric": (r"-?\$?\d[\d,]*(?:\.\d+)?", -1),
}

def extract(text: str, rule: str) -> str:
    """The answer in a text, or "[invalid]". strict, cot_strict and flexible as lm-eval's filters
    strict-match (gsm8k, gsm8k_cot) and flexible-extract compute them; numeric: the last number."""
    pattern, which = ANSWER_RULES[rule]
    found = re.findall(pattern, text)
    if not found:
        return "[invalid]"
    return found[which] if isinstance(found[which], str) else next(filter(None, found[which]))

def is_correct(answer: str, gold: str, rule: str) -> bool:
    """Whether an extracted answer is that of the data set's full answer: as strings after lm-eval's
    deletions, or by the rule numeric as numbers, so that 18, 18.00, $18 and 18. are the same."""
    a, b = (re.sub(r"\.$", "", re.sub(r"(?s).*#### ", "", re.sub(r"[,$]", "", text))).lower()
            for text in (answer, gold))
    try:
        return a == b if rule != "numeric" else float(a) == float(b)
    except ValueError:
        return False

GSM8K = ("https://raw.githubusercontent.com/openai/grade-school-math/"
         "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/")
SHA256 = {"test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
          "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"}

def gsm8k_file(name: str) -> Path:
    """GSM8K's own file, fetched once."""
    path = cache_folder() / "gsm8k" / name
    if not path.exists():
        download(GSM8K + name, path, sha256=SHA256[name])
    return path

def read_jsonl(path: Path) -> list[tuple[int, dict]]:
    """(line number, object) for every line of a JSON-lines file; a bad one is named."""
    found = []
    with blame(path, "give a file of JSON lines in UTF-8"):
        lines = path.read_text("utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            with blame(f"{path} line {number}", "mend or remove it"):
                found.append((number, json.loads(line)))
            ensure(isinstance(found[-1][1], dict), f"{path} line {number} holds no JSON object")
    ensure(found, f"{path} is empty; give a file with one JSON object a line")
    return found

def read_problems(path: Path) -> list[dict[str, str]]:
    """GSM8K's form: question and answer, both text, on every line."""
    for number, p in (problems := read_jsonl(path)):
        ensure(isinstance(p.get("question"), str) and isinstance(p.get("answer"), str),
               f"{path} line {number} lacks the text question or answer; mend or remove it")
    return [p for _, p in problems]

def prompt_ids(tokenizer: Tokenizer, protocol: Protocol, problem: dict, shots: list) -> list[int]:
    """Token ids of a problem under a protocol, the solved examples before it."""
    parts = []
    for shot in shots:
        answer = shot["answer"]
        if protocol.question == COT:
            answer = re.sub("<<.*?>>", "", answer).replace("\n#### ", "\nThe answer is ") + "."
        parts.append(protocol.question.format(shot["question"]) + " " + answer)
    text = "\n\n".join(parts + [protocol.question.format(problem["question"])])
    if protocol.chat:
        return tokenizer.chat([{"role": "user", "content": text}])
    return tokenizer.encode(protocol.start) + tokenizer.encode(text, special=False)

def evaluate(backbone: Backbone, tokenizer: Tokenizer, problems: list[dict], protocol: Protocol, *,
             todo: list[int] | None = None, shots: list[dict] = (), memory: MetaState | None = None,
             carry: str = "keep", batch_size: int = 32, seed: int = 0, **given) -> Iterator[dict]:
    """Answer problems[i] for i in todo (default: all), yielding {index, text, answer, correct};
    given overrides its settings. No answer depends on its batch, but for carry="shuffle"."""
    device, pad = backbone.embedding.weight.device, backbone.config.pad_id
    todo = range(len(problems)) if todo is None else todo
    for first in range(0, len(todo), batch_size):
        batch = todo[first:first + batch_size]
        prompts = [prompt_ids(tokenizer, protocol, problems[i], shots) for i in batch]
        P = max(map(len, prompts))
        ids = torch.tensor([[pad] * (P - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts], device=device)
        out = generate(backbone, ids, attention_mask=None if mask.all() else mask, memory=memory,
                       carry=carry, seeds=[seed + i for i in batch], **(protocol.settings | given))
        for i, row in zip(batch, out[:, P:].tolist()):
            text = tokenizer.decode(row)
            for stop in protocol.stops:
                text = text.split(stop)[0]
            text = tokenizer.decode(tokenizer.encode(text), skip_special=True)
            answer = extract(text, protocol.rule)
            yield {"index": i, "text": text, "answer": answer,
                   "correct": is_correct(answer, problems[i]["answer"], protocol.rule)}

def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion."""
    p, z = right / n, 1.96
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

def paired_interval(a: list[bool], b: list[bool]) -> tuple[float, float, float]:
    """Mean of b - a on the same problems, and its 95 % bootstrap interval (10,000 resamples)."""
    difference = np.asarray(b, float) - np.asarray(a, float)
    values, counts = np.unique(difference, return_counts=True)
    draws = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), 10_000)
    return (difference.mean(), *np.quantile(draws @ values / counts.sum(), (0.025, 0.975)))

def read_results(path: Path) -> tuple[dict, dict[int, dict]]:
    """The setting that a results file was made with, and its results by problem. Lines that a kill
    cut short are passed over; their problems are answered again."""
    rows = []
    with blame(path, "give a file of results that eval_gsm8k.py wrote"):
        for line in path.read_bytes().split(b"\n"):
            with suppress(ValueError):
                rows.append(json.loads(line))
        return rows[0]["setting"], {row["index"]: row for row in rows[1:]}

def compare(a: Path, b: Path) -> None:
    """Print the paired difference of two results files on the problems that both have."""
    (_, first), (_, second) = read_results(a), read_results(b)
    both = first.keys() & second.keys()
    ensure(both, f"{a} and {b} have no problem in common; compare runs on the same data")
    x, y = ([rows[i]["correct"] for i in both] for rows in (first, second))
    difference, low, high = (100 * value for value in paired_interval(x, y))
    print(f"{len(both)} problems: {np.mean(x):.1%} -> {np.mean(y):.1%}, {difference:+.1f} points "
          f"[{low:+.1f}, {high:+.1f}] (95 %, paired)")

SAMPLING = {"steps": int, "gen_length": int, "block_length": int, "temperature": float,
            "threshold": float, "remasking": str}

def run(args: argparse.Namespace) -> None:
    """Answer what is not answered yet, every process its share, and print the score."""
    device, rank, world = start_device(args.device)
    backbone, tokenizer, memory, names = open_models(args, device)
    kind = backbone.config.kind
    name = args.protocol or DEFAULT_PROTOCOL.get(names["init"], DEFAULT_PROTOCOL[kind])
    protocol = PROTOCOLS[name] if args.rule is None else replace(PROTOCOLS[name], rule=args.rule)
    problems = (dial_problems("test") if args.data is None and kind == "tiny"
                else read_problems(args.data or gsm8k_file("test.jsonl")))[:args.limit]
    shots = []
    if protocol.shots:
        near = args.data and args.data.with_name("train.jsonl")
        shots = read_problems(near if near and near.exists() else gsm8k_file("train.jsonl"))
    given = {key: getattr(args, key) for key in SAMPLING if getattr(args, key) is not None}
    setting = {**names, "data": str(args.data), "problems": len(problems), "protocol": name,
               "rule": protocol.rule, "carry": args.carry, "seed": args.seed,
               **protocol.settings, **given}
    out, done = args.out or Path("out/eval") / f"{Path(names['init']).name}-{name}.jsonl", {}
    if out.exists():
        found, done = read_results(out)
        for key in setting:
            ensure(found.get(key) == setting[key], f"{out} was made with {key} = "
                   f"{found.get(key)!r}, not {setting[key]!r}; give another --out")
    elif rank == 0:
        write_atomically(out, lambda file: file.write(json.dumps({"setting": setting}).encode()))
    todo, begin = [i for i in range(len(problems)) if i not in done][rank::world], time.time()
    if world > 1:
        torch.distributed.barrier()                    # all have read before anyone writes
    with open(out, "ab", buffering=0) as file:         # whole lines, so that all may append
        file.write(b"\n")                              # ends a line that a kill cut short
        answers = evaluate(backbone, tokenizer, problems, protocol, todo=todo, memory=memory,
                           shots=shots[:protocol.shots], carry=args.carry, seed=args.seed,
                           batch_size=args.batch_size, **given)
        for row in tqdm(answers, total=len(todo), disable=rank > 0):
            file.write(json.dumps(row).encode() + b"\n")
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        right, n = sum(row["correct"] for row in read_results(out)[1].values()), len(problems)
        low, high = wilson(right, n)
        print(f"{json.dumps(setting)}\n{right} of {n} correct: {right / n:.1%} "
              f"[{low:.1%}, {high:.1%}] in {time.time() - begin:.0f} s -> {out}")

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model_arguments(parser)
    add = parser.add_argument_group("problems and scoring").add_argument
    add("--data", type=Path, help="JSON lines of question and answer (default: the built-in "
        "problems for tiny, else GSM8K's test file, fetched once)")
    add("--protocol", choices=PROTOCOLS, help="default: by --init")
    add("--rule", choices=ANSWER_RULES, help="default: the protocol's")
    add("--limit", type=int, help="only the first so many problems")
    add("--out", type=Path, help="results, continued if there are some (default: in out/eval)")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="compare two results and exit")
    add = parser.add_argument_group("sampling (default: the protocol's)").add_argument
    for name, kind in SAMPLING.items():
        add("--" + name.replace("_", "-"), type=kind)
    add("--batch-size", type=int, default=16)
    add("--seed", type=int, default=0)
    add("--carry", default="keep", choices=("keep", "reset", "shuffle"), help="the memory between "
        "steps; the last two are controls")
    args = parser.parse_args()
    compare(*args.compare) if args.compare else run(args)

if __name__ == "__main__":
    run_program(main)
