"""Train the memory of a frozen backbone: python train.py [--init llada]

Without arguments, on any machine: trains the tiny backbone on the built-in problems, freezes it,
trains MetaState on it by K-step unrolling, and prints a table with its controls. With --init llada
or dream: fetches the weights and 50,000 conversations of Tulu-3, and trains the memory. torchrun
--nproc-per-node N train.py ... shares every batch out. All random draws follow from seed and
iteration, so that a resumed run, or one on more processes, sees what an uninterrupted one sees.
"""
import argparse
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from diffusion import diffusion_loss, unroll
from eval_gsm8k import gsm8k_file, read_jsonl, thinking_table
from metastate import MetaState, load_checkpoint, preset, save_checkpoint
from model import (RELEASES, TINY, Backbone, Config, Tokenizer, blame, cache_folder, ensure,
                   fetch_json, fetched, find_weights, kind_of, load_backbone, load_tokenizer,
                   read_config, save_backbone, tiny_tokenizer, write_atomically)
from sample import (COUNT, COUNT_OR_ZERO, DIAL_LENGTH, FRACTION, POSITIVE, SEED, WORDS, Processes,
                    add_device_options, between, dial_problems, is_chat, run_program, start_device)

# ---------------------------------------------------------------------------------------- DATA


class Text(NamedTuple):
    """An example before it is tokenised."""
    prompt: list[dict[str, str]] | str     # the turns of a chat, or plain text
    answer: str


def read_text(item: Any) -> Text:
    """An example in one of three forms; a chat up to its last assistant turn. Raises ValueError for
    anything else."""
    match item:
        case {"question": str(question), "answer": str(answer)}:
            return Text([{"role": "user", "content": question}], answer)
        case {"prompt": str(prompt), "completion": str(completion)}:
            return Text(prompt, completion)
        case {"messages": [*turns]}:
            for number, turn in enumerate(turns, 1):
                match turn:
                    case {"role": str(), "content": str()}:
                        continue
                raise ValueError(f"role or content of message {number} is no text")
            while turns and turns[-1]["role"] != "assistant":
                turns.pop()
            if len(turns) > 1:
                return Text(turns[:-1], turns[-1]["content"])
            raise ValueError("messages have no assistant turn after another")
    raise ValueError("it has neither question/answer, prompt/completion nor messages as text")


TULU = "allenai/tulu-3-sft-mixture"    # ODC-BY
TULU_ROWS = 50_000                     # as many as the paper took
TULU_SEED = 0                          # of the random choice of windows
WINDOW = 100                           # rows of one call, the most that the server gives
PAUSE = 0.7                            # seconds between calls: 500 in 5 minutes are allowed


def tulu_rows(offset: int, length: int) -> tuple[str, int, list]:
    """The data set's revision, how many rows it has, and some of them."""
    server = os.environ.get("HF_DATASETS_SERVER") or "https://datasets-server.huggingface.co"
    answer, headers = fetch_json(f"{server}/rows?dataset={TULU.replace('/', '%2F')}&config=default"
                                 f"&split=train&offset={offset}&length={length}")
    return headers["X-Revision"], answer["num_rows_total"], [row["row"] for row in answer["rows"]]


