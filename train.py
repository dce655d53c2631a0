"""Train the memory of a frozen backbone: python train.py [--init llada]

Without arguments, on any machine: trains the tiny backbone on the built-in problems, freezes it,
trains MetaState on it by K-step unrolling and the same modules without persistence as a control,
evaluates all of them and prints two tables. With --init llada or dream: fetches the weights and
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
from contextlib import contextmanager, nullcontext
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
from model import (PRESETS, TINY, Backbone, Tokenizer, blame, cache_folder, ensure, fetch_json,
                   load_backbone, load_tokenizer, locked, read_config, save_backbone,
                   tiny_tokenizer, write_atomically)
from sample import (COUNT, COUNT_OR_ZERO, POSITIVE, SEED, SHARE, Processes, add_device_options,
                    run_program, start_device)

DEFAULTS = {                       # for the tiny backbone on a laptop, for an 8B one on one GPU
    "tiny": dict(K=6, confident=1.0, think=20, iters=1500, batch=64, accumulate=1, lr=3e-3,
                 max_length=64),
    "8b": dict(K=4, confident=0.0, think=12, iters=3000, batch=16, accumulate=16, lr=3e-4,
               max_length=1024),
}
THINK_SHARE = 0.5                  # of the batches begin with passes that reveal nothing
VISIBLE_SHARE = 0.1                # of the maskable tokens teach the tiny backbone though visible
WARMUP = 100
WEIGHT_DECAY = 0.01
BETAS = (0.9, 0.99)
CLIP = 1.0

# ---------------------------------------------------------------------------------------- DATA


class Text(NamedTuple):
    """An example before it is tokenised."""
    prompt: list[dict[str, str]] | str     # the turns of a chat, or plain text
    answer: str


def is_text(item: object, *keys: str) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in keys)


def read_text(item: dict) -> Text:
    """{question, answer}, {messages: [{role, content}, ...]} up to its last assistant turn, or
    {prompt, completion}. Raises ValueError with the reason."""
    if "messages" in item:
        turns = item["messages"]
        if not isinstance(turns, list) or not all(is_text(m, "role", "content") for m in turns):
            raise ValueError("messages is no list of {role, content}, both text")
        while turns and turns[-1]["role"] != "assistant":
            turns = turns[:-1]
        if len(turns) < 2:
            raise ValueError("messages has no assistant turn after another turn")
        return Text(turns[:-1], turns[-1]["content"])
    if is_text(item, "question", "answer"):
        return Text([{"role": "user", "content": item["question"]}], item["answer"])
    if is_text(item, "prompt", "completion"):
        return Text(item["prompt"], item["completion"])
    raise ValueError("it has none of question/answer, messages, prompt/completion as text")


def read_texts(path: Path) -> list[Text]:
    texts = []
    for number, item in read_jsonl(path):
        with blame(f"{path} line {number}", "mend or remove it"):
            texts.append(read_text(item))
    return texts


TULU = "allenai/tulu-3-sft-mixture"    # ODC-BY
TULU_ROWS = 50_000                     # as many as the paper took
WINDOW = 100                           # rows of one call, the most that the server gives
PAUSE = 0.7                            # seconds between calls: 500 in 5 minutes are allowed


def tulu_file() -> Path:
    """50,000 conversations of the Tulu-3 SFT mixture as JSON lines, fetched once."""
    path = cache_folder() / "tulu-3" / "conversations.jsonl"
    if not path.exists():
        with locked(path.with_name("lock"), wait=True,
                    message=f"waiting: another process fetches {path}"):
            if not path.exists():
                fetch_tulu(path, TULU_ROWS)
    return path


class Window(NamedTuple):
    """What one call gives."""
    revision: str | None
    n_total: int                           # rows of the whole data set
    conversations: list


def fetch_window(offset: int, length: int) -> Window:
    server = os.environ.get("HF_DATASETS_SERVER", "https://datasets-server.huggingface.co")
    dataset = TULU.replace("/", "%2F")
    url = (f"{server}/rows?dataset={dataset}&config=default&split=train"
           f"&offset={offset}&length={length}")
    found, headers = fetch_json(url)
    with blame(url, "its answer has another form than expected; give a file by --data"):
        rows = [row["row"] for row in found["rows"]]
        return Window(headers.get("X-Revision"), int(found["num_rows_total"]), rows)


def is_conversation(item: object) -> bool:
    if not isinstance(item, dict) or "messages" not in item:
        return False
    try:
        read_text(item)
    except ValueError:
        return False
    return True


def fetch_tulu(path: Path, n_wanted: int, seed: int = 0) -> None:
    """Windows of consecutive rows at random offsets, since the rows may be sorted by source. Every
    window is a file, so that an interrupted fetch goes on; at the end they are joined, and the
    offsets and the revision are written beside them."""
    revision, n_total, _ = fetch_window(0, 1)
    order = np.random.default_rng(seed).permutation(n_total // WINDOW)
    windows = path.with_name("windows")
    lines, offsets = [], []
    bar = tqdm(total=n_wanted, desc=TULU, unit=" conversations", disable=None)
    for window in order.tolist():
        offset = window * WINDOW
        part = windows / str(revision) / f"{offset}.jsonl"     # rows of two revisions never mix
        if not part.exists():
            time.sleep(PAUSE)
            found = fetch_window(offset, WINDOW)
            ensure(found.revision == revision, f"{TULU} was changed while it was fetched; run "
                   "again, it begins anew")
            with write_atomically(part) as file:
                for item in filter(is_conversation, found.conversations):
                    file.write(json.dumps({"messages": item["messages"]}).encode() + b"\n")
        kept = part.read_bytes().splitlines(keepends=True)
        lines += kept
        offsets.append(offset)
        bar.update(len(kept))
        if len(lines) >= n_wanted:
            break
    bar.close()
    ensure(len(lines) >= n_wanted, f"{TULU} has {len(lines):,} conversations where {n_wanted:,} "
           "are wanted; give a file of your own by --data")
    about = {"dataset": TULU, "revision": revision, "seed": seed, "window": WINDOW,
             "offsets": offsets}
    with write_atomically(path.with_name("about.json")) as file:
        file.write(json.dumps(about).encode())
    with write_atomically(path) as file:
        file.writelines(lines[:n_wanted])
    shutil.rmtree(windows)


class TokenIds(NamedTuple):
    """An example: its prompt and its answer, which ends with end-of-text."""
    prompt: np.ndarray
    answer: np.ndarray


def tokenise(texts: list[Text], tokenizer: Tokenizer, eos_id: int, max_length: int
             ) -> list[TokenIds]:
    """What is longer than max_length is dropped, with a count. Raises InputError if nothing is
    left. Without threads: a Ctrl-C within a pool can leave one of its locks taken for ever."""
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


class Batches:
    """Step -> global batch, the same for any number of processes, rows of like length together."""

    def __init__(self, examples: list[TokenIds], batch: int, *, seed: int, pad_id: int,
                 answer_length: int, K: int, alpha: float, confident: float, think: int):
        self.examples = examples
        self.batch = batch
        self.seed = seed
        self.pad_id = pad_id
        self.K, self.alpha, self.confident, self.think = K, alpha, confident, think
        lengths = [len(e.prompt) + max(len(e.answer), answer_length) for e in examples]
        self.lengths = np.array(lengths)
        self.per_epoch = max(1, len(examples) // batch)
        self.epoch = lru_cache(1)(self.shuffle)

    def shuffle(self, epoch: int) -> np.ndarray:
        """The examples of every batch of an epoch, (per_epoch, batch). Within windows of 64 batches
        they are sorted by length, which keeps padding small; the batches are shuffled again."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.examples))
        order = np.resize(order, self.per_epoch * self.batch)
        size = 64 * self.batch
        windows = [order[i:i + size] for i in range(0, len(order), size)]
        by_length = [w[np.argsort(self.lengths[w], kind="stable")] for w in windows]
        return rng.permutation(np.concatenate(by_length).reshape(self.per_epoch, self.batch))

    def row(self, step: int, b: int, example: TokenIds, T: int) -> dict:
        """Row b of a step's batch, padded to T tokens, with every random draw that it needs."""
        n_prompt, n_answer = len(example.prompt), len(example.answer)
        ids = np.full(T, self.pad_id)
        ids[:n_prompt] = example.prompt
        ids[n_prompt:n_prompt + n_answer] = example.answer
        rng = np.random.default_rng((self.seed, step, b))
        t = (b + rng.random()) / self.batch            # stratified: the batch covers [0, 1)
        noise = rng.random(T, np.float32)
        shares = rng.dirichlet([self.alpha] * self.K)
        return {
            "ids": ids,                                # (T,)
            "maskable": np.arange(T) >= n_prompt,      # the padding, end-of-text, is to be learned
            "t": np.float32(t),
            "noise": noise,
            "counts": rng.multinomial(T - n_prompt, shares),   # (K,)
            "by_confidence": rng.random() < self.confident,
        }

    def __call__(self, step: int, part: slice, device: torch.device) -> dict:
        """Rows `part` of the batch of a step: tensors with B first, and how long to think."""
        epoch, i = divmod(step, self.per_epoch)
        chosen = self.epoch(epoch)[i]
        T = self.lengths[chosen].max()
        rows = [self.row(step, b, self.examples[chosen[b]], T) for b in range(self.batch)[part]]
        batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])).to(device)
                 for name in rows[0]}
        rng = np.random.default_rng((self.seed, step, self.batch))     # no row has this number
        thinks = rng.random() < THINK_SHARE
        batch["think"] = int(rng.integers(self.think + 1)) if thinks else 0
        return batch


