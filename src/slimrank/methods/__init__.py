"""One file a method: which moments go into the one problem."""

from slimrank.methods.aa_svd import AASVD
from slimrank.methods.base import Method
from slimrank.methods.registry import METHODS, method_by_name

__all__ = ["AASVD", "METHODS", "Method", "method_by_name"]
