"""The contrasts of instances and of modalities: precision, extreme norms, vectors that are zero, NaN or left out."""

from __future__ import annotations

import pytest
import torch

from pmrl_kernels import dominant_singular_triplet, instance_contrastive_loss, losses, pmrl_loss
from pmrl_kernels.distributed import Group
from pmrl_kernels.ops.contrast import spec
from tests.tools import oracle
from tests.tools import tolerances as tol
from tests.tools.functions import CONTRASTS, DTYPES, EVERY_CONTRAST, any_bytes, finite, grads, leaves


@pytest.mark.parametrize("temperature", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instance_contrast_precision(backend, device, dtype, temperature):
    """No worse than F.cross_entropy in float32, though most of its losses are far below 1e-3."""
    u = torch.nn.functional.normalize(torch.randn(64, 48), dim=1).to(device, dtype).requires_grad_()
    (exact,) = oracle.upcast([u])
    rows = exact / torch.linalg.vector_norm(exact, dim=1, keepdim=True)
    delta = (rows @ rows.T - 1) / temperature
    delta = delta.masked_fill(torch.eye(64, dtype=torch.bool), -torch.inf)
    truth = torch.log1p(delta.exp().sum(1)).mean()
    ours = instance_contrastive_loss(u, temperature, backend=backend)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = tol.FORMULA_64 if dtype == torch.float64 else tol.CONTRAST_32 / temperature
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=bound, atol=0)
    (g,), (h,) = grads(ours, [u]), grads(truth, [exact])
    bound = max(bound, tol.HALF_GRADIENT.get(dtype, 0.0))
    least = tol.LEAST_HALF if dtype == torch.float16 else 0.0
    torch.testing.assert_close(g.cpu().double(), h, rtol=bound, atol=bound * float(h.abs().max()) + least)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 1e38])
def test_instance_contrast_of_extreme_norms(backend, device, scale):
    u = torch.randn(6, 8, device=device)
    one, other = u.clone().requires_grad_(), (u * scale).clamp(-3e38, 3e38).requires_grad_()
    losses = [instance_contrastive_loss(v, backend=backend) for v in (one, other)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)
    (g,), (h,) = grads(losses[0], [one]), grads(losses[1], [other])
    torch.testing.assert_close(h.double() * scale, g.double(), rtol=1e-3, atol=1e-5)


def test_raw_instance_contrast_of_large_norms(backend, device):
    u = torch.tensor([[1e20, 1e20], [1e20, -1e20]], device=device, requires_grad=True)
    loss = instance_contrastive_loss(u, normalize=False, backend=backend)
    assert loss == 0
    assert not grads(loss, [u])[0].any()


def test_similarities_whose_differences_float32_has_not(backend, device):
    """-2e38 and 2e38 are 40 apart in units of the temperature."""
    x = torch.tensor([[5e18, 0.0], [0.0, 5e18]], device=device, requires_grad=True)
    y = torch.tensor([[-4e19, 0.0], [4e19, 1.0]], device=device, requires_grad=True)
    found = []
    for given in ([x, y], oracle.upcast([x, y])):
        tau = torch.tensor(1e37, dtype=torch.float64, device=device, requires_grad=True)
        options = {"contrast": "pairs", "normalize": False, "alignment_weight": 0.0, "backend": backend}
        loss = pmrl_loss(*given, instance_temperature=tau, **options)
        *of_rows, of_tau = grads(loss, [*given, tau])
        found.append([loss, *(1e18 * g.double() for g in of_rows), 1e36 * of_tau])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.cpu().double(), b.cpu().double(), rtol=1e-6, atol=1e-6)


def test_subnormal_numbers_of_any_norm(backend, device):
    """Which halving would round to 0."""
    x = torch.tensor([[1.4e-45, 0.0], [0.0, 1.0]], device=device)
    y = torch.tensor([[1e38, 0.0], [3e38, 1.0]], device=device)
    options = {"contrast": "pairs", "normalize": False, "alignment_weight": 0.0, "backend": backend}
    found = pmrl_loss(x, y, instance_temperature=1e-7, **options)
    wanted = pmrl_loss(x.double(), y.double(), instance_temperature=1e-7, **options)
    torch.testing.assert_close(found.cpu().double(), wanted.cpu(), rtol=1e-5, atol=0.0)


