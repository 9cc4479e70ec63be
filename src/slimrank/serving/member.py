"""One linear of a checkpoint: which tensors it has, and which part of them a process needs."""

from dataclasses import dataclass

from torch import Tensor

LATENTS = ("latent.weight", "latent.codes", "latent.scale")
EXPANSIONS = ("expand.weight", "expand.codes", "expand.scale")
KINDS = ("weight", "codes", "scale", "pivots", *LATENTS, *EXPANSIONS)


@dataclass(frozen=True, slots=True)
class Member:
    """One linear of the checkpoint, and the part of it that one process computes.

    Parameters
    ----------
    name : str
        Full name in the checkpoint.
    shape : tuple of int
        Outputs and inputs of all of it.
    rows, columns : range
        Outputs that are made here, and inputs that arrive here.
    rank : int or None
        None of one that is dense.
    pivoted : bool
        The layout.
    coded : bool
        Its matrices are int8 codes with a scale for each of their rows.
    """

    name: str
    shape: tuple[int, int]
    rows: range
    columns: range
    rank: int | None = None
    pivoted: bool = False
    coded: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its tensors in the checkpoint, by the last part of their names.

        Examples
        --------
        >>> whole = range(6), range(8)
        >>> Member("fc", (6, 8), *whole).shapes()
        {'weight': (6, 8)}
        >>> Member("fc", (6, 8), *whole, coded=True).shapes()
        {'weight': (0,), 'codes': (6, 8), 'scale': (6,)}
        >>> list(Member("fc", (6, 8), *whole, rank=2, pivoted=True).shapes().items())[1:]
        [('latent.weight', (2, 8)), ('expand.weight', (4, 2)), ('pivots', (2,))]
        """
        if self.rank is None:
            empty = {"weight": (0,)} if self.coded else {}
            return {**empty, **_matrix("", self.shape, self.coded)}
        rows = self.shape[0] - self.rank if self.pivoted else self.shape[0]
        found: dict[str, tuple[int, ...]] = {"weight": (0,)}
        found |= _matrix("latent.", (self.rank, self.shape[1]), self.coded)
        found |= _matrix("expand.", (rows, self.rank), self.coded)
        return found | ({"pivots": (self.rank,)} if self.pivoted else {})

    def own_part(self, kind: str, tensor: Tensor) -> Tensor:
        """What is needed here of a tensor; which rows of a pivoted expansion, only pivots tell."""
        rows, columns = (slice(x.start, x.stop) for x in (self.rows, self.columns))
        if kind in ("latent.weight", "latent.codes"):
            return tensor[:, columns]
        if kind in EXPANSIONS and not self.pivoted:
            return tensor[rows]
        if self.rank is None and tensor.numel():
            return tensor[rows, columns] if tensor.ndim == 2 else tensor[rows]
        return tensor


def _matrix(prefix: str, shape: tuple[int, int], coded: bool) -> dict[str, tuple[int, ...]]:
    if coded:
        return {f"{prefix}codes": shape, f"{prefix}scale": shape[:1]}
    return {f"{prefix}weight": shape}
