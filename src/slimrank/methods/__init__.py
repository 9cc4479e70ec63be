"""One file a method: which moments go into the one problem."""

from slimrank.methods.aa_svd import AASVD
from slimrank.methods.asvd import ASVD
from slimrank.methods.base import STREAMS, Method
from slimrank.methods.kfac_svd import KFACSVD
from slimrank.methods.registry import METHODS, method_by_name

__all__ = ["AASVD", "ASVD", "KFACSVD", "METHODS", "STREAMS", "Method", "method_by_name"]