def fetch_tulu(path: Path) -> None:
    """Windows of rows at random offsets, since the rows may be sorted by source, as JSON lines. An
    interrupted fetch goes on after the last whole window."""
    revision, n_total, _ = tulu_rows(0, 1)
    part = path.with_suffix(f".{revision}.part")       # rows of two revisions are never mixed
    order = np.random.default_rng(TULU_SEED).permutation(n_total // WINDOW).tolist()
    with open(part, "a+b") as file:
        file.seek(0)
        lines = file.readlines()
        n_windows = sum(line.endswith(b"\n") for line in lines) // WINDOW
        file.truncate(sum(map(len, lines[:n_windows * WINDOW])))
        for number in tqdm(order[n_windows:TULU_ROWS // WINDOW], TULU, unit=" windows",
                           disable=None):
            time.sleep(PAUSE)
            now, _, rows = tulu_rows(number * WINDOW, WINDOW)
            ensure(now == revision and len(rows) == WINDOW, f"{TULU} changed meanwhile")
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            file.flush()
    about = {"dataset": TULU, "revision": revision, "seed": TULU_SEED, "window": WINDOW}
    write_atomically(path.with_name("about.json"), json.dumps(about).encode())
    os.replace(part, path)


DIAL_EXAMPLES = 30_000                 # of the built-in problems


def find_texts(data: str | None, kind: str) -> list[Text]:
    """The examples; what has to be fetched for them is fetched once."""
    if data is None and kind == "tiny":
        return [read_text(problem) for problem in dial_problems("train", DIAL_EXAMPLES)]
    if data == "gsm8k":
        path = gsm8k_file("train.jsonl")
    elif data in (None, "tulu3"):
        with blame(f"the download of {TULU}", "give a file by --data, or run again to go on"):
            path = fetched(cache_folder() / "tulu-3" / "conversations.jsonl", fetch_tulu)
    else:
        path = Path(data)
    return read_jsonl(path, read_text)


class TokenIds(NamedTuple):
    """An example: its prompt and its answer, which ends with end-of-text."""
    prompt: np.ndarray
    answer: np.ndarray


def tokenise(texts: list[Text], tokenizer: Tokenizer, eos_id: int, max_length: int, chat: bool
             ) -> list[TokenIds]:
    """What is longer than max_length, or no text for the tokeniser, is dropped with a count. Raises
    InputError if nothing is left."""
    examples = []
    for text in tqdm(texts, "tokenise", leave=False, disable=None):
        try:
            if isinstance(text.prompt, str):           # as it stands
                prompt = tokenizer.encode(text.prompt, special=False)
            elif chat:
                prompt = tokenizer.chat(text.prompt)
            else:                      # a base model knows no turns
                prompt = tokenizer.plain("".join(f"{m['content']}\n\n" for m in text.prompt))
            answer = tokenizer.encode(text.answer, special=False) + [eos_id]
        except ValueError:             # a million spaces, for example
            continue
        if len(prompt) + len(answer) <= max_length:
            examples.append(TokenIds(np.array(prompt, np.int32), np.array(answer, np.int32)))
    dropped = len(texts) - len(examples)
    if dropped:
        print(f"note: {dropped:,} of {len(texts):,} examples are dropped: longer than "
              f"{max_length} tokens, or no text for the tokeniser", file=sys.stderr)
    ensure(examples, f"no example has at most {max_length} tokens; raise --max-length")
    return examples


def digest(examples: list[TokenIds]) -> str:
    """What tells these data from others, under whatever name."""
    sha = hashlib.sha256()
    for example in examples:
        for ids in example:
            sha.update(ids.tobytes())
    return sha.hexdigest()[:16]


EPOCH, ITERATION = 0, 1                # streams of random numbers


@dataclass(eq=False)                   # hashed by identity, which lru_cache needs
class Batches:
    """Iteration -> global batch, rows of like length together. draw(rng, maskable) adds what is
    random in it, from a single generator, so that every process sees the same."""
    examples: list[TokenIds]
    batch: int                         # rows of an iteration, over all processes
    answer_length: int                 # answers are padded to at least this length
    pad_id: int
    seed: int
    draw: Callable[[np.random.Generator, np.ndarray], dict]

    def __post_init__(self) -> None:
        self.lengths = np.array([len(e.prompt) + max(len(e.answer), self.answer_length)
                                 for e in self.examples])
        self.per_epoch = max(1, len(self.examples) // self.batch)

    @lru_cache(1)                      # the epoch at hand
    def epoch(self, number: int) -> np.ndarray:
        """The examples of every batch of an epoch, (per_epoch, batch). Within windows of 64 batches
        they are sorted by length, which keeps padding small; the batches are shuffled again."""
        rng = np.random.default_rng((self.seed, EPOCH, number))
        order = rng.permutation(len(self.examples))
        order = np.resize(order, self.per_epoch * self.batch)  # drops less than a batch, or repeats
        window = np.arange(len(order)) // (64 * self.batch)
        order = order[np.lexsort((self.lengths[order], window))]
        return rng.permutation(order.reshape(self.per_epoch, self.batch))

    def __call__(self, iteration: int) -> dict:
        epoch, i = divmod(iteration, self.per_epoch)
        chosen = self.epoch(epoch)[i]
        ids = np.full((self.batch, self.lengths[chosen].max()), self.pad_id)   # (B, T)
        maskable = np.ones(ids.shape, bool)    # the padding, end-of-text, is to be learned, too
        for row, example in enumerate(self.examples[n] for n in chosen):
            n_prompt = len(example.prompt)
            ids[row, :n_prompt] = example.prompt
            ids[row, n_prompt:n_prompt + len(example.answer)] = example.answer
            maskable[row, :n_prompt] = False
        rng = np.random.default_rng((self.seed, ITERATION, iteration))
        return {"ids": ids, "maskable": maskable, **self.draw(rng, maskable)}


# ---------------------------------------------------------------------------------------- LOSS
# loss(model, batch): the mean over the rows of a batch, and the loss of each unrolled step.

VISIBLE_SHARE = 0.1                    # share of the maskable tokens that is scored though visible
THINK_SHARE = 0.5                      # share of the batches that begin with thinking passes


def backbone_draws(rng: np.random.Generator, maskable: np.ndarray) -> dict:
    """What diffusion_loss needs. The times are stratified: a batch covers [0, 1)."""
    B, T = maskable.shape
    t = (np.arange(B) + rng.random(B)) / B
    return {"t": t.astype(np.float32), "noise": rng.random((B, T), np.float32)}


def backbone_loss(backbone: Backbone, batch: dict) -> tuple[Tensor, Tensor]:
    # Some visible tokens are scored, too: so the layers learn to keep what they find in the
    # residual stream. What the Injector writes will stand there as a token's embedding does.
    loss = diffusion_loss(backbone, **batch, visible_share=VISIBLE_SHARE)
    return loss, loss.new_empty(0)     # nothing is unrolled


def memory_draws(args: argparse.Namespace) -> Callable:
    """What unroll needs: reveal counts from a Dirichlet-multinomial (the steps' shares, then the
    tokens by these shares), and how many passes come before: none in half of the batches, in the
    others log-uniform from 1 to args.think."""
    def draw(rng: np.random.Generator, maskable: np.ndarray) -> dict:
        B, T = maskable.shape
        shares = rng.dirichlet([args.alpha] * args.K, B)               # (B, K)
        thinks = args.think > 0 and rng.random() < THINK_SHARE
        return {
            "counts": rng.multinomial(maskable.sum(1), shares),        # (B, K)
            "noise": rng.random((B, T), np.float32),
            "by_confidence": rng.random(B) < args.confident,
            "think": round(args.think ** rng.random()) if thinks else 0,
        }
    return draw


def memory_loss(backbone: Backbone, args: argparse.Namespace) -> Callable:
    def loss(memory: MetaState, batch: dict) -> tuple[Tensor, Tensor]:
        return unroll(backbone, memory, **batch, lam=args.lam, carry=args.carry)
    return loss


# ------------------------------------------------------------------------------------ OPTIMISER

WARMUP = 100                           # iterations
DECAY = 0.4                            # of the run
WEIGHT_DECAY = 0.01
BETAS = (0.9, 0.99)                    # of AdamW
MOMENTUM = 0.95                        # of Muon
CLIP = 1.0                             # the largest norm of a gradient
# what the names of its parameters contain:
BY_ADAMW = ("embedding", "lm_head", "initial_slots", "sharpness", "gain", "conditioner")


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices inside layers and modules: each is a map between two spaces, and
    an update whose singular values are all alike moves it equally in every direction (K. Jordan
    2024; scaled so that rates mean what they mean for AdamW, arXiv 2502.16982). AdamW for tables
    such as embeddings and slots, for gains and biases, and for what reads the time."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        is_map = p.dim() == 2 and not any(part in BY_ADAMW for part in name.split("."))
        (matrices if is_map else others).append(p)
    return [
        torch.optim.Muon(matrices, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY,
                         adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=BETAS, weight_decay=WEIGHT_DECAY),
    ]


def learning_rate(iteration: int, iters: int, peak: float) -> float:
    """A line up to the peak, a plateau, and a line down to zero."""
    warmup = min(1, (iteration + 1) / WARMUP)
    decay = min(1, (1 - iteration / iters) / DECAY)
    return peak * warmup * decay


class Run(NamedTuple):
    """What every training of a run shares."""
    args: argparse.Namespace
    out: Path
    examples: list[TokenIds]
    answer_length: int                 # answers are padded to at least this length
    processes: Processes
    device: torch.device


def tensors(batch: dict, rows: slice, device: torch.device) -> dict:
    """Some rows of a batch on the device; think is one number for all rows."""
    return {name: value if isinstance(value, int) else torch.from_numpy(value[rows]).to(device)
            for name, value in batch.items()}


def global_gradient(run: Run, model: nn.Module, loss: Callable, batch: dict) -> list[float]:
    """Leave the gradient of the mean over the global batch in the parameters; returns that mean and
    those of the unrolled steps. A process takes its rows in micro-batches; then the processes add
    up."""
    rank, world = run.processes
    n_parts = world * run.args.accumulate
    n_rows = len(batch["ids"]) // n_parts      # check_options sees that it divides
    losses = 0
    for part in range(rank * run.args.accumulate, (rank + 1) * run.args.accumulate):
        rows = slice(part * n_rows, (part + 1) * n_rows)
        value, by_step = loss(model, tensors(batch, rows, run.device))
        (value / n_parts).backward()
        losses = losses + torch.cat((value.detach()[None], by_step)) / n_parts
    if world > 1:
        for tensor in [losses, *(p.grad for p in model.parameters() if p.grad is not None)]:
            dist.all_reduce(tensor)
    return losses.tolist()


# ---------------------------------------------------------------------------------------- LOOP

SAVE_ITERATIONS = 100                  # a checkpoint after so many iterations,
SAVE_SECONDS = 300                     # or after so long


def fit(run: Run, model: nn.Module, loss: Callable, batches: Batches, path: Path, *, iters: int,
        lr: float, backbone: dict | None = None) -> None:
    """Train model in place, its checkpoint in path, a log beside it. lr: the peak. backbone: name
    and digest of the one that a memory is trained on."""
    is_first_process = run.processes.rank == 0
    # arguments() has seen to it that a resumed run has its checkpoint's settings
    settings = {key: value for key, value in vars(run.args).items() if key not in ("out", "resume")}
    made_with = {"settings": settings, "backbone": backbone, "data": digest(run.examples)}
    both = optimizers(model)
    start = 0
    if run.args.resume and path.exists():
        state = load_checkpoint(path)
        with blame(path, "give the --data and --init that it was trained with, or another --out"):
            same = backbone is None or state["backbone"]["digest"] == backbone["digest"]
            ensure(same, f"{path} was trained on another backbone; give that, or another --out")
            ensure(state["data"] == made_with["data"], f"{path} was trained on other data; give "
                   "those by --data, or another --out")
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(both, state["optimizers"]):    # none when it is finished
                optimizer.load_state_dict(saved)
            start = state["iteration"]

    log = path.with_suffix(".log.jsonl")
    if is_first_process:               # what came after the checkpoint will be written again
        lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
        write_atomically(log, b"".join(lines[:start]))
    bar = tqdm(range(start, iters), path.stem, iters, initial=start,
               disable=None if is_first_process else True)     # None: on a terminal only
    saved_at = time.monotonic()
    for iteration in bar:
        # 1. the gradient; where it is not finite nothing is updated or saved
        value, *by_step = global_gradient(run, model, loss, batches(iteration))
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
        ensure(math.isfinite(value) and math.isfinite(norm), f"at iteration {iteration} the loss "
               f"became {value} with a gradient of norm {norm}; go on from {path}, if it is there, "
               "by --resume and a lower --lr (or --backbone-lr), or clean the data")

        # 2. an update by each optimiser
        for optimizer in both:
            optimizer.param_groups[0]["lr"] = learning_rate(iteration, iters, lr)
            optimizer.step()
            optimizer.zero_grad()

        # 3. a line of the log
        if not is_first_process:
            continue
        shown = f"loss {value:.3f}"
        if by_step:
            shown += f" (first step {by_step[0]:.3f}, last {by_step[-1]:.3f})"
        bar.set_postfix_str(shown, refresh=False)
        line = {"iteration": iteration, "loss": value, "by_step": by_step, "norm": norm}
        with open(log, "a") as file:
            file.write(json.dumps(line) + "\n")

        # 4. a checkpoint; a finished run needs no optimiser any more
        done = iteration + 1
        due = done % SAVE_ITERATIONS == 0 or time.monotonic() - saved_at > SAVE_SECONDS
        if due or done == iters:
            states = [] if done == iters else [optimizer.state_dict() for optimizer in both]
            save_checkpoint(path, model, iteration=done, optimizers=states, **made_with)
            saved_at = time.monotonic()
            if bar.disable:
                print(f"{path.stem} {done}/{iters} {shown}", flush=True)


def train_backbone(run: Run, config: Config, words: list[str]) -> Backbone:
    """A new tiny backbone, trained as LLaDA is, saved as a checkpoint folder, then frozen."""
    args = run.args
    torch.manual_seed(args.seed)
    backbone = Backbone(config).to(run.device)
    batches = Batches(run.examples, args.backbone_batch, run.answer_length, config.pad_id,
                      args.seed, backbone_draws)
    fit(run, backbone, backbone_loss, batches, run.out / "backbone.pt", iters=args.backbone_iters,
        lr=args.backbone_lr)
    if run.processes.rank == 0:
        save_backbone(backbone, run.out / "backbone", words)
    return backbone.requires_grad_(False)


def train_memory(run: Run, backbone: Backbone, path: Path, memory: MetaState | None = None
                 ) -> MetaState:
    """A memory, new if none is given, trained on a frozen backbone."""
    args = run.args
    if memory is None:
        torch.manual_seed(args.seed)
        memory = MetaState(preset(backbone)).to(run.device)
    batches = Batches(run.examples, args.batch, run.answer_length, backbone.config.pad_id,
                      args.seed, memory_draws(args))
    is_folder = args.init != "tiny" and Path(args.init).is_dir()
    name = str(Path(args.init).resolve()) if is_folder else args.init
    fit(run, memory, memory_loss(backbone, args), batches, path, iters=args.iters, lr=args.lr,
        backbone={"name": name, "digest": backbone.digest()})
    return memory


@torch.no_grad()
def held_out_losses(run: Run, backbone: Backbone, memory: MetaState, examples: list[TokenIds]
                    ) -> dict[str, float]:
    """unroll's mean loss over examples that no training saw, without first passes: of the frozen
    backbone, of the memory reset before every step, and of the memory."""
    batches = Batches(examples, 1, run.answer_length, backbone.config.pad_id, run.args.seed,
                      memory_draws(run.args))
    untrained = MetaState(memory.config).to(run.device)        # a no-op: the frozen backbone

    def mean_loss(module: MetaState, carry: str = "keep") -> float:
        losses = []
        for i in range(len(examples)):
            batch = tensors(batches(i), slice(None), run.device) | {"think": 0}
            loss, _ = unroll(backbone, module, **batch, lam=run.args.lam, carry=carry)
            losses.append(loss.item())
        return np.mean(losses)

    return {"frozen": mean_loss(untrained), "memory reset": mean_loss(memory, "reset"),
            "MetaState": mean_loss(memory)}


# ----------------------------------------------------------------------------------- THE PROGRAM

HELD_OUT = 100                         # examples at most, of the last tenth

# In place of the defaults that the options have below:
LARGE_DEFAULTS = dict(max_length=1024, confident=0.0, think=16, iters=3000, batch=16,
                      accumulate=16, lr=3e-4)
# What may be given beside --resume; all else is the checkpoint's.
MAY_CHANGE = ("weights", "data", "device", "compile", "accumulate", "keep_activations", "lr",
              "backbone_lr", "split", "problems")


def make_parser() -> argparse.ArgumentParser:
    large = ", ".join(f"--{name} {value}" for name, value in LARGE_DEFAULTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="In brackets stand the defaults of a tiny "
        f"backbone; those of others: {large.replace('_', '-')}.")

    def option(name: str, kind: Callable | None, default: Any, text: str, **more: Any) -> None:
        group.add_argument(f"--{name}", type=kind, default=default, help=f"{text} ({default})",
                           **more)

    group = parser.add_argument_group("run")
    option("init", None, "tiny", f"tiny: trains its own backbone; {', '.join(RELEASES)}, "
           "ORGANISATION/MODEL on the hub, or a checkpoint folder", metavar="MODEL")
    group.add_argument("--weights", metavar="FOLDER",
                       help="the weights of --init, where they lie elsewhere")
    option("seed", SEED, 0, "seed of all random draws")
    group.add_argument("--out", type=Path, help="folder of checkpoints and logs (out/INIT)")
    group.add_argument("--resume", action="store_true",
                       help="go on with the run in --out and its settings")
    add_device_options(parser)

    group = parser.add_argument_group("data")
    group.add_argument("--data", help="tulu3, gsm8k, or a file of JSON lines with question/answer, "
                       "messages or prompt/completion (the built-in problems for tiny, else tulu3)")
    option("max-length", COUNT, 64, "longer examples, in tokens, are dropped")

    group = parser.add_argument_group("unrolling")
    option("K", between(int, 1, 1000), 4, "denoising steps that are unrolled")
    option("lam", FRACTION, 0.5, "weight of the loss on every masked token; the rest is on those "
           "revealed next")
    option("alpha", POSITIVE, 1.0, "Dirichlet concentration: the larger, the more alike the steps")
    option("confident", FRACTION, 1.0, "share of the rows that reveal where the model is surest, "
           "not at random")
    option("think", COUNT_OR_ZERO, 64, "half of the batches begin with up to so many passes that "
           "reveal nothing and have no gradient")
    option("carry", None, "keep", "the memory between steps; reset is the memoryless control",
           choices=("keep", "reset"))
    group.add_argument("--keep-activations", action="store_true",
                       help="faster than to recompute them, but larger")

    group = parser.add_argument_group("optimiser")
    option("iters", COUNT, 600, "iterations")
    option("batch", COUNT, 64, "rows of an iteration, over all processes and micro-batches")
    option("accumulate", COUNT, 1, "micro-batches in which a process takes its rows")
    option("lr", POSITIVE, 5e-3, "peak learning rate")

    group = parser.add_argument_group("tiny backbone and table")
    option("backbone-iters", COUNT, 600, "iterations")
    option("backbone-batch", COUNT, 128, "rows of an iteration")
    option("backbone-lr", POSITIVE, 1e-2, "peak learning rate")
    option("split", None, "test", "which problems the table uses", choices=("valid", "test"))
    option("problems", COUNT_OR_ZERO, 1000, "how many problems the table uses; 0: no table")
    return parser


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, from a list of them or the command line. A resumed run has its checkpoint's."""
    parser = make_parser()
    args = parser.parse_args(argv)
    out = args.out or Path("out") / Path(args.init).resolve().name
    checkpoints = [path for path in (out / "memory.pt", out / "backbone.pt") if path.exists()]
    saved = {}
    if args.resume:
        ensure(checkpoints, f"{out} holds no checkpoint to go on with; omit --resume, or give "
               "another --out")
        with blame(checkpoints[0], "give the --out of a run of train.py"):
            saved = load_checkpoint(checkpoints[0])["settings"]
            ensure(saved["init"] != "tiny" or out / "backbone.pt" in checkpoints, f"{out} has no "
                   "backbone.pt to go on with; give another --out")
            parser.set_defaults(**saved)
    else:
        has_run = checkpoints or (out / "backbone").exists()
        ensure(not has_run, f"{out} holds a run; go on with it by --resume, or give another --out")
        if args.init != "tiny" and kind_of(args.weights or args.init) != "tiny":
            parser.set_defaults(**LARGE_DEFAULTS)
    args = parser.parse_args(argv)     # again: over the defaults that hold here
    for key, value in saved.items():
        given = getattr(args, key)
        ensure(key in MAY_CHANGE or given == value, f"the run in {out} has {key} = {value}, not "
               f"{given}; omit the option, or give another --out")
    args.out = out
    return args


def check_options(args: argparse.Namespace, world: int) -> None:
    """What can be wrong before anything is fetched or loaded."""
    sizes = {"--batch": args.batch}
    if args.init == "tiny":
        sizes["--backbone-batch"] = args.backbone_batch
        ensure(not args.weights, "--init tiny trains a backbone of its own; omit --weights, or "
               "give the folder by --init")
    n_parts = world * args.accumulate
    for option, size in sizes.items():
        ensure(size % n_parts == 0, f"{option} {size} is no multiple of {n_parts}, processes times "
               "--accumulate; make it one")
    ensure(args.problems != 1, "--problems 1 leaves no other sample whose memory a control could "
           "take; give 0 for no table, or two or more")
    with blame(f"--out {args.out}", "give a folder that can be written"):
        args.out.mkdir(parents=True, exist_ok=True)


def main() -> None:
    begin = time.time()
    args = arguments()
    own_backbone = args.init == "tiny"
    weights = args.weights or args.init
    kind = "tiny" if own_backbone else kind_of(weights)
    device, processes = start_device(args.device, kind)
    check_options(args, processes.world)
    built_in = kind == "tiny" and args.data is None
    n_problems = args.problems if built_in else 0
    plan = f"memory, {args.iters} iterations; "
    if own_backbone:
        plan = f"backbone, {args.backbone_iters} iterations; {plan}"
    if n_problems:
        plan += f"table, {n_problems} {args.split} problems; "
    if processes.rank == 0:
        print(f"{plan}on {device} x {processes.world}, into {args.out}", flush=True)

    # 1. data, and a frozen backbone: one of our own, or one off the shelf
    texts = find_texts(args.data, kind)
    tokenizer = tiny_tokenizer(WORDS) if own_backbone else load_tokenizer(weights)
    config = TINY if own_backbone else read_config(find_weights(weights))
    examples = tokenise(texts, tokenizer, config.eos_id, args.max_length, is_chat(args.init))
    n_held_out = 0 if built_in else min(HELD_OUT, len(examples) // 10)
    n_seen = len(examples) - n_held_out
    answer_length = DIAL_LENGTH if kind == "tiny" else 0
    run = Run(args, args.out, examples[:n_seen], answer_length, processes, device)
    if own_backbone:
        backbone = train_backbone(run, config, WORDS)
    else:
        backbone = load_backbone(weights, device=device)
        backbone.recompute = kind != "tiny" and not args.keep_activations
    if args.compile:
        backbone.compile_layers()

    # 2. its memory
    memory = train_memory(run, backbone, args.out / "memory.pt")

    # 3. the score: the table of the built-in problems, or the loss of what was held out
    if processes.rank > 0:
        return
    if n_held_out:
        losses = held_out_losses(run, backbone, memory, examples[n_seen:])
        shown = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        print(f"loss of {n_held_out} held-out examples: {shown}")
    if n_problems:
        problems = dial_problems(args.split, n_problems)
        text, results = thinking_table(backbone, tokenizer, problems, memory)
        print(f"\n{text}")
        write_atomically(args.out / "table.md", text.encode())
        write_atomically(args.out / "table.json", json.dumps(results).encode())
    thinking = " --think 4 --steps 1" if kind == "tiny" else ""
    print(f"done in {(time.time() - begin) / 60:.1f} minutes; now try\n"
          f"  python sample.py --init {args.out}{thinking} --show-steps\n"
          f"  python eval_gsm8k.py --init {args.out}{thinking}")


if __name__ == "__main__":
    run_program(main, if_interrupted="what a checkpoint holds is kept, --resume goes on from it")
