"""Shared fixtures: one thread, no network, the CPU, and a zoo of tiny models written once."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the tests' bounds are those of fp32 on a CPU

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        return  # the process that only hands out tests need not wait ten seconds for torch
    import torch

    from rlhf_kit.progress import quiet

    torch.set_num_threads(1)
    quiet()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The quick run takes full weights; what differs with adapters and in 4 bits is for the whole one."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, str) and value in ("lora", "4bit") for value in parameters):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What is imported stays: without this, each of the many gc.collect() of accelerate takes half a second."""
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    from rlhf_kit.tasks import Pocket

    return AutoTokenizer.from_pretrained(Pocket.base_model)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Directories: for each mode a policy (`full`), a second one (`full-other`) and a reward model (`full-reward`)."""
    import tiny

    root = tmp_path_factory.mktemp("zoo")
    base = tiny.save_llama(root / "full", tokenizer)
    models = {
        "full": base,
        "full-other": tiny.save_llama(root / "full-other", tokenizer, seed=1),
        "full-reward": tiny.save_reward(root / "full-reward", base, tokenizer, seed=2),
        "gpt2": tiny.save_gpt2(root / "gpt2", tokenizer),
        "words": tiny.save_llama(root / "words", tiny.word_tokenizer(), hidden=32, eos_logit=0.0),
        "words-other": tiny.save_llama(root / "words-other", tiny.word_tokenizer(), seed=1, hidden=32, eos_logit=0.0),
    }
    for mode in ("lora", "4bit"):
        for seed, (name, score) in enumerate((("", False), ("-other", False), ("-reward", True))):
            out = root / f"{mode}{name}"
            models[f"{mode}{name}"] = tiny.save_adapter(out, base, tokenizer, mode == "4bit", seed, score)
    return models


@pytest.fixture(params=["full", "lora", "4bit"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)
