"""sample.py in the hands of a person: answers, steps, blanks, a page, and sentences for mistakes."""
import re
import sys
from dataclasses import asdict
from html import escape

import pytest
import torch

import sample
from metastate import MetaState, preset, save_checkpoint
from model import TINY, Backbone, run_program, save_backbone


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", *args])
        run_program(sample.main)
        return capsys.readouterr().out
    return run


@pytest.fixture
def trained(tmp_path):
    torch.manual_seed(0)
    backbone = Backbone(TINY)
    memory = MetaState(preset(backbone))
    torch.nn.init.normal_(memory.injector.out.weight)
    save_backbone(backbone, tmp_path / "out" / "tiny" / "backbone")
    save_checkpoint(tmp_path / "out" / "tiny" / "memory.pt", memory, config=asdict(memory.config),
                    backbone="tiny")


def test_without_a_checkpoint_it_says_what_makes_one(run):
    with pytest.raises(SystemExit, match="^error: .*python train.py$"):
        run()


def test_answers(run, trained):
    out = run()
    assert out.startswith("The dial shows ") and out == run()
    assert run("--no-memory") != out
    two = run("--prompt", "x", "--num-samples", "2", "--temperature", "1", "--seed", "3")
    assert two != run("--prompt", "x", "--num-samples", "2", "--temperature", "1", "--seed", "4")


def test_show_steps_tells_every_step_and_the_change_of_every_slot(run, trained):
    lines = [x for x in run("--show-steps", "--steps", "4").splitlines() if re.match(r" +\d+ \|", x)]
    assert len(lines) == 4 and all(len(x.split("|")[1]) == 16 for x in lines)
    assert [x.count("\u2591") for x in lines] == [15, 10, 5, 0]


def test_infill_keeps_what_is_given(run, trained):
    out = run("--infill", " red gives _, blue gives _.", "--steps", "2")
    assert re.fullmatch(r" red gives.*, blue gives.*\.\n", out, re.S)
    with pytest.raises(SystemExit, match="--infill has no blank"):
        run("--infill", "no blank")


def test_the_page_stands_alone_and_its_text_is_escaped(run, trained, tmp_path):
    attack = "</script><script>alert(1)</script>"
    run("--prompt", attack, "--html", "page.html", "--steps", "5")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count("<script") == 1 and page.count("</script") == 1 and "http" not in page
    with_memory, without = page.split("<section>")[1:]
    for section in (with_memory, without):             # every token says when it was revealed
        steps = [int(k) for k in re.findall('<span data-k="(.*?)"', section)]
        assert sorted(steps) == sorted([1, 2, 3, 4, 5] * 4) and escape(attack) in section
    cells = re.findall('<rect data-k="(.*?)"', with_memory)    # change and gate of every slot
    assert len(cells) == 2 * 5 * 16 and set(cells) == set("12345") and "<rect" not in without
