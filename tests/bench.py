"""Speed and memory, each beside its arithmetic: python tests/bench.py [--device cuda] [--compile]

    python tests/bench.py                                # a small shape on a CPU
    python tests/bench.py --device cuda --preset dream   # 8B shapes, random weights, on a GPU
    python tests/bench.py --preset llada --device cpu --checkpoint FOLDER

An 8B model on a CPU needs 24 GB of memory. With --checkpoint loading is measured, too: random
weights in the released layout are written to FOLDER if it has none (16 GB for an 8B model).

The machine's ceilings, matrix product and reading memory, are measured first; torch counts the
FLOPs. In every row the ratio is measured / bound: 1 is the best that a time can be, and what the
arithmetic says of memory. Other work on the machine falsifies times, so the last line says how much
of the cores this process had.
"""
import argparse
import json
import os
import platform
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from diffusion import generate, unroll  # noqa: E402
from metastate import MemoryConfig, MetaState, preset  # noqa: E402
from model import (CONFIG_FIXED, CONFIG_KEYS, DREAM, LLADA, Backbone, Config,  # noqa: E402
                   load_backbone, original_name, write_atomically)
from sample import COUNT  # noqa: E402

SMALL = replace(LLADA, vocab_size=8192, n_layer=8, n_head=4, n_kv_head=4, d_model=256, d_ff=768,
                mask_id=8190, eos_id=8191, pad_id=8191, eot_id=None)
PRESETS = {"small": SMALL, "llada": LLADA, "dream": DREAM}
K = 4
CHUNK = 256                            # rows of logits at a time, see diffusion.cross_entropy
CARD = 22e9                            # of a card with 24 GB


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


class Cost(NamedTuple):
    seconds: float
    flops: int                         # of matrix products (and of attention on a GPU)
    peak: int                          # bytes on the device; on a CPU those of this process


def fastest(run: Callable[[], object], device: torch.device, tries: int) -> float:
    """Seconds of the fastest run: what disturbs a run only makes it slower."""
    times = []
    for _ in range(tries):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
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


def measure(run: Callable[[], object], device: torch.device, tries: int) -> Cost:
    """The first run warms up, and torch counts what it computes."""
    with FlopCounterMode(display=False) as counter:
        run()
    reset_peak(device)
    best = fastest(run, device, tries)
    return Cost(best, counter.get_total_flops(), peak_bytes(device))


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    reset_peak(device)
    held = peak_bytes(device)
    on_gpu = device.type == "cuda"
    n = 8192 if on_gpu else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    product = 2 * n ** 3 / fastest(lambda: a @ a, device, tries=5)
    x = torch.randn(2 ** 30 if on_gpu else 2 ** 26, device=device)
    read = x.nbytes / fastest(lambda: x.sum(), device, tries=5)
    return Machine(device, dtype, product, read, held)


def storage(x: Tensor) -> tuple[int, int]:
    return x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()


def kept_bytes(forward: Callable[[], Tensor], modules: list[torch.nn.Module]) -> int:
    """What autograd keeps of a forward pass for the backward pass, beyond the modules' weights."""
    weights = {storage(p) for module in modules for p in module.parameters()}
    kept = set()

    def pack(x: Tensor) -> Tensor:
        kept.add(storage(x))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = forward()               # alive until here, so that no address is used twice
    del loss
    return sum(n_bytes for _, n_bytes in kept - weights)


# ---------------------------------------------------------------------------------- PRINTING

def shown(value: float, unit: str) -> str:
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1)):
        if value >= size:
            return f"{value / size:.4g} {prefix}{unit}"
    return f"{1e3 * value:.4g} m{unit}"


def row(what: str, bound: float, measured: float, unit: str) -> None:
    print(f"| {what} | {shown(bound, unit)} | {shown(measured, unit)} | {measured / bound:.3f} |",
          flush=True)


def header(*cells: str) -> None:
    print(f"\n| {' | '.join(cells)} |\n{'|---' * len(cells)}|", flush=True)


# ---------------------------------------------------------------------- ARITHMETIC OF MEMORY

def n_weights(c: Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Backbone(c).parameters())


