"""What to do: frozen, checked, read from YAML and written back."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from slimrank.allocation import Budget, Layout
from slimrank.errors import RecipeError, SlimrankError
from slimrank.methods import AASVD, ASVD, KFACSVD, STREAMS, Method, method_by_name

METHOD_SETTINGS = MappingProxyType(
    {"anchor": AASVD.name, "damping": KFACSVD.name, "alpha": ASVD.name}
)
YAML_CHARACTERS = 2**24
YAML_VALUES = 100_000  # ten thousands of layers by their names are a recipe
YAML_ERRORS = (  # the constructors of PyYAML also let these out, as of `!!bool x` or `0x_`
    *(yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, OverflowError),
)
DTYPES = ("auto", "float32", "bfloat16", "float16")
HEAL_RATE, LORA_RATE = 5e-5, 5e-4

Kind = TypeVar("Kind", bound=BaseModel)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class BudgetRecipe(_Frozen):
    """How much to keep (see `slimrank.allocation.Budget`)."""

    param_ratio: float = Field(description="Parameters kept over parameters before, in (0, 1].")
    scope: Literal["targets", "model"] = "targets"
    multiple_of: int = 1
    min_rank: int = 1

    @model_validator(mode="after")
    def _in_range(self) -> "BudgetRecipe":
        self.budget()
        return self

    def budget(self) -> Budget:
        """Make the budget that the allocation takes."""
        return Budget(self.param_ratio, self.scope, self.multiple_of, self.min_rank)


class CalibrationRecipe(_Frozen):
    """Which text the moments come from."""

    source: tuple[str, ...] = Field(
        default=(),
        description="Text files, folders or a hub data set; none is the packaged sample.",
    )
    subset: str | None = Field(default=None, description="Configuration of a hub data set.")
    split: str = Field(default="train", description="Split of a hub data set.")
    text_column: str = Field(default="text", description="Column of text in JSON lines or a set.")
    num_sequences: int = Field(default=128, ge=1)
    sequence_length: int = Field(default=2048, ge=2)
    held_out_sequences: int = Field(
        default=8, ge=0, description="Further sequences, to choose by and not to calibrate on."
    )
    seed: int = Field(default=0, ge=0, lt=2**63)


class SwiftRecipe(_Frozen):
    """Settings of `slimrank.allocation.swift`."""

    importance_weight: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="α; left out, the best of 0, 0.1, … 1 on held-out text.",
    )
    retained_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="δ, the share of its uniform rank that each linear has.",
    )
    importance_after_norm: bool = Field(
        default=False, description="Measure the last block after the final norm, as the authors do."
    )


class GlobalRecipe(_Frozen):
    """Settings of `slimrank.allocation.allocate_global`."""

    unit: Literal["kfac", "gradient", "relative"] = Field(
        default="kfac",
        description="What a loss counts: in the metric of kfac-svd; times the mean gradient at the "
        "outputs; as a share of the outputs' energy.",
    )
    may_stay_dense: bool = Field(
        default=True, description="Leave a linear whole where its parameters are worth it."
    )


class GradientRecipe(_Frozen):
    """Which loss the gradients are of (see `slimrank.calibration.collect_gradients`)."""

    labels: Literal["data", "model"] = Field(
        default="data", description="The text's next tokens, or ones that the model draws."
    )


class KVCacheRecipe(_Frozen):
    """Keep latents of keys and values instead of keys and values."""

    keep: float = Field(gt=0, le=1, description="Share of the numbers in a dense cache that stay.")


EFFORTS: Mapping[Any, Mapping[str, Any]] = MappingProxyType(
    {
        "fast": {"method": "swift-svd", "allocation": "uniform"},
        "balanced": {"method": "kfac-svd", "allocation": "global"},
        "best": {
            "method": "kfac-svd",
            "allocation": "global",
            "passes": 2,
            "generated_sequences": 128,
            "refine": "fast",
            "tune": {"epochs": 8},
        },
    }
)
REFINE_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "off": {},
        "paper": {"shuffle": False, "scale_loss": False, "patience": None},
        "fast": {"epochs": 8, "learning_rate": 3e-4, "batch_sequences": 8},
    }
)


class RefineRecipe(_Frozen):
    """Settings of `slimrank.refine.refine_block`; a preset settles what is not given.

    ``paper`` is AA-SVD's: 25 epochs over the calibration sequences in a fixed order. ``fast`` is
    for machines without a GPU: fewer epochs of more steps, and a stop on held-out text.
    """

    preset: Literal["off", "paper", "fast"] = Field(
        default="off", description="Settles every setting that is not given."
    )
    epochs: int = Field(default=25, ge=1, description="Passes over the calibration sequences.")
    learning_rate: float = Field(default=1e-4, gt=0, description="Of AdamW, at its peak.")
    warmup: float = Field(
        default=0.1, ge=0, lt=1, description="Share of the steps over which the rate grows from 0."
    )
    final_learning_rate: float = Field(
        default=0.1, ge=0, le=1, description="Share of the peak at which the cosine ends."
    )
    weight_decay: float = Field(default=0.01, ge=0)
    clip_norm: float | None = Field(
        default=1.0, gt=0, description="Largest norm of the block's gradient; null does not clip."
    )
    batch_sequences: int = Field(default=32, ge=1, description="Sequences of one step.")
    shuffle: bool = Field(default=True, description="Draw the order of sequences anew each epoch.")
    loss: Literal["mse", "gradient", "kl"] = Field(
        default="mse",
        description="Squared error of the block's output; the same, weighted by what the model's "
        "loss feels of it; or the divergence of the model's predictions.",
    )
    damping: float = Field(
        default=0.03,
        ge=0,
        le=1,
        description="For loss 'gradient': share of the metric's mean diagonal that is added to it.",
    )
    scale_loss: bool = Field(
        default=True,
        description="Divide squared errors by the variance of the target; 'kl' is not scaled.",
    )
    patience: int | None = Field(
        default=2,
        ge=1,
        description="Epochs without a better loss on held-out sequences before it stops and goes "
        "back to the best; null trains to the end and keeps the last.",
    )
    trains: tuple[Literal["factors", "norms", "biases"], ...] = Field(
        default=("factors", "norms", "biases"), min_length=1, description="What is trained."
    )
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Take a preset's name for all of its settings, and its values for those not given."""
        values = {"preset": values} if isinstance(values, str) else values
        name = values.get("preset", "off") if isinstance(values, dict) else None
        if not isinstance(name, str) or name not in REFINE_PRESETS:
            return values
        preset = REFINE_PRESETS[name]
        if name == "off" and not values.keys() <= {"preset"}:
            settings = cls.model_construct().model_dump()
            if any(settings.get(key) != _listless(value) for key, value in values.items()):
                raise RecipeError(
                    "settings of a refinement are given, but it is off; say --refine paper or fast"
                )
        return {**preset, **values}

    @model_validator(mode="after")
    def _damping_is_used(self) -> "RefineRecipe":
        if self.loss != "gradient" and self.damping != type(self).model_fields["damping"].default:
            raise RecipeError(
                f"a damping is given, but loss '{self.loss}' has none; 'gradient' has"
            )
        return self


