"""LongMamba: the scan is the recurrence, the filter is what the paper says, the weights load."""
import json
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch

from experiments import longmamba as lm
from model import InputError

SMALL = lm.Config(d_model=32, n_layer=2, vocab_size=50, d_state=4)
L = 16


@pytest.fixture
def mamba() -> lm.Mamba:
    torch.manual_seed(0)
    model = lm.Mamba(SMALL)
    torch.nn.init.normal_(model.embedding.weight)      # as trained: the channels matter
    return model.requires_grad_(False)


@pytest.fixture
def calibration(mamba) -> lm.Calibration:
    return lm.calibrate(mamba, torch.randint(50, (8, L)), [4 * L], clamp=0.0)


def scan_inputs(length: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    n_batch, n_state, width = 2, 4, 6
    x = torch.randn(n_batch, length, width)
    delta = torch.rand(n_batch, length, width)
    A = -torch.rand(n_state, width)
    write = torch.randn(n_batch, length, n_state)
    read = torch.randn(n_batch, length, n_state)
    h = torch.randn(n_batch, n_state, width)
    return [v.double() for v in (x, delta, A, write, read, h)]


def write_safetensors(path, tensors: dict[str, torch.Tensor]) -> None:
    header = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


def test_parameter_count_of_mamba_130m():
    with torch.device("meta"):
        model = lm.Mamba(lm.MAMBA_130M)
    assert sum(p.numel() for p in model.parameters()) == 129_135_360


@pytest.mark.parametrize("length", [1, 2, 36, 37])     # a step, a square, a padded last chunk
def test_chunked_scan_is_the_recurrence(length):
    results = []
    for scan in (lm.sequential_scan, lm.chunked_scan):
        inputs = [v.requires_grad_() for v in scan_inputs(length)]
        y, h = scan(*inputs)
        loss = y.square().sum() + h.sin().sum()        # both outputs, with unequal gradients
        results.append([y, h, *torch.autograd.grad(loss, inputs)])
    for want, found in zip(*results):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


def test_prefill_and_steps_are_the_full_forward(mamba):
    ids = torch.randint(50, (2, 20))
    want, _ = mamba(ids)
    logits, states = mamba(ids[:, :11])
    found = [logits]
    for t in range(11, 20):
        logits, states = mamba(ids[:, t:t + 1], states)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, dim=1), want, rtol=1e-4, atol=1e-5)


def test_up_to_the_training_length_nothing_is_filtered(mamba, calibration):
    ids = torch.randint(50, (2, 4 * L))
    for arm in lm.ARMS:
        assert lm.rules_of(arm, calibration, L, theta=0.05) is None
        rules = lm.rules_of(arm, calibration, 4 * L, theta=0.05)
        is_vanilla = torch.equal(mamba(ids, rules=rules)[0], mamba(ids)[0])
        assert is_vanilla == (arm == "vanilla")


def test_decoding_is_never_filtered(mamba, calibration):
    ids = torch.randint(50, (2, 4 * L))
    rules = lm.make_rules(calibration, 4 * L, theta=0.0)
    _, states = mamba(ids, rules=rules)
    step = torch.randint(50, (2, 1))
    assert torch.equal(mamba(step, states, rules)[0], mamba(step, states)[0])


@pytest.mark.parametrize("scan", [lm.sequential_scan, lm.chunked_scan])
def test_zero_delta_deletes_the_update_from_that_channel(scan):
    x, delta, A, write, read, h = scan_inputs(30)
    skipped = torch.arange(30) % 3 == 1
    filtered = delta.clone()
    filtered[:, skipped, 2] = 0
    y, last = scan(x, filtered, A, write, read, h)
    whole, whole_last = scan(x, delta, A, write, read, h)
    short, short_last = scan(x[:, ~skipped], delta[:, ~skipped], A, write[:, ~skipped],
                             read[:, ~skipped], h)
    torch.testing.assert_close(y[:, ~skipped, 2], short[..., 2])
    torch.testing.assert_close(last[..., 2], short_last[..., 2])
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(y[..., others], whole[..., others])
    torch.testing.assert_close(last[..., others], whole_last[..., others])


