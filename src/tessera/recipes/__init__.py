"""One continual-learning run each, as a short function to copy."""

from tessera.recipes.baselines import finetune, joint
from tessera.recipes.learn import RECIPES, Recipe, find_recipe, learn, saved_settings
from tessera.recipes.models import mlp
from tessera.recipes.penalties import ewc, l2sp, lwf, online_ewc, si
from tessera.recipes.replay import der, er, er_ewc
from tessera.recipes.run import Progress, Run
from tessera.recipes.settings import Settings

__all__ = [
    "RECIPES",
    "Progress",
    "Recipe",
    "Run",
    "Settings",
    "der",
    "er",
    "er_ewc",
    "ewc",
    "find_recipe",
    "finetune",
    "joint",
    "l2sp",
    "learn",
    "lwf",
    "mlp",
    "online_ewc",
    "saved_settings",
    "si",
]
