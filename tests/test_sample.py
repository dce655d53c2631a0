"""sample.py in the hands of a person: which model answers, what it is given, what is printed."""
import argparse
import re
import sys
from pathlib import Path

import pytest
import torch

import sample
from folders import save_llada, save_run
from model import InputError, load_tokenizer, tiny_tokenizer
from sample import WORDS

TINY = sample.ASSETS / "tiny"
PROMPT = "The dial shows 4. Press blue, then press red, then press black, then press pink."
ANSWER = " blue gives 7, red gives 4, black gives 5, pink gives 0.\n#### 0"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*options): what sample.py prints, in an empty folder; run.notes: what it tells beside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", *options])
        sample.run_program(sample.main, "")
        out, run.notes = capsys.readouterr()
        return out

    return run


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of generate: {ids, ...}; it runs as before."""
    calls = []
    generate = sample.generate

    def spy(backbone, ids, **options):
        calls.append({"ids": ids.tolist(), **options})
        return generate(backbone, ids, **options)

    monkeypatch.setattr(sample, "generate", spy)
    return calls


THINK = ["--think", "4", "--steps", "1"]               # all of the answer at once


def test_a_verdict_follows_the_answer_to_a_dial_problem(run):
    assert run(*THINK) == f"{PROMPT}\n{ANSWER}  (right)\n"
    assert run("--no-memory").endswith("  (wrong: 0)\n")


def test_the_tiny_model_hints_at_its_problems_where_the_prompt_is_none(run):
    out = run("1 + 1 =")
    assert f"the tiny model knows problems such as '{PROMPT}' only" in run.notes
    assert out.startswith("1 + 1 =\n") and not re.search("right|wrong", out)
    run(PROMPT)
    assert "problems such as" not in run.notes


def test_a_prompt_is_given_with_or_without_its_option(run, calls):
    prompt = "The dial shows 3. Press red, then press red, then press red, then press red."
    assert run(prompt) == run("--prompt", prompt) != run()
    assert calls[0]["ids"] == calls[1]["ids"] != calls[2]["ids"]
    assert calls[0]["ids"] == [tiny_tokenizer(WORDS).encode(prompt + "\nAnswer:")]


def test_every_sample_has_its_own_seed(run, calls):
    options = ["x", "--temperature", "5", "--steps", "20"]
    first, second = (run(*options, "--seed", seed).removeprefix("x\n") for seed in ("3", "4"))
    assert run(*options, "--num-samples", "2", "--seed", "3") == f"x\n{first}{second}"
    assert first != second
    assert [list(call["seeds"]) for call in calls] == [[3], [4], [3, 4]]


@pytest.mark.parametrize("name, options, is_chat", [
    ("x", [], True), ("X-Base-8B", [], False), ("x", ["--no-chat"], False),
    ("x-base", ["--chat"], True)])
def test_a_base_model_is_not_put_into_a_chat(name, options, is_chat, run, calls):
    save_llada(Path(name))
    run("Hi", "--init", name, "--gen-length", "8", *options)
    start, _, begin, end, end_of_turn, _ = range(256, 262)             # as in CONTROL_TOKENS
    turn = [start, begin, *b"user", end, *b"\n\nHi", end_of_turn, begin, *b"assistant", end,
            *b"\n\n"]
    assert calls[0]["ids"] == [turn if is_chat else [*b"Hi"]]
    assert (calls[0]["gen_length"], calls[0]["block_length"], calls[0]["steps"]) == (8, 8, 8)


@pytest.mark.parametrize("gen_length, steps, block", [
    (128, 128, 32), (256, 256, 32), (100, 100, 100), (97, 97, 97), (8, 8, 8),
    (256, 64, 32), (64, 3, 64), (48, 2, 48)])
def test_the_default_block_is_taken_where_it_fits_answer_and_steps(gen_length, steps, block):
    args = argparse.Namespace(gen_length=gen_length, steps=steps)
    settings = sample.sampling_settings(args, sample.SAMPLING_DEFAULTS["llada"])
    assert settings["block_length"] == block


def test_a_blank_is_a_line_that_stands_alone_with_the_space_before_it():
    tokenizer, mask_id = tiny_tokenizer(WORDS), 302
    text = "_ add_one _, gives_ _x __ (_) _."
    pieces = [" add_one", ", gives_ _x __ (", ")", "."]
    expected = [mask_id]
    for piece in pieces:
        expected += [*tokenizer.encode(piece), mask_id]
    assert sample.infill_ids(tokenizer, text, mask_id) == expected[:-1]


def test_an_infilled_answer_is_as_long_as_usual_and_thought_about_as_a_whole(run, calls):
    """The memory knows all five digits, which needs its anchors over the whole answer."""
    text = " blue gives _, red gives _, black gives _, pink gives _.\n#### _"
    assert run("--infill", text, *THINK) == f"{PROMPT}\n{ANSWER}  (right)\n"
    tokenizer = load_tokenizer(TINY / "backbone")
    prompt = tokenizer.encode(PROMPT + "\nAnswer:")
    digits = {tokenizer.encode(f" {digit}")[0] for digit in range(10)}
    blanked = [302 if i in digits else i for i in tokenizer.encode(ANSWER)]
    assert calls[0]["ids"] == [prompt + blanked + [303, 303]]          # 18 tokens of 20
    assert (calls[0]["answer_start"], calls[0]["gen_length"]) == (len(prompt), 0)
    assert "(wrong: 0)" in run("--infill", text, "--no-memory", *THINK)
    run("--infill", text)
    assert [call["steps"] for call in calls] == [1, 1, 5]              # 5 blanks
    with pytest.raises(SystemExit, match="--infill has no blank"):
        run("--infill", "add_one")


def test_show_steps_tells_every_pass_in_80_columns_with_the_last_digit_in_view(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    prompt = "The dial shows 1. Press black, then press green, then press white, then press brown."
    lines = run(prompt, "--show-steps", "--think", "8", "--steps", "1").splitlines()[1:]
    assert lines[0] == "   change   answer, in brackets until something is written"
    bars, passes = zip(*[(line[3:11], line[:3] + line[12:]) for line in lines[1:10]])
    assert all(re.fullmatch(rf" {n} \(.*#### \d\)", line) for n, line in enumerate(passes[:8], 1))
    assert re.fullmatch(r" 9 black gives .*\. #### \d", passes[8])
    assert passes[8][-1] == lines[11][5]               # the digit of the answer below
    assert max(map(len, lines)) <= 80
    assert "█" in bars[0] and not set(bars[8]) & set("▃▄▅▆▇█")         # since the pass before
    frozen = run(prompt, "--show-steps", "--no-memory", "--steps", "2").splitlines()[1:]
    assert frozen[0] == "   answer, in brackets until something is written"
    assert re.match(r" 1 \S.*░", frozen[1]) and "█" not in "".join(frozen)


def test_a_sample_that_is_done_shows_no_passes_while_it_waits_for_others(run):
    options = ["--show-steps", "--threshold", "0.2", "--temperature", "4"]
    alone, other = run(*options), run(*options, "--seed", "1")
    assert alone.count("\n") < other.count("\n")       # the second sample takes more passes
    assert run(*options, "--num-samples", "2").startswith(alone)


def choose(*options):
    parser = argparse.ArgumentParser()
    sample.add_model_options(parser)
    name, weights, kind, chat, memory, _ = sample.choose_models(parser.parse_args(options))
    return name, weights, kind, chat, memory


def test_what_the_options_of_models_mean(run):
    """Name, weights, kind, whether it chats, and memory."""
    own, other = save_run(Path("out/s1")), save_run(Path("out/big"))
    state = torch.load(other)
    state["backbone"]["name"] = "llada"
    torch.save(state, other)
    save_llada(Path("hf/hub/models--org--x-base/snapshots/abc"))
    tiny = ("tiny", str(TINY), "tiny", True)
    s1 = ("tiny", "out/s1", "tiny", True)
    folder = ("out/s1/backbone", "out/s1/backbone", "tiny", True)
    for options, expected in [
        ("", (*tiny, TINY / "memory.pt")),
        ("--no-memory", (*tiny, None)),
        ("--init out/s1", (*s1, own)),
        ("--memory out/s1/memory.pt", (*s1, own)),
        ("--init out/s1 --no-memory", (*s1, None)),
        ("--init out/s1/backbone", (*folder, None)),
        ("--init out/s1/backbone --memory out/s1/memory.pt", (*folder, own)),
        ("--init out/s1 --memory out/s1/memory.pt", ("out/s1", "out/s1", "tiny", True, own)),
        ("--init hf/hub/models--org--x-base/snapshots/abc", (
            *["hf/hub/models--org--x-base/snapshots/abc"] * 2, "llada", False, None)),
        ("--memory out/big/memory.pt", ("llada", "llada", "llada", True, other)),
        ("--init llada-base", ("llada-base", "llada-base", "llada", False, None)),
        ("--init dream --weights out/s1/backbone", ("dream", folder[1], "tiny", True, None)),
        ("--init org/x-base", ("org/x-base", "org/x-base", "llada", False, None)),
    ]:
        assert choose(*options.split()) == expected, options
    with pytest.raises(InputError, match="there is no folder nothing; give one"):
        choose("--init", "nothing")


def test_what_was_chosen_answers_and_another_memory_only_on_request(run):
    save_run(Path("out/s1"))
    save_llada(Path("hf/hub/models--org--x-base/snapshots/abc"))
    by_folder = run("--init", "out/s1")
    assert by_folder == run("--memory", "out/s1/memory.pt") != run("--init", "out/s1/backbone")
    assert run("Hi", "--init", "org/x-base", "--gen-length", "8").startswith("Hi\n")
    another = ["--memory", str(TINY / "memory.pt"), "--init", "out/s1/backbone"]
    with pytest.raises(SystemExit, match="trained on another backbone, tiny"):
        run(*another)
    run(*another, "--any-backbone")
