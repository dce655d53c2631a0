"""MetaState (arXiv 2603.01331): a working memory carried across the denoising steps of a frozen
masked-diffusion backbone.

One denoising step. The memory s has M slots of width d, whatever the length T of the sequence:

  ids (B, T) -- embed -- layers 0..w --(+)-- layers w..r --+-- layers r..L -- pick -- head
                                        ^                  |
                   tokens ask slots     | Injector         | Mixer    slots ask tokens
                                        |                  v
  s (B, M, d) --------------------------+-------------> Updater ------> s' (B, M, d)

The Updater is a gated recurrent unit, s' = (1 - z) s + z n. All three see the time t, the masked
fraction, through one conditioner. In training, K steps:

  s0 --> step 1 --> s1 --> step 2 --> s2 --> ... --> step K         s0: learned
            |                 |                         |           ids of the next step: these,
          loss 1            loss 2                    loss K        with some tokens revealed

Gradients run right to left along the whole chain of s, and within a step through layers w..L,
whose weights are frozen; they stop at layers 0..w and at the tokens. The module holds no state:
slots go in and slots come out, and nothing in them grows with T. Cost: O(T M).
"""
import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import (PRESETS, Backbone, Tokenizer, blame, ensure, load_backbone, load_tokenizer,
                   write_atomically)

@dataclass(frozen=True)
class MemoryConfig:
    d_model: int                   # width of the backbone
    n_slots: int
    d_slot: int
    n_head: int
    d_time: int                    # width of the time conditioner
    write_layer: int               # w: the Injector writes before it
    read_layer: int                # r: the Mixer reads before it
    n_updates: int | None = None   # in sampling, spread over the answer; None: one in every step

