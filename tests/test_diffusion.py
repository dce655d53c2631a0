"""Samplers equal the references token for token; losses equal the formulas written out."""
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from conftest import GOLDEN
from diffusion import (Sampling, Turn, best_positions, cross_entropy, diffusion_loss,
                       generate, propose_dream, propose_llada, select_by_chance, select_share,
                       unroll)
from metastate import MemoryConfig, MetaState
from model import TINY, InputError, load_backbone

MASK = TINY.mask_id
CASES = [case for kind in ("llada", "dream")
         for case in json.loads((GOLDEN / f"sampler_{kind}.json").read_text())]


@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_samplers_equal_the_reference_step_by_step(case, with_memory):
    backbone, s = load_backbone(GOLDEN / case["model"]), case["settings"]
    if "alg" in s:
        settings = dict(gen_length=s["max_new_tokens"], remasking=s["alg"], alg_temp=s["alg_temp"],
                        top_p=s["top_p"], top_k=s["top_k"])
    else:
        settings = {key: s[key] for key in ("gen_length", "block_length", "cfg_scale", "remasking")}
        settings["confidence_eos_eot_inf"] = s.get("confidence_eos_eot_inf", False)
        if "eos_id" in s:
            backbone.config = replace(backbone.config, eos_id=s["eos_id"], eot_id=s["eot_id"])
    mask, states = case["attention_mask"], []
    memory = None
    if with_memory:                                    # untrained, it is a no-op
        memory = MetaState(MemoryConfig(64, 6, 32, 4, 16, 1, 2))
    out = generate(backbone, torch.tensor(case["prompt_ids"]), steps=s["steps"],
                   attention_mask=None if mask is None else torch.tensor(mask), memory=memory,
                   on_step=lambda canvas, *_: states.append(canvas.tolist()), **settings)
    assert states == case["states_after_each_step"] and states[-1] == out.tolist()


SETTINGS = [dict(steps=1, threshold=0.02, block_length=4), dict(steps=6, think=3, block_length=4),
            dict(steps=3, cfg_scale=1.0, block_length=4, think=2, threshold=0.02),
            dict(steps=6, remasking="origin", block_length=4),
            dict(steps=12), dict(steps=6, block_length=4), dict(steps=5, remasking="entropy"),
            dict(steps=24, block_length=6), dict(steps=12, remasking="topk_margin", alg_temp=0.3),
            dict(steps=3, temperature=0.7, think=1),
            dict(steps=4, remasking="origin", temperature=1.0), dict(steps=4, remasking="random"),
            dict(steps=1, threshold=0.02), dict(steps=4, cfg_scale=1.0),
            dict(steps=4, remasking="maskgit_plus", top_p=0.9, top_k=20, temperature=0.5)]


@pytest.mark.parametrize("remember, settings", [
    *[(True, settings) for settings in SETTINGS],
    *[(False, settings) for settings in SETTINGS[:4]]], ids=str)
def test_invariants(remember, settings, backbone, memory):
    """The prompt is kept, no mask is left, what is written stays, and the same call gives the
    same."""
    def run(ids, **more):
        return generate(backbone, ids, gen_length=12, memory=memory if remember else None,
                        **settings, **more)

    prompt, states = torch.randint(300, (3, 5)), []
    out = run(prompt, on_step=lambda canvas, *_: states.append(canvas))
    assert torch.equal(out[:, :5], prompt) and not (out == MASK).any()
    for before, after in zip(states, states[1:]):
        assert torch.equal(before[before != MASK], after[before != MASK])
    assert torch.equal(run(prompt), out)
    # rows depend neither on each other nor on padding nor on the batch
    for i in range(3):
        assert torch.equal(run(prompt[i:i + 1], seeds=[i])[0], out[i])
    padded = F.pad(prompt, (4, 0), value=9)
    attention = F.pad(torch.ones_like(prompt), (4, 0))
    assert torch.equal(run(padded, attention_mask=attention)[:, 4:], out)


def test_the_model_never_writes_a_mask(backbone):
    with torch.no_grad():
        backbone.lm_head.weight[MASK] = backbone.lm_head.weight.abs().sum(0)
    for remasking in ("low_confidence", "entropy"):
        for temperature in (0, 1.0):
            out = generate(backbone, torch.randint(300, (2, 4)), gen_length=8, steps=4,
                           remasking=remasking, temperature=temperature)
            assert not (out == MASK).any()


def counts(**settings):
    torch.manual_seed(0)
    from model import Backbone
    found = []
    generate(Backbone(TINY), torch.zeros(1, 3, dtype=torch.long), **settings,
             on_step=lambda canvas, found_now: found.append(int(found_now.revealed.sum())))
    return found


