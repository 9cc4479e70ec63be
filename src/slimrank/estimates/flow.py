"""A run from loading to writing: which phases it has, and what each leaves to the next."""

from slimrank.checkpoint.mapped_folder import LEAST_SHARD, MOST_SHARD
from slimrank.estimates.gradients import gradient_phases
from slimrank.estimates.in_turn import sequence_phases, train_phase
from slimrank.estimates.one_shot import pass_phases
from slimrank.estimates.phase import Part, Phase
from slimrank.estimates.run import Run
from slimrank.keeping import keeps_blocks
from slimrank.methods import STREAMS
from slimrank.recipe import CompressionRecipe

FINITE_PIECE = 2**22  # numbers that are looked at together when weights are checked
PROBE = 128  # tokens that the folder is compared on
PREDICTED = 256  # positions whose predictions are held at once (see `slimrank.refine`)


def phases_of(run: Run) -> list[Phase]:
    """All phases of a run in turn, each where it holds most.

    Parameters
    ----------
    run : Run
    """
    recipe, base = run.recipe, run.start()
    found = [_load(run)]
    if recipe.generated_sequences:
        found.append(_generate(run, base))
    if recipe.tune is not None:
        found.append(_predict(run, base))
        base.store([run.states(2)])
    statistics: list[Part] = []
    if recipe.passes == 2:
        found += _look_twice(run, base)
        statistics = [*run.statistics(recipe.needs), *_again(run)]
    found += _made(run, base, recipe, statistics)
    if recipe.tune is not None:
        found.append(_tune(run, base))
    found.append(_write(run, base, statistics))
    return [phase.finished() for phase in found]


def _load(run: Run) -> Phase:
    """Files are mapped; on an accelerator the model is copied from there."""
    phase = run.start().beside("load")
    phase.hold("check of weights", FINITE_PIECE * (run.facts.width + 5), on_host=True)
    if run.options.stream:
        phase.hold("weights", run.facts.largest_bytes, is_mapped=True, on_host=True)
    elif phase.place.has_device:
        phase.hold("files", run.facts.model_bytes, is_mapped=True, on_host=True)
    return phase


