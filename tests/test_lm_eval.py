"""The harness gets from us what eval_gsm8k.py gets: same prompts, same answers, same scores."""
import importlib.util
import json
import os
import subprocess
import sys

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


@needs_harness
def test_the_harness_scores_as_we_do(tmp_path):
    """A trained model with a memory, on problems some of which have a wrong gold answer."""
    from eval_gsm8k import dial_problems
    problems = dial_problems("valid", 12)
    for problem in problems[::3]:
        problem["answer"] += "1"
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    (tmp_path / "task.yaml").write_text(TASK.replace("DATA", str(tmp_path / "data.jsonl")))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, ROOT / "experiments" / "lm_eval_model.py", "--tasks", "local_dial",
         "--include-path", tmp_path, "--think", "4", "--steps", "1", "--out", "found.json"],
        cwd=tmp_path, env={**os.environ, **ONE_THREAD, **offline}, text=True, timeout=300,
        capture_output=True)
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
def test_likelihoods_are_refused_in_a_sentence(tmp_path):
    sys.path.insert(0, str(ROOT / "experiments"))
    from lm_eval_model import MetaStateLM
    from model import InputError
    with pytest.raises(InputError, match="likelihoods"):
        MetaStateLM.loglikelihood(None, [])
