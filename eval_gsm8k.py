"""Score GSM8K-style problems: python eval_gsm8k.py [--init llada] [--data test.jsonl]

Without arguments: the newest run, else the tiny model of this repository. A tiny model is scored on
the built-in problems, others on GSM8K.
Every answer is appended to a JSONL file, which another run goes on with; --compare A B pairs two
such files. Prompts and answer rules are those of lm-evaluation-harness (gsm8k and gsm8k_cot).
"""
import os
import signal
import sys

if __name__ == "__main__":             # Ctrl-C while torch is being loaded: no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import hashlib
import json
import math
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from diffusion import CARRY, Pass, generate
from metastate import MetaState
from model import (Backbone, Tokenizer, blame, cache_folder, check_output, download, ensure,
                   fetched, write_atomically)
from sample import (COUNT, NUMBER, SAMPLING_DEFAULTS, add_model_options, add_sampling_options,
                    choose_models, is_right, open_models, run_program, sampling_settings,
                    start_device)

# ------------------------------------------------------------------------ THE BUILT-IN PROBLEMS
# A dial shows a digit, and each button has a rule that takes every digit to another. The rules are
# fixed random permutations, so that nothing shortens the chain of look-ups.

BUTTONS = ["red", "blue", "gold", "green", "black", "white", "pink", "brown"]
BUTTON_RULES = [np.random.default_rng((7, i)).permutation(10).tolist() for i in range(len(BUTTONS))]
PRESSES = 4
N_PROBLEMS = 10 * len(BUTTONS) ** PRESSES
SPLIT_ORDER = 37                       # seed of the order that the splits cut up
SPLITS = {"test": slice(1000), "valid": slice(1000, 2000), "train": slice(2000, N_PROBLEMS)}
# Every word of a problem is one token.
WORDS = ["The", " dial", " shows", ".", " Press", " press", " then", ",", " gives", "\nAnswer:",
         "\n####", *(f" {button}" for button in BUTTONS), *(f" {digit}" for digit in range(10))]


def dial_problem(digit: int, pressed: list[int]) -> dict[str, str]:
    """{question, answer} for a digit and the numbers of the buttons pressed."""
    names = ", then press ".join(BUTTONS[i] for i in pressed)
    question = f"The dial shows {digit}. Press {names}."
    hops = []
    for i in pressed:
        digit = BUTTON_RULES[i][digit]
        hops.append(f" {BUTTONS[i]} gives {digit}")
    return {"question": question, "answer": f"{','.join(hops)}.\n#### {digit}"}


def dial_problems(split: str, n: int | None = None) -> list[dict[str, str]]:
    """The first n problems of a split. All that exist stand in one fixed random order which the
    splits cut up: no question is in two of them."""
    order = np.random.default_rng(SPLIT_ORDER).permutation(N_PROBLEMS)
    numbers = order[SPLITS[split]][:n]                 # digit + 10 * (button + 8 * (button + ...
    shape = [10] + [len(BUTTONS)] * PRESSES
    columns = np.unravel_index(numbers, shape, order="F")
    return [dial_problem(digit, pressed) for digit, *pressed in np.transpose(columns).tolist()]


# ------------------------------------------------------------------------- PROMPTS AND ANSWERS

@dataclass(frozen=True)
class Protocol:
    """How a problem is put, denoised and scored; settings go to diffusion.generate."""
    question: str                      # the text of one question
    rule: str                          # see extract
    stops: tuple[str, ...]             # the answer ends at the first of these
    shots: int = 0                     # solved examples before it, from the train file
    chat: bool = False                 # all of it as one user turn of the chat template
    start: str = ""                    # control token before the text
    settings: dict = field(default_factory=dict)


