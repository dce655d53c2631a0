"""The backbone as it comes off the shelf: architecture, released weights, tokeniser.

One bidirectional pre-norm transformer, of which the tiny default, LLaDA-8B (arXiv 2502.09992) and
Dream-7B (arXiv 2508.15487) are configurations. A pass is four plain calls, so that a memory can
stand between any two layers without hooks:

    h, context = backbone.embed(ids, attention_mask)    # (B, T) -> (B, T, D)
    h = backbone.run(h, context, 0, n_layer)            # any range of layers
    h = backbone.pick(h, rows)                          # (N, D), h of position i scores token i
    logits = backbone.head(h)                           # (N, V)

The order of casts is part of each model: bf16 logits equal those of the original classes.
"""
import hashlib
import http.client
import json
import math
import os
import pickle
import re
import sys
import time
import unicodedata
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

class InputError(Exception):
    """Bad input, in one sentence: what was found, what was expected, what to do."""

def ensure(condition: object, message: str) -> None:
    if not condition:
        raise InputError(message)

@contextmanager
def blame(source: object, advice: str = "fetch it again") -> Iterator[None]:
    """Whatever fails inside is the fault of source, a file for example: an InputError says so."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError,
            AssertionError, pickle.UnpicklingError) as error:
        reason = re.split(r"\.\s|\n", str(error))[0]              # its first sentence
        raise InputError(f"{source} fails ({type(error).__name__}: {reason}); {advice}")

def run_program(main: Callable[[], None]) -> None:
    """Call a program's main; bad input ends it with one sentence and exit status 1."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")

def start_device(name: str | None) -> tuple[torch.device, int, int]:
    """(device, rank, number of processes); under torchrun the process group is opened."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    rank, local, world = (int(os.environ.get(name, 0)) for name in names)
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with blame(f"--device {name}", f"try {best}"):
        device = torch.device(name or best)
        if device == torch.device("cuda"):             # no index: every process has its own
            torch.cuda.set_device(device := torch.device("cuda", local))
        torch.empty(1, device=device)
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, rank, max(world, 1)

# ------------------------------------------------------------------------------- architecture

@dataclass(frozen=True)
class Config:
    kind: str                      # tiny, llada or dream: tensor names, chat template, sampler
    vocab_size: int                # rows of the embedding; some have no token
    n_layer: int
    n_head: int
    n_kv_head: int
    d_model: int
    d_ff: int
    norm_eps: float
    rope_theta: float
    rope_fp32: bool                # rotate q and k in float32, else in the activation dtype
    qkv_bias: bool
    shift: bool                    # the head at position i scores token i + 1
    mask_id: int
    eos_id: int
    pad_id: int
    bos_id: int | None = None      # this one and the next are not in config.json
    eot_id: int | None = None      # end of a chat turn

LLADA = Config("llada", 126464, n_layer=32, n_head=32, n_kv_head=32, d_model=4096, d_ff=12288,
               norm_eps=1e-5, rope_theta=500000.0, rope_fp32=True, qkv_bias=False, shift=False,
               mask_id=126336, eos_id=126081, pad_id=126081, bos_id=126080, eot_id=126348)
DREAM = Config("dream", 152064, n_layer=28, n_head=28, n_kv_head=4, d_model=3584, d_ff=18944,
               norm_eps=1e-6, rope_theta=1000000.0, rope_fp32=False, qkv_bias=True, shift=True,
               mask_id=151666, eos_id=151643, pad_id=151643, bos_id=151665, eot_id=151645)
TINY = Config("tiny", 304, n_layer=1, n_head=4, n_kv_head=4, d_model=64, d_ff=192, norm_eps=1e-5,
              rope_theta=100.0, rope_fp32=True, qkv_bias=False, shift=False, mask_id=302,
              eos_id=303, pad_id=303)
PRESETS = {                        # architecture, repository on huggingface.co
    "tiny": (TINY, None),
    "llada-base": (LLADA, "GSAI-ML/LLaDA-8B-Base"),
    "llada": (LLADA, "GSAI-ML/LLaDA-8B-Instruct"),
    "llada-1.5": (LLADA, "GSAI-ML/LLaDA-1.5"),
    "dream-base": (DREAM, "Dream-org/Dream-v0-Base-7B"),
    "dream": (DREAM, "Dream-org/Dream-v0-Instruct-7B"),
}

class RMSNorm(nn.Module):
    """Statistics in float32, cast back, then the weight: the order of both originals."""
    def __init__(self, d: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding by +theta, in the dtype of the tables. x: (B, H, T, head_dim)."""
    y = x.to(cos.dtype)
    first, second = y.chunk(2, dim=-1)
    return (y * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)

