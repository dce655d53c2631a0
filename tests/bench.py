"""Speed and memory: python tests/bench.py [--device cuda] [--compile]

    python tests/bench.py                                # a small model on a CPU, some minutes
    python tests/bench.py --device cuda --preset dream   # 8B shapes, random weights, on a GPU
    python tests/bench.py --preset llada --device cpu --checkpoint FOLDER      # takes 24 GB

Peak memory stands beside its arithmetic, samplers beside a stand-in for LLaDA's own. Other work on
the machine falsifies times, so the last line says how much of the cores this process had. On a CPU
with one thread (OMP_NUM_THREADS=1) times are CPU seconds, which it disturbs least.
"""
import argparse
import io
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from diffusion import generate, unroll  # noqa: E402
from metastate import MemoryConfig, MetaState, preset  # noqa: E402
from model import (CONFIG_KEYS, DREAM, LLADA, TINY, Backbone, Config, load_backbone,  # noqa: E402
                   original_name, read_safetensors, tiny_tokenizer, write_atomically)
from sample import COUNT, DIAL_LENGTH, WORDS, Processes  # noqa: E402

SMALL = replace(LLADA, n_layer=8, n_head=8, n_kv_head=8, d_model=1024, d_ff=3072)
PRESETS = {"small": SMALL, "llada": LLADA, "dream": DREAM}
K = 4
CHUNK = 256                            # rows of logits at a time, see diffusion.cross_entropy


# -------------------------------------------------------------------------------- MEASURING

def fastest(run: Callable[[], object], device: torch.device, tries: int) -> float:
    """Seconds of the fastest run: what disturbs a run only makes it slower."""
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter
    times = []
    for _ in range(tries):
        begin = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - begin)
    return min(times)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")          # Linux


