"""What a run will hold, write and pass, told from shapes and a recipe alone."""

from slimrank.estimates.facts import find_facts
from slimrank.estimates.flow import phases_of
from slimrank.estimates.passes import Passes, passes_of
from slimrank.estimates.phase import Phase
from slimrank.estimates.run import Run

__all__ = ["Passes", "Phase", "Run", "find_facts", "passes_of", "phases_of"]
