"""What the tests share: one thread, so that results are the same to the bit, and small models."""
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"             # read when numpy and torch are imported, in children too
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

from metastate import MemoryConfig, MetaState  # noqa: E402
from model import TINY, Backbone  # noqa: E402

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"
SHARED = ROOT.parent / "shared" / "golden"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the data sets and vocabularies "
                                  "beside this checkout, which the repository may not hold, are "
                                  "not there")


@contextmanager
def at_most(seconds: int):
    """Fail, instead of waiting on, where the block takes longer."""
    def give_up(*_):
        pytest.fail(f"not done after {seconds} s")     # no Exception: nobody catches it

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def backbone() -> Backbone:
    """A frozen random backbone of three layers."""
    torch.manual_seed(0)
    return Backbone(replace(TINY, n_layer=3)).requires_grad_(False).eval()


@pytest.fixture
def memory(backbone) -> MetaState:
    """A memory that matters: as if trained, nothing in it is zero."""
    torch.manual_seed(1)
    memory = MetaState(MemoryConfig(64, n_slots=5, d_slot=32, n_head=4, d_time=16))
    for p in memory.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    return memory
