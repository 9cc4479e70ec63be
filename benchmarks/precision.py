"""How far each way of solving is from the optimum, on spectra with outlier tokens.

    python benchmarks/precision.py --out results/precision.json

The activations are float32. The optimum is the tail of a float64 singular value decomposition of
the outputs themselves, with no second moment formed. Figures are achieved squared loss over
optimum, minus one; 'not positive definite' is a Cholesky that failed.
"""

import argparse
from collections.abc import Callable, Iterator
from unittest.mock import patch

import _record
import torch
from torch import Tensor

from slimrank.linalg import MomentAccumulator, decompose_outputs, moments, tail_energy

WIDTH, TOKENS, RANK = 512, 8192, 154
Solver = Callable[[Tensor, Tensor, int], Tensor]


def cases(generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Inputs of shape (tokens, width), float32."""
    decay = torch.linspace(0, -1.3, WIDTH).mul(2.302585).exp()
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    base = torch.randn(TOKENS, WIDTH, generator=generator) * decay @ rotation
    yield "smooth decay", base
    for factor in (30, 100, 300, 1000, 3000):
        outliers = base.clone()
        outliers[::2048] *= factor
        yield f"outlier tokens x{factor}", outliers
    yield "large mean", base + 100 * torch.randn(WIDTH, generator=generator) / WIDTH**0.5
    yield "all positive", torch.rand(TOKENS, WIDTH, generator=generator)
    yield "300 tokens for 512 features", base[:300]
    few = base[:300].clone()
    few[0] *= 1000
    yield "300 tokens, one x1000", few


def ours(weight: Tensor, inputs: Tensor, rank: int) -> Tensor:
    """What slimrank does: float32 products, float64 sums, heavy tokens apart, float64 solve."""
    accumulator = MomentAccumulator(weight.shape[1])
    for block in inputs.split(2048):
        accumulator.update(block)
    return decompose_outputs(weight, accumulator.result().original).truncate(rank).dense()


def ours_without_heavy_tokens_apart(weight: Tensor, inputs: Tensor, rank: int) -> Tensor:
    """The same, every token in the float32 product."""
    with patch.object(moments, "HEAVY", float("inf")):
        return ours(weight, inputs, rank)


def float64_moment(weight: Tensor, inputs: Tensor, rank: int) -> Tensor:
    """Float64 products too."""
    accumulator = MomentAccumulator(weight.shape[1])
    accumulator.update(inputs.double())
    return decompose_outputs(weight, accumulator.result().original).truncate(rank).dense()


def float32_cholesky(weight: Tensor, inputs: Tensor, rank: int) -> Tensor:
    """Whitening as research code does it: all float32, inverse of the root."""
    root = torch.linalg.cholesky(inputs.mT @ inputs)
    u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    low = u[:, :rank] * s[:rank] @ vt[:rank] @ torch.linalg.inv(root)
    return low.double()


def float32_output_moment(weight: Tensor, inputs: Tensor, rank: int) -> Tensor:
    """Swift-SVD as released: float32 second moment of the outputs, float32 eigh."""
    outputs = inputs @ weight.mT
    basis = torch.linalg.eigh(outputs.mT @ outputs).eigenvectors[:, -rank:]
    return (basis @ (basis.mT @ weight)).double()


SOLVERS: dict[str, Solver] = {
    "slimrank": ours,
    "slimrank, heavy tokens not apart": ours_without_heavy_tokens_apart,
    "float64 moment, float64 inverse-free": float64_moment,
    "float32 Cholesky whitening": float32_cholesky,
    "float32 output moment and eigh": float32_output_moment,
}


def excess(solver: Solver, weight: Tensor, inputs: Tensor) -> float | str:
    outputs = inputs.double() @ weight.double().mT
    optimum = float(tail_energy(torch.linalg.svdvals(outputs))[RANK])
    try:
        solved = solver(weight, inputs, RANK)
    except torch.linalg.LinAlgError:
        return "not positive definite"
    achieved = float((outputs - inputs.double() @ solved.mT).square().sum())
    return achieved / optimum - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(options.seed)
    weight = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    results = {
        name: {how: excess(solver, weight, inputs) for how, solver in SOLVERS.items()}
        for name, inputs in cases(generator)
    }
    settings = {"width": WIDTH, "tokens": TOKENS, "rank": RANK, "figure": "loss / optimum - 1"}
    _record.write(options.out, options.seed, settings, results)


if __name__ == "__main__":
    main()
