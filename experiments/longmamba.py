"""LongMamba (arXiv 2504.16053, ICLR 2025): a training-free filter that keeps Mamba's memory alive
on inputs much longer than those it was trained on.

    python experiments/longmamba.py --seeds 0 1 2      # train, filter, compare; some minutes a seed
    python experiments/longmamba.py --plot             # draw assets/longmamba.png from the results

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
"""
import argparse
import json
import math
import sys
import time
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

from model import InputError, blame, read_safetensors, write_atomically  # noqa: E402

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
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, None] * A)                       # (B, N, E)
        update = (delta * x)[:, t, None] * write[:, t, :, None]        # (B, N, E)
        h = decay * h + update
        y = (read[:, t, :, None] * h).sum(dim=1)                       # (B, E)
        outputs.append(y)
    return torch.stack(outputs, dim=1), h


def chunked_scan(x: Tensor, delta: Tensor, A: Tensor, write: Tensor, read: Tensor, h: Tensor
                 ) -> tuple[Tensor, Tensor]:
    """sequential_scan in about 2 sqrt(T) steps: K chunks of Q tokens run side by side."""
    length = x.shape[1]
    chunk = math.isqrt(length)
    padding = -length % chunk      # with Delta = 0: it neither decays the state nor writes

    def cut(v: Tensor) -> Tensor:
        padded = F.pad(v, (0, 0, 0, padding))
        return padded.unflatten(1, (-1, chunk))                        # (B, K, Q, E or N)

    inputs = cut(delta * x)
    delta = cut(delta)
    write = cut(write)
    read = cut(read)
    n_chunk = delta.shape[1]
    # 1. Every chunk by itself, from an empty state.
    inner = torch.zeros_like(h)[:, None].expand(-1, n_chunk, -1, -1)   # (B, K, N, E)
    outputs = []
    for q in range(chunk):
        decay = torch.exp(delta[:, :, q, None] * A)
        update = inputs[:, :, q, None] * write[:, :, q, :, None]
        inner = decay * inner + update
        outputs.append((read[:, :, q, :, None] * inner).sum(dim=2))    # (B, K, E)
    # 2. The state at the start of every chunk.
    elapsed = delta.cumsum(dim=2)                                      # (B, K, Q, E)
    starts = []
    for k in range(n_chunk):
        starts.append(h)
        decay = torch.exp(elapsed[:, k, -1, None] * A)
        h = decay * h + inner[:, k]
    start = torch.stack(starts, dim=1)                                 # (B, K, N, E)
    # 3. What that state still adds to every output of the chunk.
    for q in range(chunk):
        carried = torch.exp(elapsed[:, :, q, None] * A) * start
        late = (read[:, :, q, :, None] * carried).sum(dim=2)
        outputs[q] = outputs[q] + late                                 # (B, K, E)
    y = torch.stack(outputs, dim=2).flatten(1, 2)                      # (B, T + padding, E)
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
        self.A_log = nn.Parameter(torch.empty(self.d_inner, c.d_state))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, c.d_model, bias=False)

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

    def reset_parameters(self) -> None:
        """Mamba's own: decay rates 1..N, and Delta from 0.001 to 0.1 before it sees a token."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        for layer in self.layers:
            m = layer.mixer
            rates = torch.arange(1, m.d_state + 1).float()
            log_delta = torch.empty(m.d_inner).uniform_(math.log(1e-3), math.log(1e-1))
            delta = torch.exp(log_delta)
            bound = m.rank ** -0.5
            with torch.no_grad():
                m.A_log.copy_(rates.log().expand(m.d_inner, -1))
                m.dt_proj.weight.uniform_(-bound, bound)
                m.dt_proj.bias.copy_(torch.log(torch.expm1(delta)))    # softplus undoes it
                m.out_proj.weight.mul_(len(self.layers) ** -0.5)

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
    handles = []

    def record(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        found.append(F.softplus(output))

    for layer in model.layers:
        handle = layer.mixer.dt_proj.register_forward_hook(record)
        handles.append(handle)
    model(ids)
    for handle in handles:
        handle.remove()
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
    Delta that are cut down to the smallest among them."""
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


ARMS = ("LongMamba", "random tokens", "Delta scaled", "local filtered", "all filtered")


