"""Fine-tuning: subnets of a run with classifiers, one at a time, or all of them in one elastic run."""

from poa.finetune.options import RECIPES, FinetuneConfig, recipe
from poa.finetune.train import finetune, resume

__all__ = ["RECIPES", "FinetuneConfig", "finetune", "recipe", "resume"]
