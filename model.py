"""The backbone as it comes off the shelf: architecture, released weights, tokeniser.

One bidirectional pre-norm transformer, of which the tiny default, LLaDA-8B (arXiv 2502.09992) and
Dream-7B (arXiv 2508.15487) are configurations. A pass is four plain calls, so that a memory can
stand between any two layers without hooks:

    h, context = backbone.embed(ids, attention_mask)    # (B, T) -> (B, T, D)
    h = backbone.run(h, context, 0, n_layer)            # any range of layers
    h = backbone.pick(h, wanted)                        # (N, D), aligned with the tokens it scores
    logits = backbone.head(h)                           # (N, V)

The order of casts is part of each model: bf16 logits equal those of the original classes.
Read down to the line WEIGHTS first; the rest is files and names.
"""
import hashlib
import http.client
import json
import math
import os
import re
import shutil
import socket
import sys
import time
import unicodedata
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:
    import fcntl
except ImportError:                # Windows has no such locks
    fcntl = None


class InputError(Exception):
    """Bad input, in one sentence: what was found, what was expected, what to do."""


def ensure(condition: object, message: str) -> None:
    if not condition:
        raise InputError(message)


@contextmanager
def blame(source: object, advice: str) -> Iterator[None]:
    """Whatever fails inside is the fault of source, a file for example: an InputError says so."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"no {reason}"
        first_sentence = re.split(r"\.\s|\n", reason)[0]
        raise InputError(f"{source} cannot be used ({first_sentence}); {advice}")


# -------------------------------------------------------------------------------- ARCHITECTURE

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
    eot_id: int | None = None      # end of a chat turn; config.json does not name it


LLADA = Config("llada", vocab_size=126464, n_layer=32, n_head=32, n_kv_head=32, d_model=4096,
               d_ff=12288, norm_eps=1e-5, rope_theta=500000.0, rope_fp32=True, qkv_bias=False,
               shift=False, mask_id=126336, eos_id=126081, pad_id=126081, eot_id=126348)
DREAM = Config("dream", vocab_size=152064, n_layer=28, n_head=28, n_kv_head=4, d_model=3584,
               d_ff=18944, norm_eps=1e-6, rope_theta=1000000.0, rope_fp32=False, qkv_bias=True,
               shift=True, mask_id=151666, eos_id=151643, pad_id=151643, eot_id=151645)
TINY = Config("tiny", vocab_size=304, n_layer=1, n_head=4, n_kv_head=4, d_model=64,
              d_ff=192, norm_eps=1e-5, rope_theta=100.0, rope_fp32=True, qkv_bias=False,
              shift=False, mask_id=302, eos_id=303, pad_id=303)


class Preset(NamedTuple):
    config: Config
    repository: str | None         # on huggingface.co


PRESETS = {
    "tiny": Preset(TINY, None),
    "llada-base": Preset(LLADA, "GSAI-ML/LLaDA-8B-Base"),
    "llada": Preset(LLADA, "GSAI-ML/LLaDA-8B-Instruct"),
    "llada-1.5": Preset(LLADA, "GSAI-ML/LLaDA-1.5"),
    "dream-base": Preset(DREAM, "Dream-org/Dream-v0-Base-7B"),
    "dream": Preset(DREAM, "Dream-org/Dream-v0-Instruct-7B"),
}


class AttentionContext(NamedTuple):
    """What the attention of every layer shares."""
    cos: Tensor                    # (1 or B, 1, T, head_dim)
    sin: Tensor                    # (1 or B, 1, T, head_dim)
    key_mask: Tensor | None        # (B, 1, 1, T) bool, False at padding


class RMSNorm(nn.Module):
    """Statistics in float32, cast back (both within F.rms_norm), then the weight: the order of both
    originals."""

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


def rotary_tables(position: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, float32. position: (1 or B, T)."""
    exponent = torch.arange(0, head_dim, 2, device=position.device).float() / head_dim
    frequency = 1.0 / theta ** exponent                            # (head_dim / 2,)
    angle = position[:, None, :, None].float() * frequency         # (B, 1, T, head_dim / 2)
    angle = torch.cat((angle, angle), dim=-1)                      # (B, 1, T, head_dim)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding by +theta, in the dtype of the tables. x: (B, H, T, head_dim)."""
    y = x.to(cos.dtype)
    first, second = y.chunk(2, dim=-1)                             # each (B, H, T, head_dim / 2)
    turned = torch.cat((-second, first), dim=-1)                   # (B, H, T, head_dim)
    return (y * cos + turned * sin).to(x.dtype)


