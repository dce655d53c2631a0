"""Folders as the programs find them: a tiny run, and a small model in LLaDA's released layout."""
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from metastate import MetaState, preset, save_checkpoint
from model import (CONFIG_KEYS, LLADA, PATTERNS, TINY, Backbone, bytes_of_characters,
                   original_name, save_backbone)
from sample import WORDS


def memory_for(backbone: Backbone) -> MetaState:
    """A memory that matters: with the zero of its initialisation it would be a no-op."""
    torch.manual_seed(1)
    memory = MetaState(preset(backbone))
    torch.nn.init.normal_(memory.injector.out.weight)
    return memory


def save_run(folder: Path) -> Path:
    """A run's folder as train.py leaves it, with random weights; its memory.pt."""
    torch.manual_seed(0)
    backbone = Backbone(TINY)
    save_backbone(backbone, folder / "backbone", WORDS)
    save_checkpoint(folder / "memory.pt", memory_for(backbone), iteration=1, optimizers=[],
                    settings={}, backbone={"name": "tiny", "digest": backbone.digest()})
    return folder / "memory.pt"


SMALL_LLADA = replace(LLADA, vocab_size=270, n_layer=2, n_head=2, n_kv_head=2, d_model=16, d_ff=32,
                      mask_id=261, eos_id=257, pad_id=257, eot_id=260)
CONTROL_TOKENS = ["<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>",
                  "<|eot_id|>", "<|mdm_mask|>"]


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Tensors of float32 or bfloat16 in the format of safetensors."""
    header, content = {}, b""
    for name, tensor in tensors.items():
        data = tensor.detach().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": "F32" if tensor.dtype == torch.float32 else "BF16",
                        "shape": tensor.shape, "data_offsets": [len(content), len(content + data)]}
        content += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def save_llada(folder: Path) -> dict[str, Tensor]:
    """A random checkpoint in LLaDA's layout: its names, its config.json, bytes for a tokeniser.
    Returns its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    weights = {original_name("llada", name): p
               for name, p in Backbone(SMALL_LLADA).named_parameters()}
    write_safetensors(folder / "model.safetensors", weights)
    config = {theirs: getattr(SMALL_LLADA, ours) for ours, theirs in CONFIG_KEYS["llada"].items()}
    (folder / "config.json").write_text(json.dumps({"model_type": "llada", **config}))
    tokenizer = {
        "normalizer": None,
        "pre_tokenizer": {"pretokenizers": [{"pattern": {"Regex": PATTERNS["llada"]}}]},
        "model": {"vocab": bytes_of_characters(), "merges": []},
        "added_tokens": [{"content": token, "id": 256 + i, "special": True}
                         for i, token in enumerate(CONTROL_TOKENS)]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return weights