def n_trained(m: MemoryConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MetaState(m).parameters())


def kept_terms(c: Config, m: MemoryConfig, T: int, item: int) -> dict[str, int]:
    """Bytes that K unrolled steps of one row of T tokens, all of them maskable, keep for the
    backward pass, everything recomputed. item: bytes of a number in the backbone's precision."""
    above = c.n_layer - m.write_layer
    n_picked = T * (K + 1) // 2        # masked tokens of all steps, when each reveals a K-th
    bias = m.n_head * m.n_slots * T * 4
    slots = m.n_slots * m.d_slot * (4 + item)          # new ones, and what the Mixer read
    return {
        f"inputs of the Injector and of {above} recomputed layers, {K} steps":
            K * (above + 1) * T * c.d_model * item,
        f"attention biases of Mixer and Injector and their roots, slots, {K} steps":
            K * (4 * bias + slots),
        f"picked rows for the head, {K} steps": n_picked * c.d_model * item,
    }


def passing_terms(c: Config, T: int, item: int) -> dict[str, int]:
    """Bytes that are there for a moment of the backward pass; the larger one counts."""
    d_kv = c.n_kv_head * c.d_model // c.n_head
    kept = 3 * c.d_model + 2 * d_kv + 3 * c.d_ff       # what autograd keeps of one layer
    gradients = c.d_model + 2 * c.d_ff                 # of its output, and within the MLP
    return {
        "one layer recomputed, and its gradients": T * (kept + gradients) * item,
        f"one chunk of {CHUNK} rows of logits, float32: log p and two gradients":
            CHUNK * c.vocab_size * 12,
    }


def memory_terms(c: Config, m: MemoryConfig, T: int, item: int) -> dict[str, int]:
    """Where the memory of a K-step training step goes, in bytes; their sum is the peak."""
    passing = passing_terms(c, T, item)
    largest = max(passing, key=passing.get)
    return {
        "frozen weights": item * n_weights(c),
        "memory, gradients and AdamW's two moments, float32": 16 * n_trained(m),
        **kept_terms(c, m, T, item),
        largest: passing[largest],
    }


def print_memory_table(c: Config, m: MemoryConfig, T: int) -> None:
    terms = memory_terms(c, m, T, item=2)
    header(f"{c.kind}, K = {K}, 1 x {T} tokens, bfloat16, activations recomputed", "GB")
    for what, n_bytes in terms.items():
        print(f"| {what} | {n_bytes / 1e9:.2f} |")
    print(f"| sum | {sum(terms.values()) / 1e9:.2f} |")


# ------------------------------------------------------------------------------ RANDOM MODELS

def random_values(name: str, p: Tensor) -> Tensor:
    """Norms are one, biases zero, other weights a hundredth or so. Uniform, since 8 billion normal
    draws take a CPU minutes."""
    if p.dim() == 2:
        return torch.empty_like(p).uniform_(-0.03, 0.03)
    return torch.ones_like(p) if "norm" in name else torch.zeros_like(p)


def random_backbone(c: Config, machine: Machine) -> Backbone:
    with torch.device("meta"):
        backbone = Backbone(c)
    backbone = backbone.to(machine.dtype).to_empty(device=machine.device)
    for name, p in backbone.named_parameters():
        p.requires_grad_(False).copy_(random_values(name, p))
    return backbone.eval()


def memory_config(c: Config) -> MemoryConfig:
    """The preset's, or for the small shape one in the same proportion to its backbone."""
    with torch.device("meta"):
        config = preset(Backbone(c))
    return replace(config, d_slot=88, d_time=16) if c == SMALL else config


def random_memory(c: Config, device: torch.device) -> MetaState:
    """As if trained: its output is not zero."""
    memory = MetaState(memory_config(c)).to(device)
    torch.nn.init.normal_(memory.injector.out.weight, std=1e-3)
    return memory


# --------------------------------------------------------------------- CHECKPOINTS ON THE DISK
# In the released layout: config.json, an index, and shards in which LLaDA's tensors are grouped by
# kind and Dream's stand in order.

SHARD = {"llada": 3e9, "dream": 5e9}   # bytes, at most