def make_rule(channels: Channels, length: int, theta: float, arm: str) -> Rule:
    """What becomes of one layer's Delta. The first arm is the method, the others are controls."""
    touched = channels.decay > theta                                   # (E,) the global ones
    if arm == "local filtered":
        touched = ~touched
    if arm == "all filtered":
        touched = torch.ones_like(touched)

    def rule(delta: Tensor) -> Tensor:                                 # (B, T, E)
        kept = delta > channels.thresholds[length]
        if arm == "random tokens":
            rate = kept.float().mean(dim=1, keepdim=True)
            kept = torch.rand_like(delta) < rate
        changed = delta * kept
        if arm == "Delta scaled":
            changed = delta * channels.budget / delta.sum(dim=1, keepdim=True)
        return torch.where(touched, changed, delta)
    return rule


def make_rules(calibration: Calibration, length: int, theta: float, arm: str = "LongMamba"
               ) -> list[Rule] | None:
    """One rule a layer; none up to the training length, where nothing is to be repaired."""
    if length <= calibration.train_length:
        return None
    return [make_rule(channels, length, theta, arm) for channels in calibration.layers]


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


class Batch(NamedTuple):
    ids: Tensor                    # (n, T)
    text: Tensor                   # (n, T) the next token
    answer: Tensor                 # (n, T) at QUERY, the needle's value


def draw(rng: np.random.Generator, n: int, length: int, n_query: int = 1,
         sentence: tuple[int, int] = SENTENCE) -> Batch:
    """n sequences. More than one query, for training, stand at random words after the needle."""
    tokens = np.empty((n, length + 1), dtype=np.int64)
    tokens[:, 0] = rng.integers(N_WORD, size=n)
    for t in range(length):
        choice = rng.integers(SUCCESSORS.shape[1], size=n)
        tokens[:, t + 1] = SUCCESSORS[tokens[:, t], choice]
    answer = np.full((n, length), NOTHING)
    for i in range(n):
        lay_sentences(tokens[i], rng, sentence)
        hide_needle(tokens[i], answer[i], rng, n_query)
    ids = tokens[:, :-1]
    text = tokens[:, 1:]
    text = np.where((ids == QUERY) | (text == QUERY), NOTHING, text)
    return Batch(torch.tensor(ids), torch.tensor(text), torch.tensor(answer))


def lay_sentences(tokens: np.ndarray, rng: np.random.Generator, sentence: tuple[int, int]) -> None:
    """Put the frames of sentences over a chain of words."""
    start = 0
    while start < len(tokens):
        n_word = rng.integers(sentence[0], sentence[1] + 1)
        subject = FIRST_SUBJECT + rng.integers(N_SUBJECT)
        verb_at = start + n_word + 1
        tokens[start] = subject
        tokens[verb_at:verb_at + 1] = VERB
        tokens[verb_at + 1:verb_at + 2] = subject
        start = verb_at + 2


def hide_needle(tokens: np.ndarray, answer: np.ndarray, rng: np.random.Generator, n_query: int
                ) -> None:
    """Needle and queries take the place of words, never of a sentence's frame."""
    last = len(answer) - 1
    is_word = tokens < N_WORD
    pairs = np.flatnonzero(is_word[:last - 1] & is_word[1:last])
    needle = rng.choice(pairs)
    value = FIRST_VALUE + rng.integers(N_VALUE)
    tokens[needle] = KEY
    tokens[needle + 1] = value
    free = needle + 2 + np.flatnonzero(is_word[needle + 2:last])
    queries = rng.permutation(free)[:n_query - 1]
    queries = np.append(queries, last)
    tokens[queries] = QUERY
    answer[queries] = value


def agreement_places(batch: Batch) -> Tensor:
    """Where the next token is a subject again, (n, T) bool."""
    return (batch.ids == VERB) & (batch.text >= FIRST_SUBJECT) & (batch.text < FIRST_VALUE)


# ------------------------------------------------------------------------------------ TRAINING

class Stage(NamedTuple):
    length: int
    steps: int
    learning_rate: float
    n_query: int
    sentence: tuple[int, int]


# Short first: at length 128 alone, recall may stay at chance for a long time.
STAGES = (Stage(32, 500, 3e-3, 4, (2, 8)),
          Stage(128, 400, 2e-3, 7, SENTENCE))
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


