"""Read the spectra of a profile: which linears are of low effective rank, and where they lie."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from statistics import fmean

from torch import Tensor

from slimrank.analysis.correlation import Correlation, correlate
from slimrank.analysis.report import (
    ENERGY_SHARES,
    PARAM_RATIOS,
    AnalysisReport,
    ImportanceCorrelations,
    KindAnalysis,
    LinearAnalysis,
    mean_by_block,
    ner_by_block,
)
from slimrank.checkpoint import Profile, ProfiledLinear
from slimrank.errors import CheckpointError
from slimrank.linalg import (
    effective_rank,
    normalized_effective_rank,
    rank_for_energy,
    tail_energy,
)
from slimrank.methods import method_by_name

FIRST_INNER_BLOCK = 2


def analyze(profile: Profile) -> AnalysisReport:
    """Work out effective ranks, and how they go with the importance of blocks.

    Swift-SVD claims that important blocks have low effective ranks; for some models the opposite
    holds. This reports sign and p-value, with and without the blocks that stand out, and with both
    readings of the last block's importance.

    Parameters
    ----------
    profile : Profile

    Returns
    -------
    AnalysisReport

    Raises
    ------
    CheckpointError
        If no linear of the profile gave any output, or its spectra are not of outputs but of what
        the model's loss makes of them.
    SlimrankError
        If scipy is not installed.

    References
    ----------
    Swift-SVD (arXiv 2604.01609), section 4: equation 11 and figure 3.
    """
    manifest = profile.manifest
    if "gradients" in method_by_name(manifest.method).needs:
        raise CheckpointError(
            f"{profile.folder} is a profile by {manifest.method}: its spectra are in the metric of "
            "the loss, and effective ranks are of outputs; profile with --effort fast"
        )
    importance, after_norm = manifest.importance, manifest.importance_after_norm
    linears = tuple(
        _analyze_linear(linear, profile.spectra[linear.name], importance[linear.block])
        for linear in manifest.linears
    )
    kinds = dict.fromkeys(x.kind for x in linears if x.effective_rank > 0)
    if not kinds:
        raise CheckpointError(
            f"{profile.folder}: no linear gave any output; profile with more text"
        )
    return AnalysisReport(
        profile=str(profile.folder),
        model=manifest.model,
        model_fingerprint=manifest.model_fingerprint,
        method=manifest.method,
        calibration_fingerprint=manifest.calibration_fingerprint,
        tokens=manifest.tokens,
        importance=importance,
        importance_after_norm=after_norm,
        linears=linears,
        kinds=tuple(_analyze_kind(kind, linears, importance, after_norm) for kind in kinds),
        overall=_correlations(mean_by_block(linears), importance, after_norm),
        warnings=tuple(_warnings(linears)),
    )


def _analyze_linear(
    linear: ProfiledLinear, singular_values: Tensor, importance: float
) -> LinearAnalysis:
    out_features, in_features = linear.out_features, linear.in_features
    tail = tail_energy(singular_values)
    break_even = Fraction(out_features * in_features, out_features + in_features)
    ranks = {ratio: int(Fraction(str(ratio)) * break_even) for ratio in PARAM_RATIOS}
    whole = float(tail[0]) or 1.0  # nothing of zero can be lost
    return LinearAnalysis(
        name=linear.name,
        block=linear.block,
        kind=linear.kind,
        out_features=out_features,
        in_features=in_features,
        tokens=linear.tokens,
        effective_rank=effective_rank(singular_values),
        normalized_effective_rank=normalized_effective_rank(
            singular_values, in_features, out_features
        ),
        energy_ranks={share: rank_for_energy(singular_values, share) for share in ENERGY_SHARES},
        losses={r: float(tail[rank]) / whole if rank else None for r, rank in ranks.items()},
        importance=importance,
    )


def _analyze_kind(
    kind: str,
    linears: Sequence[LinearAnalysis],
    importance: Sequence[float],
    after_norm: float | None,
) -> KindAnalysis:
    own = [x for x in linears if x.kind == kind and x.effective_rank > 0]
    return KindAnalysis(
        kind=kind,
        num_linears=len(own),
        mean_effective_rank=fmean(x.effective_rank for x in own),
        mean_normalized_effective_rank=fmean(x.normalized_effective_rank for x in own),
        mean_energy_ranks={
            share: fmean(x.energy_ranks[share] for x in own) for share in ENERGY_SHARES
        },
        correlations=_correlations(ner_by_block(own, kind), importance, after_norm),
    )


def _correlations(
    ner: Mapping[int, float], importance: Sequence[float], after_norm: float | None
) -> ImportanceCorrelations:
    last = len(importance) - 1
    inner = {block: value for block, value in ner.items() if FIRST_INNER_BLOCK <= block < last}
    literal = None
    if after_norm is not None:
        literal = _correlate_blocks(ner, [*importance[:-1], after_norm])
    return ImportanceCorrelations(
        all_blocks=_correlate_blocks(ner, importance),
        all_blocks_after_norm=literal,
        inner_blocks=_correlate_blocks(inner, importance),
    )


def _correlate_blocks(ner: Mapping[int, float], importance: Sequence[float]) -> Correlation:
    return correlate([importance[block] for block in ner], list(ner.values()))


def _warnings(linears: Sequence[LinearAnalysis]) -> list[str]:
    """Name what makes effective ranks less than they seem."""
    silent = [x.name for x in linears if x.effective_rank == 0]
    few = [
        x.name
        for x in linears
        if x.effective_rank > 0 and x.tokens < min(x.out_features, x.in_features)
    ]
    found = []
    if silent:
        found.append(f"{len(silent)} linears gave no output and are in no mean: first {silent[0]}")
    if few:
        found.append(
            f"{len(few)} linears saw fewer tokens than they have ranks, which bounds their "
            f"effective rank: first {few[0]}; profile with more text"
        )
    return found
