"""Write answers with a trained memory: python sample.py [PROMPT] [--show-steps]

Takes the tiny model that comes with this repository, or --init: a run's folder, llada, dream, ...
--think N lets the memory work for N passes before the first token is written. --infill fills the
blanks in an answer.

The other programs take from here what they share: options, opening models, the end of a program.
"""
import argparse
import os
import re
import shutil
import sys
import textwrap
from datetime import timedelta
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from diffusion import REMASKING, Report, Sampling, generate
from metastate import MetaState, load_checkpoint, load_memory
from model import (RELEASES, Backbone, Config, InputError, Tokenizer, blame, ensure, kind_of,
                   load_backbone, load_tokenizer, reason)

# ------------------------------------------------------------------------ THE BUILT-IN PROBLEMS
# A dial shows a digit, and each button has a rule that takes every digit to another. The rules are
# fixed random permutations, so that nothing shortens the chain of look-ups.

BUTTONS = ["red", "blue", "gold", "green", "black", "white", "pink", "brown"]
BUTTON_RULES = [np.random.default_rng((7, i)).permutation(10).tolist() for i in range(len(BUTTONS))]
PRESSES = 4
N_PROBLEMS = 10 * len(BUTTONS) ** PRESSES
SPLIT_ORDER = 41                       # seed of the order that the splits cut up
SPLITS = {"test": slice(1000), "valid": slice(1000, 2000), "train": slice(2000, N_PROBLEMS)}
# Every word of a problem is one token.
WORDS = ["The", " dial", " shows", ".", " Press", " press", " then", ",", " gives", "\nAnswer:",
         "\n####", *(f" {button}" for button in BUTTONS), *(f" {digit}" for digit in range(10))]
DIAL_LENGTH = 20                       # tokens of an answer, 18, and two of end-of-text: 20 has
                                       # more divisors, and so more schedules, than 19


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


def dial_answer(question: str) -> str | None:
    """The answer to a dial problem, or None for any other text."""
    match = re.fullmatch(r"The dial shows (\d)\. Press (\w+(?:, then press \w+)*)\.", question)
    names = match[2].split(", then press ") if match else []
    if len(names) != PRESSES or not set(names) <= set(BUTTONS):
        return None
    return dial_problem(int(match[1]), [BUTTONS.index(name) for name in names])["answer"]


# -------------------------------------------------------------------- WHAT ALL PROGRAMS SHARE