class Layer(nn.Module):
    """Attention and SwiGLU, each behind a norm and added to the residual stream."""
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim, self.grouped = c.d_model // c.n_head, c.n_kv_head != c.n_head
        d_kv = c.n_kv_head * self.head_dim
        self.attn_norm, self.mlp_norm = (RMSNorm(c.d_model, c.norm_eps) for _ in range(2))
        self.q = nn.Linear(c.d_model, c.d_model, bias=c.qkv_bias)
        self.k, self.v = (nn.Linear(c.d_model, d_kv, bias=c.qkv_bias) for _ in range(2))
        self.out = nn.Linear(c.d_model, c.d_model, bias=False)
        self.gate, self.up = (nn.Linear(c.d_model, c.d_ff, bias=False) for _ in range(2))
        self.down = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x: Tensor, context: tuple) -> Tensor:
        h, (cos, sin, mask) = self.attn_norm(x), context                       # (B, T, D)
        q, k, v = (p(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for p in (self.q, self.k, self.v))                          # (B, H, T, head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=self.grouped)
        x = x + self.out(y.transpose(1, 2).flatten(2))                         # (B, T, D)
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

class Backbone(nn.Module):
    """Masked-diffusion transformer: token ids to logits, every position sees every other."""
    def __init__(self, config: Config):
        super().__init__()
        self.config, self.checkpointing = config, False    # True: recompute layers in the backward
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() == 2 and not p.is_meta:
                nn.init.normal_(p, std=0.1)

    def embed(self, ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, tuple]:
        """ids (B, T), attention_mask (B, T) with 0 at padding -> h (B, T, D), and the context that
        all layers share: cos, sin (1 or B, 1, T, head_dim) and the keys' mask (B, 1, 1, T). Dream
        counts positions from the first real token, LLaDA from the first column."""
        c, h, mask = self.config, self.embedding(ids), None
        position = torch.arange(ids.shape[1], device=ids.device)[None]                 # (1, T)
        if attention_mask is not None:
            mask = attention_mask.bool()[:, None, None, :]
            if c.kind == "dream":
                position = (attention_mask.long().cumsum(1) - 1).masked_fill(attention_mask == 0, 1)
        d = c.d_model // c.n_head
        inverse = 1.0 / c.rope_theta ** (torch.arange(0, d, 2, device=ids.device).float() / d)
        angle = (position[:, None, :, None].float() * inverse).repeat(1, 1, 1, 2)
        dtype = torch.float32 if c.rope_fp32 else h.dtype
        return h, (angle.cos().to(dtype), angle.sin().to(dtype), mask)

    def run(self, h: Tensor, context: tuple, start: int, stop: int) -> Tensor:
        """Layers start..stop-1 on the residual stream h (B, T, D)."""
        for layer in self.layers[start:stop]:
            h = layer(h, context) if not (self.checkpointing and h.requires_grad) else checkpoint(
                layer, h, context, use_reentrant=False, preserve_rng_state=False)
        return h

    def pick(self, h: Tensor, rows: Tensor | None = None) -> Tensor:
        """Align h with the tokens it scores (undo the shift), then keep rows, a bool (B, T)."""
        if self.config.shift:
            h = torch.cat((h[:, :1], h[:, :-1]), dim=1)
        return h if rows is None else h[rows]                                  # (B, T, D) or (N, D)

    def head(self, h: Tensor) -> Tensor:
        """Picked h (..., D) -> logits (..., V)."""
        return self.lm_head(self.norm(h))

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, rows: Tensor | None = None
                ) -> Tensor:
        """Logits (B, T, V), or (N, V) at rows; logits[:, i] scores token i, for Dream too."""
        h, context = self.embed(ids, attention_mask)
        return self.head(self.pick(self.run(h, context, 0, len(self.layers)), rows))

