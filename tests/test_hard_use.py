"""Bad input ends with exit status 1 or 2 and one sentence, and loses no file."""
import argparse
import io
import json
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval_gsm8k
import sample
import train
from folders import save_llada, save_run
from metastate import preset
from model import InputError
from processes import Program

PROGRAMS = {"train.py": train, "eval_gsm8k.py": eval_gsm8k, "sample.py": sample}
OUTSIDE = ("-1", "nan", "inf", "-inf", "1e400", "100000000000000000000000000000000", "x", "")


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
        for text in OUTSIDE:
            monkeypatch.setattr(sys, "argv", [name, f"{action.option_strings[0]}={text}"])
            with pytest.raises(SystemExit) as end:
                module.arguments()
            assert end.value.code == 2, (action.option_strings, text)
            assert action.option_strings[0] in capsys.readouterr().err
            tried += 1
    assert tried > 60


# -------------------------------------------------------- a mistake is told, and nothing is lost


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(command line): the sentence that the program ends with, in tmp_path and with no
    server to reach. No file is changed or left behind."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_ENDPOINT", "HF_DATASETS_SERVER"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(eval_gsm8k, "GSM8K", "http://127.0.0.1:9/")
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def refused(line):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        monkeypatch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit) as end:         # anything else would be a traceback
            sample.run_program(PROGRAMS[line.split()[0]].main, "")
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        sentence = end.value.code                      # Python prints a text, the status is 1
        if sentence == 2:                              # argparse has printed it
            sentence = capsys.readouterr().err.strip().splitlines()[-1]
        assert isinstance(sentence, str) and "\n" not in sentence and "TRACEBACK" not in sentence
        return sentence

    return refused


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """A folder of files that are not what their names say."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "folder").mkdir()
    for name, data in {
            "x": b"a file where a folder is needed",
            "nonsense.pt": b"nonsense",
            "empty.jsonl": b"\n",
            "binary.jsonl": bytes(range(256)),
            "good.jsonl": b'{"question": "q", "answer": "#### 1"}\n',
            "number.jsonl": b'{"question": 1, "answer": "a"}\n',
            "other.jsonl": b'{"setting": {"init": "other"}}\n',
            "broken.jsonl": b'{"setting": {}}\n{"index": 0}\n'}.items():
        (folder / name).write_bytes(data)

    memory = save_run(folder / "run")
    for name, value in (("foreign", {"name": "x", "digest": "another"}), ("homeless", None)):
        state = torch.load(memory, weights_only=True)
        torch.save(state | {"backbone": value}, folder / f"{name}.pt")
    for name, missing in (("no_weights", "model.safetensors"), ("no_tokens", "tokenizer.json")):
        save_llada(folder / name)
        (folder / name / missing).unlink()
    return folder


MISTAKES = """
train.py --batch 7 --accumulate 2                           --batch 7 is no multiple of 2
train.py --backbone-batch 7 --accumulate 2                  --backbone-batch 7 is no multiple
train.py --init llada --batch 7                             --batch 7 is no multiple of 16
train.py --init llada --data missing.jsonl                  missing.jsonl.*No such file
train.py --init llada --data folder                         folder.*directory
train.py --init llada --data binary.jsonl                   binary.jsonl.*utf-8
train.py --init llada                                       tulu-3.*--data
train.py --init llada --data gsm8k                          GSM8K's train.jsonl.*--data
train.py --init llada --data good.jsonl                     hf download GSAI-ML/LLaDA-8B-Instruct
train.py --init nobody                                      no folder nobody
train.py --init folder                                      folder/config.json
train.py --resume                                           no checkpoint
train.py --out run                                          run holds a run
train.py --out x --data good.jsonl                          --out x.*File exists
train.py --out /proc/none --data good.jsonl                 /proc/none
train.py --data good.jsonl --max-length 2                   raise --max-length
train.py --problems 1                                       other sample
train.py --device abacus                                    --device abacus
train.py --device meta                                      --device meta
train.py --carry shuffle                                    --carry
sample.py --init llada --steps 7 --gen-length 8 --block-length 4        divide
sample.py --infill none                                     no blank
sample.py --infill _ --gen-length 6                         omit --gen-length
sample.py --steps 1000000000                                100000
sample.py --init llada                                      hf download GSAI-ML/LLaDA-8B-Instruct
sample.py --init a/b                                        hf download a/b
sample.py --init x                                          no folder x
sample.py --weights nobody                                  no folder nobody
sample.py --memory nobody.pt                                nobody.pt.*No such file
sample.py --memory folder                                   folder.*directory
sample.py --memory nonsense.pt                              nonsense.pt.*train.py wrote
sample.py --memory homeless.pt                              homeless.pt.*train.py wrote
sample.py --init run/backbone --memory foreign.pt           another backbone
sample.py --init no_weights                                 only config.json, tokenizer.json
sample.py --init no_tokens                                  no_tokens/tokenizer.json.*No such file
eval_gsm8k.py --carry shuffle --limit 1                     two problems
eval_gsm8k.py --carry shuffle --cfg-scale 1                 no --cfg-scale
eval_gsm8k.py --carry shuffle --batch-size 2                three
eval_gsm8k.py --init llada                                  GSM8K's test.jsonl.*--data
eval_gsm8k.py --init llada --data nothing.jsonl             nothing.jsonl.*No such file
eval_gsm8k.py --init llada --data good.jsonl                train.jsonl.*beside it
eval_gsm8k.py --data empty.jsonl                            empty.jsonl is empty
eval_gsm8k.py --data number.jsonl                           line 1.*no text
eval_gsm8k.py --compare x empty.jsonl                       x cannot be used.*results
eval_gsm8k.py --compare other.jsonl other.jsonl             no problem in common
eval_gsm8k.py --compare broken.jsonl broken.jsonl           broken.jsonl.*results
eval_gsm8k.py --out /proc/none/x.jsonl --limit 1            /proc/none
eval_gsm8k.py --out folder --limit 1                        folder.*directory
eval_gsm8k.py --out other.jsonl --limit 1                   init = 'other', not 'tiny'
"""


def test_a_mistake_is_told_in_one_sentence_and_loses_no_file(bad_files, refused, tmp_path):
    """With no server to reach: whatever needs none is said first."""
    shutil.copytree(bad_files, tmp_path, dirs_exist_ok=True)
    for line in MISTAKES.strip().splitlines():
        command, expected = re.split("  +", line)
        sentence = refused(command)
        assert re.search(expected, sentence), f"{command}: {sentence}"


# ------------------------------------------------------------------ the end of a program, and out


def ended(monkeypatch, error):
    """What run_program makes of an error."""
    def main():
        raise error

    monkeypatch.delenv("TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end:
        sample.run_program(main, "go on like this")
    return end.value.code


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(monkeypatch, capsys):
    monkeypatch.setattr(sample, "arguments", lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        sample.run_program(sample.main, "go on like this")
    assert end.value.code == 130
    assert capsys.readouterr().err.strip() == "interrupted; go on like this"


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. ..."),
    RuntimeError("Invalid buffer size: 18.00 GB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes.")])
def test_every_lack_of_memory_is_one_sentence(error, monkeypatch):
    assert "too small; take smaller batches" in ended(monkeypatch, error)


def test_an_error_of_ours_names_its_place_on_request(monkeypatch):
    sentence = ended(monkeypatch, KeyError("d_slot"))
    assert "KeyError: no 'd_slot'" in sentence and "TRACEBACK=1" in sentence
    monkeypatch.setenv("TRACEBACK", "1")
    monkeypatch.setattr(sample, "main", lambda: {}["d_slot"])
    with pytest.raises(KeyError):
        sample.run_program(sample.main, "")


def test_an_output_that_fails_is_one_sentence(tmp_path):
    errors = tmp_path / "errors.txt"
    program = Program("sample.py", folder=tmp_path, stdout=Path("/dev/full"), stderr=errors)
    assert program.wait() == 1
    said = errors.read_text().splitlines()             # the first names the model
    assert said[1:] == ["error: the output: No space left on device"]


def test_streams_that_are_closed_lose_what_is_said_and_nothing_else(monkeypatch):
    done = []
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    def main():
        print("to nobody")
        print("to nobody", file=sys.stderr)
        done.append(True)

    sample.run_program(main, "")
    assert done


def test_a_terminal_that_knows_ascii_only_shows_the_rest(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    sample.run_program(lambda: print("a \u2591"), "")
    assert terminal.buffer.getvalue() == b"a ?\n"


@pytest.mark.parametrize("rank, world", [("1", "1"), ("0", "0"), ("0", "-2"), ("x", "2")])
def test_processes_that_cannot_be_are_refused(rank, world, monkeypatch):
    """A negative number of them would turn the sign of the loss."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(InputError, match="RANK and WORLD_SIZE .*start by torchrun"):
        sample.start_device("cpu", "tiny")