class Layer(nn.Module):
    """Attention and SwiGLU, each behind a norm and added to the residual stream."""

    def __init__(self, c: Config):
        super().__init__()
        D = c.d_model
        self.head_dim = D // c.n_head
        self.grouped = c.n_kv_head != c.n_head         # several heads share one key and value
        d_kv = c.n_kv_head * self.head_dim
        self.attn_norm = RMSNorm(D, c.norm_eps)
        self.q = nn.Linear(D, D, bias=c.qkv_bias)
        self.k = nn.Linear(D, d_kv, bias=c.qkv_bias)
        self.v = nn.Linear(D, d_kv, bias=c.qkv_bias)
        self.out = nn.Linear(D, D, bias=False)
        self.mlp_norm = RMSNorm(D, c.norm_eps)
        self.gate = nn.Linear(D, c.d_ff, bias=False)
        self.up = nn.Linear(D, c.d_ff, bias=False)
        self.down = nn.Linear(c.d_ff, D, bias=False)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)    # (B, heads, T, head_dim)

    def forward(self, h: Tensor, context: AttentionContext) -> Tensor:
        cos, sin, key_mask = context
        x = self.attn_norm(h)                                          # (B, T, D)
        q = rotate(self.split_heads(self.q(x)), cos, sin)              # (B, n_head, T, head_dim)
        k = rotate(self.split_heads(self.k(x)), cos, sin)              # (B, n_kv_head, T, head_dim)
        v = self.split_heads(self.v(x))                                # as k
        y = F.scaled_dot_product_attention(q, k, v, key_mask, enable_gqa=self.grouped)     # as q
        h = h + self.out(y.transpose(1, 2).flatten(2))                 # (B, T, D)
        x = self.mlp_norm(h)
        x = F.silu(self.gate(x)) * self.up(x)                          # (B, T, d_ff)
        return h + self.down(x)                                        # (B, T, D)


