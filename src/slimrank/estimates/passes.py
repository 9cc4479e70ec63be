"""How often the calibration tokens pass the model, in units of one forward of all of them."""

from dataclasses import dataclass

from slimrank.methods import STREAMS
from slimrank.recipe import CompressionRecipe, RefineRecipe, TuneRecipe
from slimrank.statistics import OF_GRADIENTS

TRIALS = 12  # models of `slimrank.search`: eleven importance weights and uniform ranks


@dataclass(frozen=True, slots=True)
class Passes:
    """Passes of the blocks; sums of them.

    Parameters
    ----------
    forwards, backwards : float
        Of the calibration tokens.
    held_out : float
        Forwards of the held-out tokens, in units of all of those.
    checks : float
        Forwards of calibration tokens once more, that moments are held against.

    Examples
    --------
    >>> Passes(1, 0) + Passes(2, 1)
    Passes(forwards=3, backwards=1, held_out=0, checks=0)
    """

    forwards: int | float = 0
    backwards: int | float = 0
    held_out: int | float = 0
    checks: int | float = 0

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(
            self.forwards + other.forwards,
            self.backwards + other.backwards,
            self.held_out + other.held_out,
            self.checks + other.checks,
        )


def passes_of(recipe: CompressionRecipe, blocks: int) -> Passes:
    """At most so many: training may stop early.

    Parameters
    ----------
    recipe : CompressionRecipe
    blocks : int
        Of the model: a training by predictions runs all later ones.

    Examples
    --------
    Forwards, backwards with each block run again, and the moments.

    >>> passes_of(CompressionRecipe(budget={"param_ratio": 0.8}), 32)
    Passes(forwards=3, backwards=1, held_out=0, checks=0.0078125)
    """
    total = Passes()
    sample = recipe.calibration
    if recipe.generated_sequences:  # every token once
        share = recipe.generated_sequences / (sample.num_sequences + recipe.generated_sequences)
        total += Passes(share)
    if recipe.tune is not None:
        total += Passes(1, 0, 1)
    if recipe.passes == 2:
        total += _statistics(recipe.needs) + _made(recipe.first_pass(), blocks)
        total += _statistics(recipe.needs)
        if recipe.make_method().needs & STREAMS or recipe.allocation != "uniform":
            total += Passes(1)
    else:
        chooses = recipe.allocation != "uniform"
        total += _statistics(recipe.needs if chooses else recipe.needs_beside_ranks)
    total += _made(recipe, blocks)
    return total if recipe.tune is None else total + _trained(recipe.tune, checkpointed=1)


def _statistics(needs: frozenset[str]) -> Passes:
    """Forwards, and each block once more for its gradients; magnitudes in a pass of their own."""
    gradients = Passes(2, 1) if needs & OF_GRADIENTS else Passes()
    return gradients + Passes(1 if "magnitudes" in needs else 0)


def _made(recipe: CompressionRecipe, blocks: int) -> Passes:
    """Profile, search, and factors."""
    chooses = recipe.allocation != "uniform"
    is_built = recipe.for_profile() == recipe and not recipe.is_sequential
    one = Passes(1, checks=1 / recipe.calibration.num_sequences)
    total = one if chooses else Passes()
    if recipe.allocation == "swift" and recipe.swift.importance_weight is None:
        total += Passes(held_out=TRIALS)
    if recipe.is_sequential:
        return total + _in_turn(recipe, blocks)
    if not (is_built and chooses) and recipe.make_method().needs & STREAMS:
        total += one
    return total


def _in_turn(recipe: CompressionRecipe, blocks: int) -> Passes:
    """The original stream and the shifted one; and training, with the shifted one again."""
    total = Passes(2, 0, 2)
    if not recipe.refines:
        return total
    total += Passes(1, 0, 1) + _trained(recipe.refine, checkpointed=0)
    if recipe.refine.loss == "kl":
        later = _trained(recipe.refine, checkpointed=1)
        share = (blocks - 1) / 2
        total += Passes(1, 0, 1)
        total += Passes(share * later.forwards, share * later.backwards, share * later.held_out)
    return total


def _trained(settings: RefineRecipe | TuneRecipe, checkpointed: int) -> Passes:
    """The loss before, and epochs; a block whose graph is not held runs again for its gradient."""
    epochs = settings.epochs
    return Passes(1 + epochs * (1 + checkpointed), epochs, 1 + epochs)
