"""sample.py in the hands of a person: models, answers, steps, blanks, sentences for mistakes."""
import argparse
import os
import re
import sys

import pytest
import torch

import sample
from folders import save_run


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", *args])
        sample.run_program(sample.main, "")
        return capsys.readouterr().out
    return run


@pytest.fixture
def trained(tmp_path):
    return save_run(tmp_path / "out" / "tiny")


def test_without_a_run_the_model_of_the_repository_answers(run):
    assert run("--think", "4", "--steps", "1").endswith("#### 0\n")


def test_answers(run, trained):
    out = run()
    assert out.startswith("The dial shows ") and out == run()
    assert run("--no-memory") != out
    two = run("--prompt", "x", "--num-samples", "2", "--temperature", "1", "--seed", "3")
    assert two != run("--prompt", "x", "--num-samples", "2", "--temperature", "1", "--seed", "4")


def test_show_steps_tells_every_pass_and_the_change_of_every_slot(run, trained, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = run("--show-steps", "--steps", "4", "--think", "2")
    assert max(map(len, out.split("\n", 1)[1].splitlines())) <= 80     # all but the prompt
    passes = [line.split("|") for line in out.splitlines() if re.match(r" +\d+ \|", line)]
    assert [int(number) for number, _, _ in passes] == [1, 2, 3, 4, 5, 6]
    assert all(len(bars) == 16 for _, bars, _ in passes)
    assert [answer.startswith(" (") for _, _, answer in passes] == [True] * 2 + [False] * 4


def test_a_sample_that_is_done_shows_no_passes_while_it_waits_for_others(run, trained):
    options = ["--show-steps", "--threshold", "0.01", "--temperature", "5"]
    alone = run(*options)
    together = run(*options, "--num-samples", "3")
    assert together.startswith(alone)


def test_infill_thinks_about_the_whole_answer(run):
    """The trained memory knows all five digits, which needs its anchors over the whole answer."""
    text = " blue gives_, red gives_, black gives_, pink gives_.\n####_"
    right = " blue gives 7, red gives 4, black gives 5, pink gives 0.\n#### 0\n"
    assert run("--infill", text, "--think", "4", "--steps", "1").endswith(right)
    assert not run("--infill", text, "--think", "4", "--steps", "1", "--no-memory").endswith(right)


def test_infill_keeps_what_is_given(run, trained):
    out = run("--infill", " red gives_, blue gives_.", "--steps", "2")
    assert re.search(r" red gives.*, blue gives.*\.\n", out, re.S)
    with pytest.raises(SystemExit, match="--infill has no blank"):
        run("--infill", "no blank")


def choose(*options):
    parser = argparse.ArgumentParser()
    sample.add_model_options(parser)
    return sample.choose_models(parser.parse_args(options))


def trained_on(name, path):
    """Change the name of the backbone that a memory was trained on."""
    state = torch.load(path, weights_only=True)
    state["backbone"]["name"] = name
    torch.save(state, path)


def test_the_newest_run_is_taken_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert choose().memory == sample.ASSETS / "tiny" / "memory.pt"
    for name, time in (("older", 1000), ("newest", 3000), ("old", 2000)):
        path = save_run(tmp_path / "out" / name)
        os.utime(path, (time, time))
    capsys.readouterr()
    for options in ([], ["--init", "tiny"]):
        assert choose(*options).memory.parent.name == "newest"
        assert capsys.readouterr().err == "model: out/newest\n"


def test_what_the_options_of_models_mean(run, trained, tmp_path):
    folder = tmp_path / "out" / "tiny"
    whole_run = sample.Choice("tiny", folder / "backbone", trained)
    assert choose("--memory", str(trained)) == choose("--init", str(folder)) == whole_run
    assert choose("--memory", str(trained), "--init", "tiny") == whole_run
    assert choose("--init", str(folder), "--no-memory") == whole_run._replace(memory=None)
    backbone = str(folder / "backbone")
    assert choose("--init", backbone) == sample.Choice(backbone, backbone, None)
    other = choose("--memory", str(trained), "--init", backbone)
    assert other == sample.Choice(backbone, backbone, trained)
    assert choose("--init", "llada") == sample.Choice("llada", "llada", None)
    weights = choose("--init", "llada", "--weights", backbone)
    assert weights == sample.Choice("llada", folder / "backbone", None)


def test_a_memory_of_a_preset_opens_the_preset_and_no_tiny_backbone(run, trained):
    trained_on("llada", trained)
    assert choose("--memory", str(trained)) == sample.Choice("llada", "llada", trained)
    with pytest.raises(sample.InputError, match="trained on llada.*give --init llada"):
        choose("--init", "tiny")


def test_a_run_is_opened_by_its_folder_or_by_its_memory(run, trained):
    assert run("--init", "out/tiny") == run("--memory", "out/tiny/memory.pt") == run()


@pytest.mark.parametrize("gen_length, steps", [(8, 8), (100, 100), (97, 97), (256, 64), (33, 1)])
def test_the_default_block_fits_any_length(gen_length, steps):
    block = sample.fitting_block(gen_length, steps, at_most=32)
    assert gen_length % block == 0 and steps % (gen_length // block) == 0
    sample.Sampling(gen_length=gen_length, steps=steps, block_length=block)


@pytest.mark.parametrize("text, answer, right", [
    ("so #### 8", "8", True), ("8 or 9", "8", False), ("1,800.", "1800", True), ("", "8", False),
    ("18.00", "18", True), ("18", "$18", True), ("-$18", "-18", True), ("18", "-18", False)])
def test_right_is_the_last_number(text, answer, right):
    assert sample.is_right(text, answer) is right


def test_a_closed_output_is_told_in_a_sentence(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit, match="closed"):
        sample.run_program(sample.main, "")


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, None], ids=str)
def test_too_little_memory_is_told_in_a_sentence(error):
    def main():
        if error:
            raise error("nothing is left")
        torch.empty(10 ** 16)

    with pytest.raises(SystemExit, match="memory of this machine"):
        sample.run_program(main, "")


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, RecursionError])
def test_a_mistake_of_our_own_is_not_hidden(error):
    def main():
        raise error("of our own")

    with pytest.raises(error, match="of our own"):
        sample.run_program(main, "")
