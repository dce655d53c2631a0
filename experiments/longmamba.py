"""LongMamba (arXiv 2504.16053, ICLR 2025): a training-free filter that keeps Mamba's memory alive
on inputs much longer than those it was trained on.

    python experiments/longmamba.py --seeds 0 1 2      # train, filter, compare: some minutes a seed
    python experiments/longmamba.py --seeds 0 1 2 --plot assets/longmamba.png     # and draw

A channel of Mamba forgets by exp(Delta_t A) at every token. Over the training length L the product
of these decays stays near 1 in some channels, the global ones, and vanishes in others, the local
ones. Over S >> L tokens it vanishes in all of them, and what was remembered is lost. The cure is to
write less: in global channels Delta_t := 0, which skips decay and write at once, wherever Delta_t
is not above a threshold g(S), calibrated so that the kept Delta sum to what they sum to over L.

    one channel   Delta_t:  . | . . | : . | . . . | . : . | . .      S tokens
    filtered                  |     |     |       |       |          the budget of L tokens

Where this departs from the paper or is not settled by it:
- The released code has no Mamba-1 path. For Mamba-1, a channel's decay is the mean over its N
  states, as notes on the paper say. In Mamba-2 a channel is a head, with a single A (H, 1).
- Thresholds are computed for the lengths that are asked for, not read off a grid of lengths.
- The filter begins right above L; the released code begins at 3,000 for L = 2,000.
- Toy scale: two layers, L = 128, one made-up language.

The same with released weights, model.safetensors of state-spaces/mamba-130m or mamba-130m-hf on
huggingface.co (not tried on them), and token ids (1, 16000) of EleutherAI/gpt-neox-20b:

    model = load_mamba(path, MAMBA_130M)
    calibration = calibrate(model, texts, [16000], clamp=0.2)          # texts (5, 2000)
    logits, states = model(ids, rules=make_rules(calibration, 16000, theta=1e-30))

Read MAMBA and LONGMAMBA for the method; the rest is a language to try it on, and a report.
"""
import argparse
import importlib.util
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from eval_gsm8k import wilson  # noqa: E402
from model import blame, check_output, ensure, read_safetensors  # noqa: E402
from sample import SEED, run_program  # noqa: E402

Rule = Callable[[Tensor], Tensor]          # Delta (B, T, E) -> Delta (B, T, E)


# --------------------------------------------------------------------------------------- MAMBA

@dataclass(frozen=True)
class Config:
    d_model: int
    n_layer: int
    vocab_size: int
    d_state: int = 16              # N
    d_conv: int = 4
    expand: int = 2                # channels E = expand * d_model


MAMBA_130M = Config(d_model=768, n_layer=24, vocab_size=50280)


def sequential_scan(x: Tensor, delta: Tensor, A: Tensor, write: Tensor, read: Tensor, h: Tensor
                    ) -> tuple[Tensor, Tensor]:
    """The recurrence of Mamba-1 as it is written, one token after the other:

        h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t          y_t = C_t h_t

    x, delta (B, T, E); A (N, E); write, read (B, T, N): the B_t and C_t above; h (B, N, E).
    Returns y (B, T, E) and the last h. E comes last because neighbours in memory are fast.
    """
    inputs = delta * x
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, None] * A)                       # (B, N, E)
        update = inputs[:, t, None] * write[:, t, :, None]             # (B, N, E)
        h = decay * h + update
        y = (read[:, t, :, None] * h).sum(dim=1)                       # (B, E)
        outputs.append(y)
    return torch.stack(outputs, dim=1), h


def chunked_scan(x: Tensor, delta: Tensor, A: Tensor, write: Tensor, read: Tensor, h: Tensor
                 ) -> tuple[Tensor, Tensor]:
    """sequential_scan in about 3 sqrt(T) steps: K chunks of Q tokens run side by side."""
    n_batch, length, _ = x.shape
    chunk = math.isqrt(length)
    padding = -length % chunk      # with Delta = 0: it neither decays the state nor writes
    pieces = []
    for v in (x, delta, write, read):
        padded = F.pad(v, (0, 0, 0, padding))
        pieces.append(padded.unflatten(1, (-1, chunk)).flatten(0, 1))
    x, delta, write, read = pieces                                     # (B K, Q, E or N)
    # 1. What every chunk gathers, from an empty state.
    empty = h.new_zeros(len(x), *h.shape[1:])                          # (B K, N, E)
    _, gathered = sequential_scan(x, delta, A, write, read, empty)
    gathered = gathered.unflatten(0, (n_batch, -1))                    # (B, K, N, E)
    # 2. The state at the start of every chunk.
    elapsed = delta.sum(dim=1).unflatten(0, (n_batch, -1))             # (B, K, E)
    starts = []
    for k in range(gathered.shape[1]):
        starts.append(h)
        decay = torch.exp(elapsed[:, k, None] * A)                     # (B, N, E)
        h = decay * h + gathered[:, k]
    start = torch.stack(starts, dim=1).flatten(0, 1)                   # (B K, N, E)
    # 3. The chunks once more, from there.
    y, _ = sequential_scan(x, delta, A, write, read, start)            # (B K, Q, E)
    y = y.unflatten(0, (n_batch, -1)).flatten(1, 2)                    # (B, T + padding, E)
    return y[:, :length], h