def _generate(run: Run, base: Phase) -> Phase:
    """Keys and values of four batches at once, and one layer's while it is made longer."""
    facts, phase = run.facts, base.beside("generate")
    tokens = 4 * facts.batch * facts.length
    cache = 2 * tokens * facts.cached * facts.width
    phase.hold("keys and values", cache * (len(facts.blocks) + 1), cache // 2)
    phase.hold("logits", 4 * facts.batch * facts.vocabulary * 12)
    run.weights(phase, max(facts.head_bytes, facts.embedding_bytes))
    return phase


def _predict(run: Run, base: Phase) -> Phase:
    """The original model's last states, to train by."""
    phase = base.beside("predictions")
    phase.store([run.states(2)])
    forward = max(block.forward for block in run.facts.blocks)
    run.activations(phase, forward + run.facts.batch_states)
    return phase


def _made(
    run: Run, base: Phase, recipe: CompressionRecipe, statistics: list[Part], name: str = ""
) -> list[Phase]:
    """Gradients, profile, ranks, factors: the way that `slimrank.making` takes."""
    found: list[Phase] = []
    chooses = recipe.allocation != "uniform"
    is_built = recipe.for_profile() == recipe and not recipe.is_sequential
    if not statistics:
        needs = recipe.needs if chooses else recipe.needs_beside_ranks
        found += gradient_phases(run, base, needs, [], f"{name}gradients")
        statistics = run.statistics(needs)
    if chooses:
        profile = recipe.for_profile()
        phases = pass_phases(run, base, profile, statistics, profiles=True, name=f"{name}profile, ")
        for phase in phases:
            phase.keep("profile", run.profile_bytes if is_built else run.spectra_bytes)
        found += phases
    if is_built and chooses:
        build = _build(run, base, recipe, name)
        build.keep("profile", run.profile_bytes)
        found.append(build)
        return found
    if recipe.is_sequential:
        phases = sequence_phases(run, base, statistics)
    else:
        phases = pass_phases(run, base, recipe, statistics, profiles=False, name=name)
    for phase in phases:
        phase.keep("finished blocks", _kept_blocks(run))
    return found + phases


def _build(run: Run, base: Phase, recipe: CompressionRecipe, name: str) -> Phase:
    """Factors from a profile's bases, block by block."""
    facts, phase = run.facts, base.beside(f"{name}build")
    block = max(facts.blocks, key=lambda block: block.dense_bytes)
    if name or not run.options.stream:
        on_host = run.options.stream
        phase.hold("factors", facts.factor_bytes, _piece(run), on_host=on_host)
    bases = 2 if "gradients" in recipe.make_method().needs else 1
    sizes = [s.out_features * s.break_even_rank for s in block.shapes]
    phase.hold("bases of the block", 4 * bases * sum(sizes), 4 * max(sizes, default=0))
    matrix = max((shape.dense_params for shape in block.shapes), default=0)
    phase.hold("solve", 8 * 6 * matrix, 8 * matrix)
    run.weights(phase, block.dense_bytes)
    phase.keep("finished blocks", _kept_blocks(run))
    return phase


def _look_twice(run: Run, base: Phase) -> list[Phase]:
    """A first pass on a copy; gradients and moments there, beside those of the original."""
    facts, recipe = run.facts, run.recipe
    first = recipe.first_pass()
    found = gradient_phases(run, base, recipe.needs, [])
    known = run.statistics(recipe.needs)
    whole = base.beside("")
    if not run.options.stream:
        whole.hold("copy of the model", facts.model_bytes, _piece(run))
    passing = [*known] or [("metrics", 0, 0)]
    found += _made(run, whole, first, passing, "first pass: ")
    kept = base.beside("")
    rest = facts.model_bytes - facts.replaced_bytes
    kept.hold("copy of the model", 0 if run.options.stream else rest, _piece(run))
    on_host = run.options.stream
    kept.hold("factors of the copy", facts.factor_bytes, _piece(run), on_host=on_host)
    graded = kept.beside("")
    graded.store(known)
    found += gradient_phases(run, graded, recipe.needs, [], "second look, gradients")
    if _again(run):
        kept.store([*known, *_again(run)])
        phases = pass_phases(run, kept, first, [], profiles=True, name="second look, ")
        found += phases[:1]
    return found


def _again(run: Run) -> list[Part]:
    """Second moments of the compressed model's inputs, of all blocks."""
    recipe = run.recipe
    if not recipe.make_method().needs & STREAMS and recipe.allocation == "uniform":
        return []
    squares = [square for block in run.facts.blocks for square in block.squares]
    return [("moments of the first pass", sum(squares), max(squares, default=0))]


def _tune(run: Run, base: Phase) -> Phase:
    """All blocks trained at once: their numbers four times, states between them, one graph."""
    facts, recipe, phase = run.facts, run.recipe, base.beside("tune")
    assert recipe.tune is not None
    phase.hold("factors", facts.factor_bytes, _piece(run))
    trained = sum(block.trained for block in facts.blocks)
    share = min(1.0, recipe.tune.batch_sequences / facts.batch)
    between = share * (len(facts.blocks) + 3) * facts.batch_states
    phase.hold("states between blocks", between, share * facts.batch_states)
    phase.hold("gradients", 4 * trained, _piece(run))
    graph = share * max(block.train for block in facts.blocks)
    logits = 6 * PREDICTED * facts.vocabulary * 4  # a few positions at a time, before any block
    train_phase(run, phase, trained, max(graph, logits))
    return phase


def _write(run: Run, base: Phase, statistics: list[Part]) -> Phase:
    """The folder is written, loaded again and compared; what is kept of the run is still there."""
    facts, recipe, phase = run.facts, run.recipe, base.beside("write and read back")
    kept = list(statistics)
    if recipe.is_sequential:
        needs = recipe.needs if recipe.allocation != "uniform" else recipe.needs_beside_ranks
        kept = [*(kept or run.statistics(needs)), run.states(2)]
    phase.store(kept)
    if run.options.stream:
        block = max(block.whole_bytes for block in facts.blocks)
        shard = min(max(2 * block, LEAST_SHARD), MOST_SHARD, run.output_bytes)
        ends = facts.embedding_bytes + facts.head_bytes
        read = max(shard, 2 * facts.largest_bytes, ends)
        phase.hold("weights", read, is_mapped=True, on_host=True)
        if phase.place.has_device:  # of what is read back too
            phase.hold("weights outside the blocks", run.outside_bytes)
            phase.hold("weights", max(block.dense_bytes for block in facts.blocks))
    else:
        phase.hold("factors", facts.factor_bytes, _piece(run))
        phase.hold("model read back", run.output_bytes, is_mapped=True)
        if phase.place.has_device:
            phase.hold("files", run.output_bytes, is_mapped=True, on_host=True)
    phase.hold("logits", 2 * PROBE * facts.vocabulary * facts.width)
    phase.keep("output", run.output_bytes)
    phase.keep("finished blocks", _kept_blocks(run))
    is_built = recipe.for_profile() == recipe and not recipe.is_sequential
    if is_built and recipe.allocation != "uniform":
        phase.keep("profile", run.profile_bytes)
    return phase


def _kept_blocks(run: Run) -> int:
    """On disk until the folder stands: whole blocks of a sequential run, otherwise factors."""
    recipe = run.recipe
    if not keeps_blocks(recipe, stream=run.options.stream):
        return 0
    blocks = run.facts.blocks
    if recipe.is_sequential:
        return sum(block.whole_bytes for block in blocks)
    return run.facts.factor_bytes


def _piece(run: Run) -> int:
    """Bytes of a typical factor."""
    sizes = [b.factor_bytes // (2 * len(b.shapes)) for b in run.facts.blocks if b.shapes]
    return max(sizes, default=0)