def test_raw_instance_contrast_counts_zero_rows_and_large_losses(backend, device):
    """A zero row without normalisation is a row like any other: CE over two equal logits for it."""
    u = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64, device=device)
    wanted = torch.nn.functional.cross_entropy(u.cpu() @ u.cpu().T, torch.arange(2))
    torch.testing.assert_close(instance_contrastive_loss(u, 1.0, normalize=False, backend=backend).cpu(), wanted)
    # log(1 + e²²) is not 22 in float64
    u = torch.tensor([[1.0, 0.0], [23.0, 0.0]], dtype=torch.float64, device=device)
    wanted = (torch.tensor(22.0).double() + torch.log1p(torch.exp(torch.tensor(-22.0).double()))) / 2
    ours = instance_contrastive_loss(u, 1.0, normalize=False, backend=backend).cpu()
    torch.testing.assert_close(ours, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("contrast", EVERY_CONTRAST)
@pytest.mark.parametrize("upstream", [2.0**-40, 2.0**127])
def test_contrast_gradients_of_extreme_upstreams(backend, device, contrast, upstream):
    """Upstream over τ need not fit float32, only the gradient it makes: it multiplies before the rounding."""
    shared = torch.nn.functional.normalize(torch.randn(4, 64), dim=1)  # far apart: small probabilities
    xs = leaves([shared + 0.01 * torch.randn(4, 64) for _ in range(2)], device, torch.float32)
    found = []
    for factor in (1.0, upstream):
        parts = pmrl_loss(xs, instance_temperature=0.02, contrast=contrast, return_components=True, backend=backend)
        found.append(torch.autograd.grad(parts.instance, xs, torch.full_like(parts.instance, factor)))
    for g, h in zip(*found, strict=True):
        assert g.any()
        torch.testing.assert_close(h.double() / upstream, g.double(), rtol=1e-4, atol=1e-4 * float(g.abs().max()))


@pytest.mark.parametrize("normalize", [True, False])
def test_instance_contrast_of_bad_rows(backend, device, normalize):
    u = torch.randn(5, 4, device=device)
    u[3, 1] = float("nan")
    v = u.clone().requires_grad_()
    loss = instance_contrastive_loss(v, normalize=normalize, backend=backend)
    assert loss.isnan()
    assert grads(loss, [v])[0].isnan().all()
    # masked out, it does not exist
    mask = torch.arange(5, device=device) != 3
    v = u.clone().requires_grad_()
    loss = instance_contrastive_loss(v, normalize=normalize, mask=mask, backend=backend)
    torch.testing.assert_close(loss, instance_contrastive_loss(u[mask], normalize=normalize, backend=backend))
    gradient = grads(loss, [v])[0]
    assert finite(gradient)
    assert not gradient[3].any()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("normalize", [True, False])
def test_instance_contrast_does_not_swallow_infinities(backend, device, normalize, bad):
    """−inf − finite is a weight of 0, not a number: the row must be found otherwise."""
    for rows in ([[bad, 1.0], [-1.0, 2.0]], [[bad, bad], [-1.0, 2.0], [1.0, -1.0]]):
        u = torch.tensor(rows, device=device, requires_grad=True)
        loss = instance_contrastive_loss(u, normalize=normalize, backend=backend)
        assert loss.isnan()
        assert grads(loss, [u])[0].isnan().all()


@pytest.mark.parametrize("contrast", EVERY_CONTRAST)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_contrast_itself_shows_a_bad_row(backend, device, contrast, bad):
    xs = [torch.randn(4, 6, device=device) for _ in range(3)]
    xs[1][2, 0] = bad
    assert pmrl_loss(xs, contrast=contrast, return_components=True, backend=backend).instance.isnan()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("function", CONTRASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_bad_row_that_is_compared_with_nothing(backend, device, dtype, function, normalize, bad):
    """The only one that takes part has nobody to be told from, and no similarity shows what is wrong with it."""
    raw = function == "instance_contrastive_loss" and not normalize  # where a zero row is a row like any other
    for left in ("alone", "masked", "beside zeros"):
        B, row = (1, 0) if left == "alone" else (3, 1)
        others = torch.arange(B) != row
        xs = [torch.randn(B, 5) for _ in range(3)]
        xs[0][row, 2] = bad
        mask = None
        if left == "masked":
            mask = ~others[:, None].expand(B, 3 if function.endswith("3") else 1).to(device)
        elif left == "beside zeros":
            xs = [x.masked_fill(others[:, None], 0.0) for x in xs]
        xs = leaves(xs, device, dtype)
        tau = torch.tensor(0.2, device=device, requires_grad=True)
        options = {"normalize": normalize, "mask": mask, "instance_temperature": tau, "backend": backend}
        loss = CONTRASTS[function](*xs, **options)
        assert loss.isnan(), left
        *found, slope = torch.autograd.grad(loss, [*xs, tau], allow_unused=True)
        assert slope.isnan(), left
        for g in found:
            if g is not None:
                assert g[row].isnan().all(), left
                assert g[others].isnan().all() if raw and left == "beside zeros" else not g[others].any(), left


@pytest.mark.parametrize(("bad", "upstream"), [(float("nan"), 1.0), (0.5, float("inf")), (0.5, float("nan"))])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("function", CONTRASTS)
def test_zero_vectors_get_zeros_beside_anything(backend, device, function, normalize, bad, upstream):
    """An instance without a direction is left out of the contrast, whatever the others or the upstream gradient are."""
    if function == "instance_contrastive_loss" and not normalize:
        return  # there it takes part
    xs = [torch.randn(4, 5) for _ in range(3)]
    xs[0][2, 1] = bad
    for x in xs:
        x[1] = 0
    xs = leaves(xs, device, torch.float32)
    loss = CONTRASTS[function](*xs, normalize=normalize, backend=backend)
    for g in torch.autograd.grad(loss, xs, torch.full_like(loss, upstream), allow_unused=True):
        if g is not None:
            assert not g[1].any()
            assert not g[[0, 2, 3]].isfinite().any()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("bad", "upstream"), [(float("nan"), 1.0), (0.5, float("inf")), (0.5, float("nan"))])
def test_rows_left_out_of_the_instance_contrast_get_zeros(backend, device, normalize, bad, upstream):
    """Also where the rows that take part, or the upstream gradient, make everything else NaN."""
    u = torch.randn(5, 3, device=device)
    u[0, 0] = bad
    u.requires_grad_()
    mask = torch.tensor([1, 1, 0, 1, 0], device=device).bool()
    loss = instance_contrastive_loss(u, normalize=normalize, mask=mask, backend=backend)
    gradient = torch.autograd.grad(loss, u, torch.full_like(loss, upstream))[0]
    assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))


