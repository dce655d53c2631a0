"""Masked diffusion: the forward process, the losses that train backbone and memory, the samplers.

Backbone loss: LLaDA (arXiv 2502.09992) eq. 3, and its SFT form; the memory's: MetaState's K-step
unrolling as restated in PUMBA's eq. F.1. Samplers: LLaDA's generate.py, Dream's diffusion_generate
and the threshold of Fast-dLLM (arXiv 2505.22618), as variants of one loop.
"""
from __future__ import annotations

from itertools import count
from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from metastate import MetaState
from model import Backbone, InputError

# ---------------------------------------------------------------------------------- training


def cross_entropy(backbone: Backbone, h: torch.Tensor, targets: torch.Tensor, chunk: int = 256
                  ) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy (N,) of picked h (N, D), and the log of the highest probability (N,).

    Chunk by chunk, logits recomputed in the backward pass: there are never more than (chunk, V).
    """
    def part(h, targets):
        logits = backbone.head(h).float()
        total = logits.logsumexp(-1)
        return total - logits.gather(1, targets[:, None])[:, 0], logits.detach().amax(-1) - total.detach()

    parts = [checkpoint(part, *pair, use_reentrant=False) if backbone.checkpointing else part(*pair)
             for pair in zip(h.split(chunk), targets.split(chunk))]
    ce, sure = zip(*parts)
    return torch.cat(ce), torch.cat(sure)


def diffusion_loss(backbone: Backbone, ids: torch.Tensor, maskable: torch.Tensor, t: torch.Tensor,
                   noise: torch.Tensor, eps: float = 1e-3) -> torch.Tensor:
    """Denoising loss of one random time per row, weighted by 1/t.

    ids, maskable (B, T); t (B,) and noise (B, T) uniform in [0, 1). With everything maskable this is
    LLaDA's pretraining loss; with the answer and its end-of-text padding, its SFT loss.
    """
    p = (1 - eps) * t[:, None] + eps                                           # mask_ratio (B, 1)
    masked = maskable & (noise < p)
    h, context = backbone.embed(ids.masked_fill(masked, backbone.config.mask_id))
    h = backbone.run(h, context, 0, len(backbone.layers))
    ce, _ = cross_entropy(backbone, backbone.pick(h, masked), ids[masked])
    weight = (1 / (p * maskable.sum(1, keepdim=True))).expand_as(noise)[masked]
    return (ce * weight).sum() / len(ids)


def choose(score: torch.Tensor, eligible: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """Per row the n (B,) eligible positions of highest score (B, T), ties to the left; bool (B, T)."""
    order = score.masked_fill(~eligible, float("-inf")).argsort(dim=1, descending=True, stable=True)
    return eligible & (order.argsort(1) < n[:, None])


def carry_over(carry: str, memory: MetaState, slots: torch.Tensor) -> torch.Tensor:
    """What becomes of the memory between two steps: the method (keep), its controls (reset,
    shuffle) and an ablation of its training (detach)."""
    if carry == "reset":
        return memory.initial(len(slots))
    if carry == "shuffle":                             # every sample goes on with another's memory
        return slots.roll(1, dims=0)
    return slots.detach() if carry == "detach" else slots


def unroll(backbone: Backbone, memory: MetaState, ids: torch.Tensor, maskable: torch.Tensor,
           counts: torch.Tensor, noise: torch.Tensor, by_confidence: torch.Tensor, *, lam: float,
           carry: str = "keep") -> tuple[torch.Tensor, torch.Tensor]:
    """K denoising steps from all masked to all revealed; the memory runs through all of them.

        L = sum_k w_k [lam * dense_k + (1 - lam) * reveal_k],    w_k = n_k / N

    ids, maskable, noise (B, T); counts (B, K): n_k, which sum to N, the maskable positions of the
    row; by_confidence (B,) bool: rows that reveal where the model is surest, not at random.
    dense_k averages the cross-entropy over what is masked at step k, reveal_k over what is revealed.
    Returns the mean of L over rows, and the mean of dense_k for each k, (K,).
    """
    mask_id, K = backbone.config.mask_id, counts.shape[1]
    canvas = ids.masked_fill(maskable, mask_id)
    masked, slots = maskable, memory.initial(len(ids))
    loss, dense_by_step = 0.0, []
    for k in range(K):
        # 1. denoise with the memory of the step before
        h, slots = memory.step(backbone, canvas, slots, maskable=maskable, rows=masked)
        # 2. cross-entropy wherever a token is masked
        ce, sure = cross_entropy(backbone, h, ids[masked])
        ce = torch.zeros_like(noise).masked_scatter(masked, ce)
        # 3. the n_k positions to reveal
        score = torch.where(by_confidence[:, None],
                            torch.zeros_like(noise).masked_scatter(masked, sure), noise)
        revealed = choose(score, masked, counts[:, k])
        # 4. L_k
        dense = ce.sum(1) / masked.sum(1).clamp(min=1)
        reveal = (ce * revealed).sum(1) / counts[:, k].clamp(min=1)
        weight = counts[:, k] / maskable.sum(1)
        loss = loss + (weight * (lam * dense + (1 - lam) * reveal)).mean()
        dense_by_step.append(dense.detach().mean())
        # 5. reveal the ground truth and carry the memory on; the only gradient between steps
        masked = masked & ~revealed
        canvas = ids.masked_fill(masked, mask_id)
        slots = carry_over(carry, memory, slots)
    return loss, torch.stack(dense_by_step)


# ---------------------------------------------------------------------------------- sampling


def gumbel(uniform: torch.Tensor) -> torch.Tensor:
    return -torch.log(-torch.log(uniform))


def llada_tokens(logits: torch.Tensor, uniform: Callable, temperature: float, eot_ids: list[int],
                 mask_id: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """LLaDA: Gumbel-max tokens (N,) of logits (N, V), and their probabilities without the noise.

    eot_ids get confidence 0: at every temperature, where the original loses end-of-text above 0
    (its issue 137). A mask is never chosen as a token.
    """
    kept = logits[:, mask_id].clone()
    logits[:, mask_id] = float("-inf")
    noisy = logits if temperature == 0 else (
        logits.double() + temperature * gumbel(uniform(logits.shape[1], torch.float64)))
    tokens = noisy.argmax(-1)
    logits[:, mask_id] = kept
    logits[:, eot_ids] = float("-inf")
    return tokens, logits.to(dtype).softmax(-1).gather(1, tokens[:, None])[:, 0]


def dream_tokens(logits: torch.Tensor, uniform: Callable, temperature: float, remasking: str,
                 mask_id: int, top_p: float | None, top_k: int | None, dtype: torch.dtype
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """Dream: tokens (N,) of logits (N, V) after temperature, top_p and top_k, and a confidence
    from the same filtered distribution. A mask is never chosen as a token."""
    lowest = torch.finfo(logits.dtype).min
    if temperature > 0:
        logits = logits / temperature
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(descending=True)
        beyond = ordered.softmax(-1).cumsum(-1) > top_p
        beyond = F.pad(beyond[:, :-1], (1, 0))                   # the first one above top_p stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), lowest)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, lowest)
    p = logits.to(dtype).softmax(-1)
    noisy = p.clone() if temperature == 0 else p.log() + gumbel(uniform(p.shape[1], dtype))
    noisy[:, mask_id] = float("-inf")
    tokens = noisy.argmax(-1)
    if remasking == "topk_margin":
        best = p.topk(2).values
        return tokens, best[:, 0] - best[:, 1]
    if remasking == "entropy":
        return tokens, (p * torch.log(p + 1e-10)).sum(-1)
    return tokens, p.gather(1, tokens[:, None])[:, 0]            # maskgit_plus


LLADA_REMASKING = ("low_confidence", "random")
DREAM_REMASKING = ("origin", "maskgit_plus", "topk_margin", "entropy")


@torch.no_grad()
def generate(backbone: Backbone, prompt_ids: torch.Tensor, *, gen_length: int, steps: int,
             block_length: int | None = None, remasking: str = "low_confidence",
             temperature: float = 0.0, cfg_scale: float = 0.0, threshold: float | None = None,
             top_p: float | None = None, top_k: int | None = None, alg_temp: float = 0.0,
             logits_eos_inf: bool = False, confidence_eos_eot_inf: bool = False,
             attention_mask: torch.Tensor | None = None, memory: MetaState | None = None,
             carry: str = "keep", reset_at_block: bool = False, seeds: Sequence[int] | None = None,
             confidence_dtype: torch.dtype = torch.float32,
             on_step: Callable | None = None) -> torch.Tensor:
    """Denoise gen_length masks after prompt_ids (B, P), and any mask inside it; ids (B, P + gen).

    steps are shared out evenly over blocks of block_length (default: one block). attention_mask
    (B, P): 0 at left padding. remasking: low_confidence or random with LLaDA's schedule; origin,
    maskgit_plus, topk_margin or entropy with Dream's. threshold: reveal all that is surer, at least
    one, and take as many steps as that needs. memory: with carry "keep", or a control (carry_over).
    seeds (B,): each row's own random stream, so that rows depend neither on each other nor on the
    batch. on_step(canvas, revealed, confidence, trace) sees every step. Raises InputError.
    """
    c, device, (B, P) = backbone.config, prompt_ids.device, prompt_ids.shape
    block_length = block_length or gen_length
    n_blocks = gen_length // block_length if gen_length else 1
    if gen_length and gen_length % block_length or steps % n_blocks or steps < 1:
        raise InputError(f"gen_length {gen_length}, block_length {block_length} and steps {steps} do "
                         "not divide: blocks must fill gen_length, and steps share out over blocks")
    if remasking not in LLADA_REMASKING + DREAM_REMASKING:
        raise InputError(f"remasking {remasking!r} is unknown; "
                         f"take one of {', '.join(LLADA_REMASKING + DREAM_REMASKING)}")
    if threshold is not None and remasking not in ("low_confidence", "maskgit_plus"):
        raise InputError(f"threshold needs probabilities; remasking {remasking!r} has none")
    canvas = F.pad(prompt_ids, (0, gen_length), value=c.mask_id)
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (0, gen_length), value=1)
    maskable = canvas == c.mask_id
    twice = (lambda x: x if x is None else torch.cat((x, x))) if cfg_scale > 0 else (lambda x: x)
    slots = memory and memory.initial(len(twice(canvas)))
    generators = [torch.Generator(device).manual_seed(seed)
                  for seed in (range(B) if seeds is None else seeds)]
    eot_ids = [i for i in (c.eos_id, c.eot_id) if i is not None] if confidence_eos_eot_inf else []
    timesteps = torch.linspace(1, 1e-3, steps // n_blocks + 1)
    column = torch.arange(canvas.shape[1], device=device)

    for end in range(P + gen_length - (n_blocks - 1) * (block_length or 0), P + gen_length + 1,
                     block_length or 1):
        begin = (maskable & (canvas == c.mask_id) & (column < end)).sum(1)
        if memory and reset_at_block:
            slots = memory.initial(len(slots))
        for step in count():
            eligible = maskable & (canvas == c.mask_id) & (column < end)               # (B, T)
            if step == steps // n_blocks and threshold is None or not eligible.any():
                break

            def uniform(width: int, dtype: torch.dtype) -> torch.Tensor:               # (N, width)
                tiny = torch.finfo(dtype).tiny
                return torch.cat([torch.rand(n, width, dtype=dtype, device=device, generator=g)
                                  for g, n in zip(generators, eligible.sum(1).tolist())]).clamp(tiny)

            # 1. one pass; with guidance a second copy of the batch sees no prompt
            seen, rows, trace = canvas, twice(eligible), []
            if cfg_scale > 0:
                seen = torch.cat((canvas, canvas.masked_fill(~maskable, c.mask_id)))
            if memory is None:
                logits = backbone(seen, twice(attention_mask), rows)
            else:
                h, slots = memory.step(backbone, seen, slots, maskable=twice(maskable), rows=rows,
                                       attention_mask=twice(attention_mask), trace=trace)
                logits = backbone.head(h)                                              # (N, V)
                slots = carry_over(carry, memory, slots)
            if cfg_scale > 0:
                conditional, free = logits.chunk(2)
                logits = free + (cfg_scale + 1) * (conditional - free)
            if logits_eos_inf:
                logits[:, c.eos_id] = float("-inf")
            # 2. a token for every eligible position, and how sure it is
            if remasking in LLADA_REMASKING:
                tokens, sure = llada_tokens(logits, uniform, temperature, eot_ids, c.mask_id,
                                            confidence_dtype)
            else:
                tokens, sure = dream_tokens(logits, uniform, temperature, remasking, c.mask_id,
                                            top_p, top_k, confidence_dtype)
            if remasking in ("random", "origin"):
                sure = uniform(1, torch.float32)[:, 0]
            confidence = torch.zeros_like(canvas, dtype=sure.dtype).masked_scatter(eligible, sure)
            # 3. which of them to reveal
            left, last = eligible.sum(1), step == steps // n_blocks - 1
            if threshold is not None:
                revealed = choose(confidence, eligible, left.clamp(max=1))
                revealed |= eligible & (confidence >= threshold)
            elif remasking in LLADA_REMASKING:
                share = begin // (steps // n_blocks) + (step < begin % (steps // n_blocks))
                revealed = choose(confidence, eligible, share)
            else:
                share = 1 - timesteps[step + 1] / timesteps[step]
                if remasking == "origin":
                    revealed = eligible & ((confidence < share) | last)
                else:
                    if alg_temp > 0:               # Gumbel-top-k: draws without replacement
                        sure = sure / alg_temp + gumbel(uniform(1, sure.dtype)[:, 0])
                        confidence = confidence.masked_scatter(eligible, sure)
                    revealed = choose(confidence, eligible, left if last else (left * share).int())
            # 4. write them; what is written stays
            proposal = canvas.masked_scatter(eligible, tokens)
            canvas = torch.where(revealed, proposal, canvas)
            if on_step:
                on_step(canvas, revealed, confidence, trace)
    return canvas