def recomputed(function: Callable, *inputs: Any, enabled: bool) -> Any:
    """function(*inputs). Enabled, its activations are not kept: the backward pass makes them
    again."""
    if not (enabled and torch.is_grad_enabled()):
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Backbone(nn.Module):
    """Masked-diffusion transformer: token ids to logits, every position sees every other."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.recompute = False         # True: trade time for memory in training, layer by layer
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.1)

    def embed(self, ids: Tensor, attention_mask: Tensor | None = None
              ) -> tuple[Tensor, AttentionContext]:
        """ids (B, T), attention_mask (B, T) with 0 at padding -> h (B, T, D) and what all layers
        share. Dream counts positions from the first real token, LLaDA from the first column."""
        c = self.config
        h = self.embedding(ids)                                        # (B, T, D)
        position = torch.arange(ids.shape[1], device=ids.device)[None]     # (1, T)
        key_mask = None
        if attention_mask is not None:
            key_mask = attention_mask.bool()[:, None, None, :]         # (B, 1, 1, T)
            if c.kind == "dream":
                position = attention_mask.long().cumsum(1) - 1         # (B, T)
        cos, sin = rotary_tables(position, c.d_model // c.n_head, c.rope_theta)
        dtype = torch.float32 if c.rope_fp32 else h.dtype
        return h, AttentionContext(cos.to(dtype), sin.to(dtype), key_mask)

    def run(self, h: Tensor, context: AttentionContext, start: int, stop: int) -> Tensor:
        """Layers start..stop-1 on the residual stream h (B, T, D)."""
        for layer in self.layers[start:stop]:
            h = recomputed(layer, h, context, enabled=self.recompute)
        return h

    def pick(self, h: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Align h (B, T, D) with the tokens it scores, then keep the wanted positions, a bool
        (B, T): (N, D), or (B, T, D) without."""
        if self.config.shift:
            h = torch.cat((h[:, :1], h[:, :-1]), dim=1)                # (B, T, D)
        return h if wanted is None else h[wanted]

    def head(self, h: Tensor) -> Tensor:
        """Picked h (..., D) -> logits (..., V)."""
        return self.lm_head(self.norm(h))

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None,
                wanted: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), or (N, V) where wanted; logits[:, i] scores token i, for Dream too."""
        h, context = self.embed(ids, attention_mask)
        h = self.run(h, context, 0, len(self.layers))
        return self.head(self.pick(h, wanted))

    def compile_layers(self) -> None:
        """torch.compile, layer by layer: one graph serves them all, the memory stays between."""
        for layer in self.layers:
            layer.compile()

    def digest(self) -> str:
        """What tells this backbone from another: a hash of its config and of the first row of
        every weight, rounded to bfloat16, so that neither device nor dtype matters."""
        sha = hashlib.sha256(repr(self.config).encode())
        for p in self.parameters():
            first_row = p[:1].detach().to(torch.bfloat16).float().cpu()
            sha.update(first_row.numpy().tobytes())
        return sha.hexdigest()[:16]


# ------------------------------------------------------------------------------------- WEIGHTS
# A checkpoint folder holds config.json, *.safetensors (with or without an index) and the
# tokeniser's files. Our names and theirs, to be found with grep:

CONFIG_KEYS = {
    "llada": {
        "vocab_size": "embedding_size",
        "n_layer": "n_layers",
        "n_head": "n_heads",
        "n_kv_head": "n_kv_heads",
        "d_model": "d_model",
        "d_ff": "mlp_hidden_size",
        "norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "rope_fp32": "rope_full_precision",
        "qkv_bias": "include_qkv_bias",
        "mask_id": "mask_token_id",
        "eos_id": "eos_token_id",
        "pad_id": "pad_token_id",
    },
    "dream": {
        "vocab_size": "vocab_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "d_model": "hidden_size",
        "d_ff": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "mask_id": "mask_token_id",
        "eos_id": "eos_token_id",
        "pad_id": "pad_token_id",
    },
}
CONFIG_FIXED = {                   # under other settings theirs is not the architecture above
    "llada": {
        "block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms",
        "rope": True, "alibi": False, "include_bias": False, "attention_layer_norm": False,
        "weight_tying": False, "scale_logits": False, "input_emb_norm": False,
    },
    "dream": {
        "hidden_act": "silu", "tie_word_embeddings": False, "rope_scaling": None,
        "use_sliding_window": False, "use_mrope": False,
    },
}
MODULE_NAMES = {                   # with .weight or .bias at the end on both sides
    "llada": {
        "embedding": "model.transformer.wte",
        "norm": "model.transformer.ln_f",
        "lm_head": "model.transformer.ff_out",                 # ff_out is two things: this
        "layers.{}.attn_norm": "model.transformer.blocks.{}.attn_norm",
        "layers.{}.q": "model.transformer.blocks.{}.q_proj",
        "layers.{}.k": "model.transformer.blocks.{}.k_proj",
        "layers.{}.v": "model.transformer.blocks.{}.v_proj",
        "layers.{}.out": "model.transformer.blocks.{}.attn_out",
        "layers.{}.mlp_norm": "model.transformer.blocks.{}.ff_norm",
        "layers.{}.gate": "model.transformer.blocks.{}.ff_proj",
        "layers.{}.up": "model.transformer.blocks.{}.up_proj",
        "layers.{}.down": "model.transformer.blocks.{}.ff_out",        # and this
    },
    "dream": {
        "embedding": "model.embed_tokens",
        "norm": "model.norm",
        "lm_head": "lm_head",
        "layers.{}.attn_norm": "model.layers.{}.input_layernorm",
        "layers.{}.q": "model.layers.{}.self_attn.q_proj",
        "layers.{}.k": "model.layers.{}.self_attn.k_proj",
        "layers.{}.v": "model.layers.{}.self_attn.v_proj",
        "layers.{}.out": "model.layers.{}.self_attn.o_proj",
        "layers.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
        "layers.{}.gate": "model.layers.{}.mlp.gate_proj",
        "layers.{}.up": "model.layers.{}.mlp.up_proj",
        "layers.{}.down": "model.layers.{}.mlp.down_proj",
    },
}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FETCH_AGAIN = "fetch it again"


def original_name(kind: str, name: str) -> str:
    """The name in a released checkpoint of our parameter, layers.0.q.weight for example."""
    if kind == "tiny":
        return name
    module, suffix = name.rsplit(".", 1)
    numbers = re.findall(r"\d+", module)
    pattern = re.sub(r"\d+", "{}", module)
    return MODULE_NAMES[kind][pattern].format(*numbers) + "." + suffix


def read_json(path: Path) -> dict:
    with blame(path, FETCH_AGAIN):
        value = json.loads(path.read_bytes())
    ensure(isinstance(value, dict), f"{path} holds no JSON object; {FETCH_AGAIN}")
    return value


def check_config(config: Any) -> None:
    """Every field of a dataclass that came from a file must be of its type, and every number of a
    sane size. Raises ValueError."""
    for field in fields(config):
        value = getattr(config, field.name)
        expected = int | float if field.type is float else field.type      # JSON may say 5 for 5.0
        sound = isinstance(value, expected)
        if isinstance(value, bool):        # Python counts it among the ints
            sound = field.type is bool
        elif isinstance(value, int | float):
            sound = sound and 0 <= value < 2 ** 31                         # nan is neither
        if not sound:
            raise ValueError(f"{field.name} = {value!r} is no sound value")


def read_config(folder: Path) -> Config:
    """The architecture that a folder's config.json describes. Raises InputError."""
    path = folder / "config.json"
    entries = read_json(path)
    kind = str(entries.pop("model_type", None)).lower()
    ensure(kind in ("tiny", *CONFIG_KEYS), f"{path} has model_type {kind!r}; give a folder of "
           "LLaDA, Dream or a tiny run")
    for key, want in CONFIG_FIXED.get(kind, {}).items():
        ensure(entries.get(key, want) == want, f"{path} sets {key}; only {want!r} is implemented")
    with blame(path, FETCH_AGAIN):
        if kind == "tiny":
            c = Config(**entries)
        else:
            if entries.get("embedding_size") is None:
                entries["embedding_size"] = entries["vocab_size"]
            values = {ours: entries[theirs] for ours, theirs in CONFIG_KEYS[kind].items()}
            c = replace(LLADA if kind == "llada" else DREAM, **values)
        check_config(c)
        sizes = (c.vocab_size, c.n_layer, c.n_head, c.n_kv_head, c.d_model, c.d_ff)
        positive = min(*sizes, c.norm_eps, c.rope_theta) > 0           # before they divide
        heads_fit = positive and c.d_model % (2 * c.n_head) == 0 and c.n_head % c.n_kv_head == 0
        ids_fit = max(c.mask_id, c.eos_id, c.pad_id) < c.vocab_size
        if not (heads_fit and ids_fit and c.kind == kind):
            raise ValueError(f"its values do not fit together, {c}")
    return c


def unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object; json.loads alone would take the last of two entries of one name."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return entries


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, mapped into memory and not read yet.

    The file: 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape,
    data_offsets}}, the tensors without gap or overlap. Raises InputError for anything else.
    """
    with blame(path, FETCH_AGAIN):
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:      # of exabytes perhaps
                raise ValueError(f"{size:,} bytes hold no header of {length:,}")
            header = json.loads(file.read(length), object_pairs_hook=unique_keys)
        header.pop("__metadata__", None)
        data = np.memmap(path, np.uint8, mode="c", offset=8 + length)
        tensors = {}
        end = 0                        # of the bytes that are accounted for
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            start, stop = entry["data_offsets"]
            # the product as a float: text is refused, and hostile sizes cannot grow for hours
            n_bytes = math.prod(shape, start=float(dtype.itemsize))
            whole_numbers = all(type(n) is int for n in (start, stop, *shape))
            if not whole_numbers or start != end or stop - start != n_bytes:
                raise ValueError(f"tensor {name!r} has an unsound entry")
            if stop > len(data):
                raise ValueError(f"its {size:,} bytes end within tensor {name!r}")
            tensors[name] = torch.from_numpy(data[start:stop]).view(dtype).view(shape)
            end = stop
        if end != len(data):
            raise ValueError(f"{len(data):,} bytes follow its header, which describes {end:,}")
    return tensors


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index lists, or all."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    with blame(index, FETCH_AGAIN):
        names = set(read_json(index)["weight_map"].values())
        if any(os.path.basename(name) != name for name in names):
            raise ValueError("it has other than plain file names")
    return [folder / name for name in sorted(names)]


def load_backbone(path_or_preset: str | Path, *, device: str | torch.device = "cpu",
                  dtype: torch.dtype | None = None) -> Backbone:
    """The frozen backbone of a checkpoint folder or preset, in eval mode. Headers and shapes are
    checked first; then every tensor goes from the mapped file to its place on the device, one at a
    time. dtype: by default the file's, which is bfloat16 for the released ones. Raises InputError
    for files that do not fit."""
    folder = find_weights(path_or_preset)
    config = read_config(folder)
    tensors: dict[str, Tensor] = {}
    for path in shard_paths(folder):
        for name, tensor in read_safetensors(path).items():
            ensure(name not in tensors, f"{path} repeats tensor {name!r} of another file")
            tensors[name] = tensor
    ensure(config.n_layer <= len(tensors), f"{folder} has {len(tensors)} tensors, too few for the "
           f"{config.n_layer} layers of its config.json; {FETCH_AGAIN}")

    with blame(folder / "config.json", FETCH_AGAIN), torch.device("meta"):
        backbone = Backbone(config)    # shapes without memory
    names = [original_name(config.kind, name) for name, _ in backbone.named_parameters()]
    expected = {name: list(p.shape) for name, p in zip(names, backbone.parameters())}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected | shapes):
        ensure(shapes.get(name) == expected.get(name), f"{folder} has shape {shapes.get(name)} for "
               f"tensor {name!r} where config.json has {expected.get(name)}; fetch a folder whose "
               "config.json and weights belong together")

    dtype = dtype or next(iter(tensors.values())).dtype
    backbone = backbone.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    places = dict(zip(names, backbone.parameters()))
    for name in list(tensors):         # file by file: one leaves our memory before the next comes
        places[name].copy_(tensors.pop(name))
    return backbone


def save_backbone(backbone: Backbone, folder: Path, words: list[str]) -> None:
    """Write a tiny backbone and the words of its tokeniser as a checkpoint folder, in float32."""
    header = {}
    content = b""
    for name, p in backbone.named_parameters():
        data = p.detach().float().cpu().numpy().tobytes()
        offsets = [len(content), len(content) + len(data)]
        header[name] = {"dtype": "F32", "shape": list(p.shape), "data_offsets": offsets}
        content += data
    text = json.dumps(header).encode()
    config = {"model_type": "tiny", **asdict(backbone.config)}
    files = {
        "model.safetensors": len(text).to_bytes(8, "little") + text + content,
        "tokenizer.json": json.dumps({"words": words}).encode(),
        "config.json": json.dumps(config).encode(),
    }
    for name, data in files.items():
        write_atomically(folder / name, data)


# --------------------------------------------------------------------------------------- FILES

WRITABLE = "give a path that can be written"


def temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def check_output(path: Path) -> None:
    """Raise InputError where a file could not be written: before hours of work, not after. Only a
    plain file is ever replaced, no folder, link or device."""
    with blame(path, WRITABLE):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError("it is there and no plain file")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary(path).touch()
        temporary(path).unlink()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises InputError where that fails."""
    check_output(path)
    part = temporary(path)
    with blame(path, WRITABLE):
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: bool, message: str) -> Iterator[None]:
    """The block for one process of this machine at a time. The lock dies with its process. Where
    another holds it: wait, or raise InputError with the message."""
    with blame(path, "give a folder that can be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")
    with file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                ensure(wait, message)
                print(message, file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetched(path: Path, fetch: Callable[[Path], None]) -> Path:
    """path, which fetch(path) makes where it is not there: once, by one process of the machine."""
    if not path.exists():
        with locked(path.with_name("lock"), wait=True,
                    message=f"waiting: another process fetches {path.parent}"):
            if not path.exists():      # made while we waited
                fetch(path)
    return path


def cache_folder() -> Path:
    with blame("the home folder", "set XDG_CACHE_HOME to a folder for downloads"):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metastate"


def retry(what: str, attempt: Callable[[], Any]) -> Any:
    """attempt(), again after what may pass soon: 429, a server's error, a broken transfer. Raises
    InputError at once where there is no connection or the server refuses, else after the last."""
    for pause in (2, 8, 30, 60, None):                 # seconds
        try:
            return attempt()
        except urllib.error.HTTPError as error:
            trouble = f"{error.code} {error.reason}"
            ensure(error.code == 429 or error.code >= 500, f"{what} is refused ({trouble}); check "
                   "the address, and HF_TOKEN where one is needed")
            asked = error.headers.get("Retry-After", "")
            if pause and asked.isdecimal():            # it may be a date, too
                pause = min(int(asked), 600)
        except urllib.error.URLError as error:
            raise InputError(f"{what} cannot be reached ({error.reason}); check the connection")
        except Exception as error:                     # cut short, or of another hash
            trouble = str(error) or type(error).__name__
        ensure(pause is not None, f"{what} could not be fetched ({trouble}); run again to go on")
        print(f"{what}: {trouble}; again in {pause} s", file=sys.stderr)
        time.sleep(pause)


def fetch_json(url: str) -> tuple[Any, http.client.HTTPMessage]:
    """The JSON value at url, and the headers that came with it. Sends HF_TOKEN when it is set."""
    with blame(url, "check HF_ENDPOINT and HF_DATASETS_SERVER"):
        request = urllib.request.Request(url)
    token = os.environ.get("HF_TOKEN")
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")

    def attempt() -> tuple[Any, http.client.HTTPMessage]:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read()), response.headers

    return retry(url.split("?")[0], attempt)


