"""Six views of scanned handwritten digits, brought into one space from scratch by several losses.

scikit-learn's bundled digits (1797 scans of 8 x 8 pixels) are described in six ways, after the UCI
"Multiple Features" set: pixel averages, Fourier coefficients, profile correlations, Karhunen-Loeve
coefficients, Zernike moments and morphology. Every view gets a small encoder of its own. What
differs between the runs is the loss alone: the initial weights, the batches, the optimiser and the
number of steps are the same. Then, on scans that were held out: does a view of a scan find the same
scan by another view?

    python examples/multiview_digits.py            # five losses
    python examples/multiview_digits.py --all      # all of them, and the full retrieval tables

The set is small and the encoders are too: read the result as an illustration, not as a benchmark.
"""

import argparse
import math
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm

from pmrl_kernels import dominant_sv_loss, ops, pmrl_loss, singular_values
from pmrl_kernels.ops.spectral import SPECTRAL

VIEWS = ("pixels", "Fourier", "profiles", "Karhunen", "Zernike", "morphology")
HELD_OUT = 450
BATCH = 256
HIDDEN = 128
DIM = 64
LEARNING_RATE = 2e-3

# One temperature for every contrast, PMRL's τ₂ and the rivals'; it was tuned for none of them.
CONTRAST_TEMPERATURE = 0.1
# PMRL's τ₁. The term is satisfied as soon as σ₁ leads by a few τ₁, and for encoders that start from
# scratch that happens at once with a sharp one such as the default, long before the views agree.
ALIGNMENT_TEMPERATURE = 1.0
SHARP_TEMPERATURE = 0.05
WARM_UP_SHARE = 0.7  # of the steps, where a model is trained with one loss and fine-tuned with another
TIMING_ROUNDS = 30


# ---------------------------------------------------------------------------------------------------
# The six views. Each function maps images (N, 8, 8), values in [0, 1], to features (N, width).
# ---------------------------------------------------------------------------------------------------


def pixel_averages(images: np.ndarray) -> np.ndarray:
    """The scans as they come: each value is the mean of a 4 x 4 block of the original bitmap."""
    return images.reshape(len(images), -1)


def fourier_coefficients(images: np.ndarray) -> np.ndarray:
    """Magnitudes of the two-dimensional spectrum: blind to where on the paper the digit sits."""
    return np.abs(np.fft.rfft2(images)).reshape(len(images), -1)


def profile_correlations(images: np.ndarray) -> np.ndarray:
    """Circular cross-correlations of six outlines: ink per row and column, depth from all four sides."""
    ink = images > 0.25
    depth_from_left = np.where(ink.any(2), ink.argmax(2), 8)
    depth_from_right = np.where(ink.any(2), ink[:, :, ::-1].argmax(2), 8)
    depth_from_top = np.where(ink.any(1), ink.argmax(1), 8)
    depth_from_bottom = np.where(ink.any(1), ink[:, ::-1].argmax(1), 8)
    depths = (depth_from_left, depth_from_right, depth_from_top, depth_from_bottom)
    profiles = np.stack((images.sum(2), images.sum(1), *depths), axis=1)  # (N, 6, 8)

    spectra = np.fft.rfft(profiles)
    first, second = np.triu_indices(profiles.shape[1])
    correlations = np.fft.irfft(spectra[:, first] * spectra[:, second].conj(), n=8)
    return correlations.reshape(len(images), -1)


