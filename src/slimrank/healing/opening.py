"""What a healing needs: both models and the text, held against one another before any work."""

from dataclasses import dataclass
from pathlib import Path

from slimrank.calibration import TokenWindows
from slimrank.checkpoint import FolderContents, load, read_folder
from slimrank.errors import CheckpointError, ModelError, RecipeError
from slimrank.healing.adapters import require_adapters
from slimrank.healing.predictor import Predictor
from slimrank.healing.teacher import open_teacher
from slimrank.healing.text import draw_text, held_apart
from slimrank.model import weights_fingerprint
from slimrank.recipe import HealRecipe
from slimrank.source import load_tokenizer, parse_source, require_device, require_finite_weights
from slimrank.targets import num_embeddings


@dataclass(frozen=True, slots=True)
class Case:
    """What is opened.

    Parameters
    ----------
    contents : FolderContents
        Of the compressed folder.
    student, teacher : Predictor
        The compressed and the dense model.
    teacher_name : str
    windows : TokenWindows
        All of them: `text` to train on, and behind it `held_out`.
    text, held_out : TokenWindows
    """

    contents: FolderContents
    student: Predictor
    teacher: Predictor
    teacher_name: str
    windows: TokenWindows
    text: TokenWindows
    held_out: TokenWindows

    def marks(self, recipe: HealRecipe) -> dict[str, str]:
        """What a run that goes on must have in common with the one that was cut off."""
        return {
            "settings": recipe.fingerprint(),
            "folder": weights_fingerprint(self.student.model),
            "dense model": weights_fingerprint(self.teacher.model),
            "text": self.windows.fingerprint(),
        }


def open_case(
    folder: Path,
    recipe: HealRecipe,
    teacher: str | Path | None,
    windows: TokenWindows | None,
    device: str | None,
) -> Case:
    """Load both models and the text, and see that they fit each other.

    Parameters
    ----------
    folder : Path
    recipe : HealRecipe
    teacher : str, Path or None
    windows : TokenWindows or None
        The recipe's text is drawn from if None.
    device : str or None

    Raises
    ------
    SlimrankError
        As `slimrank.heal`, before any work.
    """
    contents = read_folder(folder)
    _require_trainable(contents)
    if recipe.lora_rank is not None:
        require_adapters()
    require_device(device)
    windows = windows or draw_text(recipe, load_tokenizer(parse_source(folder)))
    text, held_out = held_apart(windows, recipe)
    model = load(folder, dtype="auto")
    require_finite_weights(model, str(folder))
    model = model.to(device) if device else model
    dense, name = open_teacher(None if teacher is None else str(teacher), contents, model, device)
    for each in (model, dense):
        windows.check_vocabulary(num_embeddings(each))
    blocks = contents.report.recipe.blocks if contents.report else None
    student, beside = (Predictor.of(each, text.windows[0], blocks) for each in (model, dense))
    sizes = student.vocabulary(), beside.vocabulary()
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"{name} tells {sizes[1]} tokens apart, and {folder} {sizes[0]}: it cannot be its "
            "dense model"
        )
    return Case(contents, student, beside, name, windows, text, held_out)


def _require_trainable(contents: FolderContents) -> None:
    """Refuse factors that are codes, and a folder without any."""
    if contents.int8:
        raise CheckpointError(
            f"{contents.folder} is in eight bits, which cannot be trained; heal the folder it came "
            "from, and quantise afterwards"
        )
    if not contents.ranks:
        raise RecipeError(f"{contents.folder} has no factors to heal, only dense linears")
