"""Training sees the same data however it is interrupted or shared out, and does what it says."""
import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch

import eval_gsm8k
import train
from eval_gsm8k import WORDS, dial_problems, read_jsonl
from metastate import load_checkpoint
from model import TINY, InputError, tiny_tokenizer
from processes import LIMIT, ROOT, Program, end, run, run_two
from sample import Processes
from train import Text, TokenIds

TOKENIZER = tiny_tokenizer(WORDS)
NAMES = ("backbone", "memory", "memoryless")
SMALL = ["--backbone-iters", 6, "--backbone-batch", 8, "--iters", 8, "--batch", 8, "--K", 3,
         "--save-every", 2, "--device", "cpu", "--problems", 0]
LONGER = ["--backbone-iters", 20, "--iters", 40]
RANDOM = ["--confident", 0]            # where a reveal must not depend on the last bit of a sum


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in dial_problems("train", 60)))
    return path


def arguments(out, data, *more):
    return ["train.py", "--out", out, "--data", data, *SMALL, *more]


def finished(out, data, *more):
    """A run of its own, to the end; what it printed."""
    code, text = run(*arguments(out, data, *more), folder=out.parent)
    assert code == 0, text
    return text


def refused(out, data, *more):
    code, text = run(*arguments(out, data, *more), folder=out.parent)
    assert code == 1 and "Traceback" not in text
    sentence = text.strip().splitlines()[-1]
    assert sentence.startswith("error: ")
    return sentence


def weights(out):
    return {name: load_checkpoint(out / f"{name}.pt")["model"] for name in NAMES}


def assert_equal_weights(a, b):
    first, second = weights(a), weights(b)
    for name in NAMES:
        for key in first[name]:
            assert torch.equal(first[name][key], second[name][key]), f"{name} {key}"


def log(out, name="memory"):
    path = out / f"{name}.log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def log_size(out):
    """Grows by every step that is logged."""
    return sum(path.stat().st_size for path in out.glob("*.log.jsonl"))


def has_checkpoint(out):
    return any(out.glob("*.pt"))


def in_process(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    before = signal.getsignal(signal.SIGINT)
    try:
        train.run_program(train.main, if_interrupted="--resume")
    finally:
        signal.signal(signal.SIGINT, before)


def stopped(monkeypatch, number, n_steps, out, data, *more):
    """A run that gets a signal within the n-th step of its memory's training."""
    calls = []
    unroll = train.unroll

    def spy(*args, **options):
        calls.append(1)
        if len(calls) == n_steps:
            signal.raise_signal(number)
        return unroll(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(train, "unroll", spy)
        in_process(patch, *arguments(out, data, *more))
    assert end.value.code == 130


# ----------------------------------------------------------------------- interrupted, shared out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupted, and its data."""
    folder = tmp_path_factory.mktemp("whole")
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in dial_problems("train", 60)))
    finished(folder / "run", path, *LONGER)
    return folder / "run", path


def test_twenty_kills_at_random_change_nothing(whole, tmp_path):
    whole, data = whole
    out, rng = tmp_path / "killed", random.Random(0)
    for kill in range(20):
        resume = ["--resume"] if has_checkpoint(out) else []
        program = Program(*arguments(out, data, *LONGER, *resume), folder=tmp_path)
        if kill % 2:                       # at any moment: while it starts or reads, for example
            time.sleep(rng.uniform(0, 0.15))
        else:                              # within a step, or while a checkpoint is written
            before = log_size(out)
            program.wait_until(lambda: log_size(out) > before or program.process.exitcode == 0)
            time.sleep(rng.uniform(0, 0.02))
        with suppress(ProcessLookupError):             # on a busy machine it may be done by now
            program.send(signal.SIGKILL)
        assert program.wait() in (-signal.SIGKILL, 0), program.text()
    finished(out, data, *LONGER, "--resume")
    assert_equal_weights(whole, out)
    for name in NAMES:
        assert log(out, name) == log(whole, name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_loop_saves_and_ends(whole, tmp_path, number, monkeypatch, capsys):
    whole, data = whole
    out = tmp_path / "stopped"
    stopped(monkeypatch, number, 3, out, data, *LONGER, "--save-every", 1000)
    assert "--resume" in capsys.readouterr().err
    state = load_checkpoint(out / "memory.pt")
    assert state["step"] == len(log(out)) == 3 and "optimizer" in state
    finished(out, data, *LONGER, "--save-every", 1000, "--resume")
    assert_equal_weights(whole, out)
    # Who samples needs no optimiser: two thirds of the file.
    assert not any("optimizer" in load_checkpoint(out / f"{name}.pt") for name in NAMES)


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, data):
    for name, n in (("one", 1), ("four", 4)):
        finished(tmp_path / name, data, "--accumulate", n, *RANDOM)
    assert_equal_logs(tmp_path / "one", tmp_path / "four")


