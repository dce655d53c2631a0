"""Train the memory of a frozen backbone: python train.py [--init llada]

Without arguments, on any machine: trains the tiny backbone on the built-in problems, freezes it,
trains MetaState on it by K-step unrolling and the same modules without persistence as a control,
evaluates all of them and prints tables. With --init llada or dream: fetches the weights and
50,000 conversations of Tulu-3, and trains the memory. torchrun --nproc-per-node N train.py ...
shares every batch out. All random draws follow from seed, step and row, so that a resumed run, or
one on more processes, sees what an uninterrupted one sees.
"""
import os
import signal
import sys

if __name__ == "__main__":             # Ctrl-C while torch is being loaded: no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import json
import math
import shutil
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from diffusion import diffusion_loss, unroll
from eval_gsm8k import (PROTOCOLS, WORDS, Bench, contestants, dial_problems, gsm8k_file, read_jsonl,
                        schedule_table, thinking_table)
from metastate import MetaState, load_checkpoint, preset, save_checkpoint
from model import (PRESETS, TINY, Backbone, Config, Tokenizer, blame, cache_folder, check_output,
                   ensure, fetch_json, fetched, load_backbone, load_tokenizer, locked, read_config,
                   save_backbone, tiny_tokenizer, write_atomically)
from sample import (COUNT, COUNT_OR_ZERO, POSITIVE, SEED, SHARE, Processes, add_device_options,
                    between, run_program, start_device)

THINK_SHARE = 0.5                  # of the batches begin with passes that reveal nothing
VISIBLE_SHARE = 0.1                # of the maskable tokens teach the tiny backbone though visible
WARMUP = 100                       # steps
WEIGHT_DECAY = 0.01
BETAS = (0.9, 0.99)
BACKBONE_FINAL_LR = 0.1            # of its peak; at zero a few look-ups may stay unlearned
CLIP = 1.0                         # the largest norm of a gradient

# ---------------------------------------------------------------------------------------- DATA


class Text(NamedTuple):
    """An example before it is tokenised."""
    prompt: list[dict[str, str]] | str     # the turns of a chat, or plain text
    answer: str


def read_text(item: object) -> Text:
    """An example in one of three forms; a chat up to its last assistant turn. Raises ValueError for
    anything else."""
    match item:
        case {"question": str(question), "answer": str(answer)}:
            return Text([{"role": "user", "content": question}], answer)
        case {"prompt": str(prompt), "completion": str(completion)}:
            return Text(prompt, completion)
        case {"messages": [*turns]} if all(map(is_turn, turns)):
            while turns and turns[-1]["role"] != "assistant":
                turns.pop()
            if len(turns) > 1:
                return Text(turns[:-1], turns[-1]["content"])
    raise ValueError("it has neither question/answer nor prompt/completion as text, nor messages, "
                     "a list of {role, content} with an assistant turn after another")


def is_turn(item: object) -> bool:
    match item:
        case {"role": str(), "content": str()}:
            return True
    return False


def read_texts(path: Path) -> list[Text]:
    texts = []
    for number, item in read_jsonl(path):
        with blame(f"{path} line {number}", "mend or remove it"):
            texts.append(read_text(item))
    return texts


TULU = "allenai/tulu-3-sft-mixture"    # ODC-BY
TULU_ROWS = 50_000                     # as many as the paper took
TULU_SEED = 0                          # of their choice
WINDOW = 100                           # rows of one call, the most that the server gives
PAUSE = 0.7                            # seconds between calls: 500 in 5 minutes are allowed


def tulu_file() -> Path:
    """50,000 conversations of the Tulu-3 SFT mixture as JSON lines, fetched once."""
    return fetched(cache_folder() / "tulu-3" / "conversations.jsonl", fetch_tulu)


