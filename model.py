"""The backbone as it comes off the shelf: architecture, released weights, tokeniser.

One bidirectional pre-norm transformer, of which the tiny default, LLaDA-8B (arXiv 2502.09992) and
Dream-7B (arXiv 2508.15487) are configurations. One context for a canvas, and then four plain calls
for every pass over it, so that a memory can stand between them without hooks:

    context = backbone.context(ids, attention_mask)     # positions and padding
    h = backbone.embed(ids)                             # (B, T) -> (B, T, D)
    h = backbone.run(h, context)                        # all layers, (B, T, D)
    h = backbone.pick(h, wanted)                        # (N, D), aligned with the tokens it scores
    logits = backbone.head(h)                           # (N, V)

The order of casts is part of each model: bf16 logits equal those of the original classes.
Read down to the line BAD INPUT first; the rest is files and names.
"""
import hashlib
import json
import os
import re
import shutil
import sys
import time
import unicodedata
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple
from urllib.request import urlopen

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# -------------------------------------------------------------------------------- ARCHITECTURE


@dataclass(frozen=True)
class Config:
    kind: str                      # tiny, llada or dream: tensor names, chat template, sampler,
                                   # and where positions begin in a padded row
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
# ids: 256 bytes, up to 46 words, mask, end-of-text
TINY = Config("tiny", vocab_size=304, n_layer=1, n_head=4, n_kv_head=4, d_model=64,
              d_ff=192, norm_eps=1e-5, rope_theta=100.0, rope_fp32=True, qkv_bias=False,
              shift=False, mask_id=302, eos_id=303, pad_id=303)


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
    """cos and sin of every position's angles, float32. position: (1 or B, T). theta: the base, by
    whose powers the frequencies fall."""
    exponent = torch.arange(0, head_dim, 2, device=position.device).float() / head_dim
    frequency = 1.0 / theta ** exponent                            # (head_dim / 2,)
    angle = position[:, None, :, None].float() * frequency         # (B, 1, T, head_dim / 2)
    angle = torch.cat((angle, angle), dim=-1)                      # (B, 1, T, head_dim)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding by +angle, in the dtype of the tables. x: (B, H, T, head_dim)."""
    y = x.to(cos.dtype)
    first, second = y.chunk(2, dim=-1)                             # each (B, H, T, head_dim / 2)
    turned = torch.cat((-second, first), dim=-1)                   # (B, H, T, head_dim)
    return (y * cos + turned * sin).to(x.dtype)


