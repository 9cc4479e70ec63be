"""A run to be, and what several of its phases hold alike."""

from dataclasses import dataclass

from slimrank.estimates.facts import BlockFacts, Facts
from slimrank.estimates.phase import HEAP_PIECE, Part, Phase, Place
from slimrank.model.mapped import LARGE_PIECE
from slimrank.options import CompressionOptions
from slimrank.recipe import CompressionRecipe
from slimrank.statistics import OF_GRADIENTS


@dataclass(frozen=True, slots=True)
class Run:
    """A run to be: what it is of, and how.

    Parameters
    ----------
    facts : Facts
    recipe : CompressionRecipe
    options : CompressionOptions
    profile_bytes, spectra_bytes : int
        Of the profile that ranks are chosen from, with bases and without.
    output_bytes : int
        Of the weight files that are written.
    """

    facts: Facts
    recipe: CompressionRecipe
    options: CompressionOptions
    profile_bytes: int
    spectra_bytes: int
    output_bytes: int

    def start(self) -> Phase:
        """What is held from beginning to end: the model, unless it stays in its files.

        Of one that does, what lies outside the blocks is on the accelerator for good.
        """
        heap_piece = LARGE_PIECE if self.options.stream else HEAP_PIECE
        place = Place(self.options.device not in (None, "cpu"), self.options.memory, heap_piece)
        base = Phase("", place)
        if not self.options.stream:
            base.hold("model", self.facts.model_bytes, is_mapped=True)
        elif place.has_device:
            base.hold("weights outside the blocks", self.outside_bytes)
        return base

    @property
    def outside_bytes(self) -> int:
        """Of the weights outside the blocks."""
        return self.facts.model_bytes - sum(block.dense_bytes for block in self.facts.blocks)

    def weights(self, phase: Phase, size: int) -> None:
        """Weights that are read in a phase, where the model is not held anyway."""
        if self.options.stream:
            phase.hold("weights", size, is_mapped=True, on_host=True)
            if phase.place.has_device:
                phase.hold("weights", min(size, max(b.dense_bytes for b in self.facts.blocks)))

    def activations(self, phase: Phase, size: int) -> None:
        """What a block holds while a batch passes; its pieces are those of the widest linear."""
        facts = self.facts
        widest = max((s.out_features for b in facts.blocks for s in b.shapes), default=0)
        phase.hold("activations", size, facts.batch * facts.length * widest * facts.width)

    def states(self, count: int, tokens: int | None = None) -> Part:
        """Hidden states in front of so many blocks; of all tokens, held-out ones too."""
        facts = self.facts
        tokens = facts.tokens + facts.held_out if tokens is None else tokens
        return "hidden states", int(count * facts.states(tokens)), facts.batch_states

    def statistics(self, needs: frozenset[str], blocks: slice = slice(None)) -> list[Part]:
        """Metrics and mean gradients of some blocks, in float32, as they are kept to the end."""
        metrics = gradients = piece = 0
        if needs & OF_GRADIENTS:
            for block in self.facts.blocks[blocks]:
                metrics += 4 * self.facts.hidden**2
                for shape in block.shapes:
                    metrics += 4 * shape.out_features**2
                    piece = max(piece, 4 * shape.out_features**2)
                    if "mean_gradients" in needs:
                        gradients += 4 * shape.dense_params
        return [("metrics", metrics, piece), ("mean gradients", gradients, piece)]


def largest_square(block: BlockFacts) -> int:
    """Bytes of the largest second moment of its inputs."""
    return max(block.squares, default=0)
