"""One set of laws, held against every operator that there is; the numbers of each are in its own docstring."""

from __future__ import annotations

import importlib
import itertools
import math
import pkgutil
import typing
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from portmanteau import merge
from portmanteau.merge import MergeError, Operator, Source, Step, TensorSpec
from portmanteau.merge.dtypes import from_torch
from portmanteau.merge.evaluate import Evaluation, Session
from portmanteau.merge.kernels import largest, select_largest
from portmanteau.merge.node import Inputs
from portmanteau.merge.operator import LAWS, Part
from portmanteau.merge.registry import operators

ALL = operators()
LENGTH = 150_001  # no multiple of any part
LONG = (1095, 137)  # nor is this, and rows go over from one part to the next
SHAPES = ((), (1,), (7,), (3, 5), (2, 3, 4), (0,), (3, 0))


def count_of(operator: Operator) -> int:
    return operator.takes or 3


def obeying(law: str) -> list[Operator]:
    return [operator for operator in ALL.values() if law in operator.laws]


def named(operator: Operator) -> str:
    return operator.name


every = pytest.mark.parametrize("operator", ALL.values(), ids=named)


def variants(operator: Operator) -> Iterator[dict[str, Any]]:
    """The defaults, and every single choice and switch set otherwise."""
    yield {}
    for setting in operator.settings.values():
        plain = typing.get_args(setting.annotation)[0] if typing.get_args(setting.annotation) else setting.annotation
        choices = typing.get_args(plain) if typing.get_origin(plain) is typing.Literal else ()
        for choice in (True, False) if plain is bool else choices:
            if choice != setting.default and not operator.refuses(count_of(operator), {setting.name: choice}):
                yield {setting.name: choice}


def awkward(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Quarters from −2 to 2: many equal magnitudes, many zeros, sums without rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype) / 4


