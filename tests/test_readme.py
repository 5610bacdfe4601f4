"""README.md tells the truth: its commands, targets, links, file tree and ten lines are those of the repository."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest

import rlhf_kit
from rlhf_kit import cli, presets

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^    .*(?:\n(?:    .*)?)*", README, re.MULTILINE)  # indented: commands, and the file tree
INLINE = re.findall(r"`([^`\n]+)`", README)
COMMANDS = [
    part.strip()
    for line in [*(line for block in BLOCKS for line in block.splitlines()), *INLINE]
    for part in line.split(" #")[0].split("&&")
    if part.strip().startswith(("make ", "rlhf-kit ", "python ", "conda "))
]


def test_there_are_commands_to_check() -> None:
    assert {command.split()[0] for command in COMMANDS} == {"make", "rlhf-kit", "python", "conda"}


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_each_command_exists(command: str) -> None:
    program, *words = shlex.split(command)
    if program == "rlhf-kit":
        options = cli._parser().parse_args(words)
        assert callable(options.run)
    elif program == "python":
        assert (ROOT / words[0]).is_file()
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        name = re.search(r"^name: (.+)$", (ROOT / "environment.yml").read_text(), re.MULTILINE)
        assert name and words in (["env", "create", "-f", "environment.yml"], ["activate", name[1]])


def test_links_to_files_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_file_tree_names_what_is_there_and_nothing_else() -> None:
    [tree] = [block for block in BLOCKS if "rlhf_kit/   " in block]
    top, _, rooms = tree.partition("    rlhf_kit/   ")
    named = {line.split()[0] for line in top.splitlines()}
    assert [name for name in named if not (ROOT / name).exists()] == []
    entries = [line for line in rooms.splitlines()[1:] if line.startswith(" " * 6) and line[6:7].strip()]
    listed = {line.split()[0].rstrip("/") for line in entries}
    package = ROOT / "rlhf_kit"
    there = {path.name for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    assert listed == there - {"__init__.py"}


def test_every_name_in_the_readmes_code_exists() -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    names = set(re.findall(r"\brk((?:\.\w+)+)", code))
    assert len(names) > 10
    for name in names:
        attrgetter(name[1:])(rlhf_kit)


@pytest.mark.slow
def test_the_ten_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, with a preset of the same shape and few steps."""
    ten = README[README.index("## Ten lines") :]
    [code] = re.findall(r"```python\n(.*?)```", ten, re.DOTALL)
    whole = presets.preset("pocket")
    few = {"max_steps": 2}
    tiny = replace(
        whole,
        sampling={"max_completion_length": 4},
        sft=whole.sft | few,
        reward_model=whole.reward_model | few,
        ppo=whole.ppo | few | {"per_device_train_batch_size": 8},
    )
    monkeypatch.setitem(presets.PRESETS, "pocket", lambda seed, task: replace(tiny, seed=seed))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "out" / "ppo" / "model.safetensors").is_file()
