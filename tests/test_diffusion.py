"""The sampler equals the originals pass by pass and keeps its promises under all settings; the
losses equal their formulas, in values and in gradients."""
import json
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

from conftest import GOLDEN
from diffusion import (REMASKING, Sampling, SamplerState, cross_entropy, diffusion_loss, generate,
                       propose_dream, select_above_threshold, select_by_chance,
                       select_random_quota, select_share, unroll)
from metastate import MemoryConfig, MetaState
from model import TINY, Backbone, InputError, load_backbone

MASK = TINY.mask_id


# ---------------------------------------------------------------------------- AS THE ORIGINALS

CASES = [case for kind in ("llada", "dream", "dual_cache")
         for case in json.loads((GOLDEN / f"sampler_{kind}.json").read_text())]
OUR_NAMES = {"max_new_tokens": "gen_length", "alg": "remasking"}
FIELDS = {field.name for field in fields(Sampling)}


def without_repeats(canvases):
    return [after for before, after in zip([None, *canvases], canvases) if after != before]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_samplers_equal_the_originals_pass_by_pass(case):
    """LLaDA, Dream, and both with Fast-dLLM's dual cache, without a memory and with an untrained
    one. Canvases without repeats: the cache's original runs a block once more when it is full."""
    backbone = load_backbone(GOLDEN / case["model"])
    ends = {name: case["settings"][name] for name in ("eos_id", "eot_id")
            if name in case["settings"]}
    backbone.config = replace(backbone.config, **ends)
    settings = {OUR_NAMES.get(name, name): value for name, value in case["settings"].items()}
    settings = {name: value for name, value in settings.items() if name in FIELDS}
    if settings.get("remasking") == "confidence_threshold":
        settings["remasking"] = "maskgit_plus"
    attention_mask = case["attention_mask"] and torch.tensor(case["attention_mask"])
    untrained = MetaState(MemoryConfig(64, n_slots=6, d_slot=32, n_head=4, d_time=16))
    for memory in (None, untrained):
        canvases = []
        generate(backbone, torch.tensor(case["prompt_ids"]), memory=memory,
                 attention_mask=attention_mask, **settings,
                 on_step=lambda canvas, _: canvases.append(canvas.tolist()))
        assert without_repeats(canvases) == without_repeats(case["states_after_each_step"])


# ---------------------------------------------------------------------------------- INVARIANTS

DREAMS = ("origin", "maskgit_plus", "topk_margin", "entropy")
SETTINGS = [
    *(dict(remasking=remasking) for remasking in REMASKING),
    dict(threshold=0.02, think=2),
    dict(threshold=0.02, remasking="maskgit_plus"),
    dict(temperature=0.7, think=1, logits_eos_inf=True, confidence_eos_eot_inf=True),
    dict(temperature=1.0, remasking="origin"),
    dict(temperature=0.5, remasking="maskgit_plus", top_p=0.9, top_k=20, alg_temp=0.3),
    dict(temperature=0.7, remasking="entropy", think=1),
]


def toy(kind):
    """A backbone of two layers in the manner of LLaDA or Dream."""
    torch.manual_seed(0)
    dream = dict(kind="dream", shift=True, n_kv_head=2, qkv_bias=True, rope_fp32=False)
    return Backbone(replace(TINY, n_layer=2, **(dream if kind == "dream" else {}))).eval()


@pytest.mark.parametrize("kind, settings", [
    *(("dream" if settings.get("remasking") in DREAMS else "llada", settings)
      for settings in SETTINGS), ("dream", dict(threshold=0.02))], ids=str)
def test_invariants(kind, settings, memory):
    """The prompt is kept, no mask is left, what is written stays, and no row of a batch depends on
    the others, on their length or on the batch, with and without memory, guidance, blocks and
    cache."""
    backbone = toy(kind)
    lengths = [7, 3, 5]
    prompt = torch.randint(300, (3, 7))
    attention_mask = (torch.arange(7) >= 7 - torch.tensor(lengths)[:, None]).long()
    for guided, remembers, more in (
            (False, True, dict()), (True, True, dict()), (False, False, dict(block_length=4)),
            (False, True, dict(block_length=4, cache=True)),
            (True, True, dict(block_length=4, cache=True)),
            (True, False, dict(block_length=4, cache=True))):
        given = dict(gen_length=8, steps=4, cfg_scale=float(guided),
                     memory=memory if remembers else None, **more, **settings)
        states = [F.pad(prompt, (0, 8), value=MASK)]
        out = generate(backbone, prompt, attention_mask=attention_mask, seeds=[5, 6, 7],
                       on_step=lambda canvas, _: states.append(canvas), **given)
        assert torch.equal(out, states[-1]) and not (out == MASK).any()
        for before, after in zip(states, states[1:]):
            assert torch.equal(before[before != MASK], after[before != MASK])
        for i, n in enumerate(lengths):
            alone = generate(backbone, prompt[i:i + 1, 7 - n:], seeds=[5 + i], **given)
            assert torch.equal(alone[0], out[i, 7 - n:])