def smooth(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mixed(shape: tuple[int, ...], seed: int) -> Tensor:
    """One half of either kind, entry by entry."""
    even = (torch.arange(math.prod(shape)) % 2 == 0).view(shape)
    return torch.where(even, awkward(shape, seed), smooth(shape, seed))


def applied(operator: Operator, stack: Tensor, base: Tensor | None = None, **chosen: Any) -> Tensor:
    """Call the function as a user does: models, or deltas, and what goes with them where it is asked for."""
    beside = {"base": torch.zeros_like(stack[0]) if base is None else base, "importances": stack.abs()}
    return operator.apply(*(beside.get(role, stack) for role in operator.roles), **chosen)


def stack_of(operator: Operator, shape: tuple[int, ...], *, make: Any = awkward) -> Tensor:
    """Tensors that the operator can merge: `equal` takes only equal ones."""
    first = [make(shape, 1 if operator.name == "equal" else seed) for seed in range(1, count_of(operator) + 1)]
    return torch.stack(first)


def step_of(
    operator: Operator, models: Tensor, base: Tensor, chosen: Mapping[str, Any], dtype: torch.dtype | None = None
) -> Step:
    """Plan the operator over tensors in memory, all its settings resolved."""
    resolved = {setting.name: setting.default for setting in operator.settings.values()} | dict(chosen)

    def source(tensor: Tensor, label: str) -> Source:
        return merge.InMemory(label, {"x": tensor}).node("x")

    inputs = tuple(source(model, str(i)) for i, model in enumerate(models))
    output = TensorSpec("x", from_torch(dtype or models.dtype), tuple(base.shape))
    own_base = source(base, "base") if operator.takes_base else None
    weighed = models if "importances" in operator.roles else ()
    importances = tuple(source(model.abs(), str(i)) for i, model in enumerate(weighed))
    return Step(output, operator, resolved, Inputs(inputs, own_base, importances))


def made(step: Step, session: Session) -> Tensor:
    parts = [values.clone() for _, values in Evaluation(session).parts(step)]
    return torch.cat(parts).reshape(step.output.shape) if parts else torch.empty(step.output.shape)


def assert_same_bits(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(one), torch.signbit(other))


# what an operator is


def test_file_function_and_operator_have_one_name() -> None:
    package = importlib.import_module("portmanteau.merge.operators")
    files = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert files == set(ALL) == set(package.__all__)
    for name, operator in ALL.items():
        assert operator.apply is getattr(merge.operators, name)
        assert (operator.name, operator.apply.__name__) == (name, name)
        assert operator.apply.__module__ == f"portmanteau.merge.operators.{name}"


@every
def test_an_operator_says_formula_shapes_and_source(operator: Operator) -> None:
    text = operator.apply.__doc__ or ""
    assert all(part in text for part in ("Formula:", "Shapes:", ">>>"))
    assert operator.source
    assert operator.laws <= LAWS.keys()
    assert all(setting.description for setting in operator.settings.values())


# the laws that all obey


@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_and_dtype_are_kept(operator: Operator, shape: tuple[int, ...]) -> None:
    every_choice = variants(operator) if len(shape) == 2 else ({},)
    for chosen, dtype in [*((one, torch.float32) for one in every_choice), ({}, torch.float64)]:
        stack = stack_of(operator, shape).to(dtype)
        result = applied(operator, stack, **chosen)
        assert (result.shape, result.dtype) == (shape, dtype)
        whole = made(step_of(operator, stack, torch.zeros(shape, dtype=dtype), chosen), Session())
        assert (whole.shape, whole.dtype) == (shape, dtype if 0 not in shape else whole.dtype)


@every
def test_inputs_are_left_alone(operator: Operator) -> None:
    for chosen in variants(operator):
        stack, base = stack_of(operator, (50,)), awkward((50,), 9)
        kept = stack.clone(), base.clone()
        result = applied(operator, stack, base, **chosen)
        result.fill_(77.0)  # nor is the result a view into them
        assert_same_bits(stack, kept[0])
        assert_same_bits(base, kept[1])


@pytest.mark.parametrize("operator", [one for one in ALL.values() if "vectors" in one.roles], ids=named)
def test_without_a_base_models_are_merged_as_they_are(operator: Operator) -> None:
    models = stack_of(operator, (50,), make=smooth)
    inputs = Inputs(step_of(operator, models, models[0], {}).inputs.models)
    step = replace(step_of(operator, models, models[0], {}), inputs=inputs)
    assert_same_bits(made(step, Session()), operator.apply(models))


SESSIONS = (Session(1 << 16, keep=0), Session(1 << 16, keep=1 << 30), Session(1 << 17, keep=0), Session(1 << 20))


@every
def test_parts_give_the_bits_of_the_whole(operator: Operator) -> None:
    models, base = stack_of(operator, LONG, make=mixed), mixed(LONG, 9)
    if operator.name == "equal":
        base = torch.zeros(LONG)
    stack = models - base if operator.on_deltas else models
    for chosen in variants(operator):
        whole = applied(operator, stack, base, **chosen)
        whole = whole + base if operator.on_deltas else whole
        step = step_of(operator, models, base, chosen)
        for session in SESSIONS:
            assert_same_bits(made(step, session), whole)


@every
def test_any_run_of_entries_gives_the_bits_of_the_whole(operator: Operator) -> None:
    models, base = stack_of(operator, LONG, make=smooth), smooth(LONG, 9)
    for chosen in variants(operator):
        step = step_of(operator, models, base, chosen)
        whole = made(step, Session())
        run = Evaluation(Session(1 << 16, keep=0)).value(step, slice(65_001, 65_901))
        assert_same_bits(run, whole.reshape(-1)[65_001:65_901])


@every
def test_the_number_of_torchs_threads_changes_no_bit(operator: Operator) -> None:
    models, base = stack_of(operator, LONG, make=smooth), smooth(LONG, 9)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([made(step_of(operator, models, base, chosen), Session()) for chosen in variants(operator)])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_fp32_and_cast_once(operator: Operator, dtype: torch.dtype) -> None:
    models, base = stack_of(operator, (5000,), make=smooth).to(dtype), smooth((5000,), 9, dtype)
    for chosen in variants(operator):
        wide = applied(
            operator, models.float() - base.float() if operator.on_deltas else models.float(), base.float(), **chosen
        )
        expected = (wide + base.float() if operator.on_deltas else wide).to(dtype)
        assert_same_bits(made(step_of(operator, models, base, chosen), Session()), expected)


@every
def test_doubles_are_computed_in_fp64(operator: Operator) -> None:
    models, base = stack_of(operator, (5000,), make=smooth).double(), smooth((5000,), 9, torch.float64)
    models = models * (1 + 2.0**-40)  # entries that fp32 does not hold
    for chosen in variants(operator):
        expected = applied(operator, models - base if operator.on_deltas else models, base, **chosen)
        expected = expected + base if operator.on_deltas else expected
        assert_same_bits(made(step_of(operator, models, base, chosen), Session()), expected)
        assert not torch.equal(expected, expected.float().double())


def test_a_mean_in_fp64_keeps_what_fp32_cannot_hold() -> None:
    models = torch.tensor([[1.0], [1 + 2.0**-40]], dtype=torch.float64)
    step = step_of(ALL["linear"], models, torch.zeros(1, dtype=torch.float64), {})
    assert made(step, Session()).item() == 1 + 2.0**-41


# the laws that an operator declares


@pytest.mark.parametrize("operator", obeying("identity"), ids=named)
@pytest.mark.parametrize("make", [awkward, smooth])
def test_equal_models_give_that_model_back(operator: Operator, make: Any) -> None:
    model = make((40, 11), 5)
    stack = model.expand(count_of(operator), 40, 11)
    torch.testing.assert_close(applied(operator, stack.clone()), model)


@pytest.mark.parametrize("operator", obeying("permutation"), ids=named)
@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0)])
def test_the_order_of_the_models_does_not_matter(operator: Operator, order: tuple[int, ...]) -> None:
    order = tuple(i for i in order if i < count_of(operator))
    stack = stack_of(operator, (400,))
    streams = tuple(range(100, 100 + count_of(operator)))  # random streams go with the models' names
    for chosen in variants(operator):
        one = applied(operator, stack, **chosen, part=Part(streams=streams))
        other = applied(operator, stack[list(order)], **chosen, part=Part(streams=tuple(streams[i] for i in order)))
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("operator", obeying("base"), ids=named)
def test_models_equal_to_the_base_give_the_base(operator: Operator) -> None:
    base = smooth((400,), 3)
    models = base.expand(count_of(operator), 400)
    for chosen in variants(operator):
        torch.testing.assert_close(made(step_of(operator, models, base, chosen), Session()), base, rtol=0, atol=0)


