"""Score GSM8K-style problems: python eval_gsm8k.py [--init llada] [--data test.jsonl]

Without arguments: the tiny model of this repository on the built-in problems; others on GSM8K.
Every answer is appended to a JSONL file, which another run goes on with; --compare A B pairs two
such files. Prompts and answer rules are those of lm-evaluation-harness (gsm8k and gsm8k_cot).
--protocol paper is the one of MetaState's own table.
"""
import argparse
import hashlib
import json
import math
import re
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from diffusion import CARRY, Report, generate
from metastate import MetaState
from model import (Backbone, Tokenizer, blame, cache_folder, download, ensure, fetched, reason,
                   write_atomically)
from sample import (COUNT, DIAL_LENGTH, SAMPLING_DEFAULTS, Choice, add_model_options,
                    add_sampling_options, choose_models, dial_problems, open_models, prompt_ids,
                    run_program, sampling_settings, start_device, warn_of_length)

# ------------------------------------------------------------------------- PROMPTS AND ANSWERS

@dataclass(frozen=True)
class Protocol:
    """How a problem is put, denoised and scored; settings go to diffusion.generate."""
    question: str                      # the text of one question
    rule: str                          # see extract
    stops: tuple[str, ...] = ()        # the answer ends at the first of these, if not before
    shots: int = 0                     # solved examples before it, from the train file
    chat: bool = False                 # all of it as one user turn of the chat template
    settings: dict = field(default_factory=dict)


PLAIN = "Question: {}\nAnswer:"
PLAIN_STOPS = ("Question:", "</s>", "<|im_end|>")
COT = "Q: {}\nA:"
COT_STOPS = ("Q:", "</s>", "<|im_end|>")
PROTOCOLS = {
    "dial": Protocol("{}", "strict", chat=True, settings=SAMPLING_DEFAULTS["tiny"]),
    # lm-eval gsm8k, 5-shot: LLaDA-Base
    "gsm8k": Protocol(PLAIN, "flexible", PLAIN_STOPS, shots=5,
                      settings=dict(gen_length=256)),
    # lm-eval gsm8k_cot, 8-shot: Dream-Base (there with eight fixed examples of its own)
    "gsm8k-cot": Protocol(COT, "cot_strict", COT_STOPS, shots=8,
                          settings=dict(gen_length=256, remasking="entropy", top_p=0.95)),
    # gsm8k_cot, zero-shot, chat template: Dream-Instruct
    "chat": Protocol(COT, "flexible", COT_STOPS, chat=True,
                     settings=dict(gen_length=256, remasking="entropy", temperature=0.1,
                                   top_p=0.9)),
    # lm-eval gsm8k, 5-shot in one user turn, as Fast-dLLM runs it: LLaDA-Instruct and 1.5
    "chat-few-shot": Protocol(PLAIN, "flexible", PLAIN_STOPS, shots=5, chat=True,
                              settings=dict(gen_length=256, block_length=32)),
    # MetaState's own table: length, block and dual cache are stated there. The threshold and the
    # examples are a guess: Fast-dLLM's, whose GSM8K figure with them is the table's baseline.
    "paper": Protocol(PLAIN, "flexible", PLAIN_STOPS, shots=5,
                      settings=dict(gen_length=256, block_length=32, cache=True, threshold=0.9)),
}


def choose_protocol(name: str | None, choice: Choice, chat: bool | None) -> tuple[str, Protocol]:
    """The protocol of that name, or the usual one of a model; a base model gets plain text."""
    usual = {
        ("llada", False): "gsm8k", ("llada", True): "chat-few-shot",
        ("dream", False): "gsm8k-cot", ("dream", True): "chat",
    }
    name = name or usual.get((choice.kind, choice.chat), "dial")
    protocol = PROTOCOLS[name]
    if name == "paper" or chat is not None:
        protocol = replace(protocol, chat=choice.chat)
    return name, protocol


