"""Samplers equal the references token for token; losses equal the formulas written out."""
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from conftest import GOLDEN
from diffusion import choose, cross_entropy, diffusion_loss, dream_tokens, generate, llada_tokens, \
    unroll
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
    memory = MetaState(MemoryConfig(64, 6, 32, 4, 16, 1, 2)) if with_memory else None  # untrained: no-op
    out = generate(backbone, torch.tensor(case["prompt_ids"]), steps=s["steps"],
                   attention_mask=None if mask is None else torch.tensor(mask), memory=memory,
                   on_step=lambda canvas, *_: states.append(canvas.tolist()), **settings)
    assert states == case["states_after_each_step"] and states[-1] == out.tolist()


SETTINGS = [dict(steps=12), dict(steps=6, block_length=4), dict(steps=5, remasking="entropy"),
            dict(steps=24, block_length=6), dict(steps=12, remasking="topk_margin", alg_temp=0.3),
            dict(steps=3, temperature=0.7), dict(steps=4, remasking="origin", temperature=1.0),
            dict(steps=4, remasking="random"), dict(steps=1, threshold=0.02), dict(steps=4, cfg_scale=1.0),
            dict(steps=4, remasking="maskgit_plus", top_p=0.9, top_k=20, temperature=0.5)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("remember", [False, True])
def test_invariants(settings, remember, backbone, memory):
    """The prompt is kept, no mask is left, what is written stays, and the same call gives the same."""
    prompt, states = torch.randint(300, (3, 5)), []
    run = lambda ids, **more: generate(backbone, ids, gen_length=12, **settings, **more,  # noqa: E731
                                       memory=memory if remember else None)
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
             on_step=lambda canvas, revealed, *_: found.append(int(revealed.sum())))
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
    found = counts(gen_length=1024, steps=1024, remasking="topk_margin")
    assert found.count(0) == 2 and found[-1] == 3 and sum(found) == 1024


def test_threshold_takes_what_is_surer_and_at_least_one(backbone):
    prompt, seen = torch.randint(300, (2, 4)), []
    generate(backbone, prompt, gen_length=10, steps=1, threshold=0.05,
             on_step=lambda canvas, revealed, confidence, _: seen.append((revealed, confidence)))
    for revealed, confidence in seen:
        assert ((confidence >= 0.05) <= revealed).all()
        for row, sure in zip(revealed, confidence):
            assert row.sum() == 0 or row.sum() == 1 or (sure[row] >= 0.05).all()
            assert (sure[~row] < 0.05).all()
    assert sum(int(r.sum()) for r, _ in seen) == 20


def test_infilling_completes_a_text_in_place(backbone):
    ids = torch.randint(300, (1, 9))
    ids[0, [2, 3, 7]] = MASK
    out = generate(backbone, ids, gen_length=0, steps=3)
    assert torch.equal(out[ids != MASK], ids[ids != MASK]) and not (out == MASK).any()


def test_temperature_samples_the_softmax():
    """Gumbel-max draws from softmax(logits / T), and the confidence is that without noise."""
    logits, n = torch.tensor([2.0, 1.0, 0.0, -1.0, 9.0]), 40_000        # the last is the mask
    uniform = lambda width, dtype: torch.rand(n, width, dtype=dtype)  # noqa: E731
    torch.manual_seed(0)
    tokens, sure = llada_tokens(logits.repeat(n, 1), uniform, 0.5, [], 4, torch.float32)
    want = (logits[:4] / 0.5).softmax(0)
    torch.testing.assert_close(tokens.bincount(minlength=4) / n, want, atol=0.01, rtol=0)
    torch.testing.assert_close(sure, logits.softmax(0)[tokens])
    tokens, sure = dream_tokens(logits.repeat(n, 1), uniform, 0.5, "maskgit_plus", 4, None, None,
                                torch.float32)
    torch.testing.assert_close(tokens.bincount(minlength=4) / n, want, atol=0.01, rtol=0)