def download(url: str, path: Path, sha256: str | None = None, git_blob: str | None = None) -> None:
    """Fetch url into path, whole or not at all, checked by its sha256 or its git blob id."""
    part = path.with_name(path.name + ".part")         # not checked yet
    socket.setdefaulttimeout(60)                       # torch.hub waits for ever otherwise

    def attempt() -> None:
        torch.hub.download_url_to_file(url, str(part), hash_prefix=sha256)
        if git_blob:
            data = part.read_bytes()
            found = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if found != git_blob:
                raise ValueError(f"{len(data)} bytes came with another hash")
        os.replace(part, path)

    with blame(path.parent, "give a folder that can be written by XDG_CACHE_HOME"):
        path.parent.mkdir(parents=True, exist_ok=True)
    retry(url, attempt)


def find_weights(path_or_preset: str | Path) -> Path:
    """The checkpoint folder: the one given, that in the Hugging Face cache, or our own download.
    Raises InputError where there is none and none can be fetched."""
    preset = PRESETS.get(str(path_or_preset))
    if preset is None or preset.repository is None:
        folder = Path(path_or_preset)
        ensure(folder.is_dir(), f"there is no folder {folder}; give one, or one of "
               f"{', '.join(PRESETS)} (tiny: made by python train.py)")
        return folder

    name = preset.repository.replace("/", "--")
    home = Path(os.environ.get("HF_HOME") or cache_folder().parent / "huggingface")
    cached = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name}"
    revision = cached / "refs" / "main"
    if revision.is_file():
        snapshot = cached / "snapshots" / revision.read_text().strip()
        shards = shard_paths(snapshot)
        if shards and all(path.exists() for path in [snapshot / "config.json", *shards]):
            return snapshot

    try:
        complete = fetched(cache_folder() / name / "complete",
                           lambda path: download_repository(preset.repository, path.parent))
    except InputError as error:
        raise InputError(f"the weights of {path_or_preset} could not be fetched: {error}; give a "
                         "folder that holds them by --weights")
    return complete.parent