def assert_equal_logs(a, b):
    """Sums in another order differ in the last bits, which the steps of training then widen."""
    for name in NAMES:
        for one, other in zip(log(a, name), log(b, name), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=2e-4)
            assert one["by_step"] == pytest.approx(other["by_step"], rel=2e-4)
            assert one["norm"] == pytest.approx(other["norm"], rel=2e-3)


def test_two_processes_with_accumulation_train_as_one_does(tmp_path, data):
    finished(tmp_path / "one", data, *RANDOM)
    codes, texts = run_two(*arguments(tmp_path / "two", data, "--accumulate", 2, *RANDOM),
                           folder=tmp_path)
    assert codes == [0, 0], texts
    assert_equal_logs(tmp_path / "one", tmp_path / "two")


def test_a_killed_rank_ends_the_job_and_keeps_the_checkpoint(tmp_path, data):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", ROOT / "train.py", *arguments(tmp_path / "run", data, "--iters", 100_000)[1:]]
    with open(tmp_path / "output", "w") as file:
        job = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=file, stderr=file,
                               start_new_session=True)
    try:
        limit = time.monotonic() + LIMIT
        while not (tmp_path / "run" / "memory.pt").exists():
            assert job.poll() is None and time.monotonic() < limit, \
                (tmp_path / "output").read_text()
            time.sleep(0.02)
        children = f"/proc/{job.pid}/task/{job.pid}/children"
        ranks = [pid for pid in map(int, open(children).read().split())
                 if "train.py" in open(f"/proc/{pid}/cmdline").read()]
        os.kill(ranks[-1], signal.SIGKILL)
        assert job.wait(LIMIT) != 0
    finally:
        end(job)
    assert "Signal 9" in (tmp_path / "output").read_text()
    assert load_checkpoint(tmp_path / "run" / "memory.pt")["step"] >= 2


# ------------------------------------------------------------------------- what is kept, and when


def test_a_loss_that_is_not_finite_stops_and_another_rate_goes_on(tmp_path, data, monkeypatch):
    """A run that was sound up to its checkpoint, and then is resumed at an absurd rate."""
    out = tmp_path / "run"
    stopped(monkeypatch, signal.SIGINT, 3, out, data, *LONGER)
    sentence = refused(out, data, *LONGER, "--lr", 1e9, "--resume", "--save-every", 1000)
    assert "loss became" in sentence and "memory.pt" in sentence and "--lr" in sentence
    # What is kept was finite: a NaN is seen before it is stepped or saved.
    state = load_checkpoint(out / "memory.pt")
    assert state["step"] < 40 and all(p.isfinite().all() for p in state["model"].values())
    finished(out, data, *LONGER, "--lr", 1e-3, "--resume")
    assert len(log(out)) == 40


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(tmp_path, data):
    out = tmp_path / "run"
    finished(out, data)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "--resume" in refused(out, data)
    assert "K = 3, not 4" in refused(out, data, "--resume", "--K", 4)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kept", ["backbone.pt", "memory.pt", "memoryless.pt", "backbone/x"])
def test_any_part_of_a_run_keeps_it_from_being_overwritten(tmp_path, data, kept):
    path = tmp_path / "run" / kept
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something")
    assert "--resume" in refused(tmp_path / "run", data)
    assert path.read_bytes() == b"something"


