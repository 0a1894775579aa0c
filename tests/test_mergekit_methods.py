"""Every one of mergekit's methods against the operator and settings that stand for it, on single tensors in fp32.

What is random there is held to its law: how much is kept, and the norm. mergekit 0.1.5 is called by `merge_tensors`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from portmanteau.compositions.mergekit.methods import METHODS
from portmanteau.merge import operators
from portmanteau.merge.registry import find

with warnings.catch_warnings():
    # mergekit.io.lazy_unpickle names numpy.core, which NumPy 2 calls numpy._core
    warnings.filterwarnings("ignore", "numpy.core is deprecated", DeprecationWarning)
    from mergekit import merge_methods
    from mergekit.merge_methods.api import merge_tensors

pytestmark = pytest.mark.mergekit

SHAPE = (24, 40)
WEIGHTS = (0.7071, 0.4343, 0.2087, 0.3)
MIXED = (0.8954, -0.3491, 0.2087, 0.3)


def tensors(count: int, *, shape: tuple[int, ...] = SHAPE, size: float = 0.1) -> tuple[Tensor, Tensor]:
    """Make a base [*shape] and models [count, *shape] that lie around it."""
    generator = torch.Generator().manual_seed(count)
    base = torch.randn(shape, generator=generator)
    return base, base + size * torch.randn((count, *shape), generator=generator)


def theirs(method: str, base: Tensor | None, models: Tensor, given: Mapping[str, Any], **options: Any) -> Tensor:
    """Let mergekit merge; parameters for each model are sequences in the order of the models."""
    inputs = list(models) if base is None else [base, *models]
    index = None if base is None else 0
    return merge_tensors(inputs, method, parameters=given, base_index=index, **options)


def ours(method: str, base: Tensor | None, models: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Apply the operator that stands for a method, with the settings that stand for its parameters."""
    spelled = METHODS[method]
    operator = find(spelled.operator)
    settings = dict(spelled.settings)
    for name, value in given.items():
        settings[spelled.parameters[name]] = spelled.values.get(name, {}).get(value, value)
    if "base" in operator.roles:
        return operator.apply(models, base, **settings)
    if base is None or not operator.on_deltas:
        return operator.apply(models, **settings)
    return base + operator.apply(models - base, **settings)