@pytest.mark.parametrize("settings, want", [
    (dict(gen_length=10, steps=4), [3, 3, 2, 2]),                              # remainder first
    (dict(gen_length=12, block_length=6, steps=8), [2, 2, 1, 1] * 2),
    (dict(gen_length=4, steps=6), [1, 1, 1, 1]),                               # nothing left: stop
    (dict(gen_length=24, steps=24, remasking="entropy"), [0] + [1] * 22 + [2]),
    (dict(gen_length=256, steps=128, remasking="maskgit_plus"), [1] + [2] * 126 + [3])])
def test_reveal_schedules(settings, want):
    assert counts(**settings) == want


def test_dream_with_1024_steps_reveals_late():
    """Its shares of 1024 masks, rounded down: nothing for two steps, three in the last."""
    left, found = 1024, []
    for step in range(1024):
        one = turn(left, step, steps=1024, remasking="topk_margin")
        found.append(int(select_share(torch.zeros(1, left), one).sum()))
        left -= found[-1]
    assert found.count(0) == 2 and found[-1] == 3 and sum(found) == 1024


def test_threshold_takes_what_is_surer_and_at_least_one(backbone):
    prompt, seen = torch.randint(300, (2, 4)), []
    generate(backbone, prompt, gen_length=10, steps=1, threshold=0.05,
             on_step=lambda canvas, found: seen.append((found.revealed, found.confidence)))
    for revealed, confidence in seen:
        assert ((confidence >= 0.05) <= revealed).all()
        for row, sure in zip(revealed, confidence):
            assert row.sum() == 0 or row.sum() == 1 or (sure[row] >= 0.05).all()
            assert (sure[~row] < 0.05).all()
    assert sum(int(r.sum()) for r, _ in seen) == 20


@pytest.mark.parametrize("settings", [dict(gen_length=-2, steps=1), dict(think=-17, steps=16)])
def test_settings_below_zero_are_refused(settings):
    with pytest.raises(InputError, match="below 0"):
        Sampling(**settings)


def test_infilling_completes_a_text_in_place(backbone):
    ids = torch.randint(300, (1, 9))
    ids[0, [2, 3, 7]] = MASK
    out = generate(backbone, ids, gen_length=0, steps=3)
    assert torch.equal(out[ids != MASK], ids[ids != MASK]) and not (out == MASK).any()


def turn(n, step=0, n_begin=None, seed=0, **settings):
    """One row of n eligible positions."""
    eligible = torch.ones(1, n, dtype=torch.bool)
    begin = torch.tensor([n if n_begin is None else n_begin])
    config = replace(TINY, vocab_size=5, mask_id=4, eos_id=3)
    generators = [torch.Generator().manual_seed(seed)]
    return Turn(eligible, begin, step, Sampling(**settings), config, generators)


@pytest.mark.parametrize("settings", [dict(temperature=0.1), dict(temperature=0.001), {}], ids=str)
@pytest.mark.parametrize("propose, remasking", [(propose_llada, "low_confidence"),
                                                (propose_dream, "maskgit_plus")])
def test_a_mask_is_never_written_however_likely_it_is(propose, remasking, settings):
    logits = torch.tensor([[-50.0, -1.0, -50.0, -50.0, 300.0]])            # the last is the mask
    tokens, _ = propose(logits, turn(1, remasking=remasking, **settings))
    assert tokens.item() == 1


def test_temperature_samples_the_softmax():
    """Gumbel-max draws from softmax(logits / T), and the confidence is that without noise."""
    logits, n = torch.tensor([2.0, 1.0, 0.0, -1.0, 9.0]), 40_000        # the last is the mask
    tokens, confidence = propose_llada(logits.repeat(n, 1), turn(n, temperature=0.5))
    want = (logits[:4] / 0.5).softmax(0)
    torch.testing.assert_close(tokens.bincount(minlength=4) / n, want, atol=0.01, rtol=0)
    torch.testing.assert_close(confidence, logits.softmax(0)[tokens])
    tokens, confidence = propose_dream(logits.repeat(n, 1),
                                       turn(n, temperature=0.5, remasking="maskgit_plus"))
    torch.testing.assert_close(tokens.bincount(minlength=4) / n, want, atol=0.01, rtol=0)


def dream_confidence(p, **settings):
    settings.setdefault("remasking", "maskgit_plus")
    tokens, confidence = propose_dream(p.log(), turn(1, **settings))
    return tokens.item(), confidence.item()


