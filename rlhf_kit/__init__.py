"""An experimentation kit for RLHF in notebooks: SFT, feedback, reward models, PPO and DPO, compared honestly.

import rlhf_kit as rk
preset = rk.setup("pocket", seed=0)
"""

import importlib
import logging
import os
import pkgutil
import warnings
from typing import Any

from huggingface_hub import constants

# A research kit reports nothing, whatever was imported before it, and no tokenizer forks in a data loader.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # of processes that are started from here
constants.HF_HUB_DISABLE_TELEMETRY = True
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Said by libraries, of no use here: no progress bar needs ipywidgets, 4-bit on a CPU no faster kernel, and peft and TRL
# ask transformers by an older name.
warnings.filterwarnings("ignore", message="IProgress not found|`is_gradient_checkpointing` is deprecated")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_ROOMS = [module.name for module in pkgutil.iter_modules(__path__)]
_KNOWN = {"ppo": ("PPOConfig", "PPOTrainer"), "rewards": ("RewardModel",), "sampling": ("best_of_n", "sample")}
_KNOWN |= {"notebook": ("results", "setup", "workspace"), "pipeline": ("Pipeline",), "rating": ("rate",)}
_NAMES = {name: room for room, names in _KNOWN.items() for name in names}
__all__ = [*_ROOMS, *_NAMES]


def __getattr__(name: str) -> Any:
    """Rooms and their best-known names are imported when first asked for, so that `import rlhf_kit` is instant."""
    if name in _ROOMS:
        return importlib.import_module(f"rlhf_kit.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"rlhf_kit.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'rlhf_kit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
