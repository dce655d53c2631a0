"""Speed and memory as ratios within one run: python tests/bench.py [--device cuda] [--preset llada]

On a CPU at small shapes; on a GPU at the shapes of an 8B backbone with random weights. The ceilings
of the machine, matrix product and copy, are measured first; every row is bound, measured, ratio.
Peak device memory is torch's own count; peak host memory is the growth of resident memory, with
the mapped file counted in, measured in a process of its own.
"""
from __future__ import annotations

import argparse
import json
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffusion import cross_entropy, generate, unroll  # noqa: E402
from metastate import MetaState, compile_layers, preset  # noqa: E402
from model import DREAM, LLADA, Backbone, Config, load_backbone, save_backbone  # noqa: E402

SMALL = replace(LLADA, vocab_size=8192, n_layer=8, n_head=4, n_kv_head=4, d_model=256, d_ff=768,
                mask_id=8190, eos_id=8191, pad_id=8191, eot_id=None)


def seconds(run, device: torch.device, tries: int = 5) -> float:
    """Median time of run() after one warm-up."""
    times = []
    for _ in range(tries + 1):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[tries // 2]


def row(what: str, bound: str, measured: str, ratio: float) -> None:
    print(f"| {what} | {bound} | {measured} | {ratio:.3f} |", flush=True)


def flops(c: Config, tokens: int, length: int, logits: int) -> float:
    """Of one forward: two for every weight and token, and attention."""
    d_kv = c.n_kv_head * c.d_model // c.n_head
    weights = c.d_model * (2 * c.d_model + 2 * d_kv + 3 * c.d_ff)
    return c.n_layer * (2 * weights + 4 * length * c.d_model) * tokens + 2 * c.d_model * c.vocab_size * logits


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large matrix product, bytes/s of reading memory."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = 2 * n ** 3 / seconds(lambda: a @ b, device)
    x = torch.empty((4 << 30 if device.type == "cuda" else 256 << 20) // 4, device=device).normal_()
    return product, x.nbytes / seconds(lambda: x.sum(), device)


def synthetic(c: Config, device: torch.device, dtype: torch.dtype) -> Backbone:
    with torch.device("meta"):
        backbone = Backbone(c)
    backbone = backbone.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for p in backbone.parameters():
        p.normal_(std=0.02) if p.dim() == 2 else p.fill_(1)
    return backbone


def memory_for(backbone: Backbone) -> MetaState:
    """The preset's, or for the small shape one in the same proportion to its backbone."""
    config = preset(backbone)
    if backbone.config.d_model < 1024:
        config = replace(config, d_slot=88, n_head=11, d_time=16)
    return MetaState(config).to(backbone.embedding.weight.device)


def batch(c: Config, B: int, T: int, prompt: int, K: int, device: torch.device) -> tuple:
    ids, noise = torch.randint(c.mask_id, (B, T), device=device), torch.rand(B, T, device=device)
    maskable = torch.zeros(B, T, dtype=torch.bool, device=device)
    maskable[:, prompt:] = True
    counts = torch.full((B, K), (T - prompt) // K, device=device)
    return ids, maskable, counts, noise, torch.zeros(B, dtype=torch.bool, device=device)


def training(backbone: Backbone, B: int, T: int, K: int, device: torch.device, product: float) -> None:
    """A K-step unroll and its backward, with and without recomputation."""
    c, memory = backbone.config, memory_for(backbone)
    data = batch(c, B, T, T // 4, K, device)
    optimizer = torch.optim.AdamW(memory.parameters())
    masked = sum(3 * T // 4 - k * (3 * T // 4 // K) for k in range(K)) * B
    forward = K * flops(c, B * T, T, 0) + 2 * c.d_model * c.vocab_size * masked
    inside = 1 - memory.config.write_layer / c.n_layer
    needed = forward + inside * K * flops(c, B * T, T, 0) + 2 * c.d_model * c.vocab_size * masked
    found = {}

    def step() -> None:
        unroll(backbone, memory, *data, lam=0.5)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    for name, backbone.checkpointing in (("recomputed", True), ("kept", False)):
        if name == "kept" and device.type == "cuda" and T * B > 512:
            try:
                step()
            except torch.OutOfMemoryError:             # the recomputed step has to do
                optimizer.zero_grad()
                continue
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        took = seconds(step, device, 3)
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else saved_bytes(step) / 1e9
        found[name] = took, peak
        row(f"K = {K} training step, {B} x {T} tokens, activations {name}: time",
            f"{needed / product:.3f} s at the ceiling", f"{took:.3f} s", needed / product / took)
    backbone.checkpointing = False
    if len(found) == 2:
        (slow, small), (fast, large) = found["recomputed"], found["kept"]
        row("the same, recomputed / kept: time", f"{fast:.3f} s", f"{slow:.3f} s", slow / fast)
        row("the same, recomputed / kept: memory", f"{large:.3f} GB", f"{small:.3f} GB", small / large)
    if device.type == "cuda":
        row("the same, recomputed: peak device memory", "22 GB", f"{found['recomputed'][1]:.2f} GB",
            found["recomputed"][1] / 22)


def saved_bytes(step) -> int:
    """What autograd keeps for the backward pass, where the device does not count its memory."""
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step()
    return sum(kept.values())


@torch.no_grad()
def naive_generate(backbone: Backbone, prompt: torch.Tensor, gen_length: int, steps: int) -> torch.Tensor:
    """The straightforward sampler: logits of every position, softmax of all of them in float64."""
    canvas = F.pad(prompt, (0, gen_length), value=backbone.config.mask_id)
    for _ in range(steps):
        logits = backbone(canvas)
        tokens, p = logits.argmax(-1), logits.double().softmax(-1)
        sure = p.gather(-1, tokens[..., None])[..., 0]
        sure = sure.masked_fill(canvas != backbone.config.mask_id, -1)
        revealed = torch.zeros_like(canvas, dtype=torch.bool).scatter(
            1, sure.topk(gen_length // steps, dim=1).indices, True)
        canvas = torch.where(revealed, tokens, canvas)
    return canvas


@torch.no_grad()
def sampling(backbone: Backbone, T: int, device: torch.device, product: float, read: float) -> None:
    c, memory = backbone.config, memory_for(backbone)
    prompt, steps = torch.randint(c.mask_id, (1, T // 2), device=device), 8
    run = lambda m: generate(backbone, prompt, gen_length=T // 2, steps=steps, memory=m)  # noqa: E731
    plain, remembering = (seconds(lambda: run(m), device) / steps for m in (None, memory))
    weights = sum(p.nbytes for p in backbone.parameters())
    bound = max(flops(c, T, T, T // 4) / product, weights / read)
    row(f"denoising step, 1 x {T} tokens", f"{1e3 * bound:.2f} ms", f"{1e3 * plain:.2f} ms", plain / bound)
    row("the same with memory / without", f"{1e3 * plain:.2f} ms", f"{1e3 * remembering:.2f} ms",
        remembering / plain)
    naive = seconds(lambda: naive_generate(backbone, prompt, T // 2, steps), device) / steps
    row("sampler / straightforward full-logits sampler", f"{1e3 * naive:.2f} ms", f"{1e3 * plain:.2f} ms",
        plain / naive)
    print(f"| sampler, tokens per second (memory off, on) | | {T / 2 / steps / plain:.0f}, "
          f"{T / 2 / steps / remembering:.0f} | |")


@torch.no_grad()
def forward(backbone: Backbone, B: int, T: int, device: torch.device, product: float) -> None:
    ids = torch.randint(backbone.config.mask_id, (B, T), device=device)
    rows = torch.rand(B, T, device=device) < 0.25
    h, context = backbone.embed(ids)
    bound = flops(backbone.config, B * T, T, 0) / product
    took = seconds(lambda: backbone.run(h, context, 0, len(backbone.layers)), device)
    row(f"layers, {B} x {T} tokens: ceiling / time", f"{1e3 * bound:.1f} ms", f"{1e3 * took:.1f} ms",
        bound / took)
    every = seconds(lambda: backbone.head(backbone.pick(h)), device)
    some = seconds(lambda: backbone.head(backbone.pick(h, rows)), device)
    row("head on a quarter of the rows / on all", f"{1e3 * every:.2f} ms", f"{1e3 * some:.2f} ms", some / every)
    targets = torch.randint(backbone.config.mask_id, (int(rows.sum()),), device=device)
    chunks = seconds(lambda: cross_entropy(backbone, backbone.pick(h, rows), targets), device)
    whole = seconds(lambda: F.cross_entropy(backbone.head(backbone.pick(h)).float().flatten(0, 1),
                                            ids.flatten()), device)
    row("cross-entropy: masked rows in chunks / all at once", f"{1e3 * whole:.2f} ms", f"{1e3 * chunks:.2f} ms",
        chunks / whole)


def resident() -> int:
    """Highest resident memory of this process so far, in bytes. Linux: getrusage would count what
    the process was before it became this program."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def load_probe(folder: str, device: str) -> None:
    """In a process of its own: load, and print time, growth of peak host memory, model, largest."""
    torch.empty(1, device=device)
    before, begin = resident(), time.perf_counter()
    backbone = load_backbone(folder, device=device, dtype=torch.float32 if device == "cpu" else None)
    sizes = [p.nbytes for p in backbone.parameters()]
    print(json.dumps([time.perf_counter() - begin, resident() - before, sum(sizes), max(sizes)]))


def loading(device: torch.device) -> None:
    c = replace(SMALL, kind="tiny", vocab_size=65536, d_model=1024, d_ff=4096, n_layer=7, n_head=8, n_kv_head=8)
    with tempfile.TemporaryDirectory() as folder:
        save_backbone(synthetic(c, torch.device("cpu"), torch.float32), Path(folder))
        size = (Path(folder) / "model.safetensors").stat().st_size
        begin = time.perf_counter()
        (Path(folder) / "model.safetensors").read_bytes()
        read = time.perf_counter() - begin
        out = subprocess.run([sys.executable, __file__, "--load-probe", folder, "--device", str(device)],
                             capture_output=True, text=True, check=True).stdout
    took, grown, model, largest = json.loads(out)
    beyond = grown - model if device.type == "cpu" else grown
    row(f"loading {size / 1e9:.2f} GB / reading the file", f"{read:.2f} s", f"{took:.2f} s", took / read)
    row("the same: peak host memory beyond the model / largest tensor", f"{largest / 1e9:.3f} GB",
        f"{beyond / 1e9:.3f} GB", beyond / largest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=("small", "llada", "dream"), help="default: llada on a GPU")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--load-probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load_probe:
        return load_probe(args.load_probe, args.device)
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    c = {"small": SMALL, "llada": LLADA, "dream": DREAM}[args.preset or ("llada" if gpu else "small")]
    dtype = torch.bfloat16 if gpu else torch.float32
    name = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()}"
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads, {dtype}, {c.kind} with "
          f"{c.n_layer} layers of width {c.d_model}\n")
    product, read = ceilings(device, dtype)
    print(f"| what | bound | measured | ratio |\n|---|---|---|---|\n| ceilings | | "
          f"{product / 1e12:.3f} TFLOP/s, {read / 1e9:.1f} GB/s | |")
    loading(device)
    backbone = synthetic(c, device, dtype)
    if args.compile:
        compile_layers(backbone)
    forward(backbone, *((8, 1024) if gpu else (4, 256)), device, product)
    sampling(backbone, 512 if gpu else 256, device, product, read)
    training(backbone, *((1, 1024) if gpu else (2, 256)), 4, device, product)


if __name__ == "__main__":
    main()
