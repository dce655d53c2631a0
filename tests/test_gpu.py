"""On a GPU everything gives nearly what it gives on a CPU."""
import copy
import json

import pytest
import torch

from conftest import GOLDEN, ROOT
from diffusion import generate, unroll
from eval_gsm8k import PROTOCOLS, dial_problems, problem_ids
from metastate import load_memory
from model import load_backbone, load_tokenizer
from processes import Program, run
from test_model import FORWARD, read_golden

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

TRAIN = ["train.py", "--device", "cuda", "--backbone-iters", 20, "--iters", 120, "--problems", 20]


@pytest.mark.parametrize("name", FORWARD)
def test_logits_equal_the_reference(name):
    golden = read_golden(name)
    want = golden["logits_shifted" if "dream" in name else "logits"]
    backbone = load_backbone(GOLDEN / name, device="cuda")
    difference = (backbone(golden["input_ids"].cuda()).cpu().float() - want).abs()
    assert difference.max() < 1e-4 if "fp32" in name else difference.mean() < 0.012


def test_the_trained_model_gives_the_same_answers():
    folder = ROOT / "assets" / "tiny"
    tokenizer = load_tokenizer(folder / "backbone")
    prompts = [problem_ids(tokenizer, PROTOCOLS["dial"], problem, [])
               for problem in dial_problems("valid", 100)]
    answers = {}
    for device in ("cpu", "cuda"):
        backbone = load_backbone(folder / "backbone", device=device)
        memory = load_memory(folder / "memory.pt", backbone)
        found = generate(backbone, torch.tensor(prompts, device=device), memory=memory, think=4,
                         steps=1, gen_length=20)
        answers[device] = found.cpu()
    assert (answers["cpu"] == answers["cuda"]).all(1).float().mean() > 0.98


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_an_unroll_has_the_same_loss_and_gradient(dtype, tolerance, recompute, backbone, memory):
    torch.manual_seed(2)
    backbone = backbone.to(dtype)
    ids = torch.randint(300, (3, 12))
    maskable = (torch.arange(12) >= 4).expand(3, 12)
    draws = dict(ids=ids, maskable=maskable, counts=torch.tensor([[3, 2, 3]] * 3),
                 noise=torch.rand(3, 12), by_confidence=torch.zeros(3, dtype=torch.bool))

    def loss_and_gradient(device):
        there = copy.deepcopy(memory).to(device)
        frozen = copy.deepcopy(backbone).to(device)
        frozen.recompute = recompute
        loss, _ = unroll(frozen, there, **{k: v.to(device) for k, v in draws.items()}, lam=0.5)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten().cpu() for p in there.parameters()])

    loss, gradient = loss_and_gradient("cpu")
    loss_there, gradient_there = loss_and_gradient("cuda")
    assert loss_there == pytest.approx(loss, rel=tolerance)
    assert (gradient_there - gradient).norm() < tolerance * gradient.norm()


def log(out):
    """Losses of the memory's iterations so far."""
    path = out / "memory.log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("}")]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, text = run(*TRAIN, "--out", whole, folder=tmp_path)
    assert code == 0, text
    program = Program(*TRAIN, "--out", killed, folder=tmp_path)
    program.wait_until(lambda: len(log(killed)) > 105)         # the checkpoint after 100 is there
    program.process.kill()
    program.wait()
    code, text = run("train.py", "--device", "cuda", "--out", killed, "--resume", folder=tmp_path)
    assert code == 0, text
    assert log(killed) == pytest.approx(log(whole), rel=1e-2)


def test_the_programs_run(tmp_path):
    for program in (["sample.py", "--think", 4, "--steps", 1, "--temperature", 0.1, "--compile"],
                    ["eval_gsm8k.py", "--think", 4, "--steps", 1, "--limit", 50]):
        code, text = run(*program, "--device", "cuda", folder=tmp_path)
        assert code == 0, text
