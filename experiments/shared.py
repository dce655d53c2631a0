"""What the studies share: a run's models, training, scores and tables.

Imported first, it also makes the programs one folder up importable.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from eval_gsm8k import PROTOCOLS, evaluate, table  # noqa: E402
from metastate import MetaState, load_memory  # noqa: E402
from model import TINY, Backbone, Tokenizer, ensure, load_backbone, load_tokenizer  # noqa: E402
from sample import ASSETS, DIAL_LENGTH, Processes, start_device  # noqa: E402

BATCH = 300                            # problems that are answered together
SHIPPED = ASSETS.resolve() / "tiny"


def ensure_not_shipped(folder: Path) -> None:
    """Refuse to write into the model that comes with the repository."""
    is_shipped = SHIPPED in (folder.resolve(), *folder.resolve().parents)
    ensure(not is_shipped, f"{folder} comes with this repository, nothing is written there; copy "
           f"it first: cp -r {folder} out/tiny")


def open_run(folder: Path, device: torch.device | str = "cpu"
             ) -> tuple[Backbone, Tokenizer, MetaState]:
    """The models of a finished tiny run."""
    weights, memory_path = folder / "backbone", folder / "memory.pt"
    ensure(weights.is_dir() and memory_path.is_file(), f"{folder} holds no finished run of a tiny "
           f"model; train one by python train.py --out {folder}, or give assets/tiny")
    backbone = load_backbone(weights, device=device)
    return backbone, load_tokenizer(weights), load_memory(memory_path, backbone)


def training_arguments(doc: str, *own: str) -> argparse.Namespace:
    """The settings of a study that trains everything itself: a folder and options of train.py, over
    the study's own."""
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], epilog="Options of train.py may follow the folder, for a "
        "quick look --iters 20 --backbone-iters 20 --problems 40.")
    parser.add_argument("out", type=Path, help="folder of checkpoints, logs and results")
    given, options = parser.parse_known_args()
    ensure_not_shipped(given.out)
    args = train.arguments(["--out", str(given.out), *own, *options])
    ensure(args.init == "tiny" and args.data is None, "this study has a model and data of its own; "
           "omit --init and --data")
    return args


def training_run(args: argparse.Namespace, problems: list[dict], tokenizer: Tokenizer,
                 length: int = DIAL_LENGTH) -> train.Run:
    """What train.py's functions need to train on these problems, with answers of that length."""
    device, _ = start_device(args.device, "tiny")
    texts = [train.read_text(problem) for problem in problems]
    examples = train.tokenise(texts, tokenizer, TINY.eos_id, args.max_length, chat=True)
    return train.Run(args, args.out, examples, length, Processes(0, 1), device)


def score(backbone: Backbone, tokenizer: Tokenizer, problems: list[dict],
          memory: MetaState | None, *, carry: str = "keep", gen_length: int = DIAL_LENGTH,
          **settings) -> list[dict]:
    """The rows of evaluate under one schedule."""
    settings = {"gen_length": gen_length, **settings}
    return list(evaluate(backbone, tokenizer, problems, PROTOCOLS["dial"], settings=settings,
                         memory=memory, carry=carry, batch_size=BATCH))


def print_table(title: str, header: list[str], rows: dict[str, list[str]]) -> None:
    print(f"\n{table(title, header, rows)}", flush=True)


def spread(shares: list[float]) -> str:
    """Mean in percent, and the lowest and the highest where they differ."""
    mean, low, high = (f"{100 * x:.1f}" for x in (np.mean(shares), min(shares), max(shares)))
    return mean if low == high else f"{mean} ({low}-{high})"
