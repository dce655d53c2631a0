"""The page of a sample: what is recorded, and that no text can break out of it."""
import json
import re
import sys

import pytest

import sample
from folders import save_llada, save_run
from model import load_tokenizer, tiny_tokenizer

ATTACK = "</script><script>alert(1)</script><!-- \u2028 <b>"
TEMPLATE = (sample.ASSETS / "page.html").read_text("utf-8")


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Run sample.py with the options; the page and the content that was written into it."""
    monkeypatch.chdir(tmp_path)

    def write(*options):
        options = ["--device", "cpu", "--html", "page.html", *options]
        monkeypatch.setattr(sys, "argv", ["sample.py", *options])
        sample.main()
        page = (tmp_path / "page.html").read_text("utf-8")
        return page, content_of(page)
    return write


@pytest.fixture
def run(tmp_path):
    """The folder of a tiny run."""
    save_run(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def content_of(page: str) -> dict:
    """What stands where the template has its placeholder."""
    before, _ = TEMPLATE.split('"CONTENT"')
    return json.JSONDecoder().raw_decode(page[len(before):])[0]


# -------------------------------------------------------------------------------- the template

def test_the_template_has_one_place_for_the_content_and_nothing_from_elsewhere():
    assert TEMPLATE.count('"CONTENT"') == 1 and TEMPLATE.count("CONTENT") == 1
    assert TEMPLATE.count("<script") == TEMPLATE.count("</script") == 1
    assert not re.search(r"https?:|//\w+\.|@import|url\(|innerHTML|document\.write", TEMPLATE)


def test_no_text_ends_the_script(tmp_path):
    content = {"prompt": ATTACK, "answer": '"CONTENT"', "about": "<SCRIPT>", "runs": []}
    sample.write_page(tmp_path / "page.html", content)
    page = (tmp_path / "page.html").read_text("utf-8")
    assert content_of(page) == content
    assert page.lower().count("<script") == page.lower().count("</script") == 1
    assert "<!-- \u2028" not in page


def test_a_hostile_prompt_stays_text(write, run):
    page, content = write("--init", run, "--prompt", ATTACK, "--steps", "2")
    assert "</script><script>" not in page and page.count("<script") == 1
    assert content["prompt"] == ATTACK
    assert content["answer"] is None                   # none is known for a prompt of one's own
    assert [found["right"] for found in content["runs"]] == [None, None]


# ---------------------------------------------------------------------------- what is recorded

def test_every_pass_of_both_runs_is_recorded_with_its_guesses(write, run):
    _, content = write("--init", run, "--think", "3", "--steps", "4")
    assert [found["name"] for found in content["runs"]] == ["with memory", "without memory"]
    assert content["think"] == 3
    for found in content["runs"]:
        passes = found["passes"]
        assert len(passes) == 3 + 4
        for one in passes:
            assert len(one["texts"]) == len(one["masked"]) == 20
            guessed = [masked or revealed for masked, revealed
                       in zip(one["masked"], one["revealed"])]
            assert [strength > 0 for strength in one["strength"]] == guessed
            assert max(one["strength"]) <= 1
        for one in passes[:3]:                         # thinking: guesses, and nothing is written
            assert all(one["masked"]) and not any(one["revealed"])
            assert any(one["texts"])
        assert [sum(one["revealed"]) for one in passes[3:]] == [5] * 4
        assert not any(passes[-1]["masked"])
        assert found["right"] == passes[-1]["right"]
    with_memory, without = content["runs"]
    assert all(len(one["change"]) == 16 for one in with_memory["passes"])
    assert with_memory["passes"][0]["texts"] != with_memory["passes"][2]["texts"]
    assert all(one["change"] == [] for one in without["passes"])
    assert without["passes"][0] == without["passes"][2]        # it repeats its first guess


def test_a_pass_is_right_when_its_guesses_are(write, run):
    _, content = write("--init", run, "--think", "2", "--steps", "5")
    for one in content["runs"][0]["passes"]:
        assert one["right"] is sample.is_right("".join(one["texts"]), content["answer"])
    _, content = write("--init", run, "--prompt", "x", "--answer", "1,234")
    assert content["answer"] == "1,234" and content["runs"][0]["right"] is False


def test_a_token_written_keeps_its_text(write, run):
    _, content = write("--init", run, "--steps", "20")
    for found in content["runs"]:
        last = found["passes"][-1]["texts"]
        for one in found["passes"]:
            stays = [not masked for masked in one["masked"]]
            # bytes that form no character together may be shown at either one
            kept = [one["texts"][i] == last[i] or "\ufffd" in one["texts"][i] + last[i]
                    for i in range(20) if stays[i]]
            assert all(kept)


def test_what_was_given_is_neither_masked_nor_revealed(write, run):
    _, content = write("--init", run, "--infill", " red gives_.", "--steps", "1")
    first = content["runs"][0]["passes"][0]
    assert first["texts"][0] == " red" and first["texts"][3] == "."
    assert first["texts"][4:] == [""] * 16             # end-of-text, as in training
    assert first["revealed"] == [i == 2 for i in range(20)] and not any(first["masked"])


def test_what_the_entropy_is_sure_of_is_drawn_strongly(write, run):
    """Certainty is an entropy of 0, and so is what is not looked at."""
    _, content = write("--init", run, "--steps", "2", "--remasking", "entropy", "--top-k", "1")
    first, last = content["runs"][0]["passes"]
    assert first["strength"] == [1.0] * 20
    assert sorted(set(last["strength"])) == [0.0, 1.0]


def test_in_a_later_block_there_is_no_guess_yet(write, run):
    _, content = write("--init", run, "--block-length", "10", "--steps", "4")
    first = content["runs"][0]["passes"][0]
    assert first["texts"][10:] == [""] * 10 and first["strength"][10:] == [0] * 10
    assert all(first["masked"][10:])


def test_one_line_says_how_it_was_made(write, run):
    _, content = write("--init", run, "--seed", "7", "--think", "1", "--temperature", "0.5")
    for words in ("tiny", "seed 7", "think 1", "steps 5", "remasking low_confidence",
                  "temperature 0.5"):
        assert words in content["about"]
    assert "{" not in content["about"]


# ----------------------------------------------------------------------------- texts of tokens

def test_a_character_of_several_tokens_stands_at_the_last():
    tokenizer = tiny_tokenizer([])                     # nothing but bytes
    text = "\u00fc \U0001f600!"
    found = sample.token_texts(tokenizer, tokenizer.encode(text))
    assert found == ["", "\u00fc", " ", "", "", "", "\U0001f600", "!"]
    broken = tokenizer.encode("\U0001f600")[:2] + tokenizer.encode("a")
    assert sample.token_texts(tokenizer, broken) == ["", "", "\ufffda"]


def test_control_tokens_have_no_text(tmp_path):
    save_llada(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("<|startoftext|>a<|mdm_mask|>\n<|eot_id|>")
    assert sample.token_texts(tokenizer, ids) == ["", "a", "", "\n", ""]
