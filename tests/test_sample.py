"""sample.py in the hands of a person: answers, steps, blanks, a page, and sentences for mistakes."""
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
    lines = [x for x in out.splitlines() if re.match(r" +\d+ \|", x)]
    assert len(lines) == 6 and all(len(x.split("|")[1]) == 16 for x in lines)
    assert max(map(len, out.split("written, only thought\n")[1].splitlines())) <= 80
    assert [x.split("|")[2].startswith(" (") for x in lines] == [True] * 2 + [False] * 4


def test_infill_keeps_what_is_given(run, trained):
    out = run("--infill", " red gives_, blue gives_.", "--steps", "2")
    assert re.search(r" red gives.*, blue gives.*\.\n", out, re.S)
    with pytest.raises(SystemExit, match="--infill has no blank"):
        run("--infill", "no blank")


def test_a_run_is_opened_by_its_folder_or_by_its_memory(run, trained):
    assert run("--init", "out/tiny") == run("--memory", "out/tiny/memory.pt") == run()


@pytest.mark.parametrize("gen_length, steps", [(8, 8), (100, 100), (97, 97), (256, 64), (33, 1)])
def test_the_default_block_fits_any_length(gen_length, steps):
    block = sample.fitting_block(gen_length, steps, at_most=32)
    assert gen_length % block == 0 and steps % (gen_length // block) == 0
    sample.Sampling(gen_length=gen_length, steps=steps, block_length=block)


@pytest.mark.parametrize("text, answer, right", [
    ("so #### 8", "8", True), ("8 or 9", "8", False), ("1,800.", "1800", True), ("", "8", False),
    ("x", None, None)])
def test_right_is_the_last_number(text, answer, right):
    assert sample.is_right(text, answer) is right
