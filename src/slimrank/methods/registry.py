"""One read-only mapping from a method's name to its class."""

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType

from slimrank.errors import RecipeError
from slimrank.methods.aa_svd import AASVD, ShiftAware
from slimrank.methods.asvd import ASVD
from slimrank.methods.base import Method
from slimrank.methods.fwsvd import FWSVD
from slimrank.methods.kfac_aa_svd import KFACAASVD
from slimrank.methods.kfac_svd import KFACSVD
from slimrank.methods.svd import SVD
from slimrank.methods.svd_llm import SVDLLM
from slimrank.methods.swift_svd import SwiftSVD

METHODS: Mapping[str, type[Method]] = MappingProxyType(
    {
        method.name: method
        for method in (SVD, FWSVD, ASVD, SVDLLM, SwiftSVD, ShiftAware, AASVD, KFACSVD, KFACAASVD)
    }
)


def method_by_name(name: str) -> Method:
    """Make the method of a name.

    Raises
    ------
    RecipeError
        If there is none, with the nearest name and all that exist.

    Examples
    --------
    >>> sorted(method_by_name("aa-svd").needs)
    ['original', 'shifted']
    """
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise RecipeError(f"no method is called '{name}'; {hint}there are {', '.join(METHODS)}")
    return METHODS[name]()
