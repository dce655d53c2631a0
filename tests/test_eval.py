"""Prompts, answer rules, problems and results files of an evaluation mean what they say."""
import hashlib
import json
import os
import sys
from itertools import combinations

import pytest
import torch

import eval_gsm8k as E
from conftest import SHARED, needs_shared
from diffusion import generate
from eval_gsm8k import PROTOCOLS, extract, is_correct, paired_interval, wilson
from folders import CONTROL_TOKENS, memory_for, save_run
from metastate import load_memory
from model import (TINY, Backbone, byte_pair_tokenizer, bytes_of_characters, load_backbone,
                   load_tokenizer, tiny_tokenizer)
from processes import run_two
from sample import ASSETS, WORDS, dial_answer, dial_problems, run_program


@needs_shared
def test_extraction_and_scores_equal_those_of_the_harness():
    lines = (SHARED / "extract_given.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        for rule in ("strict", "cot_strict", "flexible"):
            assert extract(row["text"], rule) == row[rule], row["id"]
            correct = is_correct(row[rule], row["gold_answer"], rule)
            assert correct == row[f"{rule}_correct"], row["id"]


@pytest.mark.parametrize("rule, text, answer", [
    ("strict", "so #### 1,234.\n#### 5", "1,234."), ("strict", "#### -7", "-7"),
    ("strict", "#### $5", "[invalid]"), ("cot_strict", "The answer is 42. No, 5.", "42."),
    ("cot_strict", "The answer is 16800", "1680"),     # the filter wants one character more
    ("flexible", "$1,200 or -7", "-7"), ("flexible", "about $12.50.", "$12.50."),
    ("flexible", "7 ...", "..."), ("flexible", "none", "[invalid]"),
    ("numeric", "7 ...", "7"), ("numeric", "$1,800.", "$1,800"), ("numeric", "a half: .5", ".5"),
    ("numeric", r"\boxed{1{,}000}", "1,000"), ("numeric", "3 to \u22124.", "-4")])
def test_the_answer_in_a_text_is(rule, text, answer):
    assert extract(text, rule) == answer


@pytest.mark.parametrize("answer, gold, by_number, by_string", [
    ("18.", "18", True, True), ("$1,800", "1800", True, True), ("18.00", "18", True, False),
    (".5", "0.50", True, False), ("\u221218", "-18", True, False), ("18", "-18", False, False),
    ("[invalid]", "1", False, False)])
def test_answers_compare_as_numbers_or_as_strings(answer, gold, by_number, by_string):
    assert is_correct(answer, f"6 * 3 = 18\n#### {gold}", "numeric") == by_number
    assert is_correct(answer, f"6 * 3 = 18\n#### {gold}", "strict") == by_string


@pytest.mark.parametrize("protocol, after_it", [
    ("dial", "<|endoftext|> 4"), ("gsm8k", " Question: 4"), ("gsm8k-cot", " Q: 4"),
    ("chat", " Q: 4"), ("chat-few-shot", "</s> 4"), ("paper", " Question: 4")])
def test_an_answer_is_read_up_to_the_stop_of_its_protocol(protocol, after_it):
    tokenizer = TOKENIZERS["tiny"]
    ids = tokenizer.encode("The answer is 3." + after_it)
    text = E.answer_text(tokenizer, ids, PROTOCOLS[protocol].stops)
    assert text.strip() == "The answer is 3."


WHOLE = dict(gen_length=256, steps=256)
BLOCKS = WHOLE | dict(block_length=32)
COT = WHOLE | dict(remasking="entropy", top_p=0.95)
PAPER = BLOCKS | dict(cache=True, threshold=0.9)
SHOT = {"question": "q1", "answer": "1+1=<<1+1=2>>2\n#### 2"}
SOLVED = "Question: q1\nAnswer: 1+1=<<1+1=2>>2\n#### 2\n\nQuestion: q2\nAnswer:"
SOLVED_COT = "Q: q1\nA: 1+1=2\nThe answer is 2.\n\nQ: q2\nA:"
DREAM_TURN = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
              "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n")
LLADA_TURN = ("<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n")


def byte_tokenizer(kind, control_tokens):
    added = [{"content": token, "id": 256 + n, "special": True}
             for n, token in enumerate(control_tokens)]
    return byte_pair_tokenizer(kind, bytes_of_characters(), [], added, nfc=True)


TOKENIZERS = {
    "tiny": tiny_tokenizer(WORDS),
    "llada": byte_tokenizer("llada", CONTROL_TOKENS),
    "dream": byte_tokenizer("dream", ["<|beginoftext|>", "<|im_start|>", "<|im_end|>"]),
}


