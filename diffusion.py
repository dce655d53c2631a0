"""Masked diffusion: the losses that train backbone and memory, and the sampler.

Backbone loss: LLaDA (arXiv 2502.09992) eq. 3 and its SFT form. Memory loss: MetaState's K-step
unrolling, as restated in PUMBA's eq. F.1 (arXiv 2609.37974). Sampler: LLaDA's generate.py, Dream's
diffusion_generate, and the threshold and dual cache of Fast-dLLM (arXiv 2505.22618) are one loop,
generate, with a few small functions below it for what they do differently. Departures from the
originals: no mask is ever written, confidences are float32, Dream's counts are taken by row, and
end-of-text can be held back at every temperature.
"""
from dataclasses import dataclass
from itertools import count
from typing import Callable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metastate import MetaState, masked_fraction
from model import Backbone, Config, ensure, recomputed

# -------------------------------------------------------------------------------------- LOSSES


def cross_entropy(backbone: Backbone, h: Tensor, targets: Tensor, chunk: int = 256
                  ) -> tuple[Tensor, Tensor]:
    """Of picked h (N, D): the cross-entropy with targets (N,), and the log of the highest
    probability, both (N,). With backbone.recompute there are never more logits than (chunk, V), nor
    in the backward pass."""

    def score(h: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = backbone.head(h).float().log_softmax(-1)               # (chunk, V)
        return -log_p.gather(1, targets[:, None])[:, 0], log_p.amax(-1).detach()

    pieces = zip(h.split(chunk), targets.split(chunk))
    results = [recomputed(score, *piece, enabled=backbone.recompute) for piece in pieces]
    losses, confidences = zip(*results)
    return torch.cat(losses), torch.cat(confidences)


def diffusion_loss(backbone: Backbone, ids: Tensor, maskable: Tensor, t: Tensor, noise: Tensor,
                   visible_share: float = 0.0, eps: float = 1e-3) -> Tensor:
    """Denoising loss at one time per row. A masked token weighs 1 / p, where p is its chance to be
    masked; a visible one that is scored weighs 1. ids, maskable (B, T); t (B,) and noise (B, T)
    uniform in [0, 1): here the time is drawn, not counted as in the memory. With everything
    maskable this is LLaDA's pretraining loss; with the answer and its end-of-text padding maskable,
    its SFT loss. visible_share: the share of the maskable tokens that is scored even where it is
    visible, as BERT scores unchanged tokens."""
    p = (1 - eps) * t[:, None] + eps                                   # (B, 1) mask ratio
    masked = maskable & (noise < p)                                    # (B, T)
    # masked takes the low end of the noise, what is scored though visible the high end
    scored = masked | (maskable & (noise > 1 - visible_share))         # (B, T)
    h = backbone.embed(ids.masked_fill(masked, backbone.config.mask_id))       # (B, T, D)
    h = backbone.run(h, backbone.context(ids))                         # (B, T, D)
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
    there. ids, maskable (B, T); counts (B, K): n_k, in sum the row's maskable positions; noise
    (B, T) uniform in [0, 1): a random order of revealing, the highest first; by_confidence (B,)
    bool: rows that reveal where the model is surest instead (ours); carry: see CARRY. think (ours):
    passes over the unwritten answer before step 1, whose slots the unroll begins with, so that a
    memory learns to keep what it knows for longer than K steps; under reset, which forgets them,
    none.
    Returns the mean of L over rows, and that of dense_k for each k, (K,), in which a row with
    nothing left to reveal counts as 0.
    """
    mask_id = backbone.config.mask_id
    # without an attention mask: all padding is end-of-text, which is to be learned
    context = backbone.context(ids)
    anchors = memory.anchors(maskable)
    slots = memory.initial(len(ids))                                   # (B, M, d)
    n_total = maskable.sum(1)          # (B,), never 0: an answer has at least its end-of-text

    def step(masked: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """A step over the canvas with these positions (B, T) masked: h (B, T, D), new slots."""
        canvas = ids.masked_fill(masked, mask_id)                      # (B, T)
        t = masked_fraction(canvas, maskable, mask_id)                 # (B,)
        return memory.step(backbone, canvas, slots, t=t, anchors=anchors, context=context)

    n_think = 0 if carry == "reset" else think
    with torch.no_grad():              # here no gradient: after these passes initial_slots get none
        for _ in range(n_think):
            _, slots = step(maskable, slots)
            slots = CARRY[carry](memory, slots)

    loss = 0.0
    dense_by_step = []
    masked = maskable                                                  # (B, T)
    for k in range(counts.shape[1]):
        n_k = counts[:, k]                                             # (B,)

        # 1. denoise with the memory of the step before
        h, slots = step(masked, slots)                                 # (B, T, D), (B, M, d)

        # 2. cross-entropy wherever a token is masked, and how sure the model is there
        picked = backbone.pick(h, masked)                              # (N, D), N may be 0
        ce, top_log_p = cross_entropy(backbone, picked, ids[masked])   # (N,) both
        ce = spread(ce, masked)                                        # (B, T)
        log_p = spread(top_log_p, masked)      # (B, T), 0 elsewhere, which best_positions ignores

        # 3. the n_k positions to reveal
        score = torch.where(by_confidence[:, None], log_p, noise)      # (B, T)
        revealed = best_positions(score, masked, n_k)                  # (B, T)

        # 4. this step's term of L
        dense_loss = ce.sum(1) / masked.sum(1).clamp(min=1)            # (B,)
        reveal_loss = (ce * revealed).sum(1) / n_k.clamp(min=1)        # (B,)
        w_k = n_k / n_total                                            # (B,)
        loss = loss + (w_k * (lam * dense_loss + (1 - lam) * reveal_loss)).mean()
        dense_by_step.append(dense_loss.detach().mean())

        # 5. reveal the ground truth: no gradient goes through tokens
        masked = masked & ~revealed

        # 6. carry the slots on: the gradient's only path from a step to the one before
        slots = CARRY[carry](memory, slots)
    return loss, torch.stack(dense_by_step)


# ------------------------------------------------------------------------------------ SAMPLING


@dataclass(frozen=True)
class Sampling:
    """How an answer is denoised. Raises InputError for settings that cannot work together."""
    gen_length: int = 128              # tokens of the answer; 0: only the masks in the prompt
    steps: int = 128                   # passes that reveal, shared out evenly over the blocks
    block_length: int | None = None    # the answer is written block by block; None: all at once
    cache: bool = False                # Fast-dLLM's dual cache: after the first pass of a block
                                       # only the block is run, the rest is as it was then
    think: int = 0                     # passes before the first token, which change the memory only
    threshold: float | None = None     # instead of steps: reveal every token with at least this
                                       # confidence, in as many passes as that takes
    remasking: str = "low_confidence"  # how the tokens to reveal are chosen, see REMASKING below
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
        ensure(self.block_length or not self.cache,
               "cache keeps what stands outside a block; give block_length")

    @property
    def n_blocks(self) -> int:
        return max(1, self.gen_length // self.block_length) if self.block_length else 1

    @property
    def steps_per_block(self) -> int:
        return self.steps // self.n_blocks


class Report(NamedTuple):
    """What on_step is told of a pass beside the canvas."""
    eligible: Tensor                   # (B, T) bool: what is masked, up to the end of the block
    revealed: Tensor                   # (B, T) bool: what it did reveal
    guess: Tensor                      # (B, T): the canvas with what it would write where eligible
    confidence: Tensor                 # (B, T): how sure it is of that
    slots: Tensor | None               # (B, M, d) after the pass; with guidance (2 B, M, d)


@torch.no_grad()
def generate(backbone: Backbone, prompt_ids: Tensor, *, memory: MetaState | None = None,
             carry: str = "keep", attention_mask: Tensor | None = None,
             answer_start: int | None = None, seeds: Sequence[int] | None = None,
             on_step: Callable[[Tensor, Report], None] | None = None, **settings) -> Tensor:
    """Fill the masks in prompt_ids (B, P), and gen_length more after it; (B, P + gen_length).

    settings: see Sampling. attention_mask (B, P): 0 at left padding. carry: see CARRY.
    answer_start: where the answer begins, if some of it stands in prompt_ids already. seeds (B,):
    of every row's own random stream, by default 0 .. B - 1. In float32 no row depends on the
    others, on padding or on the batch, except under shuffle. on_step(canvas, report) sees every
    pass.
    """
    sampling = Sampling(**settings)
    c = backbone.config
    B, P = prompt_ids.shape
    check_fit(sampling, c, carry, prompt_ids)
    canvas = F.pad(prompt_ids, (0, sampling.gen_length), value=c.mask_id)      # (B, T)
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (0, sampling.gen_length), value=1)
    maskable = canvas == c.mask_id                                     # (B, T), T = P + gen_length
    if answer_start is not None:       # the memory's anchors and time are those of a whole answer
        maskable[:, answer_start:] = True
    trajectory = Trajectory(backbone, memory, sampling, maskable, attention_mask)
    # None without a memory; with guidance 2 B rows, with and without prompt
    slots = memory.initial(len(trajectory.maskable)) if memory else None       # (B, M, d)
    generators = [torch.Generator(canvas.device).manual_seed(seed)
                  for seed in (range(B) if seeds is None else seeds)]
    propose, select = REMASKING[sampling.remasking]
    if sampling.threshold is not None:
        select = select_above_threshold

    block_length = sampling.gen_length // sampling.n_blocks
    for i in range(sampling.n_blocks):
        # The columns of this block. Masks in the prompt are filled with the first one; with
        # gen_length 0 there are no others.
        block = slice(P + i * block_length, P + (i + 1) * block_length)
        n_begin = (canvas[:, :block.stop] == c.mask_id).sum(1)         # (B,) to fill in this block
        first_step = -sampling.think if i == 0 else 0  # steps below 0 reveal nothing: they think
        for step in count(first_step):
            eligible = canvas == c.mask_id                             # (B, T)
            eligible[:, block.stop:] = False
            out_of_steps = sampling.threshold is None and step == sampling.steps_per_block
            if out_of_steps or not eligible.any():
                break
            state = SamplerState(eligible, n_begin, step, block, sampling, c, generators)

            # 1. write, run, read, update: one pass of the backbone and its memory
            logits, slots = trajectory.denoise(canvas, slots, state)   # (N, V), (B, M, d)

            # 2. a token for every eligible position, and how sure the model is of it
            tokens, confidence = propose(logits, state)                # (N,) both
            guess = canvas.masked_scatter(eligible, tokens)            # (B, T)
            confidence = spread(confidence, eligible)                  # (B, T)

            # 3. which of them to reveal: none while the memory thinks, see reveal
            revealed = reveal(confidence, state, select)               # (B, T)

            # 4. reveal them; what is written stays
            canvas = torch.where(revealed, guess, canvas)
            if on_step:
                on_step(canvas, Report(eligible, revealed, guess, confidence, slots))
            if memory:
                slots = CARRY[carry](memory, slots)
    return canvas


def check_fit(sampling: Sampling, c: Config, carry: str, prompt_ids: Tensor) -> None:
    """Raise InputError for settings that do not fit this model, batch or prompt."""
    can_shuffle = len(prompt_ids) > 1 and sampling.cfg_scale == 0
    ensure(carry != "shuffle" or can_shuffle, "carry = shuffle exchanges memories between the "
           "samples of a batch; give two or more, and no guidance")
    if sampling.cache:
        ensure(not (prompt_ids == c.mask_id).any(), "cache runs the block alone, and the prompt "
               "has masks to fill; give no cache")
        # Dream's first pass of a block then reveals one token, see reveal. A quota never catches
        # up; the other ways reveal all that is left in the last step, if that is another one.
        by_quota = sampling.remasking in ("low_confidence", "random")
        last_step_fills = sampling.steps_per_block > 1 and not by_quota
        fills = sampling.threshold is not None or last_step_fills
        ensure(fills or not c.shift, "under cache Dream's first pass of a block reveals its first "
               "token only; give threshold, or one of its own ways of remasking with two steps or "
               "more for a block")


class SamplerState(NamedTuple):
    """Where the sampler stands in one pass: all that its small functions need to know."""
    eligible: Tensor                   # (B, T) bool, N of them True
    n_begin: Tensor                    # (B,): how many were masked when the block began
    step: int                          # of the block; below 0 while the memory thinks
    block: slice                       # its columns of the canvas
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


class Trajectory:
    """The passes over one canvas, and what they share. B2 is B, or 2 B with guidance: the batch,
    and below it a copy that sees no prompt and has a memory of its own."""

    def __init__(self, backbone: Backbone, memory: MetaState | None, sampling: Sampling,
                 maskable: Tensor, attention_mask: Tensor | None):
        if sampling.cfg_scale > 0:
            maskable = maskable.repeat(2, 1)
            attention_mask = None if attention_mask is None else attention_mask.repeat(2, 1)
        self.backbone = backbone
        self.memory = memory
        self.maskable = maskable                                       # (B2, T)
        # a context needs the shape of a canvas, not its tokens
        self.context = backbone.context(maskable, attention_mask, cache=sampling.cache)
        self.anchors = memory.anchors(maskable, attention_mask) if memory else None

    def denoise(self, canvas: Tensor, slots: Tensor | None, state: SamplerState
                ) -> tuple[Tensor, Tensor | None]:
        """Logits (N, V) of the N eligible positions, and the new slots (B2, M, d)."""
        sampling, c = state.sampling, state.config
        eligible = state.eligible
        if sampling.cfg_scale > 0:
            is_answer = self.maskable[:len(canvas)]                    # (B, T)
            without_prompt = torch.where(is_answer, canvas, c.mask_id)         # (B, T)
            canvas = torch.cat((canvas, without_prompt))               # (B2, T)
            eligible = eligible.repeat(2, 1)                           # (B2, T)
        t = masked_fraction(canvas, self.maskable, c.mask_id)          # (B2,) of the whole canvas

        # What is run: all T columns while thinking and in the first pass of a block; in its later
        # passes, under the cache, only its own R columns. The Mixer then reads the block alone.
        run_ids, run_eligible = canvas, eligible                       # (B2, R) both, here R = T
        context, anchors = self.context, self.anchors
        if sampling.cache and state.step > 0:
            run_ids, run_eligible = canvas[:, state.block], eligible[:, state.block]
            context = context.at(state.block)
            if self.memory:
                anchors = anchors.at(state.block)

        if self.memory is None:
            h = self.backbone.run(self.backbone.embed(run_ids), context)       # (B2, R, D)
        else:
            h, new_slots = self.memory.step(self.backbone, run_ids, slots, t=t, anchors=anchors,
                                            context=context)
            # A row with nothing eligible waits for the others: its slots stay as they are, so that
            # its answer does not depend on its batch.
            at_work = eligible.any(1)[:, None, None]                   # (B2, 1, 1)
            slots = torch.where(at_work, new_slots, slots)             # (B2, M, d)
        logits = self.backbone.head(self.backbone.pick(h, run_eligible))       # (N, V), or (2 N, V)

        if sampling.cfg_scale > 0:
            given, unprompted = logits.chunk(2)                        # (N, V) each
            logits = unprompted + (sampling.cfg_scale + 1) * (given - unprompted)
        if sampling.logits_eos_inf:
            logits[:, c.eos_id] = float("-inf")
        return logits, slots


# To propose: tokens (N,), never a mask, and a confidence (N,) from logits (N, V).

def propose_llada(logits: Tensor, state: SamplerState) -> tuple[Tensor, Tensor]:
    """LLaDA: Gumbel-max tokens, and their probabilities without the noise. Ends of text or turn can
    be given confidence 0, here at every temperature (the original loses one above 0, issue 137)."""
    sampling, c = state.sampling, state.config
    allowed = logits.clone()
    allowed[:, c.mask_id] = float("-inf")
    if sampling.temperature > 0:
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        noise = state.gumbel(logits.shape[1], wide)                    # (N, V)
        allowed = allowed.to(wide) + sampling.temperature * noise
    tokens = allowed.argmax(-1)                                        # (N,)
    scores = logits.float()
    if sampling.confidence_eos_eot_inf:
        ends = [i for i in (c.eos_id, c.eot_id) if i is not None and i < c.vocab_size]
        scores = scores.clone()
        scores[:, ends] = float("-inf")
    p = scores.softmax(-1)                                             # (N, V)
    return tokens, p.gather(1, tokens[:, None])[:, 0]


def propose_dream(logits: Tensor, state: SamplerState) -> tuple[Tensor, Tensor]:
    """Dream: tokens after temperature, top_p and top_k, and a confidence from the same filtered
    distribution: probability, margin between the two likeliest tokens, or negative entropy."""
    sampling, c = state.sampling, state.config
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    allowed = filtered(logits, sampling, c.mask_id).float()            # (N, V)
    p = allowed.softmax(-1)                                            # (N, V)
    if sampling.temperature > 0:
        allowed = allowed + state.gumbel(p.shape[1])
    allowed[:, c.mask_id] = float("-inf")
    tokens = allowed.argmax(-1)                                        # (N,)
    if sampling.remasking == "topk_margin":
        first, second = p.topk(2).values.unbind(-1)
        return tokens, first - second
    if sampling.remasking == "entropy":
        return tokens, (p * torch.log(p + 1e-10)).sum(-1)
    return tokens, p.gather(1, tokens[:, None])[:, 0]


def filtered(logits: Tensor, sampling: Sampling, mask_id: int) -> Tensor:
    """Logits (N, V) with all but the tokens of top_p and top_k at the lowest number. The likeliest
    token that is no mask always stays, so that there is one to write."""
    lowest = torch.finfo(logits.dtype).min
    kept = logits
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, index = kept.sort(descending=True)
        beyond = ordered.softmax(-1).cumsum(-1) > sampling.top_p       # (N, V)
        beyond = F.pad(beyond, (1, -1))            # the first one beyond top_p stays
        beyond = torch.zeros_like(beyond).scatter(1, index, beyond)    # in the order of tokens
        kept = kept.masked_fill(beyond, lowest)
    if sampling.top_k is not None:
        k = min(sampling.top_k, kept.shape[1])
        least = kept.topk(k).values[:, -1:]                            # (N, 1)
        kept = kept.masked_fill(kept < least, lowest)
    no_mask = logits.clone()
    no_mask[:, mask_id] = float("-inf")
    best = no_mask.argmax(-1, keepdim=True)                            # (N, 1)
    return kept.scatter(1, best, logits.gather(1, best))


# To select what is revealed: from confidences (B, T), bool (B, T).

def reveal(confidence: Tensor, state: SamplerState, select: Callable) -> Tensor:
    """What this pass reveals: nothing while the memory thinks; under the cache, in Dream's first
    pass of a block, that block's first token; else what the settings select."""
    if state.step < 0:
        return torch.zeros_like(state.eligible)
    if state.sampling.cache and state.config.shift and state.step == 0:
        # Fast-dLLM with Dream: what scores the first token of a block stands before the block, and
        # only this pass runs it. So, as there, this pass reveals that token, and no other.
        column = torch.arange(state.eligible.shape[1], device=confidence.device)       # (T,)
        return state.eligible & (column == state.block.start)
    return select(confidence, state)


def quota(state: SamplerState) -> Tensor:
    """LLaDA's number of tokens for a step (B,): equal parts, the remainder in the first steps."""
    steps = state.sampling.steps_per_block
    one_more = state.step < state.n_begin % steps
    return state.n_begin // steps + one_more


def dream_share(state: SamplerState) -> Tensor:
    """Dream's share of what is masked now, from its timesteps; all of it in the last step."""
    steps = state.sampling.steps_per_block
    timesteps = torch.linspace(1, 1e-3, steps + 1)
    timesteps[-1] = 0
    return 1 - timesteps[state.step + 1] / timesteps[state.step]


def select_quota(confidence: Tensor, state: SamplerState) -> Tensor:
    """LLaDA: the surest ones, as many as the step's quota says."""
    return best_positions(confidence, state.eligible, quota(state))


def select_random_quota(confidence: Tensor, state: SamplerState) -> Tensor:
    """LLaDA's other order: as many as the quota says, anywhere."""
    draws = state.uniform(1)[:, 0]                                     # (N,)
    return best_positions(spread(draws, state.eligible), state.eligible, quota(state))


def select_share(confidence: Tensor, state: SamplerState) -> Tensor:
    """Dream: the surest ones, a share of what is masked; alg_temp draws them without replacement,
    the surer the likelier (Gumbel-top-k)."""
    alg_temp = state.sampling.alg_temp
    if alg_temp > 0:
        noise = state.gumbel(1)[:, 0]                                  # (N,)
        confidence = confidence / alg_temp + spread(noise, state.eligible)
    n = (state.eligible.sum(1) * dream_share(state)).int()             # (B,)
    return best_positions(confidence, state.eligible, n)


def select_by_chance(confidence: Tensor, state: SamplerState) -> Tensor:
    """Dream's origin: each one with the probability that is the step's share."""
    draws = state.uniform(1)[:, 0]                                     # (N,)
    return state.eligible & (spread(draws, state.eligible) < dream_share(state))


def select_above_threshold(confidence: Tensor, state: SamplerState) -> Tensor:
    """Fast-dLLM: all with at least this confidence, and always the surest one."""
    one = torch.ones_like(state.n_begin)                               # (B,)
    surest = best_positions(confidence, state.eligible, one)
    return surest | (state.eligible & (confidence >= state.sampling.threshold))


REMASKING = {                          # how to propose and how to select
    "low_confidence": (propose_llada, select_quota),
    "random": (propose_llada, select_random_quota),
    "origin": (propose_dream, select_by_chance),
    "maskgit_plus": (propose_dream, select_share),
    "topk_margin": (propose_dream, select_share),
    "entropy": (propose_dream, select_share),
}
