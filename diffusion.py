"""Masked diffusion: the losses that train backbone and memory, and the sampler.

Backbone loss: LLaDA (arXiv 2502.09992) eq. 3 and its SFT form. Memory loss: MetaState's K-step
unrolling, as restated in PUMBA's eq. F.1. Sampler: LLaDA's generate.py, Dream's diffusion_generate
and the threshold of Fast-dLLM (arXiv 2505.22618) are one loop, generate, with a few small functions
below it for what they do differently. Departures from the originals: no mask is ever written,
confidences are float32, Dream's counts are taken by row, and end-of-text can be held back at every
temperature.
"""
from dataclasses import dataclass
from itertools import count
from typing import Callable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metastate import MetaState
from model import Backbone, Config, ensure, recomputed

# -------------------------------------------------------------------------------------- LOSSES


def cross_entropy(backbone: Backbone, h: Tensor, targets: Tensor, chunk: int = 256
                  ) -> tuple[Tensor, Tensor]:
    """Cross-entropy (N,) of picked h (N, D), and the log of the highest probability (N,). With
    backbone.recompute there are never more logits than (chunk, V), nor in the backward pass."""

    def score(h: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = backbone.head(h).float().log_softmax(-1)               # (chunk, V)
        return -log_p.gather(1, targets[:, None])[:, 0], log_p.amax(-1).detach()

    pieces = zip(h.split(chunk), targets.split(chunk))
    results = [recomputed(score, *piece, enabled=backbone.recompute) for piece in pieces]
    losses, confidences = zip(*results)
    return torch.cat(losses), torch.cat(confidences)


def diffusion_loss(backbone: Backbone, ids: Tensor, maskable: Tensor, t: Tensor, noise: Tensor,
                   visible_share: float = 0.0, eps: float = 1e-3) -> Tensor:
    """Denoising loss at one time per row, weighted by 1/t. ids, maskable (B, T); t (B,) and noise
    (B, T) uniform in [0, 1). With everything maskable this is LLaDA's pretraining loss; with the
    answer and its end-of-text padding maskable, its SFT loss. visible_share: the share of the
    maskable tokens that is scored even where it is visible, as BERT scores unchanged tokens."""
    p = (1 - eps) * t[:, None] + eps                                   # (B, 1) mask ratio
    masked = maskable & (noise < p)                                    # (B, T)
    # masked takes the low end of the noise, what is scored though visible the high end
    scored = masked | (maskable & (noise > 1 - visible_share))         # (B, T)
    h, context = backbone.embed(ids.masked_fill(masked, backbone.config.mask_id))
    h = backbone.run(h, context, 0, len(backbone.layers))              # (B, T, D)
    ce, _ = cross_entropy(backbone, backbone.pick(h, scored), ids[scored])     # (N,)
    weight = torch.where(masked, 1 / p, 1.0)                           # (B, T)
    weight = weight / maskable.sum(1, keepdim=True)
    return (ce * weight[scored]).sum() / len(ids)


def spread(values: Tensor, where: Tensor) -> Tensor:
    """Values (N,) at the N places of a bool (B, T), in float32; 0 elsewhere."""
    zeros = torch.zeros(where.shape, dtype=torch.float32, device=where.device)
    return zeros.masked_scatter(where, values.float())


def best_positions(score: Tensor, eligible: Tensor, n: Tensor) -> Tensor:
    """The n (B,) eligible positions of highest score in each row, ties to the left; bool (B, T)."""
    score = score.masked_fill(~eligible, float("-inf"))
    order = score.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)                                        # (B, T), 0 is the best
    return eligible & (rank < n[:, None])


# What becomes of the slots (B, M, d) between two steps. keep is the method. The controls: reset,
# the memory begins anew; shuffle, every sample goes on with the memory of another.
CARRY = {
    "keep": lambda memory, slots: slots,
    "reset": lambda memory, slots: memory.initial(len(slots)),
    "shuffle": lambda memory, slots: slots.roll(1, dims=0),
}


