"""Parameter-efficient fine-tuning: small deltas over a base that stays as it is."""

from tessera.peft.apply import Applied, apply
from tessera.peft.arithmetic import ties, weighted_sum
from tessera.peft.classifier import Classifier, class_means
from tessera.peft.fit import fit
from tessera.peft.fit_many import fit_many
from tessera.peft.ia3 import ia3
from tessera.peft.lora import lora
from tessera.peft.mask import mask
from tessera.peft.merge import merge
from tessera.peft.stack import stack
from tessera.peft.virtual import prefix, prompt

__all__ = [
    "Applied",
    "Classifier",
    "apply",
    "class_means",
    "fit",
    "fit_many",
    "ia3",
    "lora",
    "mask",
    "merge",
    "prefix",
    "prompt",
    "stack",
    "ties",
    "weighted_sum",
]