# ------------------------------------------------------------------------------ files of others


def test_a_small_llada_goes_through_all_programs(tmp_path, monkeypatch, capsys):
    """The 8B path on a folder of the real layout with random weights, but for a small memory."""
    def small(backbone):
        return replace(preset(backbone), n_slots=4, d_slot=22, d_time=8)

    def run(name, *argv):
        monkeypatch.setattr(sys, "argv", [name, "--init", "small", "--device", "cpu", *argv])
        sample.run_program(PROGRAMS[name].main, "")
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "preset", small)
    save_llada(tmp_path / "small")
    lines = [json.dumps({"question": "1+1", "answer": "#### 2"})] * 5
    (tmp_path / "data.jsonl").write_text("\ufeff" + "\n".join(lines))          # with a BOM
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    run("train.py", "--data", "data.jsonl", "--out", "out/ü", "--iters", "2", "--batch", "2",
        "--accumulate", "1", "--max-length", "200")
    with_memory = ["--memory", "out/ü/memory.pt", "--think", "1", "--gen-length"]
    for more in (["8"], ["33"], ["16", "--block-length", "8", "--steps", "4", "--cache"]):
        assert "How far" in run("sample.py", *with_memory, *more)
    score = run("eval_gsm8k.py", "--data", "data.jsonl", *with_memory, "8")
    assert " of 5 correct" in score and '"protocol": "chat-few-shot"' in score
    score = run("eval_gsm8k.py", "--data", "data.jsonl", *with_memory, "16", "--protocol", "paper",
                "--block-length", "8")
    assert " of 5 correct" in score and '"cache": true' in score

