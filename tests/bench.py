"""Speed and memory, each beside its arithmetic: python tests/bench.py [--device cuda] [--compile]

    python tests/bench.py                                # a small model on a CPU, some minutes
    python tests/bench.py --device cuda --preset dream   # 8B shapes, random weights, on a GPU
    python tests/bench.py --preset llada --device cpu --checkpoint FOLDER      # takes 24 GB

The machine's ceilings, matrix product and reading memory, are measured first. In every row the
ratio is measured / bound: 1 is the best that a time can be, and what the arithmetic says of memory.
Other work on the machine falsifies times, so the last line says how much of the cores this process
had. On a CPU with one thread (OMP_NUM_THREADS=1) times are CPU seconds, which it disturbs least.
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
import weakref
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, NamedTuple

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

class Machine(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    product: float                     # FLOP/s of a large matrix product
    read: float                        # bytes/s of reading memory
    held: int                          # bytes that python and torch hold before any model

    def at_best(self, flops: float, n_bytes: float) -> float:
        """Seconds, if the machine did nothing else."""
        return max(flops / self.product, n_bytes / self.read)


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


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    on_gpu = device.type == "cuda"
    n = 8192 if on_gpu else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    product = 2 * n ** 3 / fastest(lambda: a @ a, device, tries=5)
    x = torch.randn(2 ** 30 if on_gpu else 2 ** 26, device=device)
    read = x.nbytes / fastest(lambda: x.sum(), device, tries=5)
    del a, x
    reset_peak(device)
    return Machine(device, dtype, product, read, peak_bytes(device))


def storage(x: Tensor) -> tuple[int, int]:
    return x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()


def kept_bytes(forward: Callable[[], Tensor], modules: list[torch.nn.Module]) -> int:
    """What autograd keeps of a forward pass for the backward pass, beyond the modules' weights."""
    packed = []

    def pack(x: Tensor) -> Tensor:
        packed.append(weakref.ref(x))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = forward()
    kept = {storage(x) for x in (ref() for ref in packed) if x is not None}
    del loss                           # until here it held them
    weights = {storage(p) for module in modules for p in module.parameters()}
    return sum(n_bytes for _, n_bytes in kept - weights)


# ---------------------------------------------------------------------------------- PRINTING

def shown(value: float, unit: str) -> str:
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1)):
        if value >= size:
            return f"{value / size:.4g} {prefix}{unit}"
    return f"{1e3 * value:.4g} m{unit}"


def row(what: str, bound: float, measured: float, unit: str, *more: float) -> None:
    ratios = " | ".join(f"{ratio:.3f}" for ratio in (measured / bound, *more))
    print(f"| {what} | {shown(bound, unit)} | {shown(measured, unit)} | {ratios} |", flush=True)


def header(*cells: str) -> None:
    print(f"\n| {' | '.join(cells)} |\n{'|---' * len(cells)}|", flush=True)


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


def random_backbone(c: Config, machine: Machine) -> Backbone:
    backbone = on_meta(c).to(machine.dtype).to_empty(device=machine.device)
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

def pass_flops(c: Config, m: MemoryConfig | None, T: int, n_keys: int, n_rows: float) -> float:
    """One pass: T tokens attend to n_keys, n_rows of them are scored."""
    matrices = [p for p in on_meta(c).layers.parameters() if p.dim() == 2]
    flops = 2 * T * n_values(matrices) + 4 * T * n_keys * c.d_model * c.n_layer
    flops += 2 * n_rows * c.d_model * c.vocab_size
    if m is not None:
        flops += 8 * T * m.d_slot * (m.d_model + m.n_slots)    # Injector and Mixer over the tokens
        flops += 20 * m.n_slots * m.d_slot ** 2        # their maps of the slots, the Updater's six
    return flops


