"""Other packages, kept from printing."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Hold back warnings, and what these loggers say below an error.

    Parameters
    ----------
    *loggers : str
        Names of loggers; they are as before at the end.

    Examples
    --------
    >>> with quiet("a.package"):
    ...     logging.getLogger("a.package").warning("unheard")
    """
    found = {name: logging.getLogger(name) for name in loggers}
    before = {name: logger.level for name, logger in found.items()}
    for logger in found.values():
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, logger in found.items():
            logger.setLevel(before[name])
