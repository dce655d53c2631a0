"""The studies run end to end on a toy, and each ablation changes what its name says."""
import argparse
import json
import sys
from dataclasses import replace

import pytest
import torch

from conftest import ROOT
from folders import memory_for, save_run
from metastate import MetaState, load_checkpoint, preset, save_checkpoint
from model import TINY, Backbone, InputError, load_backbone, tiny_tokenizer
from sample import WORDS, dial_problems

sys.path.insert(0, str(ROOT / "experiments"))
import ablate  # noqa: E402
import arithmetic  # noqa: E402
import chains  # noqa: E402
import deeper  # noqa: E402
import plot  # noqa: E402
import probe  # noqa: E402
import schedules  # noqa: E402
import train  # noqa: E402

QUICK = ["--iters", "2", "--backbone-iters", "2", "--batch", "4", "--backbone-batch", "4",
         "--think", "2", "--problems", "8", "--device", "cpu"]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Call a study's main in an empty folder, with little data and few passes."""
    tokenise = train.tokenise

    def tokenise_some(texts, *rest, **more):
        return tokenise(texts[:16], *rest, **more)

    def start(study, *argv):
        monkeypatch.setattr(sys, "argv", [f"{study.__name__}.py", *map(str, argv)])
        study.main()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "tokenise", tokenise_some)
    for name, value in (("N_PROBLEMS", 4), ("PASSES", (1, 3)), ("QUOTA_STEPS", (2,))):
        monkeypatch.setattr(ablate, name, value)
    for name, value in (("PROBED_PASSES", 2), ("MANY_PASSES", (5, 7))):
        monkeypatch.setattr(probe, name, value)
    return start


@pytest.fixture
def run(tmp_path):
    """The folder of a tiny run with random weights, and the settings of a short training."""
    folder = tmp_path / "run"
    settings = vars(train.arguments(["--out", str(folder), *QUICK]))
    for name in ("out", "resume"):
        del settings[name]
    save_run(folder)
    backbone = load_backbone(folder / "backbone")
    save_checkpoint(folder / "memory.pt", memory_for(backbone), settings=settings,
                    backbone={"name": "tiny", "digest": backbone.digest()})
    return folder


# ---------------------------------------------------------------------------------- end to end

def test_every_variant_is_trained_measured_and_printed(start, run, capsys):
    names = list(ablate.VARIANTS)
    before = (run / "memory.pt").read_bytes()
    start(ablate, run, *names, "--iters", 1, "--device", "cpu")
    rows = [json.loads(line) for line in (run / "ablations.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == names
    iterations = {row["name"]: row["iterations"] for row in rows}
    assert iterations["K=2"] == 1 and iterations["memoryless-2x"] == 2
    printed = capsys.readouterr().out
    assert all(f"|{name}, " in printed for name in names)
    assert (run / "memory.pt").read_bytes() == before


def test_the_table_of_several_runs_has_mean_and_range(start, run, capsys):
    for folder, right in ((run, 0.5), (run.parent, 1.0)):
        row = {"name": "K=2", "iterations": 600, "parameters": 91_976, "N = 1": 0.25,
               "N = 3": right, "2 steps": 0.0}
        (folder / "ablations.jsonl").write_text(json.dumps(row) + "\n")
    start(ablate, run, "--table", run.parent)
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-2].split("|")]
    assert cells[1:6] == ["K=2, 600 iterations", "91,976", "25.0", "75.0 (50.0-100.0)", "0.0"]


def test_without_a_variant_they_are_listed_and_a_near_miss_is_answered(start, run, capsys):
    start(ablate, run)
    assert "small-10 " in capsys.readouterr().out
    with pytest.raises(InputError, match="did you mean 4-slots"):
        start(ablate, run, "K=2", "4-slot")
    assert not (run / "ablations").exists()            # nothing was begun


@pytest.mark.parametrize("study, more", [(ablate, ["K=2"]), (schedules, []), (deeper, []),
                                         (chains, ["--resume"]), (arithmetic, [])])
def test_nothing_is_written_into_the_model_that_comes_with_the_repository(study, more, start):
    for folder in (ROOT / "assets" / "tiny", ROOT / "tests" / ".." / "assets" / "tiny" / "new"):
        with pytest.raises(InputError, match="copy it first"):
            start(study, folder, *more)