NUMBER = r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
ANSWER_RULES = {                       # a pattern, and which of its matches is the answer
    "strict": (r"#### (\-?[0-9\.\,]+)", 0),
    "cot_strict": (r"The answer is (\-?[0-9\.\,]+).", 0),
    "flexible": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
    "numeric": (f"({NUMBER})", -1),
}


def extract(text: str, rule: str) -> str:
    """The answer in a text, or "[invalid]". strict, cot_strict and flexible as lm-eval's filters
    strict-match (gsm8k, gsm8k_cot) and flexible-extract compute them; numeric: the last number,
    also of TeX and with a typographic minus."""
    if rule == "numeric":
        text = text.replace("{,}", ",").replace("\u2212", "-")
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
    deletions, or by the rule numeric as numbers: 18, 18.00, $18 and 18. are equal."""
    if rule == "numeric":
        numbers = [re.sub("[$,]", "", extract(text, rule)) for text in (answer, gold)]
        return "[invalid]" not in numbers and float(numbers[0]) == float(numbers[1])
    return normalised(answer) == normalised(gold)


def problem_ids(tokenizer: Tokenizer, protocol: Protocol, problem: dict, shots: Sequence[dict]
                ) -> list[int]:
    """Token ids of a problem under a protocol, the solved examples before it."""
    parts = []
    for shot in shots:
        answer = shot["answer"]
        if protocol.question == COT:                   # as lm-eval's gsm8k_cot writes its examples
            answer = re.sub("<<.*?>>", "", answer).replace("\n#### ", "\nThe answer is ") + "."
        parts.append(protocol.question.format(shot["question"]) + " " + answer)
    parts.append(protocol.question.format(problem["question"]))
    return prompt_ids(tokenizer, "\n\n".join(parts), protocol.chat)


def left_padded(prompts: list[list[int]], backbone: Backbone) -> tuple[Tensor, Tensor | None]:
    """Prompts as one batch (B, P), and its attention mask (B, P) where any of them is padded."""
    rows = [torch.tensor(prompt, device=backbone.device) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
    attention_mask = (ids >= 0).long()
    ids = ids.masked_fill(ids < 0, backbone.config.pad_id)
    return ids, None if attention_mask.all() else attention_mask


def answer_text(tokenizer: Tokenizer, ids: list[int], stops: Sequence[str]) -> str:
    """The text of an answer up to its end or the first stop, without control tokens."""
    text = tokenizer.answer(ids)
    for stop in stops:
        text = text.split(stop)[0]
    return text


# ---------------------------------------------------------------------------------- DATA FILES

GSM8K = ("https://raw.githubusercontent.com/openai/grade-school-math/"
         "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/")
SHA256 = {"test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
          "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"}


def gsm8k_file(name: str) -> Path:
    """GSM8K's own file, fetched once."""
    beside = ", with its solved examples in train.jsonl beside it"
    advice = f"give a file by --data{beside if name == 'train.jsonl' else ''}"
    with blame(f"the download of GSM8K's {name}", advice):
        return fetched(cache_folder() / "gsm8k" / name,
                       lambda path: download(GSM8K + name, path, sha256=SHA256[name]))


def read_jsonl(path: Path, parse: Callable[[Any], Any]) -> list:
    """parse(value) of every line of a JSON-lines file. Lines that are refused are counted and the
    first is named: in a note, or in an InputError where they are more than the others."""
    with blame(path, "give a file of JSON lines in UTF-8"):
        lines = path.read_text("utf-8-sig").split("\n")        # some editors begin with a BOM
    good, bad = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                good.append(parse(json.loads(line)))
            except (ValueError, RecursionError) as error:
                bad.append(f"line {number}: {reason(error)}")
    if bad:
        message = (f"{path} has {len(bad)} lines that cannot be used beside {len(good)} good ones, "
                   f"the first is {bad[0]}; one JSON object is wanted on every line")
        ensure(len(good) > len(bad), message)
        print(f"note: {message}", file=sys.stderr)
    ensure(good, f"{path} is empty; give a file with one JSON object a line")
    return good