def shards(c: Config) -> Iterator[dict[str, Tensor]]:
    """The parameters of every shard by our names, shapes without memory."""
    with torch.device("meta"):
        parameters = dict(Backbone(c).to(torch.bfloat16).named_parameters())
    names = list(parameters)
    if c.kind == "llada":
        names.sort(key=lambda name: re.sub(r"\d+", "", name))
    shard: dict[str, Tensor] = {}
    for name in names:
        size = sum(p.nbytes for p in shard.values())
        if shard and size + parameters[name].nbytes > SHARD[c.kind]:
            yield shard
            shard = {}
        shard[name] = parameters[name]
    yield shard


def write_shard(path: Path, kind: str, shard: dict[str, Tensor]) -> None:
    """Random weights, tensor by tensor: there is never more than one of them in memory."""
    entries, end = {}, 0
    for name, p in shard.items():
        entries[original_name(kind, name)] = {"dtype": "BF16", "shape": list(p.shape),
                                              "data_offsets": [end, end + p.nbytes]}
        end += p.nbytes
    text = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, p in shard.items():
            values = random_values(name, torch.empty_like(p, device="cpu"))
            file.write(values.view(torch.uint8).numpy().data)


def write_checkpoint(c: Config, folder: Path) -> None:
    """The index is written last: where it stands, the checkpoint is whole."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return
    weight_map, total = {}, 0
    every = list(shards(c))
    for i, shard in enumerate(every, 1):
        path = folder / f"model-{i:05d}-of-{len(every):05d}.safetensors"
        print(f"writing {path}", file=sys.stderr)
        write_shard(path, c.kind, shard)
        weight_map |= {original_name(c.kind, name): path.name for name in shard}
        total += sum(p.nbytes for p in shard.values())
    config = {theirs: getattr(c, ours) for ours, theirs in CONFIG_KEYS[c.kind].items()}
    config |= CONFIG_FIXED[c.kind] | {"model_type": {"llada": "llada", "dream": "Dream"}[c.kind]}
    write_atomically(folder / "config.json", json.dumps(config).encode())
    found = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomically(index, json.dumps(found).encode())


def read_through(paths: list[Path]) -> float:
    """Seconds of reading the first file plainly. None of them is in the system's cache after."""
    begin = time.perf_counter()
    with open(paths[0], "rb", buffering=0) as file:
        while file.read(2 ** 24):
            pass
    took = time.perf_counter() - begin
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return took


# ------------------------------------------------------------------------------ MEASUREMENTS

def measure_loading(c: Config, folder: Path, machine: Machine) -> Backbone:
    paths = sorted(folder.glob("*.safetensors"))
    read_through(paths)                # so that the next one comes from the disk
    speed = paths[0].stat().st_size / read_through(paths)
    reset_peak(machine.device)
    begin = time.perf_counter()
    backbone = load_backbone(folder, device=machine.device, dtype=machine.dtype)
    took = time.perf_counter() - begin

    on_disk = 2 * n_weights(c)
    row(f"loading {on_disk / 1e9:.2f} GB; bound: reading the files", on_disk / speed, took, "s")
    held = sum(p.nbytes for p in backbone.parameters()) + machine.held
    if machine.device.type == "cpu":
        held += max(path.stat().st_size for path in paths)     # mapped until all of it is copied
    row("the same, peak memory", held, peak_bytes(machine.device), "B")
    return backbone


