"""MetaState (arXiv 2603.01331): a working memory carried across the denoising steps of a frozen
masked-diffusion backbone.

One denoising step. The memory s has M slots of width d, whatever the length T of the sequence:

  ids (B, T) -- embed -- layers 0..w --(+)-- layers w..r --+-- layers r..L -- pick -- head
                                        ^                  |
                   tokens ask slots     | Injector         | Mixer    slots ask tokens
                                        |                  v
  s (B, M, d) --------------------------+-------------> Updater ------> s' (B, M, d)

The Updater is a gated recurrent unit, s' = (1 - z) s + z n. Injector, Mixer and Updater see the
time t, the masked fraction, through one conditioner. In training, K steps:

  s0 --> step 1 --> s1 --> step 2 --> s2 --> ... --> step K
            |                 |                         |
          loss 1            loss 2                    loss K

s0 is learned; the ids of a step are those of the step before with some tokens revealed. Gradients
run right to left along the whole chain of s, and within a step through layers w..L, whose weights
are frozen; they stop at layers 0..w and at the tokens. The module holds no state: slots go in and
slots come out, and nothing in them grows with T. Cost: O(T M).
"""
import math
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Backbone, blame, check_config, ensure, recomputed, write_atomically


@dataclass(frozen=True)
class MemoryConfig:
    d_model: int                   # D: width of the backbone
    n_slots: int                   # M
    d_slot: int                    # d
    n_head: int
    d_time: int                    # width of the time conditioner
    write_layer: int               # w: the Injector writes before it
    read_layer: int                # r: the Mixer reads before it
    n_free_head: int = 0           # heads without an anchor, see MetaState.anchors


def preset(backbone: Backbone) -> MemoryConfig:
    """The memory for a backbone: about 0.6 % of an 8B one, as large as the tiny one itself."""
    c = backbone.config
    if c.kind == "tiny":
        return MemoryConfig(c.d_model, n_slots=16, d_slot=64, n_head=4, d_time=64,
                            write_layer=0, read_layer=c.n_layer)
    return MemoryConfig(c.d_model, n_slots=64, d_slot=1408, n_head=11, d_time=256,
                        write_layer=c.n_layer // 4, read_layer=3 * c.n_layer // 4, n_free_head=5)


def masked_fraction(ids: Tensor, maskable: Tensor, mask_id: int) -> Tensor:
    """Time t (B,) in [0, 1], in training and in sampling: masked tokens / maskable tokens."""
    masked = (ids == mask_id) & maskable       # (B, T); guidance masks the prompt, too
    return masked.sum(1) / maskable.sum(1).clamp(min=1)


N_FREQUENCIES = 64             # from a quarter turn over all of t to 1,000 times that: the slow
                               # ones tell early from late, the fast ones one token from the next


class TimeConditioner(nn.Module):
    """t (B,) -> (B, 1, d_time): sinusoids of t, then an MLP. One for all three modules."""

    def __init__(self, d_time: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * N_FREQUENCIES, d_time), nn.SiLU(),
                                 nn.Linear(d_time, d_time), nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        frequency = torch.logspace(0, 3, N_FREQUENCIES, device=t.device) * math.pi / 2
        angle = t[:, None, None] * frequency                           # (B, 1, N_FREQUENCIES)
        return self.mlp(torch.cat((angle.sin(), angle.cos()), dim=-1))


class AdaRMSNorm(nn.Module):
    """RMSNorm whose gain follows the time: x / rms(x) * (1 + gain(time)), in float32. Here and
    below, time is what the conditioner makes of t, (B, 1, d_time)."""

    def __init__(self, d: int, d_time: int):
        super().__init__()
        self.gain = nn.Linear(d_time, d)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        gain = self.gain(time).float()             # in bf16, 1 + gain would swallow a small one
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
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)      # (B, H, N, d / H)

    def forward(self, target: Tensor, source: Tensor, time: Tensor, bias: Tensor) -> Tensor:
        """target (B, Nt, d_target), source (B, Ns, d_source), time (B, 1, d_time); bias
        (B, H, Nt, Ns) adds to the scores. Returns (B, Nt, d_target)."""
        target = self.target_norm(target, time)                        # (B, Nt, d_target)
        source = self.source_norm(source, time)                        # (B, Ns, d_source)
        q = self.split_heads(self.q(target))                           # (B, H, Nt, d / H)
        k = self.split_heads(self.k(source))                           # (B, H, Ns, d / H)
        v = self.split_heads(self.v(source))                           # (B, H, Ns, d / H)
        bias = bias.to(q.dtype).contiguous()       # the fused kernels take no transposed view
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)    # (B, H, Nt, d / H)
        return self.out(y.transpose(1, 2).flatten(2))                  # (B, Nt, d_target)