def fetch_window(offset: int, length: int) -> tuple[str | None, int, list]:
    """The data set's revision, how many rows it has, and those from offset on."""
    server = os.environ.get("HF_DATASETS_SERVER", "https://datasets-server.huggingface.co")
    dataset = TULU.replace("/", "%2F")
    url = (f"{server}/rows?dataset={dataset}&config=default&split=train"
           f"&offset={offset}&length={length}")
    answer, headers = fetch_json(url)
    with blame(url, "its answer has another form than expected; give a file by --data"):
        rows = [row["row"] for row in answer["rows"]]
        return headers.get("X-Revision"), int(answer["num_rows_total"]), rows


def conversation_lines(rows: list) -> bytes:
    """JSON lines of the rows that are conversations; a few are not."""
    lines = b""
    for row in rows:
        with suppress(ValueError, LookupError, TypeError):
            conversation = {"messages": row["messages"]}
            read_text(conversation)
            lines += json.dumps(conversation).encode() + b"\n"
    return lines


def fetch_tulu(path: Path) -> None:
    """Windows of rows at random offsets, since the rows may be sorted by source. Every window is a
    file until all of them are joined, so that an interrupted fetch goes on."""
    revision, n_total, _ = fetch_window(0, 1)
    order = np.random.default_rng(TULU_SEED).permutation(n_total // WINDOW)
    windows = path.with_name("windows")
    lines = []
    offsets = []
    bar = tqdm(total=TULU_ROWS, desc=TULU, unit=" conversations", disable=None)
    for offset in (order * WINDOW).tolist():
        part = windows / str(revision) / f"{offset}.jsonl"     # rows of two revisions never mix
        if not part.exists():
            time.sleep(PAUSE)
            revision_now, _, rows = fetch_window(offset, WINDOW)
            ensure(revision_now == revision, f"{TULU} was changed while it was fetched; run "
                   "again, it begins anew")
            write_atomically(part, conversation_lines(rows))
        new_lines = part.read_bytes().splitlines(keepends=True)
        lines += new_lines
        offsets.append(offset)
        bar.update(len(new_lines))
        if len(lines) >= TULU_ROWS:
            break
    bar.close()
    ensure(len(lines) >= TULU_ROWS, f"{TULU} has {len(lines):,} conversations where {TULU_ROWS:,} "
           "are wanted; give a file of your own by --data")
    about = {"dataset": TULU, "revision": revision, "seed": TULU_SEED, "window": WINDOW,
             "offsets": offsets}
    write_atomically(path.with_name("about.json"), json.dumps(about).encode())
    write_atomically(path, b"".join(lines[:TULU_ROWS]))
    shutil.rmtree(windows)


class TokenIds(NamedTuple):
    """An example: its prompt and its answer, which ends with end-of-text."""
    prompt: np.ndarray
    answer: np.ndarray


def tokenise(texts: list[Text], tokenizer: Tokenizer, eos_id: int, max_length: int
             ) -> list[TokenIds]:
    """What is longer than max_length is dropped, with a count. Raises InputError if nothing is
    left."""
    examples = []
    for text in tqdm(texts, desc="tokenise", leave=False, disable=None):
        if isinstance(text.prompt, str):
            prompt = tokenizer.encode(text.prompt, special=False)
        else:
            prompt = tokenizer.chat(text.prompt)
        answer = tokenizer.encode(text.answer, special=False) + [eos_id]
        examples.append(TokenIds(np.array(prompt, np.int32), np.array(answer, np.int32)))
    fitting = [e for e in examples if len(e.prompt) + len(e.answer) <= max_length]
    dropped = len(examples) - len(fitting)
    if dropped:
        print(f"{dropped:,} of {len(examples):,} examples are longer than {max_length} tokens and "
              "dropped", file=sys.stderr)
    ensure(fitting, f"no example has at most {max_length} tokens; raise --max-length")
    return fitting


class Run(NamedTuple):
    """What every training of a run shares."""
    args: argparse.Namespace
    out: Path
    examples: list[TokenIds]
    answer_length: int                 # answers are padded to at least this length
    processes: Processes
    device: torch.device


@dataclass(eq=False)                   # hashed by identity, which lru_cache needs
class Batches:
    """Step -> global batch, the same for any number of processes, rows of like length together."""
    run: Run
    batch: int                         # rows of a step, over all processes and micro-batches
    pad_id: int

    def __post_init__(self) -> None:
        self.lengths = np.array([len(e.prompt) + max(len(e.answer), self.run.answer_length)
                                 for e in self.run.examples])
        self.per_epoch = max(1, len(self.run.examples) // self.batch)

    @lru_cache(1)                      # the epoch at hand
    def epoch(self, number: int) -> np.ndarray:
        """The examples of every batch of an epoch, (per_epoch, batch). Within windows of 64 batches
        they are sorted by length, which keeps padding small; the batches are shuffled again."""
        rng = np.random.default_rng((self.run.args.seed, number))
        order = rng.permutation(len(self.run.examples))
        order = np.resize(order, self.per_epoch * self.batch)  # drops less than a batch, or repeats
        size = 64 * self.batch
        windows = np.split(order, range(size, len(order), size))
        by_length = [w[np.argsort(self.lengths[w], kind="stable")] for w in windows]
        return rng.permutation(np.concatenate(by_length).reshape(self.per_epoch, self.batch))

    def row(self, step: int, b: int, example: TokenIds, T: int) -> dict:
        """Row b of a step's batch, padded to T tokens, with every random draw that it needs."""
        n_prompt, n_answer = len(example.prompt), len(example.answer)
        ids = np.full(T, self.pad_id)
        ids[:n_prompt] = example.prompt
        ids[n_prompt:n_prompt + n_answer] = example.answer
        args = self.run.args
        rng = np.random.default_rng((args.seed, step, b))
        t = (b + rng.random()) / self.batch            # stratified: the batch covers [0, 1)
        noise = rng.random(T, np.float32)
        shares = rng.dirichlet([args.alpha] * args.K)
        return {
            "ids": ids,                                # (T,)
            "maskable": np.arange(T) >= n_prompt,      # the padding, end-of-text, is to be learned
            "t": np.float32(t),
            "noise": noise,
            "counts": rng.multinomial(T - n_prompt, shares),   # (K,)
            "by_confidence": rng.random() < args.confident,
        }

    def __call__(self, step: int, part: slice, device: torch.device) -> dict:
        """Rows `part` of the batch of a step: tensors with B first, and how long to think."""
        epoch, i = divmod(step, self.per_epoch)
        chosen = self.epoch(epoch)[i]
        T = self.lengths[chosen].max()
        numbers = range(self.batch)[part]
        rows = [self.row(step, b, self.run.examples[chosen[b]], T) for b in numbers]
        batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])).to(device)
                 for name in rows[0]}
        args = self.run.args
        rng = np.random.default_rng((args.seed, step, self.batch))     # no row has this number
        thinks = rng.random() < THINK_SHARE
        batch["think"] = int(rng.integers(args.think + 1)) if thinks else 0
        return batch


