"""Training sees the same data however it is interrupted or shared out, and refuses bad input."""
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback

import numpy as np
import pytest
import torch

import train
from conftest import ROOT
from eval_gsm8k import dial_problems, read_jsonl
from metastate import load_checkpoint
from model import TINY, InputError, load_tokenizer, run_program, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in dial_problems("train", 60)))
    return path


SMALL = ["--backbone-iters", "6", "--backbone-batch", "8", "--iters", "8", "--batch", "8", "--K", "3",
         "--save-every", "2", "--device", "cpu", "--problems", "0"]


def start(out, data, *more):
    """A training process forked from this one; its pid."""
    pid = os.fork()
    if pid:
        return pid
    sys.stdout = sys.stderr = open(out.parent / "log", "w")
    sys.argv = ["train.py", "--out", str(out), "--data", str(data), *SMALL, *more]
    code = 70                                          # what nobody foresaw
    try:
        run_program(train.main)
        code = 0
    except SystemExit as error:
        print(error)
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def finish(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def weights(out):
    return {name: load_checkpoint(out / f"{name}.pt")["model"] for name in ("backbone", "memory", "memoryless")}


def equal(a, b):
    return all(torch.equal(a[name][key], b[name][key]) for name in a for key in a[name])


def log(out):
    return [json.loads(line) for line in (out / "memory.log.jsonl").read_text().splitlines()]


def test_twenty_kills_at_random_change_nothing(tmp_path, data):
    assert finish(start(tmp_path / "whole", data)) == 0
    rng, kills = random.Random(0), 0
    for _ in range(100):
        pid = start(tmp_path / "killed", data, "--resume")
        time.sleep(rng.uniform(0.02, 0.4))
        os.kill(pid, signal.SIGKILL)
        kills += finish(pid) == -signal.SIGKILL
        if kills == 20:
            break
    assert finish(start(tmp_path / "killed", data, "--resume")) == 0
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert log(tmp_path / "whole") == log(tmp_path / "killed")


def test_ctrl_c_saves_and_ends(tmp_path, data):
    assert finish(start(tmp_path / "whole", data)) == 0
    pid = start(tmp_path / "stopped", data, "--save-every", "1000")
    while not (tmp_path / "stopped" / "memory.log.jsonl").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGINT)
    assert finish(pid) == 130
    assert "--resume" in (tmp_path / "log").read_text()
    assert finish(start(tmp_path / "stopped", data, "--resume")) == 0
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))


def test_a_loss_that_is_not_finite_stops_with_the_last_checkpoint_kept(tmp_path, data):
    assert finish(start(tmp_path / "run", data, "--lr", "1e30")) == 1
    said = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert "loss became" in said and "memory.pt" in said and "Traceback" not in said
    assert load_checkpoint(tmp_path / "run" / "backbone.pt")["step"] == 6


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(tmp_path, data):
    assert finish(start(tmp_path / "run", data)) == 0
    before = (tmp_path / "run" / "memory.pt").read_bytes()
    assert finish(start(tmp_path / "run", data)) == 1
    assert "--resume" in (tmp_path / "log").read_text()
    assert finish(start(tmp_path / "run", data, "--resume", "--lr", "0.5")) == 1
    assert "lr = 0.003, not 0.5" in (tmp_path / "log").read_text()
    assert (tmp_path / "run" / "memory.pt").read_bytes() == before


RANDOM = ["--confident", "0"]                           # a reveal must not hang on the last bit


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, data):
    for name, n in (("one", 1), ("four", 4)):
        assert finish(start(tmp_path / name, data, "--accumulate", str(n), *RANDOM)) == 0
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "four")):
        assert a["by_step"] == pytest.approx(b["by_step"], rel=2e-4)
        assert a["norm"] == pytest.approx(b["norm"], rel=2e-3)


def torchrun(n, out, data, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--master-port",
         str(random.randrange(20_000, 60_000)), ROOT / "train.py", "--out", out, "--data", data, *SMALL,
         *more], env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=out.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def test_two_processes_train_as_one_does(tmp_path, data):
    assert finish(start(tmp_path / "one", data, *RANDOM)) == 0
    two = torchrun(2, tmp_path / "two", data, *RANDOM)
    output, _ = two.communicate(timeout=100)
    assert two.returncode == 0, output
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a["by_step"] == pytest.approx(b["by_step"], rel=2e-4)
        assert a["norm"] == pytest.approx(b["norm"], rel=2e-3)


