"""The only place that swaps a module, and the rule by which targets name linears."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from slimrank.errors import ModelError, RecipeError
from slimrank.model.attention import AttentionSite
from slimrank.model.turns import let_go
from slimrank.nn import SplitLinear


def replace_linear(model: nn.Module, name: str, replacement: nn.Module) -> None:
    """Put a module in the place of the one with this dotted name."""
    let_go(model.get_submodule(name))
    model.set_submodule(name, replacement)


def split_fused(model: nn.Module, sites: Iterable[AttentionSite]) -> None:
    """Give keys and values linears of their own where one linear makes both.

    The model computes the same; each weight is copied once and then let go. `find_attention` finds
    the parts afterwards, as ``<linear>.keys`` and ``<linear>.values``.

    Parameters
    ----------
    model : nn.Module
    sites : iterable of AttentionSite
        Those with linears of their own are left alone.

    Raises
    ------
    ModelError
        If a fused projection is factorised already.
    """
    for site in sites:
        if site.key_rows is None or site.value_rows is None:
            continue
        linear = model.get_submodule(site.keys)
        if not isinstance(linear, nn.Linear):
            raise ModelError(
                f"{site.keys} is a {type(linear).__name__}; split fused projections first, "
                "factorise afterwards"
            )
        split = SplitLinear.from_linear(linear, site.key_rows, site.value_rows)
        replace_linear(model, site.keys, split)


def matches(name: str, pattern: str) -> bool:
    """Tell whether a target pattern names a module.

    A pattern is a full name, its last parts (``q_proj``, ``mlp.up_proj``), a shell pattern
    (``*.layers.0.*``), or ``re:`` and a regular expression that matches from the start.

    Examples
    --------
    >>> matches("model.layers.3.self_attn.q_proj", "q_proj")
    True
    >>> matches("model.layers.3.self_attn.q_proj", "re:.*layers\\\\.[0-2]\\\\.")
    False
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)


def unmatched_targets(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """Patterns that name nothing."""
    return [p for p in patterns if not any(matches(name, p) for name in names)]


def select_targets(
    names: Sequence[str],
    targets: Sequence[str] | None,
    ignore: Sequence[str],
    all_names: Sequence[str],
) -> list[str]:
    """Names of linears that a recipe means.

    Parameters
    ----------
    names : sequence of str
        Linears that low rank can take.
    targets : sequence of str or None
        Patterns; None means all.
    ignore : sequence of str
        Patterns of what to leave dense.
    all_names : sequence of str
        Every module of the model: an ignored name must be one of them.

    Raises
    ------
    RecipeError
        If a pattern matches nothing, is no regular expression, or nothing is left.
    """
    for pattern in [*(targets or ()), *ignore]:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise RecipeError(f"'{pattern}' is no regular expression: {error}") from error
    last_parts = sorted({name.rsplit(".", 1)[-1] for name in names})
    lost = unmatched_targets(targets or (), names)
    if lost:
        raise RecipeError(f"targets {lost} match no linear; there are {', '.join(last_parts)}")
    lost = unmatched_targets(ignore, all_names)
    if lost:
        raise RecipeError(f"ignore {lost} matches no module of the model")
    chosen = [n for n in names if targets is None or any(matches(n, t) for t in targets)]
    chosen = [n for n in chosen if not any(matches(n, i) for i in ignore)]
    if not chosen:
        raise RecipeError("targets and ignore together leave nothing to compress")
    return chosen