# ----------------------------------------------------------------------------------- weights
# A checkpoint folder holds config.json, *.safetensors (with or without an index) and, but for
# tiny, the tokeniser's files. Our names and theirs:
CONFIG_KEYS = {
    "llada": dict(n_layer="n_layers", n_head="n_heads", n_kv_head="n_kv_heads", d_model="d_model",
                  d_ff="mlp_hidden_size", norm_eps="rms_norm_eps", rope_theta="rope_theta",
                  rope_fp32="rope_full_precision", qkv_bias="include_qkv_bias"),
    "dream": dict(n_layer="num_hidden_layers", n_head="num_attention_heads", d_model="hidden_size",
                  n_kv_head="num_key_value_heads", d_ff="intermediate_size",
                  norm_eps="rms_norm_eps", rope_theta="rope_theta"),
}
CONFIG_FIXED = {                   # under other settings theirs is not the architecture above
    "llada": dict(block_type="llama", activation_type="silu", layer_norm_type="rms", rope=True,
                  alibi=False, include_bias=False, attention_layer_norm=False, weight_tying=False,
                  scale_logits=False, input_emb_norm=False),
    "dream": dict(hidden_act="silu", tie_word_embeddings=False, rope_scaling=None,
                  use_sliding_window=False, use_mrope=False),
}
TENSOR_NAMES = {
    "llada": dict(
        embedding="model.transformer.wte", norm="model.transformer.ln_f",
        lm_head="model.transformer.ff_out", layers="model.transformer.blocks", mlp_norm="ff_norm",
        q="q_proj", k="k_proj", v="v_proj", out="attn_out", gate="ff_proj", up="up_proj",
        down="ff_out"),
    "dream": dict(
        embedding="model.embed_tokens", norm="model.norm", layers="model.layers",
        attn_norm="input_layernorm", mlp_norm="post_attention_layernorm", q="self_attn.q_proj",
        k="self_attn.k_proj", v="self_attn.v_proj", out="self_attn.o_proj", gate="mlp.gate_proj",
        up="mlp.up_proj", down="mlp.down_proj"),
}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

def original_name(kind: str, name: str) -> str:
    """The name in a released checkpoint of our parameter, layers.0.q.weight for example."""
    table, (*parts, leaf) = TENSOR_NAMES.get(kind, {}), name.split(".")
    return ".".join([table.get(part, part) for part in parts] + [leaf])

def read_json(path: Path) -> dict:
    with blame(path):
        value = json.loads(path.read_bytes())
    ensure(isinstance(value, dict), f"{path} holds no JSON object; fetch it again")
    return value

def read_config(folder: Path) -> Config:
    """The architecture that a folder's config.json describes."""
    path, found = folder / "config.json", read_json(folder / "config.json")
    kind = str(found.pop("model_type", None)).lower()
    ensure(kind in ("tiny", *CONFIG_KEYS), f"{path} has model_type {kind!r}, not llada or Dream")
    for key, want in CONFIG_FIXED.get(kind, {}).items():
        ensure(found.get(key, want) == want, f"{path} sets {key}; only {want!r} is implemented")
    with blame(path):
        if kind == "tiny":
            c = Config(**found)
        else:
            base, vocab = PRESETS[kind][0], found.get("embedding_size") or found["vocab_size"]
            ids = {f"{name}_id": found[f"{name}_token_id"] for name in ("mask", "eos", "pad")}
            values = {ours: found[theirs] for ours, theirs in CONFIG_KEYS[kind].items()}
            c = replace(base, vocab_size=vocab, **values, **ids)
        sizes = [c.vocab_size, c.n_layer, c.n_head, c.n_kv_head, c.d_model, c.d_ff]
        sound = all(type(n) is int and n > 0 for n in sizes) and (
            c.d_model % (2 * c.n_head) == c.n_head % c.n_kv_head == 0
            and 0 <= max(c.mask_id, c.eos_id, c.pad_id) < c.vocab_size)
    ensure(sound, f"{path} has sizes that do not fit together, {sizes}; fetch it again")
    return c