def train(seed: int, stages: tuple[Stage, ...] = STAGES) -> Mamba:
    torch.manual_seed(seed)
    rng = generator(seed, "train")
    model = Mamba(TOY)
    model.reset_parameters()
    for stage in stages:
        rate = stage.learning_rate
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, stage.steps, pct_start=0.1)
        progress = tqdm(range(stage.steps), f"seed {seed}, length {stage.length}", leave=False)
        for _ in progress:
            batch = draw(rng, BATCH_SIZE, stage.length, stage.n_query, stage.sentence)
            loss = training_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.set_postfix_str(f"loss {loss.item():.2f}")
    return model.requires_grad_(False)


def generator(seed: int, purpose: str) -> np.random.Generator:
    """Sequences of their own for every purpose."""
    purposes = ("train", "calibrate", "choose", "test")
    return np.random.default_rng((seed, purposes.index(purpose)))


# ---------------------------------------------------------------------------------- COMPARISON

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
CHOOSE_LENGTH = 1024               # theta and C are chosen at this length alone
THETAS = (1e-5, 1e-3, 1e-2, 5e-2)
CLAMPS = (0.0, 0.02, 0.05, 0.1)
N_CALIBRATE = 32
N_CHOOSE = 32
N_TEST = 64
TOKENS_AT_ONCE = 8192


