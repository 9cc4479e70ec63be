"""slimrank: low-rank factorisation of causal language models, after training, in minutes."""

from importlib.metadata import version

from slimrank import evaluation
from slimrank.benchmarking import benchmark
from slimrank.calibration import TokenWindows
from slimrank.checkpoint import load, read_profile, register
from slimrank.compression import compress
from slimrank.errors import SlimrankError
from slimrank.healing import heal
from slimrank.nn import LowRankLinear
from slimrank.options import CompressionOptions
from slimrank.planning import plan
from slimrank.profiling import profile
from slimrank.quantizing import quantize
from slimrank.recipe import CompressionRecipe, HealRecipe
from slimrank.report import CompressionReport, HealReport

register()

__version__ = version("slimrank")

__all__ = [
    "CompressionOptions",
    "CompressionRecipe",
    "CompressionReport",
    "HealRecipe",
    "HealReport",
    "LowRankLinear",
    "SlimrankError",
    "TokenWindows",
    "__version__",
    "benchmark",
    "compress",
    "evaluation",
    "heal",
    "load",
    "plan",
    "profile",
    "quantize",
    "read_profile",
]
