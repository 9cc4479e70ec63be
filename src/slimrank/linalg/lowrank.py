"""The one problem behind every method, and its two routes.

For a weight ``W (out, in)`` whose outputs should be ``T x`` and inputs with second moment
``S = E[x xᵀ]``, the map of rank r that minimises ``E ‖T x − W' x‖²`` is ``B_r B_rᵀ T``, where
``B_r`` holds the top r eigenvectors of ``T S Tᵀ`` (Swift-SVD, arXiv 2604.01609, theorem 3.1;
AA-SVD, arXiv 2604.02119, theorem 3.2). No root and no inverse of ``S`` is needed to state it. The
routes below differ in how they find ``B``, so in accuracy and cost, not in what they find. A metric
on the outputs other than the identity is put in front of them by `slimrank.linalg.metric`.

Swift-SVD writes ``Y = X W`` with rows as tokens; here ``W`` is PyTorch's ``(out, in)``, so its
``V_k`` is our basis and its ``A_k = W V_k``, ``B_k = V_kᵀ`` are our ``right.mT`` and ``left.mT``.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from slimrank.linalg.exact import in_float64
from slimrank.linalg.psd import cholesky_with_jitter, require_finite, symmetric_root, symmetrize
from slimrank.linalg.signs import fix_signs
from slimrank.linalg.spectrum import tail_energy

SMALLEST_SHARE = 1e-6  # of the largest singular value, where a balanced split divides by them
TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Factors:
    """A matrix of low rank as a product.

    Parameters
    ----------
    left : Tensor of shape (out, rank)
    right : Tensor of shape (rank, in)
        ``weight ≈ left @ right``.
    """

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"]

    def dense(self) -> Float[Tensor, "out in"]:
        """Multiply the product out."""
        return self.left @ self.right


@dataclass(frozen=True, slots=True)
class Decomposition:
    """All the best maps of low rank for one linear: made once, truncated to any rank.

    Parameters
    ----------
    basis : Tensor of shape (out, k)
        Orthonormal columns, best first, ``k = min(out, in)``; fewer in one that was `shortened`.
        With a `dual` they are neither orthogonal nor of unit length.
    target : Tensor of shape (out, in)
        The best map of full rank.
    singular_values : Tensor of shape (min(out, in),), float64
        Descending, always all of them; squares are the mean energy per token of each column, in the
        metric that was solved in.
    jitter : float
        What was added to the diagonal of the moment, or of the metric, to take a root; 0.0 in the
        inverse-free route.
    floor : float
        What no linear map of the inputs can reproduce, at any rank; 0.0 unless the outputs wanted
        are those of other inputs (AA-SVD's ``‖W A‖² − ‖M‖²``).
    dual : Tensor of shape (out, k) or None
        Columns with ``dualᵀ basis = I``, so that the best map of rank r is ``basis_r dual_rᵀ T``.
        None where the basis is its own dual: no metric on the outputs.
    """

    basis: Float[Tensor, "out k"]
    target: Float[Tensor, "out in"]
    singular_values: Float[Tensor, " values"]
    jitter: float = 0.0
    floor: float = 0.0
    dual: Float[Tensor, "out k"] | None = None

    @property
    def energy(self) -> float:
        """Loss of the zero map: the mean squared norm of the outputs that are wanted."""
        return self.floor + float(self.singular_values.square().sum())

    def loss(self, rank: int) -> float:
        """Least mean squared error at a rank: the square of Swift-SVD's equation 4, over tokens."""
        self._check(rank)
        return self.floor + float(tail_energy(self.singular_values)[rank])

    def truncate(
        self, rank: int, split: Literal["orthonormal", "balanced"] = "orthonormal"
    ) -> Factors:
        """Best factors of a rank. A smaller rank is a slice of a larger one.

        Parameters
        ----------
        rank : int
        split : {'orthonormal', 'balanced'}
            Leave ``left`` orthonormal, or give each factor the root of the singular values, which
            is where training wants to start (AA-SVD's code; its algorithm 1 has all of them in
            ``left``). The product is the same. In a metric the columns are of unit length, though
            not orthogonal, and what is shared is the root mean square of each latent: neither
            factor depends on the metric's unit, which may be far from that of the weight.

        Raises
        ------
        ValueError
            If the rank is not within 0 and the columns of the basis.
        """
        self._check(rank)
        left = self.basis[:, :rank].to(self.target, copy=True).contiguous()
        sizes = self.singular_values[:rank].to(left)
        if self.dual is None:
            right = left.mT @ self.target
        else:
            lengths = torch.linalg.vector_norm(left, dim=0)
            right = lengths[:, None] * (self.dual[:, :rank].to(left).mT @ self.target)
            left, sizes = left / lengths, sizes * lengths
        if split == "orthonormal" or rank == 0:
            return Factors(left=left, right=right)
        root = sizes.clamp_min(SMALLEST_SHARE * max(float(sizes.max()), TINY)).sqrt()
        return Factors(left=left * root, right=right / root[:, None])

    def shortened(self, columns: int, dtype: torch.dtype) -> "Decomposition":
        """Keep the first columns of the basis, rounded: what is worth storing.

        Rounding to float32 raises the loss by about 1e-15 of the energy: the factors are a
        stationary point of it, so the first order vanishes, and the right factor is taken from the
        rounded columns. In a metric that is times its condition number.
        """
        dual = None if self.dual is None else self.dual[:, :columns].to(dtype, copy=True)
        return replace(self, basis=self.basis[:, :columns].to(dtype, copy=True), dual=dual)

    def measured_losses(
        self,
        moment: Float[Tensor, "n n"] | None,
        metric: Float[Tensor, "out out"] | Float[Tensor, " out"] | None = None,
    ) -> Float[Tensor, " ranks"]:
        """Loss of the factors of every rank as they are, from the moment and not from the spectrum.

        With columns ``L`` and rows ``R`` it is ``tr G T S Tᵀ − 2 tr LᵀG T S Rᵀ + tr LᵀG L R S Rᵀ``,
        for all leading blocks of them at once.

        Parameters
        ----------
        moment : Tensor of shape (in, in), optional
            Second moment ``S`` of the inputs; the identity if left out.
        metric : Tensor of shape (out, out) or (out,), optional
            Metric ``G`` of the outputs, or its diagonal; the identity if left out.

        Returns
        -------
        Tensor of shape (columns + 1,), float64
            Without the floor.
        """
        basis = self.basis.to(self.target)
        dual = basis if self.dual is None else self.dual.to(self.target)
        right = dual.mT @ self.target
        seen = _through(right, moment)
        weighed = _in_metric(metric, self.target)
        energy = (_through(weighed, moment) * self.target).sum()
        captured = ((basis.mT @ weighed) * seen).sum(dim=1)
        gram = basis.mT @ _in_metric(metric, basis)
        twice = (gram * (seen @ right.mT)).cumsum(0).cumsum(1).diagonal()
        losses = energy - 2 * captured.cumsum(0) + twice
        return torch.cat([energy[None], losses]).clamp_min(0)

    def _check(self, rank: int) -> None:
        largest = self.basis.shape[1]
        if not 0 <= rank <= largest:
            raise ValueError(f"rank {rank} is not within 0 and {largest}")


def output_loss(
    weight: Float[Tensor, "out in"],
    factors: Factors,
    moment: Float[Tensor, "in in"] | None = None,
    metric: Float[Tensor, "out out"] | Float[Tensor, " out"] | None = None,
) -> float:
    """Mean squared output error of given factors: ``tr(G Δ S Δᵀ)``, ``Δ = weight − left @ right``.

    Unlike `Decomposition.loss` it looks at the factors themselves, so it also sees rounding.

    Parameters
    ----------
    weight : Tensor of shape (out, in)
    factors : Factors
        Of any dtype; the arithmetic is float64.
    moment : Tensor of shape (in, in), optional
        Second moment of the inputs; the identity if left out.
    metric : Tensor of shape (out, out) or (out,), optional
        Metric ``G`` of the outputs, or its diagonal; the identity if left out.
    """
    gap = in_float64(weight.detach()) - in_float64(factors.left) @ in_float64(factors.right)
    return max(float((_through(gap, moment) * _in_metric(metric, gap)).sum()), 0.0)


def decompose_outputs(
    target: Float[Tensor, "out in"],
    moment: Float[Tensor, "in in"] | None = None,
    tokens: int | None = None,
) -> Decomposition:
    """Inverse-free route: eigenvectors of the second moment of the outputs.

    A matrix with ``out <= in`` is solved from ``T S Tᵀ`` itself. A taller one is solved on the
    input side, from ``Rᵀ Tᵀ T R`` with ``R Rᵀ = S``, which is smaller and has the same spectrum;
    the basis is then an orthonormalised ``T R Q``. In neither is anything inverted, so too few
    tokens do no harm. Where the data leave directions open (fewer tokens than rank), the weight
    settles them: the remaining columns are the left singular vectors of what the others leave of
    ``T``.

    Parameters
    ----------
    target : Tensor of shape (out, in)
        The map to approximate. Solved in float64 whatever its dtype.
    moment : Tensor of shape (in, in), optional
        Second moment ``S`` of the inputs; the identity if left out, which is plain truncated SVD.
    tokens : int, optional
        How many tokens the moment is of. No more directions than that are known from it; what it
        shows beyond them is rounding.

    Returns
    -------
    Decomposition
        In float64.

    Raises
    ------
    NumericalError
        If the weight or the moment is not finite.

    References
    ----------
    Swift-SVD (arXiv 2604.01609), theorem 3.1, equations 3 and 4.

    Examples
    --------
    Weights 1, 2, 3 under moments 100, 1, 1: the singular values are 10, 3, 2, rank 1 loses 9 + 4.

    >>> weight = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    >>> solved = decompose_outputs(weight, torch.diag(torch.tensor([100.0, 1.0, 1.0])))
    >>> [round(float(s), 9) for s in solved.singular_values], round(solved.loss(1), 9)
    ([10.0, 3.0, 2.0], 13.0)
    """
    target = _checked(target, moment)
    if moment is None:
        basis, values, _ = torch.linalg.svd(target, full_matrices=False)
    else:
        moment = symmetrize(moment.to(target))
        basis, values = _leading_outputs(target, moment)
        noise = target.square().sum() * torch.linalg.matrix_norm(moment)
        del moment  # of wide inputs it is the largest thing here
        basis = _settle_open_directions(basis, values, target, float(noise), tokens)
    return Decomposition(basis=fix_signs(basis), target=target, singular_values=values)


def decompose_whitened(
    target: Float[Tensor, "out in"], moment: Float[Tensor, "in in"]
) -> Decomposition:
    """Whitening route: singular vectors of ``T L`` with a Cholesky root ``L Lᵀ = S``.

    SVD-LLM states its factors as ``U_k Σ_k V_kᵀ L⁻¹``. That equals ``U_k U_kᵀ T``, the form kept
    here, so the root is used but never inverted. A singular moment has no root: a jitter is added,
    with a warning, and the solution is then the optimum of the moment with the jitter in it.

    Parameters
    ----------
    target : Tensor of shape (out, in)
    moment : Tensor of shape (in, in)

    Returns
    -------
    Decomposition
        In float64.

    Raises
    ------
    NumericalError
        If the weight or the moment is not finite.
    NotPositiveDefiniteError
        If the moment has no root, even with the last jitter.

    References
    ----------
    SVD-LLM (arXiv 2403.07378), section 3.1; AA-SVD (arXiv 2604.02119), theorem 3.2 with A = B.

    Examples
    --------
    >>> weight = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    >>> solved = decompose_whitened(weight, torch.diag(torch.tensor([100.0, 1.0, 1.0])))
    >>> round(solved.loss(1), 9)
    13.0
    """
    target = _checked(target, moment)
    root, jitter = cholesky_with_jitter(symmetrize(moment.to(target)))
    basis, values, _ = torch.linalg.svd(target @ root, full_matrices=False)
    return Decomposition(
        basis=fix_signs(basis), target=target, singular_values=values, jitter=jitter
    )


def _through(matrix: Tensor, moment: Tensor | None) -> Tensor:
    """``matrix @ S``."""
    return matrix if moment is None else matrix @ moment.to(matrix)


def _in_metric(metric: Tensor | None, matrix: Tensor) -> Tensor:
    """``G @ matrix``."""
    if metric is None:
        return matrix
    metric = metric.to(matrix)
    return metric[:, None] * matrix if metric.ndim == 1 else metric @ matrix


def _checked(target: Tensor, moment: Tensor | None) -> Tensor:
    """Refuse what is not finite, and go to float64."""
    require_finite(target, "the weight")
    if moment is not None:
        require_finite(moment, "the second moment")
    return in_float64(target.detach())


def _leading_outputs(target: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of ``T S Tᵀ`` and the roots of its eigenvalues, by the smaller side."""
    out_features, in_features = target.shape
    if out_features <= in_features:
        return _descending(symmetrize(target @ moment @ target.mT))
    seen = target @ symmetric_root(moment)
    rotation, values = _descending(symmetrize(seen.mT @ seen))
    basis: Tensor = torch.linalg.qr(seen @ rotation).Q
    return basis, values


def _descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and the roots of the eigenvalues, largest first."""
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    return eigenvectors.flip(1), eigenvalues.flip(0).clamp_min(0).sqrt()


def _settle_open_directions(
    basis: Tensor, values: Tensor, target: Tensor, scale: float, tokens: int | None
) -> Tensor:
    """Where no energy is left to order the columns, order them by what they carry of the weight.

    What is left is rounding if it is below the unit roundoff of `scale`, a bound on the terms that
    were summed; or if it is in more directions than there were tokens.
    """
    squares = values.square()
    known = int((squares > 4 * scale * torch.finfo(squares.dtype).eps).sum())
    known = known if tokens is None else min(known, tokens)
    if known == len(squares):
        return basis
    kept = basis[:, :known]
    rest = target - kept @ (kept.mT @ target)
    columns = torch.linalg.svd(rest, full_matrices=False).U[:, : len(squares) - known]
    settled: Tensor = torch.linalg.qr(torch.cat([kept, columns], dim=1)).Q
    return settled
