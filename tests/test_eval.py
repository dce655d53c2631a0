"""Answers are extracted as lm-evaluation-harness does, and an interrupted run goes on."""
import json
import sys

import pytest
import torch

import eval_gsm8k as E
from conftest import SHARED, at_most, needs_shared
from eval_gsm8k import PROTOCOLS, extract, is_correct, paired_interval, prompt_ids, wilson
from eval_gsm8k import WORDS, Contestant, contestants, dial_problems
from folders import memory_for
from metastate import MetaState, preset
from model import TINY, Backbone, save_backbone, tiny_tokenizer
from processes import run_two
from sample import ASSETS, EXAMPLES, run_program


@needs_shared
def test_extraction_equals_the_reference():
    lines = (SHARED / "extract_given.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        for rule in ("strict", "cot_strict", "flexible"):
            assert extract(row["text"], rule) == row[rule], row["id"]
            correct = is_correct(row[rule], row["gold_answer"], rule)
            assert correct == row[f"{rule}_correct"], row["id"]


@pytest.mark.parametrize("rule, text, answer", [
    ("strict", "so #### 1,234.\n#### 5", "1,234."),
    ("strict", "#### $5", "[invalid]"),
    ("strict", "5", "[invalid]"),
    ("cot_strict", "The answer is 42.", "42"),
    ("cot_strict", "The answer is 16800", "1680"),     # the filter wants one character more
    ("flexible", "It costs $1,200 or -7", "-7"),
    ("flexible", "about $12.50.", "$12.50."),
    ("flexible", "7 ...", "..."),
    ("numeric", "7 ...", "7"),
    ("numeric", "$1,800.", "$1,800")])
def test_extract(rule, text, answer):
    assert extract(text, rule) == answer


@pytest.mark.parametrize("answer", ["18", "18.", "$18", "18.00"])
def test_numbers_compare_as_numbers(answer):
    assert is_correct(answer, "so it is\n#### 18", "numeric")
    assert is_correct(answer, "#### 18", "strict") == (answer != "18.00")
    assert not is_correct(answer, "#### 19", "numeric")
    assert is_correct("1,800", "#### 1800", "numeric")
    assert not is_correct("[invalid]", "#### 1", "numeric")


def test_intervals():
    low, high = wilson(90, 100)
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-3)    # Wilson (1927), by table
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)
    half = [False] * 50 + [True] * 50
    whole = [True] * 100
    mean, low, high = paired_interval(half, whole)
    assert mean == 0.5 and (low, high) == pytest.approx((0.40, 0.60), abs=0.02)
    assert paired_interval(whole, whole) == (0, 0, 0)


def test_prompts_are_those_of_the_harness():
    shots = [{"question": "q1", "answer": "1+1=<<1+1=2>>2\n#### 2"}]
    problem = {"question": "q2", "answer": ""}
    tokenizer = tiny_tokenizer(WORDS)

    def text(name):
        return tokenizer.decode(prompt_ids(tokenizer, PROTOCOLS[name], problem, shots))

    solved = "Question: q1\nAnswer: 1+1=<<1+1=2>>2\n#### 2\n\n"
    assert text("gsm8k") == solved + "Question: q2\nAnswer:"
    assert text("gsm8k-cot") == "<|beginoftext|>Q: q1\nA: 1+1=2\nThe answer is 2.\n\nQ: q2\nA:"
    assert text("chat-few-shot").startswith(solved + "Question: q2")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_backbone(Backbone(TINY), tmp_path / "backbone", WORDS)
    problems = [{"question": "x" * (i % 7), "answer": f"#### {i}"} for i in range(23)]
    write_lines(tmp_path / "data.jsonl", problems)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def spy_on(name, monkeypatch):
    """The keyword arguments of every call of a function of eval_gsm8k.py, which runs as before."""
    calls = []
    function = getattr(E, name)

    def spy(*args, **options):
        calls.append(options)
        return function(*args, **options)

    monkeypatch.setattr(E, name, spy)
    return calls


ARGS = ["eval_gsm8k.py", "--init", "backbone", "--data", "data.jsonl", "--device", "cpu",
        "--gen-length", "6", "--steps", "3", "--rule", "flexible"]