def test_threshold_of_a_curve_worked_by_hand():
    curve = torch.tensor([4.0, 2.0, 1.0, 1.0]).view(1, 4, 1)       # its sum, the budget, is 8
    # Stretched to 8 points: 4, 3.5, 2.5, 1.75, 1.25, 1, 1, 1. Three of them first exceed 8.
    assert lm.find_threshold(curve, 8).item() == 1.75


def test_the_largest_delta_are_clamped(mamba, monkeypatch):
    delta = torch.arange(1.0, 101).flip(0).view(1, 100, 1).expand(1, 100, 64)
    monkeypatch.setattr(lm, "record_delta", lambda model, ids: [delta, delta])
    layer = lm.calibrate(mamba, torch.zeros(1, 100), [200], clamp=0.05).layers[0]
    # Of 1..100 the five largest are 96..100: each becomes 96.
    assert layer.budget.tolist() == [5050 - 10] * 64


@pytest.mark.parametrize("ratio", [2, 8])
def test_kept_delta_of_a_global_channel_sum_to_the_budget(mamba, monkeypatch, ratio):
    torch.manual_seed(2)
    length = 128 * ratio
    draw = lambda n, t: 1e-3 * torch.randn(n, t, 64).exp()         # noqa: E731
    monkeypatch.setattr(lm, "record_delta", lambda model, ids: [draw(64, 128)] * 2)
    calibration = lm.calibrate(mamba, torch.zeros(64, 128), [length], clamp=0.0)
    layer = calibration.layers[0]
    assert (layer.decay > 0.05).all()
    rule, _ = lm.make_rules(calibration, length, theta=0.05)
    delta = draw(32, length)
    kept = rule(delta)
    assert set((kept / delta).unique().tolist()) == {0.0, 1.0}
    ratio_to_budget = kept.sum(dim=1).mean(dim=0) / layer.budget
    assert 0.85 < ratio_to_budget.mean() < 1.15


def test_what_the_controls_touch(calibration):
    layer = calibration.layers[0]
    is_global = layer.decay > 0.5
    assert is_global.any() and not is_global.all()
    torch.manual_seed(3)
    delta = torch.rand(4, 4 * L, 64) * 2 * layer.thresholds[4 * L]
    out = {}
    for arm in lm.ARMS[1:]:
        rule, _ = lm.rules_of(arm, calibration, 4 * L, theta=0.5)
        out[arm] = rule(delta)
    for arm in ("LongMamba", "random tokens", "Delta scaled"):
        assert torch.equal(out[arm][..., ~is_global], delta[..., ~is_global])
    assert torch.equal(out["local filtered"][..., is_global], delta[..., is_global])
    both = torch.where(is_global, out["LongMamba"], out["local filtered"])
    assert torch.equal(out["all filtered"], both)
    kept, by_chance = ((out[arm] > 0)[..., is_global] for arm in ("LongMamba", "random tokens"))
    assert abs(kept.float().mean() - by_chance.float().mean()) < 0.05
    assert not torch.equal(kept, by_chance)
    scaled = out["Delta scaled"].sum(dim=1)[:, is_global]
    torch.testing.assert_close(scaled, layer.budget[is_global].expand_as(scaled))


def test_a_head_of_mamba_2_has_one_decay():
    A = torch.tensor([[-1.0, -2.0]])                               # (1, H)
    budget = torch.tensor([[1.0, 1.0], [3.0, 3.0]])                # (n, H)
    want = (torch.exp(A[0] * budget[0]) + torch.exp(A[0] * budget[1])) / 2
    torch.testing.assert_close(lm.total_decay(A, budget), want)


@pytest.mark.parametrize("names", [["backbone.embedding.weight"], ["lm_head.weight"],
    ["backbone.embeddings.weight"], ["backbone.embeddings.weight", "lm_head.weight"]])
