"""The trained model in assets/tiny thinks without writing, and nothing without a memory can."""
import pytest
import torch

import eval_gsm8k
from diffusion import generate
from eval_gsm8k import PROTOCOLS, problem_ids, thinking_table
from metastate import load_memory
from model import load_backbone, load_tokenizer
from sample import ASSETS, dial_problems

BACKBONE = load_backbone(ASSETS / "tiny" / "backbone")
TOKENIZER = load_tokenizer(ASSETS / "tiny" / "backbone")
MEMORY = load_memory(ASSETS / "tiny" / "memory.pt", BACKBONE)
PROBLEMS = dial_problems("valid", 100)
PASSES = (1, 2, 5, 7)


def test_the_memory_works_out_the_whole_answer_in_five_passes_and_no_control_does(monkeypatch):
    """The table of train.py: its numbers, and the results behind them, problem by problem."""
    monkeypatch.setattr(eval_gsm8k, "THINKING_PASSES", PASSES)
    text, results = thinking_table(BACKBONE, TOKENIZER, PROBLEMS, MEMORY)
    assert list(results) == ["frozen", "memory reset", "memory shuffled", "MetaState"]
    one, two, five, seven = [sum(results["MetaState"][n]) for n in PASSES]
    assert max(one, two) < 15 and min(five, seven) >= 98         # a look-up a pass, no sooner
    for name in ("frozen", "memory reset"):
        assert all(results[name][n] == results[name][1] for n in PASSES)
        assert sum(results[name][1]) < 5
    assert max(sum(results["memory shuffled"][n]) for n in PASSES) < 5
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert rows[0] == ["", "N = 1", "N = 2", "N = 5", "N = 7"]
    assert rows[-1] == ["MetaState", *(f"{n:.1f}" for n in (one, two, five, seven))]     # of 100


@pytest.mark.parametrize("settings", [dict(steps=5), dict(think=4, steps=1)], ids=str)
def test_the_memory_knows_an_answer_that_is_written_but_for_its_digits(settings):
    """Its anchors and its time are those of the whole answer, not of the blanks alone."""
    c = BACKBONE.config
    prompts = [problem_ids(TOKENIZER, PROTOCOLS["dial"], p, ()) for p in PROBLEMS]
    answers = [TOKENIZER.encode(p["answer"]) + [c.eos_id, c.eos_id] for p in PROBLEMS]
    digits = {TOKENIZER.encode(f" {digit}")[0] for digit in range(10)}
    blanked = [[c.mask_id if i in digits else i for i in answer] for answer in answers]
    assert all(blank.count(c.mask_id) == 5 for blank in blanked)
    ids = torch.tensor([prompt + blank for prompt, blank in zip(prompts, blanked)])
    n_prompt = len(prompts[0])
    out = generate(BACKBONE, ids, memory=MEMORY, answer_start=n_prompt, gen_length=0, **settings)
    right = sum(row == answer for row, answer in zip(out[:, n_prompt:].tolist(), answers))
    assert right > 90