def read_problem(item: Any) -> dict[str, str]:
    """GSM8K's form: question and answer, both text."""
    match item:
        case {"question": str(), "answer": str()}:
            return item
    raise ValueError("question and answer are wanted, and one is missing or no text")


# -------------------------------------------------------------------------------------- SCORES

def evaluate(backbone: Backbone, tokenizer: Tokenizer, problems: list[dict], protocol: Protocol, *,
             settings: dict, todo: list[int] | None = None, shots: Sequence[dict] = (),
             memory: MetaState | None = None, carry: str = "keep", batch_size: int = 32,
             seed: int = 0, on_step: Callable[[Tensor, Report], None] | None = None
             ) -> Iterator[dict]:
    """Answer problems[i] for i in todo (default: all), yielding {index, problem, text, answer,
    correct, passes}. settings: of Sampling. on_step: as generate's. In float32 no answer depends on
    its batch, except under shuffle."""
    todo = range(len(problems)) if todo is None else todo
    n_batches = math.ceil(len(todo) / batch_size)
    for batch in np.array_split(todo, n_batches) if todo else []:      # as equal as can be
        batch = batch.tolist()
        prompts = [problem_ids(tokenizer, protocol, problems[i], shots) for i in batch]
        ids, attention_mask = left_padded(prompts, backbone)
        passes = torch.zeros(len(batch), dtype=torch.long, device=backbone.device)

        def count_passes(canvas: Tensor, report: Report) -> None:
            passes.add_(report.eligible.any(1))        # a row that is done waits
            if on_step:
                on_step(canvas, report)

        canvas = generate(backbone, ids, attention_mask=attention_mask, memory=memory, carry=carry,
                          seeds=[seed + i for i in batch], on_step=count_passes, **settings)
        answers = canvas[:, ids.shape[1]:].tolist()
        for i, answer_ids, n_passes in zip(batch, answers, passes.tolist()):
            text = answer_text(tokenizer, answer_ids, protocol.stops)
            answer = extract(text, protocol.rule)
            correct = is_correct(answer, problems[i]["answer"], protocol.rule)
            yield {"index": i, "problem": digest(problems[i]), "text": text, "answer": answer,
                   "correct": correct, "passes": n_passes}


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


# ----------------------------------------------------------------------------- THINKING TABLE
# Printed by train.py: how many whole answers are right if they are written at once after N passes
# over an answer of nothing but masks.

THINKING_PASSES = (1, 2, 3, 4, 5, 6, 8, 10, 20)


def whole_by_pass(backbone: Backbone, tokenizer: Tokenizer, problems: list[dict], *, n_passes: int,
                  gen_length: int = DIAL_LENGTH, batch_size: int = 250, **options) -> np.ndarray:
    """Whether the whole answer that pass n would write is right to the letter, bool (n_passes,
    problems). One run tells all: over masks a pass does the same whether it writes or not.
    options: memory and carry, as in evaluate."""
    guesses = []                       # of every pass over every batch: rows of ids

    def on_step(canvas: Tensor, report: Report) -> None:
        guesses.append(report.guess[:, -gen_length:].tolist())

    settings = dict(gen_length=gen_length, think=n_passes - 1, steps=1)
    list(evaluate(backbone, tokenizer, problems, PROTOCOLS["dial"], settings=settings,
                  batch_size=batch_size, on_step=on_step, **options))
    wholes = [tokenizer.encode(problem["answer"]) + [backbone.config.eos_id]
              for problem in problems]
    right = []
    for n in range(n_passes):
        of_pass = [guess for batch in guesses[n::n_passes] for guess in batch]
        right.append([guess[:len(whole)] == whole for guess, whole in zip(of_pass, wholes)])
    return np.array(right)


def percent(values: Sequence[bool]) -> str:
    return f"{100 * np.mean(values):.1f}"