@pytest.mark.parametrize("remasking", REMASKING)
def test_a_rows_random_stream_goes_on_from_pass_to_pass(remasking, backbone):
    """Over uniform logits every pass draws anew: streams that began again would repeat a token."""
    torch.nn.init.zeros_(backbone.lm_head.weight)
    prompt = torch.randint(300, (1, 3)).repeat(2, 1)
    given = dict(gen_length=40, steps=40, temperature=1.0, remasking=remasking)
    rows = generate(backbone, prompt, **given)[:, 3:].tolist()
    other = generate(backbone, prompt, seeds=[8, 0], **given)[:, 3:].tolist()
    assert min(len(set(row)) for row in rows) > 20
    assert rows[0] != rows[1] and rows[0] != other[0]
    assert rows[0] == other[1]         # the default seeds are 0, 1, ...


def steps_of(memory, monkeypatch):
    """Spy on the memory: the arguments and the result of each of its steps."""
    seen = []
    step = memory.step

    def spy(backbone, ids, slots, **more):
        h, new_slots = step(backbone, ids, slots, **more)
        seen.append(dict(ids=ids, slots=slots, new_slots=new_slots, h=h, **more))
        return h, new_slots

    monkeypatch.setattr(memory, "step", spy)
    return seen


@pytest.mark.parametrize("more", [{}, dict(cache=True), dict(cfg_scale=1.0)], ids=str)
def test_slots_run_through_all_steps_and_a_waiting_row_does_not_think_on(
        more, backbone, memory, monkeypatch):
    """And the time is that of the whole answer: masks of a later block count, those that guidance
    puts in place of a prompt do not."""
    seen = steps_of(memory, monkeypatch)
    eligible, told, times = [], [], [torch.ones(4)]

    def see(canvas, report):
        rows = report.eligible.any(1).repeat(2 if "cfg_scale" in more else 1)
        eligible.append(rows[:, None, None])
        told.append(report.slots)
        times.append((canvas == MASK).sum(1) / 12)

    torch.manual_seed(2)
    generate(backbone, torch.randint(300, (4, 5)), memory=memory, gen_length=12, block_length=4,
             steps=3, threshold=0.02, think=2, on_step=see, **more)
    assert torch.equal(seen[0]["slots"], memory.initial(len(seen[0]["slots"])))
    assert not all(rows.all() for rows in eligible)    # some rows did wait
    for one, rows, slots, after in zip(seen, eligible, told, seen[1:]):
        assert torch.equal(slots, torch.where(rows, one["new_slots"], one["slots"]))
        assert torch.equal(after["slots"], slots)
    for one, t in zip(seen, times):    # and the memory is at work in every pass
        assert (one["new_slots"] != one["slots"]).flatten(1).any(1).all()
        assert torch.equal(one["t"], t.repeat(2 if "cfg_scale" in more else 1))


