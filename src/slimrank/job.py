"""What is to be done, beside the model."""

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from slimrank.calibration import ActivationStore, TokenWindows, hold_out
from slimrank.checkpoint import Profile, RunState
from slimrank.drawing import draw
from slimrank.environment import Clock
from slimrank.keeping import keeps_blocks, kept_run, looks_at_text
from slimrank.options import CompressionOptions
from slimrank.recipe import CompressionRecipe


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done, beside the model; `stack` closes what stays open to the end.

    Parameters
    ----------
    recipe : CompressionRecipe
    out : str, Path or None
        Folder that will be written.
    tokenizer : PreTrainedTokenizerBase or None
    windows : TokenWindows or None
        The recipe's text is drawn from if None.
    options : CompressionOptions
    resume : bool
    stack : ExitStack
    clock : Clock
    always_holds_out : bool
        Also in a run that has nothing to choose by, and would calibrate on all windows it is given.
    generated : tuple of Tensor
        Windows that the model wrote itself, to calibrate on too.
    state : RunState or None
        Keeps what is finished; None if nothing is kept.
    passing : Path or None
        Where passing files go; next to the output if None.
    """

    recipe: CompressionRecipe
    out: str | Path | None
    tokenizer: Any
    windows: TokenWindows | None
    options: CompressionOptions
    resume: bool
    stack: ExitStack
    clock: Clock = field(default_factory=Clock)
    always_holds_out: bool = False
    generated: tuple[Tensor, ...] = ()
    state: RunState | None = None
    passing: Path | None = None

    @property
    def beside(self) -> Path | None:
        """Where passing files go: to what is kept of the run, or next to the output."""
        if self.passing is not None or self.out is None:
            return self.passing
        return next(p for p in Path(self.out).absolute().parents if p.exists())

    def drawn(self) -> "Job":
        """The same with its windows, the held-out ones last: text is read and tokenized once."""
        calibration = self.recipe.calibration
        windows = self.windows or draw(calibration, self.tokenizer, with_held_out=True)
        return replace(self, windows=windows)

    def kept(self, model: Any, fingerprint: str, opened: Profile | None) -> "Job":
        """The same with its windows, and with what keeps it: begun, or found where it was cut off.

        Parameters
        ----------
        model : PreTrainedModel
            Dense.
        fingerprint : str
            Of it.
        opened : Profile or None
            A profile that the user gave.

        Raises
        ------
        CheckpointError
            As `slimrank.keeping.kept_run`.
        """
        recipe, job, from_profile = self.recipe, self, opened is not None
        is_kept = keeps_blocks(recipe, from_profile=from_profile, stream=self.options.stream)
        if self.out is None or not is_kept:
            return self
        takes_text = looks_at_text(recipe, from_profile=from_profile)
        holds_out = recipe.is_sequential or recipe.allocation != "uniform" or from_profile
        if takes_text and (holds_out or self.always_holds_out):
            job = self.drawn()
        elif takes_text:
            own = self.windows or draw(recipe.calibration, self.tokenizer, with_held_out=False)
            job = replace(self, windows=own)
        windows = job.windows if takes_text else None
        made_from = None if takes_text else opened
        run = kept_run(Path(self.out), model, recipe, fingerprint, windows, self.resume, made_from)
        state = self.stack.enter_context(run)
        return replace(job, state=state, passing=state.folder)

    def store(self) -> ActivationStore:
        """What is kept to the end, on disk past what the options allow."""
        return self.stack.enter_context(ActivationStore(self.options.memory, self.beside))

    def held_apart(self) -> tuple[TokenWindows, TokenWindows | None]:
        """Windows to calibrate on, and those that are held out."""
        windows = self.drawn().windows
        assert windows is not None
        own, held_out = hold_out(windows, self.recipe.calibration.held_out_sequences)
        return TokenWindows((*own.windows, *self.generated)), held_out

    def all_windows(self) -> TokenWindows:
        """Both of these as one: windows to calibrate on, and behind them those that are held out.

        Examples
        --------
        >>> import torch
        >>> recipe = CompressionRecipe.from_dict(
        ...     {"budget": {"param_ratio": 0.5}, "calibration": {"held_out_sequences": 1}})
        >>> text = TokenWindows((torch.tensor([1]), torch.tensor([2])))
        >>> job = Job(recipe, None, None, text, CompressionOptions(), False, ExitStack(),
        ...     generated=(torch.tensor([3]),))
        >>> [window.item() for window in job.all_windows().windows]
        [1, 3, 2]
        """
        calibration, held_out = self.held_apart()
        return TokenWindows((*calibration.windows, *(held_out.windows if held_out else ())))