class Mixer(nn.Module):
    """Convolution over four tokens, then the selective scan, both gated. Names are the file's."""

    def __init__(self, c: Config):
        super().__init__()
        self.d_inner = c.expand * c.d_model
        self.rank = math.ceil(c.d_model / 16)
        self.d_state = c.d_state
        self.in_proj = nn.Linear(c.d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, c.d_conv, groups=self.d_inner)
        self.x_proj = nn.Linear(self.d_inner, self.rank + 2 * c.d_state, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.d_inner)
        rates = torch.arange(1, c.d_state + 1).float()                 # Mamba's own: 1..N
        self.A_log = nn.Parameter(rates.log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, c.d_model, bias=False)
        delta = torch.exp(torch.empty(self.d_inner).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_proj.bias.data = torch.log(torch.expm1(delta))         # softplus undoes it

    def empty_state(self, n_batch: int) -> tuple[Tensor, Tensor]:
        """The inputs that the convolution still sees (B, 3, E), and h (B, N, E)."""
        recent = self.D.new_zeros(n_batch, self.conv1d.kernel_size[0] - 1, self.d_inner)
        h = self.D.new_zeros(n_batch, self.d_state, self.d_inner)
        return recent, h

    def forward(self, u: Tensor, state: tuple[Tensor, Tensor], rule: Rule | None = None
                ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """u (B, T, D), after the tokens that made the state. T = 1 is a step of decoding."""
        recent, h = state
        x, z = self.in_proj(u).chunk(2, dim=-1)                        # (B, T, E) each
        x = torch.cat((recent, x), dim=1)                              # (B, 3 + T, E)
        recent = x[:, -recent.shape[1]:]
        x = F.silu(self.conv1d(x.mT).mT)                               # (B, T, E)
        sizes = (self.rank, self.d_state, self.d_state)
        low, write, read = self.x_proj(x).split(sizes, dim=-1)         # (B, T, R), (B, T, N) twice
        delta = F.softplus(self.dt_proj(low))                          # (B, T, E)
        if rule is not None:
            delta = rule(delta)
        A = -torch.exp(self.A_log).mT                                  # (N, E)
        y, h = chunked_scan(x, delta, A, write, read, h)
        y = y + self.D * x
        return self.out_proj(y * F.silu(z)), (recent, h)


class Layer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.norm = nn.RMSNorm(c.d_model, eps=1e-5)
        self.mixer = Mixer(c)

    def forward(self, x: Tensor, state: tuple, rule: Rule | None) -> tuple[Tensor, tuple]:
        y, state = self.mixer(self.norm(x), state, rule)
        return x + y, state


class Mamba(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)         # its transpose is the head
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.n_layer))
        self.norm_f = nn.RMSNorm(c.d_model, eps=1e-5)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, ids: Tensor, states: list | None = None, rules: list[Rule] | None = None
                ) -> tuple[Tensor, list]:
        """ids (B, T) -> logits (B, T, V), and the states after them. Without states it is a
        prefill; only a prefill is filtered, as in the released code."""
        if states is not None or rules is None:
            rules = [None] * len(self.layers)
        if states is None:
            states = [layer.mixer.empty_state(len(ids)) for layer in self.layers]
        x = self.embedding(ids)                                        # (B, T, D)
        new_states = []
        for layer, state, rule in zip(self.layers, states, rules):
            x, state = layer(x, state, rule)
            new_states.append(state)
        return F.linear(self.norm_f(x), self.embedding.weight), new_states


