"""A model told apart from every other by its weights."""

import hashlib

import torch
from torch import nn

from slimrank.model.mapped import let_go_of


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of all parameters, a tied one once.

    Parameters
    ----------
    model : nn.Module

    Examples
    --------
    >>> linear = nn.Linear(2, 2)
    >>> before = weights_fingerprint(linear)
    >>> with torch.no_grad():
    ...     _ = linear.bias.add_(1)
    >>> weights_fingerprint(linear) == before
    False
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        values = parameter.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().data)
        let_go_of((parameter,))
    return digest.hexdigest()
