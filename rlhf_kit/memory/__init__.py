"""What a stage will need before it starts, in GiB by part, which knob makes it fit, and what it really took."""

from rlhf_kit.memory.advice import Advice, Turn, advise
from rlhf_kit.memory.estimating import STAGES, Estimate, estimate
from rlhf_kit.memory.measuring import Measured, device_memory, measure

__all__ = ["STAGES", "Advice", "Estimate", "Measured", "Turn", "advise", "device_memory", "estimate", "measure"]