def test_top_p_and_top_k_filter_before_the_confidence():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.04, 0.01]])
    assert dream_confidence(p)[1] == pytest.approx(0.5)
    assert dream_confidence(p, top_k=2)[1] == pytest.approx(0.5 / 0.8)
    assert dream_confidence(p, top_p=0.6)[1] == pytest.approx(0.5 / 0.8)   # the one beyond stays
    assert dream_confidence(p, top_p=0.45)[1] == pytest.approx(1.0)
    entropy = sum(q * torch.tensor(q).log().item() for q in (0.625, 0.375))
    found = dream_confidence(p, top_k=2, remasking="entropy")[1]
    assert found == pytest.approx(entropy, abs=1e-5)
    margin = dream_confidence(p, remasking="topk_margin")[1]
    assert margin == pytest.approx(0.2)


@pytest.mark.parametrize("settings", [dict(top_k=1), dict(top_p=0.5)])
def test_where_the_mask_alone_would_survive_the_best_other_token_is_written(settings):
    p = torch.tensor([[0.01, 0.02, 0.06, 0.01, 0.9]])                  # the last is the mask
    assert dream_confidence(p, **settings)[0] == 2


def test_origin_reveals_each_with_the_probability_of_its_share_and_all_in_the_last_step():
    """Steps 0 and 1 of 2: timesteps 1, 0.5005, 0.001, so the first share is 0.4995."""
    n = 20_000
    first = select_by_chance(torch.zeros(1, n), turn(n, 0, steps=2, remasking="origin"))
    assert first.float().mean().item() == pytest.approx(0.4995, abs=0.015)
    assert select_by_chance(torch.zeros(1, n), turn(n, 1, steps=2, remasking="origin")).all()


def test_alg_temp_reveals_the_surer_the_sooner():
    """Gumbel-top-1 of confidence / alg_temp draws from its softmax."""
    confidence = torch.tensor([[0.9, 0.5, 0.1]])
    want = (confidence / 0.4).softmax(-1)[0]
    drawn = torch.zeros(3)
    for seed in range(3000):                           # one of three: share 0.3335 of 3 masks
        settings = dict(steps=2, remasking="maskgit_plus", alg_temp=0.4)
        one = turn(3, 0, seed=seed, **settings)
        drawn += select_share(confidence, one)[0].float()
    torch.testing.assert_close(drawn / drawn.sum(), want, atol=0.03, rtol=0)


@pytest.mark.parametrize("remasking", ["random", "origin"])
def test_random_orders_do_not_look_at_the_confidence(remasking, backbone):
    order = []
    generate(backbone, torch.randint(300, (1, 4)), gen_length=40, steps=40, remasking=remasking,
             on_step=lambda canvas, found: order.extend(found.revealed[0].nonzero()[:, 0].tolist()))
    assert sorted(order) == list(range(4, 44)) and order != sorted(order)
    surest = []
    generate(backbone, torch.randint(300, (1, 4)), gen_length=40, steps=40,
             on_step=lambda canvas, found: surest.append(
                 found.confidence[found.revealed].min() >= found.confidence.max()))
    assert all(surest)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_of_text_comes_last_at_every_temperature(temperature, backbone):
    """Issue 137 of the original: above temperature 0 it suppressed end-of-turn only."""
    backbone.config = replace(backbone.config, eot_id=TINY.eos_id - 2)
    with torch.no_grad():
        backbone.lm_head.weight[[TINY.eos_id, TINY.eos_id - 2]] *= 30
    order = []
    generate(backbone, torch.randint(300, (1, 4)), gen_length=12, steps=12, temperature=temperature,
             confidence_eos_eot_inf=True, on_step=lambda canvas, found: order.append(
                 (canvas[found.revealed].item(), found.confidence[found.revealed].item())))
    ends = [token in (TINY.eos_id, TINY.eos_id - 2) for token, _ in order]
    assert any(ends)
    assert all(sure == 0 for (_, sure), end in zip(order, ends) if end)


def test_logits_eos_inf_bans_end_of_text(backbone):
    with torch.no_grad():
        backbone.lm_head.weight[TINY.eos_id] *= 100
    prompt = torch.randint(300, (2, 4))
    free, banned = (generate(backbone, prompt, gen_length=8, steps=8, logits_eos_inf=ban)
                    for ban in (False, True))
    assert (free == TINY.eos_id).any() and not (banned == TINY.eos_id).any()


def slots_by_pass(backbone, memory, prompt, **settings):
    found = []
    out = generate(backbone, prompt, memory=memory, **settings,
                   on_step=lambda canvas, now: found.append(now.slots))
    return found, out