def download_repository(repository: str, folder: Path) -> None:
    """Fetch a model's config, weights and tokeniser into folder, file by file, at one revision.
    What is there already is not fetched again; the file "complete" comes last."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    listing, _ = fetch_json(f"{hub}/api/models/{repository}?blobs=true")
    with blame(f"the list of files of {repository}", "check HF_ENDPOINT"):
        revision = listing["sha"]
        files = [file for file in listing["siblings"]
                 if re.fullmatch(r"\w[\w.-]*\.(json|safetensors|txt)", file["rfilename"])]
        missing = [file for file in files if not (folder / file["rfilename"]).exists()]
        total = sum(file["size"] for file in missing)
        # of a large file the hub knows the sha256, of others git's own hash
        hashes = [{"sha256": file["lfs"]["sha256"]} if file.get("lfs")
                  else {"git_blob": file["blobId"]} for file in missing]
    free = shutil.disk_usage(folder).free
    ensure(free > total, f"{folder} has {free / 1e9:.1f} GB free where {total / 1e9:.1f} are needed"
           "; make room, or set XDG_CACHE_HOME")
    print(f"{repository}: {len(missing)} files, {total / 1e9:.1f} GB, into {folder}",
          file=sys.stderr)
    for file, known_hash in zip(missing, hashes):
        url = f"{hub}/{repository}/resolve/{revision}/{file['rfilename']}"
        download(url, folder / file["rfilename"], **known_hash)
    (folder / "complete").write_text(revision)


# ----------------------------------------------------------------------------------- TOKENISER

PATTERNS = {
    "llada": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
             r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "dream": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


class Template(NamedTuple):
    """A chat: its beginning, every message, and where the assistant begins to speak."""
    start: str
    message: str
    answer: str


TEMPLATES = {
    "llada": Template("<|startoftext|>",
                      "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
                      "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "dream": Template("", "<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n"),
    "tiny": Template("", "{content}\nAnswer:", ""),
}


class Tokenizer:
    """Text <-> ids around a tiktoken.Encoding, with the model's chat template."""

    def __init__(self, kind: str, encoding: tiktoken.Encoding, hidden: set[int], nfc: bool):
        self.kind = kind
        self.encoding = encoding
        self.hidden = hidden           # control tokens, which a reader does not want to see
        self.nfc = nfc                 # normalise text first

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of text; no start token is added. special=False: control tokens are plain text."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        allowed = "all" if special else set()
        return self.encoding.encode(text, allowed_special=allowed, disallowed_special=())

    def token_bytes(self, i: int) -> bytes:
        """The bytes of one token; an id without a token (padded embeddings) has a broken one."""
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:
            return b"\xff"

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """Text of ids; broken bytes are U+FFFD."""
        hidden = self.hidden if skip_special else set()
        pieces = [self.token_bytes(i) for i in ids if i not in hidden]
        return b"".join(pieces).decode("utf-8", "replace")

    def chat(self, messages: list[dict[str, str]], special: bool = False) -> list[int]:
        """Prompt ids of messages [{role, content}], ending where the assistant speaks. By default
        roles and contents are plain text: no user can write a control token."""
        template = TEMPLATES[self.kind]
        if self.kind == "llada":
            messages = [m | {"content": m["content"].strip()} for m in messages]
        if self.kind == "dream" and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
        ids = self.encode(template.start)
        for message in messages:
            for part in re.split(r"(<\|\w+\|>)", template.message):
                is_control = part.startswith("<|")
                ids += self.encode(part.format(**message), special or is_control)
        return ids + self.encode(template.answer)