class TuneRecipe(_Frozen):
    """Training of all blocks together, towards the original model's predictions.

    The rate is a tenth of what one block bears: all blocks move at once. Epochs end early where
    held-out sequences say so.
    """

    epochs: int = Field(default=16, ge=1, description="Passes over the calibration sequences.")
    learning_rate: float = Field(default=5e-5, gt=0, description="Of AdamW, at its peak.")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="As for `RefineRecipe`.")
    final_learning_rate: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    batch_sequences: int = Field(default=4, ge=1, description="Sequences of one step.")
    shuffle: bool = True
    patience: int | None = Field(default=3, ge=1)
    trains: tuple[Literal["factors", "norms", "biases"], ...] = Field(
        default=("factors", "norms", "biases"), min_length=1
    )
    seed: int = Field(default=0, ge=0, lt=2**63)

    def refinement(self) -> RefineRecipe:
        """The same as settings of a training by predictions."""
        return RefineRecipe(preset="fast", loss="kl", **self.model_dump())


class HealRecipe(_Frozen):
    """Training of a compressed folder, end to end, towards the dense model's predictions.

    Not a part of `CompressionRecipe`: any folder can be healed, at any time. Beside the text and
    the number of epochs, the learning rate is what to choose.
    """

    source: tuple[str, ...] = Field(
        default=(), description="Text files, folders or a hub data set."
    )
    num_sequences: int | None = Field(
        default=None, ge=1, description="Sequences to train on; left out, all that the text has."
    )
    sequence_length: int = Field(default=512, ge=2, description="Tokens in each.")
    held_out_sequences: int = Field(
        default=16, ge=1, description="Further sequences, to stop by and not to train on."
    )
    epochs: int = Field(default=1, ge=1, description="Passes over the sequences.")
    batch_sequences: int = Field(default=8, ge=1, description="Sequences of one step.")
    learning_rate: float = Field(
        default=HEAL_RATE,
        gt=0,
        description=f"Of AdamW, at its peak; left out, {HEAL_RATE:g}, with adapters {LORA_RATE:g}.",
    )
    warmup: float = Field(default=0.1, ge=0, lt=1, description="As for `RefineRecipe`.")
    final_learning_rate: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    checks: int = Field(
        default=16, ge=1, description="How often the held-out sequences are looked at, in all."
    )
    patience: int = Field(
        default=4, ge=1, description="Checks without a better loss after which it stops."
    )
    lora_rank: int | None = Field(
        default=None,
        ge=1,
        description="Train adapters of this rank on the factors, and merge them.",
    )
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Adapters begin at zero, and bear larger steps than factors."""
        if isinstance(values, dict) and values.get("lora_rank") is not None:
            return {"learning_rate": LORA_RATE, **values}
        return values

    @classmethod
    def from_dict(cls, values: Any, where: str = "recipe") -> "HealRecipe":
        """Check a mapping.

        Raises
        ------
        RecipeError
            With the first thing that is wrong, in one line.
        """
        return validated(cls, values, where)

    def fingerprint(self) -> str:
        """SHA-256 of all settings."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def _listless(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class CompressionRecipe(_Frozen):
    """All that decides the result; how to run it is in `CompressionOptions`.

    Parameters
    ----------
    budget : BudgetRecipe
        How much to keep.
    effort : {'fast', 'balanced', 'best'}
        Settles method and allocation where neither is given: 'fast' takes one pass over the text
        (swift-svd, uniform ranks), 'balanced' a pass backwards too (kfac-svd, global ranks), and
        'best' passes twice, lets the model write half of the tokens itself, and trains the blocks
        one by one and together, unless told otherwise.
        Where it is not looked at, the method is swift-svd and ranks are uniform.
    method : str
        A name from `slimrank.methods.METHODS`.
    layout : {'auto', 'plain', 'pivoted'}
        How factors are stored: two whole factors, or only what a matrix of low rank does not
        repeat (see `slimrank.linalg.pivot_rows`); 'auto' is pivoted wherever that is smaller.
    allocation : {'uniform', 'swift', 'global', 'threshold'}
        How the budget is shared out.
    swift : SwiftRecipe
        Settings of allocation 'swift'.
    global_ranks : GlobalRecipe
        Settings of allocation 'global'.
    gradients : GradientRecipe
        Of methods and units that look at gradients of the loss.
    passes : {1, 2}
        With 2, compress a copy first, take moments and gradients there too, and make the model from
        the mean of both (see `slimrank.second_look`).
    generated_sequences : int
        Further sequences to calibrate on, which the model writes itself (see
        `slimrank.calibration.generate_windows`).
    within_block : {'fixed', 'greedy'}
        Keep the ranks of the allocation, or share each block's parameters out anew once what
        arrives at it is known (see `slimrank.allocation.greedy`).
    order : {'one-shot', 'sequential'}, optional
        All blocks from the original activations, or one after the other from what the compressed
        blocks before it give. As the method and the refinement need if left out.
    ridge : float, optional
        Share of the mean diagonal that is added to the moments. The method's own if left out.
    anchor : float
        For 'aa-svd': the share of the original inputs in the target, 0 to 1.
    damping : float
        For 'kfac-svd' and 'kfac-aa-svd': the share of the metric's mean diagonal that is added.
    alpha : float
        For 'asvd': the exponent of the magnitudes.
    refine : RefineRecipe
        Training of each block after its factors are found.
    tune : TuneRecipe, optional
        Training of all blocks together, after all else.
    kv_cache : KVCacheRecipe, optional
        Compress the key/value cache.
    calibration : CalibrationRecipe
        Text, windows and seed.
    targets : tuple of str, optional
        Linears to compress; all of the decoder blocks if left out.
    ignore : tuple of str
        Linears to leave dense.
    blocks : str, optional
        Dotted name of the block list, where it cannot be told.
    dtype : str
        To load and store the model in: auto, float32, bfloat16 or float16.

    Examples
    --------
    >>> recipe = CompressionRecipe(budget={"param_ratio": 0.8})
    >>> recipe.method, recipe.allocation, recipe.budget.param_ratio
    ('kfac-svd', 'global', 0.8)
    >>> CompressionRecipe.from_yaml(recipe.to_yaml()) == recipe
    True
    """

    version: Literal[1] = 1
    effort: Literal["fast", "balanced", "best"] = "balanced"
    method: str = "swift-svd"
    budget: BudgetRecipe
    layout: Layout = "auto"
    allocation: Literal["uniform", "swift", "global", "threshold"] = "uniform"
    swift: SwiftRecipe = SwiftRecipe()
    global_ranks: GlobalRecipe = GlobalRecipe()
    gradients: GradientRecipe = GradientRecipe()
    passes: Literal[1, 2] = 1
    generated_sequences: int = Field(default=0, ge=0)
    within_block: Literal["fixed", "greedy"] = "fixed"
    order: Literal["one-shot", "sequential"] | None = None
    ridge: float | None = Field(default=None, ge=0, le=1)
    anchor: float = Field(default=1.0, ge=0, le=1)
    damping: float = Field(default=1e-2, ge=0, le=1)
    alpha: float = Field(default=0.5, ge=0, le=2)
    refine: RefineRecipe = RefineRecipe()
    tune: TuneRecipe | None = None
    kv_cache: KVCacheRecipe | None = None
    calibration: CalibrationRecipe = CalibrationRecipe()
    targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    blocks: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, values: Any) -> Any:
        """Let the effort settle method and allocation, if neither is given."""
        if not isinstance(values, dict) or values.keys() & {"method", "allocation"}:
            return values
        effort = values.get("effort", "balanced")
        return {**(EFFORTS.get(effort, {}) if isinstance(effort, str) else {}), **values}

    @field_validator("method")
    @classmethod
    def _known(cls, name: str) -> str:
        method_by_name(name)
        return name

    @model_validator(mode="after")
    def _settings_are_used(self) -> "CompressionRecipe":
        for allocation, key in (("swift", "swift"), ("global", "global_ranks")):
            given = getattr(self, key) != type(getattr(self, key))()
            if given and self.allocation != allocation:
                raise RecipeError(
                    f"settings of allocation '{allocation}' are given, but allocation is "
                    f"'{self.allocation}'; say --allocation {allocation} too"
                )
        if self.allocation == "threshold" and self.gradients.labels == "model":
            raise RecipeError(
                "allocation 'threshold' looks at the mean gradient, which is zero but for chance "
                "where the model draws the labels; leave gradients.labels at 'data'"
            )
        for key, name in METHOD_SETTINGS.items():
            given = getattr(self, key) != type(self).model_fields[key].default
            if given and name not in (self.method, self.for_profile().method):
                article = "an" if key[0] in "aeiou" else "a"
                raise RecipeError(
                    f"{article} {key} is given, but {self.method} has none; '{name}' has"
                )
        if self.passes == 2:
            self._second_pass_is_used()
        if self.generated_sequences and not self._looks_at_text:
            raise RecipeError(
                f"sequences are to be generated, but {self.method} with uniform ranks looks at none"
            )
        if self.order == "one-shot" and (self.refines or self.within_block == "greedy"):
            what = "refinement" if self.refines else "--within-block greedy"
            raise RecipeError(f"{what} takes the blocks one after the other: --order sequential")
        return self

    def _second_pass_is_used(self) -> None:
        if self.allocation == "threshold":
            raise RecipeError(
                "allocation 'threshold' predicts changes of the loss at the original weights "
                "alone; leave passes at 1"
            )
        shifts = "shifted" in self.make_method().needs
        is_weighed = bool(self.needs) if not shifts else "gradients" in self.needs
        if self.allocation == "uniform" and not is_weighed:
            raise RecipeError(
                f"two passes are asked for, but {self.method} with uniform ranks takes nothing of "
                "the second"
            )

    @property
    def _looks_at_text(self) -> bool:
        return bool(self.needs) or self.refines or self.tune is not None

    @property
    def is_of_text_alone(self) -> bool:
        """Whether statistics are of the text alone, in one pass: all that a profile knows."""
        return self.passes == 1 and not self.generated_sequences

    @property
    def refines(self) -> bool:
        """Whether blocks are trained."""
        return self.refine.preset != "off"

    @property
    def is_sequential(self) -> bool:
        """Whether blocks are taken one after the other."""
        if self.order is not None:
            return self.order == "sequential"
        shifts = "shifted" in self.make_method().needs
        return shifts or self.refines or self.within_block == "greedy"

    @property
    def needs(self) -> frozenset[str]:
        """What method, allocation and refinement look at (see `slimrank.methods.Method`)."""
        of_ranks = set()
        if self.allocation == "global" and self.global_ranks.unit != "relative":
            of_ranks = {"gradients"}
        elif self.allocation == "threshold":
            of_ranks = {"mean_gradients"}
        return self.needs_beside_ranks | of_ranks

    @property
    def needs_beside_ranks(self) -> frozenset[str]:
        """The same where the ranks are known already."""
        of_training = self.refines and self.refine.loss == "gradient"
        return self.make_method().needs | ({"gradients"} if of_training else set())

    def method_settings(self) -> dict[str, float | str]:
        """Settings of the method, and of the gradients that it looks at."""
        method = method_by_name(self.method)
        settings: dict[str, float | str] = {
            key: getattr(self, key) for key in METHOD_SETTINGS if hasattr(method, key)
        }
        return {
            **settings,
            **({"labels": self.gradients.labels} if "gradients" in self.needs else {}),
        }

    def make_method(self) -> Method:
        """Make the method, with its settings."""
        method = method_by_name(self.method)
        settings = {key: getattr(self, key) for key in METHOD_SETTINGS if hasattr(method, key)}
        return type(method)(**settings)

    def for_profile(self) -> "CompressionRecipe":
        """The recipe of a profile that ranks can be taken from: by a method of one pass.

        This one's method if that looks at the original activations, and 'swift-svd' otherwise; and
        'kfac-svd' wherever ranks are told in its unit.
        """
        method = self.method if self.make_method().needs & STREAMS == {"original"} else "swift-svd"
        if self.allocation == "global" and self.global_ranks.unit == "kfac":
            method = KFACSVD.name
        if method == self.method:
            return self
        return self.model_copy(update={"method": method, "anchor": 1.0, "ridge": None})

    def first_pass(self) -> "CompressionRecipe":
        """The recipe of the model in which statistics are taken again: one pass, no training."""
        method, ridge = self.method, self.ridge
        if "shifted" in self.make_method().needs:
            method, ridge = ("kfac-svd" if "gradients" in self.needs else "swift-svd"), None
        return self.model_copy(
            update={
                "method": method,
                "anchor": 1.0,
                "ridge": ridge,
                "passes": 1,
                "generated_sequences": 0,
                "order": None,
                "within_block": "fixed",
                "refine": RefineRecipe(),
                "tune": None,
            }
        )

    def relative_ridge(self) -> float:
        """Share of the mean diagonal that is added to the moments."""
        return self.make_method().default_ridge if self.ridge is None else self.ridge

    @classmethod
    def from_dict(cls, values: Any, where: str = "recipe") -> "CompressionRecipe":
        """Check a mapping.

        Raises
        ------
        RecipeError
            With the first thing that is wrong, in one line.
        """
        return validated(cls, values, where)

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> "CompressionRecipe":
        """Read YAML.

        Raises
        ------
        RecipeError
            If it is no YAML, or no recipe.
        """
        return cls.from_dict(parse_yaml(text, where), where)

    @classmethod
    def from_file(cls, path: str | Path) -> "CompressionRecipe":
        """Read a YAML file."""
        return cls.from_yaml(read_recipe_text(path), str(path))

    def to_yaml(self) -> str:
        """Write all settings, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def fingerprint(self) -> str:
        """SHA-256 of all settings."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def validated(kind: type[Kind], values: Any, where: str) -> Kind:
    """Check a mapping.

    Parameters
    ----------
    kind : type
        Of recipe.
    values : Any
    where : str
        It comes from, for the message.

    Raises
    ------
    RecipeError
        With the first thing that is wrong, in one line.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first, key, message = first_fault(error)
        if first["type"] == "extra_forbidden":
            message = f"unknown key; there are {', '.join(_keys_beside(kind, first['loc']))}"
        cause = first.get("ctx", {}).get("error")
        raised = type(cause) if isinstance(cause, SlimrankError) else RecipeError
        raise raised(f"{where}: {key}: {message}" if key else f"{where}: {message}") from error


def first_fault(error: ValidationError) -> tuple[Any, str, str]:
    """The first thing that is wrong: as pydantic has it, its dotted key, and its message."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    return first, key, first["msg"].removeprefix("Value error, ")


