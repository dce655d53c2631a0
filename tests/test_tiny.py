"""The trained model in assets/tiny thinks without writing, and nothing without a memory can."""
import eval_gsm8k
from eval_gsm8k import thinking_table
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