def test_schedules_are_chosen_on_validation_problems(start, run, monkeypatch):
    score = schedules.score
    asked = {"valid": [], "test": []}
    splits = {"valid": dial_problems("valid", 2), "test": dial_problems("test", 4)}

    def spy(backbone, tokenizer, problems, memory, **settings):
        split = next(name for name, some in splits.items() if some == problems)
        asked[split].append(settings)
        return score(backbone, tokenizer, problems, memory, **settings)

    monkeypatch.setattr(schedules, "score", spy)
    start(schedules, run, "--problems", 4, "--device", "cpu")
    assert len(asked["valid"]) == 2 * (4 + 6)          # all blocks and thresholds, of both models
    assert len(asked["test"]) == 2 * (5 + 5 + 1 + 1)   # all quotas and passes, and the chosen ones
    assert all(settings.keys() & {"block_length", "threshold"} for settings in asked["valid"])
    results = json.loads((run / "schedules.json").read_text())
    assert results["MetaState"]["quota, 7 steps"]["passes"] == [7] * 4
    assert results["frozen"]["think, 3 passes"]["passes"] == [3] * 4


def test_the_cheapest_schedule_is_within_a_point_of_the_best():
    def results(right, passes):
        return {"correct": [True] * right + [False] * (1000 - right), "passes": [passes] * 1000}

    found = {"best": results(900, 9), "near": results(891, 5), "cheap": results(880, 2)}
    assert schedules.cheapest(found) == "near"


def test_pictures_of_runs_are_made(start, run, tmp_path):
    pytest.importorskip("matplotlib")
    measured = {f"N = {n}": 0.5 for n in plot.PASSES}
    lines = [json.dumps({"name": name} | measured) for name in ("default", "no-thinking", "K=2")]
    (run / "ablations.jsonl").write_text("\n".join(lines))
    found = {"correct": [True, False], "passes": [5, 5]}
    labels = {"quota, 20 steps": found, "quota, 10 steps": found, "quota, 5 steps": found}
    results = {"frozen": labels | {"blocks of 4": found}, "MetaState": labels}
    (run / "schedules.json").write_text(json.dumps(results))
    (run / "chains.json").write_text(json.dumps({"frozen": {}, "four": {"1": [0.2, 0.9]}}))
    start(plot, run, run, "--assets", tmp_path, "--chains", run)
    texts = {path.stem: path.read_text() for path in tmp_path.glob("*.svg")}
    assert texts.keys() == {"passes", "schedules", "chains"}
    assert "trained without" in texts["passes"] and "fixed quota" in texts["schedules"]


def test_a_probe_finds_what_stands_in_the_slots_and_nothing_else(start, run, capsys):
    torch.manual_seed(0)
    y = torch.arange(600) % 10
    noise = torch.randn(600, 30)
    for x, low, high in ((noise + 5 * torch.nn.functional.one_hot(y, 30), 0.9, 1), (noise, 0, 0.2)):
        right = probe.probe(x[:400], y[:400], x[400:]) == y[400:]
        assert low <= right.float().mean() <= high
    start(probe, run, "--problems", 8)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("|kept, pass 2", "|reset, pass 2", "|untrained, pass"))


@pytest.mark.parametrize("study, checkpoints", [
    (deeper, ["backbone.pt"]), (arithmetic, ["backbone.pt", "memory.pt", "memoryless.pt"]),
    (chains, ["backbone.pt", "memory-1.pt", "memory-2.pt"])])
def test_a_study_that_trains_goes_on_where_it_was(study, checkpoints, start, tmp_path, capsys,
                                                  monkeypatch):
    few = {"quota": {"quota, 2 steps": dict(steps=2)}, "think": {},
           "blocks": {"blocks of 2": dict(block_length=2, steps=14 if study is arithmetic else 10)},
           "threshold": {"threshold 0": dict(threshold=0.0)}}
    for module in (schedules, deeper):
        monkeypatch.setattr(module, "schedules", lambda length: few)
    for name, value in (("LONGEST", 2), ("TRAINED", 1), ("LENGTH", 12), ("N_PASSES", 3)):
        monkeypatch.setattr(chains, name, value)
    for module in (arithmetic, chains):
        monkeypatch.setattr(module, "N_TRAINING", 100)
    monkeypatch.setattr(arithmetic, "THINKING_PASSES", (1, 2))
    start(study, "out", *QUICK)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.pt")) == checkpoints
    table = capsys.readouterr().out.split("\n\n", 1)[1]
    start(study, "out", "--resume", "--problems", 8, "--device", "cpu")
    printed = capsys.readouterr().out
    assert printed.endswith(table) and "/2 loss" not in printed        # nothing is trained again


