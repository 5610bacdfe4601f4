"""Tasks: where prompts, demonstrations and preferences come from. Nothing else in the kit asks which task it has."""
# ruff: noqa: F401 (these imports are what this room offers)

from rlhf_kit.tasks.pairs import Pairs
from rlhf_kit.tasks.pocket import Pocket
from rlhf_kit.tasks.task import Task
