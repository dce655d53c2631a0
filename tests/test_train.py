"""Training sees the same data however it is interrupted or shared out, does what it says, and never
destroys what it finds."""
import argparse
import json
import math
import re
import shutil
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from torch import nn

import train
from conftest import ROOT, at_most
from folders import save_llada
from metastate import MetaState, load_checkpoint
from model import TINY, Backbone, InputError, load_backbone, tiny_tokenizer
from processes import Program, run_two
from sample import WORDS, Processes, dial_problems
from train import Text, TokenIds

TOKENIZER = tiny_tokenizer(WORDS)
NAMES = ("backbone", "memory")
# No setting has its default, so that --resume must find it in the checkpoint. A reveal by
# confidence would depend on the last bit of a sum.
SMALL = ("--backbone-iters 7 --backbone-batch 8 --backbone-lr 0.008 --iters 9 --batch 8 --lr 0.004 "
         "--K 3 --think 3 --lam 0.25 --confident 0 --seed 5 --problems 0 --device cpu").split()


def start(*argv):
    """The program, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        train.main()


def log(out, name):
    lines = (out / f"{name}.log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------- interrupted, shared out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupted, and its data."""
    folder = tmp_path_factory.mktemp("whole")
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, dial_problems("train", 60))))
    start("--out", folder / "run", "--data", data, *SMALL)
    return folder / "run", data


def test_the_last_tenth_of_own_data_is_held_out_and_its_loss_told(tmp_path, monkeypatch, capsys):
    seen = []
    fit, held_out_losses = train.fit, train.held_out_losses
    monkeypatch.setattr(train, "fit", lambda run, *rest, **more: (
        seen.append(run.examples), fit(run, *rest, **more)))
    monkeypatch.setattr(train, "held_out_losses", lambda *given: (
        seen.append(given[3]), held_out_losses(*given))[1])
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": "a" * n, "completion": "b"}) for n in range(1, 31)]
    data.write_text("\n".join(lines))
    start("--out", tmp_path / "run", "--data", data, *SMALL)
    assert [[len(e.prompt) for e in examples] for examples in seen] == [
        list(range(1, 28))] * 2 + [[28, 29, 30]]
    said = capsys.readouterr().out
    numbers = re.search(r"of 3 held-out examples: frozen (.+), memory reset (.+), MetaState (.+)",
                        said)
    assert len(set(numbers.groups())) == 3


KILLED = """
import os, signal, sys
import train
train.SAVE_ITERATIONS = 2
name, n = sys.argv.pop(1).split(":")
where = os if hasattr(os, name) else train
function, calls = getattr(where, name), []

def killed(*args, **more):
    calls.append(1)
    if len(calls) == int(n):
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **more)

setattr(where, name, killed)
train.run_program(train.main, "")
"""


def test_kills_change_nothing(whole, tmp_path):
    """kill -9 within an iteration, while a file is written, before it takes the place of the old
    one; --resume needs no option."""
    whole, data = whole
    out, n_goes_on = tmp_path / "killed", 0
    program = tmp_path / "killed.py"                   # train.py, that saves often and is killed
    program.write_text(KILLED)

    def begin(moment):
        more = ["--resume"] if any(out.glob("*.pt")) else ["--data", data, *SMALL]
        return Program(program, moment, "--out", out, *more, folder=tmp_path)

    for moment in ("global_gradient:2", "global_gradient:6", "fsync:2", "replace:3",
                   "global_gradient:1", "global_gradient:8", "fsync:3", "replace:2"):
        n_goes_on += any(load_checkpoint(path)["optimizers"] for path in out.glob("*.pt"))
        assert begin(moment).wait() == -signal.SIGKILL
    assert n_goes_on >= 3                              # from the middle of a training
    last = begin("global_gradient:100")
    assert last.wait() == 0, last.text()
    for name in NAMES:
        one, other = (load_checkpoint(run / f"{name}.pt") for run in (whole, out))
        assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
        assert log(out, name) == log(whole, name)
        # who samples needs no optimiser: two thirds of the file
        assert other["optimizers"] == [] and other["iteration"] == len(log(out, name))