@pytest.mark.parametrize("normalize", [True, False])
def test_masks_of_any_bytes_for_rows(backend, device, normalize):
    u = torch.randn(6, 9, device=device, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 0, 1], device=device).bool()
    options = {"normalize": normalize, "backend": backend}
    one, other = (instance_contrastive_loss(u, mask=m, **options) for m in (any_bytes(mask), mask))
    assert torch.equal(one, other)
    assert torch.equal(*(grads(loss, [u])[0] for loss in (one, other)))


@pytest.mark.parametrize("contrast", ["pairs", "modality", "leave_one_out"])
def test_gradients_of_losses_far_below_rounding(backend, device, contrast):
    """Positives are pulled by as much as all others push, though 1 - exp(-1e-9) is nothing in float32."""
    torch.manual_seed(0)
    rows = torch.eye(6, 12)[:, None] + 0.05 * torch.randn(6, 3, 12)
    x = rows.to(device).requires_grad_()
    (exact,) = oracle.upcast([x])
    options = {"contrast": contrast, "instance_temperature": 0.05, "alignment_weight": 0.0}
    loss, truth = pmrl_loss(x, backend=backend, **options), pmrl_loss(exact, backend="reference", **options)
    assert 1e-11 < truth.item() < 1e-6
    torch.testing.assert_close(loss.cpu().double(), truth, rtol=1e-4, atol=0)
    (g,), (h,) = grads(loss, [x]), grads(truth, [exact])
    torch.testing.assert_close(g.cpu().double(), h, rtol=0, atol=1e-4 * float(h.abs().max()))


