"""What a notebook's first cell needs: `setup` sets seed, threads, quiet logs and plot style, and says where it runs."""

import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import set_seed

from rlhf_kit import plots, presets
from rlhf_kit.models import device
from rlhf_kit.presets import Preset
from rlhf_kit.progress import quiet


def setup(preset: str | None = None, seed: int = 0, data: str | None = None, base_model: str | None = None) -> Preset:
    """Make a notebook reproducible and quiet, print device and versions, and return the preset (`presets.preset`)."""
    quiet()
    plots.style()
    set_seed(seed)
    set_threads()
    where = torch.cuda.get_device_name() if device().type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    names = ("rlhf-kit", "torch", "transformers", "trl", "peft")
    print(f"{where}; Python {platform.python_version()}; " + ", ".join(f"{name} {version(name)}" for name in names))
    return presets.preset(preset, seed, data, base_model)


def set_threads(threads: int | None = None) -> None:
    """CPU threads: as given, else as OMP_NUM_THREADS says, else one.

    Two that wait for each other are many times slower than one as soon as anything else runs on a two-core machine.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or 1)


def results(name: str) -> Path:
    """The folder of an experiment under results/, also from notebooks/; RLHF_KIT_RESULTS names another root."""
    here = Path.cwd()
    root = os.environ.get("RLHF_KIT_RESULTS", (here.parent if here.name == "notebooks" else here) / "results")
    return Path(root) / name


def workspace(name: str) -> Path:
    """An empty folder results/notebooks/`name` for what a notebook makes: run again, the notebook begins anew."""
    folder = results("notebooks") / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
