"""One pass over the blocks from the original activations: moments, solves, the check on tokens."""

from collections.abc import Iterator

from slimrank.allocation import LinearShape
from slimrank.estimates.facts import BlockFacts
from slimrank.estimates.phase import Part, Phase, largest
from slimrank.estimates.run import Run, largest_square
from slimrank.estimates.solves import check_bytes, solve_bytes
from slimrank.methods import STREAMS
from slimrank.recipe import CompressionRecipe


def pass_phases(
    run: Run,
    base: Phase,
    recipe: CompressionRecipe,
    beside: list[Part],
    *,
    profiles: bool,
    name: str = "",
) -> list[Phase]:
    """Calibration, solving and check, each on the block where it holds most.

    Parameters
    ----------
    run : Run
    base : Phase
        What is held meanwhile.
    recipe : CompressionRecipe
        Of the pass; that of a profile may have another method.
    beside : list of Part
        What the store holds already.
    profiles : bool
        Whether linears are solved for all ranks, to be kept in a profile.
    name : str
        Of whatever the pass is part of.
    """
    found: dict[str, list[Phase]] = {}
    before, made = None, 0
    for block in run.facts.blocks:
        own = base.beside("")
        if not (profiles or run.options.stream):
            own.hold("factors", made, made and block.factor_bytes // max(len(block.shapes), 1))
        for phase in _block_phases(run, own, recipe, beside, block, before, profiles):
            phase.name = f"{name}{phase.name}"
            found.setdefault(phase.name, []).append(phase)
        before, made = block, made + block.factor_bytes
    return [largest(phases) for phases in found.values()]


def _block_phases(
    run: Run,
    base: Phase,
    recipe: CompressionRecipe,
    beside: list[Part],
    block: BlockFacts,
    before: BlockFacts | None,
    profiles: bool,
) -> Iterator[Phase]:
    facts, method = run.facts, recipe.make_method()
    takes_text = bool(method.needs & STREAMS)
    base.store([*beside, *([run.states(1, facts.tokens)] if takes_text else [])])
    run.weights(base, block.dense_bytes)
    if takes_text:
        one = facts.length * facts.width
        base.hold("last inputs", one * block.input_width, one * facts.hidden)
        phase = base.beside("calibration")
        phase.hold("moments", sum(block.squares), largest_square(block))
        if before is not None:  # in hand until those of this block are there
            phase.hold("last inputs", one * before.input_width, one * facts.hidden)
        run.activations(phase, max(block.calibrate, largest_square(block)))
        yield phase
    ranks = {s: s.break_even_rank if profiles else block.rank(s) for s in block.shapes}
    ranks = {shape: rank for shape, rank in ranks.items() if rank}
    if not ranks:
        return
    made = block.factor_bytes
    if profiles:
        made = sum(_profiled(run, shape, rank, method.needs) for shape, rank in ranks.items())
    base.hold("factors of the block", made, made // len(ranks))
    phase = base.beside("solving")
    if takes_text:
        phase.hold("moments", sum(block.squares), largest_square(block))
    ridged = recipe.relative_ridge() > 0
    sizes = [solve_bytes(shape, method, rank, ridged) for shape, rank in ranks.items()]
    phase.hold("solve", max(sizes), largest_square(block))
    yield phase
    if takes_text:
        phase = base.beside("check on tokens")
        wide = 0  # weights and factors in float32, while the tokens pass
        if facts.width < 4:
            wide = sum(4 * shape.dense_params for shape in ranks) + 4 * made // facts.width
        phase.hold("check", max(wide, *map(check_bytes, ranks)), largest_square(block))
        yield phase


def _profiled(run: Run, shape: LinearShape, rank: int, needs: frozenset[str]) -> int:
    """What a profile keeps of a linear until the block is written, and factors of half the rank."""
    bases = 2 if "gradients" in needs else 1
    half = run.facts.width * (shape.out_features + shape.in_features) * rank // 2
    return 4 * bases * shape.out_features * rank + half
