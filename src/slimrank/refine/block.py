"""Train a compressed block towards the original block's output (AA-SVD, section 3.3).

The original block runs on the original stream, the compressed one on what really arrives at it:
``min E ‖L(x) − L'(z)‖²`` over the factors, norm scales and biases of ``L'``; all else is fixed.
Beyond the paper, errors may be measured by what the rest of the model makes of them: to second
order by a metric of gradients, or exactly, by its predictions.
"""

import time
import warnings

from jaxtyping import Float
from torch import Tensor, nn

from slimrank import processes
from slimrank.errors import NumericalWarning, RecipeError
from slimrank.nn import LowRankLinear
from slimrank.recipe import RefineRecipe
from slimrank.refine.data import BlockData
from slimrank.refine.divergence import Divergence, Rest
from slimrank.refine.losses import Loss, SquaredError
from slimrank.refine.masters import Best, master_parameters
from slimrank.refine.training import BlockTraining
from slimrank.report import RefinementEpoch, RefinementReport


def refine_block(
    block: nn.Module,
    calibration: BlockData,
    held_out: BlockData | None,
    settings: RefineRecipe,
    index: int,
    metric: Float[Tensor, "hidden hidden"] | None = None,
    rest: Rest | None = None,
    what: str | None = None,
    section: str = "refine",
) -> RefinementReport:
    """Train a block in place.

    Nothing is carried from block to block. With `settings.patience`, the parameters of the epoch
    that is best on `held_out` are kept, the start being epoch 0. If anything is raised, an
    interrupt too, the block is as it was.

    Parameters
    ----------
    block : nn.Module
        Gives hidden states, or a tuple that begins with them.
    calibration : BlockData
    held_out : BlockData or None
        Not trained on.
    settings : RefineRecipe
    index : int
        The block's position; the order of sequences is drawn from it and `settings.seed`.
    metric : Tensor of shape (hidden, hidden), optional
        For loss 'gradient': second moment of the model's gradients at the original block's output.
    rest : Rest, optional
        For loss 'kl'. The data must then give the numbers of its sequences.
    what : str, optional
        What messages call the block; its number if left out.
    section : str
        Of the recipe, that `settings` are from.

    Returns
    -------
    RefinementReport
        Losses are shares of the variance of the calibration's targets, also those of `held_out`,
        whatever `settings.scale_loss` says; for 'kl' they are nats a token. They are taken before
        the parameters are rounded.

    Raises
    ------
    RecipeError
        If the block has nothing of what `settings.trains` names.
    ValueError
        If what the loss needs is not given.
    NumericalError
        If a loss or a gradient is not finite; for squared errors, if all targets are equal.

    Notes
    -----
    Deviations from the authors' code, beside what the settings let choose:

    - Masters and the state of AdamW are float32 whatever the model's dtype, and are rounded once,
      at the end. A bfloat16 weight does not change by less than about 2⁻⁹ of itself, and most of
      the steps are smaller. Products are in bfloat16 for a model in bfloat16 or float16: gradients
      of float16 underflow.
    - The warm-up begins above 0, at which the authors' first step changes nothing, and the last
      step has the final rate.
    - Squared errors are in float32, not in the model's dtype.
    - Dropout is off.
    """
    started = time.perf_counter()
    what = what or f"block {index}"
    trained = _trained_parameters(block, settings, what)
    measure = _measure(calibration, settings, index, metric, rest)
    patience = settings.patience
    if patience is not None and held_out is None:
        warnings.warn(
            "no held-out sequences to stop training by: it runs to the end of epoch "
            f"{settings.epochs}; hold sequences out, or set {section}.patience to null",
            NumericalWarning,
            stacklevel=2,
        )
    epochs: list[RefinementEpoch] = []
    with master_parameters(block, trained):
        training = BlockTraining(block, trained, calibration, measure, settings, index, what)
        start_loss = training.loss(calibration)
        start_held_out = None if held_out is None else training.loss(held_out)
        best = None
        if patience is not None and start_held_out is not None:
            best = Best(trained, start_held_out)
        for number in range(1, settings.epochs + 1):
            loss = training.train_epoch()
            at_end = None if held_out is None else training.loss(held_out)
            seconds = time.perf_counter() - started
            epochs.append(RefinementEpoch(loss=loss, held_out_loss=at_end, seconds=seconds))
            if best is None or at_end is None or best.is_improved(number, at_end):
                continue
            if patience is not None and number - best.number >= patience:
                break
        kept = len(epochs) if best is None else best.number
        if best is not None and kept < len(epochs):
            best.put_back()
        processes.equalise(trained)
    return RefinementReport(
        loss=settings.loss,
        start_loss=start_loss,
        start_held_out_loss=start_held_out,
        epochs=tuple(epochs),
        kept_epoch=kept,
        trained_params=sum(parameter.numel() for parameter in trained),
        seconds=time.perf_counter() - started,
    )


def _measure(
    calibration: BlockData,
    settings: RefineRecipe,
    index: int,
    metric: Tensor | None,
    rest: Rest | None,
) -> Loss:
    if settings.loss == "gradient":
        if metric is None:
            raise ValueError("refine.loss 'gradient' needs the metric of the block's output")
        return SquaredError.in_metric(calibration, index, metric, settings.damping)
    if settings.loss == "kl":
        if rest is None:
            raise ValueError("refine.loss 'kl' needs the rest of the model")
        return Divergence(rest)
    return SquaredError.of(calibration, index)


def _trained_parameters(block: nn.Module, settings: RefineRecipe, what: str) -> list[nn.Parameter]:
    factors = {
        id(factor.weight)
        for module in block.modules()
        if isinstance(module, LowRankLinear)
        for factor in (module.latent, module.expand)
    }

    def kind(name: str, parameter: nn.Parameter) -> str | None:
        if parameter.numel() == 0:  # a pivoted linear whose rows are all pivots
            return None
        if id(parameter) in factors:
            return "factors"
        if name.rpartition(".")[2] == "bias":
            return "biases"
        return "norms" if parameter.ndim == 1 else None

    trained = [p for name, p in block.named_parameters() if kind(name, p) in settings.trains]
    if not trained:
        raise RecipeError(
            f"nothing to train: no {', '.join(settings.trains)} in {what}; name others, or "
            "turn the training off"
        )
    return trained
