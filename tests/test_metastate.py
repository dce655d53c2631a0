"""The memory is a no-op until trained, of fixed size; its gradient runs along the whole chain."""
import math
import os
from dataclasses import replace
from functools import partialmethod

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from conftest import GOLDEN, at_most
from diffusion import generate, unroll
from metastate import (AdaRMSNorm, MemoryConfig, MetaState, load_checkpoint, load_memory,
                       masked_fraction, preset, save_checkpoint)
from model import PRESETS, TINY, Backbone, InputError, load_backbone


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "tiny"])
def test_the_presets_are_about_0_6_percent(name):
    with torch.device("meta"):
        backbone = Backbone(PRESETS[name].config)
        memory = MetaState(preset(backbone))
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (memory, backbone))
    assert 0.005 <= ours / theirs <= 0.007


@pytest.mark.parametrize("name", [p.parent.name for p in GOLDEN.glob("*/golden.npz")] + ["tiny"])
def test_an_untrained_memory_is_an_exact_no_op(name, backbone):
    if name != "tiny":
        backbone = load_backbone(GOLDEN / name)
    c = backbone.config
    memory = MetaState(MemoryConfig(c.d_model, 6, 32, 4, 16, write_layer=1, read_layer=2))
    ids = torch.randint(c.mask_id, (3, 12))
    maskable = torch.rand(ids.shape) < 0.5
    ids[maskable], slots = c.mask_id, memory.initial(3)
    for _ in range(3):
        h, new = memory.step(backbone, ids, slots, maskable=maskable, wanted=maskable)
        assert torch.equal(backbone.head(h), backbone(ids, wanted=maskable))
        assert not torch.equal(new, slots)             # it works all the same
        slots = new


# ---------------------------------------------------------------------- THE STEP, WRITTEN OUT

def norm(x, module, time):
    gain = time @ module.gain.weight.T + module.gain.bias
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + gain)


def attend(module, target, source, time, bias):
    """Cross-attention of one sample, head by head. target (Nt, .), source (Ns, .); bias: a list
    of (Nt, Ns), one for each head."""
    target, source = norm(target, module.target_norm, time), norm(source, module.source_norm, time)
    q, k, v = target @ module.q.weight.T, source @ module.k.weight.T, source @ module.v.weight.T
    d = q.shape[-1] // len(bias)
    heads = []
    for i, b in enumerate(bias):
        own = slice(i * d, (i + 1) * d)
        score = q[:, own] @ k[:, own].T / math.sqrt(d) + b
        heads.append(score.softmax(-1) @ v[:, own])
    return torch.cat(heads, dim=-1) @ module.out.weight.T


def written_out_step(backbone, memory, ids, slots, maskable, real):
    """MetaState.step for one sample, from the paper's and the drawing's words: ids, maskable, real
    are lists of T, slots (M, d). Returns h (T, D) before the head, and the new slots."""
    T, c, mask_id = len(ids), memory.config, backbone.config.mask_id
    h, context = backbone.embed(torch.tensor([ids]), torch.tensor([real]).long())

    # the time is the share of the answer that is masked
    t = sum(ids[i] == mask_id and maskable[i] for i in range(T)) / sum(maskable)
    frequencies = [10 ** (3 * i / 63) * math.pi / 2 for i in range(64)]
    sinusoids = [math.sin(f * t) for f in frequencies] + [math.cos(f * t) for f in frequencies]
    first, _, second, _ = memory.time.mlp
    time = F.silu(F.silu(torch.tensor(sinusoids, dtype=h.dtype) @ first.weight.T + first.bias)
                  @ second.weight.T + second.bias)

    # M slots share out the answer evenly: the middle of slot m's stretch is at (m + 1/2) / M of it,
    # the middle of its j-th token at (j + 1/2) / N. A head's score falls with the square of how
    # many slots lie between the two.
    N, M = sum(maskable), c.n_slots
    to_tokens, to_slots = [], []
    for head in range(c.n_head):
        mixer = torch.zeros(M, T, dtype=h.dtype)
        injector = torch.zeros(T, M, dtype=h.dtype)
        for i in range(T):
            j = sum(maskable[:i + 1]) - 1              # the answer's tokens up to here
            for m in range(M):
                slots_between = (j + 0.5) / N * M - (m + 0.5)
                if head >= c.n_free_head:
                    mixer[m, i] = -(memory.sharpness[0, head] * slots_between) ** 2
                    injector[i, m] = -(memory.sharpness[1, head] * slots_between) ** 2
                if not real[i]:
                    mixer[m, i] = -math.inf            # no slot reads padding
        to_tokens.append(mixer)
        to_slots.append(injector)

    for layer in backbone.layers[:c.write_layer]:
        h = layer(h, context)
    h = h + attend(memory.injector, h[0], slots, time, to_slots)       # once, at this layer alone
    for layer in backbone.layers[c.write_layer:c.read_layer]:
        h = layer(h, context)
    read = attend(memory.mixer, slots, h[0], time, to_tokens)
    for layer in backbone.layers[c.read_layer:]:
        h = layer(h, context)

    u = memory.updater
    x = norm(read, u.norm, time)
    d = c.d_slot

    def gate(i, x, linear):
        rows = slice(i * d, (i + 1) * d)
        return x @ linear.weight[rows].T + linear.bias[rows]

    z = torch.sigmoid(gate(0, x, u.from_read) + gate(0, slots, u.from_slots))
    r = torch.sigmoid(gate(1, x, u.from_read) + gate(1, slots, u.from_slots))
    n = torch.tanh(gate(2, x, u.from_read) + r * gate(2, slots, u.from_slots))
    return h[0], (1 - z) * slots + z * n