def tiny_tokenizer(words: list[str]) -> Tokenizer:
    """The tokeniser of a tiny backbone: 256 bytes, and these words as one token each. Raises
    ValueError for more words than it has ids."""
    ranks = {bytes([i]): i for i in range(256)}
    for word in words:
        ranks.setdefault(word.encode(), len(ranks))
    special = {"<|mask|>": TINY.mask_id, "<|endoftext|>": TINY.eos_id}
    if len(ranks) > TINY.mask_id:
        raise ValueError(f"{len(words)} words are too many for a tiny backbone")
    pattern = "|".join([*map(re.escape, words), r"[\s\S]"])
    encoding = tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens=special)
    return Tokenizer("tiny", encoding, set(special.values()), nfc=False)


def bytes_of_characters() -> dict[str, int]:
    """GPT-2's printable names of the 256 bytes: those without one of their own follow U+0100."""
    shown = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(others)}


def byte_pair_tokenizer(kind: str, vocab: dict[str, int], merges: list, added: list[dict],
                        nfc: bool) -> Tokenizer:
    """tiktoken's form of a byte-level BPE such as LLaDA's and Dream's: ids 0 to 255 are the bytes,
    256 + n is merge n. merges: "a b" or ["a", "b"]; added, tokens that are found before any merge:
    {content, id, special}. Raises ValueError for a BPE of another form."""
    byte_of = bytes_of_characters()
    merged = ["".join(merge).replace(" ", "") for merge in merges]
    token_of = {i: token for token, i in vocab.items()}
    tokens = [token_of.get(i) for i in range(256 + len(merged))]
    if set(tokens[:256]) != byte_of.keys() or tokens[256:] != merged:
        raise ValueError("it is no byte-level BPE with id = 256 + merge rank")
    ranks = {bytes(byte_of[character] for character in token): i for i, token in enumerate(tokens)}
    special = {token["content"]: token["id"] for token in added}
    hidden = {token["id"] for token in added if token["special"]}
    encoding = tiktoken.Encoding(kind, pat_str=PATTERNS[kind], mergeable_ranks=ranks,
                                 special_tokens=special)
    return Tokenizer(kind, encoding, hidden, nfc)