def unroll(backbone: Backbone, memory: MetaState, ids: Tensor, maskable: Tensor, counts: Tensor,
           noise: Tensor, by_confidence: Tensor, *, lam: float, carry: str = "keep",
           think: int = 0) -> tuple[Tensor, Tensor]:
    """K denoising steps from all masked to all revealed; the memory runs through all of them.

        L = sum_k w_k [lam * dense_k + (1 - lam) * reveal_k],    w_k = n_k / (n_1 + ... + n_K)

    dense_k averages the cross-entropy over what is masked at step k, reveal_k over what is revealed
    there. ids, maskable, noise (B, T); counts (B, K): n_k, in sum the row's maskable positions;
    by_confidence (B,) bool: rows that reveal where the model is surest, not at random; carry: see
    CARRY. think: passes over the unwritten answer before step 1, whose slots the unroll begins
    with, so that a memory learns to keep what it knows for longer than K steps. With reset nothing
    would come of them.
    Returns the mean of L over rows, and that of dense_k for each k, (K,).
    """
    mask_id = backbone.config.mask_id
    masked = maskable                                                  # (B, T)
    slots = memory.initial(len(ids))                                   # (B, M, d)
    if carry != "reset":
        unwritten = ids.masked_fill(maskable, mask_id)                 # (B, T)
        with torch.no_grad():          # progressive training: no gradient through these passes
            for _ in range(think):
                _, slots = memory.step(backbone, unwritten, slots, maskable=maskable,
                                       wanted=maskable)

    loss = 0.0
    dense_by_step = []
    for k in range(counts.shape[1]):
        # 1. denoise with the memory of the step before
        canvas = ids.masked_fill(masked, mask_id)                      # (B, T)
        h, slots = memory.step(backbone, canvas, slots, maskable=maskable, wanted=masked)

        # 2. cross-entropy wherever a token is masked, and how sure the model is there
        ce, confidence = cross_entropy(backbone, h, ids[masked])       # (N,) both
        ce = spread(ce, masked)                                        # (B, T)
        confidence = spread(confidence, masked)                        # (B, T)

        # 3. the n_k positions to reveal
        score = torch.where(by_confidence[:, None], confidence, noise)
        revealed = best_positions(score, masked, counts[:, k])         # (B, T)

        # 4. L_k
        dense = ce.sum(1) / masked.sum(1).clamp(min=1)                 # (B,)
        reveal = (ce * revealed).sum(1) / counts[:, k].clamp(min=1)    # (B,)
        weight = counts[:, k] / maskable.sum(1)                        # (B,)
        loss = loss + (weight * (lam * dense + (1 - lam) * reveal)).mean()
        dense_by_step.append(dense.detach().mean())

        # 5. reveal the ground truth; between steps the gradient has no way but the memory
        masked = masked & ~revealed
        slots = CARRY[carry](memory, slots)
    return loss, torch.stack(dense_by_step)


# ------------------------------------------------------------------------------------ SAMPLING


