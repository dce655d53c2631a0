"""The harness gets from us what eval_gsm8k.py gets: same prompts, same answers, same scores."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from processes import ONE_THREAD, run

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is "
                                   "not installed; experiments/lm_eval_model.py alone needs it")
TASK = """
task: local_dial
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<|endoftext|>"]}
filter_list:
  - name: strict
    filter: [{function: regex, regex_pattern: '#### (\\-?[0-9\\.\\,]+)'}, {function: take_first}]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    regexes_to_ignore: [",", "(?s).*#### "]
"""
LIKELIHOOD_TASK = """
task: local_likelihood
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
"""


def harness(folder: Path, task: str, *options: str) -> subprocess.CompletedProcess:
    """experiments/lm_eval_model.py, with the task file of a folder and without a network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    return subprocess.run(
        [sys.executable, ROOT / "experiments" / "lm_eval_model.py", "--tasks", task,
         "--include-path", folder, *options],
        cwd=folder, env={**os.environ, **ONE_THREAD, **offline}, text=True, timeout=300,
        capture_output=True)


def write_task(folder: Path, text: str) -> None:
    (folder / "task.yaml").write_text(text.replace("DATA", str(folder / "data.jsonl")))


@needs_harness
def test_the_harness_scores_as_we_do(tmp_path):
    """A trained model with a memory, on problems some of which have a wrong gold answer."""
    from eval_gsm8k import dial_problems
    problems = dial_problems("valid", 12)
    for problem in problems[::3]:
        problem["answer"] += "1"
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    write_task(tmp_path, TASK)
    done = harness(tmp_path, "local_dial", "--think", "4", "--steps", "1", "--out", "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["results"]["local_dial"]
    code, text = run("eval_gsm8k.py", "--data", "data.jsonl", "--think", 4, "--steps", 1,
                     "--out", "ours.jsonl", folder=tmp_path)
    assert code == 0, text
    rows = [json.loads(line) for line in (tmp_path / "ours.jsonl").read_text().split("\n") if line]
    ours = [row["correct"] for row in rows[1:]]
    assert found["exact_match,strict"] == sum(ours) / len(ours)
    assert 0 < sum(ours) < len(ours)                   # both kinds of problems are in it


@needs_harness
@pytest.mark.parametrize("task, options, expected", [
    ("no_such_task", [], "no task 'no_such_task'"),
    ("humaneval", [], "HF_ALLOW_CODE_EVAL"),
    ("mbpp", ["--confirm-run-unsafe-code"], "HF_ALLOW_CODE_EVAL"),     # and the variable is not set
    ("local_dial", [], "local_dial cannot be loaded"),                 # its data file is not there
    ("hellaswag", [], "cannot be loaded"),                             # nor is a network
])
def test_what_cannot_be_run_is_refused_in_a_sentence(task, options, expected, tmp_path,
                                                     monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    write_task(tmp_path, TASK)
    done = harness(tmp_path, task, *options)
    last = done.stderr.strip().split("\n")[-1]         # the harness itself may log before it
    assert done.returncode == 1 and last.startswith("error: ") and expected in last, done.stderr
    assert "Traceback" not in done.stderr


@needs_harness
def test_tasks_of_likelihoods_are_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"question": "1 + 1 =", "answer": "2"}\n')
    write_task(tmp_path, LIKELIHOOD_TASK)
    done = harness(tmp_path, "local_likelihood")
    assert done.returncode == 1 and "likelihoods" in done.stderr.strip().split("\n")[-1]
    assert "Traceback" not in done.stderr
