"""LongMamba (arXiv 2504.16053, ICLR 2025), from scratch. It is here because it is the other system
of this project's source documents: a fixed-size memory, as MetaState's slots are, with the opposite
cure. MetaState learns what to keep; LongMamba trains nothing and writes less.

    python experiments/longmamba.py --seeds 0 1 2 --plot longmamba.svg     # some minutes a seed

A channel of Mamba forgets by exp(Delta_t A) at every token. Over the training length L the product
of these decays stays near 1 in some channels, the global ones, and vanishes in others, the local
ones. Over S >> L tokens it vanishes in all of them, and what was remembered is lost. The cure: in
global channels Delta_t := 0, which skips decay and write at once, wherever Delta_t is not above a
threshold g(S), calibrated so that the kept Delta sum to their budget, what they sum to over L.

    one channel   Delta_t:  . | . . | : . | . . . | . : . | . .      S tokens
    filtered                  |     |     |       |       |          the budget of L tokens

Where this departs from the paper or is not settled by it: the released code has no Mamba-1 path;
here a channel's decay is the mean over its N states, as notes on the paper say (in Mamba-2 a
channel is a head, with a single A). The filter begins right above L, not at 3,000 for L = 2,000.
theta and C have to keep the budget at the longest length; the paper tunes them by score alone.
The model is a toy, with the parameter names of state-spaces; no released weights were tried.
"""
import argparse
import math
import sys
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sample import SEED, run_program  # noqa: E402

# --------------------------------------------------------------------------------------- MAMBA

# B sequences, T tokens, D width of the residual stream, E = 2 D channels, N states of a channel,
# Delta (B, T, E) how much a channel decays and writes at a token, A (N, E) < 0 how fast.
Rule = Callable[[Tensor], Tensor]          # Delta (B, T, E) -> Delta (B, T, E)
D_CONV = 4                                 # tokens that the convolution sees


class Config(NamedTuple):
    d_model: int                   # D
    n_layer: int
    vocab_size: int
    d_state: int                   # N


def scan(x: Tensor, delta: Tensor, A: Tensor, write: Tensor, read: Tensor, h: Tensor
         ) -> tuple[Tensor, Tensor]:
    """The recurrence of Mamba-1, one token after the other, to y and the last h:

        h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t          y_t = C_t h_t

    x, delta, y (B, T, E); A (N, E); write, read: the B_t and C_t above, (B, T, N); h (B, N, E).
    """
    decays = torch.exp(delta[:, :, None] * A)                          # (B, T, N, E)
    updates = (delta * x)[:, :, None] * write[..., None]               # (B, T, N, E)
    states = []
    for decay, update in zip(decays.unbind(dim=1), updates.unbind(dim=1)):
        h = decay * h + update
        states.append(h)
    y = read[:, :, None] @ torch.stack(states, dim=1)                  # (B, T, 1, E)
    return y.squeeze(2), h


class State(NamedTuple):
    """What one layer hands on, of the same size after any number of tokens; and its last Delta."""
    recent: Tensor                 # (B, 3, E) the inputs that the convolution still sees
    h: Tensor                      # (B, N, E)
    delta: Tensor | None = None    # (B, T, E) as the scan had it, filtered or not