@pytest.mark.parametrize("operator", obeying("scaling"), ids=named)
@pytest.mark.parametrize("power", [-20, -1, 3, 20])
def test_scaling_by_a_power_of_two_scales_the_result(operator: Operator, power: int) -> None:
    stack, base, factor = stack_of(operator, (600,), make=smooth), smooth((600,), 9), 2.0**power
    for chosen in variants(operator):
        once = applied(operator, stack, base, **chosen)
        scaled = applied(operator, stack * factor, base * factor, **chosen)
        torch.testing.assert_close(scaled, once * factor, rtol=0, atol=0)


# what it refuses


@every
def test_models_beyond_the_fixed_number_are_refused(operator: Operator) -> None:
    if operator.takes is None:
        assert operator.refuses(5, {}) == ""
    else:
        assert operator.refuses(operator.takes, {}) == ""
        assert f"takes exactly {operator.takes} model" in operator.refuses(operator.takes + 1, {})


def test_values_for_another_number_of_models_are_refused() -> None:
    with pytest.raises(MergeError, match="3 values for 2 models"):
        merge.operators.linear(torch.ones(2, 4), weight=[1.0, 2.0, 3.0])


def test_probabilities_outside_zero_and_one_are_refused() -> None:
    assert ALL["della"].refuses(2, {"density": 0.9}) == (
        "density ± epsilon is 0.9 ± 0.15: both ends must lie between 0 and 1"
    )
    assert "0.1 ± 0.2" in ALL["della"].refuses(2, {"density": (0.5, 0.1), "epsilon": 0.2})
    assert ALL["della"].refuses(2, {"density": 1.0}) == ""


