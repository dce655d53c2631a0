"""Train the memory of a frozen backbone: python train.py [--init llada --data FILE.jsonl]

Without arguments, on any machine: trains the tiny backbone on the built-in problems, freezes it,
trains MetaState on it by K-step unrolling and the same modules without persistence as a control,
evaluates all of them and prints one table. torchrun --nproc-per-node N train.py ... shares every
batch out. All random draws follow from seed, step and row, so that a resumed run, or one on more
processes, sees what an uninterrupted one sees.
"""
import argparse
import json
import math
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from diffusion import diffusion_loss, unroll
from eval_gsm8k import PROTOCOLS, dial_problems, evaluate, paired_interval, read_jsonl
from metastate import (MetaState, compile_layers, load_checkpoint, model_arguments, preset,
                       save_checkpoint)
from model import (TINY, Backbone, Tokenizer, blame, ensure, load_backbone, load_tokenizer,
                   run_program, save_backbone, start_device, write_atomically)

DEFAULTS = {                       # for the tiny backbone on a laptop, for an 8B one on one GPU
    "tiny": dict(K=6, confident=1.0, iters=1800, batch=64, accumulate=1, lr=3e-3, max_length=64),
    "8b": dict(K=4, confident=0.0, iters=3000, batch=16, accumulate=16, lr=3e-4, max_length=1024),
}
WARMUP, WEIGHT_DECAY, CLIP = 100, 0.01, 1.0
EVAL_STEPS = (20, 10, 8, 5, 4)

def read_example(item: dict, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids) of {question, answer}, of {messages: [{role, content}, ...]} up to
    its last assistant turn, or of {prompt, completion}. Raises ValueError with the reason."""
    def is_text(item: object, *keys: str) -> bool:
        return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in keys)

    if "messages" in item:
        turns = item["messages"]
        if not (isinstance(turns, list) and all(is_text(m, "role", "content") for m in turns)):
            raise ValueError("messages is no list of {role, content}, both text")
        while turns and turns[-1]["role"] != "assistant":
            turns = turns[:-1]
        if len(turns) < 2:
            raise ValueError("messages has no assistant turn after another turn")
        prompt, answer = tokenizer.chat(turns[:-1]), turns[-1]["content"]
    elif is_text(item, "question", "answer"):
        prompt = tokenizer.chat([{"role": "user", "content": item["question"]}])
        answer = item["answer"]
    elif is_text(item, "prompt", "completion"):
        prompt, answer = tokenizer.encode(item["prompt"], special=False), item["completion"]
    else:
        raise ValueError("it has none of question/answer, messages, prompt/completion as text")
    return prompt, tokenizer.encode(answer, special=False)

def read_examples(items: list[tuple[int, dict]], name: str, tokenizer: Tokenizer, eos_id: int,
                  max_length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids of numbered items, tokenised on all cores (tiktoken leaves Python's lock); what is
    longer than max_length is dropped, with a count."""
    def one(pair: tuple[int, dict]) -> tuple[np.ndarray, np.ndarray]:
        with blame(f"{name} line {pair[0]}", "mend or remove it"):
            prompt, answer = read_example(pair[1], tokenizer)
        return np.array(prompt, np.int32), np.array(answer + [eos_id], np.int32)

    with ThreadPoolExecutor() as pool:
        examples = list(tqdm(pool.map(one, items), desc="tokenise", total=len(items), leave=False))
    fitting = [(p, a) for p, a in examples if len(p) + len(a) <= max_length]
    if len(fitting) < len(items):
        print(f"{name}: {len(items) - len(fitting):,} of {len(items):,} examples are longer than "
              f"{max_length} tokens and dropped", file=sys.stderr)
    ensure(fitting, f"{name} has no example of at most {max_length} tokens; raise --max-length")
    return fitting