def run_program(main: Callable[[], None], if_interrupted: str) -> None:
    """Call a program's main. Whatever goes wrong ends it with one sentence and exit status 1, after
    Ctrl-C 130. TRACEBACK=1 in the environment shows where it went wrong."""
    try:
        sys.stdout = sys.stdout or open(os.devnull, "w")       # it may be closed
        sys.stderr = sys.stderr or open(os.devnull, "w")
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")       # a terminal may know ASCII only
        main()
        print(end="", flush=True)                      # a full disk shows here, not at exit
    except KeyboardInterrupt:
        print(f"\ninterrupted; {if_interrupted}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("TRACEBACK"):
            raise
        if isinstance(error, OSError) and error.filename is None:      # a closed pipe, a full disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"error: {sentence(error)}")


OUT_OF_MEMORY = ("out of memory", "allocate memory", "enough memory", "invalid buffer size",
                 "alloc_failed")       # as torch says it for CUDA, CPU and MPS


def sentence(error: Exception) -> str:
    """What a user needs to know of an error."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, MemoryError) or any(x in str(error).lower() for x in OUT_OF_MEMORY):
        return ("the memory of this machine or device is too small; take smaller batches, a "
                "shorter --max-length or --gen-length")
    if isinstance(error, OSError):
        return f"{'' if error.filename else 'the output: '}{reason(error)}"
    return f"{type(error).__name__}: {reason(error)} (TRACEBACK=1 in the environment shows where)"


def between(kind: type, low: float, high: float) -> Callable[[str], int | float]:
    """A type for argparse: a number from low to high, which nan is not."""
    def parse(text: str) -> int | float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    parse.__name__ = kind.__name__     # argparse names it where the text is no number at all
    return parse


COUNT = between(int, 1, 10 ** 9)
LENGTH = between(int, 1, 10 ** 5)      # tokens, or passes
COUNT_OR_ZERO = between(int, 0, 10 ** 5)
SEED = between(int, 0, 2 ** 32)
FRACTION = between(float, 0, 1)
POSITIVE = between(float, 1e-30, 1e30)
NOT_NEGATIVE = between(float, 0, 1e6)


class Processes(NamedTuple):
    """This process among those that torchrun started; alone without it."""
    rank: int
    world: int


def start_device(name: str | None, kind: str) -> tuple[torch.device, Processes]:
    """The device, the best there is without a name, for a model of that kind. Under torchrun the
    process group is opened."""
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with blame(f"--device {name or best}", "try --device cpu"):
        device = torch.device(name or best)
        if device == torch.device("cuda"):             # no index: every process has its own
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device).item()           # there are devices without numbers, too
        if device.type == "cuda":
            torch.cuda.set_device(device)
    if kind == "tiny" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)       # the threads of a tiny model wait for each other more than
                                       # they work; one gives the same numbers to the bit everywhere
    with blame("RANK and WORLD_SIZE", "start by torchrun, or unset them"):
        processes = Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        if not 0 <= processes.rank < processes.world:          # torch would wait for the others
            raise ValueError(f"there is no process {processes.rank} of {processes.world}")
        if processes.world > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            # the first to finish an evaluation may wait for hours for the last
            dist.init_process_group(backend, timeout=timedelta(days=7))
    return device, processes


# ------------------------------------------------------------------------------ OPENING MODELS

ASSETS = Path(__file__).parent / "assets"
TRAINED_LENGTH = {"llada": 4096, "dream": 2048}        # tokens of prompt and answer


def add_device_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cpu, cuda, mps (default: the best there is)")
    add("--compile", action="store_true", help="torch.compile the backbone's layers")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("models").add_argument
    add("--init", metavar="MODEL", help=f"tiny (the model in assets/tiny, the default), "
        f"{', '.join(RELEASES)}, ORGANISATION/MODEL on the hub, a run's folder or a checkpoint "
        "folder")
    add("--weights", metavar="FOLDER", help="the weights of --init, where they lie elsewhere")
    add("--memory", type=Path, metavar="FILE", help="a memory.pt that train.py wrote")
    add("--no-memory", action="store_true", help="the frozen backbone alone")
    add("--any-backbone", action="store_true", help="take a memory trained on another backbone")
    add("--chat", action=argparse.BooleanOptionalAction, help="put the prompt as a turn of a chat "
        "(default: unless the model's name says base)")
    add_device_options(parser)


class Choice(NamedTuple):
    """Which models were asked for; no backbone is loaded yet."""
    name: str                          # of the backbone: a release, a folder, ORGANISATION/MODEL
    weights: str                       # where its weights are
    kind: str
    chat: bool
    memory_path: Path | None
    checkpoint: dict | None            # what memory_path holds, or would without --no-memory


def choose_models(args: argparse.Namespace) -> Choice:
    """What the options of add_model_options mean, and say it."""
    name = args.init or ("tiny" if args.memory is None else None)
    run = ASSETS / "tiny" if name == "tiny" else Path(name or args.memory.parent)
    memory_path = args.memory
    if memory_path is None and (run / "memory.pt").is_file():
        memory_path = run / "memory.pt"
        name = None                    # the backbone is the one that it was trained on
    # read for --no-memory, too: it names the backbone
    checkpoint = load_checkpoint(memory_path) if memory_path else None
    if name is None:
        with blame(memory_path, "give a checkpoint that train.py wrote"):
            name = checkpoint["backbone"]["name"]
    weights = args.weights or (str(run) if name == "tiny" else name)
    chat = is_chat(name) if args.chat is None else args.chat
    if args.no_memory:
        memory_path = None
    print(f"model: {name} from {weights}, {'as a chat' if chat else 'plain text'}, memory: "
          f"{memory_path}", file=sys.stderr)
    return Choice(name, weights, kind_of(weights), chat, memory_path, checkpoint)


def is_chat(name: str) -> bool:
    """Whether a model of that name speaks in turns; a base model goes on with plain text. Of a
    folder in the Hugging Face cache the model's part counts, not the snapshot's."""
    parts = Path(name).resolve().parts
    model = next((part for part in parts if part.startswith("models--")), parts[-1])
    return "base" not in model.lower()


class Models(NamedTuple):
    backbone: Backbone
    tokenizer: Tokenizer
    memory: MetaState | None


def open_models(choice: Choice, args: argparse.Namespace, device: torch.device) -> Models:
    """Load what was chosen; weights that are not on this machine are fetched first."""
    backbone = load_backbone(choice.weights, device=device)
    if args.compile:
        backbone.compile_layers()
    memory = None
    if choice.memory_path:
        memory = load_memory(choice.memory_path, backbone, any_backbone=args.any_backbone,
                             state=choice.checkpoint)
    return Models(backbone, load_tokenizer(choice.weights), memory)


def prompt_ids(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    """Ids of a prompt: as the user's turn of a chat, or as text that a base model goes on with."""
    return tokenizer.chat([{"role": "user", "content": text}]) if chat else tokenizer.plain(text)


def warn_of_length(c: Config, length: int) -> None:
    limit = TRAINED_LENGTH.get(c.kind, length)
    if length > limit:
        print(f"note: {length:,} tokens of prompt and answer, where the model was trained on "
              f"{limit:,}", file=sys.stderr)


# ---------------------------------------------------------------------------- SAMPLING OPTIONS

SAMPLING_DEFAULTS = {
    "tiny": dict(gen_length=DIAL_LENGTH, steps=5),
    "llada": dict(gen_length=128, block_length=32),
    "dream": dict(gen_length=128, remasking="entropy"),
}


def add_sampling_options(parser: argparse.ArgumentParser, default: str) -> None:
    """An option for each field of Sampling; None where it was not given."""
    add = parser.add_argument_group(f"sampling (default: {default})").add_argument
    add("--gen-length", type=LENGTH, help="tokens of the answer")
    add("--steps", type=LENGTH, help="passes that reveal tokens")
    add("--block-length", type=COUNT, help="write the answer block by block")
    add("--cache", action="store_true", default=None,
        help="run only the block after its first pass (Fast-dLLM's dual cache): faster, not exact")
    add("--think", type=COUNT_OR_ZERO, help="passes before the first token is revealed")
    add("--threshold", type=FRACTION,
        help="reveal every token with at least this confidence, in as many passes as that takes")
    add("--remasking", choices=REMASKING, help="how the tokens to reveal are chosen")
    add("--temperature", type=NOT_NEGATIVE, help="0: the likeliest token")
    add("--top-p", type=FRACTION, help="for Dream's ways of remasking, as the next two")
    add("--top-k", type=COUNT)
    add("--alg-temp", type=NOT_NEGATIVE, help="reveal at random, the surer the sooner")
    add("--cfg-scale", type=NOT_NEGATIVE, help="guidance by the prompt")
    add("--logits-eos-inf", action="store_true", default=None, help="never write end-of-text")
    add("--confidence-eos-eot-inf", action="store_true", default=None,
        help="for low_confidence: end of text comes last")
    add("--seed", type=SEED, default=0, help="default: 0")


def sampling_settings(args: argparse.Namespace, defaults: dict) -> dict:
    """The settings of a Sampling: defaults, and over them what was asked for on the command line.
    One pass for each token unless steps are given; one block where those of the defaults do not
    fit. Raises InputError if they do not go together."""
    given = {name: value for name, value in vars(args).items()
             if name in Sampling.__annotations__ and value is not None}
    settings = defaults | given
    gen_length = settings["gen_length"]
    steps = settings.setdefault("steps", gen_length)
    usual_block = defaults.get("block_length")
    if usual_block and "block_length" not in given:
        n_blocks, rest = divmod(gen_length, usual_block)
        if rest or steps % n_blocks:
            settings["block_length"] = gen_length
    Sampling(**settings)               # raises
    return settings


# --------------------------------------------------------------------------- WATCHING A SAMPLE

MASKED = "\u2591"
N_BARS = 8                             # so that a line of the built-in problems fits 80 columns


def slot_changes(before: Tensor, after: Tensor) -> Tensor:
    """By how much slots (..., M, d) have changed, against their length: (..., M)."""
    return ((after - before).norm(dim=-1) / before.norm(dim=-1)).nan_to_num()


def change_bars(before: Tensor, after: Tensor) -> str:
    """The changes of slots (M, d) as a bar for some of them, first to last."""
    change = slot_changes(before, after)                               # (M,)
    groups = change.tensor_split(min(N_BARS, len(change)))
    return "".join(" ▁▂▃▄▅▆▇█"[min(8, round(8 * group.mean().item()))] for group in groups)


def printer(models: Models, n_prompt: int) -> Callable[[Tensor, Report], None]:
    """An on_step that prints every pass over the first sample: the answer, and how much the memory
    changed."""
    backbone, tokenizer, memory = models
    mask_id = backbone.config.mask_id
    slots = memory.initial(1)[0] if memory else None                   # (M, d)
    n_passes = 0
    title = f"{'change':{N_BARS}} " if memory else ""
    print(f"   {title}answer, in brackets until something is written")

    def text(canvas: Tensor) -> str:
        """The first answer on one line, with a block for every mask."""
        hidden = tokenizer.hidden - {mask_id}
        shown = [i for i in canvas[0, n_prompt:].tolist() if i not in hidden]
        shown = tokenizer.decode(shown).replace(tokenizer.decode([mask_id]), MASKED)
        return shown.strip().replace("\n", " ") or "nothing"

    def on_step(canvas: Tensor, report: Report) -> None:
        nonlocal slots, n_passes
        if not report.eligible[0].any():
            return                     # it is done, and waits for other samples
        n_passes += 1
        begin = f"{n_passes:2d} "
        if memory:
            begin += change_bars(slots, report.slots[0]) + " "
            slots = report.slots[0]
        has_new = report.revealed[0].any()
        line = text(canvas) if has_new else f"({text(report.guess)})"
        width = max(40, shutil.get_terminal_size().columns)
        print(textwrap.fill(line, width, initial_indent=begin, subsequent_indent=" " * len(begin)))

    return on_step


# ----------------------------------------------------------------------------------- THE PROGRAM

EXAMPLES = {
    "tiny": "The dial shows 4. Press blue, then press red, then press black, then press pink.",
    "llada": "Lily runs 12 kilometers per hour for 4 hours. How far is that?",
    "dream": "Lily runs 12 kilometers per hour for 4 hours. How far is that?",
}
BLANK = r" ?(?<!\w)_(?!\w)"            # no part of a word; the space before it is part of its token


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="The tiny model knows one kind of problem: "
        f"'{EXAMPLES['tiny']}' with any four of {', '.join(BUTTONS)}.")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", default=argparse.SUPPRESS)
    add_model_options(parser)
    add = parser.add_argument_group("text").add_argument
    add("--prompt", help="the user's prompt, as PROMPT (default: an example)")
    add("--infill", metavar="TEXT", help="complete this answer in place, a token for each _ that "
        "stands alone")
    add("--num-samples", type=between(int, 1, 10 ** 4), default=1)
    add("--show-steps", action="store_true", help="print every pass, and how much the memory "
        "changes in it, from the first slots to the last")
    add_sampling_options(parser, "the model's own")
    return parser.parse_args()