def test_two_processes_with_accumulation_train_as_one_does(whole, tmp_path):
    """Sums in another order differ in the last bits, which the steps of training then widen."""
    whole, data = whole
    codes, texts = run_two("train.py", "--out", tmp_path / "two", "--data", data, *SMALL,
                           "--accumulate", 2, folder=tmp_path)
    assert codes == [0, 0], texts
    for name in NAMES:
        for one, two in zip(log(whole, name), log(tmp_path / "two", name), strict=True):
            exact = 1e-6 if one["iteration"] == 0 and name == "backbone" else 2e-3
            assert two["loss"] == pytest.approx(one["loss"], rel=exact)
            assert two["by_step"] == pytest.approx(one["by_step"], rel=2e-3)
            assert two["norm"] == pytest.approx(one["norm"], rel=max(exact, 1e-5) * 10)


# ------------------------------------------------------------------------- what is kept, and when

CHECKPOINTS = ["memory.pt", "backbone.pt"]


@pytest.mark.parametrize("missing, options, expected", [
    ([], SMALL, "--resume"),
    (CHECKPOINTS, SMALL, "holds a run"),               # but its backbone is there
    (["backbone.pt"], ["--resume"], "backbone.pt"),    # would be trained anew, and overwritten
    ([], ["--resume", "--data", "question"], "other data"),
    ([], ["--resume", "--data", "answer"], "other data")])