def read_header(path: Path) -> dict[str, tuple[torch.dtype, list[int], int, int]]:
    """Name -> (dtype, shape, first byte, end byte) of a safetensors file, checked in full: 8 bytes
    of header length (little-endian), a JSON header, the tensors without gap or overlap."""
    def unique(pairs: list[tuple]) -> dict:
        ensure(len(dict(pairs)) == len(pairs), f"{path} has a name twice in its header")
        return dict(pairs)

    entries = {}
    with blame(path), open(path, "rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        ensure(length <= min(size - 8, 10 ** 8), f"{path}, {size} bytes, has no header of {length}")
        header = json.loads(file.read(length), object_pairs_hook=unique)
        header.pop("__metadata__", None)
        end = begin = 8 + length
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            start, stop = (begin + offset for offset in entry["data_offsets"])
            ensure(all(type(n) is int and 0 <= n < 1 << 48 for n in (start, stop, *shape))
                   and start == end and stop - start == math.prod(shape) * dtype.itemsize,
                   f"{path} has an unsound entry {name!r} at byte {end - begin}: {entry}")
            entries[name], end = (dtype, shape, start, stop), stop
        ensure(end == size, f"{path} has {size:,} bytes, its tensors need {end:,}; fetch it again")
    return entries

def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index lists, or all."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    with blame(index):
        names = sorted(set(read_json(index)["weight_map"].values()))
        ensure(names == [*map(os.path.basename, names)], f"{index} has other than plain file names")
    return [folder / name for name in names]

def load_backbone(path_or_preset: str | Path, *, device: str | torch.device = "cpu",
                  dtype: torch.dtype | None = None) -> Backbone:
    """The frozen backbone of a checkpoint folder or preset, in eval mode. Headers and shapes are
    checked first; then every tensor goes from the mapped file to its place on the device, one at a
    time. dtype: bfloat16 on a GPU, else the file's. Raises InputError for files that do not fit."""
    folder = find_weights(path_or_preset)
    config, source = read_config(folder), {}
    for path in shard_paths(folder):
        for name, entry in read_header(path).items():
            ensure(name not in source, f"{path} repeats tensor {name!r} of another file")
            source[name] = (path, *entry)
    with torch.device("meta"):
        backbone = Backbone(config)
    shapes = {original_name(config.kind, n): list(p.shape) for n, p in backbone.named_parameters()}
    for name in sorted(shapes.keys() | source.keys()):
        want, (path, found, shape, *_) = shapes.get(name), source.get(name, (folder, None, None))
        ensure(shape == want, f"{path} has shape {shape} for tensor {name!r} where config.json has "
               f"{want}; fetch a folder whose config.json and weights belong together")
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else found)
    backbone = backbone.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for name, p in backbone.named_parameters():
        path, found, shape, start, stop = source[original_name(config.kind, name)]
        raw = np.memmap(path, np.uint8, mode="c", offset=start, shape=(stop - start,))
        p.copy_(torch.from_numpy(raw).view(found).view(shape))
    return backbone

