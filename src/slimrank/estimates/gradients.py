"""Taking gradients of the loss: states in front of all blocks, the head, one block's graph."""

from slimrank.calibration.head import CHUNK
from slimrank.estimates.facts import BlockFacts
from slimrank.estimates.phase import Part, Phase, largest
from slimrank.estimates.run import Run
from slimrank.statistics import OF_GRADIENTS


def gradient_phases(
    run: Run, base: Phase, needs: frozenset[str], beside: list[Part], name: str = "gradients"
) -> list[Phase]:
    """Forwards, head and backwards; none if no gradients are needed.

    Parameters
    ----------
    run : Run
    base : Phase
        What is held meanwhile.
    needs : frozenset of str
        As `slimrank.methods.Method.needs`.
    beside : list of Part
        What the store holds already.
    name : str
    """
    if not needs & OF_GRADIENTS:
        return []
    facts, blocks = run.facts, run.facts.blocks
    every = run.states(len(blocks) + 1, facts.tokens)
    forwards = base.beside(f"{name}, forwards")
    forwards.store([*beside, every])
    run.activations(forwards, max(block.forward for block in blocks) + facts.batch_states)
    run.weights(forwards, max(block.dense_bytes for block in blocks))
    head = base.beside(f"{name}, head")
    head.store([*beside, every, _wide(run, facts.length)])
    logits = CHUNK * facts.vocabulary
    head.hold("logits", logits * (12 + facts.width + 4 * (facts.width < 4)), 4 * logits)
    run.weights(head, facts.head_bytes)
    backwards = [_backwards(run, base, needs, beside, index, name) for index in range(len(blocks))]
    return [forwards, head, largest(backwards)]


def _wide(run: Run, tokens: int) -> Part:
    """Gradients of the hidden states, in float32."""
    size = 4 * run.facts.hidden
    return "gradients of hidden states", size * run.facts.tokens, size * tokens


def _backwards(
    run: Run, base: Phase, needs: frozenset[str], beside: list[Part], index: int, name: str
) -> Phase:
    """One block's graph and sums; the results of the block behind it are still in hand."""
    facts, block = run.facts, run.facts.blocks[index]
    phase = base.beside(f"{name}, backwards")
    later = run.statistics(needs, slice(index + 1, None))
    states = run.states(index + 1, facts.tokens)
    phase.store([*beside, states, _wide(run, facts.batch * facts.length), *later])
    sums, piece = _sums(block, facts.hidden)
    phase.hold("sums of gradients", sums, piece)
    if index + 1 < len(facts.blocks):
        phase.hold("metrics of a block", sums // 2, piece // 2)
    pulled = block.backward + 3 * facts.batch_states
    if facts.tokens > facts.batch * facts.length:  # of the batch before, until there are others
        outs = sum(shape.out_features for shape in block.shapes)
        pulled += 4 * facts.batch * facts.length * (outs + facts.hidden)
    if needs & {"weight_gradients", "mean_gradients"}:
        inputs = sum(shape.in_features for shape in block.shapes)
        pulled += facts.batch * facts.length * facts.width * inputs
    if "mean_gradients" in needs:
        weights = [shape.dense_params for shape in block.shapes]
        phase.hold("sums of mean gradients", 8 * sum(weights), 8 * max(weights, default=0))
    run.activations(phase, pulled)
    run.weights(phase, block.dense_bytes)
    return phase


def _sums(block: BlockFacts, hidden: int) -> tuple[int, int]:
    """Bytes of the sums of one block, and of the largest."""
    sizes = [8 * shape.out_features**2 for shape in block.shapes] + [8 * hidden**2]
    return sum(sizes), max(sizes)