# ---------------------------------------------------------------------------------------- LOOP

# Options that may change when a run is resumed; all others must stay as they were.
MAY_CHANGE = ("lr", "backbone_lr", "out", "resume", "save_every", "weights", "device", "compile",
              "accumulate", "keep_activations", "split", "problems")


def backbone_loss(backbone: Backbone, batch: dict) -> tuple[Tensor, Tensor]:
    # Some visible tokens are scored, too. So the layer learns to keep a token whose embedding is in
    # the residual stream, and will not erase what the Injector writes at a masked position.
    loss = diffusion_loss(backbone, batch["ids"], batch["maskable"], batch["t"], batch["noise"],
                          visible_share=VISIBLE_SHARE)
    return loss, loss.detach()[None]


def memory_loss(backbone: Backbone, lam: float, carry: str) -> Callable:
    def loss(memory: MetaState, batch: dict) -> tuple[Tensor, Tensor]:
        draws = {name: value for name, value in batch.items() if name != "t"}
        return unroll(backbone, memory, **draws, lam=lam, carry=carry)
    return loss


def learning_rate(step: int, iters: int, peak: float, final: float) -> float:
    """Linear warm-up, and a cosine from the peak to a final share of it."""
    warmup = min(1, (step + 1) / WARMUP)
    cosine = 0.5 * (1 + math.cos(math.pi * step / iters))
    return peak * warmup * (final + (1 - final) * cosine)


