"""What is held while one linear is solved: matrices of its sides, by what the solvers do in turn.

All of it is float64 and gone once the linear is solved; moments and metrics that wait for it are
counted where they are kept. LAPACK's own arrays are in it: eigenvectors take the matrix, a copy and
twice as much to work in.
"""

from slimrank.allocation import LinearShape
from slimrank.methods import Method

DOUBLE = 8


def solve_bytes(shape: LinearShape, method: Method, rank: int, is_ridged: bool) -> int:
    """Most that is held at once while a linear is solved and its losses are told.

    Parameters
    ----------
    shape : LinearShape
    method : Method
    rank : int
        Largest that is asked for.
    is_ridged : bool
        Whether something is added to the moments, which makes copies of them.

    Examples
    --------
    A weight of 3 x 2 and its singular vectors, and what LAPACK takes for these.

    >>> from slimrank.methods import method_by_name
    >>> solve_bytes(LinearShape("fc", 3, 2), method_by_name("svd"), 1, False) // 8
    44
    """
    out, inside = shape.out_features, shape.in_features
    matrix, metric, least = out * inside, out * out, min(out, inside)
    needs = method.needs
    known = matrix + (2 if "shifted" in needs else 1) * is_ridged * inside**2
    solved = known + out * least
    if "gradients" in needs:
        known += metric  # damped
        solved = known + max(4 * metric, metric + matrix + 2 * out * least)
    stages = [solved, *(known + part for part in _decompose(shape, method))]
    losses = matrix + out * rank + 4 * matrix + ("gradients" in needs) * 3 * metric
    return DOUBLE * max(*stages, losses)


def check_bytes(shape: LinearShape) -> int:
    """Moments of the last sequence, summed again; then the error that they predict.

    Parameters
    ----------
    shape : LinearShape
    """
    out, inside = shape.out_features, shape.in_features
    return DOUBLE * (inside**2 + 4 * out * inside)


def _decompose(shape: LinearShape, method: Method) -> list[int]:
    """Doubles of each stage, beside weight, moments and metric."""
    out, inside = shape.out_features, shape.in_features
    matrix, square, least = out * inside, inside**2, min(out, inside)
    needs = method.needs
    stages: list[int] = []
    if {"original", "shifted"} <= needs:  # the best map of full rank
        stages.append(matrix + 6 * square)
        stages.append(matrix + 3 * square + 4 * matrix)
    held = matrix if {"original", "shifted"} <= needs else 0
    if "gradients" in needs:  # its root, and the weight in it
        held += out * out + matrix
    if not needs & {"original", "shifted"}:
        return [held + matrix + 2 * out * least + least * inside + 4 * least**2]
    if method.name == "svd-llm":  # a root of the moment, and a full decomposition
        stages.append(held + 5 * square)
        stages.append(held + square + 2 * matrix + out * least + least * inside + 4 * least**2)
        return stages
    stages.append(held + square)  # made symmetric
    if out <= inside:
        stages.append(held + square + matrix + 3 * out * out)
        stages.append(held + square + 4 * out * out)  # eigenvectors
    else:
        stages.append(held + 4 * square)
        stages.append(held + 5 * square + matrix)
        stages.append(held + 2 * square + 4 * matrix)  # an orthonormal basis
    return stages
