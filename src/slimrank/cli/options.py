"""Options that several commands share, and how they become a recipe."""

from pathlib import Path
from typing import Annotated, Any

import typer

from slimrank.methods import METHODS
from slimrank.recipe import CompressionRecipe, parse_yaml, read_recipe_text

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model folder, a hub id, or a .gguf file.")
]
Keep = Annotated[
    float | None,
    typer.Option(help="Share of parameters that stay, in (0, 1]. Needed unless a recipe says it."),
]
Effort = Annotated[
    str | None,
    typer.Option(
        help="Settles method and allocation if neither is given: 'fast' (one pass over the text), "
        "'balanced' (and one backwards), 'best' (and trains each block). [default: balanced]"
    ),
]
MethodName = Annotated[
    str | None,
    typer.Option(help=f"One of {', '.join(METHODS)}. [default: as the effort says]"),
]
Scope = Annotated[
    str | None,
    typer.Option(
        help="What --keep is a share of: the targeted linears ('targets') or everything in the "
        "model ('model'). [default: targets]"
    ),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        help="How the budget is shared out: the same share of each linear ('uniform'), ranks by "
        "loss and importance ('swift', Swift-SVD's algorithm 2), those that lose least in sum, any "
        "linear left dense where that is best ('global'), or components dropped anywhere so that "
        "predicted rises and falls of the loss cancel ('threshold', Zero Sum SVD). [default: as "
        "the effort says, uniform beside --method]"
    ),
]
Unit = Annotated[
    str | None,
    typer.Option(
        help="For allocation global: count losses in the model's loss by kfac-svd's metric "
        "('kfac'), by the mean gradient at a linear's outputs ('gradient'), or as shares of their "
        "energy ('relative'). [default: kfac]"
    ),
]
Layout = Annotated[
    str | None,
    typer.Option(
        help="Store factors whole ('plain'), without what a matrix of low rank repeats "
        "('pivoted'), or as is smaller ('auto'). [default: auto]"
    ),
]
ImportanceWeight = Annotated[
    float | None,
    typer.Option(
        help="For allocation swift: the paper's alpha, 0 by loss only, 1 by importance only. "
        "[default: the best of 0, 0.1, ... 1 on held-out calibration text]"
    ),
]
RetainedShare = Annotated[
    float | None,
    typer.Option(
        help="For allocation swift: the paper's delta, the share of its uniform rank that each "
        "linear is sure of. [default: 0.5]"
    ),
]
ImportanceAfterNorm = Annotated[
    bool | None,
    typer.Option(
        "--importance-after-norm",
        help="For allocation swift: measure the last block after the final norm, as the authors' "
        "code does.",
    ),
]
Order = Annotated[
    str | None,
    typer.Option(
        help="All blocks from the original activations ('one-shot'), or one after the other from "
        "what arrives once those before are compressed ('sequential'). [default: as the method and "
        "the refinement need]"
    ),
]
Anchor = Annotated[
    float | None,
    typer.Option(
        help="For aa-svd: the share of the original inputs in the target, from 0, which is "
        "shift-aware, to 1. [default: 1]"
    ),
]
Ridge = Annotated[
    float | None,
    typer.Option(
        help="Share of the mean diagonal that is added to the moments, which draws the factors to "
        "the weight. [default: 0.1 for aa-svd, 0 for the others]"
    ),
]
WithinBlock = Annotated[
    str | None,
    typer.Option(
        help="Keep the ranks of the allocation ('fixed'), or share the parameters of each block "
        "out anew by what its spectra spare ('greedy'). [default: fixed]"
    ),
]
Passes = Annotated[
    int | None,
    typer.Option(
        help="2: compress a copy first, and weigh errors by what is seen in both models; better at "
        "small sizes, for twice the time. [default: as the effort says, 1 beside --method]"
    ),
]
Generate = Annotated[
    int | None,
    typer.Option(
        metavar="SEQUENCES",
        min=0,
        help="Let the model write as many sequences more, and calibrate on them too; better where "
        "text is short or of one kind. [default: as the effort says, 0 beside --method]",
    ),
]
Refine = Annotated[
    str | None,
    typer.Option(
        help="Train each block towards the original one's output: 'off', 'paper' (AA-SVD's "
        "settings) or 'fast' (for a CPU, with a stop on held-out text). A recipe has every "
        "setting. [default: off]"
    ),
]
Tune = Annotated[
    int | None,
    typer.Option(
        help="At the end, train all blocks together towards the original model's predictions, for "
        "so many epochs at most. A recipe has every setting. [default: not]"
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the run that was cut off on its way to OUT, if there is one; otherwise "
        "begin.",
    ),
]
ResumeProfile = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the profile that was cut off on its way to PROFILE, if there is one; "
        "otherwise begin.",
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(
        help="Gigabytes of activations, and of statistics kept to the end, to hold in memory; the "
        "rest goes to disk, beside OUT. [default: no limit]",
        min=0,
    ),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Leave the weights in their files and work on one block at a time, for models that "
        "memory does not hold. With --device they come there in turns.",
    ),
]
KVKeep = Annotated[
    float | None,
    typer.Option(
        "--kv-keep",
        help="Keep latents of keys and values in the cache: the share of its numbers that stay, "
        "in (0, 1]. With --keep 1 all else stays dense.",
    ),
]
RemoteCode = Annotated[
    bool,
    typer.Option(
        "--remote-code",
        help="Put a small modelling file into OUT, so that it loads with trust_remote_code where "
        "slimrank is not installed.",
    ),
]
ProfileFolder = Annotated[
    Path | None,
    typer.Option(
        "--profile", help="A profile of MODEL, by slimrank profile: nothing is calibrated then."
    ),
]
MultipleOf = Annotated[int | None, typer.Option(help="Ranks are multiples of this. [default: 1]")]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        help="Text file, folder or hub data set; may be given more than once. "
        "[default: the packaged sample of mixed text]"
    ),
]
NumSequences = Annotated[int | None, typer.Option(help="Calibration sequences. [default: 128]")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens in each. [default: 2048]")]
HeldOutSequences = Annotated[
    int | None,
    typer.Option(
        help="Further sequences of the calibration text, to choose by and not to calibrate on. "
        "[default: 8]"
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the draw of sequences. [default: 0]")]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        help="Linears to compress: a name, its last parts, a shell pattern, or re: and a regular "
        "expression; may be given more than once. [default: all of the decoder blocks]"
    ),
]
Ignore = Annotated[list[str] | None, typer.Option(help="Linears to leave dense, named alike.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Load and store in auto, float32, bfloat16 or float16. [default: auto]"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. [default: cpu]")]
BatchSize = Annotated[
    int | None, typer.Option(help="Sequences at once. [default: about 4,096 tokens]", min=1)
]
Recipe = Annotated[
    Path | None, typer.Option(help="YAML recipe; flags given beside it take precedence.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def build_recipe(recipe: Path | None, **flags: Any) -> CompressionRecipe:
    """Make a recipe from a YAML file, if any, and the flags that were given.

    Parameters
    ----------
    recipe : Path, optional
    **flags
        By the dotted key they set, with ``__`` for the dot; None is not given.

    Raises
    ------
    RecipeError, BudgetError
        If the result is no valid recipe.
    """
    where = str(recipe) if recipe else "recipe"
    values = parse_yaml(read_recipe_text(recipe), where) if recipe else {}
    for key, value in flags.items():
        if value is None or value == []:
            continue
        *parents, last = key.split("__")
        place = values
        for parent in parents:
            below = place.setdefault(parent, {})
            place = below if isinstance(below, dict) else {}
        place[last] = value
    values.setdefault("budget", {})
    return CompressionRecipe.from_dict(values, where)
