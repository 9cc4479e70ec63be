"""What a method is: a name, its needs, and a call from weight and moments to a decomposition."""

from typing import ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from slimrank.linalg import Decomposition, Factors, Moments

STREAMS = frozenset({"original", "shifted"})  # whose second moments a method may look at
STATISTICS = {
    "metric": "the loss gradients at the outputs",
    "row_weights": "the weight gradients",
    "magnitudes": "the magnitudes of the inputs",
}


@runtime_checkable
class Method(Protocol):
    """A choice of moments for the one problem of `slimrank.linalg.lowrank`.

    Attributes
    ----------
    name : str
        As in the literature; what recipes and the command line say.
    needs : frozenset of str
        What it looks at beside the weight. Second moments of activations: 'original', those of the
        uncompressed model; 'shifted', those that arrive once everything upstream is compressed.
        Other statistics of the uncompressed model, each a field of `Moments`: 'gradients'
        (`metric`), 'weight_gradients' (`row_weights`), 'magnitudes'. Without one of the streams its
        loss is a squared error of the weight instead of the outputs; if empty, no calibration is
        run at all.
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


def require_statistic(
    method: str,
    moments: Moments | None,
    field: Literal["metric", "row_weights", "magnitudes"],
) -> Tensor:
    """A statistic of `Moments` other than a stream's second moment.

    Raises
    ------
    ValueError
        If there is none.
    """
    found: Tensor | None = None if moments is None else getattr(moments, field)
    if found is None:
        raise ValueError(f"{method} needs moments of {STATISTICS[field]}")
    return found
