"""The memory is a no-op until trained, of fixed size, and its gradient runs along the whole chain."""
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from conftest import GOLDEN, ROOT
from diffusion import generate, unroll
from metastate import MemoryConfig, MetaState, load_checkpoint, load_memory, masked_fraction, preset, \
    save_checkpoint
from model import PRESETS, TINY, Backbone, InputError, load_backbone


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "tiny"])
def test_the_presets_are_about_0_6_percent(name):
    with torch.device("meta"):
        backbone = Backbone(PRESETS[name][0])
        memory = MetaState(preset(backbone))
    share = sum(p.numel() for p in memory.parameters()) / sum(p.numel() for p in backbone.parameters())
    assert 0.005 <= share <= 0.007


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
        h, new = memory.step(backbone, ids, slots, maskable=maskable, rows=maskable)
        assert torch.equal(backbone.head(h), backbone(ids, rows=maskable))
        assert not torch.equal(new, slots)             # it works all the same
        slots = new


def test_time_means_the_same_in_training_and_sampling(backbone, memory, monkeypatch):
    """Both see t = masked / maskable, from the one function that computes it."""
    times = []
    forward = memory.time.forward
    monkeypatch.setattr(memory.time, "forward", lambda t: times.append(t.tolist()) or forward(t))
    prompt, mask = torch.randint(300, (1, 5)), torch.ones(1, 8, dtype=torch.bool)
    generate(backbone, prompt, gen_length=8, steps=4, memory=memory)
    ids = torch.randint(300, (1, 13))
    unroll(backbone, memory, ids, torch.nn.functional.pad(mask, (5, 0)), torch.tensor([[2, 2, 2, 2]]),
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
    alone, slots = memory.step(backbone, ids, memory.initial(1), maskable=maskable, rows=maskable)
    other = torch.randint(300, (1, 14))
    other[:, 10:] = TINY.mask_id
    padded = torch.cat((torch.nn.functional.pad(ids, (4, 0), value=7), other))
    maskable = padded == TINY.mask_id
    attention = torch.ones_like(padded)
    attention[0, :4] = 0
    h, both = memory.step(backbone, padded, memory.initial(2), maskable=maskable, rows=maskable,
                          attention_mask=attention)
    torch.testing.assert_close(h[:4], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[:1], slots, atol=1e-5, rtol=1e-5)


def test_the_state_does_not_grow_with_the_text(backbone, memory):
    for T in (4, 400):
        ids = torch.full((2, T), TINY.mask_id)
        rows = torch.ones_like(ids, dtype=torch.bool)
        _, slots = memory.step(backbone, ids, memory.initial(2), maskable=rows, rows=rows)
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
    found, update = updater(slots[:, None], read, time)
    torch.testing.assert_close(found[:, 0], cell(updater.norm(read, time)[:, 0], slots))
    assert 0 < update.min() and update.max() < 1


def losses(backbone, memory, counts=((2, 2, 2, 2), (1, 3, 0, 4)), **options):
    torch.manual_seed(3)
    ids, maskable = torch.randint(300, (2, 12)), torch.zeros(2, 12, dtype=torch.bool)
    maskable[:, 4:] = True
    return unroll(backbone, memory, ids, maskable, torch.tensor(counts),
                  torch.rand(2, 12), torch.tensor([True, False]), lam=0.5, **options)


def test_gradients_run_along_the_memory_and_never_into_the_backbone(backbone, memory):
    """Only the last step reveals, so that only its loss counts: what the slots of the first steps
    receive came through the memory, and with carry="detach" nothing does."""
    seen = []
    step = memory.step

    def spy(*args, **kwargs):
        h, slots = step(*args, **kwargs)
        slots.retain_grad()
        seen.append(slots)
        return h, slots

    memory.step = spy
    for carry, reached in (("keep", True), ("detach", False), ("reset", False)):
        seen.clear()
        losses(backbone, memory, ((0, 0, 0, 8), (0, 0, 0, 8)), carry=carry)[0].backward()
        assert [s.grad is not None and s.grad.any().item() for s in seen[:3]] == [reached] * 3, carry
        assert all(p.grad is None for p in backbone.parameters())
        if carry == "keep":
            silent = [n for n, p in memory.named_parameters() if p.grad is None or not p.grad.any()]
            assert silent == []
        memory.zero_grad()


def test_what_step_one_read_changes_the_loss_of_step_four_through_the_memory_alone(backbone, memory):
    base = {carry: losses(backbone, memory, carry=carry)[1] for carry in ("keep", "reset")}
    for carry in base:
        calls = []
        handle = memory.mixer.register_forward_hook(
            lambda module, inputs, output: calls.append(1) or (output + 1 if len(calls) == 1 else None))
        moved = losses(backbone, memory, carry=carry)[1]
        handle.remove()
        assert (moved != base[carry]).tolist() == [False] + [carry == "keep"] * 3


def test_trace_tells_time_gate_and_change(backbone, memory):
    ids = torch.full((2, 6), TINY.mask_id)
    rows, trace = torch.ones_like(ids, dtype=torch.bool), []
    _, slots = memory.step(backbone, ids, memory.initial(2), maskable=rows, rows=rows, trace=trace)
    (found,) = trace
    assert found["t"].tolist() == [1, 1] and found["update_gate"].shape == (2, 5)
    start = memory.initial(2)
    torch.testing.assert_close(found["slot_change"], (slots - start).norm(dim=2) / start.norm(dim=2))


def test_bf16_compute_is_close_to_fp32(backbone, memory):
    """Parameters stay in float32; the loss moves by no more than bf16's rounding explains."""
    exact = losses(backbone, memory)[0].item()
    rounded = losses(backbone.to(torch.bfloat16), memory)[0]
    rounded.backward()
    assert memory.slots.dtype == memory.slots.grad.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact, rel=0.01) and rounded.item() != exact