def test_a_pass_over_a_block_written_out(backbone, memory, monkeypatch):
    """Thinking passes and the first of a block run the canvas, the others the block: the Injector
    answers its embeddings, the Mixer reads what leaves its layers; the time is that of the whole
    canvas, the anchors are those of the whole answer."""
    seen = steps_of(memory, monkeypatch)
    inputs = {"conditioner": [], "injector": [], "mixer": []}
    for name, found in inputs.items():
        getattr(memory, name).register_forward_pre_hook(
            lambda module, args, found=found: found.append(args))
    canvases, confidences = [], []
    prompt = torch.randint(300, (2, 5))

    def see(canvas, report):
        canvases.append(canvas)
        confidences.append(report.confidence)

    generate(backbone, prompt, memory=memory, gen_length=12, block_length=4, steps=9, think=2,
             cache=True, on_step=see)
    assert [one["ids"].shape[1] for one in seen] == [17, 17] + [17, 4, 4] * 3
    assert [(canvas == MASK).sum().item() for canvas in canvases] == [
        24, 24, 20, 18, 16, 12, 10, 8, 4, 2, 0]        # of both rows; none while it thinks
    # the last pass of the second block: 4 tokens of the first and 3 of the second are written
    block, canvas = slice(9, 13), canvases[6]
    assert (canvas == MASK).sum(1).tolist() == [5, 5]
    anchors = memory.anchors(torch.arange(17).expand(2, -1) >= 5)
    slots, h = seen[6]["new_slots"], seen[7]["h"]
    assert h.shape == (2, 4, 64)
    (t,) = inputs["conditioner"][7]
    assert t.tolist() == pytest.approx([5 / 12, 5 / 12])
    target, source, _, bias = inputs["injector"][7]
    assert torch.equal(target, backbone.embedding(canvas[:, block]))
    assert torch.equal(source, slots)
    assert torch.equal(bias, anchors.to_slots[:, :, block])
    target, source, _, bias = inputs["mixer"][7]
    assert torch.equal(target, slots)
    assert torch.equal(source, h)
    assert torch.equal(bias, anchors.to_tokens[..., block])
    p = backbone.head(h).softmax(-1)                   # (2, 4, V)
    p[..., MASK] = 0
    want = p.amax(-1).masked_fill(canvas[:, block] != MASK, 0)
    torch.testing.assert_close(confidences[7], F.pad(want, (9, 4)))


# --------------------------------------------------------------------- THE SAMPLER'S SMALL PARTS


@pytest.mark.parametrize("kind, n_masks, settings, reason", [
    ("llada", 0, dict(gen_length=10, block_length=4, steps=4), "divide"),
    ("llada", 0, dict(block_length=4, steps=3), "divide"),
    ("llada", 0, dict(steps=0), "steps"),
    ("llada", 0, dict(gen_length=-2), "below 0"),
    ("llada", 0, dict(think=-17), "below 0"),
    ("llada", 0, dict(temperature=1e-9), "1e-6"),
    ("llada", 0, dict(alg_temp=1e-9), "1e-6"),
    ("llada", 0, dict(remasking="best"), "best"),
    ("llada", 0, dict(remasking="entropy", threshold=0.9), "threshold"),
    ("llada", 0, dict(remasking="maskgit_plus", threshold=0.9, alg_temp=1.0), "alg_temp"),
    ("llada", 0, dict(carry="shuffle", cfg_scale=1.0), "no guidance"),
    ("llada", 0, dict(cache=True), "give block_length"),
    ("llada", 1, dict(cache=True, block_length=4), "cache .* the prompt has masks"),
    ("dream", 0, dict(cache=True, block_length=4), "cache .* first pass of a block"),
    ("dream", 0, dict(cache=True, block_length=4, remasking="random"), "first pass of a block"),
    ("dream", 0, dict(cache=True, block_length=4, remasking="entropy", steps=2),
     "first pass of a block")])
def test_settings_that_cannot_work_are_refused_in_one_sentence(kind, n_masks, settings, reason):
    prompt = torch.randint(300, (2, 5))
    prompt[0, :n_masks] = MASK
    with pytest.raises(InputError, match=reason) as error:
        generate(toy(kind), prompt, **dict(gen_length=8, steps=4) | settings)
    assert "\n" not in str(error.value)


def state(n, step=0, seed=0, **settings):
    """A sampler before n eligible positions, of a vocabulary of five: the last is the mask."""
    eligible = torch.ones(1, n, dtype=torch.bool)
    config = replace(TINY, vocab_size=5, mask_id=4, eos_id=3)
    return SamplerState(eligible, torch.tensor([n]), step, slice(n), Sampling(**settings), config,
                        [torch.Generator().manual_seed(seed)])


def test_a_threshold_takes_all_that_reach_it_and_at_least_the_surest():
    for confidence, want in (([0.1, 0.5, 0.4, 0.7], [1, 3]), ([0.1, 0.3, 0.4, 0.2], [2])):
        found = select_above_threshold(torch.tensor([confidence]), state(4, threshold=0.5))
        assert found[0].nonzero()[:, 0].tolist() == want