PLAIN = "Question: {}\nAnswer:"
COT = "Q: {}\nA:"
STOPS = ("</s>", "<|im_end|>")
END = "<|endoftext|>"
PROTOCOLS = {
    "dial": Protocol("{}", "strict", (END,), chat=True, settings=SAMPLING_DEFAULTS["tiny"]),
    # lm-eval gsm8k, 5-shot: LLaDA-Base
    "gsm8k": Protocol(PLAIN, "flexible", ("Question:", *STOPS), shots=5,
                      settings=dict(gen_length=256)),
    # lm-eval gsm8k_cot, 8-shot: Dream-Base (there with eight fixed examples of its own)
    "gsm8k-cot": Protocol(COT, "cot_strict", ("Q:", *STOPS, END), shots=8, start="<|beginoftext|>",
                          settings=dict(gen_length=256, remasking="entropy", top_p=0.95)),
    # gsm8k_cot, zero-shot, chat template: Dream-Instruct
    "chat": Protocol(COT, "flexible", ("Q:", *STOPS, END), chat=True,
                     settings=dict(gen_length=256, remasking="entropy", temperature=0.1,
                                   top_p=0.9)),
    # lm-eval gsm8k, 5-shot in one user turn, as Fast-dLLM runs it: LLaDA-Instruct and 1.5
    "chat-few-shot": Protocol(PLAIN, "flexible", ("Question:", *STOPS), shots=5, chat=True,
                              settings=dict(gen_length=256, block_length=32)),
}
# By preset. A folder gets its kind's, that of the Instruct model; --protocol is for the others.
DEFAULT_PROTOCOL = {"tiny": "dial", "llada-base": "gsm8k", "llada": "chat-few-shot",
                    "llada-1.5": "chat-few-shot", "dream-base": "gsm8k-cot", "dream": "chat"}


ANSWER_RULES = {                       # a pattern, and which of its matches is the answer
    "strict": (r"#### (\-?[0-9\.\,]+)", 0),
    "cot_strict": (r"The answer is (\-?[0-9\.\,]+).", 0),
    "flexible": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
    "numeric": (f"({NUMBER})", -1),
}


def extract(text: str, rule: str) -> str:
    """The answer in a text, or "[invalid]". strict, cot_strict and flexible as lm-eval's filters
    strict-match (gsm8k, gsm8k_cot) and flexible-extract compute them; numeric: the last number."""
    pattern, which = ANSWER_RULES[rule]
    matches = list(re.finditer(pattern, text))
    if not matches:
        return "[invalid]"
    match = matches[which]
    return match[match.lastindex]      # the one group that took part


def normalised(text: str) -> str:
    """lm-eval's deletions: commas, dollar signs, all up to "#### ", a final full stop."""
    text = re.sub(r"[,$]", "", text)
    text = text.rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()


def is_correct(answer: str, gold: str, rule: str) -> bool:
    """Whether an extracted answer is that of the data set's full answer: as strings after lm-eval's
    deletions, or by the rule numeric as numbers."""
    if rule == "numeric":
        return is_right(answer, gold)
    return normalised(answer) == normalised(gold)


def prompt_ids(tokenizer: Tokenizer, protocol: Protocol, problem: dict, shots: list) -> list[int]:
    """Token ids of a problem under a protocol, the solved examples before it."""
    parts = []
    for shot in shots:
        answer = shot["answer"]
        if protocol.question == COT:                   # as lm-eval's gsm8k_cot writes its examples
            answer = re.sub("<<.*?>>", "", answer).replace("\n#### ", "\nThe answer is ") + "."
        parts.append(protocol.question.format(shot["question"]) + " " + answer)
    parts.append(protocol.question.format(problem["question"]))
    text = "\n\n".join(parts)
    if protocol.chat:
        return tokenizer.chat([{"role": "user", "content": text}])
    return tokenizer.encode(protocol.start) + tokenizer.encode(text, special=False)


