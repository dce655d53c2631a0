"""Masked diffusion: the forward process, the losses that train backbone and memory, the samplers.

Backbone loss: LLaDA (arXiv 2502.09992) eq. 3 and its SFT form. Memory loss: MetaState's K-step
unrolling, as restated in PUMBA's eq. F.1. Samplers: LLaDA's generate.py, Dream's diffusion_generate
and the threshold of Fast-dLLM (arXiv 2505.22618), as variants of one loop.
"""
from itertools import count
from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metastate import MetaState
from model import Backbone, ensure

def cross_entropy(backbone: Backbone, h: Tensor, targets: Tensor, chunk: int = 256) -> tuple:
    """Cross-entropy (N,) of picked h (N, D), and the log of the highest probability (N,). There are
    never more logits than (chunk, V): the backward pass computes them again."""
    def part(h, targets):
        logits = backbone.head(h).float()
        total = logits.logsumexp(-1)
        return total - logits.gather(1, targets[:, None])[:, 0], (logits.amax(-1) - total).detach()
    parts = [checkpoint(part, *pair, use_reentrant=False) if backbone.checkpointing else part(*pair)
             for pair in zip(h.split(chunk), targets.split(chunk))]
    return tuple(map(torch.cat, zip(*parts)))

def diffusion_loss(backbone: Backbone, ids: Tensor, maskable: Tensor, t: Tensor, noise: Tensor,
                   keep: float = 0.0, eps: float = 1e-3) -> Tensor:
    """Denoising loss at one time per row, weighted by 1/t. ids, maskable (B, T); t (B,) and noise
    (B, T) uniform in [0, 1). With everything maskable this is LLaDA's pretraining loss; with the
    answer and its end-of-text padding maskable, its SFT loss. keep: a share of the maskable tokens
    that is scored even where it is visible, as BERT's unchanged tokens are."""
    p = (1 - eps) * t[:, None] + eps                                           # mask_ratio (B, 1)
    masked = maskable & (noise < p)
    scored = masked | maskable & (noise > 1 - keep)
    h, context = backbone.embed(ids.masked_fill(masked, backbone.config.mask_id))
    h = backbone.run(h, context, 0, len(backbone.layers))
    ce, _ = cross_entropy(backbone, backbone.pick(h, scored), ids[scored])
    weight = torch.where(masked, 1 / p, 1.0) / maskable.sum(1, keepdim=True)
    return (ce * weight[scored]).sum() / len(ids)

def choose(score: Tensor, eligible: Tensor, n: Tensor) -> Tensor:
    """The n (B,) eligible positions of highest score in each row, ties to the left; bool (B, T)."""
    order = score.masked_fill(~eligible, float("-inf")).argsort(dim=1, descending=True, stable=True)
    return eligible & (order.argsort(dim=1) < n[:, None])

def carry_over(carry: str, memory: MetaState, slots: Tensor) -> Tensor:
    """What becomes of the memory between two steps: keep (the method), its controls reset and
    shuffle, or detach, an ablation of the training."""
    if carry == "reset":
        return memory.initial(len(slots))
    if carry == "shuffle":                             # every sample goes on with another's memory
        return slots.roll(1, dims=0)
    return slots.detach() if carry == "detach" else slots

def unroll(backbone: Backbone, memory: MetaState, ids: Tensor, maskable: Tensor, counts: Tensor,
           noise: Tensor, by_confidence: Tensor, *, lam: float, carry: str = "keep"
           ) -> tuple[Tensor, Tensor]:
    """K denoising steps from all masked to all revealed; the memory runs through all of them.

        L = sum_k w_k [lam * dense_k + (1 - lam) * reveal_k],    w_k = n_k / N

    dense_k averages the cross-entropy over what is masked at step k, reveal_k over what is revealed
    there. ids, maskable, noise (B, T); counts (B, K): n_k, which sum to N, the row's maskable
    positions; by_confidence (B,) bool: rows that reveal where the model is surest, not at random.
    Returns the mean of L over rows, and that of dense_k for each k, (K,).
    """
    masked, slots, loss, dense_by_step = maskable, memory.initial(len(ids)), 0.0, []
    for k in range(counts.shape[1]):
        # 1. denoise with the memory of the step before
        canvas = ids.masked_fill(masked, backbone.config.mask_id)
        h, slots = memory.step(backbone, canvas, slots, maskable=maskable, rows=masked)
        # 2. cross-entropy wherever a token is masked
        ce, sure = (torch.zeros_like(noise).masked_scatter(masked, values)
                    for values in cross_entropy(backbone, h, ids[masked]))             # (B, T)
        # 3. the n_k positions to reveal
        revealed = choose(torch.where(by_confidence[:, None], sure, noise), masked, counts[:, k])
        # 4. L_k
        dense = ce.sum(1) / masked.sum(1).clamp(min=1)
        reveal = (ce * revealed).sum(1) / counts[:, k].clamp(min=1)
        weight = counts[:, k] / maskable.sum(1)
        loss = loss + (weight * (lam * dense + (1 - lam) * reveal)).mean()
        dense_by_step.append(dense.detach().mean())
        # 5. reveal the ground truth; between steps the gradient has no way but the memory
        masked, slots = masked & ~revealed, carry_over(carry, memory, slots)
    return loss, torch.stack(dense_by_step)

