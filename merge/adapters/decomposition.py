"""Low-rank factors as results: factors put side by side, and the truncated singular value decomposition of a matrix.

B = U S [out, rank] and A = Vᵀ [rank, in], so that B A is the best approximation of that rank. Signs are fixed: the
entry of largest magnitude of every left vector is positive. What is decomposed exactly is so in fp64 and rounded once.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from ..dtypes import torch_dtype
from ..errors import MergeError
from ..kernels import exact_sum, total
from ..node import Made, Node, Read
from ..tensor_spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["a", "b"]
EXACT_UP_TO = 1024  # the shorter side of matrices that are always decomposed exactly
_ITERATIONS = 4
_FP64 = 8
_BLOCK = 256  # rows


@dataclass(frozen=True, slots=True)
class Factors:
    """A truncated decomposition.

    Attributes:
        a: Vᵀ [rank, in].
        b: U S [out, rank].
        kept: Σ σ² of the values kept.
        whole: Σ σ² of all, ‖Δ‖².

    """

    a: Tensor
    b: Tensor
    kept: float
    whole: float


class Method(Protocol):
    """A way to decompose a matrix that is read from inputs."""

    @property
    def rank(self) -> int:
        """How many values are kept."""

    def __call__(self, read: Read) -> Factors:
        """Read what is needed and decompose it."""


class Decomposition:
    """One decomposition of which two tensors are made: computed when one is asked for, forgotten when both are made.

    Attributes:
        rank: how many values are kept.
        kept: what Σ σ² of the values kept was, once it has been computed.
        whole: what ‖Δ‖² was.

    """

    def __init__(self, method: Method) -> None:
        """Begin with nothing computed."""
        self._method = method
        self.rank = method.rank
        self._lock = threading.Lock()
        self._factors: Factors | None = None
        self._left: set[Side] = set()
        self.kept: float | None = None
        self.whole: float | None = None

    def take(self, side: Side, read: Read) -> Tensor:
        """Give one of the factors."""
        with self._lock:
            if self._factors is None:
                self._factors, self._left = self._method(read), {"a", "b"}
                self.kept, self.whole = self._factors.kept, self._factors.whole
            found = self._factors.a if side == "a" else self._factors.b
            self._left.discard(side)
            if not self._left:
                self._factors = None
            return found

    @property
    def learned(self) -> list[float | None]:
        """What is asked for when the tensors are made: `kept` and `whole`, for a build that is continued later."""
        return [self.kept, self.whole]

    def recall(self, learned: list[float | None]) -> None:
        """Take what an earlier build learned, whose tensors need not be made again."""
        self.kept, self.whole = learned


@dataclass(frozen=True)
class Whole:
    """Gives runs of a tensor that is made at once."""

    dtype: str

    def make(self, read: Read) -> Tensor:
        """Make the tensor."""
        raise NotImplementedError

    def prepare(self, read: Read) -> Tensor:
        """Make the tensor, flat and rounded."""
        return self.make(read).to(torch_dtype(self.dtype)).reshape(-1)

    def run(self, span: slice, read: Read, prepared: Tensor) -> Tensor:
        """Cut a flat run of entries out of it."""
        return prepared[span]


@dataclass(frozen=True)
class _Factor(Whole):
    decomposition: Decomposition
    side: Side

    def make(self, read: Read) -> Tensor:
        return self.decomposition.take(self.side, read)


@dataclass(frozen=True)
class _SideBySide(Whole):
    scales: Sequence[float]
    dim: int

    def make(self, read: Read) -> Tensor:
        import torch

        parts = [read(i, None).double() * scale for i, scale in enumerate(self.scales)]
        return torch.cat(parts, dim=self.dim)


@dataclass(frozen=True)
class _Zeros(Whole):
    entries: int

    def make(self, read: Read) -> Tensor:
        import torch

        return torch.zeros(self.entries, device="cpu")


def zeros(spec: TensorSpec) -> Made:
    """Make a tensor of zeros."""
    return Made(spec, _Zeros(spec.dtype, spec.entries), ())


def side_by_side(spec: TensorSpec, nodes: Sequence[Node], scales: Sequence[float], *, dim: int) -> Made:
    """Put matrices, each multiplied by its scale, one below the other (dim 0) or side by side (dim 1)."""
    return Made(spec, _SideBySide(spec.dtype, tuple(scales), dim), tuple(nodes), held=2 * _FP64 * spec.entries)


def factors(a: TensorSpec, b: TensorSpec, method: Method, inputs: Sequence[Node], held: int) -> tuple[Made, Made]:
    """Make the factors A [rank, in] and B [out, rank] of a matrix by one decomposition, which they share."""
    shared = Decomposition(method)
    sides: tuple[tuple[TensorSpec, Side], ...] = ((a, "a"), (b, "b"))
    first, second = (
        Made(spec, _Factor(spec.dtype, shared, side), tuple(inputs), held, together=shared) for spec, side in sides
    )
    return first, second


@dataclass(frozen=True)
class OfProducts:
    """Decomposes Σ cᵢ Bᵢ Aᵢ, whose inputs are A₁, B₁, A₂, B₂ …: exactly, and never dense.

    [c₁B₁ c₂B₂ …] = Q₁R₁ and [A₁; A₂; …]ᵀ = Q₂R₂, so the sum is Q₁ (R₁R₂ᵀ) Q₂ᵀ: only the core is decomposed.
    """

    scales: tuple[float, ...]
    rank: int

    def held(self, out: int, width: int, ranks: int) -> int:
        """Give the bytes held at once for a sum [out, width] of so many ranks together."""
        return _FP64 * (4 * (out + width) * ranks + 4 * ranks * ranks)

    def __call__(self, read: Read) -> Factors:
        """Decompose the core."""
        import torch

        left = torch.cat([read(2 * i + 1, None).double() * c for i, c in enumerate(self.scales)], dim=1)
        right = torch.cat([read(2 * i, None).double() for i in range(len(self.scales))], dim=0)
        _check_finite(left, right)
        q1, r1 = torch.linalg.qr(left)
        q2, r2 = torch.linalg.qr(right.T)
        u, s, vt = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
        return _truncated(q1 @ u, s, vt @ q2.T, self.rank, total(s.square()))


@dataclass(frozen=True)
class OfMatrix:
    """Decomposes a matrix that is read whole [out, in], or [in, out] where it is transposed; less a second, if given.

    Exactly in fp64 where its shorter side is at most EXACT_UP_TO, or less than eight times the rank; else by randomised
    subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4) over twice the rank, four iterations, from a
    random start that the name fixes.
    """

    name: str
    rank: int
    transposed: bool = False
    less: bool = False

    def _width(self) -> int:
        return 2 * max(self.rank, 16)

    def is_exact(self, rows: int, columns: int) -> bool:
        """Tell whether a matrix of this shape is decomposed exactly."""
        shorter = min(rows, columns)
        return shorter <= EXACT_UP_TO or 4 * self._width() >= shorter

    def held(self, rows: int, columns: int) -> int:
        """Give the bytes held at once."""
        read = 4 * rows * columns * 4
        if self.is_exact(rows, columns):
            return read + _FP64 * (3 * rows * columns + 4 * min(rows, columns) ** 2)
        return read + _FP64 * 6 * (rows + columns) * self._width()

    def __call__(self, read: Read) -> Factors:
        """Read it and decompose it."""
        import torch

        matrix = read(0, None)
        matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
        if self.less:
            matrix = matrix - read(1, None).to(matrix.dtype)
        _check_finite(matrix)
        whole = _square_sum(matrix)
        matrix = matrix.T if self.transposed else matrix
        if self.is_exact(*matrix.shape):
            u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        else:
            u, s, vt = self._approximate(matrix)
        return _truncated(u, s, vt, self.rank, whole)

    def _approximate(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        seed = int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=7).digest(), "little")
        drawing = torch.Generator("cpu").manual_seed(seed)  # the same start on every device
        start = torch.randn(matrix.shape[1], self._width(), generator=drawing, device="cpu")
        q, _ = torch.linalg.qr(matrix @ start.to(matrix))
        for _ in range(_ITERATIONS):
            p, _ = torch.linalg.qr(matrix.T @ q)
            q, _ = torch.linalg.qr(matrix @ p)
        u, s, vt = torch.linalg.svd((q.T @ matrix).double(), full_matrices=False)
        return q.double() @ u, s, vt


def _square_sum(matrix: Tensor) -> float:
    """Sum the squares, block of rows by block of rows."""
    starts = range(0, matrix.shape[0], _BLOCK)
    return exact_sum(total(matrix[start : start + _BLOCK].double().square()) for start in starts)


def _check_finite(*matrices: Tensor) -> None:
    import torch

    if not all(torch.isfinite(matrix).all() for matrix in matrices):
        raise MergeError("", "holds NaN or infinite values", "such a checkpoint is damaged: save or download it again")


def _truncated(u: Tensor, s: Tensor, vt: Tensor, rank: int, whole: float) -> Factors:
    """Keep the largest values, and fix the signs."""
    import torch

    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    largest = u.abs().argmax(dim=0)
    signs = torch.where(u.gather(0, largest[None])[0] < 0, -1.0, 1.0).to(u.dtype)
    return Factors(vt * signs[:, None], u * (s * signs), min(total(s.square()), whole), whole)