def table(title: str, header: list[str], rows: dict[str, list[str]]) -> str:
    """A table for people, which is also Markdown."""
    width = max(map(len, rows))
    widths = [max(5, *map(len, column)) for column in zip(header, *rows.values())]
    lines = []
    for name, cells in [("", header), *rows.items()]:
        padded = [cell.rjust(n) for cell, n in zip(cells, widths)]
        lines.append("|".join(["", name.ljust(width), *padded, ""]))
    lines.insert(1, "|---" * (len(header) + 1) + "|")
    return "\n".join([title, "", *lines, ""])


def thinking_table(backbone: Backbone, tokenizer: Tokenizer, problems: list[dict],
                   memory: MetaState, gen_length: int = DIAL_LENGTH) -> tuple[str, dict]:
    """The table for a memory and its controls, and every result behind it. Without persistence no
    pass can differ from the first: its input does not."""
    everyone = {"frozen": (None, "keep"), "memory reset": (memory, "reset"),
                "memory shuffled": (memory, "shuffle"), "MetaState": (memory, "keep")}
    cells, results = {}, {}
    for name, (its_memory, carry) in tqdm(everyone.items(), "table", leave=False, disable=None):
        right = whole_by_pass(backbone, tokenizer, problems, memory=its_memory, carry=carry,
                              n_passes=max(THINKING_PASSES), gen_length=gen_length)
        results[name] = {n: right[n - 1].tolist() for n in THINKING_PASSES}
        cells[name] = list(map(percent, results[name].values()))
    title = f"Whole answers right (%), written at once after N passes, {len(problems)} problems"
    return table(title, [f"N = {n}" for n in THINKING_PASSES], cells), results


# --------------------------------------------------------------------------------- RESULT FILES
# A line with the setting, then a line for every answer.

def read_results(path: Path) -> tuple[dict, dict[int, dict]]:
    """The setting that a results file was made with, and its rows by problem. A line that a kill
    cut short is passed over; its problem is answered again."""
    rows = {}
    with blame(path, "give a file of results that eval_gsm8k.py wrote"):
        first, *lines = path.read_bytes().split(b"\n")
        setting = json.loads(first)["setting"]
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows[row["index"]] = {key: row[key] for key in ("problem", "correct", "passes")}
    return setting, rows


def compare(a: Path, b: Path) -> None:
    """Print the paired difference of two results files on the problems that both have."""
    (_, before), (_, after) = read_results(a), read_results(b)
    both = sorted(before.keys() & after.keys())
    same = [i for i in both if before[i]["problem"] == after[i]["problem"]]
    ensure(both and same == both, f"{a} and {b} have no problem in common, or different ones under "
           "one number; compare runs on the same data")
    right_before = [before[i]["correct"] for i in both]
    right_after = [after[i]["correct"] for i in both]
    difference, low, high = paired_interval(right_before, right_after)
    print(f"A, {a}: {np.mean(right_before):.1%} of {len(both)} problems\n"
          f"B, {b}: {np.mean(right_after):.1%}\n"
          f"B - A: {100 * difference:+.1f} points (95 % interval, paired over problems: "
          f"{100 * low:+.1f} to {100 * high:+.1f})")


def print_score(path: Path, n_new: int, seconds: float) -> None:
    """The score of a finished results file."""
    setting, rows = read_results(path)
    n = setting["problems"]
    ensure(len(rows) == n, f"{path} holds {len(rows)} of {n} answers; run again to go on")
    right = sum(row["correct"] for row in rows.values())
    passes = np.mean([row["passes"] for row in rows.values()])
    low, high = wilson(right, n)
    print(f"{right} of {n} correct: {right / n:.1%} (95 %: {low:.1%} to {high:.1%}), "
          f"{passes:.2f} passes; {n_new} answered now, in {seconds:.0f} s\n"
          f"answers: {path}; compare two such files with --compare A B\n"
          f"setting: {json.dumps(setting)}")


def results_path(choice: Choice, protocol_name: str, protocol: Protocol, made_with: dict) -> Path:
    """A name that says model, memory, and what differs from the protocol."""
    memory = choice.memory_path.parent.name if choice.memory_path else "frozen"
    changed = [f"{key}-{value}" for key, value in made_with["sampling"].items()
               if protocol.settings.get(key) != value]
    parts = [Path(choice.name).name, memory, protocol_name, *changed, digest(made_with)[:6]]
    return Path("out/eval") / ("_".join(parts) + ".jsonl")


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
    return read_jsonl(args.data or gsm8k_file("test.jsonl"), read_problem)[:args.limit]


