"""Defends LongMamba: the scan is Mamba's recurrence, and the filter does what the paper says."""
import numpy as np
import pytest
import torch

from experiments import longmamba as lm


@pytest.fixture
def mamba() -> lm.Mamba:
    torch.manual_seed(0)
    model = lm.Mamba(lm.Config(d_model=32, n_layer=2, vocab_size=50, d_state=4))
    torch.nn.init.normal_(model.embedding.weight)      # as trained: the channels matter
    return model.requires_grad_(False)


def test_the_scan_is_mambas_recurrence_written_out_by_channel_and_state():
    torch.manual_seed(1)
    shapes = (2, 5, 6), (2, 5, 6), (4, 6), (2, 5, 4), (2, 5, 4), (2, 4, 6)
    inputs = [torch.randn(shape, dtype=torch.double) for shape in shapes]
    y, last = lm.scan(*inputs)
    x, delta, A, write, read, h = (v.numpy() for v in inputs)
    for b, e in np.ndindex(2, 6):
        state = h[b, :, e]
        for t in range(5):
            decay = np.exp(delta[b, t, e] * A[:, e])                   # (4,)
            state = decay * state + delta[b, t, e] * write[b, t] * x[b, t, e]
            assert y[b, t, e].item() == pytest.approx(read[b, t] @ state)
        assert last[b, :, e].tolist() == pytest.approx(state)


def test_the_filtered_block_is_mambas_written_out(mamba):
    p = dict(mamba.layers[0]["mixer"].named_parameters())
    u = torch.randn(2, 9, 32)
    x, z = (u @ p["in_proj.weight"].T).split(64, dim=-1)
    padded = torch.cat((torch.zeros(2, 3, 64), x), dim=1)          # causal: nothing before
    x = sum(padded[:, k:k + 9] * p["conv1d.weight"][:, 0, k] for k in range(4))
    x = torch.nn.functional.silu(x + p["conv1d.bias"])
    low, write, read = (x @ p["x_proj.weight"].T).split((2, 4, 4), dim=-1)
    delta = torch.log1p(torch.exp(low @ p["dt_proj.weight"].T + p["dt_proj.bias"]))
    delta = delta * (delta > 0.01)
    y, h = lm.scan(x, delta, -p["A_log"].exp().T, write, read, torch.zeros(2, 4, 64))
    want = ((y + p["D"] * x) * z * torch.sigmoid(z)) @ p["out_proj.weight"].T
    found, state = mamba.layers[0]["mixer"](u, None, lambda delta: delta * (delta > 0.01))
    for pair in (found, want), (state.h, h), (state.delta, delta):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


def test_reading_in_pieces_is_reading_at_once_filtered_or_not(mamba, monkeypatch):
    ids = torch.randint(50, (2, 64))
    calibration = lm.calibrate(mamba, ids[:, :16], (64,), clamp=0.0)
    rules = [lm.make_rule(channels, 64, theta=0.3) for channels in calibration]
    for chosen in (None, rules):
        want, _ = mamba(ids, rules=chosen)
        most, states = mamba(ids[:, :63], rules=chosen)
        found = torch.cat((most, mamba(ids[:, 63:], states, chosen)[0]), dim=1)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(want, mamba(ids)[0])     # the filter filtered
    monkeypatch.setattr(lm, "TRAIN_LENGTH", 16)        # evaluate reads in pieces of this length
    want = lm.compare(mamba(ids)[0], ids, ids)[0]["text"].item()
    assert lm.evaluate(mamba, ids, ids)["loss"]["text"] == pytest.approx(want)


def test_threshold_of_a_curve_worked_by_hand():
    curve = torch.tensor([4.0, 2.0, 1.0, 1.0]).view(1, 4, 1)       # its sum, the budget, is 8
    # Stretched to 8 points: 4, 3.5, 2.5, 1.75, 1.25, 1, 1, 1. Three of them first exceed 8.
    assert lm.find_threshold(curve, 8).item() == 1.75
    assert lm.find_threshold(curve, 4).item() == 0                 # the training length: keep all


def test_the_filter_keeps_local_channels_and_what_is_above_the_threshold():
    channels = lm.Channels(torch.tensor([0.9, 0.1]), None, {9: torch.tensor([0.5, 0.5])})
    delta = torch.tensor([[[0.4, 0.4], [0.5, 0.5], [0.6, 0.6]]])
    found = lm.make_rule(channels, 9, theta=0.2)(delta)
    assert torch.equal(found, torch.tensor([[[0.0, 0.4], [0.0, 0.5], [0.6, 0.6]]]))