def global_gradient(run: Run, model: nn.Module, loss: Callable, batches: Batches, step: int
                    ) -> list[float]:
    """Leave the gradient of the mean over the global batch in the parameters, and return that mean
    and its parts. A process takes its rows in micro-batches; then the processes add up."""
    rank, world = run.processes
    micro_batches = run.args.accumulate
    n_shares = world * micro_batches
    rows = batches.batch // n_shares
    losses = 0
    for i in range(micro_batches):
        first = (rank * micro_batches + i) * rows
        batch = batches(step, slice(first, first + rows), run.device)
        value, parts = loss(model, batch)
        (value / n_shares).backward()
        losses = losses + torch.cat((value.detach()[None], parts)) / n_shares
    if world > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for tensor in [losses, *gradients]:
            dist.all_reduce(tensor)
    return losses.tolist()


@contextmanager
def stop_signals() -> Iterator[list]:
    """A list that is not empty after Ctrl-C or SIGTERM: a loop can end between two steps. One that
    comes after the loop's last look at it is a KeyboardInterrupt at the end of the block."""
    received = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *what: received.append(what)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt


def any_process(run: Run, flag: bool) -> bool:
    """Whether the flag is up in any process, so that all of them do the same."""
    total = torch.tensor(float(flag), device=run.device)
    if run.processes.world > 1:
        dist.all_reduce(total)
    return total.item() > 0


def resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, made_with: dict,
           iters: int) -> int:
    """Take up a checkpoint; the number of steps that it has behind it. Raises InputError where the
    run was begun with other settings."""
    state = load_checkpoint(path)
    with blame(path, "it was changed or belongs to another program; give another --out"):
        for key, value in made_with["settings"].items():
            before = state["settings"].get(key)
            ensure(before == value, f"{path} was trained with {key} = {before}, not {value}; give "
                   "that, or another --out")
        ensure(state["backbone"] == made_with["backbone"], f"{path} was trained on another "
               "backbone; give that, or another --out")
        model.load_state_dict(state["model"])
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        for p, moments in optimizer.state.items():     # torch itself does not compare them
            if not p.shape == moments["exp_avg"].shape == moments["exp_avg_sq"].shape:
                raise ValueError("its optimiser is that of another model")
        if type(state["step"]) is not int or not 0 <= state["step"] <= iters:
            raise ValueError("its step lies outside this run")
    return state["step"]


def start_log(log: Path, n_lines: int) -> None:
    """Keep the lines up to the checkpoint; what came after it will be written again."""
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    write_atomically(log, b"".join(lines[:n_lines]))