class Context(NamedTuple):
    """What the attention of every layer shares, for any number of passes over one canvas.

    With a cache a pass may run only some columns of the canvas (see at); these attend to all of it
    through the keys and values kept from the last pass over the whole (Fast-dLLM's dual cache,
    arXiv 2505.22618).
    """
    cos: Tensor                    # (1 or B, 1, T, head_dim)
    sin: Tensor                    # (1 or B, 1, T, head_dim)
    key_mask: Tensor | None        # (B, 1, 1, T) bool, False at padding
    cache: list[list[Tensor]] | None = None    # of every layer, keys and values (B, n_kv_head, T,
                                   # head_dim); [] until the first pass over the whole canvas
    columns: slice | None = None   # what this pass runs; None: the whole canvas

    def at(self, columns: slice) -> "Context":
        """The context of a pass over these columns; its keys are still the whole canvas's."""
        return self._replace(cos=self.cos[:, :, columns], sin=self.sin[:, :, columns],
                             columns=columns)

    def store(self, kept: list[Tensor], k: Tensor, v: Tensor) -> list[Tensor]:
        """Put this pass's keys and values into a layer's entry of the cache; returns them all."""
        if self.columns is None:
            kept[:] = k, v
        else:
            for old, new in zip(kept, (k, v)):
                old[:, :, self.columns] = new
        return kept


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

    def forward(self, h: Tensor, context: Context, kept: list[Tensor] | None = None) -> Tensor:
        # kept: this layer's entry of context.cache, which is changed in place
        cos, sin = context.cos, context.sin
        x = self.attn_norm(h)                                          # (B, T, D)
        q = rotate(self.split_heads(self.q(x)), cos, sin)              # (B, n_head, T, head_dim)
        k = rotate(self.split_heads(self.k(x)), cos, sin)              # (B, n_kv_head, T, head_dim)
        v = self.split_heads(self.v(x))                                # as k
        if kept is not None:
            k, v = context.store(kept, k, v)                           # T of the whole canvas
        y = F.scaled_dot_product_attention(q, k, v, context.key_mask,
                                           enable_gqa=self.grouped)    # as q
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
    """Masked-diffusion transformer: token ids to logits, every position sees every other. Trainable
    until load_backbone or train.train_backbone has frozen it."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # True: in training, activations of the layers, of the memory's modules and of the loss are
        # computed again in the backward pass instead of kept
        self.recompute = False
        # without a draw of nn.Embedding's own: it is drawn below, or loaded
        table = torch.empty(config.vocab_size, config.d_model)
        self.embedding = nn.Embedding(*table.shape, _weight=table)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() == 2 and not p.is_meta:         # load_backbone needs the shapes alone
                nn.init.normal_(p, std=0.1)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def context(self, ids: Tensor, attention_mask: Tensor | None = None, *, cache: bool = False
                ) -> Context:
        """What all passes over a canvas share. ids (B, T): their values do not matter;
        attention_mask (B, T): 0 at padding. Dream counts positions from the first real token, LLaDA
        from the first column."""
        c = self.config
        position = torch.arange(ids.shape[1], device=ids.device)[None]         # (1, T)
        key_mask = None
        if attention_mask is not None:
            key_mask = attention_mask.bool()[:, None, None, :]                 # (B, 1, 1, T)
            if c.kind == "dream":
                position = attention_mask.long().cumsum(1) - 1                 # (B, T)
        cos, sin = rotary_tables(position, c.d_model // c.n_head, c.rope_theta)
        dtype = torch.float32 if c.rope_fp32 else self.lm_head.weight.dtype
        kept = [[] for _ in self.layers] if cache else None
        return Context(cos.to(dtype), sin.to(dtype), key_mask, kept)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> h (B, T, D), the residual stream before the first layer."""
        return self.embedding(ids)

    def run(self, h: Tensor, context: Context) -> Tensor:
        """All layers on the residual stream h (B, T, D)."""
        no_cache = [None] * len(self.layers)
        for layer, kept in zip(self.layers, context.cache or no_cache):
            h = recomputed(layer, h, context, kept, enabled=self.recompute)
        return h

    def pick(self, h: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Align h (B, T, D) with the tokens it scores, then keep the wanted positions, a bool
        (B, T): (N, D), or (B, T, D) without."""
        if self.config.shift:
            # Column 0 has no predecessor and keeps its own h. Where a cached pass runs one block,
            # column 0 is the block's first token, which the pass before has revealed
            # (diffusion.reveal): that h is never scored.
            h = torch.cat((h[:, :1], h[:, :-1]), dim=1)                # (B, T, D)
        return h if wanted is None else h[wanted]

    def head(self, h: Tensor) -> Tensor:
        """Picked h (..., D) -> logits (..., V)."""
        return self.lm_head(self.norm(h))

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None,
                wanted: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), or (N, V) where wanted; logits[:, i] scores token i, for Dream too."""
        h = self.run(self.embed(ids), self.context(ids, attention_mask))
        return self.head(self.pick(h, wanted))

    def compile_layers(self) -> None:
        """torch.compile, layer by layer: one graph serves them all, the memory stays outside."""
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


# ---------------------------------------------------------------------------------- BAD INPUT
# One mechanism: whatever goes wrong with a file or a value reaches the end of the program as one
# sentence, see sample.run_program.

class InputError(Exception):
    """Bad input, in one sentence: what was found, what was expected, what to do."""


def ensure(condition: object, message: str) -> None:
    if not condition:
        raise InputError(message)


@contextmanager
def blame(source: object, advice: str = "") -> Iterator[None]:
    """Whatever fails inside is the fault of source, a file for example: an InputError says so."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        what = reason(error).removeprefix(f"{source}: ")
        raise InputError(f"{source} cannot be used ({what}){advice and '; ' + advice}")


def reason(error: Exception) -> str:
    """The first sentence of what Python, torch or a server say."""
    text = str(error) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"no {text}"
    elif hasattr(error, "read"):               # a server's refusal, with its own words
        text = f"{text}: {re.sub('<.*', '', error.read(300).decode(errors='replace'))}"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return re.split(r"\.\s|\n", text.strip().replace(":\n\t", ": "))[0]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------- WEIGHTS
# A checkpoint folder holds config.json, *.safetensors (with or without an index) and the
# tokeniser's files.

class Release(NamedTuple):
    config: Config
    repository: str                # on huggingface.co


RELEASES = {
    "llada-base": Release(LLADA, "GSAI-ML/LLaDA-8B-Base"),
    "llada": Release(LLADA, "GSAI-ML/LLaDA-8B-Instruct"),
    "llada-1.5": Release(LLADA, "GSAI-ML/LLaDA-1.5"),
    "dream-base": Release(DREAM, "Dream-org/Dream-v0-Base-7B"),
    "dream": Release(DREAM, "Dream-org/Dream-v0-Instruct-7B"),
}

# Our names and theirs, to be found with grep:
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
    "tiny": {},
    "llada": {
        "block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms",
        "rope": True, "alibi": False, "include_bias": False, "attention_layer_norm": False,
        "weight_tying": False, "scale_logits": False, "input_emb_norm": False,
    },
    "dream": {
        "hidden_act": "silu", "tie_word_embeddings": False, "use_sliding_window": False,
        "use_mrope": False,
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
LAYOUT = "give a folder with config.json, *.safetensors and the tokeniser's files"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def original_name(kind: str, name: str) -> str:
    """The name in a released checkpoint of our parameter, layers.0.q.weight for example."""
    if kind == "tiny":
        return name
    module, suffix = name.rsplit(".", 1)
    numbers = re.findall(r"\d+", module)
    pattern = re.sub(r"\d+", "{}", module)
    return MODULE_NAMES[kind][pattern].format(*numbers) + "." + suffix


def refuse_pointer(data: bytes) -> None:
    if data.startswith(b"version "):
        raise ValueError("it is git-lfs's pointer to a file, not the file: run git lfs pull")


def read_json(path: Path) -> dict:
    with blame(path, LAYOUT):
        data = path.read_bytes()
        refuse_pointer(data)
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    return value


def read_config(folder: Path) -> Config:
    """The architecture that a folder's config.json describes. Raises InputError."""
    path = folder / "config.json"
    entries = read_json(path)
    kind = str(entries.pop("model_type", None)).lower()
    ensure(kind in CONFIG_FIXED, f"{path} has model_type {kind!r}; give a folder of LLaDA, Dream "
           "or a tiny run")
    for key, want in CONFIG_FIXED[kind].items():
        ensure(entries.get(key, want) == want, f"{path} sets {key}; only {want!r} is implemented")
    with blame(path, LAYOUT):
        if kind == "tiny":
            return Config(**entries)
        # where transformers 5 has the base of the rotary embedding, and any has its scaling
        rope = (entries.get("rope_scaling") or {}) | (entries.get("rope_parameters") or {})
        if (rope.get("rope_type") or rope.get("type") or "default") != "default":
            raise ValueError(f"its rotary embedding is scaled, {rope}, which is not implemented")
        entries["rope_theta"] = rope.get("rope_theta", entries.get("rope_theta"))
        entries["embedding_size"] = entries.get("embedding_size") or entries["vocab_size"]
        values = {ours: entries[theirs] for ours, theirs in CONFIG_KEYS[kind].items()}
        wrong = [CONFIG_KEYS[kind][ours] for ours, value in values.items()
                 if not (isinstance(value, int | float) and 0 <= value < 2 ** 31)]     # no nan
        ids = [values["mask_id"], values["eos_id"], values["pad_id"]]
        if wrong or max(ids) >= values["vocab_size"]:
            raise ValueError(f"{', '.join(wrong) or 'a token id'} is no sound number")
        return replace(LLADA if kind == "llada" else DREAM, **values)


class StoredTensor(NamedTuple):
    """Where a tensor lies in a file."""
    path: Path
    dtype: torch.dtype
    shape: list[int]
    start: int                     # bytes
    n_bytes: int

    def read(self) -> Tensor:
        data = np.fromfile(self.path, np.uint8, self.n_bytes, offset=self.start)
        return torch.from_numpy(data).view(self.dtype).view(self.shape)


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, not read yet.

    The file: 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape,
    data_offsets}}, the tensors. Raises InputError for a file that is cut short or another thing.
    """
    with blame(path, LAYOUT), open(path, "rb") as file:
        size = path.stat().st_size
        first = file.read(8)
        refuse_pointer(first)
        end_of_header = 8 + int.from_bytes(first, "little")
        if end_of_header > size:
            raise ValueError(f"{size:,} bytes do not hold its header")
        header = json.loads(file.read(end_of_header - 8))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"tensor {name!r} is {entry['dtype']}, perhaps quantised, where "
                                 f"{', '.join(DTYPES)} are read")
            dtype = DTYPES[entry["dtype"]]
            start, stop = entry["data_offsets"]
            n_bytes = 1.0 * dtype.itemsize     # no float: a shape of text or of huge numbers
            for n in entry["shape"]:
                n_bytes *= n
            if stop - start != n_bytes or not 0 <= start <= stop <= size - end_of_header:
                raise ValueError(f"{size:,} bytes do not hold tensor {name!r}")
            tensors[name] = StoredTensor(path, dtype, entry["shape"], end_of_header + start,
                                         stop - start)
    return tensors


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index lists, or all."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    with blame(index):
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]


def load_backbone(path_or_release: str | Path, *, device: str | torch.device = "cpu",
                  dtype: torch.dtype | None = None) -> Backbone:
    """The frozen backbone of a checkpoint folder or release, in eval mode. Headers and shapes are
    checked first; then every tensor goes to its place on the device, one at a time. dtype: by
    default that of config.json, or of most tensors. Raises InputError for files that do not fit."""
    folder = find_weights(path_or_release)
    config = read_config(folder)
    stored = {}
    for path in shard_paths(folder):
        stored |= read_safetensors(path)
    files = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    ensure(stored, f"{folder} has no tensors in *.safetensors, only {files}; give a folder of the "
           "released layout")
    ensure(config.n_layer <= len(stored), f"{folder} has {len(stored)} tensors, too few for the "
           f"{config.n_layer} layers of its config.json")

    with blame(folder / "config.json"), torch.device("meta"):
        backbone = Backbone(config)    # shapes without memory
    names = [original_name(config.kind, name) for name, _ in backbone.named_parameters()]
    expected = {name: list(p.shape) for name, p in zip(names, backbone.parameters())}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    for name in sorted(expected | shapes):
        found, want = shapes.get(name), expected.get(name)
        ensure(found == want, f"{folder} has {found or 'no'} tensor {name!r} where its config.json "
               f"wants {want or 'none'}; give a folder whose config.json and weights belong "
               "together")

    if dtype is None:
        entries = read_json(folder / "config.json")
        stored_dtypes = [tensor.dtype for tensor in stored.values()]
        name = entries.get("torch_dtype") or entries.get("dtype")      # the newer name
        dtype = getattr(torch, str(name), None)
        if dtype not in DTYPES.values():
            dtype = max(stored_dtypes, key=stored_dtypes.count)
    weights = {ours: stored[name].read().to(device, dtype)
               for (ours, _), name in zip(backbone.named_parameters(), names)}
    backbone.load_state_dict(weights, assign=True)
    return backbone.requires_grad_(False).eval()


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


# ------------------------------------------------------------------------------------ DOWNLOAD

def variable(name: str, default: str | Path) -> Path:
    """A folder that the environment may name, with ~ and $VARIABLES in it."""
    return Path(os.path.expanduser(os.path.expandvars(os.environ.get(name) or default)))


def cache_folder() -> Path:
    return variable("XDG_CACHE_HOME", "~/.cache") / "metastate"


def fetched(path: Path, fetch: Callable[[Path], None]) -> Path:
    """path, which fetch(path) makes where it is not there: by one process of the machine, for which
    the others that torchrun started wait."""
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        while not path.exists():
            time.sleep(1)
    elif not path.exists():
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        if offline:
            raise ValueError("it is not in the cache, and HF_HUB_OFFLINE forbids to fetch it")
        path.parent.mkdir(parents=True, exist_ok=True)
        fetch(path)
    return path


def fetch_json(url: str) -> tuple[Any, dict[str, str]]:
    """The JSON value at url, and the headers that came with it."""
    with urlopen(url, timeout=60) as response:
        return json.load(response), response.headers


def download(url: str, path: Path, sha256: str | None = None) -> None:
    """Fetch url into path, whole or not at all, checked by its sha256."""
    torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)


def find_weights(name: str | Path) -> Path:
    """The checkpoint folder of that name: a folder itself, of a run its backbone; for a release or
    ORGANISATION/MODEL on the hub the one in the Hugging Face cache, or else our own download.
    Raises InputError where there is none and none can be fetched."""
    folder = Path(name)
    if folder.is_dir():
        of_run = folder / "backbone"
        return of_run if of_run.is_dir() else folder
    known = RELEASES.get(str(name))
    repository = known.repository if known else str(name)
    ensure(re.fullmatch(r"[\w.-]+/[\w.-]+", repository), f"there is no folder {name}; give one, "
           f"one of {', '.join(RELEASES)}, or ORGANISATION/MODEL on the hub")

    hub_cache = variable("HF_HUB_CACHE", variable("HF_HOME", "~/.cache/huggingface") / "hub")
    cached = hub_cache / f"models--{repository.replace('/', '--')}"
    for folder in sorted(cached.glob("snapshots/*"), key=os.path.getmtime, reverse=True):
        shards = shard_paths(folder)
        if shards and all(path.exists() for path in [folder / "config.json", *shards]):
            return folder

    advice = (f"there is no folder {name} either; give a folder, set HF_ENDPOINT to a mirror, or "
              f"run: hf download {repository}")
    with blame(f"the download of {repository}", advice):
        marker = cache_folder() / repository.replace("/", "--") / "complete"
        return fetched(marker, lambda path: fetch_repository(repository, path)).parent


def kind_of(name: str) -> str:
    """tiny, llada or dream, of a release, a folder or a model on the hub."""
    known = RELEASES.get(name)
    return known.config.kind if known else read_config(find_weights(name)).kind


def fetch_repository(repository: str, marker: Path) -> None:
    """Fetch a model's config, weights and tokeniser, file by file, and last the marker. What is
    there already is not fetched again."""
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    listing, _ = fetch_json(f"{hub}/api/models/{repository}?blobs=true")
    files = [file for file in listing["siblings"]
             if re.fullmatch(r"[\w.-]+\.(json|safetensors|txt)", file["rfilename"])]
    files.sort(key=lambda file: file["rfilename"] != "config.json")    # this first

    def is_missing(file: dict) -> bool:
        path = marker.parent / file["rfilename"]
        return not path.exists() or path.stat().st_size != file["size"]        # cut short

    missing = [file for file in files if is_missing(file)]
    n_bytes = sum(file["size"] for file in missing)
    free = shutil.disk_usage(marker.parent).free
    ensure(free > n_bytes, f"{marker.parent} has {free / 1e9:.1f} GB free where "
           f"{n_bytes / 1e9:.1f} are needed; make room, or set XDG_CACHE_HOME")
    print(f"{repository}: {n_bytes / 1e9:.1f} GB into {marker.parent}", file=sys.stderr)
    for file in files:
        name = file["rfilename"]
        sha256 = (file.get("lfs") or {}).get("sha256")         # small files have none
        url = f"{hub}/{repository}/resolve/{listing['sha']}/{name}"
        if file in missing:
            download(url, marker.parent / name, sha256)
        if is_missing(file):
            raise ValueError(f"the connection broke at {name}; run again to go on")
        if name == "config.json":
            read_config(marker.parent)                         # refuses what is not implemented
    marker.write_text(listing["sha"])


# ----------------------------------------------------------------------------------- TOKENISER

PATTERNS = {
    "llada": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
             r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "dream": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


class Template(NamedTuple):
    """A chat: its beginning, every message, and where the assistant begins to speak; the beginning
    of plain text; and the tokens that end an answer."""
    start: str
    message: str
    answer: str
    plain: str
    ends: tuple[str, ...]


TEMPLATES = {
    "llada": Template(
        start="<|startoftext|>",
        message="<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        answer="<|start_header_id|>assistant<|end_header_id|>\n\n",
        plain="", ends=("<|endoftext|>", "<|eot_id|>")),
    "dream": Template(
        start="", message="<|im_start|>{role}\n{content}<|im_end|>\n",
        answer="<|im_start|>assistant\n",
        plain="<|beginoftext|>", ends=("<|endoftext|>", "<|im_end|>")),
    "tiny": Template(start="", message="{content}\nAnswer:", answer="",
                     plain="", ends=("<|endoftext|>",)),
}


class Tokenizer:
    """Text <-> ids around a tiktoken.Encoding, with the model's chat template."""

    def __init__(self, kind: str, encoding: tiktoken.Encoding, special: dict[str, int],
                 hidden: set[int], nfc: bool):
        self.kind = kind
        self.template = TEMPLATES[kind]
        self.encoding = encoding
        self.hidden = hidden           # control tokens, which a reader does not want to see
        self.ends = {special[token] for token in self.template.ends if token in special}
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

    def answer(self, ids: list[int]) -> str:
        """Text of an answer, which the first end-of-text or end-of-turn ends."""
        length = next((n for n, i in enumerate(ids) if i in self.ends), len(ids))
        return self.decode(ids[:length], skip_special=True)

    def plain(self, text: str) -> list[int]:
        """Prompt ids of a text that a base model goes on with."""
        return self.encode(self.template.plain) + self.encode(text, special=False)

    def chat(self, messages: list[dict[str, str]], special: bool = False) -> list[int]:
        """Prompt ids of messages [{role, content}], ending where the assistant speaks. By default
        roles and contents are plain text: no user can write a control token."""
        if self.kind == "llada":
            messages = [m | {"content": m["content"].strip()} for m in messages]
        if self.kind == "dream" and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
        ids = self.encode(self.template.start)
        for message in messages:
            for part in re.split(r"(<\|\w+\|>)", self.template.message):
                is_control = part.startswith("<|")
                ids += self.encode(part.format(**message), special or is_control)
        return ids + self.encode(self.template.answer)


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
    return Tokenizer("tiny", encoding, special, set(special.values()), nfc=False)


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
    return Tokenizer(kind, encoding, special, hidden, nfc)


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


def load_tokenizer(path_or_release: str | Path) -> Tokenizer:
    """The tokeniser of a checkpoint folder or release. LLaDA and tiny: tokenizer.json; Dream:
    vocab.json, merges.txt, tokenizer_config.json. Raises InputError for files of another form."""
    folder = find_weights(path_or_release)
    config = read_config(folder)
    with blame(f"the {config.kind} tokeniser in {folder}", LAYOUT):
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
