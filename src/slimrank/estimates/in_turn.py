"""Blocks one after the other: two streams, moments of what arrives, training."""

from collections.abc import Sequence

from slimrank.calibration import call_levels
from slimrank.estimates.facts import BlockFacts
from slimrank.estimates.phase import Part, Phase, largest
from slimrank.estimates.run import Run, largest_square
from slimrank.estimates.solves import solve_bytes
from slimrank.methods import STREAMS
from slimrank.model import InputGroup


def sequence_phases(run: Run, base: Phase, beside: list[Part]) -> list[Phase]:
    """Each phase on the block where it holds most.

    Parameters
    ----------
    run : Run
    base : Phase
        What is held meanwhile.
    beside : list of Part
        What is kept of gradients.
    """
    embed = base.beside("embed")
    embed.store([*beside, run.states(2)])
    run.weights(embed, run.facts.embedding_bytes)
    found: dict[str, list[Phase]] = {}
    made = 0
    for block in run.facts.blocks:
        own = base.beside("")
        if not run.options.stream:
            own.hold("factors", made, made and block.factor_bytes // max(len(block.shapes), 1))
        own.hold("copy of the block", block.dense_bytes, block.largest_bytes)
        run.weights(own, block.dense_bytes)
        for phase in _Turn(run, own, block, beside).phases():
            found.setdefault(phase.name, []).append(phase)
        made += block.factor_bytes
    return [embed, *(largest(phases) for phases in found.values())]


class _Turn:
    """One block in its turn."""

    def __init__(self, run: Run, base: Phase, block: BlockFacts, beside: list[Part]) -> None:
        self.run, self.base, self.block, self.beside = run, base, block, beside
        self.facts, self.method = run.facts, run.recipe.make_method()
        self.needs = self.method.needs & STREAMS
        self.sums = 4 if self.needs >= STREAMS else 2  # moments and drifts, with the last sequence
        self.known = 6 if self.needs >= STREAMS else 2  # drifts also as what they were summed in

    def phases(self) -> list[Phase]:
        """In the order in which they take place."""
        block, facts = self.block, self.facts
        inputs = facts.tokens * facts.width * block.input_width if self.needs >= STREAMS else 0
        original = self._stored("original", 3, inputs)
        if self.needs == {"original"}:
            original.hold("moments", 2 * sum(block.squares), largest_square(block))
        self.run.activations(original, block.calibrate + facts.batch_states)
        found = [original]
        levels = call_levels(block.path, block.groups)
        known = 0
        if self.needs == {"original"}:
            known = self.known * sum(block.squares)
        left = inputs
        for number, level in enumerate(levels):
            if "shifted" in self.needs:
                before = levels[number - 1] if number else ()
                found.append(self._shifted(level, before, left, number))
                known = self.known * sum(8 * group.in_features**2 for group in level)
                left -= (
                    sum(facts.tokens * facts.width * g.in_features for g in level) if inputs else 0
                )
            found += self._solved(level, known, left, number)
        found += self._finished(known, levels)
        return found

    def _stored(self, name: str, streams: int, more: int) -> Phase:
        """With both streams and what is kept of the original block in the store."""
        phase = self.base.beside(name)
        part = ("inputs", more, self.facts.batch_states)
        phase.store([*self.beside, self.run.states(streams), part])
        return phase

    def _held(self, level: Sequence[InputGroup], number: int) -> int:
        """Inputs of a linear that a child of the block ends in; what children before it gave."""
        if "shifted" not in self.needs:
            return 0
        widest = max((group.in_features for group in level), default=0)
        return self.facts.tokens * self.facts.width * (widest + self.facts.hidden * (number > 1))

    def _shifted(
        self, level: Sequence[InputGroup], before: Sequence[InputGroup], left: int, number: int
    ) -> Phase:
        """The shifted stream up to one level; inputs kept of the original are let go meanwhile."""
        phase = self._stored(
            "shifted", 3, left + self.facts.states(self.facts.tokens) * (number > 1)
        )
        own, old = (sum(8 * g.in_features**2 for g in groups) for groups in (level, before))
        piece = max(8 * group.in_features**2 for group in level)
        phase.hold("moments", self.sums * own + self.known * old, piece)
        product = piece // 2 if self.needs >= STREAMS else 0
        self.run.activations(phase, self.block.calibrate + self.facts.batch_states + product)
        return phase

    def _solved(
        self, level: Sequence[InputGroup], known: int, left: int, number: int
    ) -> list[Phase]:
        shapes = [s.shape for g in level for s in g.sites if self.block.rank(s.shape)]
        if not shapes:
            return []
        solving = self._stored("solving", 3, left + self._held(level, number))
        piece = max(8 * group.in_features**2 for group in level)
        solving.hold("moments", known, piece)
        check = solving.beside("check on tokens")
        ridged = self.run.recipe.relative_ridge() > 0
        sizes = [solve_bytes(s, self.method, self.block.rank(s), ridged) for s in shapes]
        solving.hold("solve", max(sizes), piece)
        one = 4 * self.facts.length * shapes[0].in_features
        check.hold("check", 2 * one, one)
        return [solving, check]

    def _finished(self, known: int, levels: Sequence[Sequence[InputGroup]]) -> list[Phase]:
        """Both outputs are there; then training, with the last moments still in hand."""
        facts, block, recipe = self.facts, self.block, self.run.recipe
        given_again = facts.states(facts.tokens) if len(levels) > 1 else 0
        last = self._stored("outputs", 4, given_again)
        last.hold("moments", known, largest_square(block))
        self.run.activations(last, block.forward + 2 * facts.batch_states)
        if not recipe.refines or not block.trained:
            return [last]
        extra = 1 if recipe.refine.loss == "kl" else 0
        phase = self._stored("refine", 4 + extra, 0)
        phase.hold("moments", known, largest_square(block))
        share = min(1.0, recipe.refine.batch_sequences / facts.batch)
        train_phase(self.run, phase, block.trained, share * block.train + 4 * facts.batch_states)
        return [last, phase]


def train_phase(run: Run, phase: Phase, trained: int, activations: int | float) -> None:
    """Masters, two moments of AdamW and the best so far, all float32; gradients are with the graph.

    Parameters
    ----------
    run : Run
    phase : Phase
    trained : int
        Numbers that are trained.
    activations : float
        Of a step, gradients included.
    """
    phase.hold("masters and optimiser", 16 * trained, 4 * run.facts.hidden**2)
    run.activations(phase, int(activations))
