"""Write answers with a trained memory: python sample.py [--prompt TEXT] [--show-steps]

Takes the newest run in out/, else the trained tiny model that comes with this repository; or --init
llada, dream, ... and --memory FILE. --think N lets the memory work for N passes before the first
token is written. --infill completes an answer with blanks, --html writes a page of every pass.

The other programs take from here what they share: options, opening models, the end of a program.
"""
import os
import signal
import sys

if __name__ == "__main__":             # Ctrl-C while torch is being loaded: no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import codecs
import hashlib
import json
import re
import shutil
import textwrap
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import Tensor

from diffusion import REMASKING, Pass, Sampling, generate
from metastate import GIVE_CHECKPOINT, MetaState, load_checkpoint, load_memory
from model import (PRESETS, Backbone, InputError, Tokenizer, blame, check_output, ensure,
                   load_backbone, load_tokenizer, read_config, write_atomically)

ASSETS = Path(__file__).parent / "assets"

# -------------------------------------------------------------------- WHAT ALL PROGRAMS SHARE


def run_program(main: Callable[[], None], if_interrupted: str) -> None:
    """Call a program's main. Bad input, lack of memory and Ctrl-C end it with one sentence and exit
    status 1, after Ctrl-C 130. A mistake of ours is a traceback."""
    if sys.stdout is None or sys.stderr is None:
        sys.exit("error: standard output or error is closed; lead it to a file, or to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")           # a terminal may know ASCII only
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
        sys.stdout.flush()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)   # no second one cuts this short
        print(f"\ninterrupted; {if_interrupted}", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        is_named = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_named and "can't allocate memory" not in str(error):     # the CPU's allocator
            raise
        sys.exit("error: the memory of this machine or device is too small; take smaller batches, "
                 "a shorter --max-length or --gen-length")
    except OSError as error:           # without a name: a closed pipe, a full disk under stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"error: {error.filename or 'the output'} cannot be used ({error.strerror})")


def between(kind: type, low: float, high: float) -> Callable[[str], int | float]:
    """A type for argparse: a number from low to high, which nan is not."""
    def parse(text: str) -> int | float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__     # argparse names it where the text is no number at all
    return parse


COUNT = between(int, 1, 10 ** 9)
COUNT_OR_ZERO = between(int, 0, 10 ** 9)
SEED = between(int, 0, 2 ** 32)
SHARE = between(float, 0, 1)
POSITIVE = between(float, 1e-30, 1e30)
NOT_NEGATIVE = between(float, 0, 1e6)


class Processes(NamedTuple):
    """This process among those that torchrun started; alone without it."""
    rank: int
    world: int


def start_device(name: str | None) -> tuple[torch.device, Processes]:
    """The device, the best there is without a name. Under torchrun the process group is opened."""
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with blame(f"--device {name}", f"try --device {best}"):
        device = torch.device(name or best)
        if device == torch.device("cuda"):             # no index: every process has its own
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()           # there are devices without numbers, too
    with blame("RANK and WORLD_SIZE", "start by torchrun, or unset them"):
        processes = Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        if processes.world > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            # the first to finish an evaluation may wait for hours for the last
            torch.distributed.init_process_group(backend, timeout=timedelta(days=7))
    return device, processes


# ------------------------------------------------------------------------------ OPENING MODELS

def add_device_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cpu, cuda, mps (default: the best there is)")
    add("--compile", action="store_true", help="torch.compile the backbone's layers")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("models").add_argument
    add("--init", metavar="MODEL", help=f"{', '.join(PRESETS)}, a run's folder or a checkpoint "
        "folder (default: the newest run in out/, else assets/tiny)")
    add("--weights", type=Path, metavar="FOLDER", help="the weights of --init, else found or "
        "downloaded")
    add("--memory", type=Path, metavar="FILE", help="a memory.pt that train.py wrote")
    add("--no-memory", action="store_true", help="the frozen backbone alone")
    add("--any-backbone", action="store_true", help="take a memory trained on another backbone")
    add_device_options(parser)


class Choice(NamedTuple):
    """Which models were asked for; no backbone is loaded or fetched yet."""
    name: str                          # a preset's, or a folder
    weights: str | Path                # where they are from: a preset's name, or a folder
    memory: Path | None

    @property
    def kind(self) -> str:
        if str(self.weights) in PRESETS:
            return PRESETS[str(self.weights)].config.kind
        return read_config(Path(self.weights)).kind


def newest_memory() -> Path:
    """Of the runs in out/; before any training, that of this repository."""
    runs = Path("out").glob("*/memory.pt")
    path = max(runs, key=lambda path: path.stat().st_mtime, default=ASSETS / "tiny" / "memory.pt")
    print(f"model: {path.parent}", file=sys.stderr)
    return path


def choose_models(args: argparse.Namespace) -> Choice:
    """What the options of add_model_options mean."""
    # 1. the memory: the one given, that of the run --init, or the newest
    memory = args.memory
    name = None if args.init == "tiny" else args.init      # None: that of the memory
    if memory is None and name is None:
        memory = newest_memory()
    elif memory is None and (Path(name) / "memory.pt").is_file():
        memory = Path(name) / "memory.pt"
        name = None

    # 2. the backbone: the one given, else the one that the memory was trained on
    if memory:
        state = load_checkpoint(memory)
        with blame(memory, GIVE_CHECKPOINT):
            trained_on = str(state["backbone"]["name"])
        name = name or trained_on
        ensure(args.init != "tiny" or name == "tiny", f"{memory} was trained on {name}, not on a "
               f"tiny backbone; give --init {name}, or the folder of a tiny run")

    # 3. its weights: those of a tiny one lie beside its memory
    weights = args.weights or name
    if weights == "tiny":
        weights = memory.parent / "backbone"
    ensure(str(weights) in PRESETS or Path(weights).is_dir(), f"there is no backbone in {weights}; "
           f"give --init a run's folder, a checkpoint folder, or one of {', '.join(PRESETS)}")
    return Choice(name, weights, None if args.no_memory else memory)


class Models(NamedTuple):
    backbone: Backbone
    tokenizer: Tokenizer
    memory: MetaState | None
    identity: dict[str, str | None]    # names and digests: what an evaluation was made with


def open_models(choice: Choice, args: argparse.Namespace, device: torch.device) -> Models:
    """Load what was chosen; weights that are not on this machine are fetched first."""
    backbone = load_backbone(choice.weights, device=device)
    tokenizer = load_tokenizer(choice.weights)
    if args.compile:
        backbone.compile_layers()
    memory, memory_digest = None, None
    if choice.memory:
        memory = load_memory(choice.memory, backbone, any_backbone=args.any_backbone)
        memory_digest = hashlib.sha256(choice.memory.read_bytes()).hexdigest()[:16]
    identity = {"init": choice.name, "backbone": backbone.digest(), "memory": memory_digest}
    return Models(backbone, tokenizer, memory, identity)


# ---------------------------------------------------------------------------- SAMPLING OPTIONS

SAMPLING_DEFAULTS = {
    "tiny": dict(gen_length=20, steps=5),
    "llada": dict(gen_length=128, block_length=32),
    "dream": dict(gen_length=128, remasking="entropy"),
}


def add_sampling_options(parser: argparse.ArgumentParser, default: str) -> None:
    """An option for each field of Sampling; None where it was not given."""
    add = parser.add_argument_group(f"sampling (default: {default})").add_argument
    add("--gen-length", type=between(int, 1, 10 ** 5), help="tokens of the answer")
    add("--steps", type=between(int, 1, 10 ** 5), help="passes that reveal tokens")
    add("--block-length", type=COUNT, help="write the answer block by block")
    add("--think", type=between(int, 0, 10 ** 5), help="passes before the first token is revealed")
    add("--threshold", type=SHARE, help="reveal whatever is surer, in as many passes as it takes")
    add("--remasking", choices=REMASKING, help="how tokens are chosen")
    add("--temperature", type=NOT_NEGATIVE, help="0: the likeliest token")
    add("--top-p", type=SHARE, help="for Dream's ways of remasking, as the next two")
    add("--top-k", type=COUNT)
    add("--alg-temp", type=NOT_NEGATIVE, help="reveal at random, the surer the sooner")
    add("--cfg-scale", type=NOT_NEGATIVE, help="guidance by the prompt")
    add("--logits-eos-inf", action="store_true", default=None, help="never write end-of-text")
    add("--confidence-eos-eot-inf", action="store_true", default=None,
        help="for low_confidence: end of text comes last")
    add("--seed", type=SEED, default=0, help="default: 0")


def fitting_block(gen_length: int, steps: int, at_most: int) -> int:
    """The largest block up to at_most whose blocks fill gen_length and share out steps, or all of
    gen_length: a block of a few tokens would be written word by word."""
    fitting = [block_length for block_length in range(8, at_most + 1)
               if gen_length % block_length == 0 and steps % (gen_length // block_length) == 0]
    return max(fitting, default=gen_length)


def sampling_settings(args: argparse.Namespace, defaults: dict) -> dict:
    """The settings of a Sampling: defaults, and over them what was asked for on the command line.
    One pass for each token unless steps are given. Raises InputError if they do not go together."""
    names = [field.name for field in fields(Sampling)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    settings = defaults | given
    settings.setdefault("steps", settings["gen_length"])
    if "block_length" in defaults and "block_length" not in given:
        settings["block_length"] = fitting_block(settings["gen_length"], settings["steps"],
                                                 at_most=defaults["block_length"])
    Sampling(**settings)               # raises
    return settings


# --------------------------------------------------------------------------- WATCHING A SAMPLE

MASKED = "\u2591"


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of every token. A character of several tokens, an emoji for example, stands at its
    last one; control tokens have no text."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return ["" if i in tokenizer.hidden else decoder.decode(tokenizer.token_bytes(i)) for i in ids]


NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"


def last_number(text: str) -> float | None:
    numbers = re.findall(NUMBER, text)
    return float(re.sub("[$,]", "", numbers[-1])) if numbers else None


def is_right(text: str, answer: str) -> bool:
    """Whether the last number of a text is that of the answer: 18, 18.00, $18 and 18. are equal."""
    number = last_number(text)
    return number is not None and number == last_number(answer)


def rounded(values: Tensor) -> list[float]:
    return [round(x, 3) for x in values.nan_to_num().tolist()]


class Recorder:
    """Keeps what happens to the first sample, pass by pass, as the page wants it."""

    def __init__(self, models: Models, memory: MetaState | None, n_prompt: int,
                 answer: str | None, remasking: str, show: bool):
        self.remasking = remasking
        self.tokenizer = models.tokenizer
        self.mask_id = models.backbone.config.mask_id
        self.slots = memory.initial(1)[0] if memory else None          # (M, d)
        self.n_prompt = n_prompt
        self.answer = answer
        self.show = show
        self.passes: list[dict] = []

    def on_step(self, canvas: Tensor, this_pass: Pass) -> None:
        if not this_pass.eligible[0].any():
            return                     # it is done, and waits for other samples
        part = slice(self.n_prompt, None)              # the answer
        texts = token_texts(self.tokenizer, this_pass.guess[0, part].tolist())
        strength = this_pass.confidence[0]                             # (T,)
        if self.remasking == "entropy":    # below 0; its exponential is like a probability
            strength = strength.exp() * this_pass.eligible[0]
        right = None if self.answer is None else is_right("".join(texts), self.answer)
        self.passes.append({
            "texts": texts,
            "masked": (canvas[0, part] == self.mask_id).tolist(),
            "revealed": this_pass.revealed[0, part].tolist(),
            "strength": rounded(strength[part]),
            "change": [] if self.slots is None else self.slot_changes(this_pass.slots[0]),
            "right": right,            # if it ended here
        })
        if self.show:
            print_pass(len(self.passes), self.passes[-1])

    def slot_changes(self, slots: Tensor) -> list[float]:
        """By how much each slot (M, d) has changed since the last call, against its length."""
        change = (slots - self.slots).norm(dim=-1) / self.slots.norm(dim=-1)       # (M,)
        self.slots = slots
        return rounded(change)


def print_pass(number: int, record: dict) -> None:
    if number == 1:
        print("pass |how much each slot of the memory changes| the answer;\n"
              "in brackets: not written, only thought")
    if any(record["revealed"]):
        texts = [MASKED if masked else text
                 for text, masked in zip(record["texts"], record["masked"])]
        answer = "".join(texts)
    else:
        answer = "(" + "".join(record["texts"]).strip() + ")"
    bars = "".join(" ▁▂▃▄▅▆▇█"[min(8, round(8 * x))] for x in record["change"])
    begin = f"{number:4d} |{bars}| "
    width = max(40, shutil.get_terminal_size().columns - 1)
    print(textwrap.fill(answer.replace("\n", " / "), width, initial_indent=begin,
                        subsequent_indent=" " * len(begin), drop_whitespace=False) or begin)


def write_page(path: Path, content: dict) -> None:
    """The page of a sample: the template with the content in it, as one file."""
    template = (ASSETS / "page.html").read_text("utf-8")
    text = json.dumps(content).replace("<", "\\u003c")         # no text can end the script
    write_atomically(path, template.replace('"CONTENT"', text, 1).encode())


# ----------------------------------------------------------------------------------- THE PROGRAM

ARITHMETIC = ("Lily runs 12 kilometers per hour for 4 hours. How far is that?", "48")
EXAMPLES = {                           # prompt, answer
    "tiny": ("The dial shows 4. Press blue, then press red, then press black, then press pink.",
             "0"),
    "llada": ARITHMETIC,
    "dream": ARITHMETIC,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser)
    add = parser.add_argument_group("text").add_argument
    add("--prompt", help="what the user says (default: an example)")
    add("--answer", help="the number that is right, for the page (default: the example's)")
    add("--infill", metavar="TEXT", help="complete this answer in place, a token for each _")
    add("--num-samples", type=between(int, 1, 10 ** 4), default=1)
    add("--show-steps", action="store_true", help="print every pass, and the change of each slot")
    add("--html", type=Path, metavar="FILE", help="write every pass as a page")
    add_sampling_options(parser, "the model's own")
    return parser.parse_args()


def infill_ids(tokenizer: Tokenizer, text: str, mask_id: int) -> list[int]:
    """Ids of an answer with a mask for each _."""
    ids = []
    for part in re.split("(_)", text):
        ids += [mask_id] if part == "_" else tokenizer.encode(part, special=False)
    return ids


def main() -> None:
    # 1. everything that can be wrong without a model
    args = arguments()
    choice = choose_models(args)
    prompt, answer = EXAMPLES[choice.kind] if args.prompt is None else (args.prompt, None)
    if args.answer is not None:
        answer = args.answer
        ensure(last_number(answer) is not None, f"--answer {answer!r} holds no number; give the "
               "number that is right")
    defaults = {"remasking": Sampling.remasking, **SAMPLING_DEFAULTS[choice.kind]}
    if args.infill is not None:
        n_blanks = args.infill.count("_")
        ensure(n_blanks, "--infill has no blank; write one _ for each token to fill in")
        ensure(args.gen_length is None and args.block_length is None, "--infill says how long the "
               "answer is; omit --gen-length and --block-length")
        defaults = dict(remasking=defaults["remasking"], gen_length=0, steps=n_blanks)
    settings = sampling_settings(args, defaults)
    if args.html:
        check_output(args.html)

    # 2. the answers: for the page also those without the memory
    device, _ = start_device(args.device)
    models = open_models(choice, args, device)
    ids = models.tokenizer.chat([{"role": "user", "content": prompt}])
    n_prompt = len(ids)
    if args.infill is not None:
        ids += infill_ids(models.tokenizer, args.infill, models.backbone.config.mask_id)
        # it ends as answers do in training: with end-of-text, up to the usual length
        n_missing = n_prompt + SAMPLING_DEFAULTS[choice.kind]["gen_length"] - len(ids)
        ids += [models.backbone.config.eos_id] * max(0, n_missing)
    prompt_ids = torch.tensor([ids] * args.num_samples, device=device)         # (B, P)
    seeds = range(args.seed, args.seed + args.num_samples)
    memories = [models.memory]
    if args.html and models.memory:
        memories.append(None)
    print(prompt)
    runs = []
    for memory in memories:
        is_first = not runs
        recorder = Recorder(models, memory, n_prompt, answer, settings["remasking"],
                            show=args.show_steps and is_first)
        canvas = generate(models.backbone, prompt_ids, memory=memory, answer_start=n_prompt,
                          seeds=seeds, on_step=recorder.on_step, **settings)
        if is_first:
            for row in canvas[:, n_prompt:].tolist():
                print(models.tokenizer.decode(row, skip_special=True))
        runs.append({"name": "with memory" if memory else "without memory",
                     "right": recorder.passes[-1]["right"], "passes": recorder.passes})

    # 3. the page
    if args.html:
        memory_name = choice.memory and f"{choice.memory.parent.name}/{choice.memory.name}"
        about = {"memory": memory_name, "seed": args.seed, **settings}
        about = ", ".join([choice.name, *(f"{key} {value}" for key, value in about.items())])
        write_page(args.html, {"prompt": prompt, "answer": answer, "about": about,
                               "think": settings.get("think", 0), "runs": runs})
        print(f"{args.html}: open it in a browser", file=sys.stderr)


if __name__ == "__main__":
    run_program(main, if_interrupted="nothing is kept, the same command begins again")