def test_memory_between_steps(backbone, memory):
    """keep, reset and shuffle are three different things, and the first pass knows none of them."""
    torch.manual_seed(5)
    prompt = torch.randint(300, (4, 6))
    found = {carry: slots_by_pass(backbone, memory, prompt, gen_length=8, steps=4, carry=carry)[0]
             for carry in ("keep", "reset", "shuffle")}
    assert torch.equal(found["keep"][0], found["reset"][0])
    assert torch.equal(found["keep"][0], found["shuffle"][0])
    assert not torch.equal(found["keep"][1], found["reset"][1])
    assert not torch.equal(found["keep"][1], found["shuffle"][1])
    with pytest.raises(InputError, match="two or more"):
        generate(backbone, prompt[:1], gen_length=8, steps=4, memory=memory, carry="shuffle")


def test_the_memory_alone_changes_while_it_thinks(backbone, memory):
    prompt = torch.randint(300, (2, 5))
    seen = []
    generate(backbone, prompt, gen_length=8, steps=4, block_length=4, think=3, memory=memory,
             on_step=lambda canvas, found: seen.append((canvas, found)))
    thinking, writing = seen[:3], seen[3:]
    assert [int(found.revealed.sum()) for _, found in writing] == [4] * 4      # 2 a row
    for canvas, found in thinking:                     # the first block is looked at, not written
        assert (canvas[:, 5:] == MASK).all() and not found.revealed.any()
        assert found.eligible.nonzero()[:, 1].max() < 9
    assert not torch.equal(thinking[0][1].slots, thinking[1][1].slots)
    assert not torch.equal(thinking[1][1].slots, thinking[2][1].slots)


@pytest.mark.parametrize("carry", ["without", "reset", "keep"])
def test_without_a_memory_no_pass_over_the_same_masks_can_differ(carry, backbone, memory):
    """The input of every thinking pass is the same, so only what is carried over can matter."""
    prompt = torch.randint(300, (3, 5))
    given = dict(memory=None) if carry == "without" else dict(memory=memory, carry=carry)
    outs = [generate(backbone, prompt, gen_length=12, steps=1, think=think, **given)
            for think in range(6)]
    same = [torch.equal(out, outs[0]) for out in outs[1:]]
    assert not any(same) if carry == "keep" else all(same)


def test_a_guess_is_what_would_be_written_at_once(backbone, memory):
    prompt, guesses = torch.randint(300, (2, 5)), []
    generate(backbone, prompt, gen_length=8, steps=1, think=4, memory=memory,
             on_step=lambda canvas, found: guesses.append(found.guess))
    for think, guess in enumerate(guesses):
        out = generate(backbone, prompt, gen_length=8, steps=1, think=think, memory=memory)
        assert torch.equal(out, guess)


@pytest.mark.parametrize("settings, word", [
    (dict(gen_length=10, block_length=4, steps=4), "divide"),
    (dict(gen_length=8, block_length=4, steps=3), "divide"), (dict(gen_length=8, steps=0), "steps"),
    (dict(gen_length=8, steps=4, remasking="best"), "best"),
    (dict(gen_length=8, steps=4, remasking="entropy", threshold=0.9), "threshold"),
    (dict(gen_length=8, steps=4, remasking="maskgit_plus", threshold=0.9, alg_temp=1.0),
     "alg_temp")])
def test_settings_that_cannot_work_are_refused(settings, word, backbone):
    with pytest.raises(InputError, match=word):
        generate(backbone, torch.zeros(1, 3, dtype=torch.long), **settings)


# ------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("keep", [0.0, 0.4])
def test_the_diffusion_loss_is_lladas(keep, backbone):
    """sum(CE / p) over masked answer tokens, over the answer's length, averaged over rows; with
    keep, a share of the visible ones counts too, with weight 1."""
    ids, maskable = torch.randint(300, (3, 10)), torch.zeros(3, 10, dtype=torch.bool)
    maskable[0, 4:] = maskable[1, 7:] = maskable[2] = True
    t, noise = torch.tensor([0.9, 0.5, 0.2]), torch.rand(3, 10)
    want, kept = 0, 0
    for b in range(3):
        p, canvas = (1 - 1e-3) * t[b] + 1e-3, ids[b].clone()
        masked = [i for i in range(10) if maskable[b, i] and noise[b, i] < p]
        visible = [i for i in range(10)
                   if maskable[b, i] and p <= noise[b, i] and noise[b, i] > 1 - keep]
        canvas[masked], kept = MASK, kept + len(visible)
        logits = backbone(canvas[None])[0]
        for weight, positions in ((1 / p, masked), (1, visible)):
            ce = sum(F.cross_entropy(logits[i], ids[b, i]) for i in positions)
            want += weight * ce / maskable[b].sum() / 3
    assert (kept > 0) == (keep > 0)
    torch.testing.assert_close(diffusion_loss(backbone, ids, maskable, t, noise,
                                              visible_share=keep), want)


