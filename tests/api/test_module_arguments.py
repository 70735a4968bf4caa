"""Arguments that are refused when a module is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pmrl_kernels import DominantSVLoss, GRAMLoss, JointContrastiveLoss, PMRLLoss, TRIANGLELoss
from pmrl_kernels.modules import Temperature

BAD_TEMPERATURES = [
    (0.0, ValueError, "got 0.0"),
    (-1, ValueError, "got -1"),
    (math.nan, ValueError, "got nan"),
    (math.inf, ValueError, "got inf"),
    (True, TypeError, "got bool"),
    ("0.05", TypeError, "got str"),
    (None, TypeError, "got NoneType"),
    (torch.tensor(0.05), TypeError, "got a tensor"),
]
BAD: list[tuple[Callable[..., Any], str, Any, type[Exception], str]] = [
    *((DominantSVLoss, "temperature", *bad) for bad in BAD_TEMPERATURES),
    *((PMRLLoss, "temperature", *bad) for bad in BAD_TEMPERATURES),
    *((PMRLLoss, "instance_temperature", *bad) for bad in BAD_TEMPERATURES if bad[0] is not None),
    (PMRLLoss, "instance_temperature", 1e-300, ValueError, "got 1e-300, wanted one of float32's normal numbers"),
    (PMRLLoss, "instance_temperature", 1e300, ValueError, "got 1e+300"),
    *(
        (module, *bad)
        for module in (DominantSVLoss, PMRLLoss)
        for bad in [
            ("normalize", 1, TypeError, "got int"),
            ("objective", "svd", ValueError, "got 'svd'"),
            ("backend", "gpu", ValueError, "got 'gpu'"),
            ("backend", 3, ValueError, "got 3"),
            ("min_temperature", -1, ValueError, "got -1, wanted a finite number of at least 0"),
            ("min_temperature", math.nan, ValueError, "got nan"),
            ("min_temperature", math.inf, ValueError, "got inf"),
            ("min_temperature", "x", TypeError, "got str"),
            ("min_temperature", None, TypeError, "got NoneType"),
            ("min_temperature", torch.tensor(0.01), TypeError, "got Tensor"),
        ]
    ),
    *((JointContrastiveLoss, "temperature", *bad) for bad in BAD_TEMPERATURES),
    (JointContrastiveLoss, "temperature", 1e-300, ValueError, "got 1e-300"),
    (JointContrastiveLoss, "score", "area", ValueError, "got 'area', wanted one of 'volume'"),
    (JointContrastiveLoss, "normalize", 1, TypeError, "got int"),
    *(
        (module, *bad)
        for module in (JointContrastiveLoss, GRAMLoss, TRIANGLELoss)
        for bad in [
            ("label_smoothing", 1.1, ValueError, "got 1.1, wanted a number from 0 to 1"),
            ("half_gradient", None, TypeError, "got NoneType"),
            ("min_temperature", -1, ValueError, "got -1"),
            ("group", "everyone", TypeError, "got 'everyone'"),
            ("backend", "gpu", ValueError, "got 'gpu'"),
        ]
    ),
    (DominantSVLoss, "reduction", "average", ValueError, "got 'average'"),
    (DominantSVLoss, "reduction", None, ValueError, "got None"),
    (PMRLLoss, "contrast", "triples", ValueError, "got 'triples'"),
    (PMRLLoss, "return_components", "yes", TypeError, "got str"),
    (PMRLLoss, "instance_weight", -1.0, ValueError, "got -1.0"),
    (PMRLLoss, "instance_weight", math.nan, ValueError, "got nan"),
    (PMRLLoss, "instance_weight", True, TypeError, "got bool"),
    (PMRLLoss, "instance_weight", "1", TypeError, "got str"),
    (PMRLLoss, "alignment_weight", -1.0, ValueError, "got -1.0"),
    (PMRLLoss, "alignment_weight", True, TypeError, "got bool"),
    (PMRLLoss, "group", "everyone", TypeError, "got 'everyone'"),
]


@pytest.mark.parametrize(
    ("module", "argument", "value", "error", "part"),
    [pytest.param(*bad, id=f"{bad[0].__name__}-{bad[1]}={str(bad[2])[:12]}") for bad in BAD],
)
def test_bad_argument_is_refused_when_the_module_is_made(module, argument, value, error, part):
    with pytest.raises(error) as caught:
        module(**{argument: value})
    assert str(caught.value).startswith(f"{argument}: ")
    assert part in str(caught.value)


@pytest.mark.parametrize(("initial", "minimum"), [(0.01, 0.01), (0.005, 0.01)])
@pytest.mark.parametrize("module", [DominantSVLoss, PMRLLoss])
def test_learned_temperature_must_start_above_its_minimum(module, initial, minimum):
    with pytest.raises(ValueError, match=f"^temperature: got {initial}, wanted more than the least value {minimum}"):
        module(initial, learnable_temperature=True, min_temperature=minimum)


@pytest.mark.parametrize(("initial", "minimum"), [(1e-14, 0.0), (1e14, 0.01), (0.05, 0.05 - 1e-15)])
def test_learned_temperature_must_start_where_it_can_be(initial, minimum):
    """Or it would start elsewhere, and stay there."""
    with pytest.raises(ValueError, match=r"^temperature: got .*, wanted a difference of 9\.4e-14 to 1\.1e\+13"):
        Temperature(initial, learnable=True, minimum=minimum)
    assert Temperature(1e-13, learnable=True, minimum=0.0)().item() == pytest.approx(1e-13, rel=1e-5)
    Temperature(initial, minimum=minimum)


def test_instance_temperature_must_start_above_its_minimum():
    with pytest.raises(ValueError, match=r"^instance_temperature: got 0\.005, wanted more than the least value 0\.01"):
        PMRLLoss(instance_temperature=0.005, learnable_instance_temperature=True)


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize(
    ("value", "error"), [("a", TypeError), (math.nan, ValueError), (math.inf, ValueError), (-0.01, ValueError)]
)
def test_bad_minimum(value, error, learnable):
    """Also where it is not needed: a slip should not wait for the day that the temperature is learned."""
    with pytest.raises(error, match=r"^minimum: got"):
        Temperature(0.05, learnable=learnable, minimum=value)


@pytest.mark.parametrize("name", ["learnable", "learnable_temperature", "learnable_instance_temperature"])
def test_learnable_is_a_flag(name):
    makers = {"learnable": [Temperature], "learnable_temperature": [DominantSVLoss, PMRLLoss]}
    for make in makers.get(name, [PMRLLoss]):
        with pytest.raises(TypeError, match=f"^{name}: got int, wanted True or False"):
            make(0.05, **{name: 1})


@pytest.mark.parametrize("module", [DominantSVLoss, PMRLLoss])
def test_unknown_argument(module):
    with pytest.raises(TypeError, match="unexpected keyword argument 'tau'"):
        module(tau=0.05)


def test_bad_embeddings_through_a_module():
    for loss in (DominantSVLoss(), PMRLLoss()):
        with pytest.raises(ValueError, match=r"^embeddings\[1\]: got shape \(5, 3\), wanted \(4, 3\)"):
            loss(torch.ones(4, 3), torch.ones(5, 3))
