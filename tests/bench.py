"""Speed and memory, each beside its arithmetic: python tests/bench.py [--device cuda] [--compile]

    python tests/bench.py                              # small shapes on a CPU, two minutes
    python tests/bench.py --device cuda --preset dream # 8B shapes with random weights on a GPU
    python tests/bench.py --preset llada --device cpu --checkpoint FOLDER      # 8B on a CPU

The last one writes a checkpoint of random weights in the released layout (16 GB, once) and needs
24 GB of memory. The machine's ceilings, matrix product and reading memory, are measured first. In
every row the ratio is measured / bound: times are 1 at best, and what is kept should be near 1.
"""
import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from diffusion import cross_entropy, generate, unroll  # noqa: E402
from metastate import MemoryConfig, MetaState, preset  # noqa: E402
from model import (CONFIG_FIXED, CONFIG_KEYS, DREAM, LLADA, Backbone, Config,  # noqa: E402
                   load_backbone, original_name, write_atomically)

SMALL = replace(LLADA, vocab_size=8192, n_layer=8, n_head=4, n_kv_head=4, d_model=256, d_ff=768,
                mask_id=8190, eos_id=8191, pad_id=8191, eot_id=None)
SMALL_FILE = replace(SMALL, vocab_size=65536, d_model=1024, d_ff=4096, n_head=8, n_kv_head=8)
PRESETS = {"small": SMALL, "llada": LLADA, "dream": DREAM}
K = 4
CHUNK = 256                            # rows of logits at a time, see diffusion.cross_entropy
CARD = 22e9                            # of a card with 24 GB