def read_recipe_text(path: str | Path) -> str:
    """Text of a recipe file.

    Raises
    ------
    RecipeError
        If it cannot be read.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(YAML_CHARACTERS + 1)
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    if len(text) > YAML_CHARACTERS:
        raise RecipeError(f"{path} is over {YAML_CHARACTERS} characters long; it is no recipe")
    return text


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Parse YAML into a mapping.

    Raises
    ------
    RecipeError
        If it is no YAML mapping.
    """
    return yaml_mapping(text, where, "a recipe")


def yaml_mapping(
    text: str, where: str, what: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader
) -> dict[str, Any]:
    """Parse YAML into a mapping, and build nothing that its aliases would blow up.

    Parameters
    ----------
    text : str
    where : str
        The file, for the message.
    what : str
        It is to be, for the message.
    loader : type of yaml.SafeLoader

    Raises
    ------
    RecipeError
        If it is no YAML mapping with words as keys, or too large or too deep for `what`.

    Examples
    --------
    >>> yaml_mapping("{a: &x [1], b: *x}", "r.yaml", "a recipe")
    {'a': [1], 'b': [1]}
    """
    try:
        too_many = RecipeError(f"{where}: over {YAML_VALUES} values; it is not {what}")
        opened = loader(text)
        opened.get_event = _at_most(opened.get_event, too_many)  # type: ignore[method-assign]
        root = opened.get_single_node()
        if root is not None and _size(root, {}) > YAML_VALUES:
            raise too_many
        values = None if root is None else opened.construct_document(root)
    except RecipeError:
        raise
    except RecursionError as error:
        raise RecipeError(f"{where}: nested too deeply; it is not {what}") from error
    except YAML_ERRORS as error:
        line = " ".join(str(error).split())
        raise RecipeError(f"{where}: not YAML: {line}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"{where}: {what} is a mapping of keys to values")
    return values


def _at_most(get_event: Callable[[], Any], too_many: RecipeError) -> Callable[[], Any]:
    """Read a value, unless it is one more than a recipe may have: it takes no memory then."""
    steps = iter(range(2 * YAML_VALUES + 4))  # two for a list or a mapping, and those around all

    def counted() -> Any:
        if next(steps, None) is None:
            raise too_many
        return get_event()

    return counted


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node once all its aliases are written out; one that holds itself has no end."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = YAML_VALUES + 1  # until its own parts are counted
    parts = node.value if isinstance(node, yaml.CollectionNode) else ()
    if not parts:
        str(node.value).encode()  # what cannot be written again is no text
    pairs = (part if isinstance(part, tuple) else (part,) for part in parts)
    known[id(node)] = 1 + sum(_size(part, known) for pair in pairs for part in pair)
    return known[id(node)]


def _keys_beside(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Keys that are allowed where an unknown one stood."""
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        kinds = (annotation, *get_args(annotation))  # X, or one of X | None
        model = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return list(model.model_fields)