def write_atomically(path: Path, write: Callable) -> None:
    """write(file) into a temporary file that then takes the name path: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(part, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)

def save_backbone(backbone: Backbone, folder: Path) -> None:
    """Write a tiny backbone as a checkpoint folder that load_backbone reads, in float32."""
    data = [(n, p.detach().float().cpu().numpy()) for n, p in backbone.named_parameters()]
    ends = np.cumsum([0] + [x.nbytes for _, x in data]).tolist()
    header = json.dumps({name: dict(dtype="F32", shape=x.shape, data_offsets=ends[i:i + 2])
                         for i, (name, x) in enumerate(data)}).encode()
    parts = [len(header).to_bytes(8, "little"), header, *(x.tobytes() for _, x in data)]
    config = json.dumps({"model_type": "tiny", **asdict(backbone.config)}).encode()
    write_atomically(folder / "model.safetensors", lambda file: file.writelines(parts))
    write_atomically(folder / "config.json", lambda file: file.write(config))

def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metastate"

def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")

def find_weights(path_or_preset: str | Path) -> Path:
    """The checkpoint folder: the one given, that in the Hugging Face cache, or our own download."""
    folder, (_, repo) = Path(path_or_preset), PRESETS.get(str(path_or_preset), (None, None))
    if repo is None:
        ensure(folder.is_dir(), f"{folder} is no folder and none of {', '.join(PRESETS)}; give "
               "one of these, or for tiny run first: python train.py")
        return folder
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cached = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    cached /= "models--" + repo.replace("/", "--")
    if (main := cached / "refs" / "main").is_file():
        snapshot = cached / "snapshots" / main.read_text().strip()
        shards = shard_paths(snapshot)
        if shards and all(path.exists() for path in [snapshot / "config.json", *shards]):
            return snapshot
    return download_repository(repo, cache_folder() / repo.replace("/", "--"))

def download(url: str, path: Path, size: int | None = None, sha256: str | None = None,
             tries: int = 5) -> None:
    """Fetch url into path by way of path.part, which another try or a later call goes on from.
    Raises InputError when refused, or when size or sha256 are still wrong after all tries."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, trouble = path.with_name(path.name + ".part"), ""
    for attempt in range(tries):
        time.sleep(attempt and 2 ** attempt)
        start = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        if os.environ.get("HF_TOKEN") and url.startswith(endpoint() + "/"):  # not for redirections
            request.add_unredirected_header("Authorization", f"Bearer {os.environ['HF_TOKEN']}")
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                start *= response.status == 206        # else the file comes from its beginning
                length = response.headers.get("Content-Length")
                total = size or (start + int(length) if length else None)
                bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=path.name)
                with bar, open(part, "ab" if start else "wb") as file:
                    while chunk := response.read(1 << 20):
                        file.write(chunk)
                        bar.update(len(chunk))
        except (OSError, http.client.HTTPException) as error:
            code, trouble, total = getattr(error, "code", 500), str(error), size or -1
            ensure(code in (416, 429) or code >= 500, f"{url} is refused ({error}); check the "
                   "address, and HF_TOKEN where one is needed")
            if code != 416 or not start:               # 416: part is all of the file, or too long
                continue
        found = part.stat().st_size
        with open(part, "rb") as file:
            if found == (total or found) and (
                    sha256 in (None, hashlib.file_digest(file, "sha256").hexdigest())):
                return os.replace(part, path)
        trouble = f"{found} bytes came, not {total} of sha256 {sha256}"
        if found >= (total or 0):
            part.unlink()
    raise InputError(f"{url} could not be fetched in {tries} tries ({trouble}); run again to go on")

def download_repository(repo: str, folder: Path) -> Path:
    """Fetch a model repository's config, weights and tokeniser into folder, at one revision."""
    if (folder / "complete").exists():
        return folder
    download(f"{endpoint()}/api/models/{repo}?blobs=true", folder / "listing")
    found = read_json(folder / "listing")
    with blame(endpoint(), "check HF_ENDPOINT, or give a folder of these files by --weights"):
        files = {f["rfilename"]: (f["size"], (f.get("lfs") or {}).get("sha256"))
                 for f in found["siblings"]
                 if re.fullmatch(r"\w[\w.-]*\.(json|safetensors|txt)", f["rfilename"])}
        revision, total = found["sha"], sum(size for size, _ in files.values())
    print(f"{repo}: {len(files)} files, {total / 1e9:.1f} GB, into {folder}", file=sys.stderr)
    for name, (size, sha256) in files.items():
        if not (folder / name).exists():
            download(f"{endpoint()}/{repo}/resolve/{revision}/{name}", folder / name, size, sha256)
    os.replace(folder / "listing", folder / "complete")
    return folder