def load_mamba(path: Path, config: Config) -> Mamba:
    """A checkpoint of state-spaces, original or -hf: they differ in the embedding's name, and the
    tied matrix may stand under either name or both."""
    found = read_safetensors(path)
    weights = {}
    for name, tensor in found.items():
        name = name.removeprefix("backbone.").replace("embeddings.", "embedding.")
        weights[name] = tensor.float()
    head = weights.pop("lm_head.weight", None)
    if head is not None:
        weights.setdefault("embedding.weight", head)
    with torch.device("meta"):
        model = Mamba(config)
    with blame(path, "give the model.safetensors of state-spaces/mamba-130m or mamba-130m-hf"):
        model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


# ----------------------------------------------------------------------------------- LONGMAMBA

@dataclass
class Channels:
    """What is known of the E channels of one layer: (E,) each."""
    decay: Tensor                  # over the training length, clamped
    budget: Tensor                 # sum of Delta over the training length, clamped
    thresholds: dict[int, Tensor]  # g(S) by length S


@dataclass
class Calibration:
    train_length: int
    layers: list[Channels]


@torch.no_grad()
def record_delta(model: Mamba, ids: Tensor) -> list[Tensor]:
    """Delta of every layer, (B, T, E) each."""
    found = []

    def record(delta: Tensor) -> Tensor:
        found.append(delta)
        return delta

    model(ids, rules=[record] * len(model.layers))
    return found


def total_decay(A: Tensor, budget: Tensor) -> Tensor:
    """prod_t exp(Delta_t A) = exp(A sum_t Delta_t), the mean over states and sequences.
    A (N, E), or (1, H) for the heads of Mamba-2; budget (n, E) -> (E,)."""
    return torch.exp(A * budget[:, None]).mean(dim=(0, 1))


def find_threshold(curve: Tensor, length: int) -> Tensor:
    """g (n, E): what a token of length-S input has to exceed. curve (n, L, E): falling Delta."""
    budget = curve.sum(dim=1)                                          # (n, E)
    stretched = F.interpolate(curve.mT, size=length, mode="linear").mT  # (n, S, E)
    spent = stretched.cumsum(dim=1)
    n_within = (spent <= budget[:, None]).sum(dim=1)
    n_kept = n_within + 1                                              # the first sum above it
    just_after = n_kept.clamp(max=length - 1)
    return stretched.gather(1, just_after[:, None]).squeeze(1)


def calibrate(model: Mamba, ids: Tensor, lengths: list[int], clamp: float) -> Calibration:
    """From sequences (n, L) of the training length. clamp: C, the share of a sequence's largest
    Delta that are cut down to the smallest among them, the cap. No threshold is above the cap, so
    on very long inputs a share of about C is kept, which is more than the budget."""
    layers = []
    for layer, delta in zip(model.layers, record_delta(model, ids)):
        curve = delta.sort(dim=1, descending=True).values              # (n, L, E)
        rank = max(1, int(clamp * curve.shape[1]))
        cap = curve[:, rank - 1, None]
        curve = curve.clamp(max=cap)
        budget = curve.sum(dim=1)                                      # (n, E)
        A = -torch.exp(layer.mixer.A_log.detach()).mT
        thresholds = {length: find_threshold(curve, length).mean(dim=0) for length in lengths}
        layers.append(Channels(total_decay(A, budget), budget.mean(dim=0), thresholds))
    return Calibration(ids.shape[1], layers)


def make_filter(threshold: Tensor) -> Rule:
    """Keep what is above the threshold (E,). Of 0 it keeps all: no Delta is below."""
    def keep(delta: Tensor) -> Tensor:                                 # (B, T, E)
        return delta * (delta > threshold)
    return keep


def make_rules(calibration: Calibration, length: int, theta: float) -> list[Rule] | None:
    """One filter a layer; none up to the training length, where nothing is to be repaired."""
    if length <= calibration.train_length:
        return None
    rules = []
    for channels in calibration.layers:
        is_global = channels.decay > theta                             # (E,)
        threshold = channels.thresholds[length] * is_global
        rules.append(make_filter(threshold))
    return rules


# ---------------------------------------------------------------------------------------- TASK

# A made-up language. Words follow each other as a Markov chain of order 1. A sentence is
#     subject  8 to 16 words  VERB  the same subject again
# so the token after VERB needs a memory that is local, yet reaches beyond the convolutions of two
# layers (6 tokens back). One needle, KEY value, lies somewhere, and the last token is QUERY: its
# answer, the value, needs a memory that is global.
N_WORD = 32
N_SUBJECT = 8
N_VALUE = 16
FIRST_SUBJECT = N_WORD
FIRST_VALUE = FIRST_SUBJECT + N_SUBJECT
KEY = FIRST_VALUE + N_VALUE
VERB = KEY + 1
QUERY = KEY + 2
NOTHING = -100                     # not a target; what cross_entropy ignores
SENTENCE = (8, 16)                 # fewest and most words
SUCCESSORS = np.random.default_rng(0).integers(N_WORD, size=(N_WORD, 4))
TOY = Config(d_model=64, n_layer=2, vocab_size=KEY + 3, d_state=8)