@pytest.mark.parametrize("settings", [
    dict(), dict(temperature=0.001), dict(temperature=0.1), dict(remasking="maskgit_plus"),
    *(dict(remasking="maskgit_plus", **more)
      for more in (dict(temperature=0.1), dict(top_k=1), dict(top_p=0.5)))], ids=str)
def test_a_mask_is_never_written_however_likely_it_is(settings):
    """Where the mask alone would survive a filter, the best other token does."""
    propose, _ = REMASKING[settings.get("remasking", "low_confidence")]
    logits = torch.tensor([[-50.0, -1.0, -50.0, -50.0, 300.0]])
    tokens, _ = propose(logits, state(1, **settings))
    assert tokens.item() == 1


def test_temperature_samples_the_softmax():
    """Gumbel-max draws from softmax(logits / T). LLaDA's confidence is that at T = 1, Dream's that
    at T, the mask counted in both."""
    logits, n = torch.tensor([2.0, 1.0, 0.0, -1.0, 2.0]), 40_000
    for remasking, confidence_at in (("low_confidence", 1), ("maskgit_plus", 0.5)):
        propose, _ = REMASKING[remasking]
        tokens, confidence = propose(logits.repeat(n, 1),
                                     state(n, temperature=0.5, remasking=remasking))
        torch.testing.assert_close(tokens.bincount(minlength=4) / n, (logits[:4] / 0.5).softmax(0),
                                   atol=0.01, rtol=0)
        torch.testing.assert_close(confidence, (logits / confidence_at).softmax(0)[tokens])


@pytest.mark.parametrize("settings, want", [
    (dict(), 0.5), (dict(top_k=2), 0.5 / 0.8), (dict(top_k=99), 0.5),
    (dict(top_p=0.6), 0.5 / 0.8),                      # the first one beyond stays
    (dict(top_p=0.45), 1.0), (dict(top_p=1.0), 0.5),
    (dict(top_p=0.55, top_k=2), 0.5 / 0.8),            # top_k first would leave 0.625 alone
    (dict(remasking="topk_margin"), 0.2), (dict(remasking="topk_margin", top_k=2), 0.2 / 0.8),
    (dict(remasking="entropy", top_k=2), -0.6615632)], ids=str)    # of 0.625 and 0.375
def test_dreams_filters_come_before_its_confidence(settings, want):
    p = torch.tensor([[0.5, 0.3, 0.15, 0.04, 0.01]])
    settings = dict(remasking="maskgit_plus") | settings
    token, confidence = propose_dream(p.log(), state(1, **settings))
    assert token.item() == 0 and confidence.item() == pytest.approx(want, abs=1e-5)


def test_origin_reveals_each_with_the_probability_of_its_share_and_all_in_the_last_step():
    """Steps 0 and 1 of 2: timesteps 1, 0.5005, 0.001, so the first share is 0.4995."""
    n = 20_000
    first = select_by_chance(torch.zeros(1, n), state(n, 0, steps=2, remasking="origin"))
    assert first.float().mean().item() == pytest.approx(0.4995, abs=0.015)
    assert select_by_chance(torch.zeros(1, n), state(n, 1, steps=2, remasking="origin")).all()


def test_alg_temp_reveals_the_surer_the_sooner():
    """Gumbel-top-1 of confidence / alg_temp draws from its softmax."""
    confidence = torch.tensor([[0.9, 0.5, 0.1]])
    want = (confidence / 0.4).softmax(-1)[0]
    drawn = torch.zeros(3)
    for seed in range(500):                            # one of three: share 0.4995 of 3 masks
        one = state(3, seed=seed, steps=2, remasking="maskgit_plus", alg_temp=0.4)
        drawn += select_share(confidence, one)[0].float()
    torch.testing.assert_close(drawn / drawn.sum(), want, atol=0.06, rtol=0)


