"""Parameter-efficient fine-tuning: small deltas over a base that stays as it is."""

from tessera.peft.apply import Applied, apply
from tessera.peft.ia3 import ia3
from tessera.peft.lora import lora
from tessera.peft.mask import mask
from tessera.peft.stack import stack
from tessera.peft.virtual import prefix, prompt

__all__ = ["Applied", "apply", "ia3", "lora", "mask", "prefix", "prompt", "stack"]
