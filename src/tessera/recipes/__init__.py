"""One continual-learning run each, as a short function to copy.

The recipes themselves are in `baselines`, `penalties` and `replay`; `RECIPES` has them by name.
"""

from tessera.recipes.learn import RECIPES, Recipe, find_recipe, learn, saved_settings
from tessera.recipes.models import mlp
from tessera.recipes.run import Progress, Run
from tessera.recipes.settings import Settings

__all__ = [
    "RECIPES",
    "Progress",
    "Recipe",
    "Run",
    "Settings",
    "find_recipe",
    "learn",
    "mlp",
    "saved_settings",
]
