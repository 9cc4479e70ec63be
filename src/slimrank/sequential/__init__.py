"""Block after block from what the compressed blocks before give."""

from slimrank.sequential.walk import factorise_in_sequence
from slimrank.sequential.walked import Walk

__all__ = ["Walk", "factorise_in_sequence"]