class Machine(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    product: float                     # FLOP/s of a large matrix product
    read: float                        # bytes/s of reading memory

    def at_best(self, flops: float, n_bytes: float = 0) -> float:
        """Seconds, if the machine did nothing else."""
        return max(flops / self.product, n_bytes / self.read)


# -------------------------------------------------------------------------------- MEASURING

def seconds(run: Callable[[], object], device: torch.device, tries: int = 5) -> float:
    """Median time of run() after one warm-up."""
    times = []
    for _ in range(tries + 1):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[tries // 2]


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    on_gpu = device.type == "cuda"
    n = 8192 if on_gpu else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    product = 2 * n ** 3 / seconds(lambda: a @ a, device)
    x = torch.randn(2 ** 30 if on_gpu else 2 ** 26, device=device)
    read = x.nbytes / seconds(lambda: x.sum(), device)
    return Machine(device, dtype, product, read)


def resident() -> int:
    """Highest resident memory of this process so far, in bytes (Linux). The mapped parts of a
    checkpoint count as long as they are mapped."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


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


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that a step holds at any moment beyond what was there before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())
               if event.name() == "[memory]"]
    held, peak = 0, 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak


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


# -------------------------------------------------------------------------------- ARITHMETIC

def layer_flops(c: Config, length: int) -> float:
    """Of one layer for one token: two for every weight, and attention."""
    d_kv = c.n_kv_head * c.d_model // c.n_head
    weights = c.d_model * (2 * c.d_model + 2 * d_kv + 3 * c.d_ff)
    return 2 * weights + 4 * length * c.d_model


def head_flops(c: Config) -> float:
    """Of the logits of one position."""
    return 2 * c.d_model * c.vocab_size


def memory_flops(m: MemoryConfig, length: int) -> float:
    """Of the memory in one forward step of one row of tokens."""
    over_tokens = 4 * length * m.d_model * m.d_slot        # the Mixer's k and v, Injector's q, out
    over_slots = 10 * m.n_slots * m.d_slot ** 2            # the other four, and the Updater's six
    attention = 4 * length * m.n_slots * m.d_slot          # two products each
    return 2 * (over_tokens + over_slots + attention)


def masked_rows(n_maskable: int) -> float:
    """Masked tokens of one row over the K steps, when each reveals a K-th."""
    return n_maskable * (K + 1) / 2


def training_flops(c: Config, m: MemoryConfig, length: int, n_maskable: int, *, recompute: bool
                   ) -> float:
    """Of one row in the K steps, forward and backward. A frozen weight costs as much backward as
    forward, a trained one twice as much; there is nothing backward below the Injector."""
    above = c.n_layer - m.write_layer
    again = 2 if recompute else 1      # backward, and forward once more
    layers = K * length * (c.n_layer + again * above) * layer_flops(c, length)
    head = masked_rows(n_maskable) * (1 + again) * head_flops(c)
    memory = K * (2 + again) * memory_flops(m, length)
    return layers + head + memory


def n_weights(c: Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Backbone(c).parameters())


def n_trained(m: MemoryConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MetaState(m).parameters())


def kept_terms(c: Config, m: MemoryConfig, B: int, T: int, n_maskable: int, item: int = 2
               ) -> dict[str, float]:
    """Bytes that K unrolled steps keep for the backward pass, everything recomputed. item: bytes
    of a number in the backbone's precision."""
    above = c.n_layer - m.write_layer
    bias = B * m.n_head * m.n_slots * T * 4
    slots = B * m.n_slots * m.d_slot
    return {
        f"inputs of {above} layers and of the Injector, {K} steps": K * (above + 1) * B * T
        * c.d_model * item,
        f"biases of Mixer and Injector and their squares' roots, {K} steps": K * 4 * bias,
        f"picked rows for the head, {K} steps": masked_rows(n_maskable) * B * c.d_model * item,
        f"slots and what the Mixer read, {K} steps": K * slots * (4 + item),
    }


def passing_terms(c: Config, B: int, T: int, item: int = 2) -> dict[str, float]:
    """Bytes that are there for a moment of the backward pass; the larger one counts."""
    d_kv = c.n_kv_head * c.d_model // c.n_head
    kept = 3 * c.d_model + 2 * d_kv + 3 * c.d_ff           # what autograd keeps of one layer
    gradients = c.d_model + 2 * c.d_ff                     # of its output, and within the MLP
    return {
        "one layer recomputed, and its gradients": B * T * (kept + gradients) * item,
        f"one chunk of {CHUNK} rows of logits, float32: log p and two gradients":
            CHUNK * c.vocab_size * 12,
    }


def memory_terms(c: Config, m: MemoryConfig, B: int, T: int, n_maskable: int) -> dict[str, float]:
    """Where the memory of a K-step training step goes, in bytes; their sum is the peak."""
    passing = passing_terms(c, B, T)
    largest = max(passing, key=passing.get)
    return {
        "frozen weights, bfloat16": 2 * n_weights(c),
        "memory, gradients and AdamW's two moments, float32": 16 * n_trained(m),
        **kept_terms(c, m, B, T, n_maskable),
        largest: passing[largest],
    }


def print_memory_table(c: Config, m: MemoryConfig, T: int) -> None:
    terms = memory_terms(c, m, 1, T, T)
    header(f"{c.kind}, K = {K}, 1 x {T} tokens, activations recomputed: arithmetic", "GB")
    for what, n_bytes in terms.items():
        print(f"| {what} | {n_bytes / 1e9:.2f} |")
    print(f"| sum | {sum(terms.values()) / 1e9:.2f} |")


# ------------------------------------------------------------------------------ RANDOM MODELS

def random_backbone(c: Config, machine: Machine) -> Backbone:
    with torch.device("meta"):
        backbone = Backbone(c)
    backbone = backbone.to(machine.dtype).to_empty(device=machine.device)
    for name, p in backbone.named_parameters():
        p.requires_grad_(False).copy_(random_values(name, p))
    return backbone.eval()


def random_values(name: str, p: Tensor) -> Tensor:
    """Norms are one, biases zero, other weights a hundredth or so."""
    if p.dim() == 2:
        return torch.empty_like(p).normal_(std=0.02)
    return torch.ones_like(p) if "norm" in name else torch.zeros_like(p)


def memory_config(c: Config) -> MemoryConfig:
    """The preset's, or for the small shape one in the same proportion to its backbone."""
    with torch.device("meta"):
        config = preset(Backbone(c))
    if c.d_model < 1024:
        config = replace(config, d_slot=88, d_time=16)
    return config


def random_memory(c: Config, device: torch.device) -> MetaState:
    """As if trained: its output is not zero."""
    memory = MetaState(memory_config(c)).to(device)
    torch.nn.init.normal_(memory.injector.out.weight, std=1e-3)
    return memory


def draws(c: Config, B: int, T: int, device: torch.device) -> dict[str, Tensor]:
    """What unroll wants of a batch; the first quarter of every row is prompt."""
    maskable = torch.arange(T, device=device).repeat(B, 1) >= T // 4
    return {
        "ids": torch.randint(c.mask_id, (B, T), device=device),
        "maskable": maskable,
        "counts": torch.full((B, K), (T - T // 4) // K, device=device),
        "noise": torch.rand(B, T, device=device),
        "by_confidence": torch.zeros(B, dtype=torch.bool, device=device),
    }


# --------------------------------------------------------------------- CHECKPOINTS ON THE DISK
# In the released layout: config.json, an index, and shards in which LLaDA's tensors are grouped by
# kind and Dream's stand in order.

SHARD = {"llada": 3e9, "dream": 5e9}       # bytes, at most


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
    with write_atomically(path) as file:
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
    with write_atomically(folder / "config.json") as file:
        file.write(json.dumps(config).encode())
    with write_atomically(index) as file:
        found = {"metadata": {"total_size": total}, "weight_map": weight_map}
        file.write(json.dumps(found).encode())


def disk_speed(folder: Path) -> float:
    """Bytes/s of reading the first shard plainly. Nothing of the checkpoint is in the system's
    cache afterwards."""
    paths = sorted(folder.glob("*.safetensors"))
    forget(paths)
    begin = time.perf_counter()
    with open(paths[0], "rb", buffering=0) as file:
        while file.read(2 ** 24):
            pass
    took = time.perf_counter() - begin
    forget(paths)
    return paths[0].stat().st_size / took


def forget(paths: list[Path]) -> None:
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -------------------------------------------------------------------- PROCESSES OF THEIR OWN
# The highest resident memory of a process is known for all of it only, so each has one task.

def probe(task: str, folder: Path, device: torch.device) -> dict[str, float]:
    """Load a checkpoint, do one task with it, and say how long it took and what was resident."""
    torch.empty(1, device=device)
    held = resident()
    begin = time.perf_counter()
    backbone = load_backbone(folder, device=device)
    found = {"held": held, "load": time.perf_counter() - begin}
    memory = random_memory(backbone.config, device)
    if task == "sample":
        found["without"], found["with"] = time_sampling(backbone, memory, T=64, steps=2, tries=1)
    if task.startswith("train"):
        found["step"] = time_training(backbone, memory, 1, int(task.split()[1]), tries=1)
    return found | {"peak": resident()}


def in_its_own_process(task: str, folder: Path, device: torch.device) -> dict[str, float]:
    command = [sys.executable, __file__, "--probe", task, "--checkpoint", str(folder),
               "--device", str(device)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure_loading(c: Config, folder: Path, device: torch.device) -> None:
    weights = 2 * n_weights(c)
    largest = 2 * c.vocab_size * c.d_model
    read = weights / disk_speed(folder)
    found = in_its_own_process("load", folder, device)
    row(f"loading {weights / 1e9:.2f} GB; bound: reading the files", read, found["load"], "s")
    on_host = weights if device.type == "cpu" else 0
    row("loading, peak resident memory; bound: the model here, its largest tensor, python",
        on_host + largest + found["held"], found["peak"], "B")


def measure_full_size(c: Config, folder: Path, machine: Machine) -> None:
    """An 8B backbone on a CPU: every task in a process of its own."""
    m, weights = memory_config(c), 2 * n_weights(c)
    measure_loading(c, folder, machine.device)

    found = in_its_own_process("sample", folder, machine.device)
    T = 64
    flops = T * c.n_layer * layer_flops(c, T) + T // 2 * head_flops(c)
    row(f"denoising step, 1 x {T} tokens", machine.at_best(flops, weights), found["without"], "s")
    row("the same with memory; bound: without it, times the share of its FLOPs",
        found["without"] * (1 + memory_flops(m, T) / flops), found["with"], "s")
    # at most as many of the head's rows are wanted as the answer has, in two precisions
    passing = passing_terms(c, 1, T)["one layer recomputed, and its gradients"]
    row("the same, peak resident memory", weights + 4 * n_trained(m) + passing + found["held"]
        + T // 2 * c.vocab_size * 10, found["peak"], "B")

    for T in (64, 128):
        found = in_its_own_process(f"train {T}", folder, machine.device)
        maskable = T - T // 4
        flops = training_flops(c, m, T, maskable, recompute=True)
        passes = K * (1 + 2 * (1 - m.write_layer / c.n_layer))     # over the weights
        row(f"K = {K} training step, 1 x {T} tokens", machine.at_best(flops, passes * weights),
            found["step"], "s")
        terms = memory_terms(c, m, 1, T, maskable)
        row("the same, peak resident memory", sum(terms.values()) + found["held"], found["peak"],
            "B")


# ------------------------------------------------------------------------- WITHIN THIS PROCESS

def time_sampling(backbone: Backbone, memory: MetaState, T: int, steps: int, tries: int
                  ) -> tuple[float, float]:
    """Seconds of one denoising step, half of T tokens prompt: without memory, with it."""
    device = backbone.embedding.weight.device
    prompt = torch.randint(backbone.config.mask_id, (1, T // 2), device=device)
    settings = dict(gen_length=T // 2, steps=steps)
    without = seconds(lambda: generate(backbone, prompt, **settings), device, tries)
    memory.eval()
    using = seconds(lambda: generate(backbone, prompt, memory=memory, **settings), device, tries)
    return without / steps, using / steps


def training_step(backbone: Backbone, memory: MetaState, B: int, T: int) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(memory.parameters())
    batch = draws(backbone.config, B, T, backbone.embedding.weight.device)

    def step() -> None:
        loss, _ = unroll(backbone, memory, **batch, lam=0.5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_training(backbone: Backbone, memory: MetaState, B: int, T: int, tries: int) -> float:
    backbone.recompute = True
    step = training_step(backbone, memory, B, T)
    return seconds(step, backbone.embedding.weight.device, tries)


def measure_forward(backbone: Backbone, B: int, T: int, machine: Machine) -> None:
    """The layers, the head, and the cross-entropy against computing all logits."""
    c, device = backbone.config, machine.device
    ids = torch.randint(c.mask_id, (B, T), device=device)
    wanted = torch.rand(B, T, device=device) < 0.25
    with torch.no_grad():
        h, context = backbone.embed(ids)
        took = seconds(lambda: backbone.run(h, context, 0, c.n_layer), device)
        flops = B * T * c.n_layer * layer_flops(c, T)
        row(f"layers, {B} x {T} tokens", machine.at_best(flops), took, "s")
        row("the same, throughput; bound: the ceiling", machine.product, flops / took, "FLOP/s")
        every = seconds(lambda: backbone.head(backbone.pick(h)), device)
        some = seconds(lambda: backbone.head(backbone.pick(h, wanted)), device)
        row("head on a quarter of the positions; bound: a quarter of all", every / 4, some, "s")
        picked, targets = backbone.pick(h, wanted), ids[wanted]
        chunks = seconds(lambda: cross_entropy(backbone, picked, targets), device)
        whole = seconds(lambda: F.cross_entropy(backbone.head(backbone.pick(h)).float().flatten(
            0, 1), ids.flatten()), device)
        row("cross-entropy of a quarter; bound: a quarter of all at once", whole / 4, chunks, "s")


@torch.no_grad()
def plain_generate(backbone: Backbone, prompt: Tensor, gen_length: int, steps: int) -> Tensor:
    """The straightforward sampler: logits of every position, softmax of all of them in float64."""
    mask_id = backbone.config.mask_id
    canvas = F.pad(prompt, (0, gen_length), value=mask_id)
    for _ in range(steps):
        logits = backbone(canvas)                                      # (1, T, V)
        tokens = logits.argmax(-1)                                     # (1, T)
        p = logits.double().softmax(-1)                                # (1, T, V)
        confidence = p.gather(-1, tokens[..., None])[..., 0]           # (1, T)
        confidence = confidence.masked_fill(canvas != mask_id, -1)
        best = confidence.topk(gen_length // steps, dim=1).indices
        canvas = canvas.scatter(1, best, tokens.gather(1, best))
    return canvas


def measure_sampling(backbone: Backbone, T: int, machine: Machine) -> None:
    c, m, steps = backbone.config, memory_config(backbone.config), 8
    weights = sum(p.nbytes for p in backbone.parameters())
    memory = random_memory(c, machine.device)
    without, using = time_sampling(backbone, memory, T, steps, tries=5)
    flops = T * c.n_layer * layer_flops(c, T) + T / 4 * head_flops(c)
    row(f"denoising step, 1 x {T} tokens", machine.at_best(flops, weights), without, "s")
    row("the same with memory; bound: without it, times the share of its FLOPs",
        without * (1 + memory_flops(m, T) / flops), using, "s")
    prompt = torch.randint(c.mask_id, (1, T // 2), device=machine.device)
    plain = seconds(lambda: plain_generate(backbone, prompt, T // 2, steps), machine.device)
    row("denoising step; bound: of the straightforward sampler, all logits in float64",
        plain / steps, without, "s")
    print(f"| tokens a second at {steps} steps of {T // 2 // steps}: without memory, with it | | "
          f"{T / 2 / steps / without:.0f}, {T / 2 / steps / using:.0f} | |")


def memory_alone(backbone: Backbone, B: int, T: int) -> Callable[[], None]:
    """The K steps and their backward pass on a backbone without layers."""
    c = backbone.config
    with torch.device("meta"):
        bare = Backbone(replace(c, n_layer=0))
    bare.embedding = backbone.embedding
    bare.recompute = True
    device = backbone.embedding.weight.device
    memory = MetaState(replace(memory_config(c), write_layer=0, read_layer=0)).to(device)
    ids = torch.full((B, T), c.mask_id, device=device)
    everything = torch.ones_like(ids, dtype=torch.bool)

    def step() -> None:
        slots = memory.initial(B)
        total = 0.0
        for _ in range(K):
            h, slots = memory.step(bare, ids, slots, maskable=everything, wanted=everything)
            total = total + h.float().mean() + slots.mean()
        total.backward()
        memory.zero_grad()

    return step


def measure_training(backbone: Backbone, B: int, T: int, machine: Machine) -> None:
    """A K-step unroll and its backward pass: time, what is kept, the peak."""
    c, m, device = backbone.config, memory_config(backbone.config), machine.device
    memory = random_memory(c, device)
    maskable = T - T // 4
    what = f"K = {K} training step, {B} x {T} tokens"
    flops = B * training_flops(c, m, T, maskable, recompute=True)
    took = time_training(backbone, memory, B, T, tries=3)
    row(what, machine.at_best(flops), took, "s")
    row("the same, throughput; bound: the ceiling", machine.product, flops / took, "FLOP/s")

    backbone.recompute = False
    try:
        kept = seconds(training_step(backbone, memory, B, T), device, tries=3)
        row("the same, activations recomputed; bound: kept", kept, took, "s")
    except torch.OutOfMemoryError:
        print("| the same, activations kept: out of memory | | | |")
    memory.zero_grad()
    backbone.recompute = True

    alone = seconds(memory_alone(backbone, B, T), device, tries=3)
    share = B * K * 4 * memory_flops(m, T) / flops
    row("the memory's modules alone; bound: their share of the FLOPs", share * took, alone, "s")
    row("their share of the step; bound: of the FLOPs", share * 100, alone / took * 100, "%")
    measure_memory(backbone, memory, B, T, machine)


def measure_memory(backbone: Backbone, memory: MetaState, B: int, T: int, machine: Machine) -> None:
    """What a training step keeps and its peak, against the arithmetic of the table."""
    c, m, device = backbone.config, memory.config, machine.device
    maskable, item = T - T // 4, machine.dtype.itemsize
    batch = draws(c, B, T, device)
    expected = sum(kept_terms(c, m, B, T, maskable, item).values())
    kept = kept_bytes(lambda: unroll(backbone, memory, **batch, lam=0.5)[0], [backbone, memory])
    row("kept for the backward pass, activations recomputed", expected, kept, "B")

    step = training_step(backbone, memory, B, T)
    step()                             # the optimiser's moments are there from now on
    gradients = 4 * n_trained(m)
    passing = max(passing_terms(c, B, T, item).values())
    peak = peak_bytes(step, device)
    row("peak of a step beyond weights and optimiser", expected + gradients + passing, peak, "B")
    if device.type == "cuda":
        total = torch.cuda.max_memory_allocated()
        row("peak device memory", sum(memory_terms(c, m, B, T, maskable).values()), total, "B")
        row("the same; bound: what a card of 24 GB has", CARD, total, "B")


# ----------------------------------------------------------------------------------- THE PROGRAM

def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=PRESETS, help="default: llada on a GPU, else small")
    parser.add_argument("--compile", action="store_true", help="torch.compile the layers")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="for an 8B preset on a "
                        "CPU: its random weights, 16 GB, written if they are not there")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = torch.device(args.device)
    args.preset = args.preset or ("llada" if args.device.type == "cuda" else "small")
    if args.device.type == "cpu" and args.preset != "small" and not args.checkpoint:
        parser.error("an 8B preset on a CPU needs --checkpoint FOLDER with 16 GB of room")
    return args


def main() -> None:
    args = arguments()
    if args.probe:
        print(json.dumps(probe(args.probe, args.checkpoint, args.device)))
        return
    c, device = PRESETS[args.preset], args.device
    on_gpu = device.type == "cuda"
    small = args.preset == "small"
    dtype = torch.float32 if small else torch.bfloat16
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads, {dtype}, "
          f"{c.kind} with {c.n_layer} layers of width {c.d_model}"
          f"{', compiled' if args.compile else ''}")
    if not small:
        print_memory_table(c, memory_config(c), 1024)
    machine = measure_machine(device, dtype)
    header("what", "bound", "measured", "ratio")
    print(f"| ceilings | | {shown(machine.product, 'FLOP/s')}, {shown(machine.read, 'B/s')} | |")

    if not small and not on_gpu:
        write_checkpoint(c, args.checkpoint)
        measure_full_size(c, args.checkpoint, machine)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(SMALL_FILE, Path(folder))
        measure_loading(SMALL_FILE, Path(folder), device)
    backbone = random_backbone(c, machine)
    if args.compile:
        backbone.compile_layers()
    measure_forward(backbone, *((4, 256) if small else (8, 1024)), machine)
    measure_sampling(backbone, 256 if small else 512, machine)
    measure_training(backbone, *((2, 256) if small else (1, 1024)), machine)


if __name__ == "__main__":
    main()
