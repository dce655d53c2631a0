import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                               # reproducible to the bit

from dataclasses import replace  # noqa: E402

from metastate import MemoryConfig, MetaState  # noqa: E402
from model import TINY, Backbone  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
SHARED = ROOT.parent / "shared" / "golden"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the data sets and vocabularies beside "
                                  "this checkout, which the repository may not hold, are not there")


@pytest.fixture
def backbone() -> Backbone:
    """A frozen random backbone of three layers."""
    torch.manual_seed(0)
    return Backbone(replace(TINY, n_layer=3)).requires_grad_(False).eval()


@pytest.fixture
def memory(backbone) -> MetaState:
    """A memory that matters: as if trained, nothing in it is zero."""
    torch.manual_seed(1)
    memory = MetaState(MemoryConfig(64, n_slots=5, d_slot=32, n_head=4, d_time=16, write_layer=1,
                                    read_layer=2))
    for p in memory.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    return memory
