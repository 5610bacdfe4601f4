"""Tasks: where prompts, demonstrations and preferences come from. Nothing else in the kit asks which task it has."""

from rlhf_kit.tasks.pairs import Pairs
from rlhf_kit.tasks.pocket import Pocket
from rlhf_kit.tasks.task import Task

__all__ = ["Pairs", "Pocket", "Task"]
