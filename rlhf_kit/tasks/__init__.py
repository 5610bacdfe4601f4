"""Tasks: where prompts, demonstrations and preferences come from, and what is known of the truth.

Everything else in the kit asks a `Task` and never which one it is.
"""

from rlhf_kit.tasks.pairs import Pairs
from rlhf_kit.tasks.pocket import Pocket
from rlhf_kit.tasks.task import Task

__all__ = ["Pairs", "Pocket", "Task"]