class Mixer(nn.Module):
    """Convolution over four tokens, then the selective scan, both gated. Names are the file's."""

    def __init__(self, c: Config):
        super().__init__()
        self.d_inner = 2 * c.d_model                                   # E
        self.sizes = math.ceil(c.d_model / 16), c.d_state, c.d_state   # R of low rank, N, N
        self.in_proj = nn.Linear(c.d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, D_CONV, groups=self.d_inner)
        self.x_proj = nn.Linear(self.d_inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(self.sizes[0], self.d_inner)
        rates = torch.arange(1, c.d_state + 1).float()                 # Mamba's own: 1..N
        self.A_log = nn.Parameter(rates.log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, c.d_model, bias=False)
        delta = torch.exp(torch.empty(self.d_inner).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_proj.bias.data = torch.log(torch.expm1(delta))         # softplus undoes it

    def forward(self, u: Tensor, state: State | None, rule: Rule | None) -> tuple[Tensor, State]:
        """u (B, T, D), after the tokens that made the state; without one, the first tokens."""
        if state is None:
            shapes = (len(u), D_CONV - 1, self.d_inner), (len(u), self.sizes[1], self.d_inner)
            state = State(*map(u.new_zeros, shapes))
        x, z = self.in_proj(u).chunk(2, dim=-1)                        # (B, T, E) each
        x = torch.cat((state.recent, x), dim=1)                        # (B, 3 + T, E)
        recent = x[:, 1 - D_CONV:]
        x = F.silu(self.conv1d(x.mT).mT)                               # (B, T, E)
        low, write, read = self.x_proj(x).split(self.sizes, dim=-1)    # (B, T, R), (B, T, N) twice
        delta = F.softplus(self.dt_proj(low))                          # (B, T, E)
        if rule is not None:
            delta = rule(delta)
        A = -torch.exp(self.A_log).mT                                  # (N, E)
        y, h = scan(x, delta, A, write, read, state.h)
        y = y + self.D * x
        return self.out_proj(y * F.silu(z)), State(recent, h, delta.detach())


class Mamba(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)         # its transpose is the head
        self.norm_f = nn.RMSNorm(c.d_model, eps=1e-5)
        self.layers = nn.ModuleList()
        for _ in range(c.n_layer):
            norm = nn.RMSNorm(c.d_model, eps=1e-5)
            self.layers.append(nn.ModuleDict({"norm": norm, "mixer": Mixer(c)}))
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, ids: Tensor, states: list[State] | None = None,
                rules: list[Rule] | None = None) -> tuple[Tensor, list[State]]:
        """ids (B, T), after the tokens that made the states -> logits (B, T, V), and the states
        after them. rules, one a layer, filter Delta: give them while a prompt is read, and none
        while an answer is decoded, as in the released code."""
        states = states or [None] * len(self.layers)
        rules = rules or [None] * len(self.layers)
        x = self.embedding(ids)                                        # (B, T, D)
        new_states = []
        for layer, state, rule in zip(self.layers, states, rules):
            y, state = layer["mixer"](layer["norm"](x), state, rule)
            x = x + y
            new_states.append(state)
        return F.linear(self.norm_f(x), self.embedding.weight), new_states


# ----------------------------------------------------------------------------------- LONGMAMBA

class Channels(NamedTuple):
    """What is known of the E channels of one layer: (E,) each."""
    decay: Tensor                  # over the training length, clamped
    budget: Tensor                 # sum of Delta over the training length, clamped
    thresholds: dict[int, Tensor]  # g(S) by length S


def total_decay(A: Tensor, budget: Tensor) -> Tensor:
    """prod_t exp(Delta_t A) = exp(A sum_t Delta_t), the mean over states and sequences.
    A (N, E), or (1, H) for the heads of Mamba-2; budget (n, E) -> (E,)."""
    return torch.exp(A * budget[:, None]).mean(dim=(0, 1))


def find_threshold(curve: Tensor, length: int) -> Tensor:
    """g (n, E): what a token of length-S input has to exceed. curve (n, L, E): falling Delta."""
    budget = curve.sum(dim=1)                                          # (n, E)
    if length <= curve.shape[1]:
        return torch.zeros_like(budget)            # nothing is to be repaired: every Delta is above
    stretched = F.interpolate(curve.mT, size=length, mode="linear").mT  # (n, S, E)
    n_within = (stretched.cumsum(dim=1) <= budget[:, None]).sum(dim=1)
    n_kept = n_within + 1                          # the sum of these first exceeds the budget
    return stretched.gather(1, n_kept.clamp(max=length - 1)[:, None]).squeeze(1)


@torch.no_grad()
def calibrate(model: Mamba, ids: Tensor, lengths: tuple[int, ...], clamp: float) -> list[Channels]:
    """From sequences (n, L) of the training length. clamp: C, the share of a sequence's largest
    Delta that are cut down to the smallest among them, the cap. No threshold is above the cap, so
    a share of about C is kept at any length: where C > L / S, that is more than the budget."""
    _, states = model(ids)
    calibration = []
    for layer, state in zip(model.layers, states):
        curve = state.delta.sort(dim=1, descending=True).values        # (n, L, E)
        rank = max(1, int(clamp * curve.shape[1]))
        curve = curve.clamp(max=curve[:, rank - 1, None])
        budget = curve.sum(dim=1)                                      # (n, E)
        A = -torch.exp(layer["mixer"].A_log).mT
        thresholds = {length: find_threshold(curve, length).mean(dim=0) for length in lengths}
        calibration.append(Channels(total_decay(A, budget), budget.mean(dim=0), thresholds))
    return calibration


def make_rule(channels: Channels, length: int, theta: float) -> Rule:
    """The filter of one layer."""
    is_global = channels.decay > theta                                 # (E,)
    threshold = channels.thresholds[length] * is_global
    return lambda delta: delta * (delta > threshold)                   # every Delta is above 0


# ---------------------------------------------------------------------------------------- TASK

# A made-up language. Words follow each other as a Markov chain of order 1. A sentence is
#     subject  11 words  VERB  the same subject again
# so the token after VERB needs a memory that is local, yet reaches beyond the convolutions of two
# layers (6 tokens back). One needle, KEY value, lies somewhere, and the last token is QUERY: its
# answer, the value, needs a memory that is global.
TRAIN_LENGTH = 128                 # L
LENGTHS = (128, 512, 1024, 2048, 4096)
SENTENCE = 14                      # tokens
N_WORD, N_SUBJECT, N_VALUE = 32, 8, 16
FIRST_SUBJECT, FIRST_VALUE = N_WORD, N_WORD + N_SUBJECT
KEY, VERB, QUERY = range(FIRST_VALUE + N_VALUE, FIRST_VALUE + N_VALUE + 3)
NOTHING = -100                     # not a target; what cross_entropy ignores
SUCCESSORS = np.random.default_rng(0).integers(N_WORD, size=(N_WORD, 4))
TOY = Config(d_model=64, n_layer=2, vocab_size=QUERY + 1, d_state=8)


def draw_text(rng: np.random.Generator, n: int, length: int) -> np.ndarray:
    """n texts (n, T) without a needle."""
    tokens = rng.integers(N_WORD, size=(n, length))
    for t in range(1, length):
        choice = rng.integers(SUCCESSORS.shape[1], size=n)
        tokens[:, t] = SUCCESSORS[tokens[:, t - 1], choice]
    for start in range(0, length, SENTENCE):
        sentence = tokens[:, start:start + SENTENCE]   # a view, shorter at the end of the text
        sentence[:, ::SENTENCE - 1] = FIRST_SUBJECT + rng.integers(N_SUBJECT, size=(n, 1))
        sentence[:, SENTENCE - 2:SENTENCE - 1] = VERB
    return tokens


def draw(rng: np.random.Generator, n: int, length: int, query_rate: float = 0.0
         ) -> tuple[Tensor, Tensor]:
    """n texts with needle and QUERY, which take the place of words: ids, targets, (n, T) each.
    query_rate, for training: the share of words after the needle that are QUERY as well."""
    tokens = draw_text(rng, n, length + 1)
    is_word = tokens < N_WORD                                          # (n, T + 1)
    row = np.arange(n)
    is_place = is_word[:, :length - 2] & is_word[:, 1:length - 1]
    needle = (is_place * rng.random(is_place.shape)).argmax(axis=1)    # (n,), any of the places
    value = FIRST_VALUE + rng.integers(N_VALUE, size=n)
    tokens[row, needle] = KEY
    tokens[row, needle + 1] = value
    is_later = np.arange(length) > needle[:, None] + 1                 # (n, T)
    is_query = is_word[:, :length] & is_later & (rng.random((n, length)) < query_rate)
    is_query[:, -1] = True
    tokens[:, :-1][is_query] = QUERY
    targets = np.where(tokens[:, 1:] == QUERY, NOTHING, tokens[:, 1:])
    targets = np.where(is_query, value[:, None], targets)
    return torch.tensor(tokens[:, :-1]), torch.tensor(targets)


def compare(logits: Tensor, ids: Tensor, targets: Tensor) -> tuple[dict, dict]:
    """Logits (n, T, V): their losses and the shares that are right, of needle, subject, text."""
    is_target = targets != NOTHING                                     # (n, T)
    places = {"needle": ids == QUERY,
              "subject": (ids == VERB) & is_target,
              "text": (ids != QUERY) & is_target}
    loss = F.cross_entropy(logits.mT, targets, reduction="none")       # (n, T)
    right = (logits.argmax(dim=-1) == targets).float()
    return ({name: loss[place].mean() for name, place in places.items()},
            {name: right[place].mean().item() for name, place in places.items()})


# ------------------------------------------------------------------------------------ TRAINING

STAGES = (32, TRAIN_LENGTH)        # short first: at 128 alone, recall may long stay at chance
LEARNED = 0.99                     # needles and subjects that are right: the stage ends
CHECK_EVERY, MAX_ITERS = 50, 3000  # iterations of a stage


def train(model: Mamba, rng: np.random.Generator, length: int) -> int:
    """Train at one length until the needle is learned; return the iterations that took."""
    validation = draw(rng, 128, length)
    optimizer = torch.optim.AdamW(model.parameters())
    for iteration in tqdm(range(MAX_ITERS), f"length {length}", leave=False, disable=None):
        if iteration % CHECK_EVERY == 0:
            right = evaluate(model, *validation)["right"]
            if min(right["needle"], right["subject"]) >= LEARNED:
                return iteration
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (iteration + 1) / 50)  # warm-up
        ids, targets = draw(rng, 16, length, query_rate=0.2)
        losses, _ = compare(model(ids)[0], ids, targets)
        optimizer.zero_grad()
        (losses["needle"] + losses["subject"] + 0.3 * losses["text"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return MAX_ITERS


# ---------------------------------------------------------------------------------- COMPARISON

THETAS = (1e-3, 1e-2, 5e-2, 2e-1)
CLAMPS = (0.0, 0.016, 0.024)       # of 128 tokens, the largest 1, 2, 3
TOLERANCE = 0.25                   # of the budget


@torch.no_grad()
def evaluate(model: Mamba, ids: Tensor, targets: Tensor, calibration: Sequence[Channels] = (),
             theta: float = 0.0) -> dict:
    """What compare says, without a calibration of the plain model, with one of LongMamba; and by
    layer, what the global channels keep of their budget."""
    rules = [make_rule(channels, ids.shape[1], theta) for channels in calibration]
    states = None
    pieces = []
    spent = [0] * len(model.layers)                                    # (n, E) each
    for piece in ids.split(TRAIN_LENGTH, dim=1):       # pieces fit into the processor's cache
        logits, states = model(piece, states, rules)
        pieces.append(logits)
        spent = [total + state.delta.sum(dim=1) for total, state in zip(spent, states)]
    losses, right = compare(torch.cat(pieces, dim=1), ids, targets)
    kept = [(total / channels.budget)[:, channels.decay > theta].mean().nan_to_num(1).item()
            for total, channels in zip(spent, calibration)]            # 1: no channel is global
    return {"loss": {name: loss.item() for name, loss in losses.items()},
            "right": right, "kept": kept}


def choose(model: Mamba, calibrations: dict[float, list[Channels]], ids: Tensor, targets: Tensor
           ) -> tuple[float, float]:
    """theta and C: where every layer keeps its budget, within the tolerance, the pair with the
    least loss of needle and text together; where none does, the pair that comes nearest."""
    found = []
    for clamp, calibration in calibrations.items():
        for theta in THETAS:
            scores = evaluate(model, ids, targets, calibration, theta)
            excess = max(abs(kept - 1) for kept in scores["kept"]) - TOLERANCE
            loss = scores["loss"]["needle"] + scores["loss"]["text"]
            found.append((max(0, excess), loss, theta, clamp))
    return min(found)[2:]


def run(seed: int) -> dict:
    """Train, calibrate, choose and test one model."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Mamba(TOY)
    iterations = [train(model, rng, length) for length in STAGES]
    # Plain text, as in the paper: with a needle in every text the threshold of long inputs is at
    # the needle's own Delta, and many channels miss it.
    texts = torch.tensor(draw_text(rng, 64, TRAIN_LENGTH))
    calibrations = {clamp: calibrate(model, texts, LENGTHS, clamp) for clamp in CLAMPS}
    theta, clamp = choose(model, calibrations, *draw(rng, 16, LENGTHS[-1]))
    calibration = calibrations[clamp]
    scores = {"vanilla": [], "LongMamba": []}
    for length in LENGTHS:
        problems = draw(rng, 64, length)
        scores["vanilla"].append(evaluate(model, *problems))
        scores["LongMamba"].append(evaluate(model, *problems, calibration, theta))
    scores["all channels"] = [evaluate(model, *problems, calibration, theta=-1)]
    return {"iterations": iterations, "theta": theta, "C": clamp, "scores": scores}


# -------------------------------------------------------------------------------------- REPORT

COLUMNS = ("seed", "iterations", "theta, C", "budget kept", *LENGTHS, "subject", "text, nats")


def print_row(seed: int, found: dict) -> None:
    """At each length needles of vanilla / LongMamba; then, at the longest, what else is remembered
    by vanilla / LongMamba / the filter in all channels."""
    vanilla, filtered, everywhere = found["scores"].values()
    cells = [seed, " + ".join(map(str, found["iterations"])),
             f"{found['theta']:g}, {found['C']:.1%}",
             ", ".join(f"{kept:.2f}" for kept in filtered[-1]["kept"])]
    for pair in zip(vanilla, filtered):
        cells.append(" / ".join(f"{100 * x['right']['needle']:.0f}" for x in pair))
    longest = vanilla[-1], filtered[-1], everywhere[-1]
    cells.append(" / ".join(f"{100 * x['right']['subject']:.0f}" for x in longest))
    cells.append(" / ".join(f"{x['loss']['text']:.2f}" for x in longest))
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def plot(results: list[dict], path: Path) -> None:
    """Needles by length: every seed a thin line, their mean a thick one."""
    import matplotlib.pyplot as plt
    plt.style.use(Path(__file__).with_name("pictures.mplstyle"))
    figure, axis = plt.subplots()
    for arm, color in (("vanilla", "0.4"), ("LongMamba", "C0")):
        lines = [[100 * x["right"]["needle"] for x in found["scores"][arm]] for found in results]
        axis.plot(LENGTHS, np.transpose(lines), color=color, linewidth=0.8, alpha=0.5)
        mean = np.mean(lines, axis=0)                                  # (lengths,)
        axis.plot(LENGTHS, mean, "o-", color=color, linewidth=2.5)
        axis.annotate(f"{arm} {mean[-1]:.0f} %", (LENGTHS[-1], mean[-1]), (8, 0), color=color,
                      textcoords="offset points", va="center", weight="bold")
    axis.set_xscale("log", base=2)
    axis.set_xticks(LENGTHS, LENGTHS)
    axis.set(xlabel=f"tokens of the input (trained at {TRAIN_LENGTH})", ylim=(0, 103),
             ylabel="needles recalled (%)", title="Writing less keeps needles that Mamba forgets")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small Mamba and test LongMamba on it.")
    parser.add_argument("--seeds", type=SEED, nargs="+", default=[0], help="one model each")
    parser.add_argument("--plot", type=Path, help="a picture to draw; needs matplotlib")
    args = parser.parse_args()
    torch.set_num_threads(1)               # tensors are small: more threads do not pay
    print(f"| {' | '.join(map(str, COLUMNS))} |\n{'|---' * len(COLUMNS)}|", flush=True)
    results = []
    for seed in args.seeds:
        results.append(run(seed))
        print_row(seed, results[-1])
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    run_program(main, if_interrupted="the rows above stand")