def test_a_run_without_its_backbones_checkpoint_is_not_begun_anew(tmp_path, data):
    """assets/tiny for example: its backbone would be overwritten before its memory is refused."""
    for name in ("memory.pt", "backbone/model.safetensors"):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"something")
    assert "no backbone.pt" in refused(tmp_path / "run", data, "--resume")
    assert path.read_bytes() == b"something"


def test_nothing_cannot_be_resumed(tmp_path, data):
    assert "no backbone.pt to go on with" in refused(tmp_path / "run", data, "--resume")
    assert not (tmp_path / "run").exists()


def test_a_log_that_was_deleted_does_not_end_a_resumed_run(tmp_path, data):
    finished(tmp_path / "run", data)
    (tmp_path / "run" / "memory.log.jsonl").unlink()
    finished(tmp_path / "run", data, "--resume")


def test_one_run_at_a_time_in_a_folder_and_the_lock_dies_with_it(tmp_path, data):
    out = tmp_path / "run"
    first = Program(*arguments(out, data, "--iters", 100_000), folder=tmp_path)
    first.wait_until(lambda: has_checkpoint(out))
    assert "another run is at work" in refused(out, data, "--iters", 100_000, "--resume")
    assert len(log(out)) == len({line["step"] for line in log(out)})
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    second = Program(*arguments(out, data, "--iters", 100_000, "--resume"), folder=tmp_path)
    before = log_size(out)
    second.wait_until(lambda: log_size(out) != before)
    second.send(signal.SIGINT)
    assert second.wait() == 130


# ------------------------------------------------------------------------------- the optimiser


def test_learning_rate_warms_up_then_falls_to_its_final_share():
    """2 * warm-up * (final + (1 - final) * (1 + cos(pi * step / 1000)) / 2)"""
    found = [train.learning_rate(step, 1000, 2.0, final=0.0) for step in (0, 49, 99, 500, 999)]
    assert found == pytest.approx([0.02, 0.9940875, 1.9520226, 1.0, 4.9348e-6], rel=1e-5)
    found = [train.learning_rate(step, 1000, 2.0, final=0.1) for step in (0, 500, 999)]
    assert found == pytest.approx([0.02, 1.1, 0.2], rel=1e-4)


@dataclass
class ToyConfig:
    n: int = 2


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = ToyConfig()
        self.w = torch.nn.Parameter(torch.tensor([3.0, -4.0]))


GRADIENTS = [(30.0, 40.0), (-0.3, 0.1), (0.2, -0.5), (2.0, 2.0)]


class ToyBatches:
    batch = 8

    def __call__(self, step, part, device):
        return {"gradient": torch.tensor(GRADIENTS[step]), "rows": part.stop - part.start}


def fit_toy(path, loss, processes=Processes(0, 1), accumulate=1):
    toy = Toy()
    args = argparse.Namespace(resume=False, accumulate=accumulate, save_every=100)
    run = train.Run(args, path.parent, [], 0, processes, torch.device("cpu"))
    train.fit(run, toy, loss, ToyBatches(), path, iters=len(GRADIENTS), lr=0.5)
    return toy


def toy_loss(model, batch):
    loss = (model.w * batch["gradient"]).sum()
    return loss, loss.detach()[None]


def test_a_step_is_clipped_adam_with_decay_and_schedule(tmp_path):
    """Written out with numbers of its own, for four steps whose gradients are known."""
    w, m, v = np.array([3.0, -4.0]), np.zeros(2), np.zeros(2)
    norms = []
    for step, g in enumerate(map(np.array, GRADIENTS), 1):
        norms.append(math.hypot(*g))
        g = g / max(1, norms[-1])                      # the norm is clipped at 1
        rate = 0.5 * step / 100 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 4))
        m = 0.9 * m + 0.1 * g
        v = 0.99 * v + 0.01 * g ** 2
        w = w * (1 - rate * 0.01)                      # weight decay
        w = w - rate * m / (1 - 0.9 ** step) / (np.sqrt(v / (1 - 0.99 ** step)) + 1e-8)
    toy = fit_toy(tmp_path / "toy.pt", toy_loss)
    assert toy.w.tolist() == pytest.approx(w.tolist(), rel=1e-5)
    # The log tells the norm before it was clipped: a spike must be seen.
    assert [line["norm"] for line in log(tmp_path, "toy")] == pytest.approx(norms, rel=1e-4)


