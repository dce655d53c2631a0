"""Bad input ends with exit status 1 or 2 and one sentence, and loses no file."""
import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval_gsm8k
import sample
import train
from conftest import ROOT
from folders import save_llada, save_run
from processes import ONE_THREAD, Program, run

PROGRAMS = {"train.py": train, "eval_gsm8k.py": eval_gsm8k, "sample.py": sample}
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_DATASETS_SERVER": "http://127.0.0.1:9"}


def parser_of(module, monkeypatch) -> argparse.ArgumentParser:
    """The parser that a program makes, caught before it reads the command line."""
    class Caught(Exception):
        pass

    def caught(self, *_):
        raise Caught(self)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", caught)
        with pytest.raises(Caught) as found:
            module.arguments()
    return found.value.args[0]


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_option_takes_a_number_that_is_out_of_range(name, monkeypatch, capsys):
    """Every option of every parser that takes a number, so that a new one is tested, too."""
    module = PROGRAMS[name]
    tried = 0
    for action in parser_of(module, monkeypatch)._actions:
        if action.type in (None, Path) or action.choices:
            continue
        for text in ("-1", "nan", "inf", "-inf", "1e400", "100000000000000000000000000000000",
                     "x", ""):
            monkeypatch.setattr(sys, "argv", [name, f"{action.option_strings[0]}={text}"])
            with pytest.raises(SystemExit) as end:
                module.arguments()
            assert end.value.code == 2, (action.option_strings, text)
            assert action.option_strings[0] in capsys.readouterr().err
            tried += 1
    assert tried > 60


def refused(*argv, folder, **env) -> str:
    """The one sentence that a program ends with, with no file changed or left behind."""
    def files():
        return {p: p.read_bytes() for p in folder.rglob("*")
                if p.is_file() and p.suffix != ".txt" and p.name != "lock"}

    before = files()
    code, text = run(*argv, folder=folder, **{**NOWHERE, **env})
    assert code in (1, 2) and "Traceback" not in text, text
    assert before == files()
    return text.strip().splitlines()[-1]


@pytest.mark.parametrize("argv, word", [
    ("train.py --batch 7 --accumulate 2", "multiple"),
    ("train.py --backbone-batch 7 --accumulate 2", "multiple"),
    ("train.py --init llada --batch 7", "multiple"),
    ("train.py --init llada --data missing.jsonl", "missing.jsonl"),
    ("train.py --init llada", "datasets|rows|reached"),
    ("train.py --init nobody", "nobody"),
    ("train.py --resume", "nothing"),
    ("train.py --device abacus", "abacus"),
    ("sample.py --init llada --steps 7 --gen-length 8 --block-length 4", "divide"),
    ("sample.py --init llada --remasking entropy --threshold 0.5", "threshold"),
    ("sample.py --init llada --html /dev/null", "plain file"),
    ("sample.py --init llada --infill none", "blank"),
    ("sample.py --init llada", "--weights"),
    ("sample.py --init nobody", "nobody"),
    ("sample.py --memory nobody.pt", "nobody.pt"),
    ("sample.py --html .", "plain file"),
    ("sample.py --html x/y.html", "x/y.html"),
    ("eval_gsm8k.py --init llada --carry shuffle --batch-size 1", "two"),
    ("eval_gsm8k.py --init llada --data nothing.jsonl", "nothing.jsonl"),
    ("eval_gsm8k.py --data empty.jsonl", "empty"),
    ("eval_gsm8k.py --data array.jsonl", "array"),
    ("eval_gsm8k.py --compare x empty.jsonl", "results"),
    ("eval_gsm8k.py --limit 0", "--limit"),
    ("eval_gsm8k.py --out /proc/none/x.jsonl --limit 1", "/proc/none"),
    ("eval_gsm8k.py --out folder --limit 1", "plain file")])
def test_a_mistake_is_told_in_one_sentence_before_anything_is_fetched(argv, word, tmp_path):
    """With no server to reach: whatever needs none is said first."""
    (tmp_path / "x").write_text("a file where a folder is needed")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "array.jsonl").write_text('[{"question": "q",\n "answer": "a"}]\n')
    home = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    sentence = refused(*argv.split(), folder=tmp_path, **home)
    assert re.search(word, sentence), sentence