def test_the_random_order_does_not_look_at_the_confidence():
    confidence = torch.tensor([[0.9, 0.7, 0.5, 0.3, 0.1]])
    revealed = [select_random_quota(confidence, state(5, seed=seed, steps=5))
                for seed in range(40)]
    assert {int(where.sum()) for where in revealed} == {1}
    assert torch.cat(revealed).any(0).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_of_text_can_come_last_or_never_at_every_temperature(temperature, backbone):
    """Issue 137 of the original: above temperature 0 it suppressed end-of-turn only."""
    ends = [TINY.eos_id, TINY.eos_id - 2]
    backbone.config = replace(backbone.config, eot_id=ends[1])
    backbone.lm_head.weight[ends[0]] *= 30
    backbone.lm_head.weight[ends[1]] = -backbone.lm_head.weight[ends[0]]
    sure = {False: [], True: []}       # of what is revealed, of ends and of others
    given = dict(gen_length=12, steps=12, temperature=temperature)
    prompt = torch.randint(300, (1, 4))
    generate(backbone, prompt, confidence_eos_eot_inf=True, **given,
             on_step=lambda canvas, report: sure[canvas[report.revealed].item() in ends].append(
                 report.confidence[report.revealed].item()))
    assert set(sure[True]) == {0}
    free, banned = (generate(backbone, prompt, logits_eos_inf=ban, **given)
                    for ban in (False, True))
    assert (free == TINY.eos_id).any() and not (banned == TINY.eos_id).any()


def test_what_a_step_begins_with_is_what_carry_says(backbone, memory, monkeypatch):
    seen = steps_of(memory, monkeypatch)
    expected = {"keep": lambda slots: slots, "reset": lambda slots: memory.initial(3),
                "shuffle": lambda slots: slots[[2, 0, 1]]}
    prompt = torch.randint(300, (3, 6))

    def sample(carry):
        generate(backbone, prompt, memory=memory, gen_length=8, steps=4, think=1, carry=carry)

    def train(carry):
        unroll(backbone, memory, **unroll_case(3), lam=0.5, carry=carry)

    for carry, want in expected.items():
        for program in (sample, train):
            seen.clear()
            program(carry)
            assert torch.equal(seen[0]["slots"], memory.initial(3))
            for one, after in zip(seen, seen[1:]):
                assert torch.equal(after["slots"], want(one["new_slots"]))
    with pytest.raises(InputError, match="two or more"):
        generate(backbone, prompt[:1], memory=memory, carry="shuffle")


def test_blanks_in_a_text_are_filled_in_place(backbone, memory, monkeypatch):
    """With answer_start the anchors and the time are those of the whole answer."""
    ids = torch.randint(300, (1, 9))
    ids[0, [2, 3, 7]] = MASK
    seen = steps_of(memory, monkeypatch)
    for answer_start, places, times in ((None, [2, 3, 7], [1.0, 2 / 3, 1 / 3]),
                                        (1, range(1, 9), [3 / 8, 2 / 8, 1 / 8])):
        seen.clear()
        out = generate(backbone, ids, gen_length=0, steps=3, memory=memory,
                       answer_start=answer_start)
        assert torch.equal(out[ids != MASK], ids[ids != MASK]) and not (out == MASK).any()
        maskable = torch.tensor([[i in places for i in range(9)]])
        for one, t in zip(seen, times, strict=True):
            assert one["t"].item() == pytest.approx(t)
            assert torch.equal(one["anchors"].to_tokens, memory.anchors(maskable).to_tokens)
    # rows with other blanks do not matter, with guidance neither
    both = torch.cat((ids, ids.roll(3, dims=1)))
    given = dict(gen_length=0, steps=3, memory=memory, cfg_scale=1.0, temperature=0.7)
    out = generate(backbone, both, **given)
    for i in range(2):
        assert torch.equal(generate(backbone, both[i:i + 1], seeds=[i], **given)[0], out[i])


# ------------------------------------------------------------------------------------- LOSSES

@pytest.mark.parametrize("visible_share", [0.0, 0.4])
def test_the_diffusion_loss_is_lladas(visible_share, backbone):
    """sum(CE / p) over masked answer tokens, over the answer's length, averaged over rows; a share
    of the visible ones counts too, with weight 1."""
    torch.manual_seed(6)
    ids, maskable = torch.randint(300, (3, 10)), torch.zeros(3, 10, dtype=torch.bool)
    maskable[0, 4:] = maskable[1, 7:] = maskable[2] = True
    t, noise = torch.tensor([0.6, 0.5, 0.2]), torch.rand(3, 10)
    want, n_visible = 0, 0
    for b in range(3):
        p, canvas = (1 - 1e-3) * t[b] + 1e-3, ids[b].clone()
        masked = [i for i in range(10) if maskable[b, i] and noise[b, i] < p]
        visible = [i for i in range(10)
                   if maskable[b, i] and noise[b, i] >= p and noise[b, i] > 1 - visible_share]
        canvas[masked] = MASK
        n_visible += len(visible)
        logits = backbone(canvas[None])[0]
        for weight, positions in ((1 / p, masked), (1, visible)):
            ce = sum(F.cross_entropy(logits[i], ids[b, i]) for i in positions)
            want += weight * ce / maskable[b].sum() / 3
    assert (n_visible > 2) == (visible_share > 0)
    torch.testing.assert_close(diffusion_loss(backbone, ids, maskable, t, noise,
                                              visible_share=visible_share), want)