def kept_terms(c: Config, m: MemoryConfig, T: int, item: int) -> dict[str, int]:
    """Bytes that K unrolled steps of one row of T tokens, all of them maskable, keep for the
    backward pass, everything recomputed. item: bytes of a number in the backbone's precision.
    What the last step's Mixer has read is not kept: nobody asks for the slots that come of it."""
    n_inputs = K * (c.n_layer + 2) - 1
    n_picked = T * (K + 1) // 2        # masked tokens of all steps, when each reveals a K-th
    anchors = (4 * m.n_head + 1) * m.n_slots * T * 4
    slots = (K - 1) * m.n_slots * m.d_slot * (4 + item)        # new ones, and what the Mixer read
    return {
        f"inputs of Injector, {c.n_layer} recomputed layers and Mixer, {K} steps":
            n_inputs * T * c.d_model * item,
        f"anchors of Mixer and Injector and their roots, once; slots, {K} steps": anchors + slots,
        f"picked rows for the head, {K} steps": n_picked * c.d_model * item,
    }


def memory_terms(c: Config, m: MemoryConfig, T: int, item: int) -> dict[str, int]:
    """Where the memory of a K-step training iteration goes, in bytes; their sum is the peak."""
    with torch.device("meta"):
        muon, adamw = train.optimizers(MetaState(m))
    n_muon, n_adamw = (n_values(o.param_groups[0]["params"]) for o in (muon, adamw))
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
        **kept_terms(c, m, T, item),
        largest: passing[largest],
    }


def print_memory_table(c: Config, m: MemoryConfig, T: int) -> None:
    terms = memory_terms(c, m, T, item=2)
    header(f"{c.kind}, K = {K}, 1 x {T} tokens, bfloat16, activations recomputed", "GB")
    for what, n_bytes in terms.items():
        print(f"| {what} | {n_bytes / 1e9:.2f} |")
    print(f"| sum | {sum(terms.values()) / 1e9:.2f} |")


# ------------------------------------------------------------------------------ MEASUREMENTS

def measure_loading(folder: Path, machine: Machine) -> Backbone:
    """load_backbone, beside reading the same tensors and doing nothing with them."""
    paths = sorted(folder.glob("*.safetensors"))
    stored = [tensor for path in paths for tensor in read_safetensors(path).values()]
    runs = (lambda: [tensor.read().numel() for tensor in stored],
            lambda: load_backbone(folder, device=machine.device, dtype=machine.dtype))
    seconds = []
    for run in runs:
        for path in paths:             # both come from the disk, not from the system's cache
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        reset_peak(machine.device)
        begin = time.perf_counter()
        backbone = run()
        seconds.append(time.perf_counter() - begin)

    on_disk = [tensor.n_bytes for tensor in stored]
    row(f"loading {sum(on_disk) / 1e9:.2f} GB; bound: reading it", *seconds, "s")
    held = machine.held + machine.dtype.itemsize * n_values(backbone.parameters())
    if machine.device.type == "cpu":
        held += max(on_disk)           # one tensor as it was read
    row("the same, peak memory", held, peak_bytes(machine.device), "B")
    return backbone


