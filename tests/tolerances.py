"""How far a result may be from the truth: one table, by operation and dtype.

Every entry is relative; the comment says to what. A test that needs a looser bound says why.
"""

import torch

TOLERANCE: dict[tuple[str, torch.dtype], float] = {
    # losses of a decomposition, to the energy of the outputs
    ("loss", torch.float64): 1e-11,
    # excess of the squared loss over the exact optimum, to that optimum, with heavy tokens
    ("excess", torch.float64): 1e-8,
    # weights and factors that are unique (a gap in the spectrum), to the norm of the weight
    ("weights", torch.float64): 1e-8,
    # orthonormality of a basis, roots against their matrix
    ("linalg", torch.float64): 1e-12,
    # a sum of float64 products, to the mean of |x_i x_j|
    ("moment", torch.float64): 1e-13,
    # one rounding of a float32 product: a sum over n tokens may carry n of them
    ("unit", torch.float32): 2.0**-24,
    # a layer's outputs against the dense product in float64, to its norm
    ("forward", torch.float64): 1e-13,
    ("forward", torch.float32): 1e-5,
    ("forward", torch.bfloat16): 3e-2,
    ("forward", torch.float16): 4e-3,
}
