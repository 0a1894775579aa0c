"""Operators that mergekit has not, against what their papers say, written down once more or checked by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from torch import Tensor

from portmanteau import compositions, merge
from portmanteau.merge import operators
from portmanteau.merge.registry import find


def drawn(count: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- medians ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_the_median_is_numpys(count: int) -> None:
    models = drawn(count, 7, 9)
    np.testing.assert_allclose(operators.median(models).numpy(), np.median(models.numpy(), axis=0), rtol=1e-15)


@pytest.mark.parametrize("weight", [(1.0, 1.0, 1.0, 1.0), (1.0, 2.0, 0.5, 1.5)])
def test_the_geometric_median_has_the_least_sum_of_distances(weight: tuple[float, ...]) -> None:
    models = drawn(4, 2, 3)
    points = models.reshape(4, -1).numpy()

    def distances(y: np.ndarray) -> float:  # type: ignore[type-arg]
        return float(np.linalg.norm(points - y, axis=1) @ np.array(weight))

    best = scipy.optimize.minimize(distances, points.mean(axis=0), tol=1e-14)
    found = operators.geometric_median(models, weight=weight, iterations=1000, tolerance=1e-13)
    assert distances(found.reshape(-1).numpy()) <= best.fun * (1 + 1e-12)
    np.testing.assert_allclose(found.reshape(-1).numpy(), best.x, atol=1e-5)


def test_at_the_geometric_median_the_unit_vectors_to_close_models_cancel() -> None:
    base = drawn(1, 4000, seed=3)
    models = (base + 1e-4 * drawn(5, 4000)).float()  # apart by 1e-4 of their length
    found = operators.geometric_median(models, iterations=1000).double()
    away = models.double() - found
    pull = (away / away.norm(dim=1, keepdim=True)).sum(dim=0)
    assert pull.norm().item() < 2e-2 * 5  # the result is rounded to fp32, 4e-4 of the distances


def test_a_far_model_moves_the_geometric_median_little_and_the_mean_much() -> None:
    models = torch.cat([0.1 * drawn(6, 500), 1000 * drawn(1, 500, seed=2)])
    assert operators.geometric_median(models).norm() < 3
    assert operators.linear(models).norm() > 3000


def test_a_model_that_outweighs_the_others_is_the_geometric_median() -> None:
    models = drawn(3, 20)
    found = operators.geometric_median(models, weight=[5.0, 1.0, 1.0])
    torch.testing.assert_close(found, models[0], rtol=0, atol=1e-9)


# ---- consensus --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agreeing", [0, 1, 2, 3])
@pytest.mark.parametrize("strictness", [0.2, 0.6, (0.2, 0.4, 0.6)], ids=str)
def test_consensus_keeps_what_serves_enough_models(agreeing: int, strictness: float | tuple[float, ...]) -> None:
    deltas = drawn(3, 5, 8)
    own = np.broadcast_to(strictness, 3)
    expected = np.zeros((5, 8))
    for place in np.ndindex(5, 8):
        values = [float(delta[place]) for delta in deltas]
        serving = sum(abs(v) > s * abs(sum(values) - v) for v, s in zip(values, own, strict=True))
        expected[place] = 0.3 * sum(values) if serving >= agreeing else 0.0
    merged = operators.consensus(deltas, strictness=strictness, agreeing=agreeing, scale=0.3)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-14)


@pytest.mark.parametrize("task", [1, 2, 3])
def test_under_the_mask_of_a_task_consensus_keeps_what_serves_it(task: int) -> None:
    deltas = drawn(3, 5, 8)
    total = deltas.sum(dim=0).numpy()
    own = deltas[task - 1].numpy()
    expected = np.where(np.abs(own) > 0.3 * np.abs(total - own), 2 * total, 0.0)  # their localised model
    merged = operators.consensus(deltas, strictness=0.3, scale=2.0, task=task)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-14)
    assert find("consensus").refuses(2, {"task": 3}) == "task is 3, and 2 models are given"


def test_without_masks_consensus_is_task_arithmetic() -> None:
    deltas = drawn(3, 40).float()
    expected = operators.task_arithmetic(deltas, weight=[0.5, 1.0, 2.0])
    assert torch.equal(operators.consensus(deltas, weight=[0.5, 1.0, 2.0], agreeing=0), expected)


def test_more_agreeing_models_than_there_are_are_refused() -> None:
    assert find("consensus").refuses(2, {"agreeing": 3}) == "agreeing is 3, and 2 models are given"


# ---- singular vectors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_tsv_is_the_papers_algorithm_in_numpy(shape: tuple[int, int], count: int) -> None:
    deltas = drawn(count, *shape)
    lefts, values, rights = [], [], []
    for delta in deltas.numpy():
        u, s, v = np.linalg.svd(delta, full_matrices=False)
        kept = min(shape) // count
        lefts.append(u[:, :kept])
        values.append(s[:kept])
        rights.append(v[:kept])
    left = scipy.linalg.polar(np.hstack(lefts))[0]
    right = scipy.linalg.polar(np.vstack(rights))[0]
    expected = left @ np.diag(np.concatenate(values)) @ right
    np.testing.assert_allclose(operators.tsv(deltas).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(operators.tsv(deltas.float()).numpy(), expected, atol=1e-4)


def test_tsv_of_one_model_is_its_delta() -> None:
    delta = drawn(1, 30, 17)
    torch.testing.assert_close(operators.tsv(delta), delta[0])


def test_tsv_adds_up_deltas_that_live_in_orthogonal_spaces() -> None:
    first, second = torch.zeros(2, 8, 6, dtype=torch.float64)
    first[:4, :3], second[4:, 3:] = drawn(1, 4, 3)[0], drawn(1, 4, 3, seed=2)[0]
    merged = operators.tsv(torch.stack([first, second]), weight=[1.0, 0.5], scale=2.0)
    torch.testing.assert_close(merged, 2 * first + second)


def test_tsv_of_more_models_than_rank_keeps_one_component_of_each() -> None:
    deltas = torch.eye(3, dtype=torch.float64)[:, :, None] * torch.ones(1, 2, dtype=torch.float64)
    merged = operators.tsv(deltas)  # three rank-1 deltas of 3 × 2: no three orthonormal rows of width 2
    assert merged.shape == (3, 2)
    assert bool(merged.isfinite().all())


def test_tsv_of_what_is_no_matrix_is_the_mean() -> None:
    deltas = drawn(3, 4, 2, 2)
    torch.testing.assert_close(operators.tsv(deltas), deltas.mean(dim=0))


# ---- elect, mask and rescale ------------------------------------------------------------------------------------


def emr_in_numpy(tensors: list[np.ndarray]) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:  # type: ignore[type-arg]
    """Give for each tensor [n, *shape] the unified delta, and for each model λ · mask · unified.

    Section 3.2 of the paper; λ is one number for each model, over all tensors.
    """
    unified, masks = [], []
    for deltas in tensors:
        elected = np.sign(deltas.sum(axis=0))
        mask = deltas * elected > 0
        unified.append(elected * np.max(np.abs(deltas) * mask, axis=0))
        masks.append(mask)
    count = len(tensors[0])
    whole = [sum(np.abs(deltas[i]).sum() for deltas in tensors) for i in range(count)]
    kept = [sum(np.abs(u * m[i]).sum() for u, m in zip(unified, masks, strict=True)) for i in range(count)]
    factors = [w / k for w, k in zip(whole, kept, strict=True)]
    return unified, [[f * m[i] * u for u, m in zip(unified, masks, strict=True)] for i, f in enumerate(factors)]


def test_emr_by_hand() -> None:
    deltas = torch.tensor([[3.0, -1.0, 2.0, 1.0], [1.0, 2.0, -2.0, -4.0], [-9.0, 0.0, 1.0, 1.0]])
    # sums −5, 1, 1, −2: of the first only −9 agrees, of the second 2, of the third 2 and 1, of the last −4
    assert operators.emr(deltas).tolist() == [-9.0, 2.0, 2.0, -4.0]
    assert operators.emr(deltas, task=1).tolist() == [0.0, 0.0, 2.0, 0.0]
    assert operators.emr(deltas, task=2, scale=9 / 6).tolist() == [0.0, 3.0, 0.0, -6.0]
    assert operators.emr(deltas, task=3).tolist() == [-9.0, 0.0, 2.0, 0.0]


def test_where_the_deltas_cancel_emr_elects_nothing() -> None:
    assert operators.emr(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_emr_is_the_papers_algorithm_in_numpy(count: int) -> None:
    deltas = drawn(count, 7, 9)
    (unified,), tasks = emr_in_numpy([deltas.numpy()])
    np.testing.assert_array_equal(operators.emr(deltas).numpy(), unified)
    np.testing.assert_allclose(operators.emr(deltas.float()).numpy(), unified, rtol=1e-6)
    for i, (own,) in enumerate(tasks):
        masked = operators.emr(deltas, task=i + 1)
        scale = deltas[i].abs().sum() / masked.abs().sum()
        np.testing.assert_allclose(operators.emr(deltas, task=i + 1, scale=float(scale)).numpy(), own, rtol=1e-13)


def test_emr_of_a_model_beyond_the_last_is_refused() -> None:
    assert find("emr").refuses(2, {"task": 3}) == "task is 3, and 2 models are given"
    assert find("emr").refuses(2, {"task": 2}) == ""


def test_emr_of_a_task_has_one_factor_over_all_tensors(
    tmp_path: Path, save_tensors: Callable[[str, Mapping[str, Tensor]], Path]
) -> None:
    shapes = {"model.layers.0.mlp.up_proj.weight": (6, 5), "model.norm.weight": (7,)}
    stacks = {name: drawn(4, *shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    for i, name in enumerate(("base", "math", "code", "chat")):
        save_tensors(name, {key: stack[i].clone() for key, stack in stacks.items()})
    path = tmp_path / "emr.yaml"
    path.write_text("merge: {emr_task: {base: base, task: math, others: [code, chat]}}")
    merged = compositions.compose(compositions.load(path))
    deltas = {name: (stack[1:] - stack[0]).numpy() for name, stack in stacks.items()}
    _, (own, *_) = emr_in_numpy(list(deltas.values()))
    for name, delta in zip(shapes, own, strict=True):
        np.testing.assert_allclose(merged[name].numpy(), stacks[name][0].numpy() + delta, rtol=1e-13)
    receipt = merge.build(merged, tmp_path / "out")
    whole = sum(np.abs(of_all[0]).sum() for of_all in deltas.values())
    masked = sum(np.abs(operators.emr(torch.from_numpy(d), task=1).numpy()).sum() for d in deltas.values())
    assert receipt.surveys["factor of math"]["factor"] == pytest.approx(whole / masked, rel=1e-14)