def test_top_p_and_top_k_filter_before_the_confidence():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.04, 0.01]])
    first = lambda **f: dream_tokens(p.log(), None, 0, "maskgit_plus", 4, f.get("p"), f.get("k"),  # noqa: E731
                                     torch.float32)[1].item()
    assert first() == pytest.approx(0.5)
    assert first(k=2) == pytest.approx(0.5 / 0.8)
    assert first(p=0.6) == pytest.approx(0.5 / 0.8)    # the first token beyond 0.6 stays
    assert first(p=0.45) == pytest.approx(1.0)
    entropy = dream_tokens(p.log(), None, 0, "entropy", 4, None, 2, torch.float32)[1].item()
    assert entropy == pytest.approx(sum(q * torch.tensor(q).log().item() for q in (0.625, 0.375)), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_of_text_comes_last_at_every_temperature(temperature, backbone):
    """Issue 137 of the original: above temperature 0 it suppressed end-of-turn only."""
    backbone.config = replace(backbone.config, eot_id=TINY.eos_id - 2)
    with torch.no_grad():
        backbone.lm_head.weight[[TINY.eos_id, TINY.eos_id - 2]] *= 30
    order = []
    generate(backbone, torch.randint(300, (1, 4)), gen_length=12, steps=12, temperature=temperature,
             confidence_eos_eot_inf=True, on_step=lambda canvas, revealed, confidence, _: order.append(
                 (canvas[revealed].item(), confidence[revealed].item())))
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


def test_memory_between_steps(backbone, memory):
    """keep, reset, shuffle and the reset at block boundaries are four different things."""
    torch.manual_seed(5)
    prompt = torch.randint(300, (4, 6))
    trace = {}
    for name, more in dict(keep={}, reset={"carry": "reset"}, shuffle={"carry": "shuffle"},
                           blocks={"reset_at_block": True}).items():
        trace[name] = []
        generate(backbone, prompt, gen_length=8, steps=4, block_length=4, memory=memory, **more,
                 on_step=lambda canvas, revealed, confidence, t: trace[name].append(t[0]["slot_change"]))
    first = {name: t[0] for name, t in trace.items()}
    assert all(torch.equal(first["keep"], t) for t in first.values())
    assert not torch.equal(trace["keep"][1], trace["reset"][1])
    assert not torch.equal(trace["keep"][1], trace["shuffle"][1])
    assert torch.equal(trace["keep"][1], trace["blocks"][1])
    assert not torch.equal(trace["keep"][2], trace["blocks"][2])


def test_updates_are_spread_over_the_answer(backbone, memory):
    """With n_updates = 3 and 12 tokens, in one step each: after 0, 4 and 8 of them; and never more
    than one in a step."""
    def changes(n, steps, **more):
        memory.config, trace = replace(memory.config, n_updates=n), []
        out = generate(backbone, torch.randint(300, (2, 3)), gen_length=12, steps=steps, memory=memory, **more,
                       on_step=lambda canvas, revealed, confidence, t: trace.append(t[0]["slot_change"]))
        assert not (out == MASK).any()
        return [bool(change.all()) for change in trace if change.any() == change.all()]

    assert changes(3, 12) == [True, False, False, False] * 3
    assert changes(3, 4) == [True, False, True, True]           # after 0, 3, 6 and 9 tokens
    assert changes(6, 3) == [True] * 3 and changes(None, 12) == [True] * 12
    assert changes(3, 4, remasking="entropy") == [True, False, True, True]
    assert changes(3, 4, cfg_scale=1.0, block_length=6) == [True, False, True, True]


@pytest.mark.parametrize("settings, word", [
    (dict(gen_length=10, block_length=4, steps=4), "divide"),
    (dict(gen_length=8, block_length=4, steps=3), "divide"), (dict(gen_length=8, steps=0), "steps"),
    (dict(gen_length=8, steps=4, remasking="best"), "best"),
    (dict(gen_length=8, steps=4, remasking="entropy", threshold=0.9), "threshold")])
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
        visible = [i for i in range(10) if maskable[b, i] and p <= noise[b, i] and noise[b, i] > 1 - keep]
        canvas[masked], kept = MASK, kept + len(visible)
        logits = backbone(canvas[None])[0]
        for weight, positions in ((1 / p, masked), (1, visible)):
            ce = sum(F.cross_entropy(logits[i], ids[b, i]) for i in positions)
            want += weight * ce / maskable[b].sum() / 3
    assert (kept > 0) == (keep > 0)
    torch.testing.assert_close(diffusion_loss(backbone, ids, maskable, t, noise, keep=keep), want)


def test_chunks_and_checkpointing_do_not_change_the_cross_entropy(backbone):
    h, targets = torch.randn(50, 64, requires_grad=True), torch.randint(300, (50,))
    want = F.cross_entropy(backbone.head(h), targets, reduction="none")
    for backbone.checkpointing in (False, True):
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
            h, slots = memory.step(backbone, canvas, slots, maskable=maskable[b:b + 1], rows=rows)
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


def test_choose_takes_the_best_of_each_row_and_ties_from_the_left():
    score = torch.tensor([[1.0, 3, 2, 3], [5, 5, 5, 5], [1, 2, 3, 4]])
    eligible = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 0, 0]]).bool()
    assert choose(score, eligible, torch.tensor([3, 2, 2])).long().tolist() == [
        [0, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]]