def test_chunks_and_checkpointing_do_not_change_the_cross_entropy(backbone):
    h, targets = torch.randn(50, 64, requires_grad=True), torch.randint(300, (50,))
    want = F.cross_entropy(backbone.head(h), targets, reduction="none")
    for backbone.recompute in (False, True):
        ce, sure = cross_entropy(backbone, h, targets, chunk=7)
        torch.testing.assert_close(ce, want)
        torch.testing.assert_close(sure, backbone.head(h).log_softmax(-1).amax(-1))
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), h, retain_graph=True)[0]
                                     for x in (ce, want)))


def test_the_unroll_is_the_formula(backbone, memory):
    """Row by row, with nothing batched: eq. F.1, ground-truth reveals, memory through all steps."""
    torch.manual_seed(2)
    ids, noise = torch.randint(300, (2, 11)), torch.rand(2, 11)
    maskable, n = torch.zeros(2, 11, dtype=torch.bool), torch.tensor([[3, 0, 2, 1], [1, 1, 4, 2]])
    maskable[0, 5:] = maskable[1, 3:] = True
    confident, lam = torch.tensor([True, False]), 0.3
    total, per_step = 0, torch.zeros(4)
    for b in range(2):
        canvas, slots = ids[b:b + 1].masked_fill(maskable[b], MASK), memory.initial(1)
        left = maskable[b].nonzero()[:, 0].tolist()
        N = len(left)
        for k in range(4):
            rows = torch.zeros(1, 11, dtype=torch.bool)
            rows[0, left] = True
            h, slots = memory.step(backbone, canvas, slots, maskable=maskable[b:b + 1],
                                   wanted=rows)
            p = backbone.head(h).log_softmax(-1)
            ce = {i: -p[j, ids[b, i]] for j, i in enumerate(left)}
            score = {i: p[j].max().item() if confident[b] else noise[b, i].item()
                     for j, i in enumerate(left)}
            reveal = sorted(left, key=lambda i: -score[i])[:n[b, k]]
            dense = sum(ce.values()) / max(len(left), 1)
            revealed = sum(ce[i] for i in reveal) / max(len(reveal), 1)
            total = total + n[b, k] / N * (lam * dense + (1 - lam) * revealed) / 2
            per_step[k] += (dense.detach() if left else 0) / 2
            left = [i for i in left if i not in reveal]
            canvas = canvas.clone()
            canvas[0, reveal] = ids[b, reveal]
        assert not left
    loss, dense = unroll(backbone, memory, ids, maskable, n, noise, confident, lam=lam)
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(dense, per_step)


def test_best_positions_takes_the_best_of_each_row_and_ties_from_the_left():
    score = torch.tensor([[1.0, 3, 2, 3], [5, 5, 5, 5], [1, 2, 3, 4]])
    eligible = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 0, 0]]).bool()
    assert best_positions(score, eligible, torch.tensor([3, 2, 2])).long().tolist() == [
        [0, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]]


def test_thinking_passes_start_the_unroll_and_have_no_gradient(backbone, memory):
    """The unroll after think passes is one whose learned slots are those that the passes leave."""
    torch.manual_seed(4)
    ids, noise = torch.randint(300, (2, 9)), torch.rand(2, 9)
    maskable = torch.arange(9).expand(2, -1) >= 3
    counts, order = torch.tensor([[2, 2, 2], [1, 4, 1]]), torch.tensor([True, False])
    loss, _ = unroll(backbone, memory, ids, maskable, counts, noise, order, lam=0.5, think=2)
    loss.backward()
    assert memory.slots.grad is None                   # what began before the unroll is not learned
    assert memory.mixer.q.weight.grad.any()
    slots = memory.initial(2)
    with torch.no_grad():
        for _ in range(2):
            _, slots = memory.step(backbone, ids.masked_fill(maskable, MASK), slots,
                                   maskable=maskable, wanted=maskable)
    memory.initial = lambda batch: slots
    want, _ = unroll(backbone, memory, ids, maskable, counts, noise, order, lam=0.5)
    torch.testing.assert_close(loss, want)
