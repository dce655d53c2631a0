"""Folders as the programs find them: a tiny run, and a small model in LLaDA's released layout."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from metastate import MetaState, preset, save_checkpoint
from model import (CONFIG_KEYS, LLADA, PATTERNS, TINY, Backbone, Config, bytes_of_characters,
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
    memory = memory_for(backbone)
    save_backbone(backbone, folder / "backbone", WORDS)
    save_checkpoint(folder / "memory.pt", memory, iteration=1, optimizers=[], settings={},
                    backbone={"name": "tiny", "digest": backbone.digest()})
    return folder / "memory.pt"


SMALL_LLADA = replace(LLADA, vocab_size=270, n_layer=2, n_head=2, n_kv_head=2, d_model=16, d_ff=32,
                      mask_id=261, eos_id=257, pad_id=257, eot_id=260)
CONTROL_TOKENS = ["<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>",
                  "<|eot_id|>", "<|mdm_mask|>"]


def save_llada(folder: Path, config: Config = SMALL_LLADA) -> Backbone:
    """A checkpoint in LLaDA's layout: its names, its config.json, bytes for a tokeniser."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    backbone = Backbone(config)
    header, arrays, end = {}, [], 0
    for name, p in backbone.named_parameters():
        array = p.detach().numpy().astype(np.float32)
        header[original_name("llada", name)] = {
            "dtype": "F32", "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        arrays.append(array)
        end += array.nbytes
    text = json.dumps(header).encode()
    content = b"".join(array.tobytes() for array in arrays)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)
    values = {theirs: getattr(config, ours) for ours, theirs in CONFIG_KEYS["llada"].items()}
    (folder / "config.json").write_text(json.dumps({"model_type": "llada", **values}))
    tokenizer = {
        "normalizer": None,
        "pre_tokenizer": {"pretokenizers": [{"pattern": {"Regex": PATTERNS["llada"]}}]},
        "model": {"vocab": bytes_of_characters(), "merges": []},
        "added_tokens": [{"content": token, "id": 256 + i, "special": True}
                         for i, token in enumerate(CONTROL_TOKENS)]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return backbone