def find_shots(args: argparse.Namespace, n: int) -> list[dict[str, str]]:
    """Solved examples: from the train file beside --data where there is one, else GSM8K's."""
    if n == 0:
        return []
    near = args.data and args.data.with_name("train.jsonl")
    path = near if near and near.exists() else gsm8k_file("train.jsonl")
    ensure(not (args.data and path.samefile(args.data)), f"the protocol takes its {n} solved "
           f"examples from {path}; give other problems by --data")
    shots = read_jsonl(path, read_problem)[:n]
    ensure(len(shots) == n, f"{path} has {len(shots)} of the {n} solved examples that the protocol "
           "wants; give more")
    return shots


def main() -> None:
    args = arguments()
    if args.compare:
        return compare(*args.compare)

    # 1. what can be wrong without a model
    choice = choose_models(args)
    name, protocol = choose_protocol(args.protocol, choice, args.chat)
    protocol = replace(protocol, rule=args.rule or protocol.rule)
    settings = sampling_settings(args, protocol.settings)
    problems = find_problems(args, choice.kind)
    shots = find_shots(args, protocol.shots)

    # 2. what is not answered yet, every process its share of the problems
    device, (rank, world) = start_device(args.device, choice.kind)
    ensure(args.carry != "shuffle" or (args.batch_size > 2 and not args.cfg_scale
                                       and len(problems) >= 2 * world), "--carry shuffle exchanges "
           "memories within a batch; give a --batch-size of three or more, as one of two may be "
           f"left over, two problems or more for each of {world} processes, and no --cfg-scale")
    backbone, tokenizer, memory = open_models(choice, args, device)
    made_with = {"init": choice.name, "backbone": backbone.digest(),
                 "memory": choice.checkpoint["digest"] if memory else None,
                 "problems": len(problems), "digest": digest([problems, shots]),
                 "protocol": name, "rule": protocol.rule, "chat": protocol.chat,
                 "carry": args.carry, "seed": args.seed, "batch_size": args.batch_size,
                 "processes": world, "sampling": settings}
    longest = max(problems, key=lambda problem: len(problem["question"]))
    n_prompt = len(problem_ids(tokenizer, protocol, longest, shots))
    warn_of_length(backbone.config, n_prompt + settings["gen_length"])
    out = args.out or results_path(choice, name, protocol, made_with)
    if rank == 0 and not out.exists():
        write_atomically(out, json.dumps({"setting": made_with}).encode() + b"\n")
    if world > 1:
        torch.distributed.barrier()                    # now the file is there
    setting, rows = read_results(out)
    for key, value in made_with.items():
        ensure(setting.get(key) == value, f"{out} was made with {key} = {setting.get(key)!r}, not "
               f"{value!r}; give another --out")
    mine = range(rank, len(problems), world)
    todo = [i for i in mine if i not in rows]
    if todo and args.carry == "shuffle":
        todo = list(mine)              # in the same batches as before
    begin = time.time()
    with open(out, "ab", buffering=0) as file:         # whole lines, so that all may append
        answers = evaluate(backbone, tokenizer, problems, protocol, settings=settings, todo=todo,
                           shots=shots, memory=memory, carry=args.carry, seed=args.seed,
                           batch_size=args.batch_size)
        file.write(b"\n")                              # ends a line that a kill cut short
        for row in tqdm(answers, total=len(todo), disable=None if rank == 0 else True):
            file.write(json.dumps(row).encode() + b"\n")

    # 3. the score
    if world > 1:
        torch.distributed.barrier()                    # now all is answered
    if rank == 0:
        print_score(out, len(todo), time.time() - begin)


if __name__ == "__main__":
    run_program(main, if_interrupted="every answer so far is kept, the same command goes on")