class Batches:
    """Step -> global batch, the same for any number of processes, rows of like length together."""
    def __init__(self, examples: list, batch: int, *, seed: int, pad_id: int, answer_length: int,
                 K: int, alpha: float, confident: float):
        self.examples, self.batch, self.seed, self.pad_id = examples, batch, seed, pad_id
        self.K, self.alpha, self.confident = K, alpha, confident
        self.lengths = np.array([len(p) + max(len(a), answer_length) for p, a in examples])
        self.per_epoch = max(1, len(examples) // batch)
        self.epoch = lru_cache(1)(self.shuffle)

    def shuffle(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch))
        rows = np.resize(rng.permutation(len(self.examples)), self.per_epoch * self.batch)
        windows = np.split(rows, range(64 * self.batch, len(rows), 64 * self.batch))
        rows = np.concatenate([w[np.argsort(self.lengths[w], kind="stable")] for w in windows])
        return rng.permutation(rows.reshape(self.per_epoch, self.batch))

    def __call__(self, step: int, part: slice, device: torch.device) -> dict[str, Tensor]:
        """Rows `part` of the batch of a step: ids, maskable (B, T) and every random draw."""
        epoch, i = divmod(step, self.per_epoch)
        T, columns = self.lengths[self.epoch(epoch)[i]].max(), []
        for b in range(self.batch)[part]:
            prompt, answer = self.examples[self.epoch(epoch)[i, b]]
            ids = np.full(T, self.pad_id)
            ids[:len(prompt)], ids[len(prompt):][:len(answer)] = prompt, answer
            maskable = np.arange(T) >= len(prompt)     # the padding, end-of-text, is to be learned
            rng = np.random.default_rng((self.seed, step, b))
            t, noise = np.float32((b + rng.random()) / self.batch), rng.random(T, np.float32)
            counts = rng.multinomial(T - len(prompt), rng.dirichlet([self.alpha] * self.K))
            columns.append((ids, maskable, t, noise, counts, rng.random() < self.confident))
        names = ("ids", "maskable", "t", "noise", "counts", "by_confidence")
        return {name: torch.from_numpy(np.stack(values)).to(device)
                for name, values in zip(names, zip(*columns))}

class Objective(nn.Module):
    """A module and its loss as one forward, which DistributedDataParallel needs. The frozen
    backbone stays outside: loss closes over it."""
    def __init__(self, model: nn.Module, loss: Callable):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: dict) -> tuple[Tensor, Tensor]:
        return self.loss(self.model, **batch)

def backbone_loss(backbone: Backbone, *, ids, maskable, t, noise, **_) -> tuple:
    # A visible token predicts itself: what the Injector writes does not unsay its own position.
    loss = diffusion_loss(backbone, ids, maskable, t, noise, keep=0.1)
    return loss, loss.detach()[None]

def memory_loss(memory: MetaState, *, backbone: Backbone, t, **rest) -> tuple:
    return unroll(backbone, memory, **rest)