def read_llada_tokenizer(folder: Path) -> Tokenizer:
    found = read_json(folder / "tokenizer.json")
    normalizer = found["normalizer"]
    split = found["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    if split != PATTERNS["llada"] or normalizer not in (None, {"type": "NFC"}):
        raise ValueError(f"split {split!r} or normalizer {normalizer!r} is not the released one")
    model = found["model"]
    return byte_pair_tokenizer("llada", model["vocab"], model["merges"], found["added_tokens"],
                               nfc=normalizer is not None)


def read_dream_tokenizer(folder: Path) -> Tokenizer:
    lines = (folder / "merges.txt").read_text("utf-8").splitlines()
    merges = [line for line in lines if not line.startswith("#version")]
    decoder = read_json(folder / "tokenizer_config.json")["added_tokens_decoder"]
    added = [{**token, "id": int(i)} for i, token in decoder.items()]
    return byte_pair_tokenizer("dream", read_json(folder / "vocab.json"), merges, added, nfc=True)


def load_tokenizer(path_or_preset: str | Path) -> Tokenizer:
    """The tokeniser of a checkpoint folder or preset. LLaDA and tiny: tokenizer.json; Dream:
    vocab.json, merges.txt, tokenizer_config.json. Raises InputError for files of another form."""
    folder = find_weights(path_or_preset)
    config = read_config(folder)
    with blame(f"the {config.kind} tokeniser in {folder}", "fetch its files again"):
        if config.kind == "llada":
            tokenizer = read_llada_tokenizer(folder)
        elif config.kind == "dream":
            tokenizer = read_dream_tokenizer(folder)
        else:
            tokenizer = tiny_tokenizer(read_json(folder / "tokenizer.json")["words"])
        highest = tokenizer.encoding.max_token_value
        if highest >= config.vocab_size:
            raise ValueError(f"it has token {highest} where the embedding has {config.vocab_size}")
    return tokenizer