def fit(run: Run, model: nn.Module, loss: Callable, batches: Batches, path: Path, *, iters: int,
        lr: float, final_lr: float = 0.0, backbone: dict | None = None) -> None:
    """Train model in place for iters steps, its checkpoint in path, a log beside it.

    loss(model, batch): the mean over the rows of a batch, and a vector of its parts, of which the
    first and the last are shown. lr: the peak; the share final_lr of it is left at the end.
    backbone: name and digest of the one that a memory is trained on.
    """
    is_first_process = run.processes.rank == 0
    settings = {key: str(value) for key, value in vars(run.args).items()
                if key not in MAY_CHANGE}
    made_with = {"settings": settings, "backbone": backbone}
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY)
    start = 0
    if run.args.resume and path.exists():
        start = resume(path, model, optimizer, made_with, iters)
    log = path.with_suffix(".log.jsonl")
    if is_first_process:
        check_output(path)
        start_log(log, start)
    bar = tqdm(range(start, iters), path.stem, iters, initial=start,
               disable=None if is_first_process else True)     # None: on a terminal only

    with stop_signals() as received:
        for step in bar:
            # 1. the gradient; where it is not finite nothing is stepped or saved
            value, *parts = global_gradient(run, model, loss, batches, step)
            norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
            ensure(math.isfinite(value) and math.isfinite(norm), f"at step {step} the loss became "
                   f"{value} with a gradient of norm {norm}; go on from {path}, if it is there, by "
                   "--resume and a lower --lr (or --backbone-lr), or clean the data")

            # 2. a step of the optimiser
            optimizer.param_groups[0]["lr"] = learning_rate(step, iters, lr, final_lr)
            optimizer.step()
            optimizer.zero_grad()

            # 3. a line of the log
            shown = f"loss {parts[0]:.3f} .. {parts[-1]:.3f}"
            bar.set_postfix_str(shown, refresh=False)
            if is_first_process:
                line = {"step": step, "loss": value, "by_step": parts, "norm": norm}
                with blame(log, "make room"), open(log, "a") as file:
                    file.write(json.dumps(line) + "\n")

            # 4. a checkpoint; a finished run needs no optimiser any more
            done = step + 1
            stopped = any_process(run, bool(received))
            due = done % run.args.save_every == 0 or done == iters or stopped
            if due and is_first_process:
                more = {} if done == iters else {"optimizer": optimizer.state_dict()}
                save_checkpoint(path, model, step=done, **made_with, **more)
                if bar.disable:
                    print(f"{path.stem} {done}/{iters} {shown}", flush=True)
            if stopped:
                raise KeyboardInterrupt        # run_program says how to go on


# ----------------------------------------------------------------------------------- THE PROGRAM

class Default(NamedTuple):
    """Of an option: for the tiny backbone on a laptop, and for one of 8B on a GPU."""
    tiny: float
    large: float

    def __str__(self) -> str:
        return f"{self.tiny} for tiny, else {self.large}"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, from a list of them or the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("run").add_argument
    add("--init", default="tiny", help=f"{', '.join(PRESETS)}, or a checkpoint folder")
    add("--weights", type=Path, help="folder with the weights of --init, else found or downloaded")
    add("--out", type=Path, help="folder of checkpoints and logs (default: out/INIT)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--save-every", type=COUNT, default=100, help="steps between checkpoints (%(default)s)")
    add("--seed", type=SEED, default=0)
    add_device_options(parser)

    add = parser.add_argument_group("data").add_argument
    add("--data", help="tulu3, gsm8k, or a file of JSON lines with question/answer, messages or "
        "prompt/completion (default: the built-in problems for tiny, else tulu3)")
    add("--max-length", type=COUNT, default=Default(64, 1024),
        help="longer examples, in tokens, are dropped (%(default)s)")

    add = parser.add_argument_group("unrolling").add_argument
    add("--K", type=between(int, 1, 1000), default=Default(6, 4),
        help="denoising steps of a trajectory (%(default)s)")
    add("--lam", type=SHARE, default=0.5,
        help="weight of the loss on every masked token; the rest is on those revealed next "
        "(%(default)s)")
    add("--alpha", type=POSITIVE, default=1.0,
        help="Dirichlet concentration: the larger, the more alike the steps (%(default)s)")
    add("--confident", type=SHARE, default=Default(1.0, 0.0),
        help="share of the rows that reveal where the model is surest, not at random (%(default)s)")
    add("--think", type=between(int, 0, 10 ** 5), default=Default(16, 12),
        help="half of the batches begin with up to so many passes that reveal nothing and have no "
        "gradient (%(default)s)")
    add("--carry", default="keep", choices=("keep", "reset"),
        help="the memory between steps; reset is the memoryless control (%(default)s)")
    add("--keep-activations", action="store_true", help="faster than to recompute them, but larger")

    add = parser.add_argument_group("optimiser").add_argument
    add("--iters", type=COUNT, default=Default(1400, 3000), help="steps (%(default)s)")
    add("--batch", type=COUNT, default=Default(64, 16),
        help="rows of a step, over all processes and micro-batches (%(default)s)")
    add("--accumulate", type=COUNT, default=Default(1, 16),
        help="micro-batches in which a process takes its rows of a step (%(default)s)")
    add("--lr", type=POSITIVE, default=Default(3e-3, 3e-4), help="its peak (%(default)s)")

    add = parser.add_argument_group("tiny backbone and tables").add_argument
    add("--backbone-iters", type=COUNT, default=3000, help="(%(default)s)")
    add("--backbone-batch", type=COUNT, default=128, help="(%(default)s)")
    add("--backbone-lr", type=POSITIVE, default=2e-3, help="(%(default)s)")
    add("--split", default="test", choices=("valid", "test"), help="of the problems (%(default)s)")
    add("--problems", type=COUNT_OR_ZERO, default=1000, help="0: no tables (%(default)s)")

    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, Default):
            setattr(args, name, value.tiny if args.init == "tiny" else value.large)
    return args


