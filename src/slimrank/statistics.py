"""What is known of the original model beside second moments: gradients, magnitudes."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from slimrank.calibration import (
    METRIC,
    OUTPUT_METRIC,
    ROW_WEIGHTS,
    ActivationStore,
    TokenWindows,
    collect_gradients,
    collect_magnitudes,
    default_batch_size,
    keep_gradients,
)
from slimrank.environment import Clock
from slimrank.linalg import Moments
from slimrank.model import Anatomy
from slimrank.options import CompressionOptions
from slimrank.recipe import CompressionRecipe

MAGNITUDES = "magnitudes"
COLLECTED = frozenset({"gradients", "weight_gradients", "magnitudes"})


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of the original model by linear and block.

    Parameters
    ----------
    store : ActivationStore
        Holds them, in float32, under their kind and the linear's name or the block's number.
    tokens : int
        How many they are of.

    Examples
    --------
    >>> from slimrank.calibration import ActivationStore
    >>> with ActivationStore() as store:
    ...     store.put(("metric", "fc"), torch.diag(torch.tensor([3.0, 1.0])))
    ...     found = Statistics(store, tokens=9)
    ...     found.of("fc", None).metric.tolist(), found.mean_square("fc")
    ([[3.0, 0.0], [0.0, 1.0]], 2.0)
    """

    store: ActivationStore
    tokens: int

    def of(self, name: str, moments: Moments | None) -> Moments:
        """A linear's moments with its statistics beside them."""
        moments = moments or Moments(original=None, tokens=self.tokens)
        metric, row_weights, magnitudes = (
            self.store.get((kind, name)) if (kind, name) in self.store else None
            for kind in (METRIC, ROW_WEIGHTS, MAGNITUDES)
        )
        return replace(moments, metric=metric, row_weights=row_weights, magnitudes=magnitudes)

    def mean_square(self, name: str) -> float:
        """Mean squared gradient at a linear's outputs, per token and output."""
        return float(self.store.get((METRIC, name)).diagonal().double().mean())

    def output_metric(self, block: int) -> Tensor:
        """Second moment of the loss's gradient at a block's output, of shape (hidden, hidden)."""
        return self.store.get((OUTPUT_METRIC, block))


def collect_statistics(
    model: nn.Module,
    anatomy: Anatomy,
    needs: Iterable[str],
    recipe: CompressionRecipe,
    windows: TokenWindows | None,
    options: CompressionOptions,
    clock: Clock,
    store: ActivationStore,
) -> Statistics | None:
    """Collect what some methods need of the original model, all blocks at once.

    Parameters
    ----------
    model : PreTrainedModel
        Dense; left as it is.
    anatomy : Anatomy
        Of the targeted linears.
    needs : iterable of str
        As `slimrank.methods.Method.needs`.
    recipe : CompressionRecipe
        Says which labels the gradients are of.
    windows : TokenWindows or None
    options : CompressionOptions
    clock : Clock
    store : ActivationStore
        Where they are kept.

    Returns
    -------
    Statistics or None
        None if nothing of it is needed.

    Raises
    ------
    NumericalError
        If an activation or a gradient is not finite.
    """
    wanted = COLLECTED & set(needs)
    if not wanted or windows is None:
        return None
    length = max(len(window) for window in windows.windows)
    size = options.batch_size or default_batch_size(length)
    if "magnitudes" in wanted:
        with clock.phase("magnitudes"):
            for name, mean in collect_magnitudes(model, anatomy, windows, size).items():
                store.put((MAGNITUDES, name), mean)
    if wanted & {"gradients", "weight_gradients"}:
        with clock.phase("gradients"):
            found = collect_gradients(
                model,
                anatomy,
                windows,
                batch_size=size,
                labels=recipe.gradients.labels,
                generator=torch.Generator().manual_seed(recipe.calibration.seed),
                weight_gradients="weight_gradients" in wanted,
                dtype=torch.float32,
                store=store,
                track=lambda steps, what: options.track(steps, f"gradients, {what}"),
            )
            keep_gradients(found, store)
    return Statistics(store, windows.tokens)