def test_gradients_are_exchanged_once_after_the_last_pass(tmp_path, monkeypatch):
    """In an earlier pass a part of them would be counted again, or not at all."""
    events = []

    def loss(model, batch):
        events.append("pass")
        assert batch["rows"] == 1                      # 8 rows / (2 processes * 4 passes)
        return toy_loss(model, batch)

    def all_reduce(tensor):
        if tensor.shape == (2,) and tensor.dtype == torch.float32:
            events.append("exchange")
        tensor *= 2                                    # the other process has the same

    monkeypatch.setattr(train.dist, "all_reduce", all_reduce)
    toy = fit_toy(tmp_path / "toy.pt", loss, Processes(0, 2), accumulate=4)
    # losses and gradient have two numbers each
    assert events == (["pass"] * 4 + ["exchange"] * 2) * len(GRADIENTS)
    alone = fit_toy(tmp_path / "alone.pt", toy_loss)
    assert toy.w.tolist() == pytest.approx(alone.w.tolist(), rel=1e-6)


def test_the_memoryless_control_is_trained_without_memory(tmp_path, data, monkeypatch):
    found = []
    unroll = train.unroll

    def spy(backbone, memory, **more):
        found.append((more["carry"], more["lam"]))
        return unroll(backbone, memory, **more)

    monkeypatch.setattr(train, "unroll", spy)
    in_process(monkeypatch, *arguments(tmp_path / "run", data, "--lam", 0.25))
    assert found == [("keep", 0.25)] * 8 + [("reset", 0.25)] * 8
    found.clear()
    in_process(monkeypatch, *arguments(tmp_path / "again", data, "--carry", "reset"))
    assert found == [("reset", 0.5)] * 16


