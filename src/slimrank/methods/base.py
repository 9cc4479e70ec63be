"""What a method is: a name, its needs, and a call from weight and moments to a decomposition."""

from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from slimrank.linalg import Decomposition, Factors, Moments


@runtime_checkable
class Method(Protocol):
    """A choice of moments for the one problem of `slimrank.linalg.lowrank`.

    Attributes
    ----------
    name : str
        As in the literature; what recipes and the command line say.
    needs : frozenset of str
        Whose activations it looks at: 'original', those of the uncompressed model; 'shifted', those
        that arrive once everything upstream is compressed. If empty it looks at the weight only:
        then no calibration is run, and its loss is the squared error of the weight instead of that
        of the outputs.
    default_ridge : float
        Share of the mean diagonal that is added to the moments if a recipe does not say.
    paper : str
        Where it comes from.
    objective : str
        What is minimised over maps of rank k, in one line.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    default_ridge: ClassVar[float]
    paper: ClassVar[str]
    objective: ClassVar[str]

    def decompose(self, weight: Tensor, moments: Moments | None) -> Decomposition:
        """Solve for every rank at once."""
        ...

    def loss(self, weight: Tensor, factors: Factors, moments: Moments | None) -> float:
        """Value of the objective for given factors, from the moments and not from a spectrum."""
        ...


def require_moment(method: str, moments: Moments | None, stream: str) -> Tensor:
    """Second moment of a stream; the original's where nothing is known to have shifted.

    Raises
    ------
    ValueError
        If there is none.
    """
    if moments is None or moments.arriving is None:
        raise ValueError(f"{method} needs moments")
    moment = moments.arriving if stream == "shifted" else moments.original
    if moment is None:
        raise ValueError(f"{method} needs moments of the {stream} activations")
    return moment