def left_padded(prompts: list[list[int]], pad_id: int, device: torch.device
                ) -> tuple[Tensor, Tensor | None]:
    """Prompts as one batch (B, P), and its attention mask (B, P) where any of them is padded."""
    rows = [torch.tensor(prompt, device=device) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    ones = [torch.ones_like(row) for row in rows]
    attention_mask = pad_sequence(ones, batch_first=True, padding_side="left")
    return ids, None if attention_mask.all() else attention_mask


# ---------------------------------------------------------------------------------- DATA FILES

GSM8K = ("https://raw.githubusercontent.com/openai/grade-school-math/"
         "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/")
SHA256 = {"test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
          "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"}


def gsm8k_file(name: str) -> Path:
    """GSM8K's own file, fetched once."""
    return fetched(cache_folder() / "gsm8k" / name,
                   lambda path: download(GSM8K + name, path, sha256=SHA256[name]))


def read_jsonl(path: Path) -> list[tuple[int, dict]]:
    """(line number, object) for every line of a JSON-lines file; a bad one is named."""
    with blame(path, "give a file of JSON lines in UTF-8"):
        lines = path.read_text("utf-8-sig").split("\n")        # some editors begin with a BOM
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            with blame(f"{path} line {number}", "give one JSON object on every line, no array"):
                value = json.loads(line)
            ensure(isinstance(value, dict), f"{path} line {number} holds no JSON object; give one "
                   "on every line, without an array around them")
            found.append((number, value))
    ensure(found, f"{path} is empty; give a file with one JSON object a line")
    return found


def read_problems(path: Path) -> list[dict[str, str]]:
    """GSM8K's form: question and answer, both text, on every line."""
    numbered = read_jsonl(path)
    for number, problem in numbered:
        for key in ("question", "answer"):
            ensure(isinstance(problem.get(key), str), f"{path} line {number} lacks the text "
                   "question or answer; mend or remove it")
    return [problem for _, problem in numbered]


# -------------------------------------------------------------------------------------- SCORES

def evaluate(backbone: Backbone, tokenizer: Tokenizer, problems: list[dict], protocol: Protocol, *,
             settings: dict, todo: list[int] | None = None, shots: Sequence[dict] = (),
             memory: MetaState | None = None, carry: str = "keep", batch_size: int = 32,
             seed: int = 0) -> Iterator[dict]:
    """Answer problems[i] for i in todo (default: all), yielding {index, problem, text, answer,
    correct, passes}. settings: of Sampling. No answer depends on its batch, except under shuffle.
    """
    if todo is None:
        todo = list(range(len(problems)))
    n_batches = math.ceil(len(todo) / batch_size)
    batches = np.array_split(todo, n_batches) if todo else []  # as equal in size as can be
    for batch in batches:
        batch = batch.tolist()
        prompts = [prompt_ids(tokenizer, protocol, problems[i], shots) for i in batch]
        ids, attention_mask = left_padded(prompts, backbone.config.pad_id,
                                          backbone.embedding.weight.device)
        passes = torch.zeros(len(batch), dtype=torch.long, device=ids.device)

        def count_passes(canvas: Tensor, this_pass: Pass) -> None:
            passes.add_(this_pass.eligible.any(1))     # a row that is done waits

        canvas = generate(backbone, ids, attention_mask=attention_mask, memory=memory, carry=carry,
                          seeds=[seed + i for i in batch], on_step=count_passes, **settings)
        answers = canvas[:, ids.shape[1]:].tolist()
        for i, answer_ids, n_passes in zip(batch, answers, passes.tolist()):
            judged = judge(tokenizer, protocol, problems[i], answer_ids)
            yield {"index": i, **judged, "passes": n_passes}


def judge(tokenizer: Tokenizer, protocol: Protocol, problem: dict, ids: list[int]) -> dict:
    """An answer to a problem, and whether it is right."""
    text = answer_text(tokenizer, ids, protocol.stops)
    answer = extract(text, protocol.rule)
    correct = is_correct(answer, problem["answer"], protocol.rule)
    return {"problem": digest(problem), "text": text, "answer": answer, "correct": correct}


def answer_text(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...]) -> str:
    """The text of an answer up to the first stop, without control tokens."""
    text = tokenizer.decode(ids)
    for stop in stops:                 # which may be a control token
        text = text.split(stop)[0]
    # once more, without the control tokens that no stop has cut off
    return tokenizer.decode(tokenizer.encode(text), skip_special=True)


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion."""
    p, z = right / n, 1.96
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (middle - half) / scale, (middle + half) / scale


def paired_interval(a: list[bool], b: list[bool]) -> tuple[float, float, float]:
    """Mean of b - a on the same problems, and its 95 % bootstrap interval (10,000 resamples). It
    covers the choice of problems, not that of seeds."""
    difference = np.asarray(b, float) - np.asarray(a, float)
    values, counts = np.unique(difference, return_counts=True)
    n = len(difference)
    # to draw n problems is to draw how often each difference occurs
    resampled = np.random.default_rng(0).multinomial(n, counts / n, 10_000)
    low, high = np.quantile(resampled @ values / n, (0.025, 0.975))
    return difference.mean(), low, high


# ------------------------------------------------------------------------------ THE TABLES
# Printed by train.py. Thinking: the whole answer is written at once after N passes, in
# which nothing is revealed. Schedules: how tokens are revealed, pass by pass.

THINKING_PASSES = (1, 2, 3, 4, 5, 6, 8, 10, 20)
QUOTA_STEPS = (20, 10, 8, 5, 4)
BLOCK_LENGTHS = (10, 5, 4, 2)
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


class Contestant(NamedTuple):
    """A row of a table: whose memory, if any, and what becomes of it between two passes."""
    memory: MetaState | None
    carry: str


def contestants(memory: MetaState, memoryless: MetaState) -> dict[str, Contestant]:
    return {
        "frozen": Contestant(None, "keep"),
        "memory reset": Contestant(memory, "reset"),
        "memory shuffled": Contestant(memory, "shuffle"),
        "memoryless-trained": Contestant(memoryless, "reset"),
        "MetaState": Contestant(memory, "keep"),
    }


@dataclass
class Bench:
    """The models and problems that a table is about."""
    backbone: Backbone
    tokenizer: Tokenizer
    problems: list[dict]
    gen_length: int

    def score(self, who: Contestant, **settings) -> list[dict]:
        """The rows of evaluate, and in each whether the whole answer is right to the letter."""
        rows = list(evaluate(
            self.backbone, self.tokenizer, self.problems, PROTOCOLS["dial"], memory=who.memory,
            carry=who.carry, batch_size=250,
            settings={"gen_length": self.gen_length, **settings}))
        for row in rows:
            row["whole"] = row["text"] == self.problems[row["index"]]["answer"]
        return rows


def percent(values: list[bool]) -> str:
    return f"{100 * np.mean(values):.1f}"


def table(title: str, header: list[str], rows: dict[str, list[str]]) -> str:
    """A table for people, 80 columns wide at most, which is also Markdown."""
    width = max(map(len, rows))

    def line(name: str, cells: list[str]) -> str:
        return "|".join(["", name.ljust(width), *(cell.rjust(5) for cell in cells), ""])

    lines = [title, "", line("", header), "|---" * (len(header) + 1) + "|"]
    lines += [line(name, cells) for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def thinking_table(bench: Bench, everyone: dict[str, Contestant]) -> tuple[str, dict]:
    """How many whole answers are right if they are written at once, after N passes over an answer
    of nothing but masks. Without a memory no pass can differ from the first: its input does not."""
    results = {}
    for name, who in tqdm(everyone.items(), desc="thinking", leave=False, disable=None):
        results[name] = {}
        for n in THINKING_PASSES:
            rows = bench.score(who, think=n - 1, steps=1)              # the n-th pass writes
            results[name][n] = {"whole": [row["whole"] for row in rows],
                                "result": [row["correct"] for row in rows]}
    text = ""
    for key, what in (("whole", "Whole answers"), ("result", "Final results")):
        title = (f"{what} right (%) after N passes without a word, {len(bench.problems)} problems, "
                 "N =")
        cells = {name: [percent(after_n[key]) for after_n in by_n.values()]
                 for name, by_n in results.items()}
        text += table(title, list(map(str, THINKING_PASSES)), cells) + "\n"
    return text, results


def cheapest(valid: Bench, who: Contestant, schedules: dict[str, dict], desc: str) -> str:
    """The schedule with the fewest passes among those within a point of the best accuracy."""
    accuracy = {}
    passes = {}
    for label, settings in tqdm(schedules.items(), desc, leave=False, disable=None):
        rows = valid.score(who, **settings)
        accuracy[label] = np.mean([row["correct"] for row in rows])
        passes[label] = np.mean([row["passes"] for row in rows])
    good = [label for label in schedules if accuracy[label] >= max(accuracy.values()) - 0.01]
    return min(good, key=passes.get)


def schedule_table(bench: Bench, valid: Bench, everyone: dict[str, Contestant]
                   ) -> tuple[str, dict]:
    """Accuracy and mean passes under every kind of schedule, for the frozen backbone and MetaState.
    Block length and threshold are chosen for each on the problems of valid."""
    length = bench.gen_length
    quotas = {f"quota, {n} steps": dict(steps=n) for n in QUOTA_STEPS}
    blocks = {f"blocks of {n}": dict(block_length=n, steps=length // n) for n in BLOCK_LENGTHS}
    thresholds = {f"threshold {x}": dict(threshold=x, steps=1) for x in THRESHOLDS}
    cells = {}
    results = {}
    for name in ("frozen", "MetaState"):
        who = everyone[name]
        schedules = dict(quotas)
        for kind in (blocks, thresholds):
            best = cheapest(valid, who, kind, desc=f"schedules, {name}")
            schedules[best] = kind[best]
        results[name] = {}
        for label, settings in schedules.items():
            rows = bench.score(who, **settings)
            correct = [row["correct"] for row in rows]
            passes = [row["passes"] for row in rows]
            results[name][label] = {"correct": correct, "passes": passes}
            cells[f"{name}, {label}"] = [percent(correct), f"{np.mean(passes):.2f}"]
    title = (f"Final results right (%), {len(bench.problems)} problems; block length and threshold "
             "were chosen on others")
    return table(title, ["right", "passes"], cells), results


# --------------------------------------------------------------------------------- RESULT FILES

def read_results(path: Path) -> tuple[dict, dict[int, dict]]:
    """The setting that a results file was made with, and its rows by problem. A line that a kill
    cut short is passed over; its problem is answered again. Raises InputError for a wrong row."""
    with blame(path, "give a file of results that eval_gsm8k.py wrote"):
        first, *lines = path.read_bytes().split(b"\n")
        setting = json.loads(first)["setting"]
        indices = range(setting["problems"])
    rows = {}
    for number, line in enumerate(lines, 2):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        with blame(f"{path} line {number}", "remove that line, its problem is answered again"):
            index = row["index"]
            if type(index) is not int or index not in indices:
                raise ValueError(f"index {index!r} is not one of its {len(indices)} problems")
            passes = row["passes"]
            if type(row["correct"]) is not bool:
                raise ValueError("correct is no boolean")
            if type(passes) is not int or not 0 <= passes < 2 ** 31:
                raise ValueError("passes is no number of passes")
            if rows.setdefault(index, row) != row:
                raise ValueError(f"problem {index} has another answer above")
    return setting, rows


def compare(a: Path, b: Path) -> None:
    """Print the paired difference of two results files on the problems that both have."""
    _, before = read_results(a)
    _, after = read_results(b)
    both = sorted(before.keys() & after.keys())
    same = [i for i in both if before[i].get("problem") == after[i].get("problem")]
    ensure(both and same == both, f"{a} and {b} have no problem in common, or different ones under "
           "one number; compare runs on the same data")
    right_before = [before[i]["correct"] for i in both]
    right_after = [after[i]["correct"] for i in both]
    difference, low, high = paired_interval(right_before, right_after)
    print(f"{len(both)} problems: {np.mean(right_before):.1%} -> {np.mean(right_after):.1%}, "
          f"{100 * difference:+.1f} points (95 % of problems, paired: {100 * low:+.1f} to "
          f"{100 * high:+.1f})")


def rows_so_far(path: Path, made_with: dict) -> dict[int, dict]:
    """The rows of a results file that a run with these settings may go on with."""
    setting, rows = read_results(path)
    for key, value in made_with.items():
        before = setting.get(key)
        ensure(before == value, f"{path} was made with {key} = {before!r}, not {value!r}; give "
               "another --out")
    return rows


def print_score(path: Path, seconds: float) -> None:
    """The score of a finished results file: there is none with fewer rows than problems."""
    setting, rows = read_results(path)
    n = setting["problems"]
    ensure(len(rows) == n, f"{path} holds {len(rows)} of {n} answers; run again to go on")
    right = sum(row["correct"] for row in rows.values())
    passes = np.mean([row["passes"] for row in rows.values()])
    low, high = wilson(right, n)
    print(json.dumps(setting))
    print(f"{right} of {n} correct: {right / n:.1%} (95 %: {low:.1%} to {high:.1%}), "
          f"{passes:.2f} passes, {seconds:.0f} s")
    print(f"every answer is in {path};\ncompare two such files with --compare A B")


# ----------------------------------------------------------------------------------- THE PROGRAM

def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser)
    add = parser.add_argument_group("problems and scoring").add_argument
    add("--data", type=Path, help="JSON lines of question and answer (default: the built-in "
        "problems for tiny, else GSM8K's test file, fetched once)")
    add("--protocol", choices=PROTOCOLS, help="default: by --init")
    add("--rule", choices=ANSWER_RULES, help="default: the protocol's")
    add("--limit", type=COUNT, help="only the first so many problems")
    add("--out", type=Path, help="results, resumed if there are some (default: in out/eval)")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="compare two results and exit")
    add("--batch-size", type=COUNT, default=16)
    add("--carry", default="keep", choices=CARRY,
        help="the memory between steps; the last two are controls")
    add_sampling_options(parser, "the protocol's")
    return parser.parse_args()


def find_problems(args: argparse.Namespace, kind: str) -> list[dict[str, str]]:
    if args.data is None and kind == "tiny":
        return dial_problems("test", args.limit)
    return read_problems(args.data or gsm8k_file("test.jsonl"))[:args.limit]


def find_shots(args: argparse.Namespace, n: int) -> list[dict[str, str]]:
    """Solved examples: from the train file beside --data where there is one, else GSM8K's."""
    if n == 0:
        return []
    near = args.data and args.data.with_name("train.jsonl")
    path = near if near and near.exists() else gsm8k_file("train.jsonl")
    ensure(not (args.data and path.samefile(args.data)), f"the protocol takes its {n} solved "
           f"examples from {path}; give other problems by --data")
    shots = read_problems(path)[:n]
    ensure(len(shots) == n, f"{path} has {len(shots)} of the {n} solved examples that the protocol "
           "wants; give more")
    return shots