def test_the_whole_of_a_tiny_run_is_there_and_its_tables(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(eval_gsm8k, "QUOTA_STEPS", (4,))
    monkeypatch.setattr(eval_gsm8k, "BLOCK_LENGTHS", (10,))
    monkeypatch.setattr(eval_gsm8k, "THRESHOLDS", (0.0,))
    monkeypatch.setattr(train, "dial_problems", lambda split, n: dial_problems(split, min(n, 9)))
    in_process(monkeypatch, *arguments(tmp_path / "run", data, "--problems", 9))
    found = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*")}
    assert found == {"backbone", "backbone/config.json", "backbone/model.safetensors",
                     "backbone/tokenizer.json", "lock", "tables.md", "tables.json",
                     *(f"{name}{end}" for name in NAMES for end in (".pt", ".log.jsonl"))}
    tables = json.loads((tmp_path / "run" / "tables.json").read_text())
    assert list(tables["thinking"]) == ["frozen", "memory reset", "memory shuffled",
                                        "memoryless-trained", "MetaState"]
    assert all(len(tables["thinking"][name]["20"]["whole"]) == 9 for name in tables["thinking"])
    assert "sample.py --init" in capsys.readouterr().out   # what to try next


# ---------------------------------------------------------------------------------------- data


def batches(examples, batch, **more):
    settings = dict(seed=0, K=4, alpha=1.0, confident=0.3, think=3) | more
    answer_length = settings.pop("answer_length", 0)
    args = argparse.Namespace(**settings)
    run = train.Run(args, None, examples, answer_length, Processes(0, 1), torch.device("cpu"))
    return train.Batches(run, batch, TINY.pad_id)


def examples(n=50, seed=0):
    rng = np.random.default_rng(seed)

    def some():
        return rng.integers(300, size=rng.integers(2, 9))

    return [TokenIds(some(), some()) for _ in range(n)]


def test_batches_mask_the_answer_and_its_padding_only():
    data = examples()
    for step in range(20):
        b = batches(data, 8)(step, slice(None), "cpu")
        assert (b["counts"].sum(1) == b["maskable"].sum(1)).all()      # K steps reveal everything
        for ids, maskable in zip(b["ids"], b["maskable"]):
            n = int((~maskable).sum())
            assert maskable[n:].all()
            assert any(ids[:n].tolist() == p.tolist() and ids[n:n + len(a)].tolist() == a.tolist()
                       and (ids[n + len(a):] == TINY.pad_id).all() for p, a in data)


def test_answers_are_padded_to_a_length_where_one_is_given():
    b = batches([TokenIds(np.arange(3), np.arange(2))] * 4, 4, answer_length=20)
    assert b(0, slice(None), "cpu")["maskable"].sum(1).tolist() == [20] * 4


def test_times_cover_a_batch_evenly_and_shares_follow_the_options():
    make = batches(examples(), 8, confident=1.0, think=0)
    b = make(5, slice(None), "cpu")
    assert (b["t"] * 8).long().tolist() == list(range(8))
    assert b["by_confidence"].all() and b["think"] == 0
    assert not batches(examples(), 8, confident=0.0)(5, slice(None), "cpu")["by_confidence"].any()


def test_half_of_the_batches_think_for_any_number_of_passes():
    make = batches(examples(), 2, think=3)
    found = [make(step, slice(1), "cpu")["think"] for step in range(400)]
    counts = np.bincount(found) / 400                  # half of them 0, the rest 0 .. 3 alike
    assert counts == pytest.approx([0.625, 0.125, 0.125, 0.125], abs=0.06)


def test_an_epoch_visits_every_example_once_and_pads_little():
    data = [TokenIds(np.arange(1), np.full(i + 1, i)) for i in range(64)]
    make = batches(data, 4)
    seen = [row[1].item() for step in range(16) for row in make(step, slice(None), "cpu")["ids"]]
    assert sorted(seen) == list(range(64)) and seen != sorted(seen)
    assert max(np.ptp(make.lengths[rows]) for rows in make.epoch(0)) <= 4


def test_parts_of_a_batch_are_the_batch():
    make = batches(examples(), 8)
    whole = make(3, slice(None), "cpu")
    parts = [make(3, slice(i, i + 2), "cpu") for i in (0, 2, 4, 6)]
    for key, value in whole.items():
        if key == "think":                             # one number for the whole batch
            assert all(part[key] == value for part in parts)
        else:
            assert torch.equal(value, torch.cat([part[key] for part in parts]))


def test_seed_and_step_change_the_batch():
    make = batches(examples(), 8)
    a, b = make(0, slice(None), "cpu"), make(50, slice(None), "cpu")
    c = batches(examples(), 8, seed=1)(0, slice(None), "cpu")
    assert not torch.equal(a["t"], b["t"]) and not torch.equal(a["t"], c["t"])


def token_texts(item, max_length=100):
    [found] = train.tokenise([train.read_text(item)], TOKENIZER, TINY.eos_id, max_length)
    return TOKENIZER.decode(found.prompt.tolist()), TOKENIZER.decode(found.answer.tolist())


@pytest.mark.parametrize("item, prompt, answer", [
    ({"question": "Q", "answer": "A"}, "Q\nAnswer:", "A"),
    ({"prompt": "P", "completion": "C"}, "P", "C"),
    ({"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"},
                   {"role": "user", "content": "3"}]}, "1\nAnswer:", "2")])
def test_three_forms_of_data(item, prompt, answer):
    # end-of-text belongs to the answer: a model has to learn where to stop
    assert token_texts(item) == (prompt, answer + "<|endoftext|>")


def test_data_cannot_write_control_tokens():
    texts = [Text("<|mask|>", "<|endoftext|>"),
             Text([{"role": "<|mask|>", "content": "<|endoftext|>"}], "<|mask|>")]
    for found in train.tokenise(texts, TOKENIZER, TINY.eos_id, 100):
        assert max(found.prompt) < TINY.mask_id and max(found.answer[:-1]) < TINY.mask_id


