"""What became of the linears: heat maps of what was kept and lost, and a table by kind."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from slimrank.pages.content import Chart, Table
from slimrank.pages.heat_map import Cell, draw_heat_map
from slimrank.pages.panel import Axis
from slimrank.pages.wording import in_params, in_percent, in_short
from slimrank.report import LinearReport

BLOCK = re.compile(r"(?:^|\.)(\d+)\.(.+)$")

NARROW = 8  # blocks whose maps have room side by side


@dataclass(frozen=True, slots=True)
class Spot:
    """Where linears belong on a map: a block, and a kind of linear in it."""

    block: int
    kind: str


def spot(name: str) -> Spot | None:
    """Take the first number in a name for the block; later ones, of experts, are left open.

    Examples
    --------
    >>> spot("model.layers.3.self_attn.q_proj")
    Spot(block=3, kind='self_attn.q_proj')
    >>> spot("model.layers.3.mlp.experts.2.up_proj")
    Spot(block=3, kind='mlp.experts.*.up_proj')
    >>> spot("lm_head") is None
    True
    """
    found = BLOCK.search(name)
    if found is None:
        return None
    return Spot(int(found[1]), re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", found[2]))


def by_spot(linears: Sequence[LinearReport]) -> Mapping[Spot, list[LinearReport]]:
    """Gather linears by block and kind; those outside the blocks are left out."""
    found: dict[Spot, list[LinearReport]] = {}
    for linear in linears:
        place = spot(linear.name)
        if place is not None:
            found.setdefault(place, []).append(linear)
    return found


def map_of_kept(linears: Sequence[LinearReport]) -> Chart:
    """Draw the share of parameters that each linear kept."""

    def kept(own: Sequence[LinearReport]) -> tuple[float | None, str]:
        share = sum(x.params for x in own) / sum(x.params_before for x in own)
        is_dense = all(x.rank is None for x in own)
        return None if is_dense else share, "" if is_dense else f"{100 * share:.0f}"

    return _chart(
        linears,
        kept,
        "Share of the parameters kept",
        "Each cell is a linear; its number is the percentage that stayed.",
        Axis("parameters kept / before", (0.0, 1.0)),
        "stayed dense",
    )


def map_of_losses(linears: Sequence[LinearReport]) -> Chart:
    """Draw the loss that was measured for each linear."""

    def lost(own: Sequence[LinearReport]) -> tuple[float | None, str]:
        mean = _mean([x.measured_loss for x in own if x.rank is not None])
        return mean, "" if mean is None else f"{100 * mean:.2g}"

    losses = [x.measured_loss for x in linears if x.rank is not None]
    return _chart(
        linears,
        lost,
        "Loss of each linear",
        "Measured on the calibration tokens, as a share of the energy of the target; the number is "
        "in percent. Logarithmic colours.",
        Axis("measured loss", losses, is_log=True),
        "stayed dense, or lost nothing",
    )


def map_of_effective_ranks(linears: Sequence[LinearReport]) -> Chart:
    """Draw the effective rank of what each linear gives."""

    def effective(own: Sequence[LinearReport]) -> tuple[float | None, str]:
        mean = _mean([x.effective_rank for x in own if x.effective_rank is not None])
        return mean, "" if mean is None else f"{mean:.0f}"

    ranks = [x.effective_rank for x in linears if x.effective_rank is not None]
    return _chart(
        linears,
        effective,
        "Effective rank of the outputs",
        "How many directions the outputs take, weighted by their share: a low one can be truncated "
        "at little cost. Logarithmic colours.",
        Axis("effective rank", ranks, is_log=True),
        "not measured",
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _chart(
    linears: Sequence[LinearReport],
    figure: Callable[[Sequence[LinearReport]], tuple[float | None, str]],
    title: str,
    note: str,
    values: Axis,
    hatched: str,
) -> Chart:
    cells = []
    for place, own in by_spot(linears).items():
        value, text = figure(own)
        cells.append(Cell(place.block, place.kind, value, text, _in_words(own)))
    is_wide = len({cell.block for cell in cells}) > NARROW
    return Chart(title, note, draw_heat_map(cells, title, note, values, hatched), is_wide=is_wide)


def _in_words(own: Sequence[LinearReport]) -> str:
    """All there is to say of the linears of a cell."""
    kept = sum(x.params for x in own) / sum(x.params_before for x in own)
    what = own[0].name if len(own) == 1 else f"{len(own)} linears: {own[0].name} …"
    parts = [what, f"rank {_span([x.rank for x in own])}", f"kept {in_percent(kept)}"]
    losses = [x.measured_loss for x in own if x.rank is not None]
    if losses:
        parts.append(f"loss {in_percent(sum(losses) / len(losses))}")
    ranks = [x.effective_rank for x in own if x.effective_rank is not None]
    if ranks:
        parts.append(f"effective rank {in_short(sum(ranks) / len(ranks))}")
    return "\n".join(parts)


def _span(ranks: Sequence[int | None]) -> str:
    given = [rank for rank in ranks if rank is not None]
    if not given:
        return "full (dense)"
    low, high = min(given), max(given)
    text = str(low) if low == high else f"{low}–{high}"
    return text if len(given) == len(ranks) else f"{text}, {len(ranks) - len(given)} dense"


def table_of_kinds(linears: Sequence[LinearReport]) -> Table:
    """Sum up the linears of each kind."""
    kinds: dict[str, list[LinearReport]] = {}
    for linear in linears:
        place = spot(linear.name)
        kinds.setdefault(place.kind if place else linear.name, []).append(linear)
    rows = []
    for kind, own in kinds.items():
        before, after = (sum(x.params_before for x in own), sum(x.params for x in own))
        losses = [x.measured_loss for x in own if x.rank is not None]
        rows.append(
            (
                kind,
                str(len(own)),
                _span([x.rank for x in own]),
                in_params(before),
                in_params(after),
                in_percent(after / before),
                in_percent(sum(losses) / len(losses)) if losses else "–",
                in_percent(max(losses)) if losses else "–",
            )
        )
    columns = ("linear", "count", "ranks", "params before", "after", "kept", "mean loss", "worst")
    return Table("By kind of linear, all blocks", columns, tuple(rows))