def draw_text(rng: np.random.Generator, n: int, length: int,
              sentence: tuple[int, int] = SENTENCE) -> np.ndarray:
    """n texts (n, T) without a needle."""
    tokens = np.empty((n, length), dtype=np.int64)
    tokens[:, 0] = rng.integers(N_WORD, size=n)
    for t in range(1, length):
        choice = rng.integers(SUCCESSORS.shape[1], size=n)
        tokens[:, t] = SUCCESSORS[tokens[:, t - 1], choice]
    for text in tokens:                                                # (T,)
        start = 0
        while start < length:
            n_word = rng.integers(*sentence, endpoint=True)
            subject = FIRST_SUBJECT + rng.integers(N_SUBJECT)
            verb = start + 1 + n_word
            text[start] = subject
            text[verb:verb + 1] = VERB             # slices: empty behind the end of the text
            text[verb + 1:verb + 2] = subject
            start = verb + 2
    return tokens


class Batch(NamedTuple):
    ids: Tensor                    # (n, T)
    text: Tensor                   # (n, T) the next token
    answer: Tensor                 # (n, T) at QUERY, the needle's value


def draw(rng: np.random.Generator, n: int, length: int, query_rate: float = 0.0,
         sentence: tuple[int, int] = SENTENCE) -> Batch:
    """n texts with needle and QUERY, which take the place of words. query_rate, for training:
    the share of words after the needle where the QUERY stands as well."""
    tokens = draw_text(rng, n, length + 1, sentence)
    is_word = tokens < N_WORD                                          # (n, T + 1)
    # 1. The needle, on two words.
    row = np.arange(n)
    is_place = is_word[:, :length - 2] & is_word[:, 1:length - 1]
    needle = (is_place * rng.random(is_place.shape)).argmax(axis=1)    # (n,), any of the places
    value = FIRST_VALUE + rng.integers(N_VALUE, size=n)
    tokens[row, needle] = KEY
    tokens[row, needle + 1] = value
    # 2. The queries.
    is_later = np.arange(length) > needle[:, None] + 1                 # (n, T)
    is_drawn = rng.random((n, length)) < query_rate
    is_query = is_word[:, :length] & is_later & is_drawn
    is_query[:, -1] = True
    tokens[:, :-1][is_query] = QUERY
    # 3. The targets. A query is no text.
    answer = np.where(is_query, value[:, None], NOTHING)
    ids = tokens[:, :-1]
    text = tokens[:, 1:]
    text = np.where((ids == QUERY) | (text == QUERY), NOTHING, text)
    return Batch(torch.tensor(ids), torch.tensor(text), torch.tensor(answer))


def agreement_places(batch: Batch) -> Tensor:
    """Where the next token is the subject again, (n, T) bool."""
    return (batch.ids == VERB) & (batch.text != NOTHING)


# ------------------------------------------------------------------------------------ TRAINING

class Stage(NamedTuple):
    length: int
    steps: int
    learning_rate: float
    query_rate: float
    sentence: tuple[int, int]


# Short first: at length 128 alone, recall may stay at chance for a long time.
STAGES = (Stage(32, 500, 3e-3, 0.25, (2, 8)),
          Stage(128, 400, 2e-3, 0.12, SENTENCE))
TRAIN_LENGTH = STAGES[-1].length
BATCH_SIZE = 16
TEXT_WEIGHT = 0.3


def training_loss(model: Mamba, batch: Batch) -> Tensor:
    """Needle, agreement and text each count by their mean: the first two are rare tokens."""
    logits, _ = model(batch.ids)                                       # (n, T, V)
    places = agreement_places(batch)
    needle = F.cross_entropy(logits.mT, batch.answer)
    agreement = F.cross_entropy(logits[places], batch.text[places])
    text = F.cross_entropy(logits.mT, batch.text)
    return needle + agreement + TEXT_WEIGHT * text