def fit(model: nn.Module, loss: Callable, batches: Batches, path: Path, about: dict,
        args: argparse.Namespace, iters: int, lr: float) -> None:
    """Train model in place for iters steps, its checkpoints in path, a log beside it. about goes
    into the checkpoint; with --resume its settings must be the same."""
    device, log = next(model.parameters()).device, path.with_suffix(".log.jsonl")
    start, stop, optimizer = 0, [], torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if args.resume and path.exists():
        state = load_checkpoint(path)
        for key, value in about["settings"].items():
            ensure(state["settings"].get(key) == value, f"{path} was trained with {key} = "
                   f"{state['settings'].get(key)}, not {value}; give that, or another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    if rank == 0:                                      # the log, up to the step of the checkpoint
        kept = log.read_bytes().splitlines(keepends=True)[:start] if start else []
        write_atomically(log, lambda file: file.writelines(kept))
    net = Objective(model, loss)
    if world > 1:
        dist.barrier()
        net = DistributedDataParallel(net, find_unused_parameters=True)
    default = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    share = batches.batch // world // args.accumulate          # rows of one pass in one process
    bar = tqdm(range(start, iters), path.stem, iters, initial=start, disable=rank > 0)
    for step in bar:
        # 1. the gradient of the mean over the global batch
        losses = 0
        for i in range(args.accumulate):
            first = (rank * args.accumulate + i) * share
            last = world == 1 or i == args.accumulate - 1
            with nullcontext() if last else net.no_sync():
                value, by_step = net(batches(step, slice(first, first + share), device))
                (value / args.accumulate).backward()
            losses = losses + torch.cat((value.detach()[None], by_step)) / args.accumulate
        losses = F.pad(losses, (0, 1), value=float(bool(stop)))
        if world > 1:
            dist.all_reduce(losses)
        *losses, stopped = (losses / world).tolist()
        ensure(math.isfinite(losses[0]), f"the loss became {losses[0]} at step {step}; lower --lr "
               f"or clean the data, and go on with --resume from the last checkpoint, {path}")
        # 2. one step of the optimiser: linear warm-up, then a cosine down to a tenth
        rate = lr * min(1, (step + 1) / WARMUP) * (
            0.55 + 0.45 * math.cos(math.pi * (step + 1) / iters))
        optimizer.param_groups[0]["lr"] = rate
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
        optimizer.step()
        optimizer.zero_grad()
        # 3. log and save
        if rank == 0:
            line = dict(step=step, loss=losses[0], by_step=losses[1:], lr=rate, norm=norm)
            with open(log, "a") as file:
                file.write(json.dumps(line) + "\n")
            bar.set_postfix_str("loss " + " ".join(f"{x:.3f}" for x in losses[1:]), refresh=False)
            if (step + 1) % args.save_every == 0 or step + 1 == iters or stopped:
                save_checkpoint(path, model, step=step + 1, optimizer=optimizer.state_dict(),
                                **about)
        if stopped:
            bar.close()
            print(f"stopped after step {step + 1}; {path} is saved, go on with --resume")
            sys.exit(130)
    signal.signal(signal.SIGINT, default)

def table(backbone: Backbone, tokenizer: Tokenizer, memory: MetaState, memoryless: MetaState,
          problems: list[dict], by_steps: tuple[int, ...], out: Path, **settings) -> None:
    """Accuracy of the frozen backbone, MetaState and its controls on the same problems, by number
    of denoising steps; printed, and saved as table.md and, problem by problem, table.json."""
    lines, right = [], {}
    rows = {"frozen": (None, "keep"), "MetaState": (memory, "keep"),
            "memory reset": (memory, "reset"), "memory shuffled": (memory, "shuffle"),
            "memoryless-trained": (memoryless, "reset")}
    bar = tqdm(total=len(rows) * sum(by_steps), desc="evaluate")
    for name, (model, carry) in rows.items():
        line, right[name] = f"| {name} |", {}
        for steps in by_steps:
            right[name][steps] = [row["correct"] for row in evaluate(
                backbone, tokenizer, problems, PROTOCOLS["dial"], memory=model, carry=carry,
                batch_size=250, **settings | {"steps": steps})]
            bar.update(steps)
            _, low, high = paired_interval(right["frozen"][steps], right[name][steps])
            line += f" {100 * np.mean(right[name][steps]):.1f}"
            line += f" [{100 * low:+.1f}, {100 * high:+.1f}] |" if model else " |"
        lines.append(line)
    bar.close()
    text = "\n".join([
        f"Exact match (%) on {len(problems)} problems, by denoising steps; in brackets the paired "
        "95 % interval of the difference to frozen", "",
        f"| steps | {' | '.join(map(str, by_steps))} |",
        "|---" * (len(by_steps) + 1) + "|", *lines, ""])
    print(text)
    write_atomically(out / "table.md", lambda file: file.write(text.encode()))
    write_atomically(out / "table.json", lambda file: file.write(json.dumps(right).encode()))

def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, help="folder of checkpoints and logs (default: out/INIT)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--save-every", type=int, default=100, help="steps between checkpoints")
    add("--seed", type=int, default=0)
    model_arguments(parser, training=True)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, help="JSON lines of question/answer, messages or prompt/completion "
        "(default for tiny: the built-in problems)")
    add("--max-length", type=int, help="tokens; longer examples are dropped")
    add = parser.add_argument_group("unrolling").add_argument
    add("--K", type=int, help="denoising steps of a trajectory (default: tiny 6, else 4)")
    add("--lam", type=float, default=0.5, help="weight of the dense loss, against the reveal loss")
    add("--alpha", type=float, default=1.0, help="Dirichlet concentration of the reveal counts")
    add("--confident", type=float, metavar="SHARE", help="of the rows that reveal where the model "
        "is surest and not at random (default: tiny 1, else 0)")
    add("--carry", default="keep", choices=("keep", "detach", "reset"),
        help="the memory between steps; the last two are ablations")
    add("--no-checkpointing", action="store_true", help="keep all activations: faster, more memory")
    add = parser.add_argument_group("optimiser (default: by the size of the backbone)").add_argument
    add("--iters", type=int)
    add("--batch", type=int, help="rows of a step, over all processes and passes")
    add("--accumulate", type=int, help="passes in which a process takes its rows")
    add("--lr", type=float)
    add = parser.add_argument_group("tiny backbone and table").add_argument
    for name, value in (("backbone-iters", 3000), ("backbone-batch", 128), ("backbone-lr", 3e-3)):
        add("--" + name, type=type(value), default=value)
    add("--split", default="test", choices=("valid", "test"), help="where the problems are from")
    add("--problems", type=int, default=1000, help="in the table (0: no table)")
    args = parser.parse_args()
    for key, value in DEFAULTS["tiny" if args.init == "tiny" else "8b"].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    return args