@pytest.mark.parametrize("options, name, shots, rule, settings, prompt", [
    ("", "dial", 0, "strict", dict(gen_length=20, steps=5), "q2\nAnswer:"),
    ("--init llada-base", "gsm8k", 5, "flexible", WHOLE, SOLVED),
    ("--init llada-base --chat", "chat-few-shot", 5, "flexible", BLOCKS, LLADA_TURN.format(SOLVED)),
    ("--init llada", "chat-few-shot", 5, "flexible", BLOCKS, LLADA_TURN.format(SOLVED)),
    ("--init llada --no-chat", "gsm8k", 5, "flexible", WHOLE, SOLVED),
    ("--init llada --protocol paper", "paper", 5, "flexible", PAPER, LLADA_TURN.format(SOLVED)),
    ("--init dream-base", "gsm8k-cot", 8, "cot_strict", COT, "<|beginoftext|>" + SOLVED_COT),
    ("--init dream", "chat", 0, "flexible", COT | dict(top_p=0.9, temperature=0.1),
     DREAM_TURN.format("Q: q2\nA:")),
    ("--init dream-base --protocol paper", "paper", 5, "flexible", PAPER,
     "<|beginoftext|>" + SOLVED),
    ("--init dream --protocol gsm8k-cot", "gsm8k-cot", 8, "cot_strict", COT,
     "<|beginoftext|>" + SOLVED_COT),
    ("--init dream --protocol gsm8k-cot --chat", "gsm8k-cot", 8, "cot_strict", COT,
     DREAM_TURN.format(SOLVED_COT))])
def test_a_model_is_evaluated_under(options, name, shots, rule, settings, prompt, monkeypatch):
    """The protocol, its settings, and a prompt of one solved example where it takes any."""
    monkeypatch.setattr(sys, "argv", ["eval_gsm8k.py", *options.split()])
    args = E.arguments()
    choice = E.choose_models(args)
    found, protocol = E.choose_protocol(args.protocol, choice, args.chat)
    assert (found, protocol.shots, protocol.rule) == (name, shots, rule)
    assert E.sampling_settings(args, protocol.settings) == settings
    tokenizer = TOKENIZERS[choice.kind]
    problem = {"question": "q2", "answer": ""}
    ids = E.problem_ids(tokenizer, protocol, problem, [SHOT][:protocol.shots])
    assert ids == tokenizer.encode(prompt)             # control tokens as one id each


def test_the_built_in_problems_are_fixed_and_no_question_is_in_two_splits():
    splits = [dial_problems(split) for split in ("test", "valid", "train")]
    assert [len(split) for split in splits] == [1000, 1000, 38960]
    assert [split[0]["answer"] for split in splits] == [
        " pink gives 6, black gives 6, blue gives 3, blue gives 6.\n#### 6",
        " white gives 7, black gives 4, red gives 3, red gives 1.\n#### 1",
        " brown gives 6, blue gives 3, red gives 1, white gives 5.\n#### 5"]
    assert splits[0][0]["question"] == (
        "The dial shows 6. Press pink, then press black, then press blue, then press blue.")
    for some, others in combinations(splits, 2):
        assert not {p["question"] for p in some} & {p["question"] for p in others}
    assert dial_problems("valid", 3) == splits[1][:3]
    assert all(dial_answer(p["question"]) == p["answer"] for p in splits[0])
    question, answer = map(TOKENIZERS["tiny"].encode, splits[0][0].values())   # a word is a token
    assert len(question) == 5 + 2 + 3 * 4 + 1 and len(answer) == 4 * 3 + 3 + 1 + 2


@pytest.mark.parametrize("text", [
    "", "The dial shows 4.", "The dial shows 4. Press red, then press red, then press red.",
    f"The dial shows 12. Press red{', then press red' * 3}.",
    f"The dial shows 4. Press grey{', then press red' * 3}.",
    f"The dial shows 4. Press red{', then press red' * 3}. Why?"])
def test_a_text_that_is_no_dial_problem_has_no_answer(text):
    assert dial_answer(text) is None