def train(rng: np.random.Generator, stages: tuple[Stage, ...] = STAGES) -> Mamba:
    model = Mamba(TOY)
    for stage in stages:
        rate = stage.learning_rate
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, stage.steps, pct_start=0.1)
        progress = tqdm(range(stage.steps), f"training at length {stage.length}", leave=False)
        for _ in progress:
            batch = draw(rng, BATCH_SIZE, stage.length, stage.query_rate, stage.sentence)
            loss = training_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.set_postfix_str(f"loss {loss.item():.2f}")
    return model.requires_grad_(False)


# ---------------------------------------------------------------------------------- COMPARISON

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
CHOOSE_LENGTH = 2048               # theta and C are chosen at this length alone
THETAS = (1e-5, 1e-3, 1e-2, 5e-2)
CLAMPS = (0.0, 0.02, 0.05, 0.1)
N_CALIBRATE = 32
N_CHOOSE = 32
N_TEST = 64
ARMS = ("vanilla", "LongMamba", "random tokens", "Delta scaled", "local filtered", "all filtered")


def rules_of(arm: str, calibration: Calibration, length: int, theta: float) -> list[Rule] | None:
    """What becomes of Delta in every layer. The arms but LongMamba are controls."""
    rules = make_rules(calibration, length, theta)
    if rules is None or arm == "vanilla":
        return None
    if arm == "LongMamba":
        return rules
    pairs = zip(rules, calibration.layers)
    return [make_control(arm, rule, channels, length, theta) for rule, channels in pairs]


def make_control(arm: str, rule: Rule, channels: Channels, length: int, theta: float) -> Rule:
    """rule: what LongMamba does in this layer."""
    is_global = channels.decay > theta                                 # (E,)
    threshold = channels.thresholds[length]

    def keep_by_chance(delta: Tensor) -> Tensor:                       # (B, T, E)
        rate = (rule(delta) > 0).float().mean(dim=1, keepdim=True)     # (B, 1, E)
        return delta * (torch.rand_like(delta) < rate)

    def scale(delta: Tensor) -> Tensor:
        to_budget = channels.budget / delta.sum(dim=1, keepdim=True)   # (B, 1, E)
        return delta * torch.where(is_global, to_budget, 1)

    return {"random tokens": keep_by_chance, "Delta scaled": scale,
            "local filtered": make_filter(threshold * ~is_global),
            "all filtered": make_filter(threshold)}[arm]


def evaluate(model: Mamba, batch: Batch, rules: list[Rule] | None) -> dict[str, Tensor]:
    """By sequence, (n,): is the needle's value right, the share of subjects that are right, the
    losses of the next token and of the value."""
    logits = [model(ids, rules=rules)[0] for ids in batch.ids.split(4)]
    logits = torch.cat(logits)                                         # (n, T, V)
    guess = logits.argmax(dim=-1)                                      # (n, T)
    value = batch.answer[:, -1]
    places = agreement_places(batch)
    right = (guess == batch.text) & places
    loss = F.cross_entropy(logits.mT, batch.text, reduction="none")    # 0 where there is no target
    n_target = (batch.text != NOTHING).sum(dim=1)
    return {
        "needle": (guess[:, -1] == value).float(),
        "agreement": right.sum(dim=1) / places.sum(dim=1),
        "text": loss.sum(dim=1) / n_target,
        "answer": F.cross_entropy(logits[:, -1], value, reduction="none"),
    }


def choose(model: Mamba, calibrations: dict[float, Calibration], batch: Batch
           ) -> tuple[float, float]:
    """The theta and C with which LongMamba has the least loss of answer and text together."""
    losses = {}
    for clamp, calibration in calibrations.items():
        for theta in THETAS:
            scores = evaluate(model, batch, make_rules(calibration, CHOOSE_LENGTH, theta))
            loss = scores["answer"].mean() + scores["text"].mean()
            losses[theta, clamp] = loss.item()
    return min(losses, key=losses.get)


def spent_budget(model: Mamba, calibration: Calibration, theta: float, ids: Tensor) -> float:
    """Sum of the Delta that LongMamba keeps, over the budget: the mean of the global channels."""
    rules = make_rules(calibration, ids.shape[1], theta)
    shares = []
    for delta, rule, channels in zip(record_delta(model, ids), rules, calibration.layers):
        spent = rule(delta).sum(dim=1) / channels.budget               # (n, E)
        shares.append(spent[:, channels.decay > theta].flatten())
    return torch.cat(shares).mean().item()


Scores = dict[tuple[str, int], list[dict[str, Tensor]]]    # by arm and length; one entry a seed