# ---------------------------------------------------------------------------------------- LOOP

# Options that a run's results do not hang on: they may change when it is resumed.
NOT_SETTINGS = ("out", "resume", "save_every", "weights", "device", "compile", "accumulate",
                "keep_activations", "split", "problems")


class Run(NamedTuple):
    """What every training of a run shares."""
    args: argparse.Namespace
    out: Path
    examples: list[TokenIds]
    answer_length: int                 # the tiny answers are padded to it; 0: by batch
    processes: Processes
    device: torch.device

    @property
    def settings(self) -> dict[str, str]:
        return {key: str(value) for key, value in vars(self.args).items()
                if key not in NOT_SETTINGS}

    def batches(self, size: int, pad_id: int) -> Batches:
        args = self.args
        return Batches(self.examples, size, seed=args.seed, pad_id=pad_id, K=args.K,
                       alpha=args.alpha, confident=args.confident, think=args.think,
                       answer_length=self.answer_length)


def backbone_loss(backbone: Backbone, batch: dict) -> tuple[Tensor, Tensor]:
    # A visible token predicts itself: what the Injector writes does not unsay its own position.
    loss = diffusion_loss(backbone, batch["ids"], batch["maskable"], batch["t"], batch["noise"],
                          visible_share=VISIBLE_SHARE)
    return loss, loss.detach()[None]


