"""What surveys find: measures that run over many tensors before a merge begins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .differences.spectra import rank_of, spectrum
from .errors import MergeError
from .kernels import sums_over
from .operator import Parts

Weights = tuple[float, float]


def balanced_weights(groups: Mapping[str, Parts], *, blend: float) -> dict[str, Weights]:
    """Find, for each group, weights for two deltas such that both bring the same mean absolute change.

    Formula: s_i = mean |d_i| over all tensors of the group, m = (s_1 + s_2) / 2; the weights are blend · m / s_1 and
    (1 − blend) · m / s_2. A delta of zero keeps its plain share.
    """
    found = {}
    for key, parts in groups.items():
        first, second = sums_over((deltas[0].abs(), deltas[1].abs()) for (deltas, *_) in parts)
        mean = (first + second) / 2
        shares = blend * (mean / first if first else 1.0), (1 - blend) * (mean / second if second else 1.0)
        found[key] = shares
    return found


def weights_by_change(
    groups: Mapping[tuple[str, str], Parts], *, threshold: float, blend: float, power: int = 1
) -> dict[str, Weights]:
    """Give every layer, or module of a layer, to that of two models which changed it more, by its share of all change.

    Formula: n_x[k] = (Σ (‖d_x‖_F / ‖base‖_F)^power)^(1/power) over the matrices of k, p_x = n_x / Σ_k n_x; the weights
    are (1, 0) where p_1 − p_2 > threshold, (0, 1) where p_2 − p_1 > threshold, else (blend, 1 − blend). The groups are
    matrices, under (k, name). The rule of arXiv 2601.22620's code (00HS/layer-wise_swapping at e9fcde3): power 1 over
    layers in layer_swap.py, power 2 over attention and mlp of all layers in module_swap.py.
    """
    sizes: dict[str, list[float]] = {}
    for (key, _), parts in groups.items():
        found = sums_over((d[0].double() ** 2, d[1].double() ** 2, b.double() ** 2) for d, b in parts)
        norms = [math.sqrt(square) for square in found]
        of_key = sizes.setdefault(key, [0.0, 0.0])
        for model in (0, 1):
            of_key[model] += (norms[model] / norms[2]) ** power if norms[2] else 0.0
    sizes = {key: [size ** (1 / power) for size in of_key] for key, of_key in sizes.items()}
    totals = [math.fsum(of_key[model] for of_key in sizes.values()) or 1.0 for model in (0, 1)]
    result = {}
    for key, (first, second) in sizes.items():
        lead = first / totals[0] - second / totals[1]
        result[key] = (1.0, 0.0) if lead > threshold else (0.0, 1.0) if lead < -threshold else (blend, 1 - blend)
    return result


def changes_and_ranks(
    groups: Mapping[str, Parts], *, matrices: Mapping[str, tuple[int, int]], energy: float | None
) -> dict[str, dict[str, Any]]:
    """Find the size of each change, and of those that are matrices the rank that keeps a share of it.

    Formula: rank = min {k : Σ_{i≤k} σᵢ² ≥ energy · ‖Δ‖²}, 0 for a change of zero. The σ² are the eigenvalues of the
    smaller of ΔΔᵀ and ΔᵀΔ, in fp64. Gives for each tensor ‖Δ‖ and ‖base‖, and for each matrix its rank and energy.
    """

    def found(item: tuple[str, Parts]) -> dict[str, Any]:
        name, parts = item
        squares = sums_over((d[0].double() ** 2, b.double() ** 2) for d, b in parts) if parts.entries else [0.0, 0.0]
        if not math.isfinite(sum(squares)):
            hint = "such a checkpoint is damaged: save or download it again"
            raise MergeError(f"tensor {name}", "holds NaN or infinite values", hint)
        sizes = {"change": math.sqrt(squares[0]), "base": math.sqrt(squares[1])}
        if energy is None or name not in matrices:
            return sizes
        return {**sizes, **_rank(parts, matrices[name], energy)}

    threads = next((parts.threads for parts in groups.values()), 1)
    with ThreadPoolExecutor(threads, "survey") as pool:
        return dict(zip(groups, pool.map(found, groups.items()), strict=True))


def _rank(parts: Parts, shape: tuple[int, int], energy: float) -> dict[str, Any]:
    """Find the rank of a matrix that comes in parts, which is held in memory."""
    import torch

    matrix = torch.cat([deltas[0] for deltas, _ in parts]).reshape(shape)
    tall = matrix if shape[0] >= shape[1] else matrix.T
    rank, kept = rank_of(spectrum([tall], tall.shape[1]), energy)
    return {"rank": rank, "energy": kept}