@pytest.mark.parametrize("name", ["dare", "della", "ties", "breadcrumbs"])
def test_weights_that_cancel_cannot_divide(name: str) -> None:
    chosen = {"weight": (1.0, -1.0), "elect": "none", "divide": "weights"}
    assert ALL[name].refuses(2, chosen) == "the weights sum to zero"
    assert ALL[name].refuses(2, {**chosen, "elect": "weighted"}) == ""


@pytest.mark.parametrize("name", ["nuslerp", "karcher", "multislerp"])
def test_weights_that_cancel_cannot_be_normalised(name: str) -> None:
    assert "sum to zero" in ALL[name].refuses(2, {"weight": (1.0, -1.0), "normalize": True})


def test_one_model_has_no_angle() -> None:
    assert ALL["model_stock"].refuses(1, {}) == "takes two models or more, and 1 is given"


def test_directions_that_cancel_are_refused() -> None:
    three = torch.tensor([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]], dtype=torch.float64)
    with pytest.raises(MergeError, match="directions of the models cancel"):
        merge.operators.multislerp(three)
    opposite = merge.operators.multislerp(torch.tensor([[3.0], [-1.0]]))  # as linear
    torch.testing.assert_close(opposite, torch.tensor([1.0]))


def test_tensors_that_differ_are_not_equal() -> None:
    with pytest.raises(MergeError, match="the models differ here"):
        merge.operators.equal(torch.tensor([[1, 2], [1, 3]]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64])
def test_integers_of_every_kind_are_compared(dtype: torch.dtype) -> None:
    step = step_of(ALL["equal"], torch.ones(2, 3, dtype=dtype), torch.zeros(3, dtype=dtype), {})
    assert torch.equal(made(step, Session()), torch.ones(3, dtype=dtype))


# the selection that trims


def kept_by_numpy(values: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """Keep the entries that come first in a stable sort by falling magnitude."""
    kept = np.zeros(len(values), dtype=bool)
    kept[np.argsort(-np.abs(values), kind="stable")[:count]] = True
    return kept


def assert_selects(values: np.ndarray[Any, Any], count: int, bounds: list[int]) -> None:
    tensor = torch.from_numpy(values.copy())
    edges = [0, *sorted(bounds), len(values)]
    parts = [tensor[low:high] for low, high in itertools.pairwise(edges)]
    (cut,) = largest(lambda: (part[None] for part in parts), [count])
    assert cut.value == torch.topk(tensor.abs(), count).values[-1].item()
    found = torch.cat([select_largest(part, cut, start) for part, start in zip(parts, edges[:-1], strict=True)])
    assert found.sum().item() == count
    np.testing.assert_array_equal(found.numpy(), kept_by_numpy(values, count))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), wide=st.booleans(), few_values=st.booleans())
def test_the_largest_are_those_of_a_stable_sort(data: st.DataObject, wide: bool, few_values: bool) -> None:
    numbers = st.floats(width=64 if wide else 32, allow_nan=False)
    entries = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 1e-40, float("inf")]) if few_values else numbers
    dtype = np.float64 if wide else np.float32
    values = data.draw(arrays(dtype, st.integers(1, 60), elements=entries.map(lambda x: float(dtype(x)))))
    bounds = data.draw(st.lists(st.integers(0, len(values)), max_size=3))
    assert_selects(values, data.draw(st.integers(1, len(values))), bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [awkward, smooth])
@pytest.mark.parametrize("count", [1, 60_000, LENGTH - 1, LENGTH])
def test_the_largest_of_a_long_tensor_are_those_of_a_stable_sort(dtype: torch.dtype, make: Any, count: int) -> None:
    assert_selects(make((LENGTH,), 4, dtype).numpy(), count, [1 << 16, 1 << 17])


def test_of_equal_magnitudes_the_lower_index_is_kept() -> None:
    assert_selects(np.array([1.0, -2.0, 2.0, -2.0, 0.5], dtype=np.float32), 2, [2])
    (cut,) = largest(lambda: iter([torch.tensor([[1.0, -2.0, 2.0, -2.0, 0.5]])]), [2])
    assert (cut.value, cut.last_index) == (2.0, 2)