class Mixer(CrossAttention):
    """Slots (B, M, d) ask tokens (B, T, D): what this step is worth to the memory, (B, M, d)."""


class Injector(CrossAttention):
    """Tokens (B, T, D) ask slots (B, M, d): what is added to the residual stream, (B, T, D)."""


class Updater(nn.Module):
    """Gated recurrent unit over denoising steps: slots s and what the Mixer read -> new slots.
    As torch.nn.GRUCell, with z standing for what is replaced instead of what is kept."""

    def __init__(self, c: MemoryConfig):
        super().__init__()
        self.norm = AdaRMSNorm(c.d_slot, c.d_time)
        self.from_read = nn.Linear(c.d_slot, 3 * c.d_slot)
        self.from_slots = nn.Linear(c.d_slot, 3 * c.d_slot)

    def forward(self, slots: Tensor, read: Tensor, time: Tensor) -> Tensor:
        read = self.norm(read, time)                                   # (B, M, d)
        read_z, read_r, read_n = self.from_read(read).chunk(3, dim=-1)         # (B, M, d) each
        slots_z, slots_r, slots_n = self.from_slots(slots).chunk(3, dim=-1)    # (B, M, d) each
        z = torch.sigmoid(read_z + slots_z)        # update gate: how much of a slot is replaced
        r = torch.sigmoid(read_r + slots_r)        # reset gate: how much of it the new value sees
        n = torch.tanh(read_n + r * slots_n)       # the new value
        return (1 - z) * slots + z * n                                 # (B, M, d)


