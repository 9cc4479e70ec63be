"""Statistics taken again in the model that a first pass makes, and merged with the original's.

What a method minimises is a quadratic at the original weights: inputs as the original model has
them, and gradients as they are there. At small sizes the compressed model is far away; its inputs
are others, and its loss is steeper. The mean of the statistics at both ends stands for the way
between them.
"""

from dataclasses import replace
from typing import Any

from slimrank.blockwise import pass_blocks
from slimrank.calibration import METRIC, OUTPUT_METRIC, ROW_WEIGHTS, ActivationStore, TokenWindows
from slimrank.environment import Clock
from slimrank.methods import STREAMS
from slimrank.model import Anatomy
from slimrank.options import CompressionOptions
from slimrank.recipe import CompressionRecipe
from slimrank.statistics import AGAIN, MAGNITUDES, Statistics, collect_statistics


def look_again(
    compressed: Any,
    anatomy: Anatomy,
    recipe: CompressionRecipe,
    windows: TokenWindows,
    options: CompressionOptions,
    first: Statistics,
    passing: ActivationStore,
) -> Statistics:
    """Merge statistics of the original model with those of a compressed one, half and half.

    In neither paper. Errors of the outputs are still those of the original weights; only the
    inputs, gradients and magnitudes that they are weighed by are of both models.

    Parameters
    ----------
    compressed : PreTrainedModel
        By a first pass; left as it is.
    anatomy : Anatomy
        Of the targeted linears in the original model.
    recipe : CompressionRecipe
    windows : TokenWindows
        Those that `first` is of.
    options : CompressionOptions
    first : Statistics
        Of the original model, without moments. Its store gets the means, and the second moments of
        the compressed model's inputs.
    passing : ActivationStore
        Holds one set of statistics more for a while, and hidden states.

    Returns
    -------
    Statistics
        In the same store.

    Raises
    ------
    NumericalError
        If an activation or a gradient is not finite in the compressed model.
    """
    clock, again = Clock(), dict[str, tuple[str, int]]()
    second = collect_statistics(
        compressed, anatomy, recipe.needs, recipe, windows, options, clock, passing
    )
    if second is not None:
        _merge(first, second, anatomy)
    if not recipe.make_method().needs & STREAMS and recipe.allocation == "uniform":
        return first
    count = len(anatomy.groups)
    for passed in pass_blocks(
        compressed, anatomy, windows, options, clock, passing, count, "looking again"
    ):
        for group in passed.groups:
            key = group.sites[0].name
            moments = passed.moments[key]
            assert moments.original is not None
            first.store.put((AGAIN, key), moments.original)
            again |= dict.fromkeys((s.name for s in group.sites), (key, moments.tokens))
    return replace(first, again=again)


def _merge(first: Statistics, second: Statistics, anatomy: Anatomy) -> None:
    """Put the means of both in the place of the first."""
    names = [site.name for site in anatomy.sites]
    keys = [(kind, name) for kind in (METRIC, ROW_WEIGHTS, MAGNITUDES) for name in names]
    for key in (*keys, *((OUTPUT_METRIC, index) for index in range(len(anatomy.groups)))):
        if key in second.store:
            first.store.put(key, (first.store.get(key) + second.store.get(key)) / 2)
            second.store.drop(key)
