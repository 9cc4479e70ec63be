"""The dense model beside which a compressed one is trained."""

from typing import Any

import torch

from slimrank.checkpoint import FolderContents
from slimrank.errors import ModelError, RecipeError, SlimrankError
from slimrank.source import open_model, parse_source, require_dense


def open_teacher(
    name: str | None, contents: FolderContents, student: Any, device: str | None
) -> tuple[Any, str]:
    """Load the dense model that was named, or else the one that a folder says it came from.

    Parameters
    ----------
    name : str or None
    contents : FolderContents
        Of the folder.
    student : PreTrainedModel
        The compressed model; the teacher is loaded in its dtype.
    device : str or None

    Returns
    -------
    teacher : PreTrainedModel
    name : str

    Raises
    ------
    RecipeError
        If nobody says which model it is.
    ModelError
        If it cannot be loaded or is not dense; or is not named, and another one is found by the
        name that the folder has.
    NumericalError
        If a weight is not finite.
    """
    dtype = str(next(student.parameters()).dtype).removeprefix("torch.")
    if name is not None:
        return _open(name, dtype, device), name
    if contents.report is None:
        raise RecipeError(
            f"{contents.folder} does not say which model it came from: name it by --teacher"
        )
    name, hint = contents.report.model, "name the dense model by --teacher"
    try:
        teacher = _open(name, dtype, device)
    except SlimrankError as error:
        raise type(error)(f"{error}; {hint}") from error
    embeddings = [model.get_input_embeddings().weight for model in (student, teacher)]
    if not torch.equal(*embeddings):
        raise ModelError(
            f"{contents.folder} says it came from {name}, but that has other embeddings; {hint}"
        )
    return teacher, name


def _open(name: str, dtype: str, device: str | None) -> Any:
    model = open_model(parse_source(name), dtype, device=device)
    require_dense(model, name)
    return model