def check_options(args: argparse.Namespace, out: Path, world: int = 1) -> None:
    """What can be wrong before anything is fetched or loaded."""
    sizes = {"--batch": args.batch}
    weights = args.weights
    if args.init == "tiny":
        sizes["--backbone-batch"] = args.backbone_batch
        ensure(not weights, "--init tiny trains a backbone of its own; omit --weights, or "
               "give the folder by --init")
    elif args.init not in PRESETS:
        read_config(weights or Path(args.init))        # refuses what is no checkpoint folder
    elif weights:
        kind = read_config(weights).kind
        ensure(kind == PRESETS[args.init].config.kind, f"{weights} holds a {kind} model; give a "
               f"folder of --init {args.init}, or another --init")
    n_shares = world * args.accumulate
    for option, size in sizes.items():
        ensure(size % n_shares == 0, f"{option} {size} is no multiple of {n_shares}, processes "
               "times --accumulate; make it one")
    has_run = (out / "backbone").exists() or any(out.glob("*.pt"))
    ensure(args.resume or not has_run, f"{out} holds a run; go on with it by --resume, or give "
           "another --out")
    first = "backbone.pt" if args.init == "tiny" else "memory.pt"
    ensure((out / first).exists() or not args.resume, f"{out} holds no {first} to go on with; omit "
           "--resume, or give another --out")
    ensure(args.problems != 1, "--problems 1 leaves no other sample whose memory a control could "
           "take; give 0 for no tables, or two or more")


def find_texts(args: argparse.Namespace) -> list[Text]:
    """The examples; what has to be fetched for them is fetched once."""
    if args.data is None and args.init == "tiny":
        return [read_text(problem) for problem in dial_problems("train", 30_000)]
    if args.data in (None, "tulu3"):
        return read_texts(tulu_file())
    return read_texts(gsm8k_file("train.jsonl") if args.data == "gsm8k" else Path(args.data))


def train_backbone(run: Run, config: Config, words: list[str]) -> Backbone:
    """A new tiny backbone, trained as LLaDA is, saved as a checkpoint folder, then frozen."""
    args = run.args
    torch.manual_seed(args.seed)
    backbone = Backbone(config).to(run.device)
    batches = Batches(run, args.backbone_batch, config.pad_id)
    fit(run, backbone, backbone_loss, batches, run.out / "backbone.pt", iters=args.backbone_iters,
        lr=args.backbone_lr, final_lr=BACKBONE_FINAL_LR)
    if run.processes.rank == 0:
        save_backbone(backbone, run.out / "backbone", words)
    return backbone.requires_grad_(False)


def fit_memory(run: Run, backbone: Backbone, memory: MetaState, path: Path, carry: str) -> None:
    """Train a memory in place on a frozen backbone."""
    args = run.args
    batches = Batches(run, args.batch, backbone.config.pad_id)
    fit(run, memory, memory_loss(backbone, args.lam, carry), batches, path, iters=args.iters,
        lr=args.lr, backbone={"name": args.init, "digest": backbone.digest()})


