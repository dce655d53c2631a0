"""Bad input ends with exit status 1 or 2 and one sentence, and loses no file."""
import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval_gsm8k
import sample
import train
from conftest import ROOT
from eval_gsm8k import WORDS, dial_problems
from folders import save_llada, save_run
from metastate import preset
from model import tiny_tokenizer
from processes import LIMIT, Program, end, run

PROGRAMS = {"train.py": train, "eval_gsm8k.py": eval_gsm8k, "sample.py": sample}


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


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(program, *argv): the one sentence that the program ends with, in tmp_path and with no
    server to reach. No file is changed or left behind."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_ENDPOINT", "HF_DATASETS_SERVER"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def files():
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"}

    def refused(name, *argv):
        before = files()
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        with pytest.raises(SystemExit) as end:         # anything else would be a traceback
            sample.run_program(PROGRAMS[name].main, "")
        assert before == files()
        sentence = end.value.code                      # Python prints a text, the status is 1
        if sentence == 2:                              # argparse has printed it
            sentence = capsys.readouterr().err.strip().splitlines()[-1]
        assert isinstance(sentence, str) and "\n" not in sentence
        return sentence

    return refused


@pytest.mark.parametrize("argv, word", [
    ("train.py --batch 7 --accumulate 2", "multiple"),
    ("train.py --backbone-batch 7 --accumulate 2", "multiple"),
    ("train.py --init llada --batch 7", "multiple"),
    ("train.py --init llada --data missing.jsonl", "missing.jsonl"),
    ("train.py --init llada", "datasets|rows|reached"),
    ("train.py --init nobody", "nobody"),
    ("train.py --resume", "no backbone.pt"),
    ("train.py --problems 1", "other sample"),
    ("train.py --device abacus", "abacus"),
    ("sample.py --init llada --steps 7 --gen-length 8 --block-length 4", "divide"),
    ("sample.py --init llada --remasking entropy --threshold 0.5", "threshold"),
    ("sample.py --init llada --html /dev/null", "plain file"),
    ("sample.py --init llada --infill none", "blank"),
    ("sample.py --infill _ --gen-length 6", "omit --gen-length"),
    ("sample.py --infill _ --block-length 1", "omit --gen-length"),
    ("sample.py --answer nan", "holds no number"),
    ("sample.py --temperature 1e-300", "1e-6"),
    ("sample.py --steps 1000000000", "100000"),
    ("eval_gsm8k.py --carry shuffle --limit 1", "two problems"),
    ("eval_gsm8k.py --carry shuffle --cfg-scale 1", "no --cfg-scale"),
    ("sample.py --init llada", "--weights"),
    ("sample.py --init nobody", "nobody"),
    ("sample.py --memory nobody.pt", "nobody.pt"),
    ("sample.py --html .", "plain file"),
    ("sample.py --html x/y.html", "x/y.html"),
    ("eval_gsm8k.py --init llada --carry shuffle --batch-size 2", "three"),
    ("eval_gsm8k.py --init llada --data nothing.jsonl", "nothing.jsonl"),
    ("eval_gsm8k.py --data empty.jsonl", "empty"),
    ("eval_gsm8k.py --data array.jsonl", "array"),
    ("eval_gsm8k.py --compare x empty.jsonl", "results"),
    ("eval_gsm8k.py --limit 0", "--limit"),
    ("eval_gsm8k.py --out /proc/none/x.jsonl --limit 1", "/proc/none"),
    ("eval_gsm8k.py --out folder --limit 1", "plain file")])
def test_a_mistake_is_told_in_one_sentence_before_anything_is_fetched(argv, word, refused,
                                                                      tmp_path):
    """With no server to reach: whatever needs none is said first."""
    (tmp_path / "x").write_text("a file where a folder is needed")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "array.jsonl").write_text('[{"question": "q",\n "answer": "a"}]\n')
    sentence = refused(*argv.split())
    assert re.search(word, sentence), sentence


def test_a_link_is_never_replaced(refused, tmp_path):
    (tmp_path / "page.html").symlink_to("target")
    assert "plain file" in refused("sample.py", "--html", "page.html")
    assert (tmp_path / "page.html").is_symlink()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_output_is_one_sentence(tmp_path):
    program = Program("sample.py", folder=tmp_path, stdout=Path("/dev/full"),
                      stderr=tmp_path / "errors.txt")
    code = program.wait()
    said = (tmp_path / "errors.txt").read_text()
    assert code == 1 and "the output cannot be used" in said and "Traceback" not in said