def test_checkpointing_changes_no_gradient(backbone, memory):
    gradients = []
    for backbone.checkpointing in (False, True):
        memory.zero_grad()
        losses(backbone, memory)[0].backward()
        gradients.append([p.grad.clone() for p in memory.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_memory_checkpoints(backbone, memory, tmp_path):
    path = tmp_path / "memory.pt"
    save_checkpoint(path, memory, config=asdict(memory.config), backbone="tiny")
    loaded = load_memory(path, backbone)
    assert all(torch.equal(a, b) for a, b in zip(memory.parameters(), loaded.parameters()))
    with pytest.raises(InputError, match="width 64, not 128"):
        load_memory(path, Backbone(replace(TINY, d_model=128)))
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="memory.pt"):
        load_checkpoint(path)


COMPILED = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
from dataclasses import replace
from diffusion import generate, unroll
from metastate import MemoryConfig, MetaState, compile_layers
from model import TINY, Backbone

torch.manual_seed(0)
backbone = Backbone(replace(TINY, n_layer=3)).requires_grad_(False).eval()
memory = MetaState(MemoryConfig(64, 5, 32, 4, 16, write_layer=1, read_layer=2))
torch.nn.init.normal_(memory.injector.out.weight)
ids, noise = torch.randint(300, (2, 12)), torch.rand(2, 12)
maskable, counts = torch.arange(12).expand(2, -1) >= 4, torch.full((2, 4), 2)

def run():
    loss, _ = unroll(backbone, memory, ids, maskable, counts, noise, torch.tensor([True, False]), lam=0.5)
    return (loss, torch.autograd.grad(loss, list(memory.parameters())),
            generate(backbone, ids[:, :4], gen_length=8, steps=4, memory=memory))

want = run()
compile_layers(backbone)
for backbone.checkpointing in (False, True):
    for found, expected in zip(run(), want):
        torch.testing.assert_close(found, expected)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_layers_give_the_same_loss_gradients_and_tokens(tmp_path):
    """In a process of its own: the compiler's helpers would hang forks of this one."""
    done = subprocess.run([sys.executable, "-c", COMPILED, ROOT], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