def test_a_run_is_not_overwritten_nor_goes_on_with_other_data(
        missing, options, expected, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    for name in missing:
        (out / name).unlink()
    for key in ("question", "answer"):                 # data with one of them changed
        problems = dial_problems("train", 60)
        problems[30][key] = problems[31][key]
        (tmp_path / key).write_text("\n".join(map(json.dumps, problems)))
    monkeypatch.chdir(tmp_path)
    before = contents(out)
    with pytest.raises(InputError, match=expected):
        start("--out", out, *options)
    assert before == contents(out)


def test_beside_resume_only_that_may_be_given_which_changes_no_result(whole):
    out, _ = whole
    allowed = {"weights", "data", "device", "compile", "accumulate", "keep_activations", "lr",
               "backbone_lr", "split", "problems"}
    for action in train.make_parser()._actions:
        argv = ["--resume", "--out", str(out), action.option_strings[-1]]
        if action.nargs != 0:
            is_float = action.type and action.type.__name__ == "float"
            argv.append(action.choices[-1] if action.choices else "0.5" if is_float else "1")
        if action.dest in allowed:
            assert vars(train.arguments(argv))[action.dest] in (1, 0.5, argv[-1])
        elif action.dest not in ("help", "out", "resume"):
            with pytest.raises(InputError, match=f"has {action.dest} = .*, not "):
                train.arguments(argv)
    assert train.arguments(["--resume", "--out", str(out), "--K", "3"]).lr == 0.004


def test_a_memory_is_trained_on_the_shipped_backbone_and_goes_on_with_no_other(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "dial_problems", lambda split, n: dial_problems(split, min(n, 40)))
    out = tmp_path / "run"
    shipped = ROOT / "assets" / "tiny" / "backbone"
    start("--init", shipped, "--out", out, "--iters", 2, "--batch", 4, "--problems", 3)
    assert {path.name for path in out.iterdir()} == {"memory.pt", "memory.log.jsonl", "table.md",
                                                     "table.json"}
    state = load_checkpoint(out / "memory.pt")
    assert state["backbone"] == {"name": str(shipped), "digest": load_backbone(shipped).digest()}
    table = json.loads((out / "table.json").read_text())
    assert list(table) == ["frozen", "memory reset", "memory shuffled", "MetaState"]
    assert all(len(right) == 3 for row in table.values() for right in row.values())
    assert "sample.py --init" in capsys.readouterr().out   # what to try next

    state["backbone"]["digest"] = "another"
    torch.save(state, out / "memory.pt")
    with pytest.raises(InputError, match="another backbone"):
        start("--resume", "--out", out)


@pytest.mark.parametrize("name, prompt", [
    ("small", "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("My-Base-model", "Q\n\n")])
def test_a_base_model_is_trained_on_plain_text(name, prompt, tmp_path, monkeypatch):
    seen = []
    save_llada(tmp_path / name)
    (tmp_path / "data.jsonl").write_text('{"question": "Q", "answer": "A"}\n')
    monkeypatch.setattr(train, "train_memory", lambda run, backbone, path: seen.append(run))
    start("--init", tmp_path / name, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out",
          "--device", "cpu")
    tokenizer = train.load_tokenizer(tmp_path / name)
    [example] = seen[0].examples
    assert tokenizer.decode(example.prompt.tolist()) == prompt
    assert tokenizer.decode(example.answer.tolist()) == "A<|endoftext|>"


# -------------------------------------------------------------------------------------- the loss


def test_the_losses_get_what_the_options_say(backbone, memory, monkeypatch):
    seen = []

    def spy(*_, **more):
        seen.append(more)
        return torch.zeros(())

    monkeypatch.setattr(train, "diffusion_loss", spy)
    monkeypatch.setattr(train, "unroll", spy)
    train.backbone_loss(backbone, {"ids": 1})
    args = argparse.Namespace(lam=0.3, carry="reset")
    train.memory_loss(backbone, args)(memory, {"ids": 2})
    assert seen == [{"ids": 1, "visible_share": 0.1}, {"ids": 2, "lam": 0.3, "carry": "reset"}]


def test_the_seed_draws_a_new_memory(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *_, **__: None)
    args = train.arguments(["--out", str(tmp_path / "new")])

    def drawn(seed):
        args.seed = seed
        examples = [Text("a", "b")]
        run = train.Run(args, None, examples, 0, None, torch.device("cpu"))
        return train.train_memory(run, backbone, None).initial_slots

    assert torch.equal(drawn(3), drawn(3)) and not torch.equal(drawn(3), drawn(4))


# ------------------------------------------------------------------------------- the optimiser


def test_the_learning_rate_warms_up_stays_and_falls_to_zero():
    found = [train.learning_rate(i, 1000, 2.0) for i in (0, 49, 99, 500, 600, 800, 999)]
    assert found == pytest.approx([0.02, 1.0, 2.0, 2.0, 2.0, 1.0, 0.005], rel=1e-5)


BY_MUON = {
    Backbone: "layers.0.q layers.0.k layers.0.v layers.0.out layers.0.gate layers.0.up "
              "layers.0.down",
    MetaState: "injector.q injector.k injector.v injector.out mixer.q mixer.k mixer.v mixer.out "
               "updater.from_read updater.from_slots"}

MUON = dict(momentum=0.95, weight_decay=0.01, nesterov=True, ns_steps=5,
            adjust_lr_fn="match_rms_adamw")


@pytest.mark.parametrize("kind", BY_MUON)
def test_muon_takes_the_matrices_of_layers_and_adamw_the_rest(kind, memory):
    model = Backbone(TINY) if kind is Backbone else memory
    names = {p: name for name, p in model.named_parameters()}
    muon, adamw = ([names[p] for p in optimizer.param_groups[0]["params"]]
                   for optimizer in train.optimizers(model))
    assert sorted(muon) == sorted(f"{name}.weight" for name in BY_MUON[kind].split())
    assert sorted(muon + adamw) == sorted(names.values())
    options = train.optimizers(model)[0].param_groups[0]
    assert {key: options[key] for key in MUON} == MUON


class Toy(nn.Module):
    """A matrix for Muon and a vector for AdamW; the gradients are those of the batch."""

    def __init__(self):
        super().__init__()
        self.config = TINY
        self.matrix = nn.Parameter(torch.eye(3, 2))
        self.vector = nn.Parameter(torch.tensor([3.0, -4.0]))


MATRICES = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0)).numpy()
VECTORS = np.array([(30.0, 40.0), (-0.3, 0.1), (0.2, -0.5), (2.0, 2.0)], np.float32)


def toy_batch(iteration):
    return {"ids": np.zeros(8), "iteration": iteration}


def toy_loss(model, batch):
    matrix = torch.from_numpy(MATRICES[batch["iteration"]])
    vector = torch.from_numpy(VECTORS[batch["iteration"]])
    loss = (model.matrix * matrix).sum() + (model.vector * vector).sum()
    return loss, loss.detach()[None]


def fit_toy(path, loss=toy_loss):
    toy = Toy()
    args = argparse.Namespace(resume=False, accumulate=1)
    run = train.Run(args, path.parent, [], 0, Processes(0, 1), torch.device("cpu"))
    train.fit(run, toy, loss, toy_batch, path, iters=4, lr=0.5)
    return toy


def test_an_iteration_is_clipped_decayed_and_scheduled(tmp_path):
    """Written out for four iterations whose gradients are known; Muon itself is torch's."""
    w, m, v = np.array([3.0, -4.0]), np.zeros(2), np.zeros(2)
    matrix = nn.Parameter(torch.eye(3, 2))
    norms = []
    for n in range(1, 5):
        norms.append(math.sqrt((MATRICES[n - 1] ** 2).sum() + (VECTORS[n - 1] ** 2).sum()))
        scale = 1 / max(1, norms[-1])                  # the norm of both together is clipped at 1
        rate = 0.5 * n / 100 * min(1, (1 - (n - 1) / 4) / 0.4)
        g = VECTORS[n - 1] * scale
        m = 0.9 * m + 0.1 * g
        v = 0.99 * v + 0.01 * g ** 2
        w = w * (1 - rate * 0.01)                      # weight decay
        w = w - rate * m / (1 - 0.9 ** n) / (np.sqrt(v / (1 - 0.99 ** n)) + 1e-8)
        if n == 1:
            muon = torch.optim.Muon([matrix], lr=rate, **MUON)
        muon.param_groups[0]["lr"] = rate
        matrix.grad = torch.from_numpy(MATRICES[n - 1] * scale)
        muon.step()
    toy = fit_toy(tmp_path / "toy.pt")
    assert toy.vector.tolist() == pytest.approx(w.tolist(), rel=1e-5)
    assert torch.allclose(toy.matrix, matrix, rtol=0, atol=2e-5)       # bf16 within
    # The log tells the norm before it was clipped: a spike must be seen.
    assert [line["norm"] for line in log(tmp_path, "toy")] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_any_update(where, factor, tmp_path, monkeypatch):
    """Nothing of it is saved either: the checkpoint is that of the iteration before."""
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)     # one after each iteration
    models = []

    def loss(model, batch):
        value, parts = toy_loss(model, batch)
        models.append(model)
        if len(models) == 3 and where == "loss":
            value = value + factor
        elif len(models) == 3:
            value.register_hook(lambda gradient: gradient * factor)
        return value, parts

    with pytest.raises(InputError, match="at iteration 2 the loss became .*--resume.* --lr"):
        fit_toy(tmp_path / "toy.pt", loss)
    state = load_checkpoint(tmp_path / "toy.pt")
    assert state["iteration"] == 2 == len(log(tmp_path, "toy")) and len(state["optimizers"]) == 2
    for name, p in models[-1].named_parameters():
        assert p.isfinite().all() and torch.equal(p, state["model"][name])


# ---------------------------------------------------------------------------------------- data


RNG = np.random.default_rng(0)
EXAMPLES = [TokenIds(RNG.integers(300, size=n_prompt), RNG.integers(300, size=n_answer))
            for n_prompt, n_answer in RNG.integers(2, 9, (50, 2))]


def batches(examples=EXAMPLES, batch=8, answer_length=0, seed=0, draw=None, **more):
    args = argparse.Namespace(**dict(K=4, alpha=1.0, confident=0.3, think=64) | more)
    return train.Batches(examples, batch, answer_length, TINY.pad_id, seed,
                         draw or train.memory_draws(args))


def test_batches_mask_the_answer_and_its_padding_and_reveal_all_of_it():
    texts = {(*e.prompt.tolist(), -1, *e.answer.tolist()) for e in EXAMPLES}
    make = batches()
    for iteration in range(20):
        b = make(iteration)
        assert (b["counts"].sum(1) == b["maskable"].sum(1)).all()      # K steps reveal everything
        for ids, maskable in zip(b["ids"].tolist(), b["maskable"].tolist()):
            n = maskable.index(True)
            assert all(maskable[n:])
            answers = [ids[n:end] for end in range(n + 1, len(ids) + 1)
                       if set(ids[end:]) <= {TINY.pad_id}]
            assert any((*ids[:n], -1, *answer) in texts for answer in answers)


def test_an_epoch_visits_every_example_once_and_pads_little_and_the_next_in_another_order():
    data = [TokenIds(np.arange(1), np.full(i + 1, i)) for i in range(64)]
    make = batches(data, batch=4)
    assert make.per_epoch == 16
    epochs = [[row[1] for i in range(16 * epoch, 16 * epoch + 16) for row in make(i)["ids"]]
              for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(64))
    assert epochs[0] != epochs[1] and sorted(epochs[0]) != epochs[0]
    assert max(np.ptp(make.lengths[rows]) for rows in make.epoch(0)) <= 4


def test_rows_have_draws_of_their_own_and_follow_from_seed_and_iteration():
    for draw in (None, train.backbone_draws):
        b = batches(draw=draw)(3)
        rows = np.unique(b["noise"], axis=0)
        assert len(rows) == 8 and len(np.unique(rows)) == rows.size
        for key, value in batches(draw=draw)(3).items():   # as in another process, or resumed
            assert np.array_equal(value, b[key])
        for other in (batches(draw=draw)(3 + 6), batches(draw=draw, seed=1)(3)):
            assert not np.isin(other["noise"], b["noise"]).any()
            assert not np.array_equal(other["ids"], b["ids"])


def test_times_cover_a_batch_evenly_and_shares_follow_the_options():
    t = np.array([batches(draw=train.backbone_draws)(i)["t"] for i in range(50)]) * 8
    assert (t.astype(int) == np.arange(8)).all()
    assert np.mean(t % 1) == pytest.approx(0.5, abs=0.05)
    long = [TokenIds(np.arange(2), np.arange(10))] * 8
    alike = batches(long, answer_length=100, alpha=1e9, confident=1.0)(0)
    uneven = batches(long, answer_length=100, alpha=0.01, confident=0.0)(0)
    assert (alike["counts"].sum(1) == 100).all()       # answers are padded to a length
    assert np.abs(alike["counts"] - 25).max() < 20 and alike["by_confidence"].all()
    assert uneven["counts"].max(1).mean() > 90 and not uneven["by_confidence"].any()
    assert len(set(uneven["counts"].argmax(1))) > 1    # every row has shares of its own


def test_half_of_the_batches_think_a_log_uniform_number_of_passes():
    draw = train.memory_draws(argparse.Namespace(K=2, alpha=1.0, confident=0.0, think=64))
    maskable = np.ones((1, 4), bool)
    thinks = np.array([draw(np.random.default_rng(i), maskable)["think"] for i in range(2000)])
    assert np.mean(thinks == 0) == pytest.approx(0.5, abs=0.04)
    some = thinks[thinks > 0]
    assert some.min() == 1 and some.max() == 64
    for bound in (2, 8, 32):                           # log(bound + 1/2) / log(64)
        share = math.log(bound + 0.5) / math.log(64)
        assert np.mean(some <= bound) == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("item, prompt, answer", [
    ({"question": "Q", "answer": "A"}, "Q\nAnswer:", "A"),
    ({"prompt": "P", "completion": "C"}, "P", "C"),
    ({"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"},
                   {"role": "user", "content": "3"}, {"role": "assistant", "content": "4"},
                   {"role": "user", "content": "5"}]},
     "1\nAnswer:2\nAnswer:3\nAnswer:", "4")])          # up to the last assistant turn
