"""The memory is the method on paper: its step equals the formulas written out, in values and in
gradients; untrained it is an exact no-op; its cost and its state do not grow with the text."""
import math
from dataclasses import replace
from functools import partialmethod

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from conftest import GOLDEN, at_most
from diffusion import generate, unroll
from metastate import (AdaRMSNorm, MemoryConfig, MetaState, load_checkpoint, load_memory,
                       masked_fraction, preset, save_checkpoint)
from model import DREAM, LLADA, TINY, Backbone, InputError, load_backbone

MASK = TINY.mask_id


@pytest.mark.parametrize("backbone_config, want, n_parameters", [
    (TINY, MemoryConfig(64, n_slots=16, d_slot=64, n_head=4, d_time=64, n_free_head=0), 91_976),
    (LLADA, MemoryConfig(4096, n_slots=64, d_slot=1408, n_head=11, d_time=256, n_free_head=5),
     46_281_622),
    (DREAM, MemoryConfig(3584, n_slots=64, d_slot=1408, n_head=11, d_time=256, n_free_head=5),
     43_134_870)], ids=["tiny", "llada", "dream"])
def test_the_presets_are_these(backbone_config, want, n_parameters):
    with torch.device("meta"):
        memory = MetaState(preset(Backbone(backbone_config)))
    assert memory.config == want
    assert sum(p.numel() for p in memory.parameters()) == n_parameters


def test_initialisation_is_1_over_the_root_of_the_inputs_and_what_differs_is_this():
    torch.manual_seed(0)
    memory = MetaState(MemoryConfig(320, n_slots=96, d_slot=224, n_head=7, d_time=144,
                                    n_free_head=3))
    zero = {"injector.out.weight"}
    for name, p in memory.named_parameters():
        if name.endswith("bias") or "gain" in name:
            zero.add(name)
        elif name not in {"initial_slots", "sharpness"} | zero:
            assert p.std().item() * p.shape[1] ** 0.5 == pytest.approx(1, abs=0.02), name
            assert abs(p.mean().item()) < 0.05 * p.std().item(), name
    assert {name for name, p in memory.named_parameters() if not p.any()} == zero
    assert memory.initial_slots.std().item() == pytest.approx(0.5, abs=0.01)
    assert memory.sharpness.tolist() == [[0, 0, 0, 1, 1, 1, 1]] * 2


@pytest.mark.parametrize("name", ["llada_a_fp32", "llada_a_bf16", "dream_a_fp32", "dream_a_bf16"])
def test_an_untrained_memory_is_an_exact_no_op(name):
    backbone = load_backbone(GOLDEN / name)
    torch.manual_seed(0)
    memory = MetaState(MemoryConfig(64, n_slots=6, d_slot=32, n_head=4, d_time=16, n_free_head=1))
    ids = torch.randint(backbone.config.mask_id, (3, 7))
    ids[:, 3:] = backbone.config.mask_id
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :2] = 0
    context = backbone.context(ids, attention_mask)
    want = backbone.run(backbone.embed(ids), context)
    anchors = memory.anchors(torch.arange(7).expand(3, -1) >= 3, attention_mask)
    slots = memory.initial(3)
    for t in (1.0, 0.5):
        h, new_slots = memory.step(backbone, ids, slots, t=torch.full((3,), t), anchors=anchors,
                                   context=context)
        assert torch.equal(h, want) and h.dtype == backbone.lm_head.weight.dtype
        assert new_slots.dtype == torch.float32
        assert (new_slots != slots).flatten(1).any(1).all()    # it works all along
        slots = new_slots


# ---------------------------------------------------------------------- THE STEP, WRITTEN OUT

def written_norm(x, module, t_cond):
    gain = t_cond @ module.gain.weight.T + module.gain.bias
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + gain)


def written_attention(module, target, source, t_cond, bias):
    """Cross-attention of one sample, head by head. target (Nt, .), source (Ns, .); bias: a list
    of (Nt, Ns), one for each head."""
    target = written_norm(target, module.target_norm, t_cond)
    source = written_norm(source, module.source_norm, t_cond)
    q = target @ module.q.weight.T
    k = source @ module.k.weight.T
    v = source @ module.v.weight.T
    d = q.shape[-1] // len(bias)
    heads = []
    for head, b in enumerate(bias):
        own = slice(head * d, (head + 1) * d)
        score = q[:, own] @ k[:, own].T / math.sqrt(d) + b
        heads.append(score.softmax(-1) @ v[:, own])
    return torch.cat(heads, dim=-1) @ module.out.weight.T