def test_zeros_are_candidates_of_the_contrast_of_modalities(backend, device):
    """And have a loss: only instances without a leading vector are left out."""
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(5, 3, 8, dtype=torch.float64), dim=2)
    x[1, 0] = 0
    u = dominant_singular_triplet(x, backend="reference").u
    s = [x[:, m] @ u.T / 0.2 for m in range(3)]
    rows = torch.arange(5)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = sum(cross_entropy(y, rows) + cross_entropy(y.T, rows) for y in s) / 6
    options = {"contrast": "modality", "instance_temperature": 0.2, "alignment_weight": 0.0}
    found = pmrl_loss(x.float().to(device), backend=backend, **options)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=0)


def test_what_is_compared_with_nothing_makes_no_contrast_of_pairs_nan(backend, device):
    """One embedding is all there is."""
    x = torch.randn(2, 3, 4, device=device)
    x[0, 1] = torch.nan
    mask = torch.zeros(2, 3, dtype=torch.bool, device=device)
    mask[0, 1] = True
    loss = pmrl_loss(x, mask=mask, contrast="pairs", alignment_weight=0.0, backend=backend)
    assert loss == 0


@pytest.mark.parametrize("contrast", EVERY_CONTRAST)
def test_masks_of_any_bytes_of_every_contrast(backend, device, contrast):
    x, mask = torch.randn(7, 3, 5, device=device), torch.rand(7, 3, device=device) < 0.6
    losses = [pmrl_loss(x, mask=m, contrast=contrast, backend=backend) for m in (mask, any_bytes(mask))]
    assert torch.equal(*losses)


def test_which_op_a_contrast_is_of():
    """What is of any norm has kernels on fewer backends."""
    assert spec.op(spec.RAW, False) is spec.op(spec.kind("pairs", 3), False) is spec.OF_ANY_NORM
    assert spec.op(spec.kind("leading", 3), False) is spec.op(spec.kind("pairs", 3), True) is spec.PAIRED


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("contrast", EVERY_CONTRAST)
def test_the_op_that_a_loss_asks_for(monkeypatch, contrast, normalize):
    asked, resolve = [], losses.resolve
    monkeypatch.setattr(losses, "resolve", lambda op, *rest: asked.append(op) or resolve(op, *rest))
    pmrl_loss(torch.randn(4, 3, 5), contrast=contrast, normalize=normalize)
    assert asked[1] is spec.op(spec.kind(contrast, 3), normalize)


def test_temperature_gradient_beside_similarities_of_minus_infinity(backend, device):
    x = torch.tensor([[1e20, 0.0], [0.0, 1.0]], device=device, requires_grad=True)
    y = torch.tensor([[0.0, 1.0], [-1e20, 1.0]], device=device, requires_grad=True)
    tau = torch.tensor(0.5, device=device, requires_grad=True)
    options = {"contrast": "pairs", "normalize": False, "alignment_weight": 0.0, "backend": backend}
    *rows, slope = grads(pmrl_loss(x, y, instance_temperature=tau, **options), [x, y, tau])
    assert all(g.isfinite().all() for g in rows)
    wide = [t.detach().double().requires_grad_() for t in (x, y, tau)]
    exact = grads(pmrl_loss(*wide[:2], instance_temperature=wide[2], **options), wide)
    torch.testing.assert_close(slope.double(), exact[2], rtol=1e-5, atol=0)


def test_everyone_s_mask_is_read_by_processes_without_one():
    theirs = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    everyone = torch.cat([torch.randn(3, 3 * 4), theirs], 1)
    for rank, sizes in ((0, (2, 1)), (1, (1, 2))):
        contrast = spec.Contrast(None, spec.kind("modality", 2), 0.1, Group(None, sizes, rank))
        present = contrast._arguments(None, [torch.randn(2, 4) for _ in range(3)], everyone)[5]
        assert torch.equal(present, theirs.bool())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dtype_of_the_instance_contrast(backend, device, dtype, normalize):
    u = torch.randn(6, 5, device=device).to(dtype)
    loss = instance_contrastive_loss(u, normalize=normalize, backend=backend)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    same = instance_contrastive_loss(u.float(), normalize=normalize, backend=backend).to(loss.dtype)
    torch.testing.assert_close(loss, same, rtol=1e-5, atol=1e-6)


def test_default_temperature_of_instances():
    u = torch.randn(6, 5)
    assert torch.equal(instance_contrastive_loss(u), instance_contrastive_loss(u, 0.1))
