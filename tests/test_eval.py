"""Answers are extracted as lm-evaluation-harness does, and an interrupted run goes on."""
import json
import os
import random
import subprocess
import sys

import pytest
import torch

import eval_gsm8k as E
from conftest import ROOT, SHARED, needs_shared
from eval_gsm8k import PROTOCOLS, extract, is_correct, paired_interval, prompt_ids, wilson
from model import TINY, Backbone, run_program, save_backbone, tiny_tokenizer


@needs_shared
def test_extraction_equals_the_reference():
    rows = [json.loads(line) for line in (SHARED / "extract_given.jsonl").read_text().splitlines()]
    for row in rows:
        for rule in ("strict", "cot_strict", "flexible"):
            assert extract(row["text"], rule) == row[rule], row["id"]
            assert is_correct(row[rule], row["gold_answer"], rule) == row[f"{rule}_correct"], row["id"]


@pytest.mark.parametrize("rule, text, answer", [
    ("strict", "so #### 1,234.\n#### 5", "1,234."), ("strict", "#### $5", "[invalid]"),
    ("strict", "5", "[invalid]"), ("cot_strict", "The answer is 42.", "42"),
    ("cot_strict", "The answer is 16800", "1680"),     # the filter wants one character more
    ("flexible", "It costs $1,200 or -7", "-7"), ("flexible", "about $12.50.", "$12.50."),
    ("flexible", "7 ...", "..."), ("numeric", "7 ...", "7"), ("numeric", "$1,800.", "$1,800")])
def test_extract(rule, text, answer):
    assert extract(text, rule) == answer


@pytest.mark.parametrize("answer", ["18", "18.", "$18", "18.00"])
def test_numbers_compare_as_numbers(answer):
    assert is_correct(answer, "so it is\n#### 18", "numeric")
    assert is_correct(answer, "#### 18", "strict") == (answer != "18.00")
    assert not is_correct(answer, "#### 19", "numeric")
    assert is_correct("1,800", "#### 1800", "numeric") and not is_correct("[invalid]", "#### 1", "numeric")


def test_intervals():
    low, high = wilson(90, 100)
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-3)    # Wilson (1927), by table
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)
    a, b = [False] * 50 + [True] * 50, [True] * 100
    mean, low, high = paired_interval(a, b)
    assert mean == 0.5 and low == pytest.approx(0.40, abs=0.02) and high == pytest.approx(0.60, abs=0.02)
    assert paired_interval(b, b) == (0, 0, 0)


def test_prompts_are_those_of_the_harness():
    shots = [{"question": "q1", "answer": "1+1=<<1+1=2>>2\n#### 2"}]
    problem, tokenizer = {"question": "q2", "answer": ""}, tiny_tokenizer()
    text = lambda name: tokenizer.decode(prompt_ids(tokenizer, PROTOCOLS[name], problem, shots))  # noqa: E731
    assert text("gsm8k") == "Question: q1\nAnswer: 1+1=<<1+1=2>>2\n#### 2\n\nQuestion: q2\nAnswer:"
    assert text("gsm8k-cot") == "<|beginoftext|>Q: q1\nA: 1+1=2\nThe answer is 2.\n\nQ: q2\nA:"
    assert text("chat-few-shot").startswith("Question: q1\nAnswer: 1+1=<<1+1=2>>2\n#### 2\n\nQuestion: q2")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_backbone(Backbone(TINY), tmp_path / "backbone")
    with open(tmp_path / "data.jsonl", "w") as file:
        for i in range(23):
            file.write(json.dumps({"question": "x" * (i % 7), "answer": f"#### {i}"}) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


ARGS = ["eval_gsm8k.py", "--init", "backbone", "--data", "data.jsonl", "--device", "cpu", "--gen-length",
        "6", "--steps", "3", "--rule", "flexible"]


def run(monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", [*ARGS, *more])
    run_program(E.main)


def test_an_interrupted_run_goes_on_and_batches_do_not_matter(folder, monkeypatch, capsys):
    run(monkeypatch, "--out", "whole.jsonl", "--batch-size", "5")
    whole = (folder / "whole.jsonl").read_text()
    assert "of 23 correct" in capsys.readouterr().out
    cut = folder / "cut.jsonl"
    cut.write_text(whole[:whole.index('"index": 9') + 5])              # killed within a line
    asked = []
    evaluate = E.evaluate
    monkeypatch.setattr(E, "evaluate", lambda *a, **k: asked.extend(k["todo"]) or evaluate(*a, **k))
    run(monkeypatch, "--out", "cut.jsonl", "--batch-size", "1")
    assert asked == list(range(9, 23))
    _, found = E.read_results(cut)
    assert found == E.read_results(folder / "whole.jsonl")[1] and len(found) == 23


def test_other_settings_are_not_mixed_into_a_file(folder, monkeypatch):
    run(monkeypatch, "--out", "a.jsonl", "--limit", "3")
    before = (folder / "a.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="error: .*steps = 3, not 6"):
        run(monkeypatch, "--out", "a.jsonl", "--limit", "3", "--steps", "6")
    assert (folder / "a.jsonl").read_bytes() == before


def test_compare_pairs_the_problems(folder, monkeypatch, capsys):
    for name, correct in (("a", [1, 0, 0, 0]), ("b", [1, 1, 1, 0, 1])):
        rows = [{"index": i, "correct": bool(x)} for i, x in enumerate(correct)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, [{"setting": {}}, *rows])) + "\n")
    run(monkeypatch, "--compare", "a.jsonl", "b.jsonl")
    assert "4 problems: 25.0% -> 75.0%, +50.0 points" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="data.jsonl .*results that"):
        run(monkeypatch, "--compare", "a.jsonl", "data.jsonl")


def test_two_processes_answer_as_one_does(folder, monkeypatch):
    run(monkeypatch, "--out", "one.jsonl")
    job = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
         str(random.randrange(20_000, 60_000)), ROOT / ARGS[0], *ARGS[1:], "--out", "two.jsonl"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100)
    assert job.returncode == 0, job.stderr
    assert E.read_results(folder / "one.jsonl")[1] == E.read_results(folder / "two.jsonl")[1]
    assert job.stdout.count("of 23 correct") == 1


@needs_shared
def test_real_problems_pass_through(folder, monkeypatch, capsys):
    run(monkeypatch, "--data", str(SHARED / "gsm8k" / "test.jsonl"), "--limit", "40", "--protocol", "gsm8k",
        "--out", "real.jsonl")
    assert "of 40 correct" in capsys.readouterr().out


@pytest.mark.parametrize("line, word", [("{", "JSON"), ('{"question": "x"}', "question or answer")])
def test_bad_problems_are_named(folder, monkeypatch, line, word):
    with open(folder / "data.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(SystemExit, match="error: data.jsonl line 24 .*" + word):
        run(monkeypatch, "--out", "x.jsonl")