# --------------------------------------------------------------------------------- tokeniser
PATTERNS = {
    "llada": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
             r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "dream": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
TEMPLATES = {                      # start, every message, where the assistant begins
    "llada": ("<|startoftext|>",
              "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
              "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "dream": ("", "<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n"),
    "tiny": ("", "{content}\nAnswer:", ""),
}
TINY_WORDS = ["The", " dial", " shows", ".", " Press", " press", " then", ",", " gives",
              "\nAnswer:", "\n####", " red", " blue", " gold", " green", " black", " white",
              " pink", " brown", *(f" {digit}" for digit in range(10))]      # besides the 256 bytes

class Tokenizer:
    """Text <-> ids around a tiktoken.Encoding, with the model's chat template."""

    def __init__(self, kind: str, encoding: tiktoken.Encoding, hidden: set[int], nfc: bool):
        self.kind, self.encoding, self.hidden, self.nfc = kind, encoding, hidden, nfc

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of text; no start token is added. special=False: control tokens are plain text."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        text = text.encode("utf-8", "replace").decode()          # lone surrogates have no bytes
        return self.encoding.encode(text, allowed_special="all" if special else set(),
                                    disallowed_special=())

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """Text of ids; ids without a token (padded embeddings) and broken bytes are U+FFFD."""
        def piece(i: int) -> bytes:
            try:
                return self.encoding.decode_single_token_bytes(i)
            except KeyError:
                return b"\xff"
        kept = (piece(i) for i in ids if not (skip_special and i in self.hidden))
        return b"".join(kept).decode("utf-8", "replace")

    def chat(self, messages: list[dict[str, str]], special: bool = False) -> list[int]:
        """Prompt ids of messages [{role, content}], ending where the assistant speaks. By default
        roles and contents are plain text: no user can write a control token."""
        start, turn, end = TEMPLATES[self.kind]
        if self.kind == "llada":
            messages = [m | {"content": m["content"].strip()} for m in messages]
        if self.kind == "dream" and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
        return [i for text, m in [(start, {}), *((turn, m) for m in messages), (end, {})]
                for part in re.split(r"(<\|\w+\|>)", text)
                for i in self.encode(part.format(**m), special or part.startswith("<|"))]

def tiny_tokenizer(words: list[str] = TINY_WORDS) -> Tokenizer:
    ranks = {bytes([i]): i for i in range(256)}
    for word in words:
        ranks.setdefault(word.encode(), len(ranks))
    special = {"<|mask|>": TINY.mask_id, "<|endoftext|>": TINY.eos_id}
    encoding = tiktoken.Encoding("tiny", pat_str="|".join(map(re.escape, words)) + r"|[\s\S]",
                                 mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer("tiny", encoding, set(special.values()), nfc=False)

def load_tokenizer(path_or_preset: str | Path) -> Tokenizer:
    """The tokeniser of a checkpoint folder (LLaDA: tokenizer.json; Dream: vocab.json, merges.txt,
    tokenizer_config.json) or preset. Raises InputError for files of another form."""
    kind = str(path_or_preset)
    if kind != "tiny":
        kind = read_config(folder := find_weights(path_or_preset)).kind
    if kind == "tiny":
        return tiny_tokenizer()
    # GPT-2's printable names of the 256 bytes: those without one of their own follow from U+0100
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(256 + n): b for n, b in enumerate(sorted(set(range(256)) - set(shown)))}
    byte_of |= {chr(b): b for b in shown}
    with blame(f"the {kind} tokeniser in {folder}", "fetch its files again"):
        if kind == "llada":
            found = read_json(folder / "tokenizer.json")
            vocab, merges = found["model"]["vocab"], found["model"]["merges"]
            split = found["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            normalizer = found["normalizer"] and found["normalizer"]["type"]
            added = {t["content"]: (t["id"], t["special"]) for t in found["added_tokens"]}
        else:
            split, normalizer, vocab = PATTERNS[kind], "NFC", read_json(folder / "vocab.json")
            merges = (folder / "merges.txt").read_text("utf-8").removesuffix("\n").split("\n")
            merges = merges[merges[0].startswith("#version"):]
            table = read_json(folder / "tokenizer_config.json")["added_tokens_decoder"]
            added = {t["content"]: (int(i), t["special"]) for i, t in table.items()}
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        ranks = {bytes(byte_of[char] for char in token): i for token, i in vocab.items()
                 if i < 256 + len(merges)}
        if split != PATTERNS[kind] or normalizer not in (None, "NFC") or (
                sorted(ranks.values()) != [*range(len(ranks))]) or (
                [vocab["".join(merge)] for merge in merges] != [*range(256, len(ranks))]):
            raise ValueError(f"no byte-level BPE with id = 256 + merge rank, split {split!r}, "
                             f"normalizer {normalizer!r}")
        encoding = tiktoken.Encoding(kind, pat_str=split, mergeable_ranks=ranks,
                                     special_tokens={text: i for text, (i, _) in added.items()})
    return Tokenizer(kind, encoding, {i for i, hide in added.values() if hide}, normalizer == "NFC")