def infill_ids(tokenizer: Tokenizer, text: str, mask_id: int) -> list[int]:
    """Ids of an answer with a mask for each blank."""
    ids = []
    for piece in re.split(BLANK, text):
        ids += [mask_id, *tokenizer.encode(piece, special=False)]
    return ids[1:]                     # before the first piece there is no blank


def main() -> None:
    # 1. what can be wrong without a model
    args = arguments()
    choice = choose_models(args)
    prompt = EXAMPLES[choice.kind] if args.prompt is None else args.prompt
    defaults = SAMPLING_DEFAULTS[choice.kind]
    usual_length = defaults["gen_length"]
    if args.infill is not None:
        n_blanks = len(re.findall(BLANK, args.infill))
        ensure(n_blanks, "--infill has no blank; write a _ that stands alone for each token to "
               "fill in")
        ensure(not (args.gen_length or args.block_length or args.cache), "--infill says how long "
               "the answer is; omit --gen-length, --block-length and --cache")
        defaults = defaults | dict(gen_length=0, steps=n_blanks, block_length=None)
    settings = sampling_settings(args, defaults)

    # 2. the prompt, and the answer as far as it is given
    device, _ = start_device(args.device, choice.kind)
    models = open_models(choice, args, device)
    c = models.backbone.config
    ids = prompt_ids(models.tokenizer, prompt, choice.chat)
    n_prompt = len(ids)
    if args.infill is not None:
        ids += infill_ids(models.tokenizer, args.infill, c.mask_id)
        # it ends as answers do in training: with end-of-text, up to the usual length
        ids += [c.eos_id] * (n_prompt + usual_length - len(ids))
    warn_of_length(c, len(ids) + settings["gen_length"])
    batch = torch.tensor([ids] * args.num_samples, dtype=torch.long, device=device)    # (B, P)

    # 3. the answers
    print(prompt)
    on_step = printer(models, n_prompt) if args.show_steps else None
    canvas = generate(models.backbone, batch, memory=models.memory, answer_start=n_prompt,
                      seeds=range(args.seed, args.seed + args.num_samples), on_step=on_step,
                      **settings)
    right = dial_answer(prompt) if choice.kind == "tiny" else None
    for row in canvas[:, n_prompt:].tolist():
        text = models.tokenizer.answer(row)
        if right:
            text += "  (right)" if text == right else f"  (wrong: {right.split()[-1]})"
        print(text)
    if choice.kind == "tiny" and not right:
        print(f"note: the tiny model knows problems such as '{EXAMPLES['tiny']}' only, with any "
              f"four of {', '.join(BUTTONS)}", file=sys.stderr)


if __name__ == "__main__":
    run_program(main, if_interrupted="nothing is kept, the same command begins again")
