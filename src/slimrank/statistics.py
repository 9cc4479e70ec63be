"""What is known of the original model beside second moments: gradients, magnitudes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from slimrank.calibration import (
    MEAN_GRADIENT,
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

MAGNITUDES, AGAIN = "magnitudes", "again"
OF_GRADIENTS = frozenset({"gradients", "weight_gradients", "mean_gradients"})
COLLECTED = OF_GRADIENTS | {"magnitudes"}


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of the original model by linear and block.

    Parameters
    ----------
    store : ActivationStore
        Holds them, in float32, under their kind and the linear's name or the block's number.
    tokens : int
        How many they are of.
    again : mapping of str to (str, int)
        Of linears whose inputs were seen a second time: where the second moment of these is kept,
        under ``("again", key)``, and of how many tokens it is.

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
    again: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def of(self, name: str, moments: Moments | None) -> Moments:
        """A linear's moments with its statistics beside them.

        A second moment that was taken again is merged with the original one, as if both were of one
        text; not where inputs have shifted by themselves.
        """
        moments = moments or Moments(original=None, tokens=self.tokens)
        if name in self.again and moments.original is not None and moments.shifted is None:
            key, tokens = self.again[name]
            both = moments.tokens + tokens
            again = self.store.get((AGAIN, key)).to(moments.original)
            merged = torch.lerp(moments.original, again, tokens / max(both, 1))
            moments = replace(moments, original=merged, tokens=both)
        metric, row_weights, magnitudes = (
            self.store.get((kind, name)) if (kind, name) in self.store else None
            for kind in (METRIC, ROW_WEIGHTS, MAGNITUDES)
        )
        return replace(moments, metric=metric, row_weights=row_weights, magnitudes=magnitudes)

    def mean_square(self, name: str) -> float:
        """Mean squared gradient at a linear's outputs, per token and output."""
        return float(self.store.get((METRIC, name)).diagonal().double().mean())

    def pop_mean_gradient(self, name: str) -> Tensor | None:
        """Gradient of the mean loss by a linear's weight, which is let go of; None if not taken."""
        key = (MEAN_GRADIENT, name)
        if key not in self.store:
            return None
        found = self.store.get(key)
        self.store.drop(key)
        return found

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
        As `slimrank.methods.Method.needs`, and 'mean_gradients' for allocation 'threshold'.
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
    if wanted & OF_GRADIENTS:
        with clock.phase("gradients"):
            found = collect_gradients(
                model,
                anatomy,
                windows,
                batch_size=size,
                labels=recipe.gradients.labels,
                generator=torch.Generator().manual_seed(recipe.calibration.seed),
                weight_gradients="weight_gradients" in wanted,
                mean_gradients="mean_gradients" in wanted,
                dtype=torch.float32,
                store=store,
                track=lambda steps, what: options.track(steps, f"gradients, {what}"),
            )
            keep_gradients(found, store)
    return Statistics(store, windows.tokens)