def peak_bytes(device: torch.device) -> int:
    """The most that was held since reset_peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def measure(run: Callable[[], object], device: torch.device, tries: int) -> tuple[float, int]:
    """Seconds and FLOPs of matrix products (and of attention on a GPU). The first run warms up."""
    with FlopCounterMode(display=False) as counter:
        run()
    return fastest(run, device, tries), counter.get_total_flops()


def row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def header(*cells: str) -> None:
    print()
    row(*cells)
    row(*["---"] * len(cells))


# ------------------------------------------------------------------------------ RANDOM MODELS


def on_meta(c: Config) -> Backbone:
    """Shapes without memory."""
    with torch.device("meta"):
        return Backbone(c)


def n_values(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() for x in tensors)


def fill(name: str, p: Tensor) -> Tensor:
    """Norms are one, biases zero, other weights a hundredth or so. Uniform, since 8 billion normal
    draws take a CPU minutes."""
    return p.uniform_(-0.03, 0.03) if p.dim() == 2 else p.fill_("norm" in name)


def random_backbone(c: Config, device: torch.device, dtype: torch.dtype) -> Backbone:
    backbone = on_meta(c).to(dtype).to_empty(device=device)
    for name, p in backbone.named_parameters():
        fill(name, p.requires_grad_(False))
    return backbone.eval()


def memory_config(c: Config) -> MemoryConfig:
    """The preset's, for the small model as narrow as that is."""
    m = preset(on_meta(c))
    return replace(m, d_slot=m.d_slot // 4, d_time=m.d_time // 4) if c == SMALL else m


def random_memory(c: Config, device: torch.device) -> MetaState:
    """As if trained: its output is not zero."""
    memory = MetaState(memory_config(c)).to(device)
    torch.nn.init.normal_(memory.injector.out.weight, std=1e-3)
    return memory


def write_checkpoint(c: Config, folder: Path) -> None:
    """Random weights by their released names, tensor by tensor: there is never more than one of
    them in memory. config.json is written last: where it stands, the checkpoint is whole."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(on_meta(c).to(torch.bfloat16).named_parameters())
    entries, end = {}, 0
    for name, p in parameters.items():
        entries[original_name(c.kind, name)] = {"dtype": "BF16", "shape": list(p.shape),
                                                "data_offsets": [end, end + p.nbytes]}
        end += p.nbytes
    text = json.dumps(entries).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, p in parameters.items():
            values = fill(name, torch.empty_like(p, device="cpu"))
            file.write(values.view(torch.uint8).numpy().data)
        os.fsync(file.fileno())        # the system's cache forgets only what is on the disk
    config = {theirs: getattr(c, ours) for ours, theirs in CONFIG_KEYS[c.kind].items()}
    write_atomically(folder / "config.json", json.dumps(config | {"model_type": c.kind}).encode())


# ------------------------------------------------------------------------------- ARITHMETIC


def memory_terms(c: Config, m: MemoryConfig, T: int, item: int) -> dict[str, int]:
    """Where the memory of a training iteration goes, in bytes; their sum is the peak. One row of T
    tokens, all maskable, K steps, everything recomputed; item: bytes of a number in the backbone's
    precision. What the last step's Mixer has read is not kept: nobody asks for its slots."""
    with torch.device("meta"):
        muon, adamw = train.optimizers(MetaState(m))
    n_muon, n_adamw = (n_values(o.param_groups[0]["params"]) for o in (muon, adamw))
    n_inputs = K * (c.n_layer + 2) - 1
    n_picked = T * (K + 1) // 2        # masked tokens of all steps, when each reveals a K-th
    anchors = (4 * m.n_head + 1) * m.n_slots * T * 4
    slots = (K - 1) * m.n_slots * m.d_slot * (4 + item)        # new ones, and what the Mixer read
    d_kv = c.n_kv_head * c.d_model // c.n_head
    kept = 3 * c.d_model + 2 * d_kv + 3 * c.d_ff       # what autograd keeps of one layer
    gradients = c.d_model + 2 * c.d_ff                 # of its output, and within the MLP
    rows = min(CHUNK, T)
    passing = {                        # there for a moment of the backward pass, never together
        "one layer recomputed, and its gradients": T * (kept + gradients) * item,
        f"one chunk of {rows} rows of logits, float32: log p and two gradients":
            rows * c.vocab_size * 12,
    }
    largest = max(passing, key=passing.get)
    return {
        "frozen weights": item * n_values(on_meta(c).parameters()),
        f"matrices of the memory, gradients, Muon's moment: {n_muon / 1e6:.2f} M x 12 bytes":
            12 * n_muon,
        f"the rest of it, gradients, AdamW's two moments: {n_adamw / 1e6:.2f} M x 16 bytes":
            16 * n_adamw,
        f"inputs of Injector, {c.n_layer} recomputed layers and Mixer, {K} steps":
            n_inputs * T * c.d_model * item,
        f"anchors of Mixer and Injector and their roots, once; slots, {K} steps": anchors + slots,
        f"picked rows for the head, {K} steps": n_picked * c.d_model * item,
        largest: passing[largest],
    }


def print_memory_table(c: Config, m: MemoryConfig, T: int) -> None:
    terms = memory_terms(c, m, T, item=2)
    header(f"{c.kind}, K = {K}, 1 x {T} tokens, bfloat16, activations recomputed", "GB")
    for what, n_bytes in (terms | {"sum": sum(terms.values())}).items():
        row(what, f"{n_bytes / 1e9:.2f}")


# ------------------------------------------------------------------------------ MEASUREMENTS

def measure_loading(folder: Path, device: torch.device, dtype: torch.dtype) -> Backbone:
    """load_backbone, beside reading the same tensors and doing nothing with them."""
    paths = sorted(folder.glob("*.safetensors"))
    stored = [tensor for path in paths for tensor in read_safetensors(path).values()]
    seconds = []
    for run in (lambda: [tensor.read().numel() for tensor in stored],
                lambda: load_backbone(folder, device=device, dtype=dtype)):
        for path in paths:             # both come from the disk, not from the system's cache
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        reset_peak(device)
        begin = time.perf_counter()
        backbone = run()
        seconds.append(time.perf_counter() - begin)

    n_bytes = sum(tensor.n_bytes for tensor in stored)
    header("loading", "seconds", "against reading alone", "peak GB")
    row(f"{n_bytes / 1e9:.2f} GB", f"{seconds[1]:.2f}", f"{seconds[1] / seconds[0]:.2f}",
        f"{peak_bytes(device) / 1e9:.2f}")
    return backbone


def measure_training(backbone: Backbone, memory: MetaState, T: int, tries: int) -> None:
    """A K-step unroll and its backward pass, as one of several micro-batches: gradients and the
    optimisers' moments are there already."""
    c, device = backbone.config, backbone.device
    backbone.recompute = True
    batch = {
        "ids": torch.randint(c.mask_id, (1, T), device=device),
        "maskable": torch.ones(1, T, dtype=torch.bool, device=device),
        "counts": torch.full((1, K), T // K, device=device),
        "noise": torch.rand(1, T, device=device),
        "by_confidence": torch.zeros(1, dtype=torch.bool, device=device),
    }

    def gradient() -> None:
        loss, _ = unroll(backbone, memory, **batch, lam=0.5)
        loss.backward()

    gradient()
    for optimizer in train.optimizers(memory):
        optimizer.step()
    reset_peak(device)
    seconds, flops = measure(gradient, device, tries)
    terms = memory_terms(c, memory.config, T, backbone.lm_head.weight.element_size())
    header(f"training, K = {K}, 1 x {T} tokens", "seconds", "GFLOP a token", "TFLOP/s", "peak GB",
           "arithmetic GB, models and activations")
    row("a gradient", f"{seconds:.3f}", f"{flops / T / 1e9:.1f}", f"{flops / seconds / 1e12:.3f}",
        f"{peak_bytes(device) / 1e9:.2f}", f"{sum(terms.values()) / 1e9:.2f}")


@torch.no_grad()
def official_style(backbone: Backbone, prompt: Tensor, gen_length: int, block_length: int
                   ) -> Tensor:
    """What LLaDA's generate.py computes, one token a step: in every pass logits of the whole canvas
    and of all of them a softmax in float64 (its precision until June 2025)."""
    mask_id = backbone.config.mask_id
    n_prompt = prompt.shape[1]
    canvas = F.pad(prompt, (0, gen_length), value=mask_id)             # (1, T)
    for i in range(gen_length):
        end_of_block = n_prompt + (i // block_length + 1) * block_length
        logits = backbone(canvas)                                      # (1, T, V)
        tokens = logits.argmax(-1)                                     # (1, T)
        p = logits.double().softmax(-1)                                # (1, T, V)
        confidence = p.gather(-1, tokens[..., None])[..., 0]           # (1, T)
        confidence[:, end_of_block:] = -1
        confidence[canvas != mask_id] = -1
        best = confidence.argmax()
        canvas[:, best] = tokens[:, best]
    return canvas


def measure_samplers(backbone: Backbone, memory: MetaState, n_prompt: int, n_new: int, block: int,
                     tries: int) -> None:
    """One token a pass, with and without cache and memory, by turns in one run."""
    c, device = backbone.config, backbone.device
    prompt = torch.randint(c.mask_id, (1, n_prompt), device=device)
    sampler = partial(generate, backbone, prompt, gen_length=n_new, steps=n_new, block_length=block,
                      remasking="entropy" if c.shift else "low_confidence")
    runs = {
        "official": partial(official_style, backbone, prompt, n_new, block),
        "ours": sampler,
        "ours, memory": partial(sampler, memory=memory),
        "ours, cache": partial(sampler, cache=True),
        "ours, memory, cache": partial(sampler, memory=memory, cache=True),
    }
    canvases, seconds = {}, dict.fromkeys(runs, math.inf)
    for _ in range(tries):
        for name, run in runs.items():
            took = fastest(lambda: canvases.update({name: run()}), device, tries=1)
            seconds[name] = min(seconds[name], took)

    header(f"sampler: prompt {n_prompt}, {n_new} new in blocks of {block}", "seconds", "ms a pass",
           "against ours", "against official")
    for name, took in seconds.items():
        row(name, f"{took:.3f}", f"{1e3 * took / n_new:.1f}", f"{took / seconds['ours']:.3f}",
            f"{took / seconds['official']:.3f}")
    if not c.shift:                    # Dream's own rule takes other tokens
        same = (canvases["ours"] == canvases["official"])[:, n_prompt:].sum()
        print(f"\n{same} of {n_new} tokens of ours are those of official")


def measure_tiny(device: torch.device, tries: int) -> None:
    """Iterations 2 to 13 of both trainings of `python train.py`, on one thread as there."""
    torch.set_num_threads(1)
    backbone = Backbone(TINY).to(device).requires_grad_(False)
    texts = train.find_texts(None, "tiny")[:3000]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        args = train.arguments(["--out", folder])
        examples = train.tokenise(texts, tiny_tokenizer(WORDS), TINY.eos_id, args.max_length, True)
        run = train.Run(args, Path(folder), examples, DIAL_LENGTH, Processes(0, 1), device)
        trainings = {
            "backbone": lambda: train.train_backbone(run, TINY, WORDS),
            "memory": lambda: train.train_memory(run, backbone, run.out / "memory.pt"),
        }
        costs = {}
        for what, training in trainings.items():
            for iters in (1, 13):
                args.iters = args.backbone_iters = iters
                costs[what, iters] = fastest(training, device, tries + 1)
    header("tiny", "iterations a second")
    for what in trainings:
        row(what, f"{12 / (costs[what, 13] - costs[what, 1]):.3g}")


# ----------------------------------------------------------------------------------- THE PROGRAM

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--preset", choices=PRESETS, help="default: llada on a GPU, else small")
    add("--tries", type=COUNT, default=1, help="runs, of which the fastest counts")
    add("--compile", action="store_true", help="torch.compile the layers")
    add("--checkpoint", type=Path, metavar="FOLDER", help="load these weights; random ones in the "
        "released layout are written if it has none (16 GB for an 8B model)")
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    c = PRESETS[args.preset or ("llada" if on_gpu else "small")]
    dtype = torch.float32 if c == SMALL else torch.bfloat16
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads, {dtype}, "
          f"{c.kind} with {c.n_layer} layers of width {c.d_model}"
          f"{', compiled' if args.compile else ''}")
    if args.checkpoint:
        write_checkpoint(c, args.checkpoint)
    large = LLADA if c == SMALL else c
    print_memory_table(large, memory_config(large), 1024)

    begin, begin_cpu = time.perf_counter(), time.process_time()
    if args.checkpoint:
        backbone = measure_loading(args.checkpoint, device, dtype)
    else:
        backbone = random_backbone(c, device, dtype)
    if args.compile:
        backbone.compile_layers()
    memory = random_memory(c, device)
    measure_training(backbone, memory, 1024 if on_gpu else 64, args.tries)
    lengths = (960, 64, 32) if on_gpu else (256, 16, 8)
    measure_samplers(backbone, memory, *lengths, args.tries)
    measure_tiny(device, args.tries)
    cores = (time.process_time() - begin_cpu) / (time.perf_counter() - begin)
    print(f"\nthis process had {cores:.2f} cores on average")


if __name__ == "__main__":
    main()
