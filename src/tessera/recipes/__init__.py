"""Learning runs, each as a short function to copy.

The recipes for a sequence of tasks are in `baselines`, `penalties`, `replay` and `generative`
(`RECIPES` has them by name), those for a stream without tasks in `online` (`ONLINE_RECIPES`).
"""

from tessera.recipes.learn import RECIPES, Recipe, find_recipe, learn, saved_settings
from tessera.recipes.learn_online import (
    ONLINE_RECIPES,
    OnlineRecipe,
    find_online_recipe,
    learn_online,
    saved_online_settings,
)
from tessera.recipes.models import Standardize, mlp, small_mlp
from tessera.recipes.prequential import OnlineProgress, OnlineRun, OnlineSettings
from tessera.recipes.run import Progress, Run
from tessera.recipes.settings import Settings
from tessera.recipes.trained import trained_model

__all__ = [
    "ONLINE_RECIPES",
    "RECIPES",
    "OnlineProgress",
    "OnlineRecipe",
    "OnlineRun",
    "OnlineSettings",
    "Progress",
    "Recipe",
    "Run",
    "Settings",
    "Standardize",
    "find_online_recipe",
    "find_recipe",
    "learn",
    "learn_online",
    "mlp",
    "saved_online_settings",
    "saved_settings",
    "small_mlp",
    "trained_model",
]
