"""What each size would weigh, from a model's configuration alone: plan_sizes.py MODEL."""

import sys

from slimrank import CompressionRecipe, plan

for keep in (0.9, 0.8, 0.6, 0.4):
    recipe = CompressionRecipe(budget={"param_ratio": keep})
    print(keep, plan(sys.argv[1], recipe).size.line())
