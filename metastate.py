"""MetaState (arXiv 2603.01331): a working memory carried across the denoising steps of a frozen
masked-diffusion backbone.

One denoising step, as the figure of the authors' project page has it:

  ids (B, T) -- embed --(+)-- run: all layers, frozen --+-- pick -- head -- logits
                         ^                              |
      tokens ask slots   | Injector               Mixer | slots ask tokens
                         |                              v
  s (B, M, d) -----------+------------------------------+--> Updater --> s' (B, M, d)

The Updater is a gated recurrent unit, s' = (1 - z) s + z n. Injector, Mixer and Updater all see the
time t through one conditioner, t -> t_cond. In training, K steps:

  s0 --> step 1 --> s1 --> step 2 --> s2 --> ... --> step K
            |                 |                         |
          loss 1            loss 2                    loss K

The ids of a step are those of the step before with some tokens revealed. Gradients run right to
left along the chain of s, and within a step through all layers, whose weights are frozen; they stop
at the tokens. So Mixer and Updater learn from the losses of later steps alone, in step K not at
all, and as long as what the Injector writes is still zero, it alone learns.

The module holds no state: slots go in and slots come out, and nothing in them grows with T. The
memory costs a step some 4 D d multiplications a token for the projections of the tokens and 4 M d
for the attention: linear in T.

Symbols, and where each is from (paper: abstract, project page and its figure; restated: by later
papers, see the README; ours: chosen here):

  s      (B, M, d)  the slots, the state of the memory                          paper (s_t)
  M, d              number of slots; width of a slot                            paper; ours
  D                 width of the backbone                                       its config
  h      (B, T, D)  residual stream of the backbone over T tokens               paper (E_t, h_t)
  t      (B,)       time: masked tokens / maskable tokens                       ours
  t_cond            what the conditioner makes of t, (B, 1, d_time)             paper
  K, k              unrolled steps, and one of them                             paper
  n_k, w_k          tokens revealed at step k, and their share of all           restated
  z, r, n           update gate, reset gate, new value; z is 1 - GRUCell's z    ours
  B, T, H, V        rows of a batch, tokens, heads, vocabulary
  N                 positions that are picked, of all rows together
  canvas            the ids of one pass: prompt, then answer, masks where nothing is revealed
  maskable (B, T)   the positions of the answer, where masks may stand

Beyond symbols. Paper: the order in a step, who asks whom, one conditioner for three modules, a
GRU-style Updater. Restated: learned initial slots, AdaRMSNorm, K = 4, the loss. Ours: the
equations of the gates, how t enters, the Injector's zero start, anchors, first passes that think,
revealing by confidence.
"""
import hashlib
import math
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Backbone, Context, blame, ensure, recomputed, write_atomically


@dataclass(frozen=True)
class MemoryConfig:
    d_model: int                   # D
    n_slots: int                   # M
    d_slot: int                    # d
    n_head: int
    d_time: int                    # width of t_cond
    n_free_head: int = 0           # heads without an anchor, see MetaState.anchors


def preset(backbone: Backbone) -> MemoryConfig:
    """The memory for a backbone: about 0.6 % of an 8B one, as large as the tiny one itself."""
    c = backbone.config
    if c.kind == "tiny":
        return MemoryConfig(c.d_model, n_slots=16, d_slot=64, n_head=4, d_time=64)
    # 11 heads of 128; 5 of them have no anchor and look anywhere, at the prompt above all
    return MemoryConfig(c.d_model, n_slots=64, d_slot=1408, n_head=11, d_time=256, n_free_head=5)


def masked_fraction(ids: Tensor, maskable: Tensor, mask_id: int) -> Tensor:
    """Time t (B,) in [0, 1], in training and in sampling: masked tokens / maskable tokens."""
    # a prompt that guidance has masked (diffusion.Trajectory) does not count
    masked = (ids == mask_id) & maskable                               # (B, T)
    return masked.sum(1) / maskable.sum(1).clamp(min=1)