def written_time(conditioner, t):
    frequencies = [10 ** (3 * i / 63) * math.pi / 2 for i in range(64)]
    sinusoids = [math.sin(f * t) for f in frequencies] + [math.cos(f * t) for f in frequencies]
    first, _, second, _ = conditioner.mlp
    x = F.silu(torch.tensor(sinusoids) @ first.weight.T + first.bias)
    return F.silu(x @ second.weight.T + second.bias)


def written_anchors(memory, maskable, real):
    """M slots share out the answer evenly: the middle of slot m's stretch is at (m + 1/2) / M of
    it, the middle of its j-th token at (j + 1/2) / N. A head's score falls with the square of how
    many slots lie between the two. Lists, by head, of (M, T) for the Mixer, (T, M) for the
    Injector."""
    c = memory.config
    N, T = sum(maskable), len(maskable)
    to_tokens, to_slots = [], []
    for head in range(c.n_head):
        mixer, injector = torch.zeros(c.n_slots, T), torch.zeros(T, c.n_slots)
        for i in range(T):
            j = sum(maskable[:i + 1]) - 1              # the answer's tokens up to here
            for m in range(c.n_slots):
                slots_between = (j + 0.5) / N * c.n_slots - (m + 0.5)
                if head >= c.n_free_head:
                    mixer[m, i] = -(memory.sharpness[0, head] * slots_between) ** 2
                    injector[i, m] = -(memory.sharpness[1, head] * slots_between) ** 2
                if not real[i]:
                    mixer[m, i] = -math.inf            # no slot reads padding
        to_tokens.append(mixer)
        to_slots.append(injector)
    return to_tokens, to_slots


def written_update(updater, slots, read, t_cond):
    x = written_norm(read, updater.norm, t_cond)
    d = slots.shape[-1]

    def gate(i, x, linear):
        rows = slice(i * d, (i + 1) * d)
        return x @ linear.weight[rows].T + linear.bias[rows]

    z = torch.sigmoid(gate(0, x, updater.from_read) + gate(0, slots, updater.from_slots))
    r = torch.sigmoid(gate(1, x, updater.from_read) + gate(1, slots, updater.from_slots))
    n = torch.tanh(gate(2, x, updater.from_read) + r * gate(2, slots, updater.from_slots))
    return (1 - z) * slots + z * n


def written_step(backbone, memory, ids, slots, maskable, real):
    """MetaState.step for one sample, from the drawing's words: ids, maskable, real are lists of T,
    slots (M, d). Returns h (T, D) and the new slots."""
    masked = [i == backbone.config.mask_id and m for i, m in zip(ids, maskable)]
    t_cond = written_time(memory.conditioner, sum(masked) / sum(maskable))
    to_tokens, to_slots = written_anchors(memory, maskable, real)
    h = backbone.embedding.weight[ids]
    h = h + written_attention(memory.injector, h, slots, t_cond, to_slots)
    context = backbone.context(torch.tensor([ids]), torch.tensor([real]))
    h = backbone.run(h[None], context)[0]
    read = written_attention(memory.mixer, slots, h, t_cond, to_tokens)
    return h, written_update(memory.updater, slots, read, t_cond)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("n_free_head", [0, 1])