def test_both_layouts_load(mamba, tmp_path, names):
    tensors = {f"backbone.{name}": tensor for name, tensor in mamba.state_dict().items()}
    embedding = tensors.pop("backbone.embedding.weight")
    tensors.update({name: embedding for name in names})
    write_safetensors(tmp_path / "model.safetensors", tensors)
    ids = torch.randint(50, (1, 9))
    found, _ = lm.load_mamba(tmp_path / "model.safetensors", SMALL)(ids)
    assert torch.equal(found, mamba(ids)[0])


def test_weights_that_do_not_fit_are_refused_in_a_sentence(mamba, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", mamba.state_dict())
    with pytest.raises(InputError, match="mamba-130m"):
        lm.load_mamba(tmp_path / "model.safetensors", lm.MAMBA_130M)


def test_logits_equal_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(4)
    config = transformers.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2,
                                      state_size=4, time_step_rank=2)
    other = transformers.MambaForCausalLM(config).eval()
    for p in other.parameters():                       # nothing may be zero or one by chance
        torch.nn.init.normal_(p, std=0.3)
    other.save_pretrained(tmp_path)
    ids = torch.randint(50, (2, 37))
    with torch.no_grad():
        want = other(ids, use_cache=False).logits
        found, _ = lm.load_mamba(tmp_path / "model.safetensors", SMALL)(ids)
    print(f"transformers {transformers.__version__}: {(found - want).abs().max():.1e}")
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_the_language_asks_what_it_says():
    batch = lm.draw(np.random.default_rng(0), 8, 200, query_rate=0.1)
    places = lm.agreement_places(batch)
    assert places.sum() > 8 * 7
    assert (batch.ids == lm.QUERY).sum() > 2 * 8
    for ids, text, answer, place in zip(*batch, places):
        key = (ids == lm.KEY).nonzero().item()
        assert set(answer[ids == lm.QUERY].tolist()) == {ids[key + 1].item()}
        assert ids[-1] == lm.QUERY
        assert not (ids[:key] == lm.QUERY).any()
        assert (answer[ids != lm.QUERY] == lm.NOTHING).all()
        is_subject = (ids >= lm.FIRST_SUBJECT) & (ids < lm.FIRST_VALUE)
        for t in place.nonzero().flatten().tolist():
            before = is_subject[:t].nonzero().max().item()
            assert text[t] == ids[before]
            assert t - before > 2 * (lm.TOY.d_conv - 1)  # out of the convolutions' reach


def test_training_and_comparison_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(lm, "LENGTHS", (128, 256))
    monkeypatch.setattr(lm, "CHOOSE_LENGTH", 256)
    monkeypatch.setattr(lm, "THETAS", (1e-3, 0.05))
    monkeypatch.setattr(lm, "CLAMPS", (0.0, 0.05))
    for name in ("N_CALIBRATE", "N_CHOOSE", "N_TEST"):
        monkeypatch.setattr(lm, name, 2)
    rng = np.random.default_rng(0)
    model = lm.train(rng, (lm.Stage(32, 2, 1e-3, 0.25, (2, 8)),))
    scores = defaultdict(list)
    lm.compare(model, rng, scores)
    for name in lm.TITLES:
        vanilla, short = (lm.pooled(scores, arm, name)[0] for arm in ("vanilla", "LongMamba"))
        assert vanilla.shape == (2,) and (vanilla == short).all()
    lm.report(scores)
    assert capsys.readouterr().out.count("| LongMamba |") == 3
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    lm.plot(scores, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0


@pytest.mark.parametrize("seed", ["-1", "x"])
def test_a_bad_seed_is_answered_in_a_sentence(seed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["longmamba.py", "--seeds", seed])
    with pytest.raises(SystemExit) as end:
        lm.main()
    assert end.value.code == 2
    assert seed in capsys.readouterr().err