def main() -> None:
    args = arguments()
    if args.compare:
        return compare(*args.compare)

    # 1. everything that can be wrong without a model
    choice = choose_models(args)
    name = args.protocol or DEFAULT_PROTOCOL.get(choice.name, DEFAULT_PROTOCOL[choice.kind])
    protocol = PROTOCOLS[name]
    if args.rule:
        protocol = replace(protocol, rule=args.rule)
    settings = sampling_settings(args, protocol.settings)
    ensure(args.carry != "shuffle" or (args.batch_size > 2 and not args.cfg_scale),
           "--carry shuffle exchanges memories within a batch, and of batches of two one may be "
           "left over; give a --batch-size of three or more, and no --cfg-scale")
    problems = find_problems(args, choice.kind)
    shots = find_shots(args, protocol.shots)
    if args.out:
        check_output(args.out)

    # 2. what is not answered yet, every process its share of the problems
    device, (rank, world) = start_device(args.device)
    ensure(args.carry != "shuffle" or len(problems) >= 2 * world, "--carry shuffle needs two "
           f"problems or more for each of {world} processes; raise --limit")
    backbone, tokenizer, memory, identity = open_models(choice, args, device)
    made_with = {**identity, "problems": len(problems), "digest": digest([problems, shots]),
                 "protocol": name, "rule": protocol.rule, "carry": args.carry, "seed": args.seed,
                 "sampling": settings}
    if args.carry == "shuffle":        # whose memory a row gets depends on them
        made_with |= {"batch_size": args.batch_size, "processes": world}
    default_out = Path("out/eval") / f"{Path(choice.name).name}-{name}-{digest(made_with)}.jsonl"
    out = args.out or default_out
    if rank == 0 and not out.exists():
        write_atomically(out, json.dumps({"setting": made_with}).encode() + b"\n")
    if world > 1:
        torch.distributed.barrier()                    # now the file is there
    rows = rows_so_far(out, made_with)
    mine = range(rank, len(problems), world)
    todo = [i for i in mine if i not in rows]
    if todo and args.carry == "shuffle":
        todo = list(mine)              # in the same batches as before
    begin = time.time()
    with open(out, "ab", buffering=0) as file:         # whole lines, so that all may append
        answers = evaluate(backbone, tokenizer, problems, protocol, settings=settings, todo=todo,
                           memory=memory, shots=shots, carry=args.carry, seed=args.seed,
                           batch_size=args.batch_size)
        file.write(b"\n")                              # ends a line that a kill cut short
        for row in tqdm(answers, total=len(todo), disable=None if rank == 0 else True):
            file.write(json.dumps(row).encode() + b"\n")

    # 3. the score
    if world > 1:
        torch.distributed.barrier()                    # now all is answered
    if rank == 0:
        print_score(out, time.time() - begin)


if __name__ == "__main__":
    run_program(main, if_interrupted="every answer so far is kept, the same command goes on")