def measure_sampling(backbone: Backbone, memory: MetaState, T: int, machine: Machine, tries: int
                     ) -> None:
    """One denoising step of T tokens, half of them prompt."""
    c, device, steps = backbone.config, machine.device, 2
    memory.requires_grad_(False)       # torch's counter stumbles over gradients that nobody takes
    prompt = torch.randint(c.mask_id, (1, T // 2), device=device)

    def run(memory: MetaState | None) -> Callable[[], object]:
        return lambda: generate(backbone, prompt, memory=memory, gen_length=T // 2, steps=steps)

    without = measure(run(None), device, tries)
    using = measure(run(memory), device, tries)
    weights = sum(p.nbytes for p in backbone.parameters())
    bound = machine.at_best(without.flops / steps, weights)
    row(f"denoising step, 1 x {T} tokens", bound, without.seconds / steps, "s")
    row("the same with memory; bound: without it, times the share of its FLOPs",
        without.seconds / steps * using.flops / without.flops, using.seconds / steps, "s")
    # at most as many of the head's rows are wanted as the answer has: logits, a copy of them
    # without the mask, and their float32 softmax
    logits = T // 2 * c.vocab_size * (2 * machine.dtype.itemsize + 8)
    layer = passing_terms(c, T, machine.dtype.itemsize)["one layer recomputed, and its gradients"]
    held = machine.held + weights + 4 * n_trained(memory.config) + max(logits, layer)
    row("the same, peak memory", held, using.peak, "B")


def measure_training(backbone: Backbone, memory: MetaState, T: int, machine: Machine, tries: int
                     ) -> None:
    """A K-step unroll, its backward pass and the optimiser's step."""
    c, m, device = backbone.config, memory.config, machine.device
    backbone.recompute = True
    memory.requires_grad_(True)
    optimizer = torch.optim.AdamW(memory.parameters())
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

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    kept = kept_bytes(forward, [backbone, memory])
    found = measure(step, device, tries)
    weights = sum(p.nbytes for p in backbone.parameters())
    passes = K * (1 + 2 * (1 - m.write_layer / c.n_layer))     # over the weights
    bound = machine.at_best(found.flops, passes * weights)
    row(f"K = {K} training step, 1 x {T} tokens", bound, found.seconds, "s")
    row("the same, throughput; bound: the ceiling", machine.product, found.flops / found.seconds,
        "FLOP/s")
    item = machine.dtype.itemsize
    row("the same, kept for the backward pass", sum(kept_terms(c, m, T, item).values()), kept, "B")
    held = machine.held + sum(memory_terms(c, m, T, item).values())
    row("the same, peak memory", held, found.peak, "B")
    if device.type == "cuda":
        row("the same; bound: what a card of 24 GB has", CARD, found.peak, "B")


# ----------------------------------------------------------------------------------- THE PROGRAM

def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=PRESETS, help="default: llada on a GPU, else small")
    parser.add_argument("--tokens", type=COUNT, nargs="+", help="default: 1024 on a GPU, else 64 "
                        "and 128")
    parser.add_argument("--tries", type=COUNT, default=3, help="runs, of which the fastest counts")
    parser.add_argument("--compile", action="store_true", help="torch.compile the layers")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="load these weights; "
                        "they are written if they are not there")
    args = parser.parse_args()
    args.device = torch.device(args.device)
    on_gpu = args.device.type == "cuda"
    args.preset = args.preset or ("llada" if on_gpu else "small")
    args.tokens = args.tokens or ([1024] if on_gpu else [64, 128])
    return args


def main() -> None:
    args = arguments()
    c, device = PRESETS[args.preset], args.device
    dtype = torch.float32 if c == SMALL else torch.bfloat16
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads, {dtype}, "
          f"{c.kind} with {c.n_layer} layers of width {c.d_model}"
          f"{', compiled' if args.compile else ''}")
    if args.checkpoint:
        write_checkpoint(c, args.checkpoint)
    if c != SMALL:
        print_memory_table(c, memory_config(c), 1024)

    begin, begin_cpu = time.perf_counter(), time.process_time()
    machine = measure_machine(device, dtype)
    header("what", "bound", "measured", "ratio")
    print(f"| ceilings | | {shown(machine.product, 'FLOP/s')}, {shown(machine.read, 'B/s')} | |")
    if args.checkpoint:
        backbone = measure_loading(c, args.checkpoint, machine)
    else:
        backbone = random_backbone(c, machine)
    if args.compile:
        backbone.compile_layers()
    memory = random_memory(c, device)
    for T in args.tokens:
        measure_sampling(backbone, memory, T, machine, args.tries)
    for T in args.tokens:
        measure_training(backbone, memory, T, machine, args.tries)
    cores = (time.process_time() - begin_cpu) / (time.perf_counter() - begin)
    print(f"\nthis process had {cores:.2f} cores on average")


if __name__ == "__main__":
    main()