def run(monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", [*ARGS, *more])
    run_program(E.main, "")


def test_an_interrupted_run_goes_on_and_batches_do_not_matter(folder, monkeypatch, capsys):
    run(monkeypatch, "--out", "whole.jsonl", "--batch-size", "5")
    whole = (folder / "whole.jsonl").read_text()
    assert "of 23 correct" in capsys.readouterr().out
    cut = folder / "cut.jsonl"
    cut.write_text(whole[:whole.index('"index": 9') + 5])              # killed within a line
    calls = spy_on("evaluate", monkeypatch)
    run(monkeypatch, "--out", "cut.jsonl", "--batch-size", "1")
    assert [call["todo"] for call in calls] == [list(range(9, 23))]
    _, found = E.read_results(cut)
    assert found == E.read_results(folder / "whole.jsonl")[1] and len(found) == 23


def test_other_settings_are_not_mixed_into_a_file(folder, monkeypatch):
    run(monkeypatch, "--out", "a.jsonl", "--limit", "3")
    before = (folder / "a.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="error: .*was made with sampling"):
        run(monkeypatch, "--out", "a.jsonl", "--limit", "3", "--steps", "6")
    assert (folder / "a.jsonl").read_bytes() == before


def test_compare_pairs_the_problems(folder, monkeypatch, capsys):
    for name, correct in (("a", [1, 0, 0, 0]), ("b", [1, 1, 1, 0, 1])):
        rows = [{"index": i, "correct": bool(x), "passes": 1} for i, x in enumerate(correct)]
        write_lines(folder / f"{name}.jsonl", [{"setting": {"problems": 5}}, *rows])
    run(monkeypatch, "--compare", "a.jsonl", "b.jsonl")
    assert "4 problems: 25.0% -> 75.0%, +50.0 points" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="data.jsonl .*results that"):
        run(monkeypatch, "--compare", "a.jsonl", "data.jsonl")


def test_two_processes_answer_as_one_does(folder, monkeypatch):
    run(monkeypatch, "--out", "one.jsonl")
    codes, texts = run_two(*ARGS, "--out", "two.jsonl", folder=folder)
    assert codes == [0, 0], texts
    assert E.read_results(folder / "one.jsonl")[1] == E.read_results(folder / "two.jsonl")[1]
    assert "".join(texts).count("of 23 correct") == 1


@needs_shared
def test_real_problems_pass_through(folder, monkeypatch, capsys):
    run(monkeypatch, "--data", str(SHARED / "gsm8k" / "test.jsonl"), "--limit", "5",
        "--protocol", "gsm8k", "--out", "real.jsonl")
    assert "of 5 correct" in capsys.readouterr().out


def test_no_problem_is_its_own_solved_example(folder, monkeypatch):
    (folder / "train.jsonl").write_text((folder / "data.jsonl").read_text())
    options = ["--protocol", "gsm8k", "--out", "x.jsonl"]
    run(monkeypatch, *options, "--limit", "2")
    with pytest.raises(SystemExit, match="solved examples from train.jsonl"):
        run(monkeypatch, *options, "--data", "train.jsonl")
    (folder / "train.jsonl").write_text((folder / "data.jsonl").read_text().split("\n")[0])
    with pytest.raises(SystemExit, match="has 1 of the 5"):
        run(monkeypatch, *options)


def test_a_shuffled_evaluation_goes_on_in_the_batches_that_it_began_with(folder, monkeypatch):
    """Whose memory a row gets depends on its batch."""
    def answers(name):
        options = ["--init", str(ASSETS / "tiny"), "--carry", "shuffle", "--batch-size", "4",
                   "--limit", "8", "--think", "2", "--steps", "2", "--out", name]
        monkeypatch.setattr(sys, "argv", ["eval_gsm8k.py", *options])
        run_program(E.main, "")
        return E.read_results(folder / name)[1]

    whole = answers("whole.jsonl")
    lines = (folder / "whole.jsonl").read_text().splitlines(keepends=True)
    (folder / "cut.jsonl").write_text("".join(lines[:3]))
    assert answers("cut.jsonl") == whole


@pytest.mark.parametrize("line, word", [("{", "JSON"), ('{"question": "x"}', "question or answer")])
def test_bad_problems_are_named(folder, monkeypatch, line, word):
    with open(folder / "data.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(SystemExit, match="error: data.jsonl line 24 .*" + word):
        run(monkeypatch, "--out", "x.jsonl")


# ---------------------------------------------------------------------------- WHAT THE TABLES RUN


def test_the_example_of_sample_is_a_problem_and_its_answer_right():
    questions = {p["question"]: p["answer"] for split in ("test", "valid", "train")
                 for p in dial_problems(split)}
    prompt, answer = EXAMPLES["tiny"]
    assert questions[prompt].endswith(f"#### {answer}")


@pytest.fixture
def bench():
    torch.manual_seed(0)
    backbone = Backbone(TINY).requires_grad_(False).eval()
    return E.Bench(backbone, tiny_tokenizer(WORDS), dial_problems("valid", 3), 20)


def test_every_row_of_the_tables_runs_what_its_name_says(bench, monkeypatch):
    """A spy on evaluate: the control rows must not run with the memory kept."""
    memory, memoryless = memory_for(bench.backbone), MetaState(preset(bench.backbone))
    monkeypatch.setattr(E, "THRESHOLDS", (0.9,))
    monkeypatch.setattr(E, "BLOCK_LENGTHS", (10,))
    monkeypatch.setattr(E, "QUOTA_STEPS", (2,))
    monkeypatch.setattr(E, "THINKING_PASSES", (1, 2))
    calls = spy_on("evaluate", monkeypatch)
    everyone = contestants(memory, memoryless)
    _, thinking = E.thinking_table(bench, everyone)
    rows = [(None, "keep"), (memory, "reset"), (memory, "shuffle"), (memoryless, "reset"),
            (memory, "keep")]
    assert [(call["memory"], call["carry"]) for call in calls] == [r for r in rows for _ in (1, 2)]
    assert list(thinking) == ["frozen", "memory reset", "memory shuffled", "memoryless-trained",
                              "MetaState"]
    for n, call in zip([1, 2] * 5, calls):             # the n-th pass writes
        assert call["settings"] == {"gen_length": 20, "think": n - 1, "steps": 1}
    calls.clear()
    E.schedule_table(bench, bench, everyone)
    tried = [(call["memory"], call["carry"]) for call in calls]
    assert set(tried) == {(None, "keep"), (memory, "keep")}


def test_the_tables_fit_80_columns():
    rows = {"memoryless-trained": ["100.0"] * len(E.THINKING_PASSES)}
    text = E.table("x", list(map(str, E.THINKING_PASSES)), rows)
    assert max(map(len, text.splitlines())) <= 80


def test_passes_are_counted_by_row(bench):
    """By threshold rows need passes of their own number, and one that is done waits."""
    def rows_of(todo):
        settings = dict(gen_length=12, steps=1, threshold=0.02, think=2)
        return list(E.evaluate(bench.backbone, bench.tokenizer, bench.problems, PROTOCOLS["dial"],
                               settings=settings, todo=todo))

    rows = rows_of([0, 1, 2])
    thinking = bench.score(Contestant(None, "keep"), think=3, steps=2)
    assert [row["passes"] for row in thinking] == [5, 5, 5]
    assert rows == rows_of([0]) + rows_of([1]) + rows_of([2])
    assert all(2 < row["passes"] <= 14 for row in rows)


@pytest.mark.parametrize("change", [
    {"index": 5000}, {"index": -1}, {"index": None}, {"index": "1"}, {"index": False},
    {"index": 0.0}, {"correct": "yes"}, {"correct": None}, {"correct": 1}, {"passes": None},
    {"passes": -5}, {"passes": 1.5}, {"passes": 10 ** 400}])
def test_results_edited_by_hand_are_refused(folder, monkeypatch, change):
    run(monkeypatch, "--out", "a.jsonl", "--limit", "3")
    lines = (folder / "a.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line]
    rows[1] |= change
    edited = "\n".join(map(json.dumps, rows)) + "\n"
    (folder / "a.jsonl").write_text(edited)
    with pytest.raises(SystemExit, match="error: a.jsonl line 2 "):
        run(monkeypatch, "--out", "a.jsonl", "--limit", "3")
    assert (folder / "a.jsonl").read_text() == edited


@pytest.mark.parametrize("first_line", [
    "", "null", "[]", '{"setting": null}', '{"setting": [1]}', '{"setting": {"problems": "3"}}',
    '{"setting": {"problems": 3.0}}', "[" * 200_000, "\ufeff"])
def test_results_whose_first_line_is_no_setting_are_refused(folder, monkeypatch, first_line):
    content = f'{first_line}\n{{"index": 0, "correct": true, "passes": 1}}\n'
    (folder / "a.jsonl").write_text(content)
    for options in (["--out", "a.jsonl"], ["--compare", "a.jsonl", "a.jsonl"]):
        with pytest.raises(SystemExit, match="error: a.jsonl cannot be used .*; give a file of"):
            run(monkeypatch, *options)
    assert (folder / "a.jsonl").read_text() == content


def test_two_answers_to_one_problem_are_refused_unless_they_are_the_same(folder, monkeypatch):
    row = {"index": 0, "correct": True, "passes": 1}
    write_lines(folder / "a.jsonl", [{"setting": {"problems": 5}}, row, row])
    run(monkeypatch, "--compare", "a.jsonl", "a.jsonl")
    write_lines(folder / "a.jsonl", [{"setting": {"problems": 5}}, row, row | {"correct": False}])
    with pytest.raises(SystemExit, match="error: a.jsonl line 3 .*another answer"):
        run(monkeypatch, "--compare", "a.jsonl", "a.jsonl")


def test_a_broken_line_is_passed_over_however_it_is_broken(folder, monkeypatch, capsys):
    run(monkeypatch, "--out", "a.jsonl", "--limit", "3")
    with open(folder / "a.jsonl", "a") as file:
        file.write("[" * 200_000 + "\n" + '{"index": ' + "9" * 6000 + "}\n\0\n")
    run(monkeypatch, "--out", "a.jsonl", "--limit", "3")
    assert capsys.readouterr().out.count("of 3 correct") == 2


def test_evaluation_passes_on_carry_think_and_the_seed_of_every_problem(folder, monkeypatch):
    calls = spy_on("generate", monkeypatch)
    run(monkeypatch, "--out", "a.jsonl", "--limit", "5", "--batch-size", "3", "--carry", "reset",
        "--think", "2", "--seed", "7")
    assert [call["carry"] for call in calls] == ["reset", "reset"]
    assert [call["think"] for call in calls] == [2, 2]
    assert [list(call["seeds"]) for call in calls] == [[7, 8, 9], [10, 11]]


def test_the_answer_ends_at_the_first_stop():
    tokenizer = tiny_tokenizer(WORDS)
    ids = tokenizer.encode("1 Q: 2 #### 3<|endoftext|>4", special=True)
    assert E.answer_text(tokenizer, ids, ("Q:", "<|endoftext|>")) == "1 "
    assert E.answer_text(tokenizer, ids, ("<|endoftext|>",)) == "1 Q: 2 #### 3"
    assert E.answer_text(tokenizer, ids, ()) == "1 Q: 2 #### 34"


@pytest.mark.parametrize("protocol, after_it", [
    ("dial", "<|endoftext|> 4"), ("gsm8k", " Question: 4"), ("gsm8k-cot", " Q: 4"),
    ("chat", " Q: 4"), ("chat-few-shot", "</s> 4")])
def test_an_answer_is_judged_up_to_the_stop_of_its_protocol(protocol, after_it):
    tokenizer = tiny_tokenizer(WORDS)
    answer = "The answer is 3. #### 3"
    ids = tokenizer.encode(answer + after_it, special=True)
    judged = E.judge(tokenizer, PROTOCOLS[protocol], {"answer": "#### 3"}, ids)
    assert judged["text"].strip() == answer and judged["correct"]


def test_a_long_answer_is_judged_at_once():
    with at_most(10):
        assert not is_correct("1", "x" * 500_000, "strict")
        assert is_correct("11", "#### 1" * 100_000 + "1", "strict")