@pytest.mark.parametrize("line, reason", [
    ('{"question": "x"}', "question/answer"), ('{"question": 3, "answer": "x"}', "question/answer"),
    ('{"messages": "x"}', "messages"), ('{"messages": [{"role": "user"}]}', "messages"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "assistant"), ("{", "JSON"),
    ("[1]", "JSON")])
def test_a_bad_line_is_named(line, reason, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n' + line + "\n")
    with pytest.raises(InputError, match="line 3.*" + reason):
        train.read_texts(path)


def test_what_does_not_fit_is_dropped_with_a_count(capsys):
    texts = [Text("a" * n, "b") for n in (3, 30, 8, 9)]
    assert len(train.tokenise(texts, TOKENIZER, TINY.eos_id, 10)) == 2     # 8 + 1 + its end fit
    assert "2 of 4" in capsys.readouterr().err
    with pytest.raises(InputError, match="--max-length"):
        train.tokenise(texts, TOKENIZER, TINY.eos_id, 2)


def test_the_splits_of_the_built_in_problems_are_disjoint():
    splits = [{p["question"] for p in dial_problems(split)} for split in ("test", "valid", "train")]
    assert [len(s) for s in splits] == [1000, 1000, 10 * 8**4 - 2000]
    assert not (splits[0] & splits[1] or splits[0] & splits[2] or splits[1] & splits[2])


def test_every_word_of_the_problems_is_one_token():
    [found] = train.tokenise([train.read_text(dial_problems("test", 1)[0])], TOKENIZER,
                             TINY.eos_id, 64)
    assert (len(found.prompt), len(found.answer)) == (21, 18 + 1)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_gsm8k_by_name_is_its_file_in_the_cache(tmp_path, monkeypatch, processes):
    folder = tmp_path / "metastate" / "gsm8k"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"question": "Q", "answer": "A"}\n')
    (folder / "test.jsonl").write_text('{"question": "not", "answer": "this"}\n')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = train.find_texts(argparse.Namespace(data="gsm8k", init="llada"))
    assert found == [Text([{"role": "user", "content": "Q"}], "A")]


# ------------------------------------------------------------------------------------- Tulu-3


