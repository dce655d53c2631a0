"""The trained model in assets/tiny thinks without writing, and nothing without a memory can."""
import pytest
import torch

import eval_gsm8k
from conftest import ROOT
from diffusion import generate
from eval_gsm8k import PROTOCOLS, Bench, contestants, dial_problems, prompt_ids, thinking_table
from metastate import load_memory
from model import load_backbone, load_tokenizer

FOLDER = ROOT / "assets" / "tiny"
N_PROBLEMS = 200
PASSES = (1, 2, 3, 5, 10)


@pytest.fixture(scope="module")
def bench():
    return Bench(load_backbone(FOLDER / "backbone"), load_tokenizer(FOLDER / "backbone"),
                 dial_problems("valid", N_PROBLEMS), gen_length=20)


@pytest.fixture(scope="module")
def memory(bench):
    return load_memory(FOLDER / "memory.pt", bench.backbone)


@pytest.fixture(scope="module")
def table(bench, memory):
    """The first table of train.py, results by row, passes and problem. The trained memory stands in
    for the memoryless one as well: a row that keeps it although it should not is seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_gsm8k, "THINKING_PASSES", PASSES)
        return thinking_table(bench, contestants(memory, memory))[1]


def n_right(table, row, key):
    return [sum(table[row][n][key]) for n in PASSES]


def test_the_memory_works_out_the_whole_answer_in_five_passes(table):
    one, two, _, five, ten = n_right(table, "MetaState", "whole")
    assert one < 0.15 * N_PROBLEMS and two < 0.15 * N_PROBLEMS     # a look-up a pass, no sooner
    assert five >= 0.98 * N_PROBLEMS and ten >= 0.98 * N_PROBLEMS


@pytest.mark.parametrize("row", ["frozen", "memory reset", "memoryless-trained"])
def test_without_a_memory_every_pass_gives_the_first_answer(row, table):
    results = [table[row][n]["result"] for n in PASSES]
    assert all(len(result) == N_PROBLEMS for result in results)
    assert all(result == results[0] for result in results)         # problem by problem
    assert 0 < sum(results[0]) < 0.15 * N_PROBLEMS                 # by chance, one digit of ten


def test_the_memory_of_another_sample_is_of_no_use(table):
    assert max(n_right(table, "memory shuffled", "result")) < 0.25 * N_PROBLEMS
    assert max(n_right(table, "memory shuffled", "whole")) < 0.02 * N_PROBLEMS


@pytest.mark.parametrize("settings", [dict(steps=5), dict(think=4, steps=1)], ids=str)
def test_the_memory_knows_an_answer_that_is_written_but_for_its_digits(settings, bench, memory):
    """Its anchors and its time are those of the whole answer, not of the blanks alone."""
    tokenizer, mask_id = bench.tokenizer, bench.backbone.config.mask_id
    prompts = [prompt_ids(tokenizer, PROTOCOLS["dial"], p, []) for p in bench.problems]
    answers = [tokenizer.encode(p["answer"]) for p in bench.problems]
    digits = {tokenizer.encode(f" {digit}")[0] for digit in range(10)}
    end = [bench.backbone.config.eos_id]
    answers = [answer + end * (20 - len(answer)) for answer in answers]
    blanked = [[mask_id if i in digits else i for i in answer] for answer in answers]
    ids = torch.tensor([[*prompt, *blank] for prompt, blank in zip(prompts, blanked)])
    n_prompt = len(prompts[0])
    out = generate(bench.backbone, ids, memory=memory, answer_start=n_prompt, gen_length=0,
                   **settings)
    right = sum(row == answer for row, answer in zip(out[:, n_prompt:].tolist(), answers))
    assert all(blank.count(mask_id) == 5 for blank in blanked)
    assert right > 0.9 * N_PROBLEMS