def preset(backbone: Backbone) -> MemoryConfig:
    """The memory for a backbone: about 0.6 % of an 8B one, as large as the tiny one itself."""
    c = backbone.config
    if c.kind == "tiny":
        return MemoryConfig(c.d_model, n_slots=16, d_slot=64, n_head=4, d_time=64, write_layer=0,
                            read_layer=c.n_layer)
    return MemoryConfig(c.d_model, n_slots=64, d_slot=1408, n_head=11, d_time=256,
                        write_layer=c.n_layer // 4, read_layer=3 * c.n_layer // 4)

def masked_fraction(ids: Tensor, maskable: Tensor, mask_id: int) -> Tensor:
    """Time t (B,) in [0, 1], in training and in sampling: masked tokens / maskable tokens."""
    return ((ids == mask_id) & maskable).sum(1) / maskable.sum(1).clamp(min=1)

class TimeConditioner(nn.Module):
    """t (B,) -> (B, 1, d): sinusoids of t, then an MLP."""
    def __init__(self, d: int, n_freq: int = 64):
        super().__init__()
        self.register_buffer("freq", torch.logspace(0, 3, n_freq) * math.pi / 2, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * n_freq, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        angle = t[:, None, None] * self.freq
        return self.mlp(torch.cat((angle.sin(), angle.cos()), dim=-1))

class AdaRMSNorm(nn.Module):
    """RMSNorm whose gain follows the time: x / rms(x) * (1 + gain(time))."""
    def __init__(self, d: int, c: MemoryConfig):
        super().__init__()
        self.gain = nn.Linear(c.d_time, d)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + self.gain(time))

class CrossAttention(nn.Module):
    """Queries ask a context, both normed for the time; bias (B, H, Tq, Tk) adds to the scores."""
    def __init__(self, d_query: int, d_context: int, c: MemoryConfig):
        super().__init__()
        self.n_head = c.n_head
        self.query_norm, self.context_norm = AdaRMSNorm(d_query, c), AdaRMSNorm(d_context, c)
        self.q = nn.Linear(d_query, c.d_slot, bias=False)
        self.k, self.v = (nn.Linear(d_context, c.d_slot, bias=False) for _ in range(2))
        self.out = nn.Linear(c.d_slot, d_query, bias=False)

    def forward(self, query: Tensor, context: Tensor, time: Tensor, bias: Tensor) -> Tensor:
        query, context = self.query_norm(query, time), self.context_norm(context, time)
        q, k, v = (p(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                   for p, x in ((self.q, query), (self.k, context), (self.v, context)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).contiguous())
        return self.out(y.transpose(1, 2).flatten(2))

class Mixer(CrossAttention):
    """Slots (B, M, d) ask tokens (B, T, D): what this step is worth to the memory, (B, M, d)."""

class Injector(CrossAttention):
    """Tokens (B, T, D) ask slots (B, M, d): what is added to the residual stream, (B, T, D)."""

class Updater(nn.Module):
    """Gated recurrent unit over denoising steps: slots s and what the Mixer read -> new slots."""
    def __init__(self, c: MemoryConfig):
        super().__init__()
        self.norm = AdaRMSNorm(c.d_slot, c)
        self.from_read, self.from_slots = (nn.Linear(c.d_slot, 3 * c.d_slot) for _ in range(2))

    def forward(self, slots: Tensor, read: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        xz, xr, xn = self.from_read(self.norm(read, time)).chunk(3, dim=-1)
        sz, sr, sn = self.from_slots(slots).chunk(3, dim=-1)
        update = torch.sigmoid(xz + sz)                        # z: how much of a slot is replaced
        reset = torch.sigmoid(xr + sr)                         # r: how much of it n sees
        new = torch.tanh(xn + reset * sn)                      # n
        return (1 - update) * slots + update * new, update

class MetaState(nn.Module):
    def __init__(self, config: MemoryConfig):
        super().__init__()
        self.config = c = config
        self.slots = nn.Parameter(torch.empty(c.n_slots, c.d_slot))
        self.time = TimeConditioner(c.d_time)
        self.mixer = Mixer(c.d_slot, c.d_model, c)
        self.updater = Updater(c)
        self.injector = Injector(c.d_model, c.d_slot, c)
        self.sharpness = nn.Parameter(torch.empty(2, c.n_head))    # of Mixer and Injector, by head
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All initialisation. The Injector's output is zero: an untrained memory is a no-op."""
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
        nn.init.normal_(self.slots, std=0.5)
        nn.init.constant_(self.sharpness, 0.55)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, AdaRMSNorm):
                nn.init.zeros_(module.gain.weight)
        nn.init.zeros_(self.injector.out.weight)

    def initial(self, batch: int) -> Tensor:
        """The learned slots before the first step, (B, M, d)."""
        return self.slots.expand(batch, -1, -1)

    def step(self, backbone: Backbone, ids: Tensor, slots: Tensor, *, maskable: Tensor,
             rows: Tensor, attention_mask: Tensor | None = None, trace: list | None = None
             ) -> tuple[Tensor, Tensor]:
        """One denoising step, as drawn above.

        ids, attention_mask (B, T); maskable (B, T) bool: the positions that began masked; rows
        (B, T) bool: where logits are wanted; slots (B, M, d). Returns h (N, D) for backbone.head,
        and the new slots; a trace list is given the time, mean gate and change of every slot.
        """
        c = self.config
        # Slots are anchored evenly along the maskable positions: each looks first at its stretch.
        # Places are in units of slots and do not depend on the prompt, on padding or on the batch.
        n = maskable.sum(1, keepdim=True).clamp(min=1)
        place = (maskable.cumsum(1) - 0.5) / n * c.n_slots - 0.5                      # (B, T)
        anchor = torch.arange(c.n_slots, device=ids.device)[:, None]
        distance = -(place[:, None, None, :] - anchor) ** 2                           # (B, 1, M, T)
        to_slots, to_tokens = (distance * s[:, None, None] ** 2 for s in self.sharpness)
        with torch.no_grad():                              # nothing below the Injector is trained
            h, context = backbone.embed(ids, attention_mask)
            h = backbone.run(h, context, 0, c.write_layer)
        if attention_mask is not None:
            to_slots = to_slots.masked_fill(attention_mask[:, None, None] == 0, float("-inf"))
        t = masked_fraction(ids, maskable, backbone.config.mask_id)
        precision = dict(device_type=h.device.type, dtype=h.dtype, enabled=h.dtype != torch.float32)
        with torch.autocast(**precision):
            time = self.time(t)
            h = h + self.injector(h, slots, time, to_tokens.mT).to(h.dtype)
        h = backbone.run(h, context, c.write_layer, c.read_layer)
        with torch.autocast(**precision):
            new, update = self.updater(slots, self.mixer(slots, h, time, to_slots), time)
        if trace is not None:
            change = (new - slots).norm(dim=-1) / slots.norm(dim=-1)
            trace.append({"t": t, "update_gate": update.mean(-1), "slot_change": change})
        h = backbone.run(h, context, c.read_layer, len(backbone.layers))
        return backbone.pick(h, rows), new

def save_checkpoint(path: Path, model: nn.Module, **more) -> None:
    """Write a trained module and what belongs to it, plain values and tensors."""
    write_atomically(path, lambda file: torch.save({"model": model.state_dict(), **more}, file))

def load_checkpoint(path: Path) -> dict:
    """What save_checkpoint wrote; nothing in the file is executed."""
    with blame(path, "give a memory.pt that train.py wrote"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"model", "config", "backbone"} <= state.keys():
            raise ValueError("no checkpoint of train.py")
    return state

def load_memory(path: Path, backbone: Backbone) -> MetaState:
    """The memory of a checkpoint, on the backbone's device, in eval mode."""
    state = load_checkpoint(path)
    with blame(path, "give a memory.pt that train.py wrote"):
        memory = MetaState(MemoryConfig(**state["config"]))
        memory.load_state_dict(state["model"])
    found, want = memory.config.d_model, backbone.config.d_model
    ensure(found == want, f"{path} belongs to {state['backbone']}, width {found}, not {want}; give "
           "the right --init")
    return memory.to(backbone.embedding.weight.device).eval()

def model_arguments(parser, *, training: bool = False) -> None:
    """The options that say which models a program works with."""
    add = parser.add_argument_group("models").add_argument
    add("--init", default="tiny" if training else None, help=f"{', '.join(PRESETS)}, or a "
        "checkpoint folder" + " (default: tiny)" * training)
    add("--weights", type=os.path.abspath,             # a folder, whatever its name
        help="folder with the weights of --init, else found or downloaded")
    add("--device", help="cpu, cuda, mps (default: the best there is)")
    add("--compile", action="store_true", help="torch.compile the backbone's layers")
    if not training:
        add("--memory", type=Path, help="a memory.pt (default, without --init: the newest in out/)")
        add("--no-memory", action="store_true", help="the frozen backbone alone")

def compile_layers(backbone: Backbone) -> None:
    """torch.compile, layer by layer: one graph serves them all, and the memory stays between."""
    for layer in backbone.layers:
        layer.compile()

def open_models(args, device: torch.device) -> tuple[Backbone, Tokenizer, MetaState | None, dict]:
    """Backbone, tokeniser, memory and their names, for the arguments of model_arguments. Without
    --memory and --init it is the newest memory in out/; its checkpoint names its backbone."""
    path, init = args.memory, args.init
    if path is None and init is None:
        found = sorted(Path("out").glob("*/memory.pt"), key=lambda p: p.stat().st_mtime)
        ensure(found, "there is no checkpoint in out/ yet; make one with: python train.py")
        path = found[-1]
    init = init or load_checkpoint(path)["backbone"]
    folder = args.weights or init
    if folder == "tiny":
        folder = (path or Path("out/tiny/memory.pt")).parent / "backbone"
    backbone, tokenizer = load_backbone(folder, device=device), load_tokenizer(folder)
    if args.compile:
        compile_layers(backbone)
    memory = load_memory(path, backbone) if path and not args.no_memory else None
    digest = memory and hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return backbone, tokenizer, memory, {"init": init, "memory": digest}