@dataclass(frozen=True)
class Sampling:
    """How an answer is denoised. Raises InputError for settings that cannot work together."""
    gen_length: int = 128              # tokens of the answer; 0: only the masks in the prompt
    steps: int = 128                   # passes that reveal, shared out evenly over the blocks
    block_length: int | None = None    # the answer is written block by block; None: all at once
    think: int = 0                     # passes before the first token, which change the memory only
    threshold: float | None = None     # instead of steps: reveal every token with at least this
                                       # confidence, in as many passes as that takes
    remasking: str = "low_confidence"  # how the tokens to reveal are chosen
    temperature: float = 0.0
    top_p: float | None = None         # Dream: the smallest set of tokens with this probability
    top_k: int | None = None           # Dream: the k likeliest tokens
    alg_temp: float = 0.0              # Dream: reveal at random, the surer the sooner
    cfg_scale: float = 0.0             # guidance: away from what the model says without the prompt
    logits_eos_inf: bool = False       # never write end-of-text
    confidence_eos_eot_inf: bool = False       # reveal end-of-text and end-of-turn last

    def __post_init__(self) -> None:
        filled = self.n_blocks * (self.block_length or self.gen_length)
        shared_out = self.threshold is not None or self.steps % self.n_blocks == 0
        ensure(min(self.gen_length, self.think) >= 0,
               f"gen_length {self.gen_length} and think {self.think} cannot be below 0")
        ensure(all(x == 0 or x >= 1e-6 for x in (self.temperature, self.alg_temp)),
               f"temperature {self.temperature} and alg_temp {self.alg_temp} must be 0 or at least "
               "1e-6: dividing by less overflows")
        ensure(filled == self.gen_length and shared_out and self.steps > 0,
               f"gen_length {self.gen_length}, block_length {self.block_length} and steps "
               f"{self.steps} do not divide: blocks must fill gen_length and share steps evenly")
        ensure(self.remasking in REMASKING,
               f"remasking {self.remasking!r} is unknown; take one of {', '.join(REMASKING)}")
        ensure(self.threshold is None or self.remasking in ("low_confidence", "maskgit_plus"),
               f"threshold needs probabilities, which remasking {self.remasking!r} does not give")
        ensure(self.threshold is None or self.alg_temp == 0,
               "threshold and alg_temp both say what to reveal; give one of them")

    @property
    def n_blocks(self) -> int:
        return max(1, self.gen_length // self.block_length) if self.block_length else 1

    @property
    def steps_per_block(self) -> int:
        return self.steps // self.n_blocks


class Pass(NamedTuple):
    """What on_step is told beside the canvas."""
    eligible: Tensor                   # (B, T) bool: what this pass could have revealed
    revealed: Tensor                   # (B, T) bool: what it did reveal
    guess: Tensor                      # (B, T): the canvas with what it would write where eligible
    confidence: Tensor                 # (B, T): how sure it is of that
    slots: Tensor | None               # (B, M, d) after the pass; with guidance (2 B, M, d)


@torch.no_grad()
def generate(backbone: Backbone, prompt_ids: Tensor, *, memory: MetaState | None = None,
             carry: str = "keep", attention_mask: Tensor | None = None,
             answer_start: int | None = None, seeds: Sequence[int] | None = None,
             on_step: Callable[[Tensor, Pass], None] | None = None, **settings) -> Tensor:
    """Denoise gen_length masks after prompt_ids (B, P), and any mask in it; (B, P + gen_length).

    settings: see Sampling. attention_mask (B, P): 0 at left padding. carry: see CARRY.
    answer_start: where the answer begins, if some of it stands in prompt_ids already. seeds (B,):
    of every row's own random stream, by default 0 .. B - 1. No row depends on the others, on
    padding or on the batch. on_step(canvas, pass) sees every pass.
    """
    s = Sampling(**settings)
    c = backbone.config
    B, P = prompt_ids.shape
    ensure(carry != "shuffle" or (B > 1 and s.cfg_scale == 0), "carry = shuffle exchanges memories "
           "between the samples of a batch; give two or more, and no guidance")
    canvas = F.pad(prompt_ids, (0, s.gen_length), value=c.mask_id)     # (B, T), T = P + gen_length
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (0, s.gen_length), value=1)
    maskable = canvas == c.mask_id                                     # (B, T)
    if answer_start is not None:       # the memory's anchors and time are those of a whole answer
        maskable[:, answer_start:] = True
    slots = None
    if memory:
        slots = memory.initial(2 * B if s.cfg_scale > 0 else B)        # (B, M, d), see denoise
    generators = [torch.Generator(canvas.device).manual_seed(seed)
                  for seed in (range(B) if seeds is None else seeds)]
    propose, select = REMASKING[s.remasking]
    if s.threshold is not None:
        select = select_above_threshold

    for block in range(s.n_blocks):
        end = P + (block + 1) * (s.gen_length // s.n_blocks)
        n_begin = (canvas[:, :end] == c.mask_id).sum(1)                # (B,)
        for step in count(-s.think if block == 0 else 0):              # below 0: think
            eligible = canvas == c.mask_id                             # (B, T)
            eligible[:, end:] = False
            steps_are_over = step == s.steps_per_block and s.threshold is None
            if steps_are_over or not eligible.any():
                break
            turn = Turn(eligible, n_begin, step, s, c, generators)
            # 1. write, run, read, update: one pass of the backbone and its memory
            logits, slots = denoise(backbone, memory, canvas, slots, maskable, attention_mask,
                                    turn)                              # (N, V), (B, M, d)
            # 2. a token for every eligible position, and how sure the model is of it
            tokens, confidence = propose(logits, turn)                 # (N,) both
            guess = canvas.masked_scatter(eligible, tokens)            # (B, T)
            confidence = spread(confidence, eligible)                  # (B, T)
            # 3. which of them to reveal: none while the memory thinks
            revealed = torch.zeros_like(eligible)                      # (B, T)
            if step >= 0:
                revealed = select(confidence, turn)
            # 4. reveal them; what is written stays
            canvas = torch.where(revealed, guess, canvas)
            if on_step:
                on_step(canvas, Pass(eligible, revealed, guess, confidence, slots))
            if memory:
                slots = CARRY[carry](memory, slots)
    return canvas


class Turn(NamedTuple):
    """Where the sampler stands in one pass: all that its small functions need to know."""
    eligible: Tensor                   # (B, T) bool, N of them True
    n_begin: Tensor                    # (B,): how many were masked when the block began
    step: int                          # of the block; below 0 while the memory thinks
    sampling: Sampling
    config: Config
    generators: list[torch.Generator]  # one for each row, so that none depends on its batch

    def uniform(self, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, width) in (0, 1), every row's part from its own stream."""
        n_by_row = self.eligible.sum(1).tolist()
        draws = [torch.rand(n, width, dtype=dtype, device=generator.device, generator=generator)
                 for n, generator in zip(n_by_row, self.generators)]
        return torch.cat(draws).clamp(min=torch.finfo(dtype).tiny)

    def gumbel(self, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return -torch.log(-torch.log(self.uniform(width, dtype)))


def denoise(backbone: Backbone, memory: MetaState | None, canvas: Tensor, slots: Tensor | None,
            maskable: Tensor, attention_mask: Tensor | None, turn: Turn
            ) -> tuple[Tensor, Tensor | None]:
    """Logits (N, V) of the eligible positions, and the new slots. With guidance a second copy of
    the batch, with a memory of its own, sees no prompt."""
    s, c, eligible = turn.sampling, turn.config, turn.eligible
    guided = s.cfg_scale > 0
    if guided:
        canvas = torch.cat((canvas, canvas.masked_fill(~maskable, c.mask_id)))     # (2 B, T)
        maskable, eligible = maskable.repeat(2, 1), eligible.repeat(2, 1)
        attention_mask = None if attention_mask is None else attention_mask.repeat(2, 1)
    if memory is None:
        logits = backbone(canvas, attention_mask, eligible)            # (N, V)
    else:
        h, new_slots = memory.step(backbone, canvas, slots, maskable=maskable, wanted=eligible,
                                   attention_mask=attention_mask)
        logits = backbone.head(h)                                      # (N, V)
        # A row that waits for others to finish their block must not think on meanwhile.
        at_work = eligible.any(1)[:, None, None]                       # (B, 1, 1)
        slots = torch.where(at_work, new_slots, slots)
    if guided:
        given, free = logits.chunk(2)
        logits = free + (s.cfg_scale + 1) * (given - free)
    if s.logits_eos_inf:
        logits[:, c.eos_id] = float("-inf")
    return logits, slots


# To propose: tokens (N,), never a mask, and a confidence (N,) from logits (N, V).

def propose_llada(logits: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
    """LLaDA: Gumbel-max tokens, and their probabilities without the noise. Ends of text or turn can
    be given confidence 0, here at every temperature (the original loses one above 0, issue 137)."""
    s, c = turn.sampling, turn.config
    allowed = logits.clone()
    allowed[:, c.mask_id] = float("-inf")
    if s.temperature > 0:
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        noise = turn.gumbel(logits.shape[1], wide)                     # (N, V)
        allowed = allowed.to(wide) + s.temperature * noise
    tokens = allowed.argmax(-1)                                        # (N,)
    if s.confidence_eos_eot_inf:
        ends = [i for i in (c.eos_id, c.eot_id) if i is not None and i < c.vocab_size]
        logits[:, ends] = float("-inf")
    p = logits.float().softmax(-1)                                     # (N, V)
    return tokens, p.gather(1, tokens[:, None])[:, 0]


def propose_dream(logits: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
    """Dream: tokens after temperature, top_p and top_k, and a confidence from the same filtered
    distribution: probability, margin between the two likeliest tokens, or negative entropy."""
    s, c = turn.sampling, turn.config
    if s.temperature > 0:
        logits = logits / s.temperature
    allowed = filtered(logits, s, c.mask_id).float()                   # (N, V)
    p = allowed.softmax(-1)                                            # (N, V)
    if s.temperature > 0:
        allowed = allowed + turn.gumbel(p.shape[1])
    allowed[:, c.mask_id] = float("-inf")
    tokens = allowed.argmax(-1)                                        # (N,)
    if s.remasking == "topk_margin":
        first, second = p.topk(2).values.unbind(-1)
        return tokens, first - second
    if s.remasking == "entropy":
        return tokens, (p * torch.log(p + 1e-10)).sum(-1)
    return tokens, p.gather(1, tokens[:, None])[:, 0]


def filtered(logits: Tensor, s: Sampling, mask_id: int) -> Tensor:
    """Logits (N, V) with all but the tokens of top_p and top_k at the lowest number. The likeliest
    token that is no mask always stays, so that there is one to write."""
    lowest = torch.finfo(logits.dtype).min
    kept = logits
    if s.top_p is not None and s.top_p < 1:
        ordered, index = kept.sort(descending=True)
        beyond = ordered.softmax(-1).cumsum(-1) > s.top_p              # (N, V)
        beyond = F.pad(beyond, (1, -1))            # the first one beyond top_p stays
        beyond = beyond.scatter(1, index, beyond)
        kept = kept.masked_fill(beyond, lowest)
    if s.top_k is not None:
        k = min(s.top_k, kept.shape[1])
        least = kept.topk(k).values[:, -1:]                            # (N, 1)
        kept = kept.masked_fill(kept < least, lowest)
    no_mask = logits.clone()
    no_mask[:, mask_id] = float("-inf")
    best = no_mask.argmax(-1, keepdim=True)                            # (N, 1)
    return kept.scatter(1, best, logits.gather(1, best))


def quota(turn: Turn) -> Tensor:
    """LLaDA's number of tokens for a step (B,): equal parts, the remainder in the first steps."""
    steps = turn.sampling.steps_per_block
    one_more = turn.step < turn.n_begin % steps
    return turn.n_begin // steps + one_more


def share(turn: Turn) -> Tensor:
    """Dream's share of what is masked now, from its timesteps; all of it in the last step."""
    steps = turn.sampling.steps_per_block
    timesteps = torch.linspace(1, 1e-3, steps + 1)
    timesteps[-1] = 0
    return 1 - timesteps[turn.step + 1] / timesteps[turn.step]


# To select what is revealed: from confidences (B, T), bool (B, T).

def select_quota(confidence: Tensor, turn: Turn) -> Tensor:
    """LLaDA: the surest ones, as many as the step's quota says."""
    return best_positions(confidence, turn.eligible, quota(turn))


def select_random_quota(confidence: Tensor, turn: Turn) -> Tensor:
    """LLaDA's other order: as many as the quota says, anywhere."""
    draws = turn.uniform(1)[:, 0]                                      # (N,)
    return best_positions(spread(draws, turn.eligible), turn.eligible, quota(turn))


def select_share(confidence: Tensor, turn: Turn) -> Tensor:
    """Dream: the surest ones, a share of what is masked; alg_temp draws them without replacement,
    the surer the likelier (Gumbel-top-k)."""
    alg_temp = turn.sampling.alg_temp
    if alg_temp > 0:
        noise = turn.gumbel(1)[:, 0]                                   # (N,)
        confidence = confidence / alg_temp + spread(noise, turn.eligible)
    n = (turn.eligible.sum(1) * share(turn)).int()                     # (B,)
    return best_positions(confidence, turn.eligible, n)


def select_by_chance(confidence: Tensor, turn: Turn) -> Tensor:
    """Dream's origin: each one with the probability that is the step's share."""
    draws = turn.uniform(1)[:, 0]                                      # (N,)
    return turn.eligible & (spread(draws, turn.eligible) < share(turn))


def select_above_threshold(confidence: Tensor, turn: Turn) -> Tensor:
    """Fast-dLLM: all with at least this confidence, and always the surest one."""
    one = torch.ones_like(turn.n_begin)                                # (B,)
    surest = best_positions(confidence, turn.eligible, one)
    return surest | (turn.eligible & (confidence >= turn.sampling.threshold))


REMASKING = {                          # how to propose and how to select
    "low_confidence": (propose_llada, select_quota),
    "random": (propose_llada, select_random_quota),
    "origin": (propose_dream, select_by_chance),
    "maskgit_plus": (propose_dream, select_share),
    "topk_margin": (propose_dream, select_share),
    "entropy": (propose_dream, select_share),
}