# ---------------------------------------------------------------------------------- sampling
LLADA_REMASKING = ("low_confidence", "random")
DREAM_REMASKING = ("origin", "maskgit_plus", "topk_margin", "entropy")

def gumbel(uniform: Tensor) -> Tensor:
    return -torch.log(-torch.log(uniform))

def llada_tokens(logits: Tensor, uniform: Callable, temperature: float, eot_ids: list[int],
                 mask_id: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """LLaDA: Gumbel-max tokens (N,) of logits (N, V), never a mask, and their probabilities without
    the noise. eot_ids get confidence 0 at every temperature; the original loses end-of-text above 0
    (its issue 137)."""
    kept = logits[:, mask_id].clone()
    logits[:, mask_id] = float("-inf")
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    tokens = (logits if temperature == 0 else logits.to(wide) + temperature * gumbel(
        uniform(logits.shape[1], wide))).argmax(-1)
    logits[:, mask_id] = kept
    logits[:, eot_ids] = float("-inf")
    return tokens, logits.to(dtype).softmax(-1).gather(1, tokens[:, None])[:, 0]

def dream_tokens(logits: Tensor, uniform: Callable, temperature: float, remasking: str,
                 mask_id: int, top_p: float | None, top_k: int | None, dtype: torch.dtype
                 ) -> tuple[Tensor, Tensor]:
    """Dream: tokens (N,) of logits (N, V), never a mask, after temperature, top_p and top_k, and a
    confidence from the same filtered distribution."""
    logits, lowest = logits / (temperature or 1), torch.finfo(logits.dtype).min
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(descending=True)
        beyond = F.pad(ordered.softmax(-1).cumsum(-1) > top_p, (1, -1))    # the first one stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), lowest)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, lowest)
    p = logits.to(dtype).softmax(-1)
    noisy = p.clone() if temperature == 0 else p.log() + gumbel(uniform(p.shape[1], dtype))
    noisy[:, mask_id] = float("-inf")
    tokens = noisy.argmax(-1)
    if remasking == "topk_margin":
        return tokens, -p.topk(2).values.diff()[:, 0]
    if remasking == "entropy":
        return tokens, (p * torch.log(p + 1e-10)).sum(-1)
    return tokens, p.gather(1, tokens[:, None])[:, 0]

@torch.no_grad()
def generate(backbone: Backbone, prompt_ids: Tensor, *, gen_length: int, steps: int,
             block_length: int | None = None, remasking: str = "low_confidence",
             temperature: float = 0.0, cfg_scale: float = 0.0, threshold: float | None = None,
             top_p: float | None = None, top_k: int | None = None, alg_temp: float = 0.0,
             logits_eos_inf: bool = False, confidence_eos_eot_inf: bool = False,
             attention_mask: Tensor | None = None, memory: MetaState | None = None,
             carry: str = "keep", reset_at_block: bool = False, seeds: Sequence[int] | None = None,
             confidence_dtype: torch.dtype = torch.float32, on_step: Callable | None = None
             ) -> Tensor:
    """Denoise gen_length masks after prompt_ids (B, P), and any mask in it; (B, P + gen_length).

    steps are shared out evenly over blocks of block_length (default: one block). attention_mask
    (B, P): 0 at left padding. remasking: low_confidence and random on LLaDA's schedule; origin,
    maskgit_plus, topk_margin and entropy on Dream's. threshold: reveal all that is surer, at least
    one, in as many steps as that takes. carry: see carry_over; memory.config.n_updates says how
    often the memory is updated. seeds (B,): a random stream for each row; no row depends on the
    others, on padding or on the batch. confidence_dtype: bfloat16 ties as the originals do.
    on_step(canvas, revealed, confidence, trace) sees every step.
    """
    c, device, (B, P) = backbone.config, prompt_ids.device, prompt_ids.shape
    block_length = block_length or gen_length
    n_blocks = gen_length // block_length if gen_length else 1
    ensure(steps > 0 and steps % n_blocks == 0 and n_blocks * block_length == gen_length,
           f"gen_length {gen_length}, block_length {block_length} and steps {steps} do not divide: "
           "blocks must fill gen_length and share out steps evenly")
    ensure(remasking in LLADA_REMASKING + DREAM_REMASKING, f"remasking {remasking!r} is unknown; "
           f"take one of {', '.join(LLADA_REMASKING + DREAM_REMASKING)}")
    ensure(threshold is None or remasking in ("low_confidence", "maskgit_plus"),
           f"threshold needs probabilities, which remasking {remasking!r} does not give")
    steps //= n_blocks
    canvas = F.pad(prompt_ids, (0, gen_length), value=c.mask_id)
    mask = None if attention_mask is None else F.pad(attention_mask, (0, gen_length), value=1)
    maskable, column = canvas == c.mask_id, torch.arange(P + gen_length, device=device)
    twice = (lambda x: x if x is None else torch.cat((x, x))) if cfg_scale > 0 else (lambda x: x)
    total = twice(maskable.sum(1).clamp(min=1))
    seeds = range(B) if seeds is None else seeds
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    ends = [i for i in (c.eos_id, c.eot_id) if confidence_eos_eot_inf and i in range(c.vocab_size)]
    timesteps = torch.linspace(1, 1e-3, steps + 1)
    shares = 1 - timesteps[1:] / timesteps[:-1]        # Dream's: of what is masked at each step

    def uniform(width: int, dtype: torch.dtype) -> Tensor:               # (N, width), not 0
        draws = [torch.rand(n, width, dtype=dtype, device=device, generator=generator)
                 for generator, n in zip(generators, eligible.sum(1).tolist())]
        return torch.cat(draws).clamp(min=torch.finfo(dtype).tiny)

    for block in range(n_blocks):
        allowed = maskable & (column < P + (block + 1) * block_length)
        begin = (allowed & (canvas == c.mask_id)).sum(1)
        if memory and (block == 0 or reset_at_block):
            slots, part = memory.initial(len(total)), -1
        for step in count():
            eligible, last = allowed & (canvas == c.mask_id), step == steps - 1        # (B, T)
            if not eligible.any() or step == steps and threshold is None:
                break
            # 1. one pass; with guidance a second copy of the batch sees no prompt
            seen, rows, trace = canvas, twice(eligible), []
            if cfg_scale > 0:
                seen = torch.cat((canvas, canvas.masked_fill(~maskable, c.mask_id)))
            if memory is None:
                logits = backbone(seen, twice(mask), rows)                             # (N, V)
            else:
                h, new = memory.step(backbone, seen, slots, maskable=twice(maskable), rows=rows,
                                     attention_mask=twice(mask), trace=trace)
                if (n := memory.config.n_updates) is not None:     # when another n-th is revealed
                    old, part = part, twice((maskable & (canvas != c.mask_id)).sum(1)) * n // total
                    due = (part > old)[:, None]
                    new, trace[0]["slot_change"] = (
                        torch.where(due[..., None], new, slots), trace[0]["slot_change"] * due)
                logits, slots = backbone.head(h), carry_over(carry, memory, new)
            if cfg_scale > 0:
                given, free = logits.chunk(2)
                logits = free + (cfg_scale + 1) * (given - free)
            if logits_eos_inf:
                logits[:, c.eos_id] = float("-inf")
            # 2. a token for every eligible position, and how sure it is
            if remasking in LLADA_REMASKING:
                tokens, sure = llada_tokens(logits, uniform, temperature, ends, c.mask_id,
                                            confidence_dtype)
            else:
                tokens, sure = dream_tokens(logits, uniform, temperature, remasking, c.mask_id,
                                            top_p, top_k, confidence_dtype)
            if remasking in ("random", "origin"):
                sure = uniform(1, torch.float32)[:, 0]
            elif alg_temp > 0:                         # Gumbel-top-k: draws without replacement
                sure = sure / alg_temp + gumbel(uniform(1, sure.dtype)[:, 0])
            confidence = torch.zeros_like(canvas, dtype=sure.dtype).masked_scatter(eligible, sure)
            # 3. which of them to reveal
            left, share = eligible.sum(1), shares[min(step, steps - 1)]
            if threshold is not None:
                revealed = eligible & (confidence >= threshold)
                revealed |= choose(confidence, eligible, left.clamp(max=1))
            elif remasking in LLADA_REMASKING:
                revealed = choose(confidence, eligible, begin // steps + (step < begin % steps))
            elif remasking == "origin":
                revealed = eligible & ((confidence < share) | last)
            else:
                revealed = choose(confidence, eligible, left if last else (left * share).int())
            # 4. write them; what is written stays
            canvas = torch.where(revealed, canvas.masked_scatter(eligible, tokens), canvas)
            if on_step:
                on_step(canvas, revealed, confidence, trace)
    return canvas