def test_the_step_is_the_formula_in_values_and_in_all_gradients(n_free_head, recompute):
    """One net under all of it: time, anchors, norms, heads, where it writes and reads, the gates.
    The gradients tell what values do not: that the Mixer's reading leads back to the Injector."""
    torch.manual_seed(0)
    config = replace(TINY, kind="dream", n_layer=2, mask_id=17)
    backbone = Backbone(config).requires_grad_(False).eval()
    backbone.recompute = recompute
    memory = MetaState(MemoryConfig(64, n_slots=5, d_slot=24, n_head=3, d_time=16,
                                    n_free_head=n_free_head))
    for p in memory.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():              # every head of its own sharpness; the free ones stay at 0
        memory.sharpness *= torch.tensor([[0.6, 1.0, 1.4], [1.7, 0.5, 0.9]])
    ids = torch.randint(18, 300, (3, 13))
    maskable, real = (torch.zeros(3, 13, dtype=torch.bool) for _ in range(2))
    real[0, 4:] = real[1] = real[2, 2:] = True
    maskable[0, 7:] = maskable[1, 2:] = True
    maskable[2, [4, 5, 8, 12]] = True                  # blanks in a text
    ids[0, 9:] = ids[1, [2, 3, 7, 12]] = ids[2, [5, 8, 12]] = 17
    ids[1, 0] = 17                     # a mask that was never to be filled has no part in the time
    slots = memory.initial(3) + torch.randn(3, 5, 24)

    want_h, want_slots = map(torch.stack, zip(*(
        written_step(backbone, memory, ids[b].tolist(), slots[b], maskable[b].tolist(),
                     real[b].tolist()) for b in range(3))))
    h, new_slots = memory.step(
        backbone, ids, slots, t=masked_fraction(ids, maskable, 17),
        anchors=memory.anchors(maskable, real), context=backbone.context(ids, real))
    torch.testing.assert_close(h, want_h, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(new_slots, want_slots, atol=1e-4, rtol=1e-3)

    at = {"slots": slots, **dict(memory.named_parameters())}
    for weight in (0, 1):              # of h in the loss: alone, the new slots lead everywhere, too
        direction = torch.randn_like(h) * weight, torch.randn_like(new_slots)
        found, want = (torch.autograd.grad(outputs, list(at.values()), direction,
                                           retain_graph=True)
                       for outputs in ((h, new_slots), (want_h, want_slots)))
        for name, a, b in zip(at, found, want):
            assert (a - b).norm() < 1e-3 * b.norm() or not (a.any() or b.any()), name
            free = n_free_head if name == "sharpness" else 0
            assert b[..., free:].any() and not b[..., :free].any(), name


def test_the_state_does_not_grow_with_the_text_and_the_work_only_in_proportion(backbone, memory):
    backbone.layers = torch.nn.ModuleList()            # theirs is quadratic
    work = {}
    for T in (200, 400, 600):
        ids = torch.full((2, T), MASK)
        with FlopCounterMode(display=False) as counter:
            _, slots = memory.step(backbone, ids, memory.initial(2), t=torch.ones(2),
                                   anchors=memory.anchors(ids == MASK),
                                   context=backbone.context(ids))
        assert slots.shape == (2, 5, 32)
        work[T] = counter.get_total_flops()
    assert work[600] - work[400] == work[400] - work[200] > 0


# ---------------------------------------------------------------------------- PRECISION, MEMORY

def losses(backbone, memory):
    torch.manual_seed(3)
    ids = torch.randint(300, (2, 12))
    maskable = torch.arange(12).expand(2, -1) >= 3
    return unroll(backbone, memory, ids, maskable, torch.tensor([[2, 2, 2, 3], [1, 3, 0, 5]]),
                  torch.rand(2, 12), torch.tensor([True, False]), lam=0.5)


def test_a_small_gain_is_not_lost_in_bf16():
    norm = AdaRMSNorm(8, 4)
    torch.nn.init.zeros_(norm.gain.weight)
    torch.nn.init.constant_(norm.gain.bias, 1e-3)
    x, t_cond = torch.randn(2, 3, 8), torch.randn(2, 1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        ratio = norm(x, t_cond) / F.rms_norm(x, (8,), eps=1e-6)
    torch.testing.assert_close(ratio, torch.full_like(x, 1.001), atol=1e-5, rtol=0)


def sorted_shape(tensor):
    return tuple(sorted(tensor.shape))


def test_bf16_is_close_and_recomputing_keeps_no_rounded_weights(backbone, memory):
    """A bf16 backbone's autocast makes copies of the memory's weights. A graph that keeps them for
    each of K steps is what a large memory cannot pay; recomputed, it keeps none. The parameters
    stay in float32, and the loss moves by no more than bf16's rounding explains."""
    exact = losses(backbone, memory)[0].item()
    backbone.to(torch.bfloat16)
    shapes = {sorted_shape(p) for module in (memory.injector, memory.mixer, memory.updater)
              for p in module.parameters() if p.dim() == 2}    # of a copy, turned around or not
    n_copied, gradients = {}, {}
    for backbone.recompute in (False, True):
        kept = {}

        def pack(tensor):
            if tensor.dtype == torch.bfloat16 and sorted_shape(tensor) in shapes:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = losses(backbone, memory)
        n_copied[backbone.recompute] = len(kept)
        gradients[backbone.recompute] = torch.autograd.grad(loss, list(memory.parameters()))
    assert n_copied[False] >= 10 and n_copied[True] == 0       # eight maps, two of the Updater
    assert loss.item() == pytest.approx(exact, rel=0.03) and loss.item() != exact
    for a, b in zip(*gradients.values()):
        torch.testing.assert_close(a, b)
        assert a.dtype == torch.float32


# --------------------------------------------------------------------------------- CHECKPOINTS

def save(path, backbone, memory):
    """A memory.pt as train.py writes it."""
    save_checkpoint(path, memory, backbone={"name": "llada", "digest": backbone.digest()})


def refusal(path, backbone, **options):
    """The one sentence that load_memory refuses the file with."""
    with at_most(20), pytest.raises(InputError) as error:
        load_memory(path, backbone, **options)
    message = str(error.value)
    assert "memory.pt" in message and "\n" not in message and len(message) < 400
    return message


def test_a_memory_comes_back_as_it_was(backbone, memory, tmp_path):
    path = tmp_path / "memory.pt"
    save(path, backbone, memory.train())
    loaded = load_memory(path, backbone.to(torch.bfloat16))    # the same backbone in any precision
    assert loaded.config == memory.config and not loaded.training
    for a, b in zip(memory.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b) and b.dtype == torch.float32
    digest = load_checkpoint(path)["digest"]           # of the content
    memory.sharpness.data += 1
    save(path, backbone, memory)
    assert load_checkpoint(path)["digest"] != digest


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('code in a checkpoint was executed')",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    torch.save({"model": Hostile()}, tmp_path / "memory.pt")
    with pytest.raises(InputError, match="memory.pt cannot be used"):
        load_checkpoint(tmp_path / "memory.pt")


def test_a_memory_of_another_backbone_is_refused(backbone, memory, tmp_path):
    path = tmp_path / "memory.pt"
    save(path, backbone, memory)
    other = Backbone(backbone.config)                  # of the same width
    assert "another backbone, llada; " in refusal(path, other)
    assert torch.equal(load_memory(path, other, any_backbone=True).sharpness, memory.sharpness)
    wider = Backbone(replace(TINY, d_model=128))
    assert "width 64, not 128" in refusal(path, wider, any_backbone=True)


def config(**changes):
    return lambda state: state["config"].update(changes)


def weights(**changes):
    return lambda state: state["model"].update(changes)


@pytest.mark.parametrize("break_it", [
    config(n_slots=10**9), config(n_slots=-1), config(n_slots=4), config(n_slots="x"),
    config(n_head=5), config(write_layer=1), weights(more=torch.zeros(1)),
    weights(initial_slots=torch.zeros(5, 31)), weights(initial_slots=3),
    lambda state: state["model"]["mixer.q.weight"][:1, :1].fill_(float("nan")),
    lambda state: state["model"]["initial_slots"][:1, :1].fill_(float("inf")),
    lambda state: state["model"].pop("initial_slots"), lambda state: state.pop("model"),
    lambda state: state.update(config=[]), lambda state: state.update(backbone=None),
    lambda state: state["backbone"].pop("digest")])
def test_a_memory_with_nonsense_in_it_is_refused(break_it, backbone, memory, tmp_path):
    """Before anything of its sizes is made."""
    path = tmp_path / "memory.pt"
    save(path, backbone, memory)
    state = torch.load(path, weights_only=True)
    break_it(state)
    torch.save(state, path)
    refusal(path, backbone)
    for data in (b"not a checkpoint", b"", path.read_bytes()[:2000]):
        path.write_bytes(data)
        refusal(path, backbone)
    path.unlink()
    refusal(path, backbone)


# ------------------------------------------------------------------------------------ COMPILED

def test_compiled_layers_give_the_same_loss_gradients_and_tokens(backbone, memory, monkeypatch):
    """Traced as torch.compile does it, but run without its kernels, which need a C++ compiler and
    minutes: the graphs are ours, the kernels are torch's."""
    prompt = torch.randint(300, (2, 4))
    backbone.recompute = True

    def run():
        loss, _ = losses(backbone, memory)
        tokens = generate(backbone, prompt, gen_length=8, block_length=8, steps=4, memory=memory,
                          cache=True)
        return loss, torch.autograd.grad(loss, list(memory.parameters())), tokens

    want = run()
    traced = partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    backbone.compile_layers()
    counters.clear()
    for found, expected in zip(run(), want):
        torch.testing.assert_close(found, expected)
    assert counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()