class MetaState(nn.Module):
    """The memory: slots in, slots out. What it knows is in the slots that step returns; its
    parameters are the slots to begin with and the four modules above."""

    def __init__(self, config: MemoryConfig):
        super().__init__()
        self.config = c = config
        self.slots = nn.Parameter(torch.empty(c.n_slots, c.d_slot))
        self.time = TimeConditioner(c.d_time)
        self.mixer = Mixer(c.d_slot, c.d_model, c)
        self.updater = Updater(c)
        self.injector = Injector(c.d_model, c.d_slot, c)
        # How strongly a head holds to its anchor, see anchors: row 0 the Mixer's heads, row 1
        # the Injector's.
        self.sharpness = nn.Parameter(torch.empty(2, c.n_head))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All initialisation: every weight of size 1 / sqrt(inputs) and every bias 0, and then what
        differs. The Injector's output is zero: an untrained memory is a no-op."""
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            else:
                nn.init.zeros_(p)
        nn.init.normal_(self.slots, std=0.5)
        nn.init.constant_(self.sharpness, 1.0)
        nn.init.zeros_(self.sharpness[:, :self.config.n_free_head])
        for module in self.modules():
            if isinstance(module, AdaRMSNorm):
                nn.init.zeros_(module.gain.weight)
        nn.init.zeros_(self.injector.out.weight)

    def initial(self, batch: int) -> Tensor:
        """The learned slots before the first step, (B, M, d)."""
        return self.slots.expand(batch, -1, -1)

    def anchors(self, maskable: Tensor) -> tuple[Tensor, Tensor]:
        """Attention biases of Mixer (B, H, M, T) and Injector (B, H, T, M).

        The slots are anchored evenly along the maskable positions, so that each looks first at
        its own stretch of the answer: -(sharpness * distance) ** 2, distance in units of slots.
        Prompt and padding do not move the anchors: they all stand just before the answer. A free
        head (sharpness 0) sees all alike, and stays free: at 0 the square has no slope.
        """
        M = self.config.n_slots
        n_maskable = maskable.sum(1, keepdim=True).clamp(min=1)        # (B, 1)
        fraction = (maskable.cumsum(1) - 0.5) / n_maskable             # (B, T) of the answer
        token_place = fraction * M - 0.5                               # (B, T)
        slot_place = torch.arange(M, device=maskable.device)           # (M,)
        distance = token_place[:, None, None, :] - slot_place[:, None]         # (B, 1, M, T)
        mixer_sharpness, injector_sharpness = self.sharpness[:, :, None, None]     # (H, 1, 1)
        to_tokens = -(mixer_sharpness * distance) ** 2                 # (B, H, M, T)
        to_slots = -(injector_sharpness * distance) ** 2               # (B, H, M, T)
        return to_tokens, to_slots.mT

    def step(self, backbone: Backbone, ids: Tensor, slots: Tensor, *, maskable: Tensor,
             wanted: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One denoising step, as drawn above.

        ids, attention_mask (B, T); slots (B, M, d); maskable (B, T) bool: the positions that began
        masked; wanted (B, T) bool: where logits are wanted. Returns h (N, D) for backbone.head and
        the new slots (B, M, d).
        """
        c = self.config
        with torch.no_grad():              # nothing below the Injector is trained
            h, context = backbone.embed(ids, attention_mask)           # (B, T, D)
            h = backbone.run(h, context, 0, c.write_layer)             # (B, T, D)

        to_tokens, to_slots = self.anchors(maskable)                   # (B, H, M, T), (B, H, T, M)
        if context.key_mask is not None:
            to_tokens = to_tokens.masked_fill(~context.key_mask, float("-inf"))

        # The memory's weights are float32; they compute in the backbone's precision.
        precision = torch.autocast(h.device.type, h.dtype, enabled=h.dtype != torch.float32)
        # Recomputed as the layers are: else every step of an unroll would keep bf16 copies of them.
        recompute = backbone.recompute
        with precision:
            t = masked_fraction(ids, maskable, backbone.config.mask_id)            # (B,)
            time = self.time(t)                                                    # (B, 1, d_time)

            # 1. write: every token asks the slots, and what they say joins the residual stream
            written = recomputed(self.injector, h, slots, time, to_slots,          # (B, T, D)
                                 enabled=recompute)
        h = h + written.to(h.dtype)                                    # (B, T, D)

        # 2. run: the layers between work with what was written
        h = backbone.run(h, context, c.write_layer, c.read_layer)      # (B, T, D)

        with precision:
            # 3. read: every slot asks the tokens
            read = recomputed(self.mixer, slots, h, time, to_tokens,               # (B, M, d)
                              enabled=recompute)

            # 4. update: every slot takes of it what its gates let through
            new_slots = recomputed(self.updater, slots, read, time, enabled=recompute)  # (B, M, d)

        # 5. run on to the top
        h = backbone.run(h, context, c.read_layer, len(backbone.layers))           # (B, T, D)
        return backbone.pick(h, wanted), new_slots                     # (N, D), (B, M, d)


# ------------------------------------------------------------------------------- SAVE AND LOAD

GIVE_CHECKPOINT = "give a checkpoint that train.py wrote"


def save_checkpoint(path: Path, model: nn.Module, **more: object) -> None:
    """Write a trained module, its config, and what belongs to it, plain values and tensors."""
    buffer = BytesIO()
    torch.save({"model": model.state_dict(), "config": asdict(model.config), **more}, buffer)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path: Path) -> dict:
    """What save_checkpoint wrote; nothing in the file is executed. Raises InputError."""
    with blame(path, GIVE_CHECKPOINT):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"model", "config", "settings"} <= state.keys():
            raise ValueError("it is no checkpoint of train.py")
    return state


def load_memory(path: Path, backbone: Backbone, *, any_backbone: bool = False) -> MetaState:
    """The memory of a checkpoint, on the backbone's device, in eval mode. Raises InputError for a
    memory that was trained on another backbone, unless any_backbone says that this is meant."""
    state = load_checkpoint(path)
    with blame(path, GIVE_CHECKPOINT):
        config = MemoryConfig(**state["config"])
        check_config(config)
        same_backbone = state["backbone"]["digest"] == backbone.digest()
        name = state["backbone"]["name"]
        ensure(same_backbone or any_backbone, f"{path} was trained on another backbone, {name}; "
               "give that by --init, or --any-backbone if you know better")
        ensure(config.d_model == backbone.config.d_model, f"{path} is for a backbone of width "
               f"{config.d_model}, not {backbone.config.d_model}; give the right --init")
        layers_fit = config.write_layer <= config.read_layer <= len(backbone.layers)
        heads_fit = config.n_head > 0 and config.d_slot % config.n_head == 0
        if not (layers_fit and heads_fit):
            raise ValueError(f"its config does not fit together, {config}")
        with torch.device("meta"):         # no size in the file is believed before its tensors are
            memory = MetaState(config)
        memory.load_state_dict(state["model"], assign=True)
        if not all(p.isfinite().all() for p in memory.parameters()):
            raise ValueError("it has weights that are not finite")
    return memory.to(backbone.embedding.weight.device, torch.float32).eval()