def test_a_link_is_never_replaced(tmp_path):
    (tmp_path / "page.html").symlink_to("target")
    assert "plain file" in refused("sample.py", "--html", "page.html", folder=tmp_path)
    assert (tmp_path / "page.html").is_symlink()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_output_is_one_sentence(tmp_path):
    program = Program("sample.py", folder=tmp_path, stdout=Path("/dev/full"),
                      stderr=tmp_path / "errors.txt")
    code = program.wait()
    said = (tmp_path / "errors.txt").read_text()
    assert code == 1 and "the output cannot be used" in said and "Traceback" not in said


def test_a_closed_pipe_ends_without_a_traceback(tmp_path):
    program = subprocess.Popen([sys.executable, ROOT / "sample.py", "--show-steps"], cwd=tmp_path,
                               env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    program.stdout.close()
    said = program.stderr.read()
    assert program.wait(120) == 1 and "Traceback" not in said and "Exception" not in said


def test_a_terminal_that_knows_ascii_only(tmp_path):
    code, text = run("sample.py", "--show-steps", folder=tmp_path, PYTHONIOENCODING="ascii")
    assert code == 0 and text.isascii()


def test_no_home(tmp_path):
    code, text = run("sample.py", folder=tmp_path, HOME=None, XDG_CACHE_HOME=None)
    assert code == 0, text


@pytest.mark.parametrize("after", [0.05, 0.4, 1.0, 2.0])
def test_ctrl_c_at_any_time_has_no_traceback(tmp_path, after):
    """From the first moment on, while torch is being loaded as well."""
    program = subprocess.Popen(
        [sys.executable, ROOT / "train.py", "--device", "cpu", "--problems", "0"], cwd=tmp_path,
        env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True)
    time.sleep(after)
    program.send_signal(signal.SIGINT)
    said, _ = program.communicate(timeout=120)
    # within the first milliseconds the interpreter itself is not up yet, and dies of the signal
    assert program.returncode == 130 or after < 0.1 and program.returncode < 0
    assert "Traceback" not in said or after < 0.1


@pytest.mark.parametrize("change", [
    {"n_layers": 10**9}, {"n_layers": -1}, {"n_layers": None}, {"n_layers": "2"},
    {"n_layers": True}, {"d_model": 10**30}, {"rms_norm_eps": "x"}, {"rms_norm_eps": -1},
    {"rope_theta": None}, {"mask_token_id": 10**6}, {"model_type": None}, {"alibi": True}])
def test_a_config_with_nonsense_is_refused(tmp_path, change):
    save_llada(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps({**config, **change}))
    sentence = refused("sample.py", "--init", "small", folder=tmp_path)
    assert "config.json" in sentence or "layers" in sentence or "shape" in sentence


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04", b"\x80\x04."])
def test_a_memory_that_is_none_is_refused(tmp_path, content):
    path = save_run(tmp_path / "run")
    path.write_bytes(content)
    assert "memory.pt" in refused("sample.py", "--memory", "run/memory.pt", folder=tmp_path)


def test_a_small_llada_goes_through_all_programs(tmp_path):
    """The 8B path as typed, on a folder of the real layout with random weights."""
    save_llada(tmp_path / "small")
    lines = [json.dumps({"question": "1+1", "answer": "#### 2"})] * 4
    (tmp_path / "data.jsonl").write_text("\ufeff" + "\n".join(lines))          # with a BOM
    few = ["--iters", 2, "--batch", 2, "--accumulate", 1, "--max-length", 200, "--device", "cpu"]
    argv = ["train.py", "--init", "small", "--data", "data.jsonl", "--out", "out/ü", *few]
    code, text = run(*argv, folder=tmp_path)
    assert code == 0, text
    for length in (8, 33):
        code, text = run("sample.py", "--init", "small", "--memory", "out/ü/memory.pt",
                         "--gen-length", length, "--think", 1, "--device", "cpu", folder=tmp_path)
        assert code == 0, text
    other = torch.load(tmp_path / "out" / "ü" / "memory.pt", weights_only=True)
    other["backbone"]["digest"] = "another"
    torch.save(other, tmp_path / "other.pt")
    memory = ["sample.py", "--init", "small", "--memory", "other.pt", "--gen-length", 8]
    assert "another backbone" in refused(*memory, folder=tmp_path)
    code, text = run(*memory, "--any-backbone", folder=tmp_path)
    assert code == 0, text


def test_two_runs_do_not_share_a_folder(tmp_path):
    first = Program("train.py", "--out", "out", "--device", "cpu", folder=tmp_path)
    first.wait_until((tmp_path / "out" / "backbone.log.jsonl").exists)
    code, text = run("train.py", "--out", "out", "--device", "cpu", folder=tmp_path)
    assert code == 1 and "another run" in text
    first.send(signal.SIGKILL)
    first.wait()