def compare(model: Mamba, rng: np.random.Generator, scores: Scores) -> None:
    """Adds to the scores: every arm at every length, with the theta and C best for LongMamba."""
    # Plain text, as in the paper: with a needle in every text the threshold of long inputs is at
    # the needle's own Delta, and many channels miss it.
    texts = torch.tensor(draw_text(rng, N_CALIBRATE, TRAIN_LENGTH))
    calibrations = {clamp: calibrate(model, texts, LENGTHS[1:], clamp) for clamp in CLAMPS}
    theta, clamp = choose(model, calibrations, draw(rng, N_CHOOSE, CHOOSE_LENGTH))
    calibration = calibrations[clamp]
    n_global = [int((layer.decay > theta).sum()) for layer in calibration.layers]
    print(f"theta {theta:g}, C {clamp:.0%}; global channels by layer: {n_global}")
    for length in LENGTHS:
        batch = draw(rng, N_TEST, length)
        for arm in tqdm(ARMS, f"testing at length {length}", leave=False):
            rules = rules_of(arm, calibration, length, theta)
            scores[arm, length].append(evaluate(model, batch, rules))
        right = scores["LongMamba", length][-1]["needle"].mean()
        print(f"length {length}: LongMamba recalls {right:.1%}", end="")
        if length > TRAIN_LENGTH:
            spent = spent_budget(model, calibration, theta, batch.ids[:8])
            print(f" and keeps {spent:.2f} of the budget", end="")
        print()


# -------------------------------------------------------------------------------------- REPORT

TITLES = {"needle": "needle recalled, %", "agreement": "subject after VERB, %",
          "text": "loss of the text, nats"}
STYLES = dict(zip(ARMS, ("k--", "C0o-", "C1s-", "C2d-", "C4v-", "C3^-")))


def pooled(scores: Scores, arm: str, name: str) -> list[np.ndarray]:
    """By length, the values of all sequences of all seeds."""
    return [torch.cat([found[name] for found in scores[arm, length]]).numpy()
            for length in LENGTHS]


def cell(values: np.ndarray, name: str) -> str:
    """A mean, and of the needle its 95 % interval."""
    mean = values.mean()
    if name == "text":
        return f"{mean:.3f}"
    if name == "agreement":
        return f"{100 * mean:.1f}"
    low, high = wilson(values.sum(), len(values))
    return f"{100 * mean:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def report(scores: Scores) -> None:
    for name, title in TITLES.items():
        print(f"\n| {title} | {' | '.join(map(str, LENGTHS))} |")
        print("|---" * (len(LENGTHS) + 1) + "|")
        for arm in ARMS:
            cells = [cell(values, name) for values in pooled(scores, arm, name)]
            print(f"| {arm} | {' | '.join(cells)} |")


def plot(scores: Scores, path: Path) -> None:
    """Needle, with 95 % intervals, and agreement by length."""
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for arm, style in STYLES.items():
        needle = pooled(scores, arm, "needle")
        mean = np.mean(needle, axis=1)                                 # (lengths,)
        low, high = np.transpose([wilson(values.sum(), len(values)) for values in needle])
        bars = np.maximum([mean - low, high - mean], 0)                # rounding: 1 and its end
        left.errorbar(LENGTHS, 100 * mean, 100 * bars, fmt=style, capsize=2, label=arm)
        agreement = np.mean(pooled(scores, arm, "agreement"), axis=1)
        right.plot(LENGTHS, 100 * agreement, style)
    left.set_title("needle recalled: a global memory")
    right.set_title("subject after VERB: a local memory")
    left.set_ylabel("right (%)")
    left.legend()
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(LENGTHS, LENGTHS)
        axis.set_xlabel(f"length of the input (trained at {TRAIN_LENGTH})")
    figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small Mamba and test LongMamba on it.")
    parser.add_argument("--seeds", type=SEED, nargs="+", default=[0], help="one run each")
    parser.add_argument("--plot", type=Path, help="a PNG file to draw; needs matplotlib")
    args = parser.parse_args()
    if args.plot:
        check_output(args.plot)
        ensure(importlib.util.find_spec("matplotlib"), "--plot needs matplotlib; pip install it")
    torch.set_num_threads(1)               # tensors are small: more threads do not pay
    scores = defaultdict(list)
    for seed in args.seeds:
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        start = time.time()
        model = train(rng)
        print(f"seed {seed}, trained in {time.time() - start:.0f} s")
        compare(model, rng, scores)
    report(scores)
    if args.plot:
        plot(scores, args.plot)


if __name__ == "__main__":
    run_program(main, if_interrupted="nothing is kept")
