"""The recipe: every choice of a quantization job, typed, frozen and checked.

A recipe is a YAML file with one section per stage. Unknown keys are refused with the nearest
known name, values are checked for type and range, and ``to_dict`` gives back what was resolved,
so that a job repeats from its own output.
"""

from rotq.recipe.calibration import Calibration, Importance
from rotq.recipe.notation import read_mapping, write_yaml
from rotq.recipe.reading import Given, from_dict, load_bases, load_recipe, resolve
from rotq.recipe.sections import (
    Activations,
    KVCache,
    Output,
    Override,
    Rotation,
    Solver,
    Weights,
)
from rotq.recipe.training import Transform, Tuning
from rotq.recipe.whole import Recipe

__all__ = [
    "Activations",
    "Calibration",
    "Given",
    "Importance",
    "KVCache",
    "Output",
    "Override",
    "Recipe",
    "Rotation",
    "Solver",
    "Transform",
    "Tuning",
    "Weights",
    "from_dict",
    "load_bases",
    "load_recipe",
    "read_mapping",
    "resolve",
    "write_yaml",
]