def main() -> None:
    args = arguments()
    device, rank, world = start_device(args.device)
    tiny, out = args.init == "tiny", args.out or Path("out") / Path(args.init).name
    ensure(args.batch % (world * args.accumulate) == 0, f"--batch {args.batch} is no multiple of "
           f"{world} processes times --accumulate {args.accumulate}; make it one")
    ensure(args.resume or not (out / "memory.pt").exists(), f"{out} holds a run; go on with it by "
           "--resume, or give another --out")
    ensure(tiny or args.data, f"--init {args.init} needs examples; give --data FILE.jsonl")
    settings = {key: str(value) for key, value in vars(args).items() if key not in (
        "out", "resume", "save_every", "weights", "device", "compile", "split", "accumulate",
        "no_checkpointing", "problems")}
    about = {"backbone": args.init, "settings": settings}

    # 1. the frozen backbone: off the shelf, or for tiny one of our own, trained as LLaDA is
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.weights or args.init)
    backbone = Backbone(TINY).to(device) if tiny else load_backbone(args.weights or args.init,
                                                                    device=device)
    items = read_jsonl(args.data) if args.data else list(enumerate(dial_problems("train", 30_000)))
    examples = read_examples(items, str(args.data or "built-in problems"), tokenizer,
                             backbone.config.eos_id, args.max_length)
    batches = partial(Batches, examples, seed=args.seed, pad_id=backbone.config.pad_id, K=args.K,
                      alpha=args.alpha, confident=args.confident,
                      answer_length=PROTOCOLS["dial"].settings["gen_length"] if tiny else 0)
    if tiny:
        fit(backbone, backbone_loss, batches(args.backbone_batch), out / "backbone.pt",
            about | {"config": asdict(TINY)}, args, args.backbone_iters, args.backbone_lr)
        if rank == 0:
            save_backbone(backbone, out / "backbone")
    backbone.requires_grad_(False).eval()
    backbone.checkpointing = not (tiny or args.no_checkpointing)
    if args.compile:
        compile_layers(backbone)

    # 2. the memory; for tiny also the same modules trained without persistence
    trained = []
    for name, carry in [("memory", args.carry)] + [("memoryless", "reset")] * tiny:
        torch.manual_seed(args.seed)
        config = replace(preset(backbone), n_updates=args.K if tiny else None)
        trained.append(MetaState(config).to(device))
        fit(trained[-1], partial(memory_loss, backbone=backbone, lam=args.lam, carry=carry),
            batches(args.batch), out / f"{name}.pt",
            about | {"config": asdict(config)}, args, args.iters, args.lr)

    # 3. the table
    if tiny and rank == 0 and args.problems:
        table(backbone, tokenizer, *(model.eval() for model in trained),
              dial_problems(args.split, args.problems), EVAL_STEPS, out)

if __name__ == "__main__":
    run_program(main)