def train_memory(run: Run, backbone: Backbone, path: Path, carry: str) -> MetaState:
    """A new memory, trained on a frozen backbone."""
    torch.manual_seed(run.args.seed)
    memory = MetaState(preset(backbone)).to(run.device)
    fit_memory(run, backbone, memory, path, carry)
    return memory


TABLES = ("tables.md", "tables.json")


def tables(bench: Bench, valid: Bench, memory: MetaState, memoryless: MetaState, out: Path) -> None:
    """Print the tables, and save them with the result of every problem."""
    everyone = contestants(memory, memoryless)
    thinking_text, thinking = thinking_table(bench, everyone)
    schedule_text, schedules = schedule_table(bench, valid, everyone)
    text = thinking_text + "\n" + schedule_text
    print(text)
    results = json.dumps({"thinking": thinking, "schedules": schedules})
    for name, content in zip(TABLES, (text, results)):
        write_atomically(out / name, content.encode())


def train_tiny(args: argparse.Namespace, out: Path, device: torch.device, processes: Processes
               ) -> None:
    for name in TABLES:
        check_output(out / name)
    tokenizer = tiny_tokenizer(WORDS)
    examples = tokenise(find_texts(args), tokenizer, TINY.eos_id, args.max_length)
    gen_length = PROTOCOLS["dial"].settings["gen_length"]
    run = Run(args, out, examples, gen_length, processes, device)

    # 1. a backbone of our own, then frozen
    backbone = train_backbone(run, TINY, WORDS)
    if args.compile:
        backbone.compile_layers()

    # 2. its memory, and as a control the same modules without persistence
    memory = train_memory(run, backbone, out / "memory.pt", args.carry)
    memoryless = train_memory(run, backbone, out / "memoryless.pt", "reset")

    # 3. the tables
    if processes.rank == 0 and args.problems:
        bench = Bench(backbone, tokenizer, dial_problems(args.split, args.problems), gen_length)
        valid = Bench(backbone, tokenizer, dial_problems("valid", 500), gen_length)
        tables(bench, valid, memory, memoryless, out)
    print_next(run, "--think 4 --steps 1 --show-steps", "--think 4 --steps 1")


def train_large(args: argparse.Namespace, out: Path, device: torch.device, processes: Processes
                ) -> None:
    texts = find_texts(args)
    weights = args.weights or args.init
    tokenizer = load_tokenizer(weights)
    backbone = load_backbone(weights, device=device)
    backbone.recompute = not args.keep_activations
    if args.compile:
        backbone.compile_layers()
    examples = tokenise(texts, tokenizer, backbone.config.eos_id, args.max_length)
    run = Run(args, out, examples, 0, processes, device)
    train_memory(run, backbone, out / "memory.pt", args.carry)
    print_next(run, "--show-steps", "--limit 100")


def print_next(run: Run, sampling: str, scoring: str) -> None:
    model = f"--init {run.out}"
    if run.args.weights:
        model += f" --weights {run.args.weights}"
    if run.processes.rank == 0:
        print(f"all is in {run.out}; now try\n"
              f"  python sample.py {model} {sampling}\n"
              f"  python eval_gsm8k.py {model} {scoring}")


def main() -> None:
    args = arguments()
    out = args.out or Path("out") / Path(args.init).resolve().name
    device, processes = start_device(args.device)
    check_options(args, out, processes.world)
    alone = locked(out / "lock", wait=False, message=f"another run is at work in {out}; wait for "
                   "it, or give another --out")
    train = train_tiny if args.init == "tiny" else train_large
    with alone if processes.rank == 0 else nullcontext():
        train(args, out, device, processes)


if __name__ == "__main__":
    run_program(main, if_interrupted="what a checkpoint holds is kept, --resume goes on from it")