def measure_training(backbone: Backbone, memory: MetaState, T: int, machine: Machine, tries: int
                     ) -> None:
    """A K-step unroll and its backward pass, as one of several micro-batches: gradients and the
    optimisers' moments are there already."""
    c, m, device, item = backbone.config, memory.config, machine.device, machine.dtype.itemsize
    backbone.recompute = True
    batch = {
        "ids": torch.randint(c.mask_id, (1, T), device=device),
        "maskable": torch.ones(1, T, dtype=torch.bool, device=device),
        "counts": torch.full((1, K), T // K, device=device),
        "noise": torch.rand(1, T, device=device),
        "by_confidence": torch.zeros(1, dtype=torch.bool, device=device),
    }

    def forward() -> Tensor:
        loss, _ = unroll(backbone, memory, **batch, lam=0.5)
        return loss

    kept = kept_bytes(forward, [backbone, memory])
    forward().backward()
    optimizers = train.optimizers(memory)
    update = fastest(lambda: [optimizer.step() for optimizer in optimizers], device, tries=1)
    reset_peak(device)
    seconds, flops = measure(lambda: forward().backward(), device, tries)
    weights = 3 * K * item * n_values(backbone.layers.parameters())    # read three times a step
    row(f"K = {K} training, gradient of 1 x {T} tokens, {flops / T / 1e9:.1f} GFLOP a token",
        machine.at_best(flops, weights), seconds, "s")
    row("the same, kept for the backward pass", sum(kept_terms(c, m, T, item).values()), kept, "B")
    held = machine.held + sum(memory_terms(c, m, T, item).values())
    row("the same, peak memory", held, peak_bytes(device), "B")
    n_bytes = 12 * n_values(memory.parameters())
    row("an update; bound: reading weights, gradients and moments", n_bytes / machine.read, update,
        "s")


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
                     machine: Machine, tries: int) -> None:
    """One token a pass, with and without cache and memory, by turns in one run."""
    c, device, item = backbone.config, machine.device, machine.dtype.itemsize
    T = n_prompt + n_new
    prompt = torch.randint(c.mask_id, (1, n_prompt), device=device)
    sampler = partial(generate, backbone, prompt, gen_length=n_new, steps=n_new, block_length=block,
                      remasking="entropy" if c.shift else "low_confidence")
    weights = item * n_values([*backbone.layers.parameters(), backbone.lm_head.weight])

    def at_best(n_run: int, n_rows: float, memory: MetaState | None) -> float:
        """Seconds of one pass that runs n_run tokens and scores n_rows."""
        flops = pass_flops(c, memory and memory.config, n_run, T, n_rows)
        n_bytes = weights + (4 * n_values(memory.parameters()) if memory else 0)
        return machine.at_best(flops, n_bytes)

    runs = {"official": partial(official_style, backbone, prompt, n_new, block)}
    bounds = {"official": n_new * at_best(T, T, None)}
    n_whole = n_new // block           # passes that run the whole canvas under a cache
    n_rows = (block + 1) / 2           # of a block that are masked, in the mean
    for cache in (False, True):
        for name, its_memory in (("ours", None), ("ours, memory", memory)):
            name += ", cache" if cache else ""
            runs[name] = partial(sampler, cache=cache, memory=its_memory)
            bounds[name] = n_whole * at_best(T, n_rows, its_memory)
            bounds[name] += (n_new - n_whole) * at_best(block if cache else T, n_rows, its_memory)
    canvases, seconds = {}, dict.fromkeys(runs, math.inf)
    for _ in range(tries):
        for name, run in runs.items():
            took = fastest(lambda: canvases.update({name: run()}), device, tries=1)
            seconds[name] = min(seconds[name], took)

    header(f"sampler: prompt {n_prompt}, {n_new} new in blocks of {block}", "bound", "measured",
           "ratio", "bound / ours", "measured / ours", "measured / official")
    for name in runs:
        row(name, bounds[name], seconds[name], "s", bounds[name] / bounds["ours"],
            seconds[name] / seconds["ours"], seconds[name] / seconds["official"])
    if not c.shift:                    # Dream's own rule takes other tokens
        same = (canvases["ours"] == canvases["official"])[:, n_prompt:].sum()
        print(f"\n{same} of {n_new} tokens of ours are those of official")


def measure_tiny(device: torch.device, tries: int) -> None:
    """Iterations 2 to 13 of both trainings of `python train.py`, on one thread as there."""
    torch.set_num_threads(1)
    machine = measure_machine(device, torch.float32)
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
                costs[what, iters] = measure(training, device, tries)
    header("tiny", "bound", "measured", "ratio")
    for what in trainings:
        seconds, flops = ((b - a) / 12 for a, b in zip(costs[what, 1], costs[what, 13]))
        row(f"{what}, an iteration: {1 / seconds:.3g} a second", flops / machine.product, seconds,
            "s")


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
    machine = measure_machine(device, dtype)
    header("what", "bound", "measured", "ratio")
    print(f"| ceilings | | {shown(machine.product, 'FLOP/s')}, {shown(machine.read, 'B/s')} | |")
    if args.checkpoint:
        backbone = measure_loading(args.checkpoint, machine)
    else:
        backbone = random_backbone(c, machine)
    if args.compile:
        backbone.compile_layers()
    memory = random_memory(c, device)
    measure_training(backbone, memory, 1024 if on_gpu else 64, machine, args.tries)
    lengths = (960, 64, 32) if on_gpu else (256, 16, 8)
    measure_samplers(backbone, memory, *lengths, machine, args.tries)
    measure_tiny(device, args.tries)
    cores = (time.process_time() - begin_cpu) / (time.perf_counter() - begin)
    print(f"\nthis process had {cores:.2f} cores on average")


if __name__ == "__main__":
    main()
