"""Tiny random models on disk, and the naive computations that the tests hold the kit against."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf_kit.models import Tokens, load_base, lora_config, write_notes
from rlhf_kit.models.rendering import EOS, PAD, wrap

MODES = ("full", "lora", "4bit")
# Words of a vocabulary small enough to enumerate: with EOS and PAD twelve tokens.
WORDS = ["a", "b", " c", " d", " e", " f", " g", " h", " i", " j"]


def word_tokenizer() -> PreTrainedTokenizerBase:
    """EOS 0, PAD 1 and one token for each of WORDS."""
    pieces = [EOS, PAD, *(word.replace(" ", "Ġ") for word in WORDS)]
    vocabulary = {piece: row for row, piece in enumerate(pieces)}
    return wrap(Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True)))


def _save(out: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return str(out)


def special(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a config must know of its tokenizer."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {"vocab_size": len(tokenizer), "bos_token_id": None, **ids}


def save_llama(
    out: Path, tokenizer: PreTrainedTokenizerBase, seed: int = 0, hidden: int = 64, eos_logit: float = 1.5
) -> str:
    """A Llama of two layers whose next-token distributions are far from uniform, with EOS likely to be sampled."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.25}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more, **special(tokenizer)))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.5  # a direction that is in every hidden state, for EOS to read
        model.lm_head.weight[tokenizer.eos_token_id, 0] = eos_logit
    return _save(out, model, tokenizer)


def save_gpt2(out: Path, tokenizer: PreTrainedTokenizerBase, dropout: float = 0.0) -> str:
    """Absolute positions: the architecture that shows every mistake with left padding."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = transformers.GPT2Config(**sizes, **drop, **special(tokenizer))
    return _save(out, transformers.GPT2LMHeadModel(config), tokenizer)


def save_adapter(
    out: Path, base: str, tokenizer: PreTrainedTokenizerBase, load_in_4bit: bool, seed: int = 0, score: bool = False
) -> str:
    """A LoRA adapter that is not the identity; with `score`, a reward model's."""
    torch.manual_seed(seed)
    auto: Any = AutoModelForSequenceClassification if score else AutoModelForCausalLM
    model = load_base(base, auto.from_pretrained, load_in_4bit, **({"num_labels": 1} if score else {}))
    kind = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if score else {}
    adapted = get_peft_model(model, lora_config({"r": 4, **kind}))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    _save(out, adapted, tokenizer)
    write_notes(out, load_in_4bit=load_in_4bit)
    return str(out)


def save_reward(out: Path, base: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> str:
    """A full reward model: the base with a random score head."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    return _save(out, model, tokenizer)


def score_head(directory: str) -> torch.Tensor:
    """(D,) found without the kit."""
    tensors = [item for file in Path(directory).glob("*.safetensors") for item in load_file(file).items()]
    [head] = [tensor for key, tensor in tensors if "score" in key]
    return head[0]


def layout(
    rows: list[tuple[list[int], list[int]]], pad: int, stops: list[int], left: int = 0, right: int = 0
) -> Tokens:
    """Tokens of (prompt, completion) rows by hand, with `left` and `right` columns of padding more than needed."""
    width = max(len(prompt) for prompt, _ in rows) + left
    length = max(len(completion) for _, completion in rows) + right
    ids, attention, mask = [], [], []
    for prompt, completion in rows:
        ends = [t for t, token in enumerate(completion) if token in stops]
        real = ends[0] + 1 if ends else len(completion)
        ids.append([pad] * (width - len(prompt)) + prompt + completion + [pad] * (length - len(completion)))
        mask.append([1] * real + [0] * (length - real))
        attention.append([0] * (width - len(prompt)) + [1] * len(prompt) + mask[-1])
    return Tokens(torch.tensor(ids), torch.tensor(attention), torch.tensor(mask))


def naive_logits(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """(len(completion), V): the model's own logits for each completion token, one row, no padding, no cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0].float()
    return logits[len(prompt) - 1 : -1]


def naive_logprobs(model: Any, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
    """(len(completion),) log-probs, token by token."""
    logits = naive_logits(model, prompt, completion)
    return torch.stack([torch.log_softmax(logits[t] / temperature, -1)[token] for t, token in enumerate(completion)])


def in_a_new_process(script: str, argument: object, **variables: str) -> Any:
    """What a script, given `argument` as JSON, prints after ANSWERS as JSON."""
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])} | variables
    command = [sys.executable, "-c", script, json.dumps(argument)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("ANSWERS")[1])
