"""What was done: frozen, written as JSON beside the weights."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slimrank.errors import CheckpointError
from slimrank.recipe import CompressionRecipe, HealRecipe

Packing = Literal["rows", "remapped"]
GraphFormName = Literal["onnx", "openvino"]
Count = Annotated[int, Field(ge=0, lt=2**63)]
PositiveCount = Annotated[int, Field(ge=1, lt=2**63)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SizeReport(_Frozen):
    """The budget line: what was kept, by every definition that is in use.

    Parameters
    ----------
    target_params_before, target_params : int
        Of the targeted linears, biases left out.
    model_params_before, model_params : int
        Of everything, embeddings and head included, a tied matrix counted once.
    weight_bytes_before, weight_bytes : int
        Of the weight files on disk; before, as `save_pretrained` writes the dense model in the same
        dtype.
    int8_bytes : int
        Of the dense model with the linears of its blocks in int8, one scale of two bytes for each
        output, and all else as stored.
    """

    target_params_before: PositiveCount
    target_params: Count
    model_params_before: PositiveCount
    model_params: Count
    weight_bytes_before: Count
    weight_bytes: Count
    int8_bytes: Count

    def line(self) -> str:
        """All of it in one line.

        Examples
        --------
        >>> SizeReport(target_params_before=100, target_params=80, model_params_before=200,
        ...     model_params=180, weight_bytes_before=400_000_000, weight_bytes=360_000_000,
        ...     int8_bytes=300_000_000).line()
        'kept 80.0 % (removed 20.0 %) of the targeted linears, 90.0 % (10.0 %) of the whole model; 400.0 -> 360.0 MB on disk (int8 of the dense model: 300.0 MB)'
        """  # noqa: E501
        targets = 100 * self.target_params / self.target_params_before
        model = 100 * self.model_params / self.model_params_before
        return (
            f"kept {targets:.1f} % (removed {100 - targets:.1f} %) of the targeted linears, "
            f"{model:.1f} % ({100 - model:.1f} %) of the whole model; "
            f"{self.weight_bytes_before / 1e6:.1f} -> {self.weight_bytes / 1e6:.1f} MB on disk "
            f"(int8 of the dense model: {self.int8_bytes / 1e6:.1f} MB)"
        )


class LinearReport(_Frozen):
    """One linear. Losses are those of the method's objective, its ridge included.

    They are shares of the energy of the target: of the outputs, or of the weight for `svd`. In a
    refined run they are those of the factors that the training started from; what it came to is in
    `BlockReport`.

    Parameters
    ----------
    name : str
    rank : int or None
        None if it stayed dense.
    pivoted : bool
        The layout of its factors.
    params_before, params : int
    tokens : int
        Calibration tokens that reached it; 0 if the method needs none.
    effective_rank : float or None
        Of the outputs' spectrum.
    predicted_loss : float
        What the singular values promise.
    measured_loss : float
        What the float64 factors give, over all calibration tokens.
    stored_loss : float or None
        The same for the factors as stored, rounded to the model's dtype. None from a profile: it
        keeps the measured losses of all ranks, but not the moments.
    token_check : float or None
        Relative gap between the error of the stored factors on the tokens of the last batch, taken
        token by token, and the same error from that batch's second moment. In sequential order, of
        the last sequence, in 16 random directions of the outputs.
    jitter : float
        Added to the moment's diagonal, 0.0 if nothing was.
    seconds : float
        Of the solve.
    """

    name: str
    rank: Count | None
    pivoted: bool = False
    params_before: PositiveCount
    params: Count
    tokens: Count
    effective_rank: float | None = None
    predicted_loss: float = 0.0
    measured_loss: float = 0.0
    stored_loss: float | None = 0.0
    token_check: float | None = None
    jitter: float = 0.0
    seconds: float = 0.0


class KVCacheReport(_Frozen):
    """What a token leaves in the key/value cache, in all blocks together.

    Parameters
    ----------
    dense_values, latent_values : int
        Numbers a token, with an ordinary cache and with latents. The latter leaves out what the
        positions take: one pair of rotary embeddings for all blocks.
    value_bytes : int
        Bytes of each.
    """

    dense_values: PositiveCount
    latent_values: Count
    value_bytes: Count

    def line(self) -> str:
        """All of it in one line.

        Examples
        --------
        >>> KVCacheReport(dense_values=11520, latent_values=5760, value_bytes=2).line()
        'key/value cache: 23040 -> 11520 bytes a token (50.0 %)'
        """
        return (
            f"key/value cache: {self.dense_values * self.value_bytes} -> "
            f"{self.latent_values * self.value_bytes} bytes a token "
            f"({100 * self.latent_values / self.dense_values:.1f} %)"
        )


class PlannedLinear(_Frozen):
    """A linear and the rank it is to get; None leaves it dense."""

    name: str
    out_features: int
    in_features: int
    rank: int | None
    params_before: int
    params: int


class PhaseReport(_Frozen):
    """One phase of a run to be, where it holds most.

    Parameters
    ----------
    name : str
    memory, device, disk : dict of str to int
        Bytes in memory, in the accelerator's memory and on disk, by what holds them.
    """

    name: str
    memory: dict[str, Count]
    device: dict[str, Count]
    disk: dict[str, Count]


class PassesReport(_Frozen):
    """How often tokens pass the blocks of a model, at most: training may stop early.

    Parameters
    ----------
    forwards, backwards : float
        Of the calibration tokens, in units of all of them through all blocks.
    held_out_forwards : float
        Of the held-out tokens, in units of all of those.
    check_forwards : float
        Of the calibration tokens that moments are held against once more, in units of all.
    """

    forwards: float
    backwards: float
    held_out_forwards: float
    check_forwards: float

    def line(self) -> str:
        """All of them.

        Examples
        --------
        >>> PassesReport(forwards=3, backwards=1, held_out_forwards=0, check_forwards=0.01).line()
        'passes: calibration text 3.01 times forwards and 1 backwards'
        >>> PassesReport(forwards=5, backwards=1, held_out_forwards=5, check_forwards=0).line()
        'passes: calibration text 5 times forwards and 1 backwards, held-out text 5 times'
        """
        forwards = self.forwards + self.check_forwards
        text = f"passes: calibration text {forwards:.3g} times forwards"
        text += f" and {self.backwards:.3g} backwards" if self.backwards else ""
        held_out = self.held_out_forwards
        return f"{text}, held-out text {held_out:.3g} times" if held_out else text


class NeedsReport(_Frozen):
    """What a run will take, estimated from shapes and the recipe.

    Parameters
    ----------
    memory_bytes : int
        Peak of resident memory, above what imports and the tokenizer take: that of the phase that
        holds most.
    device_bytes : int
        Peak of the accelerator's memory; 0 without one.
    disk_bytes : int
        Peak on the disk of the output, while it runs.
    stays_bytes : int
        Of the weight files that are there at the end.
    passes : PassesReport
    phases : tuple of PhaseReport
        In turn.
    """

    memory_bytes: Count
    device_bytes: Count
    disk_bytes: Count
    stays_bytes: Count
    passes: PassesReport
    phases: tuple[PhaseReport, ...]

    @property
    def largest(self) -> PhaseReport:
        """The phase that holds most in memory."""
        return max(self.phases, key=lambda phase: sum(phase.memory.values()))


class PlanReport(_Frozen):
    """What a recipe would do, before any work.

    Parameters
    ----------
    model : str
    method : str
    size : SizeReport
        Exact: it follows from shapes.
    linears : tuple of PlannedLinear
        In call order.
    kv_cache : KVCacheReport or None
    needs : NeedsReport
        Memory, disk and passes.
    profile_bytes : int
        Of a profile on disk, bases included.
    inputs : int
        Second moments to be summed, one for each distinct input.
    warnings : tuple of str
    """

    model: str
    method: str
    size: SizeReport
    linears: tuple[PlannedLinear, ...]
    kv_cache: KVCacheReport | None
    needs: NeedsReport
    profile_bytes: int
    inputs: int
    warnings: tuple[str, ...]


class ImportanceWeightTrial(_Frozen):
    """One α of allocation 'swift', and the perplexity of its model on held-out text."""

    importance_weight: float
    perplexity: float


class AllocationReport(_Frozen):
    """How allocation 'swift' came to its ranks.

    Parameters
    ----------
    importance_weight : float
        The α that was taken.
    retained_share : float
    trials : tuple of ImportanceWeightTrial
        Each α that was tried; empty if α was given.
    uniform_perplexity : float or None
        Of uniform ranks at the same budget, on the same text.
    held_out_tokens : int
    held_out_fingerprint : str
        Of the held-out token ids; they are of the calibration text, and not calibrated on.
    seconds : float
        Of the search.
    """

    importance_weight: float
    retained_share: float
    trials: tuple[ImportanceWeightTrial, ...] = ()
    uniform_perplexity: float | None = None
    held_out_tokens: int = 0
    held_out_fingerprint: str = ""
    seconds: float = 0.0


class GlobalRanksReport(_Frozen):
    """How allocation 'global' came to its ranks.

    Parameters
    ----------
    unit : str
        What the losses are counted in.
    predicted_loss : float
        Sum of the losses over dense, in that unit; for 'kfac' nats a token, to second order.
    marginal : float
        Loss that one more parameter would save.
    seconds : float
    """

    unit: str
    predicted_loss: float
    marginal: float
    seconds: float = 0.0


class ThresholdReport(_Frozen):
    """How allocation 'threshold' came to its ranks.

    Parameters
    ----------
    predicted_change : float
        Sum of what all components that were left out are predicted to change the loss by, in nats
        a token, to first order; by the zero-sum rule near 0, and no measure of the loss.
    rise : float
        The part of it that is above 0: what is balanced by components that are predicted to help.
    seconds : float
    """

    predicted_change: float
    rise: float
    seconds: float = 0.0


RanksReport = AllocationReport | GlobalRanksReport | ThresholdReport


class BlockError(_Frozen):
    """How far a compressed block's output is from the original block's, over tokens.

    Parameters
    ----------
    relative_error : float
        ``E ‖y − y'‖² / E ‖y‖²``; the original block runs on the original stream, the compressed
        one on the shifted stream.
    cosine_distance : float
        Mean of ``1 − cos(y, y')``: unlike the error it counts large tokens no more than others.
    """

    relative_error: float
    cosine_distance: float


class RefinementEpoch(_Frozen):
    """One pass of a refinement over the calibration sequences.

    Parameters
    ----------
    loss : float
        Mean over its steps (see `RefinementReport`).
    held_out_loss : float or None
        The same on the held-out sequences at its end.
    seconds : float
        From the start of the refinement.
    """

    loss: float
    held_out_loss: float | None
    seconds: float


class RefinementReport(_Frozen):
    """How a block was trained.

    Parameters
    ----------
    loss : str
        What it was trained by, and losses are of: 'mse' as a share of the target's variance,
        'gradient' the same in the metric, 'kl' in nats a token.
    start_loss : float
        Before the first step, on the calibration sequences.
    start_held_out_loss : float or None
    epochs : tuple of RefinementEpoch
        Those that ran.
    kept_epoch : int
        After how many epochs the parameters are those that were kept; 0 is the start.
    trained_params : int
    seconds : float
    """

    loss: str = "mse"
    start_loss: float
    start_held_out_loss: float | None
    epochs: tuple[RefinementEpoch, ...]
    kept_epoch: Count
    trained_params: Count
    seconds: float

    @model_validator(mode="after")
    def _kept_epoch_ran(self) -> "RefinementReport":
        if self.kept_epoch >= len(self.course):
            raise ValueError(f"epoch {self.kept_epoch} was kept, but did not run")
        return self

    @property
    def course_text(self) -> Literal["held-out", "calibration"]:
        """Which text `course` is of: held-out text if there is any."""
        return "calibration" if self.start_held_out_loss is None else "held-out"

    @property
    def calibration_course(self) -> tuple[float, ...]:
        """Losses on calibration sequences: at the start, then the mean over each epoch's steps."""
        return (self.start_loss, *(epoch.loss for epoch in self.epochs))

    @property
    def course(self) -> tuple[float, ...]:
        """Losses from the start on, one an epoch; on held-out sequences if there are any."""
        if self.start_held_out_loss is None:
            return self.calibration_course
        held_out = (epoch.held_out_loss for epoch in self.epochs)
        return (self.start_held_out_loss, *(loss for loss in held_out if loss is not None))

    @property
    def kept_loss(self) -> float:
        """Loss of the parameters that were kept, where `course` is of.

        Examples
        --------
        >>> epochs = (RefinementEpoch(loss=x, held_out_loss=y, seconds=1.0)
        ...     for x, y in ((0.3, 0.4), (0.2, 0.5)))
        >>> report = RefinementReport(start_loss=0.8, start_held_out_loss=0.9,
        ...     epochs=tuple(epochs), kept_epoch=1, trained_params=9, seconds=1.0)
        >>> report.course_text, report.course, report.kept_loss
        ('held-out', (0.9, 0.4, 0.5), 0.4)
        >>> report.calibration_course
        (0.8, 0.3, 0.2)
        """
        return self.course[self.kept_epoch]


class BlockReport(_Frozen):
    """One block of a sequential run.

    Parameters
    ----------
    index : int
    name : str
    calibration, held_out : BlockError
        At the end. The held-out one is None if no text was held out.
    unrefined_calibration, unrefined_held_out : BlockError or None
        Before the refinement; None without one.
    refinement : RefinementReport or None
    seconds : dict of str to float
        Of each phase.
    peak_bytes : int
        Largest resident memory of the process so far.
    """

    index: Count
    name: str
    calibration: BlockError
    held_out: BlockError | None
    unrefined_calibration: BlockError | None = None
    unrefined_held_out: BlockError | None = None
    refinement: RefinementReport | None = None
    seconds: dict[str, float]
    peak_bytes: Count


class CompressionReport(_Frozen):
    """The whole run.

    Parameters
    ----------
    model : str
        Where the dense model came from.
    recipe : CompressionRecipe
    recipe_fingerprint, calibration_fingerprint : str
        SHA-256 of the settings, and of the token ids that were used; empty if none were.
    tokens : int
        Calibration tokens.
    size : SizeReport
    linears : tuple of LinearReport
        In call order.
    blocks : tuple of BlockReport
        Of a sequential run; empty otherwise.
    tuning : RefinementReport or None
        Of all blocks together, by the model's predictions.
    allocation : RanksReport or None
        None for uniform ranks.
    kv_cache : KVCacheReport or None
        None for an ordinary cache.
    seconds : dict of str to float
        Of each phase.
    peak_bytes : int
        Largest resident memory of the process up to the end of the run.
    environment : dict of str to str
        Versions, platform, device, threads.
    warnings : tuple of str
    """

    model: str
    recipe: CompressionRecipe
    recipe_fingerprint: str
    calibration_fingerprint: str
    tokens: Count
    size: SizeReport
    linears: tuple[LinearReport, ...]
    blocks: tuple[BlockReport, ...] = ()
    tuning: RefinementReport | None = None
    allocation: RanksReport | None = None
    kv_cache: KVCacheReport | None = None
    seconds: dict[str, float]
    peak_bytes: Count
    environment: dict[str, str]
    warnings: tuple[str, ...]

    @property
    def is_trained(self) -> bool:
        """Whether blocks were, one by one or together; losses of linears are from before that."""
        return self.recipe.refines or self.tuning is not None

    @classmethod
    def from_json(cls, text: str, where: str) -> "CompressionReport":
        """Read what `model_dump_json` wrote.

        Raises
        ------
        CheckpointError
            If it is no report.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise CheckpointError(f"{where} is no report: {key}: {first['msg']}") from error


class QuantizedLinear(_Frozen):
    """One linear in eight bits.

    Parameters
    ----------
    name : str
    rank : int or None
        None for a dense one.
    bytes_before, bytes_after : int
        Of its factors, or of its matrix: afterwards codes, scales, and rows in 16 bits if there are
        any. Bias and pivots are left out.
    rounding_loss : float
        Share of the energy of its outputs that the rounding costs on white inputs, beside those of
        the factors before.
    truncation_loss : float or None
        Share that the rank cost on calibration text, from the folder's report.
    """

    name: str
    rank: Count | None
    bytes_before: Count
    bytes_after: Count
    rounding_loss: float
    truncation_loss: float | None


class QuantizationReport(_Frozen):
    """What `slimrank quantize` did, written as ``quantize.json`` beside the weights.

    Parameters
    ----------
    source : str
        The folder that was quantised.
    bits : int
    packing : {'rows', 'remapped'}
        How factors are stored; dense linears are by rows in either.
    linears : tuple of QuantizedLinear
    weight_bytes_before, weight_bytes : int
        Of the weight files.
    perplexity_before, perplexity : float or None
        On a text, if one was given.
    perplexity_tokens : int
        Predicted tokens of it.
    """

    source: str
    bits: int
    packing: Packing = "rows"
    linears: tuple[QuantizedLinear, ...] = Field(min_length=1)
    weight_bytes_before: Count
    weight_bytes: Count
    perplexity_before: float | None = None
    perplexity: float | None = None
    perplexity_tokens: Count = 0

    def stored_as(self) -> str:
        """What weights are in, in words."""
        return f"{self.bits} bits" + (", remapped" if self.packing == "remapped" else "")

    def line(self) -> str:
        """All of it in one line.

        Examples
        --------
        >>> entry = QuantizedLinear(name="a", rank=2, bytes_before=64, bytes_after=40,
        ...     rounding_loss=0.0002, truncation_loss=0.03)
        >>> QuantizationReport(source="m", bits=8, linears=(entry,), weight_bytes_before=2_000_000,
        ...     weight_bytes=1_100_000).line()
        '1 linears in 8 bits: 2.0 -> 1.1 MB on disk; rounding costs 0.020 % of the energy of their outputs on white inputs, on average, and at most 0.020 %'
        """  # noqa: E501
        losses = [linear.rounding_loss for linear in self.linears]
        text = (
            f"{len(losses)} linears in {self.stored_as()}: {self.weight_bytes_before / 1e6:.1f} -> "
            f"{self.weight_bytes / 1e6:.1f} MB on disk; rounding costs "
            f"{sum(losses) / len(losses):.3%} of the energy of their outputs on white inputs, on "
            f"average, and at most {max(losses):.3%}"
        ).replace("%", " %")
        if self.perplexity is None or self.perplexity_before is None:
            return text
        return (
            f"{text}; perplexity {self.perplexity_before:.4f} -> {self.perplexity:.4f} over "
            f"{self.perplexity_tokens} tokens"
        )


class HealCheck(_Frozen):
    """One look at the held-out sequences.

    Parameters
    ----------
    step : int
        Steps before it; 0 is the start.
    tokens : int
        Trained on before it, those of every epoch counted.
    seconds : float
        From the start of the training, checks included.
    divergence : float
        Of the predictions from the dense model's, in nats a token.
    perplexity : float
    trained_divergence : float or None
        Mean over the steps since the check before, on their own sequences.
    """

    step: Count
    tokens: Count
    seconds: float
    divergence: float
    perplexity: float
    trained_divergence: float | None = None


class HealReport(_Frozen):
    """What `slimrank heal` did, written as ``heal.json`` beside the weights.

    Parameters
    ----------
    source, teacher : str
        The folder that was healed, and the dense model.
    recipe : HealRecipe
    text_fingerprint : str
        Of the token ids of all sequences, held-out ones included.
    tokens, held_out_tokens : int
        Of the sequences to train on, once, and of those held out.
    trained_params : int
    steps : int
        That were planned.
    checks : tuple of HealCheck
        The curve: the start, then one every few steps, of float32 weights.
    kept_step : int
        After how many steps the weights are those that were kept; 0 leaves them as they were.
    divergence, perplexity : float
        On the held-out sequences, of the weights as they are stored.
    teacher_perplexity : float
        Of the dense model there.
    weight_bytes : int
        Of the weight files.
    seconds : dict of str to float
        Of each phase.
    peak_bytes : int
        Largest resident memory of the process.
    environment : dict of str to str
        Versions, platform, device, threads.
    warnings : tuple of str
    """

    source: str
    teacher: str
    recipe: HealRecipe
    text_fingerprint: str
    tokens: Count
    held_out_tokens: Count
    trained_params: Count
    steps: Count
    checks: tuple[HealCheck, ...] = Field(min_length=1)
    kept_step: Count
    divergence: float
    perplexity: float
    teacher_perplexity: float
    weight_bytes: Count
    seconds: dict[str, float]
    peak_bytes: Count
    environment: dict[str, str]
    warnings: tuple[str, ...] = ()

    def line(self) -> str:
        """All of it in one line.

        Examples
        --------
        >>> start = HealCheck(step=0, tokens=0, seconds=1.0, divergence=0.5, perplexity=46.0)
        >>> report = HealReport(source="m", teacher="d", recipe=HealRecipe(), text_fingerprint="",
        ...     tokens=40960, held_out_tokens=8192, trained_params=2_000_000, steps=10,
        ...     checks=(start,), kept_step=10, divergence=0.25, perplexity=40.0,
        ...     teacher_perplexity=25.0, weight_bytes=9, seconds={}, peak_bytes=9, environment={})
        >>> report.line()
        '2.0 million parameters trained for 10 of 10 steps; on 8192 held-out tokens divergence 0.5000 -> 0.2500 nats a token, perplexity 46.00 -> 40.00 (dense: 25.00)'
        """  # noqa: E501
        before = self.checks[0]
        return (
            f"{self.trained_params / 1e6:.1f} million parameters trained for {self.kept_step} of "
            f"{self.steps} steps; on {self.held_out_tokens} held-out tokens divergence "
            f"{before.divergence:.4f} -> {self.divergence:.4f} nats a token, perplexity "
            f"{before.perplexity:.2f} -> {self.perplexity:.2f} (dense: "
            f"{self.teacher_perplexity:.2f})"
        )


class ExportReport(_Frozen):
    """What `slimrank export` did.

    Parameters
    ----------
    form : {'dense', 'onnx', 'openvino'}
    source : str
        The folder that was exported.
    linears : int
        How many were multiplied out, or are factors in the graph.
    weight_bytes_before, weight_bytes : int
        Of the weight files.
    logits_apart : float
        Largest difference of a logit from that of the factors, as a share of the largest logit, on
        a few tokens.
    """

    form: Literal["dense"] | GraphFormName = "dense"
    source: str
    linears: Count
    weight_bytes_before: Count
    weight_bytes: Count
    logits_apart: float

    def line(self) -> str:
        """All of it in one line.

        Examples
        --------
        >>> ExportReport(source="m", linears=7, weight_bytes_before=1_100_000,
        ...     weight_bytes=2_000_000, logits_apart=1e-6).line()
        '7 linears multiplied out: 1.1 -> 2.0 MB on disk; logits are within 1.0e-06 of the largest'
        """
        done = "multiplied out" if self.form == "dense" else "in the graph as they are stored"
        return (
            f"{self.linears} linears {done}: {self.weight_bytes_before / 1e6:.1f} -> "
            f"{self.weight_bytes / 1e6:.1f} MB on disk; logits are within {self.logits_apart:.1e} "
            "of the largest"
        )


class RemoteCodeReport(_Frozen):
    """What `slimrank export --to remote-code` did.

    Parameters
    ----------
    source : str
        The folder that was copied.
    file : str
        Name of the modelling file.
    linears : int
        How many it loads.
    weight_bytes : int
        Of the weight files.
    """

    source: str
    file: str
    linears: Count
    weight_bytes: Count

    def line(self) -> str:
        """All of it in one line.

        Examples
        --------
        >>> RemoteCodeReport(source="m", file="modeling_low_rank.py", linears=7,
        ...     weight_bytes=2_000_000).line()
        'modeling_low_rank.py loads 7 linears with trust_remote_code=True; 2.0 MB as before'
        """
        return (
            f"{self.file} loads {self.linears} linears with trust_remote_code=True; "
            f"{self.weight_bytes / 1e6:.1f} MB as before"
        )