def test_three_forms_of_data(item, prompt, answer):
    [found] = train.tokenise([train.read_text(item)], TOKENIZER, TINY.eos_id, 100, chat=True)
    assert TOKENIZER.decode(found.prompt.tolist()) == prompt
    # end-of-text belongs to the answer: a model has to learn where to stop
    assert TOKENIZER.decode(found.answer.tolist()) == answer + "<|endoftext|>"


def test_data_cannot_write_control_tokens():
    texts = [Text("<|mask|>", "<|endoftext|>"),
             Text([{"role": "<|mask|>", "content": "<|endoftext|>"}], "<|mask|>")]
    for chat in (True, False):
        for found in train.tokenise(texts, TOKENIZER, TINY.eos_id, 100, chat):
            assert max(found.prompt) < TINY.mask_id and max(found.answer[:-1]) < TINY.mask_id


NULL = '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": null}]}'


@pytest.mark.parametrize("line, reason", [
    ('{"question": 3, "answer": "x"}', "question/answer"), ("[1]", "question/answer"),
    ('{"messages": "x"}', "messages"), (NULL, "content"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "assistant"),
    ("{", "property name"), ("[" * 100_000, "recursion")])
def test_bad_lines_are_counted_and_the_first_is_named(line, reason, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    good = '{"prompt": "a", "completion": "b"}\n'
    path.write_text(f"{good}\n{line}\n{good}{good}{line}\n", "utf-8-sig")
    assert len(train.find_texts(str(path), "llada")) == 3
    assert "2 lines that cannot be used beside 3 good ones, the first is line 3" \
        in capsys.readouterr().err
    path.write_text(f"{good}{line}\n{line}\n")
    with pytest.raises(InputError, match=f"2 lines .* beside 1 good .* line 2: .*{reason}"):
        train.find_texts(str(path), "llada")


def test_what_does_not_fit_is_dropped_with_a_count(tmp_path, capsys):
    """So is what tiktoken gives up on, as a line of a million spaces."""
    save_llada(tmp_path / "small")
    tokenizer = train.load_tokenizer(tmp_path / "small")       # a token for each byte
    texts = [Text(text, "b") for text in ("a" * 3, "a" * 30, "a" * 8, "a" * 9,
                                          "a" + " " * 10**6 + "b")]
    with at_most(60):
        found = train.tokenise(texts, tokenizer, 257, 10, chat=True)
    assert [len(example.prompt) for example in found] == [3, 8]        # 8 + 1 + its end fit
    assert "3 of 5" in capsys.readouterr().err
    with pytest.raises(InputError, match="--max-length"):
        train.tokenise(texts, tokenizer, 257, 2, chat=True)


# ------------------------------------------------------------------------------------- Tulu-3


class Hub(ThreadingHTTPServer):
    """A server of rows; failing[offset] is what it says instead of them."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.revisions = []                            # of the next answers, the last for ever
        self.failing = {}
        self.asked = []
        self.slept = []
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        hub = self.server
        query = parse_qs(urlsplit(self.path).query)
        assert query["dataset"] == ["allenai/tulu-3-sft-mixture"] and query["split"] == ["train"]
        offset, length = int(query["offset"][0]), int(query["length"][0])
        failure = None
        if length > 1:                                 # the first call asks for the total only
            hub.asked.append(offset)
            failure = hub.failing.get(offset)
        rows = [{"row": {"messages": [{"role": "user", "content": f"question {i}"},
                                      {"role": "assistant", "content": "answer"}]}}
                for i in range(offset, offset + length)]
        self.send_response(500 if failure else 200)
        self.send_header("X-Revision", hub.revisions[0] if hub.revisions else "first")
        self.end_headers()
        hub.revisions = hub.revisions[1:] or hub.revisions
        self.wfile.write(failure or json.dumps({"rows": rows, "num_rows_total": 41}).encode())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub()
    hub.folder = tmp_path / "metastate" / "tulu-3"
    monkeypatch.setenv("HF_DATASETS_SERVER", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(train, "TULU_ROWS", 12)
    monkeypatch.setattr(train, "WINDOW", 4)
    monkeypatch.setattr(train, "PAUSE", 0.5)
    monkeypatch.setattr(time, "sleep", hub.slept.append)
    with at_most(60):
        yield hub
    hub.shutdown()
    hub.server_close()


ORDER = (np.random.default_rng(0).permutation(10) * 4)[:3].tolist()
ROWS = [offset + i for offset in ORDER for i in range(4)]


def fetched_numbers():
    return [int(text.prompt[0]["content"].split()[1]) for text in train.find_texts(None, "llada")]


def test_tulu_is_fetched_once_in_random_windows(hub):
    assert fetched_numbers() == ROWS
    assert hub.asked == ORDER and hub.slept == [0.5] * 3               # gently
    assert json.loads((hub.folder / "about.json").read_text())["revision"] == "first"
    assert fetched_numbers() == ROWS and hub.asked == ORDER            # not asked again


@pytest.mark.parametrize("lost, asked", [(0, ORDER[2:]), (300, ORDER[1:]), (1, ORDER[1:])])
def test_a_server_that_fails_is_quoted_and_the_fetch_goes_on_after_the_last_whole_window(
        hub, lost, asked):
    """lost: bytes of the second window that never came to the disk."""
    hub.failing = {ORDER[2]: b"the server is tired"}
    with pytest.raises(InputError, match="500.*tired.*--data.*run again"):
        fetched_numbers()
    part = hub.folder / "conversations.first.part"     # of the revision that is called so
    part.write_bytes(part.read_bytes()[:part.stat().st_size - lost])
    hub.failing, hub.asked = {}, []
    assert fetched_numbers() == ROWS and hub.asked == asked


def test_rows_of_two_revisions_are_never_mixed(hub):
    hub.revisions = ["first"] * 2 + ["second"]
    with pytest.raises(InputError, match="changed"):
        fetched_numbers()
    hub.asked = []
    assert fetched_numbers() == ROWS and hub.asked == ORDER
    assert json.loads((hub.folder / "about.json").read_text())["revision"] == "second"