@pytest.mark.parametrize("name, begin", [("test.jsonl", "3730d312"), ("train.jsonl", "17f347dc")])
def test_gsm8k_is_fetched_once_and_checked_by_its_hash(name, begin, tmp_path, monkeypatch):
    calls = []

    def download(url, path, sha256=None):
        calls.append((url.rsplit("/", 1)[1], sha256))
        path.write_text("fetched")

    monkeypatch.setattr(E, "download", download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert E.gsm8k_file(name).read_text() == E.gsm8k_file(name).read_text() == "fetched"
    assert calls == [(name, E.SHA256[name])] and E.SHA256[name].startswith(begin)
    if SHARED.exists():
        published = (SHARED / "gsm8k" / name).read_bytes()
        assert hashlib.sha256(published).hexdigest() == E.SHA256[name]


@pytest.fixture
def tiny():
    """A random backbone, its tokeniser, and a memory that matters."""
    torch.manual_seed(0)
    backbone = Backbone(TINY).requires_grad_(False).eval()
    return backbone, TOKENIZERS["tiny"], memory_for(backbone)


def test_no_answer_depends_on_its_batch_and_each_has_its_own_seed_and_passes(tiny):
    """By threshold rows need passes of their own number, and one that is done waits."""
    backbone, tokenizer, memory = tiny
    problems = [{"question": "x" * n, "answer": "#### 1"} for n in (1, 9, 4, 4, 6)]
    settings = dict(gen_length=12, threshold=0.01, think=2, temperature=1.0)

    def rows(todo, batch_size, seed=0):
        return list(E.evaluate(backbone, tokenizer, problems, PROTOCOLS["dial"], settings=settings,
                               todo=todo, memory=memory, batch_size=batch_size, seed=seed))

    together = rows(None, 5)
    assert [row["index"] for row in together] == [0, 1, 2, 3, 4]
    assert together == rows(None, 2) == rows([0], 1) + rows([1, 2, 3, 4], 3)
    assert together[2]["text"] != together[3]["text"]          # one question, two seeds
    assert rows([3], 1)[0]["text"] == rows([2], 1, seed=1)[0]["text"]
    assert len({row["passes"] for row in together}) > 1
    seen = []
    generate(backbone, torch.tensor([tokenizer.encode("xxxx\nAnswer:")]), memory=memory, seeds=[2],
             on_step=lambda *report: seen.append(report), **settings)
    assert together[2]["passes"] == len(seen)


@pytest.mark.parametrize("carry", ["keep", "reset"])
def test_an_answer_by_pass_is_the_one_written_at_once_after_it(carry):
    """Of the trained model, whose answers are words: compared are tokens."""
    backbone = load_backbone(ASSETS / "tiny" / "backbone")
    tokenizer = load_tokenizer(ASSETS / "tiny" / "backbone")
    memory = load_memory(ASSETS / "tiny" / "memory.pt", backbone)
    questions = dial_problems("valid", 5)
    prompts = [E.problem_ids(tokenizer, PROTOCOLS["dial"], p, ()) for p in questions]
    P = len(prompts[0])
    written = []
    for n in (1, 2, 3, 4):
        canvas = generate(backbone, torch.tensor(prompts), memory=memory, carry=carry,
                          gen_length=20, think=n - 1, steps=1)
        written.append([tokenizer.answer(row) for row in canvas[:, P:].tolist()])
    assert (written[0] != written[1]) == (carry == "keep")
    for answers in written:
        problems = [p | {"answer": answer} for p, answer in zip(questions, answers)]
        found = E.whole_by_pass(backbone, tokenizer, problems, memory=memory, carry=carry,
                                n_passes=4, batch_size=2)
        assert found.tolist() == [[a == b for a, b in zip(answers, other)] for other in written]


def test_intervals_are_those_of_95_percent():
    assert wilson(90, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    half, whole = [False, True] * 50, [True] * 100
    assert paired_interval(half, whole) == pytest.approx((0.5, 0.40, 0.60))    # binomial quantiles
    assert paired_interval(whole, half) == pytest.approx((-0.5, -0.60, -0.40))
    assert paired_interval(half, half) == (0, 0, 0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run, and 11 problems of several lengths beside train.jsonl, which has others."""
    save_run(tmp_path / "run")
    for name, first, n in (("data", 0, 11), ("train", 100, 8)):
        problems = [{"question": "x" * (i % 4), "answer": f"#### {i}"}
                    for i in range(first, first + n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, problems)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


ARGS = ["eval_gsm8k.py", "--init", "run", "--data", "data.jsonl", "--device", "cpu",
        "--gen-length", "6", "--steps", "3", "--rule", "flexible", "--batch-size", "4"]


def run(monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", [*ARGS, *more])
    run_program(E.main, "")


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call of evaluate, which runs as before."""
    calls = []
    evaluate = E.evaluate

    def spy(*args, **options):
        calls.append(options)
        return evaluate(*args, **options)

    monkeypatch.setattr(E, "evaluate", spy)
    return calls


@pytest.mark.parametrize("carry, todo", [("keep", [4, 5, 6, 7, 8, 9, 10]),
                                         ("shuffle", list(range(11)))])
def test_an_interrupted_run_goes_on(carry, todo, folder, calls, monkeypatch, capsys):
    """Under shuffle in the batches that it began with: whose memory a row gets depends on them."""
    run(monkeypatch, "--out", "whole.jsonl", "--carry", carry)
    whole = (folder / "whole.jsonl").read_text()
    (folder / "cut.jsonl").write_text(whole[:whole.index('"index": 4') + 9])       # within a line
    run(monkeypatch, "--out", "cut.jsonl", "--carry", carry)
    run(monkeypatch, "--out", "cut.jsonl", "--carry", carry)
    assert [call["todo"] for call in calls] == [list(range(11)), todo, []]
    assert {call["carry"] for call in calls} == {carry}
    _, rows = E.read_results(folder / "cut.jsonl")
    assert rows == E.read_results(folder / "whole.jsonl")[1] and len(rows) == 11
    assert capsys.readouterr().out.count("of 11 correct") == 3


def test_a_file_takes_answers_of_one_setting_and_one_content_of_its_memory(folder, monkeypatch):
    """The memory is known by its bytes, not by where it lies."""
    run(monkeypatch, "--out", "a.jsonl")
    before = (folder / "a.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="error: a.jsonl was made with sampling"):
        run(monkeypatch, "--out", "a.jsonl", "--steps", "6")
    state = torch.load(folder / "run" / "memory.pt")
    state["model"]["initial_slots"] += 1
    torch.save(state, folder / "run" / "memory.pt")
    with pytest.raises(SystemExit, match="error: a.jsonl was made with memory"):
        run(monkeypatch, "--out", "a.jsonl")
    assert (folder / "a.jsonl").read_bytes() == before


def test_a_default_file_is_named_after_model_memory_and_setting(folder, monkeypatch):
    for options in (["--seed", "0"], ["--seed", "1"], ["--no-memory", "--steps", "5"]):
        run(monkeypatch, "--limit", "1", *options)
    names = sorted(name[:-len("123456.jsonl")] for name in os.listdir("out/eval"))
    run_of_ours = "tiny_run_dial_gen_length-6_steps-3_"
    assert names == ["tiny_frozen_dial_gen_length-6_", run_of_ours, run_of_ours]


def test_two_files_are_compared_problem_by_problem(folder, monkeypatch, capsys):
    def save(name, results, problem="p"):
        rows = [{"index": i, "problem": f"{problem}{i}", "correct": bool(x), "passes": 1}
                for i, x in enumerate(results)]
        lines = [{"setting": {"problems": 5}}, *rows]
        (folder / name).write_text("\n".join(map(json.dumps, lines)))

    save("a.jsonl", [1, 0, 0, 0])
    save("b.jsonl", [1, 1, 1, 0, 1])
    save("c.jsonl", [1, 1, 1, 0, 1], problem="another ")
    run(monkeypatch, "--compare", "a.jsonl", "b.jsonl")
    assert capsys.readouterr().out == (
        "A, a.jsonl: 25.0% of 4 problems\nB, b.jsonl: 75.0%\n"
        "B - A: +50.0 points (95 % interval, paired over problems: +0.0 to +100.0)\n")
    with pytest.raises(SystemExit, match="different ones under one number"):
        run(monkeypatch, "--compare", "a.jsonl", "c.jsonl")


def test_solved_examples_are_those_of_the_train_file_never_of_the_scored_one(
        folder, calls, monkeypatch):
    options = ["--protocol", "gsm8k", "--limit", "1"]
    run(monkeypatch, *options)
    (folder / "train.jsonl").rename(folder / "gsm8k.jsonl")
    asked = []
    monkeypatch.setattr(E, "gsm8k_file", lambda name: asked.append(name) or folder / "gsm8k.jsonl")
    run(monkeypatch, *options)
    for call in calls:
        assert [shot["answer"] for shot in call["shots"]] == [f"#### {100 + i}" for i in range(5)]
    assert asked == ["train.jsonl"]
    with pytest.raises(SystemExit, match="takes its 5 solved examples from .*gsm8k.jsonl"):
        run(monkeypatch, *options, "--data", "gsm8k.jsonl")


def test_two_processes_share_an_evaluation(folder, monkeypatch):
    run(monkeypatch, "--out", "one.jsonl")
    codes, texts = run_two(*ARGS, "--out", "two.jsonl", folder=folder)
    assert codes == [0, 0], texts
    assert E.read_results(folder / "one.jsonl")[1] == E.read_results(folder / "two.jsonl")[1]
    assert "".join(texts).count("of 11 correct") == 1
