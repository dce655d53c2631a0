"""The page of what a memory does shows the passes as they were, and no text breaks out of it."""
import json
import re
import sys

import pytest
import torch

from conftest import ROOT
from diffusion import generate
from folders import save_llada, save_run
from metastate import MemoryConfig, MetaState, load_memory, save_checkpoint
from model import load_backbone, load_tokenizer, tiny_tokenizer
from sample import EXAMPLES, dial_answer, dial_problems, prompt_ids

sys.path.insert(0, str(ROOT / "experiments"))
import page  # noqa: E402

ATTACK = "</script><script>alert(1)</script><!-- \u2028 <b>"
TEMPLATE = (ROOT / "assets" / "page.html").read_text("utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a random tiny run."""
    return save_run(tmp_path_factory.mktemp("run")).parent


@pytest.fixture
def write(run, tmp_path, monkeypatch):
    """Write the page with these options; its text, and the content that stands in it."""
    def write(*options, init=run):
        path = tmp_path / "page.html"
        argv = ["page.py", path, "--init", init, "--device", "cpu", *options]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        monkeypatch.setattr(page, "N_PROBLEMS", 3)
        page.main()
        text = path.read_text("utf-8")
        before, _ = TEMPLATE.split('"CONTENT"')
        return text, json.JSONDecoder().raw_decode(text[len(before):])[0]
    return write


def texts(content: dict, one: dict) -> list[str]:
    return [content["words"][number] for number in one["guess"]]


def test_the_template_has_one_place_for_the_content_and_nothing_from_elsewhere():
    assert TEMPLATE.count('"CONTENT"') == 1
    assert TEMPLATE.count("<script") == TEMPLATE.count("</script") == 1
    assert not re.search(r"https?:|//\w+\.|@import|url\(|innerHTML|document\.write", TEMPLATE)


def test_a_prompt_of_ones_own_is_alone_unmarked_and_stays_text(write):
    text, content = write("--prompt", ATTACK, "--steps", 2)
    assert text.count("<script") == text.count("</script") == 1 and "<!-- \u2028" not in text
    (problem,) = content["problems"]
    assert problem["prompt"] == ATTACK and problem["right"] is None


def test_a_dial_problem_comes_with_validation_problems_and_right_answers(write):
    _, content = write()
    questions = [one["question"] for one in dial_problems("valid", 3)]
    assert [one["prompt"] for one in content["problems"]] == [EXAMPLES["tiny"], *questions]
    for one in content["problems"]:
        assert "".join(one["right"]) == dial_answer(one["prompt"])
        assert [each["state"] for each in one["with"]] == 4 * ["0" * 20] + ["1" * 20]


def test_every_pass_is_recorded_as_the_sampler_made_it(write, run):
    _, content = write("--think", 3, "--steps", 4, "--temperature", 0.5, "--seed", 7)
    for words in ("tiny", "seed 7", "think 3", "steps 4"):
        assert words in content["about"]
    backbone, tokenizer = load_backbone(run / "backbone"), load_tokenizer(run / "backbone")
    memory = load_memory(run / "memory.pt", backbone)
    for problem in content["problems"]:
        prompt = torch.tensor([prompt_ids(tokenizer, problem["prompt"], chat=True)])
        for kind, its_memory in {"without": None, "with": memory}.items():
            reports = []
            generate(backbone, prompt, memory=its_memory, gen_length=20, think=3, steps=4,
                     temperature=0.5, seeds=[7], on_step=lambda _, report: reports.append(report))
            guesses = [one.guess[0, prompt.shape[1]:].tolist() for one in reports]
            expected = [page.token_texts(tokenizer, guess, 302) for guess in guesses]
            assert [texts(content, one) for one in problem[kind]] == expected
            states = [one["state"] for one in problem[kind]]
            assert [state.count("1") for state in states] == [0] * 3 + [5] * 4     # written now
            assert [state.count("2") for state in states] == [0] * 4 + [5, 10, 15]     # and before
        assert all(one["change"] == [] for one in problem["without"])
        slots = [memory.initial(1), *(one.slots for one in reports)]
        for before, after, one in zip(slots, slots[1:], problem["with"]):
            change = [(torch.dist(a, b) / b.norm()).item() for a, b in zip(after[0], before[0])]
            assert one["change"] == pytest.approx(change, abs=0.006)


def test_a_page_too_large_has_fewer_problems(write, monkeypatch):
    text, content = write()
    monkeypatch.setattr(page, "MAX_BYTES", len(text.encode()) - 1)
    assert write()[1]["problems"] == content["problems"][:3]


def test_a_page_of_another_model_shows_what_a_pass_has_not_looked_at(write, tmp_path):
    save_llada(tmp_path / "run" / "backbone")
    memory = MetaState(MemoryConfig(16, n_slots=5, d_slot=8, n_head=2, d_time=8))
    save_checkpoint(tmp_path / "run" / "memory.pt", memory,
                    backbone={"name": str(tmp_path / "run" / "backbone"), "digest": "another"})
    _, content = write("--gen-length", 16, "--block-length", 8, "--steps", 4, "--any-backbone",
                       init=tmp_path / "run")
    (problem,) = content["problems"]
    assert texts(content, problem["without"][1])[8:] == 8 * ["\u2591"]     # the second block
    assert "\u2591" not in texts(content, problem["without"][-1])


def test_a_character_of_several_tokens_stands_at_the_last_and_control_tokens_have_no_text(tmp_path):
    tokenizer = tiny_tokenizer([])                     # nothing but bytes
    found = page.token_texts(tokenizer, tokenizer.encode("\u00fc \U0001f600!"), 302)
    assert found == ["", "\u00fc", " ", "", "", "", "\U0001f600", "!"]
    save_llada(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("<|startoftext|>a<|mdm_mask|>\n<|eot_id|>")
    assert page.token_texts(tokenizer, ids, 261) == ["", "a", "\u2591", "\n", ""]