@pytest.mark.parametrize("n_free_head", [0, 1])
@pytest.mark.parametrize("write_layer, read_layer", [(1, 3), (0, 4), (2, 2)])
def test_the_step_is_the_formula(write_layer, read_layer, n_free_head):
    """One net under all of it: time, anchors, norms, heads, where it writes and reads, the GRU."""
    torch.manual_seed(0)
    config = replace(TINY, n_layer=4, shift=True, mask_id=17)
    backbone = Backbone(config).requires_grad_(False).eval()
    memory = MetaState(MemoryConfig(64, n_slots=5, d_slot=24, n_head=3, d_time=16, n_free_head=
                                    n_free_head, write_layer=write_layer, read_layer=read_layer))
    for p in memory.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():              # every head of its own sharpness; the free ones stay at 0
        memory.sharpness *= torch.tensor([[0.6, 1.0, 1.4], [1.7, 0.5, 0.9]])
    ids = torch.randint(18, 300, (3, 13))
    maskable, wanted, real = (torch.zeros(3, 13, dtype=torch.bool) for _ in range(3))
    real[0, 4:] = real[1] = real[2, 2:] = True
    maskable[0, 7:] = maskable[1, 2:] = True
    maskable[2, [4, 5, 8, 12]] = True                  # blanks in a text
    ids[0, 9:] = ids[1, [2, 3, 7, 12]] = ids[2, [5, 8, 12]] = 17
    ids[1, 0] = 17                     # a mask that was never to be filled has no part in the time
    wanted[0, 7:] = wanted[1, [1, 2, 12]] = wanted[2, 5:9] = True
    slots = torch.randn(3, 5, 24)
    h, new_slots = memory.step(backbone, ids, slots, maskable=maskable, wanted=wanted,
                               attention_mask=real.long())
    want_h = []
    for b in range(3):
        every_h, want_slots = written_out_step(backbone, memory, ids[b].tolist(), slots[b],
                                               maskable[b].tolist(), real[b].tolist())
        scored_by = [max(i - 1, 0) for i in wanted[b].nonzero()[:, 0].tolist()]
        want_h.append(every_h[scored_by])
        torch.testing.assert_close(new_slots[b], want_slots, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(h, torch.cat(want_h), atol=1e-4, rtol=1e-4)


def test_anchored_heads_look_at_their_own_stretch_at_the_start():
    """A fresh memory of 4 slots over an answer of 12: slot m scores its own 3 tokens best, they
    score it best; free heads begin without a preference."""
    memory = MetaState(MemoryConfig(64, 4, 32, n_head=4, d_time=16, write_layer=0, read_layer=1,
                                    n_free_head=2))
    maskable = torch.arange(15)[None] >= 3
    to_tokens, to_slots = memory.anchors(maskable)
    assert to_tokens.shape == (1, 4, 4, 15) and to_slots.shape == (1, 4, 15, 4)
    assert not to_tokens[:, :2].any() and not to_slots[:, :2].any()
    own = torch.arange(12) // 3
    for head in (2, 3):
        assert torch.equal(to_slots[0, head, 3:].argmax(1), own)
        best = to_tokens[0, head, :, 3:].topk(3, dim=1).indices.sort().values
        assert torch.equal(best, torch.arange(12).view(4, 3))
        # the middle token of a stretch is the anchor itself
        assert to_tokens[0, head, range(4), range(4, 15, 3)].abs().max() < 1e-9


def test_time_means_the_same_in_training_and_sampling(backbone, memory, monkeypatch):
    """Both see t = masked / maskable, from the one function that computes it."""
    times = []
    forward = memory.time.forward
    monkeypatch.setattr(memory.time, "forward", lambda t: times.append(t.tolist()) or forward(t))
    prompt, mask = torch.randint(300, (1, 5)), torch.ones(1, 8, dtype=torch.bool)
    generate(backbone, prompt, gen_length=8, steps=4, memory=memory)
    ids = torch.randint(300, (1, 13))
    unroll(backbone, memory, ids, F.pad(mask, (5, 0)), torch.tensor([[2, 2, 2, 2]]),
           torch.rand(1, 13), torch.tensor([False]), lam=0.5)
    assert times == [[1.0], [0.75], [0.5], [0.25]] * 2
    ids = torch.tensor([[TINY.mask_id, 1, TINY.mask_id, 3]])
    maskable = torch.tensor([[False, True, True, True]])
    assert masked_fraction(ids, maskable, TINY.mask_id).item() == pytest.approx(1 / 3)


def test_padding_prompt_length_and_batch_do_not_matter(backbone, memory):
    """A row of a padded batch gives what it gives alone."""
    ids = torch.randint(300, (1, 10))
    ids[:, 6:] = TINY.mask_id
    maskable = ids == TINY.mask_id
    alone, slots = memory.step(backbone, ids, memory.initial(1), maskable=maskable, wanted=maskable)
    other = torch.randint(300, (1, 14))
    other[:, 10:] = TINY.mask_id
    padded = torch.cat((F.pad(ids, (4, 0), value=7), other))
    maskable = padded == TINY.mask_id
    attention = torch.ones_like(padded)
    attention[0, :4] = 0
    h, both = memory.step(backbone, padded, memory.initial(2), maskable=maskable, wanted=maskable,
                          attention_mask=attention)
    torch.testing.assert_close(h[:4], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[:1], slots, atol=1e-5, rtol=1e-5)


def test_the_state_does_not_grow_with_the_text(backbone, memory):
    for T in (4, 400):
        ids = torch.full((2, T), TINY.mask_id)
        every = torch.ones_like(ids, dtype=torch.bool)
        _, slots = memory.step(backbone, ids, memory.initial(2), maskable=every, wanted=every)
        assert slots.shape == (2, 5, 32)


def test_the_updater_is_a_gru(memory):
    """Against torch.nn.GRUCell with the same weights: gate order r, z, n there, and z inverted."""
    d, updater = 32, memory.updater
    cell = torch.nn.GRUCell(d, d)
    for ours, theirs in ((updater.from_read, "ih"), (updater.from_slots, "hh")):
        for kind in ("weight", "bias"):
            z, r, n = getattr(ours, kind).detach().chunk(3)
            getattr(cell, f"{kind}_{theirs}").data = torch.cat((r, -z, n))
    slots, read, time = torch.randn(7, d), torch.randn(7, 1, d), torch.randn(7, 1, 16)
    found = updater(slots[:, None], read, time)
    torch.testing.assert_close(found[:, 0], cell(updater.norm(read, time)[:, 0], slots))


# ----------------------------------------------------------------------------------- GRADIENTS

def losses(backbone, memory, counts=((2, 2, 2, 2), (1, 3, 0, 4)), **options):
    torch.manual_seed(3)
    ids, maskable = torch.randint(300, (2, 12)), torch.zeros(2, 12, dtype=torch.bool)
    maskable[:, 4:] = True
    return unroll(backbone, memory, ids, maskable, torch.tensor(counts),
                  torch.rand(2, 12), torch.tensor([True, False]), lam=0.5, **options)


def test_gradients_run_along_the_memory_and_never_into_the_backbone(backbone, memory):
    """Only the last step reveals, so that only its loss counts: what the slots of the first steps
    receive came through the memory, and without persistence nothing does."""
    seen = []
    step = memory.step

    def spy(*args, **kwargs):
        h, slots = step(*args, **kwargs)
        slots.retain_grad()
        seen.append(slots)
        return h, slots

    memory.step = spy
    for carry, reached in (("keep", True), ("reset", False)):
        seen.clear()
        losses(backbone, memory, ((0, 0, 0, 8), (0, 0, 0, 8)), carry=carry)[0].backward()
        assert [s.grad is not None and s.grad.any().item() for s in seen[:3]] == [reached] * 3
        assert all(p.grad is None for p in backbone.parameters())
        if carry == "keep":
            silent = [n for n, p in memory.named_parameters() if p.grad is None or not p.grad.any()]
            assert silent == []
        memory.zero_grad()


def test_what_step_one_read_changes_later_losses_through_the_memory_alone(backbone, memory):
    base = {carry: losses(backbone, memory, carry=carry)[1] for carry in ("keep", "reset")}
    for carry in base:
        calls = []
        handle = memory.mixer.register_forward_hook(
            lambda module, inputs, output: calls.append(1) or (
                output + 1 if len(calls) == 1 else None))
        moved = losses(backbone, memory, carry=carry)[1]
        handle.remove()
        assert (moved != base[carry]).tolist() == [False] + [carry == "keep"] * 3


def test_bf16_compute_is_close_to_fp32(backbone, memory):
    """Parameters stay in float32; the loss moves by no more than bf16's rounding explains."""
    exact = losses(backbone, memory)[0].item()
    rounded = losses(backbone.to(torch.bfloat16), memory)[0]
    rounded.backward()
    assert memory.slots.dtype == memory.slots.grad.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact, rel=0.01) and rounded.item() != exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_changes_no_gradient(dtype, backbone, memory):
    backbone.to(dtype)
    gradients = []
    for backbone.recompute in (False, True):
        memory.zero_grad()
        losses(backbone, memory)[0].backward()
        gradients.append([p.grad.clone() for p in memory.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_recomputing_keeps_neither_activations_nor_rounded_weights(backbone, memory):
    """A bf16 backbone's autocast makes copies of the memory's weights. A graph that keeps them for
    each of K steps is what a large memory cannot pay; recomputed, it keeps none."""
    backbone.to(torch.bfloat16)
    weights = {tuple(sorted(p.shape)) for module in (memory.mixer, memory.injector, memory.updater)
               for p in module.parameters() if p.dim() == 2}
    kept, copies = {}, {}
    for backbone.recompute in (False, True):
        found = {}

        def pack(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = losses(backbone, memory)
        own = {p.untyped_storage().data_ptr() for m in (memory, backbone) for p in m.parameters()}
        found = [tensor for pointer, tensor in found.items() if pointer not in own]
        kept[backbone.recompute] = sum(tensor.untyped_storage().nbytes() for tensor in found)
        copies[backbone.recompute] = sum(tensor.dtype == torch.bfloat16 and
                                         tuple(sorted(tensor.shape)) in weights for tensor in found)
        del loss
    assert copies[False] >= 4 * 3      # in each of four steps, of each of the three modules
    assert copies[True] < 4            # none in every step; picked rows may look like one
    assert kept[True] < kept[False] / 5


# --------------------------------------------------------------------------------- CHECKPOINTS

def save(path, backbone, memory, **changes):
    """A memory.pt as train.py writes it, with changes in its config."""
    save_checkpoint(path, memory, settings={}, step=1,
                    backbone={"name": "llada", "digest": backbone.digest()})
    if changes:
        state = torch.load(path, weights_only=True)
        state["config"] |= changes
        torch.save(state, path)


def test_memory_checkpoints(backbone, memory, tmp_path):
    path = tmp_path / "memory.pt"
    save(path, backbone, memory.train())
    loaded = load_memory(path, backbone)
    assert all(torch.equal(a, b) for a, b in zip(memory.parameters(), loaded.parameters()))
    assert loaded.config == memory.config and not loaded.training
    with pytest.raises(InputError, match="width 64, not 128"):
        load_memory(path, Backbone(replace(TINY, d_model=128)), any_backbone=True)
    for data in (b"not a checkpoint", b"", path.read_bytes()[:2000]):
        path.write_bytes(data)
        with pytest.raises(InputError, match="memory.pt"):
            load_checkpoint(path)
    with pytest.raises(InputError, match="memory.pt"):
        load_checkpoint(tmp_path / "nothing" / "memory.pt")


def test_a_checkpoint_executes_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"model": Evil(), "config": {}, "settings": {}}, tmp_path / "memory.pt")
    with pytest.raises(InputError, match="memory.pt"):
        load_checkpoint(tmp_path / "memory.pt")
    assert not (tmp_path / "executed").exists()


def test_a_memory_is_refused_by_another_backbone(backbone, memory, tmp_path):
    path = tmp_path / "memory.pt"
    save(path, backbone, memory)
    other = Backbone(backbone.config).eval()           # of the same width
    with pytest.raises(InputError, match="another backbone, llada; .*--any-backbone"):
        load_memory(path, other)
    loaded = load_memory(path, other, any_backbone=True)
    assert torch.equal(loaded.slots, memory.slots)
    assert torch.equal(load_memory(path, backbone.to(torch.bfloat16)).slots, memory.slots)
    for found in (None, {}, {"name": "llada"}, 3):     # of an older version, or made up
        save_checkpoint(path, memory, settings={}, backbone=found)
        with pytest.raises(InputError, match="memory.pt"):
            load_memory(path, backbone)


@pytest.mark.parametrize("changes", [
    dict(n_slots=10**9), dict(n_slots=-1), dict(n_slots="x"), dict(n_slots=float("nan")),
    dict(n_slots=None), dict(n_slots=0), dict(n_slots=5.0), dict(n_slots=True), dict(n_slots=4),
    dict(n_slots=10**30), dict(write_layer=3), dict(write_layer=-1), dict(read_layer=4),
    dict(d_slot=2**30), dict(d_slot=2**31 - 1), dict(d_slot=0), dict(d_time=2**31 - 1),
    dict(d_time=0), dict(n_head=0), dict(n_head=64), dict(n_head=5), dict(n_free_head=-1),
    dict(d_model=2**31 - 1), dict(extra=1)], ids=str)
def test_a_memory_with_nonsense_in_its_config_is_refused(changes, backbone, memory, tmp_path):
    """By its sizes, before anything of them is made."""
    save(tmp_path / "memory.pt", backbone, memory, **changes)
    with at_most(20), pytest.raises(InputError, match="memory.pt") as error:
        load_memory(tmp_path / "memory.pt", backbone)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("break_it", [
    lambda state: state["model"].pop("slots"),
    lambda state: state["model"].update(slots=torch.zeros(5, 31)),
    lambda state: state["model"].update(slots=3),
    lambda state: state["model"]["slots"].fill_(float("nan")),
    lambda state: state["model"].update(slots=torch.zeros(5, 32, dtype=torch.long)),
    lambda state: state["config"].update(n_head=3) or state["model"].update(
        sharpness=torch.zeros(2, 3)),
    lambda state: state.update(model=[]), lambda state: state.update(config=[]),
    lambda state: state.pop("settings")])
def test_a_memory_whose_parts_do_not_fit_is_refused(break_it, backbone, memory, tmp_path):
    save(tmp_path / "memory.pt", backbone, memory)
    state = torch.load(tmp_path / "memory.pt", weights_only=True)
    break_it(state)
    torch.save(state, tmp_path / "memory.pt")
    with pytest.raises(InputError, match="memory.pt"):
        load_memory(tmp_path / "memory.pt", backbone)


# ------------------------------------------------------------------------------------ COMPILED

def test_compiled_layers_give_the_same_loss_gradients_and_tokens(backbone, memory, monkeypatch):
    """Traced and differentiated as torch.compile does it, but run without its kernels, which need
    a C++ compiler and minutes: the graphs are ours, the kernels are torch's."""
    ids, noise = torch.randint(300, (2, 12)), torch.rand(2, 12)
    maskable, counts = torch.arange(12).expand(2, -1) >= 4, torch.full((2, 4), 2)

    def run():
        loss, _ = unroll(backbone, memory, ids, maskable, counts, noise,
                         torch.tensor([True, False]), lam=0.5)
        tokens = generate(backbone, ids[:, :4], gen_length=8, steps=4, memory=memory)
        return loss, torch.autograd.grad(loss, list(memory.parameters())), tokens

    want = run()
    traced = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    backbone.compile_layers()
    counters.clear()
    for backbone.recompute in (False, True):
        for found, expected in zip(run(), want):
            torch.testing.assert_close(found, expected)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    torch._dynamo.reset()


def test_a_small_gain_is_not_lost_in_bf16():
    norm = AdaRMSNorm(8, 4)
    torch.nn.init.zeros_(norm.gain.weight)
    torch.nn.init.constant_(norm.gain.bias, 1e-3)
    x, time = torch.randn(2, 3, 8), torch.randn(2, 1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        ratio = norm(x, time) / F.rms_norm(x, (8,), eps=1e-6)
    torch.testing.assert_close(ratio, torch.full_like(x, 1.001), atol=1e-5, rtol=0)
