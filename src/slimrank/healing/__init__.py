"""Training of a compressed folder, end to end, towards the dense model's predictions."""

from slimrank.healing.run import heal

__all__ = ["heal"]