def zernike_magnitudes(images: np.ndarray, highest_order: int = 9) -> np.ndarray:
    """Magnitudes of the Zernike moments on the disc through the corners: blind to rotation."""
    axis = np.arange(8) - 3.5
    y, x = np.meshgrid(axis, axis, indexing="ij")
    radius, angle = np.hypot(x, y).ravel(), np.arctan2(y, x).ravel()
    radius = radius / radius.max()

    basis = []
    for n in range(highest_order + 1):
        for m in range(n % 2, n + 1, 2):
            radial = sum(
                (-1) ** s
                * math.factorial(n - s)
                / (math.factorial(s) * math.factorial((n + m) // 2 - s) * math.factorial((n - m) // 2 - s))
                * radius ** (n - 2 * s)
                for s in range((n - m) // 2 + 1)
            )
            basis.append((n + 1) / np.pi * radial * np.exp(-1j * m * angle))
    return np.abs(images.reshape(len(images), -1) @ np.stack(basis, axis=1))


def morphology(images: np.ndarray) -> np.ndarray:
    """Area, outline, holes and extent at three thresholds, moments, and the directions of the strokes."""
    features = []
    for threshold in (0.25, 0.5, 0.75):
        ink = np.pad(images > threshold, ((0, 0), (1, 1), (1, 1)))
        above, below, left, right = ink[:, :-1], ink[:, 1:], ink[:, :, :-1], ink[:, :, 1:]
        area = ink.sum((1, 2))
        outline = (above ^ below).sum((1, 2)) + (left ^ right).sum((1, 2))
        # Euler number, pieces minus holes: corners - edges + squares of the inked region.
        edges = (above | below).sum((1, 2)) + (left | right).sum((1, 2))
        corners = (above[:, :, :-1] | above[:, :, 1:] | below[:, :, :-1] | below[:, :, 1:]).sum((1, 2))
        euler = corners - edges + area
        height, width = ink.any(2).sum(1), ink.any(1).sum(1)
        aspect = height / np.maximum(width, 1)
        features += [area, outline, euler, height, width, aspect]

    axis = np.arange(8) - 3.5
    mass = images.sum((1, 2))
    centre_y = (images.sum(2) @ axis) / mass
    centre_x = (images.sum(1) @ axis) / mass
    dy = axis[None, :] - centre_y[:, None]
    dx = axis[None, :] - centre_x[:, None]
    features += [mass, centre_y, centre_x]
    for p, q in ((2, 0), (1, 1), (0, 2), (3, 0), (2, 1), (1, 2), (0, 3)):
        features.append(np.einsum("nyx,ny,nx->n", images, dy**p, dx**q) / mass)

    slope_y, slope_x = np.gradient(images, axis=(1, 2))
    strength = np.hypot(slope_y, slope_x)
    # A stroke has no direction of travel, so angles count modulo 180 degrees.
    bins = np.floor(np.arctan2(slope_y, slope_x) / np.pi * 8).astype(int) % 8
    features += [(strength * (bins == b)).sum((1, 2)) for b in range(8)]
    return np.stack(features, axis=1)


@dataclass
class Split:
    """Some of the scans: one (N, width) tensor per view, and which digit each scan shows."""

    views: list[Tensor]
    labels: np.ndarray


def load_images() -> tuple[np.ndarray, np.ndarray]:
    """The scans (N, 8, 8), values in [0, 1], and which digit each one shows."""
    images, labels = load_digits(return_X_y=True)
    return images.reshape(-1, 8, 8) / 16.0, labels


def describe(images: np.ndarray, train: np.ndarray, seed: int) -> list[np.ndarray]:
    """The six views in the order of `VIEWS`; the rows `train` fit the components of the fourth."""
    flat = images.reshape(len(images), -1)
    return [
        pixel_averages(images),
        fourier_coefficients(images),
        profile_correlations(images),
        PCA(n_components=32, random_state=seed).fit(flat[train]).transform(flat),
        zernike_magnitudes(images),
        morphology(images),
    ]


def load_views(seed: int) -> tuple[Split, Split]:
    """The training and the held-out scans; whatever is fitted is fitted on the training scans."""
    images, labels = load_images()
    train, held_out = train_test_split(np.arange(len(images)), test_size=HELD_OUT, stratify=labels, random_state=seed)
    scaled = [StandardScaler().fit(view[train]).transform(view) for view in describe(images, train, seed)]
    tensors = [torch.from_numpy(view).float() for view in scaled]
    return (
        Split([view[train] for view in tensors], labels[train]),
        Split([view[held_out] for view in tensors], labels[held_out]),
    )


# ---------------------------------------------------------------------------------------------------
# The losses. Each takes k embeddings (B, d), one per view, and a mask (B, k), True = present, or None.
# The rivals are only trained on scans that have all their views, and leave the mask alone.
# ---------------------------------------------------------------------------------------------------

Loss = Callable[[list[Tensor], Tensor | None], Tensor]


def paper_terms(embeddings: list[Tensor], mask: Tensor | None) -> Tensor:
    """PMRL: the largest singular value dominates, the leading directions of two scans differ."""
    return pmrl_loss(
        *embeddings,
        temperature=ALIGNMENT_TEMPERATURE,
        instance_temperature=CONTRAST_TEMPERATURE,
        contrast="leading",
        mask=mask,
    )


def paper_terms_sharp(embeddings: list[Tensor], mask: Tensor | None) -> Tensor:
    """The same two terms at the default alignment temperature."""
    return pmrl_loss(
        *embeddings,
        temperature=SHARP_TEMPERATURE,
        instance_temperature=CONTRAST_TEMPERATURE,
        contrast="leading",
        mask=mask,
    )


def leave_one_out(embeddings: list[Tensor], mask: Tensor | None) -> Tensor:
    """The alignment term, and every view must find what the other views of its own scan share, in the batch."""
    return pmrl_loss(
        *embeddings,
        temperature=ALIGNMENT_TEMPERATURE,
        instance_temperature=CONTRAST_TEMPERATURE,
        alignment_weight=1.0 if mask is None else 0.0,
        contrast="leave_one_out",
        mask=mask,
    )


def modality_contrast(embeddings: list[Tensor], mask: Tensor | None) -> Tensor:
    """The alignment term, and every view must find its own scan's leading direction in the batch."""
    return pmrl_loss(
        *embeddings,
        temperature=ALIGNMENT_TEMPERATURE,
        instance_temperature=CONTRAST_TEMPERATURE,
        contrast="modality",
        mask=mask,
    )


def info_nce(a: Tensor, b: Tensor) -> Tensor:
    """Symmetric InfoNCE between rows (B, d) that are unit vectors."""
    logits = a @ b.T / CONTRAST_TEMPERATURE
    target = torch.arange(len(a))
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def anchor_info_nce(embeddings: list[Tensor], mask: Tensor | None) -> Tensor:
    """Every other view against the pixels: k - 1 similarity matrices."""
    anchor, *others = (normalize(x, dim=1) for x in embeddings)
    return torch.stack([info_nce(anchor, other) for other in others]).mean()


def all_pairs_info_nce(embeddings: list[Tensor], mask: Tensor | None) -> Tensor:
    """Every view against every other: k (k - 1) / 2 similarity matrices."""
    z = [normalize(x, dim=1) for x in embeddings]
    return torch.stack([info_nce(a, b) for i, a in enumerate(z) for b in z[i + 1 :]]).mean()


def centroid_info_nce(embeddings: list[Tensor], mask: Tensor | None) -> Tensor:
    """Every view against the mean of the scan's views, as CentroBind does (arXiv 2410.02086)."""
    z = [normalize(x, dim=1) for x in embeddings]
    centroid = normalize(torch.stack(z).mean(0), dim=1)
    return torch.stack([info_nce(x, centroid) for x in z]).mean()


def volume_contrast(embeddings: list[Tensor], mask: Tensor | None, temperature: float = CONTRAST_TEMPERATURE) -> Tensor:
    """The volume of scan i's anchor with scan j's other views, contrasted as in GRAM (arXiv 2412.11959).

    GRAM takes the root of a Gram determinant for every pair (i, j). The same number is the volume of
    j's other views times the distance of i's anchor from their span, which needs one QR per scan.
    """
    anchor, *others = (normalize(x, dim=1) for x in embeddings)
    Q, R = torch.linalg.qr(torch.stack(others, dim=2))  # (B, d, k - 1), (B, k - 1, k - 1)
    base = R.diagonal(dim1=1, dim2=2).prod(1).abs()
    inside_span = torch.einsum("id,jdm->ijm", anchor, Q).square().sum(2)
    distance = (1 - inside_span).clamp_min(1e-6).sqrt()  # the clamp keeps the root's slope finite
    logits = -distance * base / temperature
    target = torch.arange(len(anchor))
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def authors_svd(embeddings: list[Tensor], mask: Tensor | None) -> Tensor:
    """PMRL's two terms by a full SVD of the (B, d, k) stack, as its authors compute them. Only timed here."""
    Z = normalize(torch.stack(embeddings, dim=2), dim=1)
    U, S, _ = torch.linalg.svd(Z, full_matrices=True)
    alignment = cross_entropy(S / ALIGNMENT_TEMPERATURE, torch.zeros(len(S), dtype=torch.long))
    u = U[:, :, 0]
    return alignment + cross_entropy(u @ u.T / CONTRAST_TEMPERATURE, torch.arange(len(u)))


# ---------------------------------------------------------------------------------------------------
# The recipes
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A way to train. With a `warm_up` loss that one takes the first `WARM_UP_SHARE` of the same steps."""

    name: str
    label: str
    loss: Loss
    warm_up: Loss | None = None
    missing: float = 0.0
    in_default_run: bool = False


RECIPES = (
    Recipe("leave_one_out", "PMRL, leave-one-out", leave_one_out, in_default_run=True),
    Recipe("pairs", "InfoNCE, all pairs", all_pairs_info_nce, in_default_run=True),
    Recipe("anchor", "InfoNCE to one anchor", anchor_info_nce, in_default_run=True),
    Recipe("modality", "PMRL, modality contrast", modality_contrast, in_default_run=True),
    Recipe("paper", "PMRL, the paper's terms", paper_terms, in_default_run=True),
    Recipe("centroid", "InfoNCE to the centroid", centroid_info_nce),
    Recipe("volume", "GRAM-style volume", volume_contrast),
    Recipe("tuned", "anchor, then PMRL", paper_terms, warm_up=anchor_info_nce),
    Recipe("tuned_sharp", "anchor, then PMRL, τ₁ = 0.05", paper_terms_sharp, warm_up=anchor_info_nce),
    Recipe("missing", "leave-one-out, 30 % missing", leave_one_out, missing=0.3),
)
LABELS = {recipe.name: recipe.label for recipe in RECIPES} | {"authors": "paper's terms, authors' SVD"}


# ---------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------


class Encoders(nn.Module):
    """One small network per view: k tensors (B, width) to k tensors (B, d)."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM)) for width in widths
        )

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        return [network(view) for network, view in zip(self.networks, views, strict=True)]


def new_model(views: list[Tensor], seed: int) -> tuple[Encoders, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    encoders = Encoders([view.shape[1] for view in views])
    return encoders, torch.optim.AdamW(encoders.parameters(), lr=LEARNING_RATE)


def draw_mask(instances: int, missing: float, seed: int, views: int = len(VIEWS)) -> Tensor | None:
    """Which views of which scan exist, (N, k); drawn once, as in a data set with gaps. Two always stay."""
    if missing == 0:
        return None
    scores = torch.rand(instances, views, generator=torch.Generator().manual_seed(seed))
    present = scores > missing
    return present.scatter(1, scores.topk(2, dim=1).indices, True)


def batches(instances: int, steps: int, seed: int, size: int = BATCH) -> Iterator[Tensor]:
    """Indices of `steps` batches, the same for every recipe."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(left) < size:
            left = torch.randperm(instances, generator=generator)
        yield left[:size]
        left = left[size:]


@dataclass
class Run:
    """What training leaves behind: the encoders, and what the held-out scans showed along the way."""

    encoders: Encoders
    steps: list[int] = field(default_factory=list)
    spectra: list[list[float]] = field(default_factory=list)  # mean σ_j/√k after each of `steps`
    recall_after_warm_up: float | None = None


@torch.no_grad()
def mean_spectrum(encoders: Encoders, split: Split) -> list[float]:
    """Mean σ_j/√k, j = 1..k: the first is 1 exactly when all views of every scan agree, up to sign."""
    return (singular_values(*encoders(split.views)).mean(0) / math.sqrt(len(VIEWS))).tolist()


def train(recipe: Recipe, data: Split, held_out: Split, steps: int, seed: int, progress: tqdm) -> Run:
    encoders, optimizer = new_model(data.views, seed)
    run = Run(encoders)
    warm_up_steps = 0 if recipe.warm_up is None else int(WARM_UP_SHARE * steps)
    # Evenly spaced on a logarithmic scale, since the spectrum moves most in the first steps.
    milestones = {round(steps ** (i / 40)) for i in range(41)}

    views = data.views
    present = draw_mask(len(data.labels), recipe.missing, seed)
    if present is not None:
        # The loss ignores what is absent; the zeros make sure that nothing of it reaches the encoders.
        views = [view * present[:, m, None] for m, view in enumerate(views)]

    for step, rows in enumerate(batches(len(data.labels), steps, seed), start=1):
        loss_fn = recipe.warm_up if step <= warm_up_steps else recipe.loss
        loss = loss_fn(encoders([view[rows] for view in views]), None if present is None else present[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        if step == warm_up_steps:
            table = recall_at_1(cross_view_similarity(embed(encoders, held_out)))
            run.recall_after_warm_up = across_views(table).mean().item()
        if step in milestones:
            run.steps.append(step)
            run.spectra.append(mean_spectrum(encoders, held_out))
            progress.set_postfix_str(f"{recipe.label}: loss {loss.item():.3f}", refresh=False)
        progress.update()
    return run


# ---------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed(encoders: Encoders, split: Split) -> Tensor:
    """Unit vectors, (N, k, d)."""
    return normalize(torch.stack(encoders(split.views), dim=1), dim=2)


def cross_view_similarity(z: Tensor) -> Tensor:
    """Cosines (k, k, N, N): scan i seen by view m against scan j seen by view n, at [m, n, i, j]."""
    return torch.einsum("imd,jnd->mnij", z, z)


def recall_at_1(similarity: Tensor) -> Tensor:
    """R@1 (k, k): how often the nearest scan, seen by the column's view, is the row's view's own."""
    found = similarity.argmax(3) == torch.arange(similarity.shape[2])
    return found.float().mean(2)


def across_views(table: Tensor) -> Tensor:
    """The entries off the diagonal: a view always finds itself."""
    return table[~torch.eye(len(table), dtype=torch.bool)]


def probe_accuracy(encoders: Encoders, data: Split, held_out: Split) -> float:
    """Which digit is it? Logistic regression on the mean of the frozen unit embeddings."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(embed(encoders, data).mean(1).numpy(), data.labels)
    return float(probe.score(embed(encoders, held_out).mean(1).numpy(), held_out.labels))


def timed_step(
    loss_fn: Loss,
    encoders: Encoders,
    optimizer: torch.optim.Optimizer,
    views: list[Tensor],
    mask: Tensor | None,
) -> tuple[float, float]:
    """Seconds of one training step: (the loss alone, forward and backward; everything)."""
    start = time.perf_counter()
    embeddings = encoders(views)
    # Cut the graph at the embeddings, so that the loss's backward pass can be told from the encoders'.
    leaves = [x.detach().requires_grad_() for x in embeddings]
    before_loss = time.perf_counter()
    loss_fn(leaves, mask).backward()
    after_loss = time.perf_counter()
    optimizer.zero_grad()
    torch.autograd.backward(embeddings, [leaf.grad for leaf in leaves])
    optimizer.step()
    return after_loss - before_loss, time.perf_counter() - start


def time_losses(
    losses: dict[str, Loss], masks: dict[str, Tensor | None], data: Split, seed: int, progress: tqdm
) -> dict[str, dict[str, float]]:
    """Median times. The losses take turns, so that a busy moment of the machine hits all of them alike."""
    views = [view[:BATCH] for view in data.views]
    models = {name: new_model(views, seed) for name in losses}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in losses}
    progress.set_postfix_str("timing the losses")
    for _ in range(TIMING_ROUNDS):
        for name, loss_fn in losses.items():
            times[name].append(timed_step(loss_fn, *models[name], views, masks.get(name)))
        progress.update()

    medians = {}
    for name, pairs in times.items():
        loss_seconds, step_seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
        medians[name] = {"loss_ms": 1e3 * loss_seconds, "loss_share": loss_seconds / step_seconds}
    return medians


def measure(run: Run, data: Split, held_out: Split) -> dict[str, Any]:
    z = embed(run.encoders, held_out)
    similarity = cross_view_similarity(z)
    table = recall_at_1(similarity)
    # Mean cosine between two views of the same scan, for every pair of views.
    agreement = similarity.diagonal(dim1=2, dim2=3).mean(2)
    return {
        "recall": across_views(table).mean().item(),
        "worst_pair": across_views(table).min().item(),
        "recall_up_to_sign": across_views(recall_at_1(similarity.abs())).mean().item(),
        "opposed_pairs": int((across_views(agreement) < 0).sum()) // 2,
        "recall_after_warm_up": run.recall_after_warm_up,
        "probe": probe_accuracy(run.encoders, data, held_out),
        "alignment": run.spectra[-1][0],
        # What the alignment term at its default temperature would still find to improve.
        "sharp_alignment_loss": dominant_sv_loss(z, temperature=SHARP_TEMPERATURE).item(),
        "table": table.tolist(),
    }


# ---------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------

Results = dict[str, dict[str, Any]]

LEGEND = f"""
R@1    how often one view of a held-out scan finds that very scan among {HELD_OUT} by another view, the mean
       over 30 ordered pairs of views (guessing: {1 / HELD_OUT:.3f}); worst: the least of the 30
probe  accuracy of logistic regression for the digit, on the mean of the six frozen unit embeddings
loss   forward and backward, median; unlike all else it varies from run to run
"""


def summary(results: Results) -> str:
    lines = [f"{'':32}{'R@1':>7}{'worst':>8}{'probe':>8}{'σ₁/√k':>8}{'loss ms':>10}{'of step':>9}"]
    for name, r in results.items():
        quality = [r.get(key) for key in ("recall", "worst_pair", "probe", "alignment")]
        cells = ["-" if value is None else f"{value:.3f}" for value in quality]
        lines.append(
            f"{LABELS[name]:32}{cells[0]:>7}{cells[1]:>8}{cells[2]:>8}{cells[3]:>8}"
            f"{r['loss_ms']:10.2f}{r['loss_share']:9.0%}"
        )
    return "\n".join(lines)


def recall_matrix(name: str, table: list[list[float]]) -> str:
    lines = [f"R@1 from the row's view to the column's: {LABELS[name]}"]
    lines.append(" " * 12 + "".join(f"{view:>12}" for view in VIEWS))
    for i, row in enumerate(table):
        cells = ("-" if i == j else f"{value:.2f}" for j, value in enumerate(row))
        lines.append(f"{VIEWS[i]:12}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def against(a: float, b: float) -> str:
    """How one R@1 compares with another. Another seed moves most of them by about 0.01."""
    return "level with" if abs(a - b) < 0.02 else "ahead of" if a > b else "behind"


def from_scratch_in_words(results: Results) -> Iterator[str]:
    recall = {name: r["recall"] for name, r in results.items() if "recall" in r}
    pairs = math.comb(len(VIEWS), 2)
    ours, theirs = results["leave_one_out"], results["pairs"]
    yield (
        f"PMRL with the leave-one-out contrast ({recall['leave_one_out']:.2f}) is "
        f"{against(recall['leave_one_out'], recall['anchor'])} InfoNCE to one anchor "
        f"({recall['anchor']:.2f}), {against(recall['leave_one_out'], recall['modality'])} the modality contrast "
        f"({recall['modality']:.2f}) and {against(recall['leave_one_out'], recall['pairs'])} InfoNCE over all "
        f"pairs ({recall['pairs']:.2f}), which contrasts each of the {pairs} pairs of views, where leave-one-out "
        f"compares each of {len(VIEWS)} views with what the others share. The loss takes {ours['loss_ms']:.1f} ms a "
        f"step, over all pairs {theirs['loss_ms']:.1f} ms. (Over more sets of data the two are level, see "
        f"multiview_study.py; this one is the hardest on contrasts that take less than all pairs.)"
    )

    paper = results["paper"]
    if against(recall["paper"], recall["leave_one_out"]) == "behind":
        yield (
            f"From scratch the paper's two terms do not suffice ({recall['paper']:.2f}). Their contrast "
            f"only keeps the leading vectors of two scans apart, so no single view meets a negative. The "
            f"paper starts from pretrained encoders, which a contrastive loss has trained already."
        )
    else:
        yield f"The paper's two terms keep up even from scratch here ({recall['paper']:.2f})."
    if paper["opposed_pairs"] > 0 and against(paper["recall_up_to_sign"], recall["paper"]) == "ahead of":
        yield (
            f"Nor do singular values see the sign of a view: after the paper's terms, two views of the same "
            f"scan point in opposite directions on average in {paper['opposed_pairs']} of {pairs} pairs. "
            f"By |cosine| their R@1 would be {paper['recall_up_to_sign']:.2f}, and in the probe's mean over "
            f"views they cancel. Leave-one-out leaves {results['leave_one_out']['opposed_pairs']} such pairs."
        )

    if "volume" in results and against(recall["volume"], recall["anchor"]) == "behind":
        yield (
            f"The volume contrast ({recall['volume']:.2f}), proposed for pretrained encoders as well, "
            f"is satisfied with less: a volume vanishes as soon as any two views agree, up to sign."
        )


def fine_tuning_in_words(results: Results) -> Iterator[str]:
    change = {"behind": "lower", "level with": "keep", "ahead of": "raise"}
    soft, sharp = results["tuned"], results["tuned_sharp"]
    before = soft["recall_after_warm_up"]
    yield (
        f"As fine-tuning of the anchor's model, which stood at {before:.2f} then, the paper's terms "
        f"{change[against(soft['recall'], before)]} R@1 at τ₁ = {ALIGNMENT_TEMPERATURE:g} "
        f"({soft['recall']:.2f}) and {change[against(sharp['recall'], before)]} it at "
        f"τ₁ = {SHARP_TEMPERATURE:g} ({sharp['recall']:.2f}). No run had more steps in all."
    )
    if against(sharp["recall"], soft["recall"]) == "behind":
        yield (
            f"Why so: at τ₁ = {SHARP_TEMPERATURE:g} the alignment loss ends at "
            f"{sharp['sharp_alignment_loss']:.3f}, of log k = {math.log(len(VIEWS)):.2f} at most, while "
            f"σ₁/√k is only {sharp['alignment']:.2f} ({soft['alignment']:.2f} at "
            f"τ₁ = {ALIGNMENT_TEMPERATURE:g}). Once σ₁ leads by a few τ₁ the term has nothing left to "
            f"ask for, and the contrast goes its own way."
        )


def in_words(results: Results) -> Iterator[str]:
    """What the numbers say. Every claim depends on the measurement: another seed may say otherwise."""
    if max(r.get("recall", 0.0) for r in results.values()) < 0.1:
        yield "After so few steps no model finds much: nothing to compare yet."
        return
    yield from from_scratch_in_words(results)
    if "tuned" in results:
        yield from fine_tuning_in_words(results)
    if "missing" in results:
        yield (
            f"With 30 % of the training views missing the leave-one-out contrast reaches "
            f"{results['missing']['recall']:.2f} instead of {results['leave_one_out']['recall']:.2f}; the "
            f"held-out scans have all their views."
        )
    paper_ms, authors_ms = results["paper"]["loss_ms"], results["authors"]["loss_ms"]
    yield (
        f"The paper's terms take {paper_ms:.1f} ms a step here and {authors_ms:.1f} ms by the authors' "
        f"full SVD. With encoders this small, any loss is a large share of a step."
    )
    if "tuned" not in results:
        yield "With --all: three more losses, the paper's terms as fine-tuning, and training with gaps."


def draw(results: Results, runs: dict[str, Run], conditions: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # writes a file, needs no screen
    import matplotlib.pyplot as plt

    # From the Okabe-Ito palette, which colour-blind readers can tell apart.
    paper, ours, rival, svd = "#D55E00", "#0072B2", "#A0A0A0", "#E69F00"
    colours = dict.fromkeys(results, rival)
    colours |= dict.fromkeys(("paper", "tuned", "tuned_sharp"), paper)
    colours |= dict.fromkeys(("leave_one_out", "modality", "missing"), ours)
    colours["authors"] = svd

    plt.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, (spectrum, recall, cost) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    figure.suptitle(f"Six views of scanned digits in one space\n{conditions}", fontsize=10.5)

    for name, style in (("paper", "--"), ("leave_one_out", "-")):
        sigma_1, *others = zip(*runs[name].spectra, strict=True)
        spectrum.plot(runs[name].steps, sigma_1, style, color=colours[name], lw=2.4, label=LABELS[name])
        for sigma_j in others:
            spectrum.plot(runs[name].steps, sigma_j, style, color=colours[name], lw=1)
    spectrum.set(xscale="log", ylim=(0, 1.02), xlabel="training step", ylabel="mean σⱼ/√k, held-out scans")
    spectrum.xaxis.set_major_formatter("{x:g}")
    spectrum.set_title("All six singular values (thick: σ₁)")
    spectrum.legend(frameon=False, loc="upper left")

    def bars(axes: Any, names: list[str], key: str, form: str) -> None:
        drawn = axes.barh(
            [LABELS[name] for name in names],
            [results[name][key] for name in names],
            color=[colours[name] for name in names],
            height=0.7,
        )
        axes.bar_label(drawn, fmt=form, padding=3)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.margins(x=0.12)

    bars(recall, list(runs), "recall", "%.2f")
    recall.set(xlabel="mean R@1 over 30 ordered pairs of views", title="Finding the same scan by another view")
    # Fine-tuning and gaps change the training, not the loss.
    timed = [name for name in results if name not in ("tuned", "tuned_sharp", "missing")]
    bars(cost, timed, "loss_ms", "%.1f")
    cost.set(xlabel="ms per step, forward and backward (median)", title="Time of the loss")

    figure.savefig(path, dpi=150)
    plt.close(figure)


def step_count(text: str) -> int:
    steps = int(text)
    if steps < 2:
        raise argparse.ArgumentTypeError("at least 2 steps are needed")
    return steps


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="train with every loss, print every table")
    parser.add_argument("--steps", type=step_count, default=400, help="training steps per run (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the figure")
    parser.add_argument("--no-figure", action="store_true", help="print only")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Results:
    """Train, measure, print. Returns metrics by recipe; under "authors" only their SVD's times."""
    arguments = parse_arguments(argv)
    steps, seed = arguments.steps, arguments.seed
    recipes = [recipe for recipe in RECIPES if arguments.all or recipe.in_default_run]
    data, held_out = load_views(seed)

    runs: dict[str, Run] = {}
    results: Results = {}
    with tqdm(total=len(recipes) * steps + TIMING_ROUNDS, unit="step", leave=False) as progress:
        for recipe in recipes:
            runs[recipe.name] = train(recipe, data, held_out, steps, seed, progress)
            results[recipe.name] = measure(runs[recipe.name], data, held_out)
        losses = {recipe.name: recipe.loss for recipe in recipes} | {"authors": authors_svd}
        masks = {recipe.name: draw_mask(BATCH, recipe.missing, seed) for recipe in recipes}
        for name, times in time_losses(losses, masks, data, seed, progress).items():
            results.setdefault(name, {}).update(times)

    conditions = (
        f"{len(data.labels)} scans of digits to train on, {HELD_OUT} held out, k = {len(VIEWS)} views, "
        f"{steps} steps of batch {BATCH}, d = {DIM}, "
        f"τ₁ = {ALIGNMENT_TEMPERATURE:g}, τ₂ = {CONTRAST_TEMPERATURE:g}, seed {seed}, "
        f"CPU threads: {torch.get_num_threads()}, "
        f"backend: {ops.resolve(SPECTRAL, None, torch.device('cpu'), torch.float32, len(VIEWS), DIM).backend}"
    )
    print(conditions, end="\n\n")
    print(summary(results))
    print(LEGEND)
    best = max(runs, key=lambda name: results[name]["recall"])
    for name in runs if arguments.all else (best,):
        print(recall_matrix(name, results[name]["table"]), end="\n\n")
    for line in in_words(results):
        print(textwrap.fill(line, 108, initial_indent="- ", subsequent_indent="  "))

    if not arguments.no_figure:
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / "multiview_digits.png"
        draw(results, runs, conditions, path)
        print(f"\nFigure: {path}")
    return results


if __name__ == "__main__":
    # Layers this small do not gain from a second thread, and where other work shares the cores, threads
    # that wait for one another slow every step down many times over.
    torch.set_num_threads(1)
    main()