class Recorded:
    """In place of a model: two layers with the Delta of a list, and A = -1 and -2."""
    layers = [{"mixer": torch.nn.ParameterDict({"A_log": torch.tensor([[0.0, np.log(2)]])})}] * 2

    def __init__(self, *deltas: torch.Tensor):
        self.states = [lm.State(None, None, delta) for delta in deltas]

    def __call__(self, ids: torch.Tensor) -> tuple:
        return None, self.states


def test_calibration_clamps_sums_and_decays_as_worked_by_hand():
    delta = torch.tensor([9.0, 1.0, 5.0, 2.0]).view(1, 4, 1) / 10  # C = 50 %: 0.9 becomes 0.5
    model = Recorded(delta, torch.cat((delta, delta / 2)))
    _, second = lm.calibrate(model, None, (4,), clamp=0.5)
    assert second.budget.item() == pytest.approx((1.3 + 0.65) / 2)
    assert second.decay.item() == pytest.approx(np.exp([-1.3, -2.6, -0.65, -1.3]).mean())


def test_the_language_asks_what_it_says():
    ids, targets = lm.draw(np.random.default_rng(0), 8, 200, query_rate=0.1)
    assert (ids == lm.QUERY).sum() > 2 * 8
    for text, target in zip(ids, targets):
        key = (text == lm.KEY).nonzero().item()
        is_query = text == lm.QUERY
        assert is_query[-1] and not is_query[:key].any()
        assert (target[is_query] == text[key + 1]).all()
        is_subject = (text >= lm.FIRST_SUBJECT) & (text < lm.FIRST_VALUE)
        verbs = (text[:-2] == lm.VERB).nonzero().flatten().tolist()
        assert len(verbs) > 10
        for t in verbs:
            before = is_subject[:t].nonzero().max().item()
            assert target[t] == text[t + 1] == text[before]
            assert t - before > 2 * (lm.D_CONV - 1)    # out of the convolutions' reach


def test_a_pair_that_breaks_the_budget_is_not_chosen_however_small_its_loss(monkeypatch):
    held = {"loss": {"needle": 9.0, "text": 0.0}, "kept": [1.0, 1.2]}
    broken = {"loss": {"needle": 0.0, "text": 0.0}, "kept": [1.0, 2.66]}
    monkeypatch.setattr(lm, "evaluate", lambda *a: held if a[-1] == lm.THETAS[1] else broken)
    assert lm.choose(None, {0.5: [], 0.1: []}, None, None) == (lm.THETAS[1], 0.1)


def test_training_stops_when_the_needle_is_learned_and_not_before(monkeypatch):
    answers = [{"needle": needle, "subject": subject}              # neither alone suffices
               for needle, subject in [(1.0, 0.5), (0.9, 1.0), (1.0, 1.0)]]
    monkeypatch.setattr(lm, "CHECK_EVERY", 1)
    monkeypatch.setattr(lm, "evaluate", lambda *_: {"right": answers.pop(0)})
    assert lm.train(lm.Mamba(lm.TOY), np.random.default_rng(0), 32) == 2


def test_a_whole_run_filters_nothing_at_the_training_length_and_prints_a_row(monkeypatch, capsys):
    draw, run, runs = lm.draw, lm.run, []
    smaller = {"MAX_ITERS": 1, "STAGES": (32,), "LENGTHS": (128, 256), "THETAS": (0.05,),
               "CLAMPS": (0.0,), "run": lambda seed: runs.append(run(seed)) or runs[0],
               "draw": lambda rng, n, *length, **rate: draw(rng, 2, *length, **rate)}
    for name, value in smaller.items():
        monkeypatch.setattr(lm, name, value)
    monkeypatch.setattr("sys.argv", ["longmamba.py", "--seeds", "3"])
    lm.main()
    vanilla, filtered, _ = runs[0]["scores"].values()
    assert vanilla[0]["loss"] == pytest.approx(filtered[0]["loss"])
    assert vanilla[1]["loss"] != filtered[1]["loss"]
    assert capsys.readouterr().out.splitlines()[2].startswith("| 3 | 1 | 0.05, 0.0% | ")