def evaluate(model: Mamba, batch: Batch, rules: list[Rule] | None = None) -> dict[str, list]:
    """By sequence: needle (1: right), agreement (share of subjects that are right), text and answer
    (losses of the next token and of the needle's value)."""
    size = max(1, TOKENS_AT_ONCE // batch.ids.shape[1])
    scores = {"needle": [], "agreement": [], "text": [], "answer": []}
    for pieces in zip(*(field.split(size) for field in batch)):
        part = Batch(*pieces)
        logits, _ = model(part.ids, rules=rules)
        for name, values in score(logits, part).items():
            scores[name] += values.tolist()
    return scores


def score(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    value = batch.answer[:, -1]
    guess = logits.argmax(dim=-1)                                      # (n, T)
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


class Setting(NamedTuple):
    theta: float
    clamp: float


def choose(model: Mamba, calibrations: dict[float, Calibration], batch: Batch, arm: str) -> Setting:
    """The setting with the least loss of answer and text together."""
    losses = {}
    for clamp, calibration in calibrations.items():
        for theta in THETAS:
            rules = make_rules(calibration, batch.ids.shape[1], theta, arm)
            scores = evaluate(model, batch, rules)
            loss = np.mean(scores["answer"]) + np.mean(scores["text"])
            losses[Setting(theta, clamp)] = loss
    return min(losses, key=losses.get)


def compare(model: Mamba, seed: int) -> dict:
    """Scores of vanilla Mamba and of every arm at every length, all arms with the setting that is
    best for LongMamba; and at the longest, every control with the one that is best for itself."""
    sequences = draw(generator(seed, "calibrate"), N_CALIBRATE, TRAIN_LENGTH).ids
    longer = [length for length in LENGTHS if length > TRAIN_LENGTH]
    calibrations = {clamp: calibrate(model, sequences, longer, clamp) for clamp in CLAMPS}
    validation = draw(generator(seed, "choose"), N_CHOOSE, CHOOSE_LENGTH)
    settings = {}
    for arm in tqdm(ARMS, f"seed {seed}, choosing", leave=False):
        settings[arm] = choose(model, calibrations, validation, arm)
    theta, clamp = settings["LongMamba"]
    calibration = calibrations[clamp]
    rng = generator(seed, "test")
    scores = {arm: {} for arm in ("vanilla", *ARMS)}
    for length in tqdm(LENGTHS, f"seed {seed}, testing", leave=False):
        batch = draw(rng, N_TEST, length)
        scores["vanilla"][str(length)] = evaluate(model, batch)
        for arm in ARMS:
            rules = make_rules(calibration, length, theta, arm)
            scores[arm][str(length)] = evaluate(model, batch, rules)
    for arm in ARMS[1:]:                   # batch and length are still the longest
        own = settings[arm]
        rules = make_rules(calibrations[own.clamp], length, own.theta, arm)
        scores[f"{arm}, own setting"] = {str(length): evaluate(model, batch, rules)}
    n_global = [int((layer.decay > theta).sum()) for layer in calibration.layers]
    return {"settings": settings, "n_global": n_global, "scores": scores}


# -------------------------------------------------------------------------------------- REPORT

RESULTS = Path("out/longmamba/results.json")
PICTURE = ROOT / "assets" / "longmamba.png"
TITLES = {"needle": "needle recalled, % [95 % interval]", "agreement": "subject after VERB, %",
          "text": "loss of the text, nats"}
STYLE = {"vanilla": "k--", "LongMamba": "C0o-", "random tokens": "C1s-", "Delta scaled": "C2d-",
         "local filtered": "C4v-", "all filtered": "C3^-"}


def wilson(right: np.ndarray) -> tuple[float, float]:
    """95 % interval of a share, for n sequences that are right or wrong."""
    n = len(right)
    z2 = 1.96 ** 2
    centre = (right.sum() + z2 / 2) / (n + z2)
    variance = n * right.mean() * (1 - right.mean())
    half = 1.96 * math.sqrt(variance + z2 / 4) / (n + z2)
    return centre - half, centre + half


def pooled(results: dict, arm: str, length: int, name: str) -> np.ndarray:
    """The values of all sequences of all seeds."""
    scores = [run["scores"][arm][str(length)] for run in results.values()]
    return np.concatenate([by_name[name] for by_name in scores])


def cell(results: dict, arm: str, length: int, name: str) -> str:
    if str(length) not in next(iter(results.values()))["scores"][arm]:
        return ""                          # controls with their own setting: the longest alone
    values = pooled(results, arm, length, name)
    mean = values.mean()
    if name == "text":
        return f"{mean:.3f}"
    if name == "agreement":
        return f"{100 * mean:.1f}"
    low, high = wilson(values)
    return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def report(results: dict) -> None:
    for seed, run in results.items():
        print(f"seed {seed}: trained in {run['seconds']:.0f} s; by layer, {run['n_global']} of "
              f"{TOY.expand * TOY.d_model} channels are global")
        for arm, (theta, clamp) in run["settings"].items():
            print(f"    best for {arm}: theta {theta:g}, C {100 * clamp:g} %")
    arms = next(iter(results.values()))["scores"]
    for name, title in TITLES.items():
        print(f"\n| {title} | {' | '.join(map(str, LENGTHS))} |")
        print("|---" * (len(LENGTHS) + 1) + "|")
        for arm in arms:
            cells = [cell(results, arm, length, name) for length in LENGTHS]
            print(f"| {arm} | {' | '.join(cells)} |")


def plot(results: dict) -> None:
    """Needle, with 95 % intervals, and agreement by length."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError("the picture needs matplotlib; pip install matplotlib")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for arm, style in STYLE.items():
        needle = [100 * pooled(results, arm, length, "needle") for length in LENGTHS]
        mean = np.mean(needle, axis=1)
        ends = [wilson(values / 100) for values in needle]
        low, high = 100 * np.array(ends).T
        bars = np.maximum([mean - low, high - mean], 0)    # 100 % and its end may differ by a bit
        left.errorbar(LENGTHS, mean, bars, fmt=style, capsize=2, label=arm)
        agreement = [100 * pooled(results, arm, length, "agreement") for length in LENGTHS]
        right.plot(LENGTHS, np.mean(agreement, axis=1), style)
    left.set_title("needle recalled: a global memory")
    right.set_title("subject after VERB: a local memory")
    left.set_ylabel("right (%)")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(LENGTHS, LENGTHS)
        axis.set_xlabel(f"length of the input (trained at {TRAIN_LENGTH})")
    left.legend()
    figure.tight_layout()
    with write_atomically(PICTURE) as file:
        figure.savefig(file, dpi=110, format="png")
    print(f"{PICTURE} is drawn")


# ---------------------------------------------------------------------------------------- MAIN

def seed_number(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2 ** 32:
        raise ValueError
    return value


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)               # tensors are small: more threads do not pay
    if args.plot:
        with blame(RESULTS, "make it with: python experiments/longmamba.py --seeds 0 1 2"):
            plot(json.loads(RESULTS.read_text()))
        return
    with blame(RESULTS.parent, "run where a folder can be made"):
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
    results = {}
    for seed in args.seeds:
        start = time.time()
        model = train(seed)
        seconds = time.time() - start
        torch.manual_seed(seed)            # for the random tokens
        results[str(seed)] = {"seconds": seconds, **compare(model, seed)}
        with write_atomically(RESULTS) as file:
            file.write(json.dumps(results).encode())
    report(results)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small Mamba and test LongMamba on it.")
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0], help="one run each")
    parser.add_argument("--plot", action="store_true", help="only draw the picture of the last run")
    try:
        run(parser.parse_args())
    except InputError as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
