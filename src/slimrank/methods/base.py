"""What a method is: a name, its needs, and a call from weight and moments to a decomposition."""

from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from slimrank.linalg import Decomposition, Moments


@runtime_checkable
class Method(Protocol):
    """A choice of moments for the one problem of `slimrank.linalg.lowrank`.

    Attributes
    ----------
    name : str
        As in the literature; what recipes and the command line say.
    needs_moments : bool
        False if the method looks at the weight only: then no calibration is run, and its loss is
        the squared error of the weight instead of that of the outputs.
    paper : str
        Where it comes from.
    objective : str
        What is minimised over maps of rank k, in one line.
    """

    name: ClassVar[str]
    needs_moments: ClassVar[bool]
    paper: ClassVar[str]
    objective: ClassVar[str]

    def decompose(self, weight: Tensor, moments: Moments | None) -> Decomposition:
        """Solve for every rank at once."""
        ...