N_FREQUENCIES = 64             # from a quarter turn over all of t to 1,000 times that: the slow
                               # ones tell early from late, the fast ones one token from the next


class TimeConditioner(nn.Module):
    """t (B,) -> t_cond (B, 1, d_time): sinusoids of t, then an MLP. One for all three modules."""

    def __init__(self, d_time: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * N_FREQUENCIES, d_time), nn.SiLU(),
                                 nn.Linear(d_time, d_time), nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        frequency = torch.logspace(0, 3, N_FREQUENCIES, device=t.device) * math.pi / 2
        angle = t[:, None, None] * frequency                           # (B, 1, N_FREQUENCIES)
        return self.mlp(torch.cat((angle.sin(), angle.cos()), dim=-1))         # (B, 1, d_time)


class AdaRMSNorm(nn.Module):
    """RMSNorm whose gain follows the time: x / rms(x) * (1 + gain(t_cond)), in float32."""

    def __init__(self, d: int, d_time: int):
        super().__init__()
        self.gain = nn.Linear(d_time, d)

    def forward(self, x: Tensor, t_cond: Tensor) -> Tensor:
        # (B, 1, d); in bf16, 1 + gain would swallow a small one
        gain = self.gain(t_cond).float()
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + gain)


class CrossAttention(nn.Module):
    """A target asks a source, both normed for the time. What comes back has the target's width."""

    def __init__(self, d_target: int, d_source: int, c: MemoryConfig):
        super().__init__()
        self.n_head = c.n_head
        self.target_norm = AdaRMSNorm(d_target, c.d_time)
        self.source_norm = AdaRMSNorm(d_source, c.d_time)
        self.q = nn.Linear(d_target, c.d_slot, bias=False)
        self.k = nn.Linear(d_source, c.d_slot, bias=False)
        self.v = nn.Linear(d_source, c.d_slot, bias=False)
        self.out = nn.Linear(c.d_slot, d_target, bias=False)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)      # (B, H, T or M, d / H)

    def forward(self, target: Tensor, source: Tensor, t_cond: Tensor, bias: Tensor) -> Tensor:
        """target (B, Nt, d_target), source (B, Ns, d_source), t_cond (B, 1, d_time); bias
        (B, H, Nt, Ns) adds to the scores. Returns (B, Nt, d_target)."""
        target = self.target_norm(target, t_cond)                      # (B, Nt, d_target)
        source = self.source_norm(source, t_cond)                      # (B, Ns, d_source)
        q = self.split_heads(self.q(target))                           # (B, H, Nt, d / H)
        k = self.split_heads(self.k(source))                           # (B, H, Ns, d / H)
        v = self.split_heads(self.v(source))                           # (B, H, Ns, d / H)
        bias = bias.to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)    # (B, H, Nt, d / H)
        return self.out(y.transpose(1, 2).flatten(2))                  # (B, Nt, d_target)


class Injector(CrossAttention):
    """Tokens (B, T, D) ask slots (B, M, d): what is added to the residual stream, (B, T, D)."""


class Mixer(CrossAttention):
    """Slots (B, M, d) ask tokens (B, T, D): what the memory reads in this step, (B, M, d)."""


class Updater(nn.Module):
    """Gated recurrent unit over denoising steps: slots s and what the Mixer read -> new slots.
    As torch.nn.GRUCell, with z standing for what is replaced instead of what is kept."""

    def __init__(self, c: MemoryConfig):
        super().__init__()
        self.norm = AdaRMSNorm(c.d_slot, c.d_time)
        self.from_read = nn.Linear(c.d_slot, 3 * c.d_slot)
        self.from_slots = nn.Linear(c.d_slot, 3 * c.d_slot)

    def forward(self, slots: Tensor, read: Tensor, t_cond: Tensor) -> Tensor:
        read = self.norm(read, t_cond)                                 # (B, M, d)
        read_z, read_r, read_n = self.from_read(read).chunk(3, dim=-1)         # (B, M, d) each
        slots_z, slots_r, slots_n = self.from_slots(slots).chunk(3, dim=-1)    # (B, M, d) each
        z = torch.sigmoid(read_z + slots_z)        # update gate: how much of a slot is replaced
        r = torch.sigmoid(read_r + slots_r)        # reset gate: how much of it the new value sees
        n = torch.tanh(read_n + r * slots_n)       # the new value
        return (1 - z) * slots + z * n             # (B, M, d), float32 as slots are


