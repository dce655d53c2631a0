"""The harness gets from us what eval_gsm8k.py gets: same prompts, same answers, same scores."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from folders import save_llada
from processes import ONE_THREAD
from sample import dial_problems

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed; experiments/lm_eval_model.py alone needs it")
TASK = """
task: local_dial
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: OUTPUT
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
"""
GENERATES = TASK.replace("OUTPUT", "generate_until") + """
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
LIKELIHOODS = TASK.replace("OUTPUT", "loglikelihood") + "metric_list: [{metric: acc}]\n"


def harness(program: str, folder: Path, *options: str) -> subprocess.CompletedProcess:
    """A program in a folder, without a network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    return subprocess.run([sys.executable, ROOT / program, *options], cwd=folder, text=True,
                          env={**os.environ, **ONE_THREAD, **offline}, timeout=300,
                          capture_output=True)


def run_task(folder: Path, task: str, text: str, *options: str) -> subprocess.CompletedProcess:
    (folder / "task.yaml").write_text(text.replace("DATA", str(folder / "data.jsonl")))
    return harness("experiments/lm_eval_model.py", folder, "--tasks", task, "--include-path",
                   str(folder), *options)


def test_the_harness_scores_as_we_do(tmp_path):
    """A trained model with a memory, on problems some of which have a wrong gold answer."""
    problems = dial_problems("valid", 12)
    for problem in problems[::3]:
        problem["answer"] += "1"
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, problems)))
    options = ["--think", "4", "--steps", "1", "--out"]
    done = run_task(tmp_path, "local_dial", GENERATES, *options, "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["results"]["local_dial"]
    done = harness("eval_gsm8k.py", tmp_path, "--data", "data.jsonl", *options, "ours.jsonl")
    assert done.returncode == 0 and "8 of 12 correct" in done.stdout, done.stderr
    assert found["exact_match,strict"] == 8 / 12


def test_the_papers_protocol_gives_its_settings_and_the_harness_the_rest(tmp_path):
    save_llada(tmp_path / "x-base")
    (tmp_path / "data.jsonl").write_text('{"question": "1 + 1 =", "answer": "#### 2"}\n')
    done = run_task(tmp_path, "local_dial", GENERATES, "--init", "x-base", "--protocol", "paper",
                    "--gen-length", "64", "--out", "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["protocol"], found["chat"]) == ("paper", False)
    assert found["settings"] == {"gen_length": 64, "block_length": 32, "cache": True,
                                 "threshold": 0.9, "steps": 64}


@pytest.mark.parametrize("task, text, options, expected", [
    ("no_such_task", GENERATES, [], "no task 'no_such_task'"),
    ("humaneval", GENERATES, [], "HF_ALLOW_CODE_EVAL"),
    ("mbpp", GENERATES, ["--confirm-run-unsafe-code"], "HF_ALLOW_CODE_EVAL"),      # it is not set
    ("local_dial", GENERATES, [], "local_dial cannot be used"),        # its data file is not there
    ("local_dial", LIKELIHOODS, ["data"], "asks for likelihoods")])
def test_what_cannot_be_run_is_refused_in_a_sentence(task, text, options, expected, tmp_path,
                                                     monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    if options == ["data"]:
        (tmp_path / "data.jsonl").write_text('{"question": "1 + 1 =", "answer": "2"}\n')
        options = []
    done = run_task(tmp_path, task, text, *options)
    last = done.stderr.strip().split("\n")[-1]         # the harness itself may log before it
    assert done.returncode == 1 and last.startswith("error: ") and expected in last, done.stderr