def test_chunks_and_recomputing_do_not_change_the_cross_entropy(backbone):
    h, targets = torch.randn(50, 64, requires_grad=True), torch.randint(300, (50,))
    want = F.cross_entropy(backbone.head(h), targets, reduction="none")
    for backbone.recompute in (False, True):
        ce, confidence = cross_entropy(backbone, h, targets, chunk=7)
        torch.testing.assert_close(ce, want)
        torch.testing.assert_close(confidence, backbone.head(h).log_softmax(-1).amax(-1))
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), h, retain_graph=True)[0]
                                     for x in (ce, want)))


def unroll_case(batch=2):
    """Answers of 6, 8 and 5 tokens; steps that reveal nothing; rows of both orders."""
    torch.manual_seed(2)
    maskable = torch.zeros(3, 11, dtype=torch.bool)
    maskable[0, 5:] = maskable[1, 3:] = maskable[2, 6:] = True
    counts = torch.tensor([[3, 0, 2, 1], [1, 1, 4, 2], [0, 2, 0, 3]])
    case = dict(ids=torch.randint(300, (3, 11)), maskable=maskable, counts=counts,
                noise=torch.rand(3, 11), by_confidence=torch.tensor([True, False, True]))
    return {name: value[:batch] for name, value in case.items()}


def written_unroll(backbone, memory, ids, maskable, counts, noise, by_confidence, lam, slots):
    """The loss of one sample from slots, and dense_k for each k, with nothing batched."""
    left = maskable.nonzero()[:, 0].tolist()
    N = len(left)
    loss, dense_by_step = 0, []
    for n in counts.tolist():
        canvas = ids.clone()
        canvas[left] = MASK
        h, slots = memory.step(
            backbone, canvas[None], slots, t=torch.tensor([len(left) / N]),
            anchors=memory.anchors(maskable[None]), context=backbone.context(ids[None]))
        log_p = backbone.head(h[0]).log_softmax(-1)
        ce = {i: -log_p[i, ids[i]] for i in left}
        score = log_p.amax(-1) if by_confidence else noise
        revealed = sorted(left, key=lambda i: -score[i].item())[:n]
        dense = sum(ce.values()) / max(len(left), 1)
        reveal = sum(ce[i] for i in revealed) / max(n, 1)
        loss += n / N * (lam * dense + (1 - lam) * reveal)
        dense_by_step.append(float(torch.as_tensor(dense).detach()))
        left = [i for i in left if i not in revealed]
    assert not left
    return loss, torch.tensor(dense_by_step)


@pytest.mark.parametrize("think", [0, 2])
def test_the_unroll_is_the_formula_in_values_and_in_all_gradients(think, backbone, memory):
    """PUMBA's eq. F.1: ground-truth reveals, memory through all steps. Passes that think before
    leave slots, but no gradient."""
    case = unroll_case(3)
    results = []
    for b in range(3):
        one = {name: value[b] for name, value in case.items()}
        slots = memory.initial(1)
        with torch.no_grad():
            for _ in range(think):
                _, slots = memory.step(
                    backbone, one["ids"].masked_fill(one["maskable"], MASK)[None], slots,
                    t=torch.ones(1), anchors=memory.anchors(one["maskable"][None]),
                    context=backbone.context(one["ids"][None]))
        results.append(written_unroll(backbone, memory, **one, lam=0.3, slots=slots))
    losses, dense_by_step = zip(*results)
    want = sum(losses) / 3
    loss, dense = unroll(backbone, memory, **case, lam=0.3, think=think)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(dense, torch.stack(dense_by_step).mean(0))

    names, parameters = zip(*memory.named_parameters())
    found, expected = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (loss, want))
    for name, a, b in zip(names, found, expected):
        if name == "initial_slots" and think:          # what began before the unroll
            assert a is None and b is None
        else:
            assert b.any() and (a - b).norm() < 1e-3 * b.norm(), name