class Anchors(NamedTuple):
    """Attention biases that tie the slots to places in the answer (ours)."""
    to_slots: Tensor               # (B, H, T, M), for the Injector
    to_tokens: Tensor              # (B, H, M, T), for the Mixer

    def at(self, columns: slice) -> "Anchors":
        """Those of some of the T tokens."""
        to_slots, to_tokens = self.to_slots[:, :, columns], self.to_tokens[..., columns]
        return Anchors(to_slots.contiguous(), to_tokens.contiguous())  # as fused attention wants it


class MetaState(nn.Module):
    """The memory: slots in, slots out. What it knows is in the slots that step returns; its
    parameters are the initial slots, four modules and the sharpness of their anchors."""

    def __init__(self, config: MemoryConfig):
        super().__init__()
        self.config = c = config
        self.initial_slots = nn.Parameter(torch.empty(c.n_slots, c.d_slot))
        self.conditioner = TimeConditioner(c.d_time)
        self.injector = Injector(c.d_model, c.d_slot, c)
        self.mixer = Mixer(c.d_slot, c.d_model, c)
        self.updater = Updater(c)
        # How strongly a head holds to its anchor: row 0 the Mixer's heads, row 1 the Injector's.
        self.sharpness = nn.Parameter(torch.empty(2, c.n_head))        # (2, H)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All initialisation. Weights: normal, standard deviation 1 / sqrt(inputs); biases: 0. Then
        what differs: initial slots, sharpness, the norms' gains (0: no effect of t yet) and the
        Injector's output (0: an untrained memory is a no-op)."""
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            else:
                nn.init.zeros_(p)
        nn.init.normal_(self.initial_slots, std=0.5)
        nn.init.constant_(self.sharpness, 1.0)
        nn.init.zeros_(self.sharpness[:, :self.config.n_free_head])
        for module in self.modules():
            if isinstance(module, AdaRMSNorm):
                nn.init.zeros_(module.gain.weight)
        nn.init.zeros_(self.injector.out.weight)

    def initial(self, batch: int) -> Tensor:
        """The learned slots before the first step, (B, M, d)."""
        return self.initial_slots.expand(batch, -1, -1)

    def anchors(self, maskable: Tensor, attention_mask: Tensor | None = None) -> Anchors:
        """The anchors of a canvas, for all of its steps (ours). maskable (B, T) bool: the positions
        of the answer; attention_mask (B, T): 0 at padding, which the Mixer does not see.

        The slots stand evenly along the maskable positions, so that each looks first at its own
        stretch of the answer: -(sharpness * distance) ** 2, distance in units of slots. Prompt and
        padding do not move them: all tokens before the answer are placed just before it. A free
        head (sharpness 0) sees all alike, and stays free: at 0 the square has no slope.
        """
        M = self.config.n_slots
        n_maskable = maskable.sum(1, keepdim=True).clamp(min=1)        # (B, 1)
        middle = (maskable.cumsum(1) - 0.5) / n_maskable       # (B, T) of a token, as a fraction
        token_place = middle * M - 0.5                         # (B, T), 0 is slot 0's middle
        slot_place = torch.arange(M, device=maskable.device)           # (M,)
        distance = token_place[:, None, None, :] - slot_place[:, None]         # (B, 1, M, T)
        mixer_sharpness, injector_sharpness = self.sharpness[:, :, None, None]     # (H, 1, 1)
        to_tokens = -(mixer_sharpness * distance) ** 2                 # (B, H, M, T)
        to_slots = -(injector_sharpness * distance.mT) ** 2            # (B, H, T, M)
        if attention_mask is not None:
            is_padding = attention_mask[:, None, None, :] == 0         # (B, 1, 1, T)
            to_tokens = to_tokens.masked_fill(is_padding, float("-inf"))
        return Anchors(to_slots.contiguous(), to_tokens)               # as fused attention wants it

    def step(self, backbone: Backbone, ids: Tensor, slots: Tensor, *, t: Tensor, anchors: Anchors,
             context: Context) -> tuple[Tensor, Tensor]:
        """One denoising step, as drawn above.

        ids (B, T): a canvas, or under the sampler's cache one block of it, to which anchors and
        context are then cut by their at(). slots (B, M, d), float32. t (B,), see masked_fraction,
        is that of the whole answer, which ids may not show. Returns h (B, T, D), as it leaves the
        last layer, for backbone.pick, and the new slots (B, M, d).
        """
        h = backbone.embed(ids)                                        # (B, T, D)
        # Weights, norms and slots of the memory are float32, its matrix products in the backbone's
        # dtype. Autocast's cast copies of the weights last until its block ends: K steps make K of
        # them, and the graph would keep them all if the modules were not recomputed.
        autocast = torch.autocast(h.device.type, h.dtype, enabled=h.dtype != torch.float32)
        recompute = backbone.recompute

        # 1. write: every token asks the slots, and what they say joins its embedding
        with autocast:
            t_cond = self.conditioner(t)                               # (B, 1, d_time)
            written = recomputed(self.injector, h, slots, t_cond, anchors.to_slots,
                                 enabled=recompute)                    # (B, T, D)
        h = h + written                                                # (B, T, D)

        # 2. run: the frozen layers work with what was written
        h = backbone.run(h, context)                                   # (B, T, D)

        # 3. read: every slot asks the tokens. Dream's h at i scores token i + 1, so that its slots
        # read one token off their anchors; with 64 slots on 256 tokens, 4 each, it is left so.
        with autocast:
            read = recomputed(self.mixer, slots, h, t_cond, anchors.to_tokens,
                              enabled=recompute)                       # (B, M, d)

            # 4. update: s' = (1 - z) s + z n, where n comes from what was read
            slots = recomputed(self.updater, slots, read, t_cond,
                               enabled=recompute)                      # (B, M, d)
        return h, slots


