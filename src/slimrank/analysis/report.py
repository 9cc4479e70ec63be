"""What an analysis of a profile says: frozen, written as JSON and CSV."""

import csv
import io
from collections.abc import Sequence
from statistics import fmean

from pydantic import BaseModel, ConfigDict

from slimrank.analysis.correlation import Correlation

ENERGY_SHARES = (0.5, 0.9, 0.95, 0.99, 0.999)
PARAM_RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LinearAnalysis(_Frozen):
    """One linear.

    Parameters
    ----------
    name : str
    block : int
    kind : str
        Module type: the name within the block, digits as ``*``.
    out_features, in_features, tokens : int
    effective_rank : float
        0.0 if its outputs were zero, or no token reached it; such a linear is in no mean.
    normalized_effective_rank : float
        Over ``min(in, out)``.
    energy_ranks : dict of float to int
        Smallest rank that keeps a share of the energy of the outputs.
    losses : dict of float to float or None
        Share of the energy lost when this share of the parameters is kept, by the uniform rank;
        None where that rank is zero.
    importance : float
        Of its block, before the final norm.
    """

    name: str
    block: int
    kind: str
    out_features: int
    in_features: int
    tokens: int
    effective_rank: float
    normalized_effective_rank: float
    energy_ranks: dict[float, int]
    losses: dict[float, float | None]
    importance: float


class ImportanceCorrelations(_Frozen):
    """Importance of blocks against normalised effective rank.

    Parameters
    ----------
    all_blocks : Correlation
        The last block's importance taken before the final norm.
    all_blocks_after_norm : Correlation or None
        Taken after it, as the authors' code does; None if the profile does not know it.
    inner_blocks : Correlation
        Without the first two blocks and the last, which stand out in most models.
    """

    all_blocks: Correlation
    all_blocks_after_norm: Correlation | None
    inner_blocks: Correlation


class KindAnalysis(_Frozen):
    """All linears of one module type: means over them, and their correlation with importance."""

    kind: str
    num_linears: int
    mean_effective_rank: float
    mean_normalized_effective_rank: float
    mean_energy_ranks: dict[float, float]
    correlations: ImportanceCorrelations


class AnalysisReport(_Frozen):
    """A profile, read.

    Parameters
    ----------
    profile : str
        Its folder.
    model, model_fingerprint, method, calibration_fingerprint : str
    tokens : int
    importance : tuple of float
        Block influence of each block, the last one's before the final norm.
    importance_after_norm : float or None
        The last one's after it.
    linears : tuple of LinearAnalysis
    kinds : tuple of KindAnalysis
        In call order.
    overall : ImportanceCorrelations
        Of each block's mean over its module types.
    warnings : tuple of str
    """

    profile: str
    model: str
    model_fingerprint: str
    method: str
    calibration_fingerprint: str
    tokens: int
    importance: tuple[float, ...]
    importance_after_norm: float | None
    linears: tuple[LinearAnalysis, ...]
    kinds: tuple[KindAnalysis, ...]
    overall: ImportanceCorrelations
    warnings: tuple[str, ...]

    def csv(self) -> str:
        """Give the linears as comma-separated values, one a line."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        plain = [k for k in LinearAnalysis.model_fields if k not in ("energy_ranks", "losses")]
        ranks = [f"rank_{100 * share:g}_percent" for share in ENERGY_SHARES]
        losses = [f"loss_keep_{ratio:g}" for ratio in PARAM_RATIOS]
        writer.writerow([*plain, *ranks, *losses])
        for linear in self.linears:
            values = [getattr(linear, key) for key in plain]
            writer.writerow([*values, *linear.energy_ranks.values(), *linear.losses.values()])
        return text.getvalue()


def ner_by_block(linears: Sequence[LinearAnalysis], kind: str) -> dict[int, float]:
    """Mean normalised effective rank of a module type in each block that has it."""
    found: dict[int, list[float]] = {}
    for linear in linears:
        if linear.kind == kind and linear.effective_rank > 0:
            found.setdefault(linear.block, []).append(linear.normalized_effective_rank)
    return {block: fmean(found[block]) for block in sorted(found)}


def mean_by_block(linears: Sequence[LinearAnalysis]) -> dict[int, float]:
    """Mean of `ner_by_block` over module types: many experts weigh as much as one linear."""
    found: dict[int, list[float]] = {}
    for kind in dict.fromkeys(linear.kind for linear in linears):
        for block, value in ner_by_block(linears, kind).items():
            found.setdefault(block, []).append(value)
    return {block: fmean(found[block]) for block in sorted(found)}