def memory_loss(backbone: Backbone, lam: float, carry: str) -> Callable:
    def loss(memory: MetaState, batch: dict) -> tuple[Tensor, Tensor]:
        draws = {name: value for name, value in batch.items() if name != "t"}
        return unroll(backbone, memory, **draws, lam=lam, carry=carry)
    return loss


def learning_rate(step: int, iters: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak."""
    warmup = min(1, (step + 1) / WARMUP)
    cosine = 0.5 * (1 + math.cos(math.pi * (step + 1) / iters))
    return peak * warmup * (0.1 + 0.9 * cosine)


def resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict) -> int:
    """Take up a checkpoint; the number of steps that it has behind it. Raises InputError where the
    run was begun with other settings; only the learning rate may change."""
    state = load_checkpoint(path)
    for key, value in settings.items():
        before = state["settings"].get(key)
        ensure(key == "lr" or before == value, f"{path} was trained with {key} = {before}, not "
               f"{value}; give that, or another --out")
    with blame(path, "it belongs to another version of this program; give another --out"):
        model.load_state_dict(state["model"])
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])


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


def global_gradient(run: Run, model: nn.Module, loss: Callable, batches: Batches, step: int
                    ) -> list[float]:
    """Leave the gradient of the mean over the global batch in the parameters, and return that mean
    and its parts. A process takes its rows in some passes; then the processes add up."""
    rank, world = run.processes
    passes = run.args.accumulate
    rows = batches.batch // (world * passes)                   # of one pass in one process
    losses = 0
    for i in range(passes):
        first = (rank * passes + i) * rows
        value, parts = loss(model, batches(step, slice(first, first + rows), run.device))
        (value / (passes * world)).backward()
        losses = losses + torch.cat((value.detach()[None], parts)) / (passes * world)
    if world > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for tensor in [losses, *gradients]:
            dist.all_reduce(tensor)
    return losses.tolist()


def any_process(run: Run, flag: bool) -> bool:
    """Whether the flag is up in any process, so that all of them do the same."""
    total = torch.tensor(float(flag), device=run.device)
    if run.processes.world > 1:
        dist.all_reduce(total)
    return total.item() > 0


def start_log(log: Path, n_lines: int) -> None:
    """Keep the lines up to the checkpoint; what came after it will be written again."""
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    with write_atomically(log) as file:
        file.writelines(lines[:n_lines])


def fit(run: Run, model: nn.Module, loss: Callable, batches: Batches, path: Path, *, iters: int,
        lr: float, backbone: dict | None = None) -> None:
    """Train model in place for iters steps, its checkpoints in path, a log beside it. loss(model,
    batch) gives the mean over the rows of a batch, and its parts to be logged. backbone: what tells
    the one that a memory belongs to."""
    args, settings = run.args, run.settings
    is_first_process = run.processes.rank == 0
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY)
    start = resume(path, model, optimizer, settings) if args.resume and path.exists() else 0
    log = path.with_suffix(".log.jsonl")
    if is_first_process:
        start_log(log, start)
    bar = tqdm(range(start, iters), path.stem, iters, initial=start,
               disable=None if is_first_process else True)     # None: on a terminal only
    with stop_signals() as received:
        for step in bar:
            # 1. the gradient; a number that is none is neither stepped nor saved
            value, *parts = global_gradient(run, model, loss, batches, step)
            norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
            ensure(math.isfinite(value) and math.isfinite(norm), f"at step {step} the loss became "
                   f"{value} with a gradient of norm {norm}; go on from the last checkpoint, "
                   f"{path}, by --resume and a lower --lr, or clean the data")

            # 2. one step of the optimiser
            optimizer.param_groups[0]["lr"] = learning_rate(step, iters, lr)
            optimizer.step()
            optimizer.zero_grad()

            # 3. log and save; a finished run needs no optimiser any more
            done = step + 1
            stopped = any_process(run, bool(received))
            due = done % args.save_every == 0 or done == iters or stopped
            if is_first_process:
                shown = f"loss {parts[0]:.3f} .. {parts[-1]:.3f}"
                line = {"step": step, "loss": value, "by_step": parts, "norm": norm}
                with blame(log, "make room"), open(log, "a") as file:
                    file.write(json.dumps(line) + "\n")
                bar.set_postfix_str(shown, refresh=False)
                if due:
                    state = {} if done == iters else {"optimizer": optimizer.state_dict()}
                    save_checkpoint(path, model, model.config, step=done, settings=settings,
                                    backbone=backbone, **state)
                    if bar.disable:
                        print(f"{path.stem} {done}/{iters} {shown}", flush=True)
            if stopped:
                bar.close()
                if is_first_process:
                    print(f"stopped after step {done}; {path} is saved, go on with --resume")
                sys.exit(130)


# ----------------------------------------------------------------------------------- THE PROGRAM

def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("run").add_argument
    add("--init", metavar="MODEL", default="tiny", help=f"{', '.join(PRESETS)}, or a checkpoint "
        "folder")
    add("--weights", type=Path, metavar="FOLDER", help="the weights of --init, else found or "
        "downloaded")
    add("--out", type=Path, help="folder of checkpoints and logs (default: out/MODEL)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--save-every", type=COUNT, default=100, help="steps between checkpoints")
    add("--seed", type=SEED, default=0)
    add_device_options(parser)
    add = parser.add_argument_group("data").add_argument
    add("--data", help="tulu3, gsm8k, or a file of JSON lines with question/answer, messages or "
        "prompt/completion (default: the built-in problems for tiny, else tulu3)")
    add("--max-length", type=COUNT, help="tokens; longer examples are dropped")
    add = parser.add_argument_group("unrolling").add_argument
    add("--K", type=COUNT, help="denoising steps of a trajectory")
    add("--lam", type=SHARE, default=0.5, help="weight of the dense loss, against the reveal loss")
    add("--alpha", type=POSITIVE, default=1.0, help="Dirichlet concentration of reveal counts")
    add("--confident", type=SHARE, metavar="SHARE", help="of the rows that reveal where the model "
        "is surest and not at random")
    add("--think", type=COUNT_OR_ZERO, metavar="PASSES", help="half of the batches begin with up "
        "to so many passes that reveal nothing and have no gradient")
    add("--carry", default="keep", choices=("keep", "reset"), help="the memory between steps; "
        "reset is the memoryless control")
    add("--keep-activations", action="store_true", help="faster than to recompute them, but larger")
    add = parser.add_argument_group("optimiser").add_argument
    add("--iters", type=COUNT)
    add("--batch", type=COUNT, help="rows of a step, over all processes and passes")
    add("--accumulate", type=COUNT, help="passes in which a process takes its rows")
    add("--lr", type=POSITIVE)
    add = parser.add_argument_group("tiny backbone and tables").add_argument
    add("--backbone-iters", type=COUNT, default=3000)
    add("--backbone-batch", type=COUNT, default=128)
    add("--backbone-lr", type=POSITIVE, default=3e-3)
    add("--split", default="test", choices=("valid", "test"), help="where the problems are from")
    add("--problems", type=COUNT_OR_ZERO, default=1000, help="in the tables (0: no tables)")
    for size, values in DEFAULTS.items():
        shown = ", ".join(f"{key} {value}" for key, value in values.items())
        parser.epilog = f"{parser.epilog or ''} Defaults for {size}: {shown}."
    args = parser.parse_args()
    for key, value in DEFAULTS["tiny" if args.init == "tiny" else "8b"].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    return args


def check_options(args: argparse.Namespace, out: Path) -> None:
    """What can be wrong before anything is fetched or loaded."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name in ("batch", "backbone_batch"):
        size = getattr(args, name)
        ensure(size % (world * args.accumulate) == 0, f"--{name.replace('_', '-')} {size} is no "
               f"multiple of {world} processes times --accumulate {args.accumulate}; make it one")
    if args.init not in PRESETS or args.weights:
        read_config(args.weights or Path(args.init))
    held = [*out.glob("*.pt"), *out.glob("backbone")]
    ensure(args.resume or not held, f"{out} holds a run; go on with it by --resume, or give "
           "another --out")
    ensure(held or not args.resume, f"{out} holds nothing to go on with; leave --resume away")


def find_texts(args: argparse.Namespace) -> list[Text]:
    """The examples; what has to be fetched for them is fetched once."""
    if args.data is None and args.init == "tiny":
        return [read_text(problem) for problem in dial_problems("train", 30_000)]
    if args.data in (None, "tulu3"):
        return read_texts(tulu_file())
    return read_texts(gsm8k_file("train.jsonl") if args.data == "gsm8k" else Path(args.data))


def main() -> None:
    args = arguments()
    tiny = args.init == "tiny"
    out = args.out or Path("out") / Path(args.init).name
    check_options(args, out)
    is_first_process = int(os.environ.get("RANK", 0)) == 0
    alone = locked(out / "lock", wait=False, message=f"another run is at work in {out}; wait for "
                   "it, or give another --out")
    with alone if is_first_process else nullcontext():
        texts = find_texts(args)
        train(args, out, tiny, texts)


def train_backbone(run: Run, backbone: Backbone, words: list[str]) -> None:
    """Train a tiny backbone in place, as LLaDA is, and save it as a checkpoint folder."""
    batches = run.batches(run.args.backbone_batch, backbone.config.pad_id)
    fit(run, backbone, backbone_loss, batches, run.out / "backbone.pt",
        iters=run.args.backbone_iters, lr=run.args.backbone_lr)
    if run.processes.rank == 0:
        save_backbone(backbone, run.out / "backbone", words)


def train_memory(run: Run, backbone: Backbone, memory: MetaState, path: Path, carry: str) -> None:
    """Train a memory in place on a frozen backbone."""
    batches = run.batches(run.args.batch, backbone.config.pad_id)
    fit(run, memory, memory_loss(backbone, run.args.lam, carry), batches, path,
        iters=run.args.iters, lr=run.args.lr,
        backbone={"name": run.args.init, "digest": backbone.digest()})
    memory.eval()


def new_memory(run: Run, backbone: Backbone) -> MetaState:
    torch.manual_seed(run.args.seed)
    return MetaState(preset(backbone)).to(run.device)


def train(args: argparse.Namespace, out: Path, tiny: bool, texts: list[Text]) -> None:
    device, processes = start_device(args.device)

    # 1. the frozen backbone: off the shelf, or for tiny one of our own
    torch.manual_seed(args.seed)
    if tiny:
        tokenizer = tiny_tokenizer(WORDS)
        backbone = Backbone(TINY).to(device)
    else:
        tokenizer = load_tokenizer(args.weights or args.init)
        backbone = load_backbone(args.weights or args.init, device=device)
    examples = tokenise(texts, tokenizer, backbone.config.eos_id, args.max_length)
    answer_length = PROTOCOLS["dial"].settings["gen_length"] if tiny else 0
    run = Run(args, out, examples, answer_length, processes, device)
    if tiny:
        train_backbone(run, backbone, WORDS)
    backbone.requires_grad_(False).eval()
    backbone.recompute = not tiny and not args.keep_activations
    if args.compile:
        backbone.compile_layers()

    # 2. the memory; for tiny also the same modules without persistence, as a control
    memory = new_memory(run, backbone)
    train_memory(run, backbone, memory, out / "memory.pt", args.carry)
    if tiny:
        memoryless = new_memory(run, backbone)
        train_memory(run, backbone, memoryless, out / "memoryless.pt", "reset")

    # 3. the tables
    if processes.rank > 0:
        return
    if tiny and args.problems:
        bench = Bench(backbone, tokenizer, dial_problems(args.split, args.problems), answer_length)
        valid = Bench(backbone, tokenizer, dial_problems("valid", 500), answer_length)
        tables(bench, valid, memory, memoryless, out)
    print(f"all is in {out}; now try\n"
          f"  python sample.py --init {out} --think 4 --steps 1 --show-steps\n"
          f"  python eval_gsm8k.py --init {out}")


def tables(bench: Bench, valid: Bench, memory: MetaState, memoryless: MetaState, out: Path) -> None:
    """Print the two tables, and save them with the result of every problem."""
    everyone = contestants(memory, memoryless)
    thinking_text, thinking = thinking_table(bench, everyone)
    schedule_text, schedules = schedule_table(bench, valid, everyone)
    with write_atomically(out / "tables.md") as file:
        file.write((thinking_text + "\n" + schedule_text).encode())
    with write_atomically(out / "tables.json") as file:
        file.write(json.dumps({"thinking": thinking, "schedules": schedules}).encode())


if __name__ == "__main__":
    run_program(main, if_interrupted="what a checkpoint holds is kept, --resume goes on from it")