# ------------------------------------------------------------------------------- SAVE AND LOAD


def save_checkpoint(path: Path, model: nn.Module, **more: object) -> None:
    """Write a trained module, its config, and what belongs to it, plain values and tensors."""
    buffer = BytesIO()
    torch.save({"model": model.state_dict(), "config": asdict(model.config), **more}, buffer)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path: str | Path) -> dict:
    """What save_checkpoint wrote, and the file's digest; nothing in it is executed. Raises
    InputError."""
    with blame(path, "give a checkpoint that train.py wrote"):
        data = Path(path).read_bytes()
        state = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
        return state | {"digest": hashlib.sha256(data).hexdigest()[:16]}


def load_memory(path: str | Path, backbone: Backbone, *, any_backbone: bool = False,
                state: dict | None = None) -> MetaState:
    """The memory of a checkpoint, on the backbone's device, in eval mode. state: what
    load_checkpoint(path) gave, where it has been read. Raises InputError for a memory that was
    trained on another backbone, unless any_backbone says that this is meant."""
    state = state or load_checkpoint(path)
    with blame(path, "give a memory that train.py wrote, of this version"):
        trained_on = state["backbone"]
        ensure(any_backbone or trained_on["digest"] == backbone.digest(), f"{path} was trained on "
               f"another backbone, {trained_on['name']}; give that by --init, or --any-backbone if "
               "you know better")
        config = MemoryConfig(**state["config"])
        ensure(config.d_model == backbone.config.d_model, f"{path} is for a backbone of width "
               f"{config.d_model}, not {backbone.config.d_model}; give the right --init")
        memory = MetaState(config)
        memory.load_state_dict(state["model"])
        ensure(all(p.isfinite().all() for p in memory.parameters()),
               f"{path} has weights that are not finite; go back to another checkpoint")
    return memory.to(backbone.device, torch.float32).eval()