class Hub:
    """A server of rows that can misbehave: faults[offset] are its next answers for an offset."""

    def __init__(self):
        self.revision = "r1"
        self.total = 40
        self.faults = {}
        self.asked = []
        self.tokens = set()
        self.rows = {}                                 # rows that are not as they should be
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                hub.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request):
        query = {key: value[0] for key, value in parse_qs(urlsplit(request.path).query).items()}
        assert query["dataset"] == "allenai/tulu-3-sft-mixture" and query["split"] == "train"
        offset, length = int(query["offset"]), int(query["length"])
        self.tokens.add(request.headers.get("Authorization"))
        if length > 1:                                 # the first call asks for the total only
            self.asked.append(offset)
        faults = self.faults.get(offset, []) if length > 1 else self.faults.get("first", [])
        fault = faults.pop(0) if faults else None
        rows = [{"row_idx": i, "row": self.rows.get(i, conversation(i)), "truncated_cells": []}
                for i in range(offset, offset + length)]
        body = json.dumps({"rows": rows, "num_rows_total": self.total}).encode()
        status = fault if isinstance(fault, int) else 200
        if isinstance(fault, bytes):
            body = fault
        request.send_response(status)
        request.send_header("X-Revision", "changed" if fault == "revision" else self.revision)
        if status == 429:
            request.send_header("Retry-After", "17")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[:len(body) // 2] if fault == "half" else body)


def conversation(i):
    return {"id": str(i), "messages": [{"role": "user", "content": f"question {i}"},
                                       {"role": "assistant", "content": f"answer {i}"}]}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub()
    hub.slept = []
    monkeypatch.setenv("HF_DATASETS_SERVER", hub.url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(train, "TULU_ROWS", 10)
    monkeypatch.setattr(train, "WINDOW", 4)
    monkeypatch.setattr(train, "PAUSE", 0.5)
    monkeypatch.setattr(time, "sleep", hub.slept.append)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


ORDER = (np.random.default_rng(0).permutation(10) * 4).tolist()


def numbers(path):
    return [int(text.prompt[0]["content"].split()[1]) for text in train.read_texts(path)]


def rows_of(*offsets):
    return [i for offset in offsets for i in range(offset, offset + 4)]


def test_tulu_is_fetched_once_in_random_windows(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    path = train.tulu_file()
    assert numbers(path) == rows_of(*ORDER[:3])[:10]
    assert hub.asked == ORDER[:3] and hub.slept == [0.5] * 3           # gently
    about = json.loads(path.with_name("about.json").read_text())
    assert about == {"dataset": "allenai/tulu-3-sft-mixture", "revision": "r1", "seed": 0,
                     "window": 4, "offsets": ORDER[:3]}
    assert hub.tokens == {"Bearer secret"}
    assert {found.name for found in path.parent.iterdir()} <= {"conversations.jsonl", "about.json",
                                                               "lock"}
    assert train.tulu_file() == path and hub.asked == ORDER[:3]        # not asked again


def test_tulu_waits_and_asks_again_after_what_may_pass(hub):
    hub.faults = {"first": [500], ORDER[0]: [429, 500, "half", b"{not JSON"], ORDER[1]: [502]}
    assert numbers(train.tulu_file()) == rows_of(*ORDER[:3])[:10]
    assert hub.asked == [ORDER[0]] * 5 + [ORDER[1]] * 2 + [ORDER[2]]
    assert 17 in hub.slept                                             # Retry-After is honoured


def test_an_interrupted_fetch_asks_only_for_what_is_missing(hub):
    hub.faults = {ORDER[2]: [404]}
    with pytest.raises(InputError, match="404"):
        train.tulu_file()
    hub.asked.clear()
    assert numbers(train.tulu_file()) == rows_of(*ORDER[:3])[:10]
    assert hub.asked == [ORDER[2]]


def test_a_server_that_stays_broken_is_given_up(hub):
    hub.faults = {ORDER[0]: [500] * 99}
    with pytest.raises(InputError, match="500.*run again to go on"):
        train.tulu_file()
    assert len(hub.asked) == 5


def test_rows_of_two_revisions_are_never_mixed(hub):
    hub.faults = {ORDER[1]: ["revision"]}
    with pytest.raises(InputError, match="was changed"):
        train.tulu_file()
    hub.revision, hub.asked = "changed", []
    path = train.tulu_file()
    assert hub.asked == ORDER[:3]
    assert json.loads(path.with_name("about.json").read_text())["revision"] == "changed"


def test_rows_that_are_no_conversations_are_left_out(hub):
    a = ORDER[0]
    hub.rows = {a: {"id": "no messages"}, a + 1: None, a + 2: {"messages": "text"},
                a + 3: {"messages": [{"role": "assistant", "content": "alone"}]},
                ORDER[1]: {"question": "q", "answer": "not a conversation"}}
    assert numbers(train.tulu_file()) == (rows_of(ORDER[1])[1:] + rows_of(*ORDER[2:4]))[:10]


@pytest.mark.parametrize("body", [b"{}", b"[]", b"null", b'{"rows": 3}', b'{"rows": [{}]}',
                                  b'{"num_rows_total": "many", "rows": []}'])
@pytest.mark.parametrize("where", ["first", ORDER[0]])
def test_another_form_of_answer_is_one_sentence(hub, body, where):
    hub.faults = {where: [body] * 9}
    with pytest.raises(InputError) as error:
        train.tulu_file()
    assert "\n" not in str(error.value)


def test_too_small_a_data_set_is_told(hub):
    hub.total = 8
    with pytest.raises(InputError, match="8 conversations where 10"):
        train.tulu_file()


def test_who_comes_second_waits_and_asks_for_nothing(hub):
    results = []
    threads = [threading.Thread(target=lambda: results.append(train.tulu_file()))
               for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert len(results) == 3 and hub.asked == ORDER[:3]


def test_a_bad_line_of_a_file_is_named_by_read_jsonl(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')           # a BOM, Windows' line ends
    assert read_jsonl(path) == [(1, {"a": 1}), (3, {"a": 2})]