def test_a_killed_rank_ends_the_job_and_keeps_the_checkpoint(tmp_path, data):
    job = torchrun(2, tmp_path / "run", data, "--iters", "100000")
    while not (tmp_path / "run" / "memory.pt").exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    ranks = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    output, _ = job.communicate(timeout=60)
    assert job.returncode != 0 and "Signal 9" in output
    assert load_checkpoint(tmp_path / "run" / "memory.pt")["step"] >= 2


# --------------------------------------------------------------------------------------- data


def batches(examples, batch, **more):
    settings = dict(seed=0, pad_id=TINY.pad_id, answer_length=0, K=4, alpha=1.0, confident=0.3)
    return train.Batches(examples, batch, **settings | more)


def examples(n=50, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(300, size=rng.integers(2, 9)), rng.integers(300, size=rng.integers(1, 9)))
            for _ in range(n)]


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


def test_an_epoch_visits_every_example_once_and_pads_little():
    data = [(np.arange(1), np.full(i + 1, i)) for i in range(64)]
    make = batches(data, 4)
    seen = [row[1].item() for step in range(16) for row in make(step, slice(None), "cpu")["ids"]]
    assert sorted(seen) == list(range(64)) and seen != sorted(seen)
    assert max(np.ptp(make.lengths[rows]) for rows in make.epoch(0)) <= 4


def test_parts_of_a_batch_are_the_batch():
    make = batches(examples(), 8)
    whole, parts = make(3, slice(None), "cpu"), [make(3, slice(i, i + 2), "cpu") for i in (0, 2, 4, 6)]
    for key, value in whole.items():
        assert torch.equal(value, torch.cat([part[key] for part in parts]))


@pytest.mark.parametrize("item, prompt, answer", [
    ({"question": "Q", "answer": "A"}, "Q\nAnswer:", "A"),
    ({"prompt": "P", "completion": "C"}, "P", "C"),
    ({"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"},
                   {"role": "user", "content": "3"}]}, "1\nAnswer:", "2")])
def test_three_forms_of_data(item, prompt, answer):
    found = train.read_example(item, TOKENIZER)
    assert tuple(map(TOKENIZER.decode, found)) == (prompt, answer)


def test_data_cannot_write_control_tokens():
    for ids in train.read_example({"prompt": "<|mask|>", "completion": "<|endoftext|>"}, TOKENIZER):
        assert max(ids) < 256


@pytest.mark.parametrize("line, reason", [
    ('{"question": "x"}', "question/answer"), ('{"question": 3, "answer": "x"}', "question/answer"),
    ('{"messages": "x"}', "messages"), ('{"messages": [{"role": "user"}]}', "messages"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "assistant"), ("{", "JSON"), ("[1]", "JSON")])
def test_a_bad_line_is_named(line, reason, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n' + line + "\n")
    with pytest.raises(InputError, match="line 3.*" + reason):
        train.read_examples(read_jsonl(path), str(path), TOKENIZER, TINY.eos_id, 100)


def test_what_does_not_fit_is_dropped_with_a_count(capsys):
    items = list(enumerate([{"prompt": "a" * n, "completion": "b"} for n in (3, 30, 5)], 1))
    assert len(train.read_examples(items, "x", TOKENIZER, TINY.eos_id, 10)) == 2
    assert "1 of 3" in capsys.readouterr().err
    with pytest.raises(InputError, match="--max-length"):
        train.read_examples(items, "x", TOKENIZER, TINY.eos_id, 2)


def test_the_splits_of_the_built_in_problems_are_disjoint():
    splits = [{p["question"] for p in dial_problems(split)} for split in ("test", "valid", "train")]
    assert [len(s) for s in splits] == [1000, 1000, 10 * 8**4 - 2000]
    assert not (splits[0] & splits[1] or splits[0] & splits[2] or splits[1] & splits[2])


def test_every_word_of_the_problems_is_one_token():
    p = dial_problems("test", 1)[0]
    ids = [i for part in train.read_example(p, load_tokenizer("tiny")) for i in part]
    assert len(ids) == 21 + 18


@pytest.mark.parametrize("more, word", [(["--batch", "7", "--accumulate", "2"], "multiple"),
                                        (["--device", "abacus"], "abacus")])
def test_bad_options_are_one_sentence(tmp_path, data, more, word):
    assert finish(start(tmp_path / "run", data, *more)) == 1
    said = (tmp_path / "log").read_text()
    assert word in said and said.startswith("error: ") and said.strip().count("\n") == 0
