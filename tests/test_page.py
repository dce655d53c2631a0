"""The page of a sample: what is recorded of each pass, and that no text can break out of it."""
import json
import re
import sys

import pytest
import torch

from conftest import ROOT
from diffusion import Report
from folders import save_llada, save_run
from model import TINY, Backbone, load_tokenizer, tiny_tokenizer
from sample import Models

sys.path.insert(0, str(ROOT / "experiments"))
import page  # noqa: E402

ATTACK = "</script><script>alert(1)</script><!-- \u2028 <b>"
TEMPLATE = (ROOT / "assets" / "page.html").read_text("utf-8")


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write the page of a random tiny run with these options; its text, and what it shows."""
    save_run(tmp_path / "tiny")

    def write(*options):
        path = tmp_path / "page.html"
        argv = ["page.py", path, "--init", tmp_path / "tiny", "--device", "cpu", *options]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        page.main()
        text = path.read_text("utf-8")
        return text, content_of(text)
    return write


def content_of(text: str) -> dict:
    """What stands where the template has its placeholder."""
    before, _ = TEMPLATE.split('"CONTENT"')
    return json.JSONDecoder().raw_decode(text[len(before):])[0]


def test_the_template_has_one_place_for_the_content_and_nothing_from_elsewhere():
    assert TEMPLATE.count("CONTENT") == TEMPLATE.count('"CONTENT"') == 1
    assert TEMPLATE.count("<script") == TEMPLATE.count("</script") == 1
    assert not re.search(r"https?:|//\w+\.|@import|url\(|innerHTML|document\.write", TEMPLATE)


def test_a_hostile_prompt_stays_text(write):
    text, content = write("--prompt", ATTACK, "--steps", 2)
    assert text.count("<script") == text.count("</script") == 1 and "<!-- \u2028" not in text
    assert content["prompt"] == ATTACK
    assert content["answer"] is None                   # none is known for a prompt of one's own
    assert [run["right"] for run in content["runs"]] == [None, None]


def test_every_pass_of_both_runs_is_recorded(write):
    _, content = write("--think", 3, "--steps", 4)
    assert [run["name"] for run in content["runs"]] == ["with memory", "without memory"]
    assert content["think"] == 3 and content["answer"] == "0"
    for run in content["runs"]:
        for one in run["passes"]:
            assert len(one["texts"]) == 20
            guessed = [masked or revealed
                       for masked, revealed in zip(one["masked"], one["revealed"])]
            assert [strength > 0 for strength in one["strength"]] == guessed
        # three passes think and write nothing, four write
        assert [sum(one["revealed"]) for one in run["passes"]] == [0] * 3 + [5] * 4
        assert [sum(one["masked"]) for one in run["passes"]] == [20] * 3 + [15, 10, 5, 0]
    with_memory, without = [run["passes"] for run in content["runs"]]
    assert with_memory[0]["texts"] != with_memory[2]["texts"]
    assert all(len(one["change"]) == 16 and max(one["change"]) > 0 for one in with_memory)
    assert without[0] == without[2]                    # it repeats its first guess
    assert all(one["change"] == [] for one in without)


def judged(tokenizer, ids: list[int], answer: str | None):
    """What a Recorder says of a pass that would write these ids."""
    row = torch.tensor([ids])
    recorder = page.Recorder(Models(Backbone(TINY), tokenizer, None, {}), None, 0, answer, "random")
    recorder.on_step(row, Report(row > -1, row > -1, row, row * 0.0, None))
    return recorder.passes[0]["right"]


@pytest.mark.parametrize("end, right", [("", True), ("<|endoftext|> 7", True), (" 7", False)])
def test_a_pass_is_right_when_its_guess_ends_in_the_right_number(end, right):
    """What stands after the end of the answer does not count."""
    tokenizer = tiny_tokenizer([])
    ids = tokenizer.encode("1,234 and 18" + end)
    assert judged(tokenizer, ids, "18.00") is right
    assert judged(tokenizer, ids, None) is None


def test_what_the_entropy_is_sure_of_is_drawn_strongly(write):
    """Certainty is an entropy of 0, and so is what is not looked at."""
    _, content = write("--steps", 2, "--remasking", "entropy", "--top-k", 1)
    first, last = content["runs"][0]["passes"]
    assert first["strength"] == [1.0] * 20
    assert last["strength"] == [0.0 if one else 1.0 for one in first["revealed"]]


def test_the_page_says_how_it_was_made(write):
    _, content = write("--seed", 7, "--think", 1, "--temperature", 0.5)
    for words in ("tiny", "seed 7", "think 1", "steps 5", "temperature 0.5"):
        assert words in content["about"]


def test_a_character_of_several_tokens_stands_at_the_last_one():
    tokenizer = tiny_tokenizer([])                     # nothing but bytes
    ids = tokenizer.encode("\u00fc \U0001f600!")
    assert page.token_texts(tokenizer, ids) == ["", "\u00fc", " ", "", "", "", "\U0001f600", "!"]
    broken = tokenizer.encode("\U0001f600")[:2] + tokenizer.encode("a")
    assert page.token_texts(tokenizer, broken) == ["", "", "\ufffda"]


def test_control_tokens_have_no_text(tmp_path):
    save_llada(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("<|startoftext|>a<|mdm_mask|>\n<|eot_id|>")
    assert page.token_texts(tokenizer, ids) == ["", "a", "", "\n", ""]