BASED: list[tuple[str, int, dict[str, Any]]] = [
    *(("task_arithmetic", n, {"weight": MIXED[:n], "lambda": 0.6}) for n in (2, 3, 4)),
    ("task_arithmetic", 3, {"weight": WEIGHTS[:3], "normalize": True}),
    *(("ties", n, {"weight": MIXED[:n], "density": 0.3}) for n in (2, 3, 4)),
    ("ties", 3, {"weight": WEIGHTS[:3], "density": (0.2, 0.5, 0.9), "rescale": True, "lambda": 1.3}),
    ("ties", 2, {"weight": WEIGHTS[:2]}),
    *((f"breadcrumbs{kind}", n, {"weight": MIXED[:n], "density": 0.4}) for kind in ("", "_ties") for n in (2, 3, 4)),
    ("breadcrumbs", 2, {"weight": WEIGHTS[:2], "density": (0.8, 0.5), "gamma": (0.3, 0.1), "rescale": True}),
    ("breadcrumbs_ties", 3, {"weight": WEIGHTS[:3], "density": 0.5, "gamma": 0.05, "normalize": True, "lambda": 0.7}),
    ("breadcrumbs", 2, {"weight": WEIGHTS[:2]}),
    *((name, 3, {"weight": MIXED[:3]}) for name in ("dare_linear", "dare_ties", "della", "della_linear")),
    ("della", 3, {"weight": WEIGHTS[:3], "normalize": False, "lambda": 0.8}),
    ("della_linear", 4, {"weight": WEIGHTS, "normalize": True}),
    *(("sce", n, {}) for n in (1, 2, 3, 4)),
    *(("sce", n, {"select_topk": share}) for n in (2, 4) for share in (0.1, 0.5)),
    *(("ram", n, {}) for n in (1, 2, 3, 4)),
    *(("ram", n, {"epsilon": 0.1}) for n in (2, 3, 4)),
    *(("ramplus_tl", n, {"epsilon": 0.15}) for n in (2, 3, 4)),
    ("ramplus_tl", 3, {"epsilon": 0.2, "r": 0.5, "alpha": 2.0}),
    *(("model_stock", n, {"filter_wise": rows}) for n in (2, 3, 4) for rows in (False, True)),
    *(("nearswap", 1, {"t": t}) for t in (0.0, 1e-4, 0.05, 0.5)),
    *(("nuslerp", 2, {"weight": WEIGHTS[:2], "nuslerp_flatten": flatten}) for flatten in (True, False)),
    ("nuslerp", 2, {"weight": WEIGHTS[:2], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    *(("multislerp", n, {"weight": WEIGHTS[:n]}) for n in (2, 3, 4)),
]
ALONE: list[tuple[str, int, dict[str, Any]]] = [
    ("linear", 3, {"weight": MIXED[:3]}),
    ("linear", 2, {"weight": MIXED[:2], "normalize": False}),
    ("slerp", 2, {"t": 0.3}),
    *(("nuslerp", 2, {"weight": WEIGHTS[:2], "nuslerp_flatten": flatten}) for flatten in (True, False)),
    ("nuslerp", 2, {"weight": WEIGHTS[:2], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    *(("multislerp", n, {"weight": WEIGHTS[:n]}) for n in (1, 2, 3, 4)),
    ("multislerp", 3, {"weight": WEIGHTS[:3], "normalize_weights": False}),
    *(("karcher", n, {}) for n in (1, 2, 3, 4)),
    ("karcher", 3, {"max_iter": 2, "tol": 1e-3}),
    ("passthrough", 1, {}),
    ("passthrough", 1, {"scale": 0.3}),
    ("passthrough", 1, {"scale": None}),
]


def name_of(value: object) -> str:
    return str(value).replace("'", "")


def test_every_method_and_parameter_is_spelled_with_mergekits_defaults() -> None:
    registered = {method.spec.name: method.spec for method in merge_methods.registry.registered_methods()}
    assert METHODS.keys() == registered.keys()
    for name, method in METHODS.items():
        own = {p.name: p for p in registered[name].parameters}
        assert method.parameters.keys() | method.without_effect == own.keys(), name
        assert method.required == {p.name for p in own.values() if p.required}, name
        assert method.per_model == {p.name for p in own.values() if p.scope.value != "shared"}, name
        for ours_is, setting in method.parameters.items():
            if not own[ours_is].required:
                default = method.values.get(ours_is, {}).get(own[ours_is].default, own[ours_is].default)
                assert method.settings[setting] == default, (name, ours_is)
        known = find(method.operator).settings
        assert {*method.settings, *method.parameters.values()} <= known.keys(), name
        for setting, value in method.settings.items():
            known[setting].check(value)


@pytest.mark.parametrize(("method", "count", "given"), BASED, ids=name_of)
@pytest.mark.parametrize("shape", [SHAPE, (37,), (3, 4, 10)], ids=str)
def test_a_method_with_a_base_is_the_operator(
    method: str, count: int, given: dict[str, Any], shape: tuple[int, ...]
) -> None:
    base, models = tensors(count, shape=shape)
    expected = theirs(method, base, models, given)
    torch.testing.assert_close(ours(method, base, models, given), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("method", "count", "given"), ALONE, ids=name_of)
@pytest.mark.parametrize("shape", [SHAPE, (37,), (3, 4, 10)], ids=str)
def test_a_method_without_a_base_is_the_operator(
    method: str, count: int, given: dict[str, Any], shape: tuple[int, ...]
) -> None:
    _, models = tensors(count, shape=shape, size=2.0)
    base = models[0] if METHODS[method].takes_base == "first" else None
    expected = theirs(method, base, models if base is None else models[1:], given)
    torch.testing.assert_close(ours(method, None, models, given), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("shape", [SHAPE, (37,), (3, 4, 10)], ids=str)
def test_arcee_fusion_is_mergekits_in_fp64(shape: tuple[int, ...], size: float) -> None:
    base, models = (one.double() for one in tensors(1, shape=shape, size=size))  # in fp32 their divergence is rounding
    expected = theirs("arcee_fusion", base, models, {})
    merged = ours("arcee_fusion", base, models, {})
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-12)
    assert 0 < int((merged != base).sum()) < base.numel()


# ---- what is random ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize("rescale", [True, False])
def test_random_methods_keep_as_many_entries_and_the_same_norm(name: str, rescale: bool) -> None:
    base, models = torch.zeros(400, 500), tensors(1, shape=(400, 500))[1]
    given = {"weight": (1.0,), "density": 0.4, "rescale": rescale}
    torch.manual_seed(1000)  # of its own: the tensors are drawn with small seeds
    mine, other = ours(name, base, models, given), theirs(name, base, models, given)
    sigma = math.sqrt(base.numel() * 0.4 * 0.6)
    for merged in (mine, other):
        assert abs(int((merged != 0).sum()) - 0.4 * base.numel()) < 5 * sigma
    wanted = models if rescale else mine
    assert mine.double().abs().sum().item() == pytest.approx(wanted.double().abs().sum().item(), rel=1e-5)
    assert mine.double().abs().sum().item() == pytest.approx(other.double().abs().sum().item(), rel=0.01)


def test_della_keeps_each_rank_as_often_as_mergekit_does() -> None:
    ramp = torch.arange(1.0, 9.0).repeat(20_000, 1)  # eight ranks in each of many rows
    given = {"weight": (1.0,), "density": 0.5, "rescale": False, "epsilon": 0.3}
    torch.manual_seed(1000)  # of its own: the tensors are drawn with small seeds
    for merged in (ours("della", 0 * ramp, ramp[None], given), theirs("della", 0 * ramp, ramp[None], given)):
        kept = (merged != 0).double().mean(dim=0)
        expected = torch.linspace(0.2, 0.8, 8, dtype=torch.float64)
        torch.testing.assert_close(kept, expected, rtol=0, atol=5 * math.sqrt(0.25 / 20_000))


def test_della_with_the_papers_rescaling_keeps_the_expectation() -> None:
    ramp = torch.arange(1.0, 9.0).repeat(20_000, 1)
    merged = operators.della(ramp[None], density=0.5, epsilon=0.3)
    torch.testing.assert_close(merged.mean(dim=0), ramp[0], rtol=0.08, atol=0.0)  # five sigma at p = 0.2


# ---- where we mean to differ ------------------------------------------------------------------------------------


def test_sce_weighs_small_deltas_as_it_weighs_large_ones() -> None:
    deltas = torch.tensor([[3e-4, 3e-4], [1e-4, -1e-4]])  # weights 9 : 1
    expected = torch.tensor([(9 * 3e-4 + 1e-4) / 10, 3e-4])
    torch.testing.assert_close(operators.sce(deltas), expected, rtol=1e-6, atol=0.0)
    uniform = torch.tensor([2e-4, 3e-4])
    torch.testing.assert_close(operators.sce(deltas, uniform_below=1e-6), uniform, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(theirs("sce", torch.zeros(2), deltas, {}), uniform, rtol=1e-6, atol=0.0)


def test_model_stock_takes_the_angle_of_small_deltas_too() -> None:
    deltas = torch.tensor([[1e-4, 0.0], [1e-4, 0.0]])
    torch.testing.assert_close(operators.model_stock(deltas), deltas[0])
    shrunk = theirs("model_stock", torch.zeros(2), deltas, {})  # 1e-8 / 1e-6 for the cosine
    torch.testing.assert_close(shrunk, deltas[0] * 0.02 / 1.01, rtol=1e-4, atol=0.0)


def test_arcee_fusion_of_a_large_tensor_is_the_same_in_every_run() -> None:
    base, models = tensors(1, shape=(1100, 1000), size=0.01)
    first, second = (operators.arcee_fusion(models, base) for _ in range(2))
    assert torch.equal(first, second)
    drawn = [theirs("arcee_fusion", base, models, {}) for _ in range(2)]
    assert not torch.equal(*drawn)


def test_multislerps_tangent_step_is_nothing() -> None:
    unit = torch.nn.functional.normalize(torch.randn(3, 60, dtype=torch.float64), dim=1)
    mean = torch.nn.functional.normalize((unit * torch.tensor([[0.2], [0.5], [0.3]])).sum(dim=0), dim=0)
    tangent = unit - (unit @ mean)[:, None] * mean
    step = (tangent * torch.tensor([[0.2], [0.5], [0.3]])).sum(dim=0)
    torch.testing.assert_close(step, torch.zeros(60, dtype=torch.float64), rtol=0, atol=1e-15)