# -------------------------------------------------------------------- what a variant changes

def variant_memory(name: str) -> MetaState:
    variant = ablate.VARIANTS[name]
    torch.manual_seed(0)
    memory = variant.kind(replace(preset(Backbone(TINY)), **variant.fields))
    torch.nn.init.normal_(memory.injector.out.weight)
    if variant.change:
        variant.change(memory)
    return memory


@pytest.fixture
def given():
    """The arguments of a step."""
    backbone = Backbone(TINY).requires_grad_(False)
    ids = torch.full((2, 8), TINY.mask_id)

    def given(memory, slots):
        return dict(backbone=backbone, ids=ids, slots=slots, t=torch.ones(2),
                    anchors=memory.anchors(ids > 0), context=backbone.context(ids))
    return given


@pytest.mark.parametrize("name, to_the_start, to_the_mixer", [
    ("K=2", True, True), ("one-step-gradient", False, True), ("no-gradient", False, False)])
def test_how_far_the_gradient_of_the_second_step_goes(name, to_the_start, to_the_mixer, given):
    memory = variant_memory(name)
    begin = memory.initial(2).detach().requires_grad_()
    _, slots = memory.step(**given(memory, begin))
    h, _ = memory.step(**given(memory, slots))
    gradients = torch.autograd.grad(h.square().sum(), [begin, memory.mixer.v.weight],
                                    allow_unused=True)
    assert [g is not None and g.any().item() for g in gradients] == [to_the_start, to_the_mixer]


def test_looping_is_five_passes_from_the_initial_slots(given):
    memory = variant_memory("looping")
    looped, _ = memory.step(**given(memory, torch.randn(2, 16, 64)))
    slots = memory.initial(2)
    for _ in range(5):
        h, slots = MetaState.step(memory, **given(memory, slots))
    assert torch.equal(looped, h)


def test_modules_are_replaced_and_time_is_hidden(given):
    read, slots = torch.randn(2, 2, 16, 64)
    assert torch.equal(variant_memory("no-updater").updater(slots, read, None), read.tanh())
    assert not variant_memory("no-time").conditioner(torch.rand(3)).any()
    assert not variant_memory("no-anchors").sharpness.any()


def test_sizes_are_what_the_names_say():
    def size(module, *but):
        return sum(p.numel() for name, p in module.named_parameters() if not name.startswith(but))

    backbone, memory = size(Backbone(TINY), "-"), size(variant_memory("default"), "-")
    assert 0.29 < size(variant_memory("small-30"), "-") / backbone < 0.32
    assert 0.09 < size(variant_memory("small-10"), "-") / backbone < 0.11
    assert 0.99 < size(variant_memory("injector-only"), "mixer", "updater") / memory < 1.01
    assert 0.98 < size(Backbone(deeper.DEEPER), "-") / (backbone + memory) < 1.02


def test_without_a_change_a_variant_is_what_train_memory_makes(start, run, monkeypatch):
    backbone = load_backbone(run / "backbone")
    settings = load_checkpoint(run / "memory.pt")["settings"]
    args = argparse.Namespace(**settings, out=run, resume=False)
    study = ablate.training_run(args, dial_problems("train", 16), tiny_tokenizer(WORDS))
    monkeypatch.setitem(ablate.VARIANTS, "same", ablate.Variant("no change"))
    same, n_moved = ablate.fit_variant(study, backbone, "same")
    want = train.train_memory(study, backbone, run / "again.pt")
    assert all(torch.equal(p, q) for p, q in zip(same.parameters(), want.parameters()))
    args.carry = "reset"
    _, n_moved_without = ablate.fit_variant(study, backbone, "memoryless")
    no_loss = [p.numel() for m in (want.mixer, want.updater) for p in m.parameters()]
    assert n_moved - n_moved_without > 0.8 * sum(no_loss)      # nothing of these was moved
