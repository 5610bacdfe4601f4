"""Checkpoints of PPO: resumed from only where they are whole, and only by the run that wrote them."""

import hashlib
import json
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from rlhf_kit import files, models
from rlhf_kit.models import Roles

STATE = (
    "ppo_state.json"  # the KL coefficient; in a checkpoint also what the run began with, and the sizes of the models
)
LAST = "trainer_state.json"  # Trainer writes it last


def check_writable(folder: str) -> None:
    """Make the folder; ValueError where it cannot be written to."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"PPO: output_dir {folder} cannot be written to ({error.strerror}); name another") from None


def content_of(dataset: Dataset | None) -> str | None:
    """A hash of the rows in their order; cells that are not JSON count by their type."""
    digest = hashlib.sha256()
    for row in dataset or ():
        digest.update(json.dumps(row, default=lambda cell: type(cell).__name__).encode())
    return None if dataset is None else digest.hexdigest()[:12]


def name_of(reward: Any) -> str:
    """A function by its name; a reward model by its folder and its head, which no other training would give."""
    if not isinstance(head := getattr(reward, "head", None), torch.Tensor):
        return str(getattr(reward, "__qualname__", type(reward).__name__))
    known = f"{head.tolist()} {reward.shift} {reward.scale}"
    return f"{Path(reward.path).name} {hashlib.sha256(known.encode()).hexdigest()[:12]}"


def write_state(out: Path, kl_coef: float, run: dict[str, Any] | None) -> None:
    """Write STATE: in a checkpoint with what the `run` began with, and the sizes of the files that are there now."""
    state: dict[str, Any] = {"kl_coef": kl_coef}
    if run is not None:
        written = [
            path for path in (*out.glob("*.*"), *out.glob("value/*")) if path.suffix in (".json", ".safetensors")
        ]
        sizes = {path.relative_to(out).as_posix(): path.stat().st_size for path in written if path.name != STATE}
        state |= {"run": run, "files": sizes}
    (out / STATE).write_text(json.dumps(state, indent=2) + "\n")


def newest_first(output_dir: str) -> list[Path]:
    """The folders of a run's checkpoints, whole or not."""
    return sorted(Path(output_dir).glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))


def to_resume(asked: str | Path | bool, output_dir: str, run: dict[str, Any]) -> str:
    """The checkpoint that is asked for, or for True the newest whole one.

    ValueError where it is not whole, names the file; where `run` began otherwise, names what differs.
    """
    for folder in newest_first(output_dir) if asked is True else [Path(str(asked))]:
        if not (problem := fault(folder)):
            if differing := "; ".join(files.differences(_read(folder / STATE)["run"], run)):
                remedy = "resume with the same settings, or begin a new run in another output_dir"
                raise ValueError(f"{folder} is of a run that began otherwise ({differing}): {remedy}")
            return str(folder)
        if asked is not True:
            raise ValueError(f"{folder} cannot be resumed from: {problem}")
        warnings.warn(f"{folder} is passed over: {problem}", stacklevel=3)
    raise ValueError(
        f"{output_dir}: no whole checkpoint to resume from; train from the start, with save_strategy='steps'"
    )


def fault(folder: Path) -> str:
    """The first file that a checkpoint lacks, or that is broken off; empty where it is whole."""
    state = _read(folder / STATE)
    sizes, processes = state.get("files", {}), state.get("run", {}).get("processes", 1)
    random = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    for name in (STATE, *sizes, "optimizer.pt", "scheduler.pt", *random, LAST):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing (a save that was broken off, or save_only_model)"
        whole = sizes.get(name, path.stat().st_size) == path.stat().st_size
        whole &= zipfile.is_zipfile(path) if path.suffix in (".pt", ".pth") else name != LAST or bool(_read(path))
        if not whole or "run" not in state:
            return f"{name} is not whole"
    return ""


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's object, or nothing where there is none."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


@torch.no_grad()
def check_saved(roles: Roles, out: Path, tokenizer: PreTrainedTokenizerBase, prompts: list[Any]) -> None:
    """ModelError where policy, value model or tokenizer read from `out` are not those in memory."""
    trained = [parameter.clone() for parameter in roles.learning]
    roles.load(out)
    read = zip(roles.trainable_parameters(), trained, strict=True)
    wrong = [name for (name, parameter), before in read if not torch.equal(parameter, before)]
    for parameter, before in zip(roles.learning, trained, strict=True):
        parameter.copy_(before)
    for role, folder in (("policy", out), ("value", out / "value")):
        module, adapter = roles.parts[role]
        now = module.config if adapter is None else module.peft_config[adapter]
        saved = models.load_config(folder) if adapter is None else PeftConfig.from_pretrained(str(folder))
        free = {"_name_or_path": None, "inference_mode": None}
        wrong += files.differences(now.to_dict() | free, saved.to_dict() | free, f"{role} config")
    if models.encode(models.load_tokenizer(out), prompts) != models.encode(tokenizer, prompts):
        wrong.append("the tokenizer")
    if wrong:
        raise models.ModelError(f"{out}: what was saved reads otherwise than what was trained: {'; '.join(wrong[:3])}")
