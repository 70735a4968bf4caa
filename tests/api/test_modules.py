"""The module forms: equal to the functions, with temperatures that learn, keep their distance from 0, and travel.

"Travel": through state_dict, deepcopy, pickle and ``.to(dtype)``, with an informative repr.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pmrl_kernels import (
    DominantSVLoss,
    GRAMLoss,
    JointContrastiveLoss,
    PMRLComponents,
    PMRLLoss,
    TRIANGLELoss,
    dominant_sv_loss,
    gram_loss,
    joint_contrastive_loss,
    pmrl_loss,
    triangle_loss,
)
from pmrl_kernels.modules import Temperature
from tests import ROOT

B, K, D = 6, 3, 8


def as_float32(value: float) -> float:
    """What a float32 parameter's temperature can hold of a number: 0.01 itself is no float32."""
    return torch.tensor(value).item()


def modalities(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(K)]


def some_mask() -> Tensor:
    mask = torch.ones(B, K, dtype=torch.bool)
    mask[0, 1] = mask[2, 0] = mask[3, 1] = mask[3, 2] = False
    return mask


FORMS: dict[str, Callable[[list[Tensor], Tensor | None], tuple[tuple[Any, ...], Any]]] = {
    "positional": lambda xs, mask: (tuple(xs), mask),
    "list": lambda xs, mask: ((xs,), mask),
    "stack": lambda xs, mask: ((torch.stack(xs, 1),), mask),
    "dict": lambda xs, mask: (
        (dict(zip("abc", xs, strict=False)),),
        None if mask is None else dict(zip("abc", mask.unbind(1), strict=False)),
    ),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
masked = pytest.mark.parametrize("mask", [None, some_mask()], ids=["full", "masked"])

DOMINANT_OPTIONS = [
    {},
    {"temperature": 0.3, "normalize": False},
    {"reduction": "sum"},
    {"reduction": "none", "objective": "leading"},
    {"backend": "reference"},
]
PMRL_OPTIONS = [
    {},
    {"temperature": 0.3, "instance_temperature": 0.7, "instance_weight": 0.25},
    {"normalize": False, "objective": "leading"},
    {"contrast": "modality", "temperature": 1.0},
    {"contrast": "leave_one_out", "temperature": 1.0, "alignment_weight": 0.5},
    {"contrast": "pairs", "alignment_weight": 0},
    {"instance_weight": 0, "backend": "reference"},
]


@masked
@each_form
@pytest.mark.parametrize("options", DOMINANT_OPTIONS, ids=str)
def test_dominant_sv_loss_module_is_the_function(options, form, mask):
    xs = modalities()
    arguments, mask = form(xs, mask)
    found = DominantSVLoss(**options)(*arguments, mask=mask)
    expected = dominant_sv_loss(*arguments, mask=mask, **options)
    assert torch.equal(found, expected)
    for a, b in zip(torch.autograd.grad(found.sum(), xs), torch.autograd.grad(expected.sum(), xs), strict=True):
        assert torch.equal(a, b)


@masked
@each_form
@pytest.mark.parametrize("options", PMRL_OPTIONS, ids=str)
def test_pmrl_loss_module_is_the_function(options, form, mask):
    xs = modalities()
    arguments, mask = form(xs, mask)
    found = PMRLLoss(**options)(*arguments, mask=mask)
    expected = pmrl_loss(*arguments, mask=mask, **options)
    assert torch.equal(found, expected)
    for a, b in zip(torch.autograd.grad(found, xs), torch.autograd.grad(expected, xs), strict=True):
        assert torch.equal(a, b)


@masked
@each_form
@pytest.mark.parametrize(
    ("module", "function", "options"),
    [
        (JointContrastiveLoss, joint_contrastive_loss, {}),
        (JointContrastiveLoss, joint_contrastive_loss, {"score": "cosine", "temperature": 0.3, "normalize": False}),
        (JointContrastiveLoss, joint_contrastive_loss, {"label_smoothing": 0.2, "half_gradient": True}),
        (GRAMLoss, gram_loss, {}),
        (GRAMLoss, gram_loss, {"temperature": 0.3, "label_smoothing": 0.0, "backend": "reference"}),
        (TRIANGLELoss, triangle_loss, {"half_gradient": True}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value.__name__,
)
def test_joint_contrasts_modules_are_the_functions(module, function, options, form, mask):
    query, *xs = modalities()
    arguments, given = form(xs, None if mask is None else mask[:, 1:])
    where = {} if module is TRIANGLELoss else {"mask": given}
    for positives in (None, torch.tensor([0, 0, 2, -1, 4, 4])):
        found = module(**options)(query, *arguments, positives=positives, **where)
        expected = function(query, *arguments, positives=positives, **where, **options)
        assert torch.equal(found, expected)
        gradients = (torch.autograd.grad(loss, (query, *xs)) for loss in (found, expected))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_mask_matters():
    """Else the tests above could not see one that is dropped on the way."""
    xs, mask = modalities(), some_mask()
    for loss in (DominantSVLoss(), PMRLLoss(), PMRLLoss(contrast="modality")):
        assert loss(xs) != loss(xs, mask=mask)
    for loss in (JointContrastiveLoss(), GRAMLoss()):
        assert loss(xs[0], xs[1:]) != loss(xs[0], xs[1:], mask=mask[:, 1:])


@pytest.mark.parametrize("contrast", ["leading", "leave_one_out"])
def test_return_components(contrast):
    xs = modalities()
    options = {"contrast": contrast, "instance_weight": 0.5}
    found = PMRLLoss(return_components=True, **options)(*xs)
    assert isinstance(found, PMRLComponents)
    assert found._fields == ("total", "alignment", "instance")
    for a, b in zip(found, pmrl_loss(*xs, return_components=True, **options), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(found.total, found.alignment + 0.5 * found.instance)
    assert torch.equal(found.total, PMRLLoss(**options)(*xs))
    total, alignment, instance = (torch.autograd.grad(y, xs[0], retain_graph=True)[0] for y in found)
    torch.testing.assert_close(total, alignment + 0.5 * instance)


def test_fixed_temperature_is_no_parameter():
    for loss in (DominantSVLoss(), PMRLLoss()):
        assert not list(loss.parameters())
        assert not loss.state_dict()
        assert loss.temperature() == 0.05
        assert isinstance(loss.temperature(), float)


# ------------------------------------------------------------------------------------------------
# Learnable temperatures
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("initial", "minimum"), [(0.05, 0.01), (1.0, 0.0), (0.0101, 0.01), (100.0, 0.5)])
def test_learned_temperature_starts_at_its_initial_value(initial, minimum):
    tau = Temperature(initial, learnable=True, minimum=minimum)()
    assert isinstance(tau, Tensor)
    assert tau.shape == ()
    torch.testing.assert_close(tau.item(), initial, rtol=1e-6, atol=0.0)


class Joint(JointContrastiveLoss):
    """The first modality as the query, so that it is called as the others are."""

    def forward(self, xs: list[Tensor], mask: Tensor | None = None) -> Tensor:
        return super().forward(xs[0], *xs[1:], mask=None if mask is None else mask[:, 1:])


LEARNING = {
    "JointContrastiveLoss": (
        lambda: Joint(temperature=0.2, learnable_temperature=True),
        ["temperature.log_excess"],
    ),
    "DominantSVLoss": (lambda: DominantSVLoss(0.2, learnable_temperature=True), ["temperature.log_excess"]),
    "PMRLLoss": (
        lambda: PMRLLoss(0.2, 0.3, learnable_temperature=True, learnable_instance_temperature=True),
        ["temperature.log_excess", "instance_temperature.log_excess"],
    ),
    "PMRLLoss, modality": (
        lambda: PMRLLoss(
            0.2, 0.3, contrast="modality", learnable_temperature=True, learnable_instance_temperature=True
        ),
        ["temperature.log_excess", "instance_temperature.log_excess"],
    ),
    "PMRLLoss, one of two": (
        lambda: PMRLLoss(0.2, 0.3, learnable_instance_temperature=True),
        ["instance_temperature.log_excess"],
    ),
}
each_learner = pytest.mark.parametrize(("make", "names"), LEARNING.values(), ids=LEARNING.keys())


@each_learner
def test_parameters_are_the_temperatures(make, names):
    assert [name for name, _ in make().named_parameters()] == names


@each_learner
@masked
def test_gradient_of_a_learned_temperature(make, names, mask):
    """Against central differences in ρ, through the module itself."""
    loss, xs, step = make().double(), modalities(), 1e-5
    loss(xs, mask=mask).backward()
    for name in names:
        rho = loss.get_parameter(name)
        assert rho.grad is not None
        with torch.no_grad():
            start = rho.clone()
            up = loss(xs, mask=mask) if rho.copy_(start + step) is rho else None
            down = loss(xs, mask=mask) if rho.copy_(start - step) is rho else None
            rho.copy_(start)
        torch.testing.assert_close(rho.grad[0], (up - down) / (2 * step), rtol=1e-6, atol=1e-10)
        assert rho.grad != 0


def test_gradient_of_a_learned_temperature_by_its_formula():
    """dL/dρ = e^ρ·dL/dτ, with dL/dτ by autograd through a float64 SVD."""
    xs = modalities()
    loss = DominantSVLoss(0.2, learnable_temperature=True).double()
    loss(xs).backward()
    tau = loss.temperature().detach().requires_grad_()
    Z = torch.stack([torch.nn.functional.normalize(x.detach(), dim=1) for x in xs], 2)
    sigma = torch.linalg.svdvals(Z)
    oracle = torch.nn.functional.cross_entropy(sigma / tau, torch.zeros(B, dtype=torch.int64))
    (slope,) = torch.autograd.grad(oracle, tau)
    rho = loss.temperature.log_excess
    torch.testing.assert_close(rho.grad, slope * rho.detach().exp(), rtol=1e-10, atol=0.0)


def test_learned_temperature_leaves_the_embeddings_gradient_alone():
    xs = modalities()
    learned = DominantSVLoss(0.2, learnable_temperature=True).double()
    expected = dominant_sv_loss(xs, temperature=learned.temperature().item())
    found = torch.autograd.grad(learned(xs), xs)
    torch.testing.assert_close(found, torch.autograd.grad(expected, xs), rtol=1e-12, atol=1e-14)


@each_learner
@pytest.mark.parametrize("maximize", [False, True], ids=["down", "up"])
@pytest.mark.parametrize("lr", [1.0, 30.0, 1e3, 1e6])
def test_temperature_stays_above_its_minimum_under_large_steps(make, names, maximize, lr):
    """ρ may take any value: the temperature stays in [minimum, inf) and the loss finite."""
    loss, xs = make(), modalities(torch.float32)
    optimizer = torch.optim.SGD(loss.parameters(), lr=lr, maximize=maximize)
    for _ in range(10):
        optimizer.zero_grad()
        value = loss(xs)
        assert value.isfinite()
        value.backward()
        optimizer.step()
        for name in names:
            tau = loss.get_submodule(name.removesuffix(".log_excess"))()
            assert as_float32(0.01) <= tau.item() < math.inf


@pytest.mark.parametrize("rho", [-1e30, -1e4, -100.0, 0.0, 80.0, 100.0, 1e4], ids=str)
@pytest.mark.parametrize("minimum", [0.0, 0.01])
def test_any_parameter_value_gives_a_usable_temperature(rho, minimum):
    tau = Temperature(0.05, learnable=True, minimum=minimum)
    with torch.no_grad():
        tau.log_excess.fill_(rho)
    assert as_float32(minimum) <= tau().item() < math.inf
    assert tau().item() > 0
    assert dominant_sv_loss(modalities(torch.float32), temperature=tau()).isfinite()


def test_descent_lowers_a_learned_temperature():
    """The drift that the minimum is there for."""
    xs = modalities()
    loss = DominantSVLoss(0.5, learnable_temperature=True, min_temperature=0.1)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss(xs).backward()
        optimizer.step()
    assert as_float32(0.1) <= loss.temperature() < 0.11


# ------------------------------------------------------------------------------------------------
# State
# ------------------------------------------------------------------------------------------------


def moved(loss: Any) -> Any:
    """``loss`` with its parameters away from their initial values."""
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.7)
    return loss


def reload(loss: Any, make: Callable[[], Any]) -> Any:
    fresh = make()
    buffer = io.BytesIO()
    torch.save(loss.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


COPIES = {
    "state_dict": reload,
    "deepcopy": lambda loss, make: copy.deepcopy(loss),
    "pickle": lambda loss, make: pickle.loads(pickle.dumps(loss)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
@each_learner
def test_copies_compute_the_same_and_share_nothing(make, names, copied):
    xs = modalities()
    loss = moved(make())
    twin = copied(loss, make)
    assert [name for name, _ in twin.named_parameters()] == names
    assert torch.equal(twin(xs), loss(xs))
    assert not torch.equal(loss(xs), make()(xs))  # else a copy that forgot its parameters would pass
    before = loss(xs)
    moved(twin)
    assert torch.equal(loss(xs), before)
    assert repr(twin) == repr(loss)


@pytest.mark.parametrize("assign", [False, True])
@each_learner
def test_a_state_saved_for_parameters_without_dimensions_loads(make, names, assign):
    """As version 0.1.0 saved them; also as part of a model, and what was saved stays as it is."""
    loss = moved(make())
    old = {name: value.reshape(()) for name, value in loss.state_dict().items()}
    assert set(old) == set(names)
    fresh, model = make(), torch.nn.ModuleDict({"loss": make()})
    fresh.load_state_dict(old, assign=assign)
    model.load_state_dict({f"loss.{name}": value for name, value in old.items()}, assign=assign)
    for twin in (fresh, model["loss"]):
        assert all(twin.get_parameter(name).shape == (1,) for name in names)
        assert torch.equal(twin(modalities()), loss(modalities()))
    assert all(value.shape == () for value in old.values())


def test_a_state_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match=r"size mismatch for temperature\.log_excess"):
        DominantSVLoss(learnable_temperature=True).load_state_dict({"temperature.log_excess": torch.zeros(2)})


@pytest.mark.parametrize(
    ("make", "options"),
    [(torch.optim.Adam, {"amsgrad": True}), (torch.optim.SGD, {"momentum": 0.9})],
    ids=["Adam", "SGD"],
)
def test_an_old_state_of_an_optimizer_as_the_recipes_have_it(make, options):
    """PyTorch takes it unseen, and its next step fails."""
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(3, 3), "loss": DominantSVLoss(learnable_temperature=True)})
    optimizer = make(model.parameters(), lr=0.1, **options)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.3)
    optimizer.step()
    expected = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(expected)
    state = saved["state"][2]
    state.update({key: x.reshape(()) for key, x in state.items()})  # as it was when the parameter was 0-d
    optimizer.load_state_dict(copy.deepcopy(saved))
    with pytest.raises(RuntimeError, match="broadcast shape"):
        optimizer.step()
    exec(block("optimizer.state.items()"), {"optimizer": optimizer, "saved": saved})
    for index, state in expected["state"].items():
        for key, value in state.items():
            assert torch.equal(optimizer.state_dict()["state"][index][key], value)
    optimizer.step()


@each_learner
def test_made_on_meta_and_initialised_later(make, names):
    """As FSDP and torchtitan do it; without reset_parameters the memory would hold anything (here: NaN)."""
    with torch.device("meta"):
        loss = make()
    assert all(loss.get_parameter(name).is_meta for name in names)
    loss.to_empty(device="cpu")
    for module in loss.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.equal(loss(modalities()), make()(modalities()))
    assert loss.state_dict() == make().state_dict()


@each_learner
def test_reset_parameters_starts_over(make, names):
    loss = moved(make())
    for module in loss.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.equal(loss(modalities()), make()(modalities()))
    assert all(parameter.requires_grad for parameter in loss.parameters())
    Temperature(0.05).reset_parameters()  # nothing to do


def test_a_parameter_has_a_dimension_and_its_temperature_has_none():
    """Sharding (FSDP) takes no parameter without dimensions; functions take a temperature with none."""
    tau = Temperature(0.05, learnable=True)
    assert tau.log_excess.shape == (1,)
    assert tau().shape == ()


def test_a_parameter_of_which_nothing_is_at_hand():
    """As FSDP1 leaves it between forward passes on all processes but one."""
    tau = Temperature(0.05, learnable=True)
    tau.log_excess = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(RuntimeError, match=r"^log_excess: got a shard of it, wanted the whole parameter"):
        tau()


def block(name: str) -> str:
    """A block of docs/recipes.md, by a word that is in it."""
    text = (ROOT / "docs/recipes.md").read_text()
    (found,) = [x for x in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if name in x]
    return found


def test_weight_decay_as_the_recipes_have_it():
    """It would pull ρ towards 0, τ towards 1 + τ_min; in a group of its own ρ stays where gradients leave it."""
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(3, 3), "loss": PMRLLoss(learnable_temperature=True)})
    names: dict[str, Any] = {"model": model, "torch": torch}
    exec(block("weight_decay"), names)
    pulled = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5)
    rho = model["loss"].temperature.log_excess
    for optimizer, stays in ((names["optimizer"], True), (pulled, False)):
        before = {name: x.detach().clone() for name, x in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert torch.equal(rho, before["loss.temperature.log_excess"]) == stays
        assert model["head"].weight.norm() < before["head.weight"].norm()
    assert rho.abs() < before["loss.temperature.log_excess"].abs()
    listed = [x for group in names["optimizer"].param_groups for x in group["params"]]
    assert {id(x) for x in listed} == {id(x) for x in model.parameters()}


def test_state_dict_of_a_fixed_module_fits_no_learned_one():
    with pytest.raises(RuntimeError, match="log_excess"):
        DominantSVLoss(learnable_temperature=True).load_state_dict(DominantSVLoss().state_dict())


@each_learner
def test_to_float64(make, names):
    loss = make().to(torch.float64)
    value = loss(modalities())
    value.backward()
    for name in names:
        parameter = loss.get_parameter(name)
        assert parameter.dtype == torch.float64
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float64
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, make()(modalities()), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_learner
def test_to_half_precision(make, names, dtype):
    """``model.to(torch.bfloat16)`` takes the loss's parameters along."""
    loss = make().to(dtype)
    value = loss(modalities(dtype))
    value.backward()
    assert value.dtype == torch.float32
    for name in names:
        gradient = loss.get_parameter(name).grad
        assert gradient is not None
        assert gradient.dtype == dtype
        assert gradient.isfinite()


def test_train_and_eval_are_the_same():
    xs = modalities()
    loss = PMRLLoss()
    assert torch.equal(loss.train()(xs), loss.eval()(xs))


@pytest.mark.parametrize(
    ("module", "parts"),
    [
        (Temperature(0.05), ["Temperature(0.05)"]),
        (Temperature(0.05, learnable=True, minimum=0.02), ["0.05", "learnable=True", "minimum=0.02"]),
        (
            DominantSVLoss(0.07, reduction="sum", objective="leading", normalize=False),
            ["DominantSVLoss", "0.07", "normalize=False", "reduction='sum'", "objective='leading'"],
        ),
        (DominantSVLoss(learnable_temperature=True), ["learnable=True", "minimum=0.01"]),
        (
            JointContrastiveLoss("sine", 0.3, label_smoothing=0.2, half_gradient=True),
            ["JointContrastiveLoss", "'sine'", "0.3", "label_smoothing=0.2", "half_gradient=True"],
        ),
        (
            GRAMLoss(learnable_temperature=True),
            ["GRAMLoss", "'volume'", "0.07", "label_smoothing=0.1", "learnable=True"],
        ),
        (TRIANGLELoss(), ["TRIANGLELoss", "'area2'", "normalize=True"]),
        (
            PMRLLoss(0.07, 0.3, 0.5, contrast="modality", learnable_instance_temperature=True),
            ["PMRLLoss", "0.07", "0.3", "instance_weight=0.5", "contrast='modality'", "learnable=True"],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_repr_says_what_was_set(module, parts):
    for part in parts:
        assert part in repr(module)
