"""What a stage will need before it starts, in GiB by part, which knob makes it fit, and what it really took."""

from rlhf_kit.memory.advice import Advice, Turn, advise
from rlhf_kit.memory.estimating import STAGES, Estimate, Shape, estimate
from rlhf_kit.memory.ledger import DYNAMIC, STATIC
from rlhf_kit.memory.measuring import Measured, device_memory, measure

PARTS = (*STATIC, *DYNAMIC)

__all__ = [
    "PARTS",
    "STAGES",
    "Advice",
    "Estimate",
    "Measured",
    "Shape",
    "Turn",
    "advise",
    "device_memory",
    "estimate",
    "measure",
]