def test_a_closed_pipe_ends_without_a_traceback(tmp_path):
    """In a new interpreter, whose own end must be as quiet."""
    with open(tmp_path / "errors", "w") as errors:
        program = subprocess.Popen([sys.executable, ROOT / "sample.py"], cwd=tmp_path,
                                   stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
    program.stdout.close()
    try:
        assert program.wait(LIMIT) == 1
    finally:
        end(program)
    said = (tmp_path / "errors").read_text()
    assert "the output cannot be used" in said
    assert "Traceback" not in said and "Exception" not in said


def test_a_terminal_that_knows_ascii_only(tmp_path):
    code, text = run("sample.py", "--show-steps", folder=tmp_path, PYTHONIOENCODING="ascii")
    assert code == 0 and text.isascii()


def test_no_home(tmp_path):
    code, text = run("sample.py", folder=tmp_path, HOME=None, XDG_CACHE_HOME=None)
    assert code == 0, text


# -------------------------------------------------------------------------------------- Ctrl-C


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="sees by /proc what is loaded")
def test_ctrl_c_while_torch_is_being_loaded(tmp_path):
    """As typed, in a new interpreter: nothing has begun, and it ends at once."""
    with open(tmp_path / "output", "w") as file:
        program = subprocess.Popen([sys.executable, ROOT / "train.py"], cwd=tmp_path, stdout=file,
                                   stderr=file, start_new_session=True)
    try:
        limit = time.monotonic() + LIMIT
        while "libtorch" not in Path(f"/proc/{program.pid}/maps").read_text():
            assert program.poll() is None and time.monotonic() < limit
            time.sleep(0.005)
        program.send_signal(signal.SIGINT)
        assert program.wait(LIMIT) == 130
    finally:
        end(program)
    assert os.listdir(tmp_path) == ["output"]
    assert "Traceback" not in (tmp_path / "output").read_text()


def test_ctrl_c_at_any_moment_says_how_to_go_on(tmp_path):
    """From the first line of train.py on: while data are read, texts tokenised, steps made."""
    lines = [json.dumps(problem) for problem in dial_problems("train", 1000)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    rng = random.Random(0)
    for moment in range(10):
        program = Program("train.py", "--data", "data.jsonl", "--out", moment, "--device", "cpu",
                          folder=tmp_path)
        program.wait_until(program.output.exists)
        time.sleep(rng.uniform(0, 0.5))
        program.send(signal.SIGINT)
        assert program.wait() == 130, program.text()
        said = program.text()
        assert "Traceback" not in said
        assert said == "" or "--resume" in said.strip().splitlines()[-1]


def test_a_program_has_no_thread_whose_locks_ctrl_c_could_leave_taken(monkeypatch):
    """KeyboardInterrupt may come between any two lines, in the code of a pool of threads as well:
    then those wait for ever, and the program for them."""
    tokenizer = tiny_tokenizer(WORDS)
    seen = set()
    encode = tokenizer.encode

    def spy(*args, **more):
        seen.add(threading.get_ident())
        return encode(*args, **more)

    monkeypatch.setattr(tokenizer, "encode", spy)
    train.tokenise([train.Text("a", "b")] * 100, tokenizer, eos_id=1, max_length=10)
    assert seen == {threading.get_ident()}


def test_a_ctrl_c_after_the_last_look_at_it_is_not_forgotten():
    """While the last checkpoint is saved, for example."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with train.stop_signals() as received:
            signal.raise_signal(signal.SIGINT)
            assert received                            # within the block nothing is raised
    assert signal.getsignal(signal.SIGINT) is before


# ------------------------------------------------------------------------------ files of others


@pytest.mark.parametrize("change", [
    {"n_layers": 10**9}, {"n_layers": -1}, {"n_layers": None}, {"n_layers": "2"},
    {"n_layers": True}, {"d_model": 10**30}, {"rms_norm_eps": "x"}, {"rms_norm_eps": -1},
    {"rope_theta": None}, {"mask_token_id": 10**6}, {"model_type": None}, {"alibi": True}])
def test_a_config_with_nonsense_is_refused(refused, tmp_path, change):
    save_llada(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps({**config, **change}))
    sentence = refused("sample.py", "--init", "small")
    assert "config.json" in sentence or "layers" in sentence or "shape" in sentence


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04", b"\x80\x04."])
def test_a_memory_that_is_none_is_refused(refused, tmp_path, content):
    path = save_run(tmp_path / "run")
    path.write_bytes(content)
    assert "memory.pt" in refused("sample.py", "--memory", "run/memory.pt")


def test_a_small_llada_goes_through_all_programs(refused, tmp_path, monkeypatch, capsys):
    """The 8B path on a folder of the real layout with random weights, but for a small memory."""
    def small(backbone):
        return replace(preset(backbone), n_slots=4, d_slot=22, d_time=8)

    def run(name, *argv):
        monkeypatch.setattr(sys, "argv", [name, "--init", "small", "--device", "cpu", *argv])
        sample.run_program(PROGRAMS[name].main, "")
        return capsys.readouterr().out

    monkeypatch.setattr(train, "preset", small)
    save_llada(tmp_path / "small")
    lines = [json.dumps({"question": "1+1", "answer": "#### 2"})] * 5
    (tmp_path / "data.jsonl").write_text("\ufeff" + "\n".join(lines))          # with a BOM
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    run("train.py", "--data", "data.jsonl", "--out", "out/ü", "--iters", "2", "--batch", "2",
        "--accumulate", "1", "--max-length", "200")
    with_memory = ["--memory", "out/ü/memory.pt", "--think", "1", "--gen-length"]
    for length in ("8", "33"):
        assert "How far" in run("sample.py", *with_memory, length)
    assert " of 5 correct" in run("eval_gsm8k.py", "--data", "data.jsonl", *with_memory, "8")
    other = torch.load(tmp_path / "out" / "ü" / "memory.pt", weights_only=True)
    other["backbone"]["digest"] = "another"
    torch.save(other, tmp_path / "other.pt")
    memory = ["--memory", "other.pt", "--gen-length", "8"]
    assert "another backbone" in refused("sample.py", "--init", "small", *memory)
    assert "How far" in run("sample.py", *memory, "--any-backbone")
