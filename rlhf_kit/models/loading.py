"""Load and save models: full weights, LoRA adapters, 4-bit bases, their tokenizers and their heads."""

import json
import os
import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from safetensors import SafetensorError, safe_open
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

# What this kit stores beside Hugging Face's own files: {"load_in_4bit": bool, "dtype": str, "shift": float, ...}.
NOTES = "rlhf_kit.json"
MAX_COMPLETION_LENGTH = 64  # tokens: the default of everything that samples
LOADING = ("load_in_4bit", "dtype", "attn_implementation")  # how weights are loaded, named alike in every stage
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
NF4["llm_int8_skip_modules"] = ["lm_head", "score", "embed_out"]
Model: TypeAlias = PreTrainedModel | PeftModel
ModelPath: TypeAlias = str | Path
Lora: TypeAlias = LoraConfig | Mapping[str, Any]


class ModelError(ValueError):
    """A model directory or hub id that cannot be used, with the reason and what to do."""


def lora_config(lora: Lora | None) -> LoraConfig | None:
    """Settings of LoRA (Hu et al. 2021, 2106.09685) as peft's config, from a dict in LoraConfig's own names.

    Defaults of a dict: rank 16, scale lora_alpha / r = 2, no dropout, every linear layer but the output.
    """
    if lora is None:
        return None
    config = deepcopy(lora)  # peft writes the modules that it finds into its config
    if not isinstance(config, LoraConfig):
        rank = {"r": 16, "lora_alpha": 2 * config.get("r", 16)}
        config = LoraConfig(**{**rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config})
    if (start := config.init_lora_weights) not in (True, False, "gaussian", "orthogonal"):
        raise ModelError(f"init_lora_weights={start!r} changes the base, which is not saved with the adapter; use True")
    return config


def check_trainable(model: ModelPath, lora: Lora | None, **loading: Any) -> None:
    """ModelError for a new adapter over an adapter, and for 4-bit or bf16 weights to be trained without one."""
    if is_adapter(model) and lora is not None:
        raise ModelError(f"{model}: is an adapter already, and is trained on as it is; leave `lora` out")
    in_4bit, dtype = stored_as(model, **loading)
    if not is_adapter(model) and lora is None and (in_4bit or loading.get("dtype") and dtype != torch.float32):
        kind = "4-bit" if in_4bit else "bf16"  # in bf16 small updates would be rounded away
        raise ModelError(f'{model}: {kind} weights cannot be trained; pass `lora={{"r": 16}}` to train an adapter')


def check_one_device(args: transformers.TrainingArguments) -> None:
    """ValueError where transformers would split every batch over several GPUs, and so multiply its size."""
    if args.n_gpu > 1:
        raise ValueError(f"{args.n_gpu} GPUs are visible to one process; use `accelerate launch`, or show it one only")
    if args.world_size == 1 and {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys():  # of several, it sets both
        problem = "accelerate launch was asked for several processes and started one, as it does with --cpu"
        warnings.warn(f"{problem}; give it `--config_file experiments/accelerate/ddp.yaml`", stacklevel=3)


def device() -> torch.device:
    """The GPU where there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_adapter(model: ModelPath) -> bool:
    """Whether `model` is the directory of a LoRA adapter, whose base is another directory or hub id."""
    return (Path(model) / "adapter_config.json").is_file()


def base_of(model: ModelPath) -> str:
    """The model that an adapter was trained on; for full weights, the model itself."""
    return str(PeftConfig.from_pretrained(str(model)).base_model_name_or_path) if is_adapter(model) else str(model)


def same_base(model: ModelPath, other: ModelPath) -> bool:
    """Whether two models have the same base weights."""
    return Path(base_of(model)).resolve() == Path(base_of(other)).resolve()


def read_notes(model: ModelPath) -> dict[str, Any]:
    """What this kit stored about a model when it saved it; {} where another program did. ModelError if damaged."""
    path = Path(model) / NOTES
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: is damaged ({error}); mend it, or take the model as it was saved") from error


def is_4bit(model: ModelPath, load_in_4bit: bool | None) -> bool:
    """Whether to load `model` in 4 bits: as asked, or where None, as its notes or its base's own config say."""
    own = _own_4bit(model)
    if load_in_4bit is None:
        return own or bool(read_notes(model).get("load_in_4bit"))
    if own and not load_in_4bit:
        raise ModelError(f"{model}: its base is stored in 4 bits, and cannot be loaded in full; leave load_in_4bit out")
    return load_in_4bit


def frozen_dtype(dtype: str | None, notes: Mapping[str, Any], on_gpu: bool) -> torch.dtype:
    """The dtype of weights that do not train: as asked, or where None as noted, else bf16 on a GPU, fp32 on a CPU."""
    name = dtype or notes.get("dtype") or ("bfloat16" if on_gpu else "float32")
    if name not in DTYPES:
        raise ModelError(f"dtype={name!r}: choose float32 or bfloat16; scores and gradients overflow in float16")
    return DTYPES[name]


def stored_as(model: ModelPath, load_in_4bit: bool | None = None, dtype: str | None = None, **_: Any) -> Any:
    """Whether the frozen base of `model` is loaded in 4 bits, and the dtype of what is not quantised."""
    return is_4bit(model, load_in_4bit), frozen_dtype(dtype, read_notes(model), device().type == "cuda")


def _own_4bit(model: ModelPath) -> bool:
    """Whether the base weights are stored in 4 bits."""
    stored = getattr(load_config(model), "quantization_config", None) or {}
    if stored and not stored.get("load_in_4bit"):
        raise ModelError(f"{model}: its base is quantised, but not in bitsandbytes' 4 bits; take its full weights")
    return bool(stored)


def write_notes(model: ModelPath, **notes: Any) -> None:
    """Add `notes` to those of a model directory."""
    (Path(model) / NOTES).write_text(json.dumps({**read_notes(model), **notes}, indent=2) + "\n")


def write_loading(model: ModelPath, trained: Model) -> None:
    """Note in a model's directory how its base was loaded, so that it is loaded and scores as it was trained."""
    dtype = str(trained.get_input_embeddings().weight.dtype).removeprefix("torch.")
    write_notes(model, load_in_4bit=bool(getattr(trained, "is_loaded_in_4bit", False)), dtype=dtype)


def load_tokenizer(model: ModelPath) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. It pads on the left, and not with EOS, which score heads would skip as padding.

    ModelError where there is no other token to pad with, or no embedding for a token in use.
    """
    source = model if (Path(model) / "tokenizer_config.json").is_file() else base_of(model)
    tokenizer = _load(transformers.AutoTokenizer.from_pretrained, source, padding_side="left")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{source}: its tokenizer has no EOS token, so completions could never end; set `eos_token`")
    in_use = f"{tokenizer.chat_template} {tokenizer.eos_token} {tokenizer.bos_token}"
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = _spare_token(tokenizer, in_use, source)
    in_use += f" {tokenizer.pad_token}"
    rows, added = load_config(model).get_text_config().vocab_size, tokenizer.get_added_vocab()
    # Some models add a token that no text of theirs holds (Gemma 3 one for images), without an embedding.
    if beyond := [t for t, row in tokenizer.get_vocab().items() if row >= rows and (t not in added or t in in_use)]:
        raise ModelError(f"{source}: token {beyond[0]!r} is beyond the model's {rows}; take the model's own tokenizer")
    _add_no_end(tokenizer)
    return tokenizer


def _add_no_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the tokenizer put nothing after a text: a prompt that ends in EOS could not be continued."""
    bare, ids = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    before: list[int] = next((ids[:k] for k in range(len(ids) - len(bare), 0, -1) if ids[k:][: len(bare)] == bare), [])
    if before + bare != ids:
        begin = [(str(tokenizer.convert_ids_to_tokens(token)), token) for token in before]
        single = " ".join([*(f"{token}:0" for token, _ in begin), "$A:0"])
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=begin)


def _spare_token(tokenizer: PreTrainedTokenizerBase, in_use: str, source: ModelPath) -> str:
    """A token to pad with, which decoding leaves out: a special token not `in_use`, or else the NUL byte's token."""
    spare = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special and str(t) not in in_use]
    spare.sort(key=lambda token: ("pad" not in token.lower(), token != tokenizer.unk_token, "reserved" not in token))
    for token in (*spare, "\u0100", "<0x00>"):  # the NUL byte as byte-level BPE and as sentencepiece write it
        if token in tokenizer.get_vocab():
            return token
    raise ModelError(f"{source}: its tokenizer has no token to pad with except EOS; set a `pad_token` that no text has")


@torch.random.fork_rng()  # loading an adapter draws random numbers, and those of a run must not depend on when it loads
def load_causal(model: ModelPath, trainable: bool = False, auto: Any = AutoModelForCausalLM, **loading: Any) -> Any:
    """A causal LM from full weights or an adapter: to train, or frozen, in eval mode and on the device.

    loading: `load_in_4bit`, `dtype` of what does not train ("float32", "bfloat16"), and `attn_implementation`. None
    loads as the notes say, else bf16 on a GPU. ModelError where `model` is no causal LM, or cannot be trained.
    """
    if trainable:
        check_trainable(model, None, **loading)
        loading |= {} if is_adapter(model) else {"dtype": "float32"}
    loaded = load_base(model, auto.from_pretrained, **loading)
    if is_adapter(model):
        loaded = with_adapter(loaded, model, trainable)
    if trainable:
        return loaded
    loaded.requires_grad_(False).eval()
    return loaded if getattr(loaded, "is_loaded_in_4bit", False) else loaded.to(device())


def with_adapter(base: PreTrainedModel, model: ModelPath, trainable: bool, name: str = "default") -> PeftModel:
    """The base with the adapter of `model` on it, by that name; ModelError where it is no LoRA or does not fit."""
    if (kind := PeftConfig.from_pretrained(str(model)).peft_type) != PeftType.LORA:
        raise ModelError(f"{model}: is an adapter of the kind {kind.value}; this kit knows LoRA only")
    try:
        return PeftModel.from_pretrained(base, str(model), adapter_name=name, is_trainable=trainable)
    except RuntimeError as error:  # PyTorch's, of weights in another shape
        vocabulary = base.get_input_embeddings().weight.shape[0]
        raise ModelError(
            f"{model}: does not fit on its base {base_of(model)}, which has a vocabulary of {vocabulary} "
            f"({' '.join(str(error).split())[:200]}); merge the adapter into a base of its own size first"
        ) from None


def load_base(model: ModelPath, from_pretrained: Any, load_in_4bit: bool | None = None, **kwargs: Any) -> Any:
    """The base weights of `model` by an Auto class's `from_pretrained`, as `stored_as` says (NF4: 2305.14314)."""
    base, (in_4bit, kwargs["dtype"]) = base_of(model), stored_as(model, load_in_4bit, kwargs.get("dtype"))
    saved_by = str(load_config(model).architectures)
    if "Classification" in saved_by and from_pretrained == AutoModelForCausalLM.from_pretrained:
        raise ModelError(f"{base}: is a {saved_by} without a language model's head; name a causal language model")
    if in_4bit:
        kwargs["device_map"] = {"": device()}
        if not _own_4bit(model):
            kwargs["quantization_config"] = transformers.BitsAndBytesConfig(
                **NF4, bnb_4bit_compute_dtype=kwargs["dtype"]
            )
    loaded, keys = _load(from_pretrained, base, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    # The weights of a head may be left over, but of no numbered layer.
    beyond = {key for key in keys["unexpected_keys"] if any(map(str.isdigit, key.split(".")))}
    if wrong := beyond | {key for key, *_ in keys["mismatched_keys"]}:
        raise ModelError(f"{base}: its weights are not of its config's sizes at {min(wrong)} (one of {len(wrong)})")
    if missing := sorted(set(keys["missing_keys"]) - {"score.weight"}):
        raise ModelError(f"{base}: its weights lack {missing[0]} (one of {len(missing)}), which would be random")
    settings = getattr(loaded, "generation_config", None)
    if settings is not None and settings.temperature is not None:
        settings.do_sample = True  # a temperature without sampling is refused when the model is saved
    for module in loaded.modules():
        # On CPUs with AVX512-BF16 one forward pass without gradients would repack the weights, and then the LoRA
        # gradients vanish. bitsandbytes has no public switch for this.
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return loaded


def load_backbone(model: ModelPath, **loading: Any) -> PreTrainedModel:
    """The transformer of a causal LM or a reward model without its head: token ids to hidden states (B, T, D)."""
    if is_adapter(model):  # a reward adapter fits on the causal base: it has the keys of a causal LM's, and its head
        return decoder(load_causal(model, **loading))
    return load_causal(model, auto=transformers.AutoModel, **loading)


def decoder(model: Model) -> PreTrainedModel:
    """The transformer inside a causal LM, with the adapter that is active."""
    return model.get_decoder()


def read_score_head(reward_model: ModelPath) -> torch.Tensor:
    """The score head (1, D) of a reward model, full or adapter, in fp32; ModelError where it has none."""
    heads: list[torch.Tensor] = []
    for file in sorted(Path(reward_model).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                heads += [tensors.get_tensor(key) for key in tensors.keys() if key.endswith("score.weight")]  # noqa: SIM118
        except SafetensorError as error:
            raise ModelError(f"{file}: is damaged ({error}); copy or train it again") from error
    if not heads:
        raise ModelError(
            f"{reward_model}: no `score.weight` in its safetensors; it is not a reward model of a causal LM"
        )
    if len(heads[0]) != 1:
        raise ModelError(f"{reward_model}: its score head has {len(heads[0])} outputs; a reward model needs one")
    return heads[0].float()


def load_config(model: ModelPath) -> transformers.PreTrainedConfig:
    """The config of a model or of an adapter's base; needs no weights. ModelError where it is no causal LM's."""
    source = base_of(model)
    config = _load(transformers.AutoConfig.from_pretrained, source)
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if masked or config.is_encoder_decoder:
        raise ModelError(f"{source}: is or has an encoder ({config.model_type}); name a causal language model")
    return config


def max_length(model: ModelPath) -> int | None:
    """How many tokens the model can attend to; None where its config does not say."""
    return getattr(load_config(model).get_text_config(), "max_position_embeddings", None)


def _load(from_pretrained: Any, model: ModelPath, **kwargs: Any) -> Any:
    """What `from_pretrained` returns; a failure becomes a ModelError of one sentence."""
    path = Path(model)
    kwargs["trust_remote_code"] = False  # otherwise transformers asks on the terminal, and a "y" runs the model's code
    if path.is_dir() and not ((path / "config.json").is_file() or (path / "adapter_config.json").is_file()):
        raise ModelError(f"{model}: this directory holds no model (no config.json, no adapter_config.json)")
    is_path = path.exists() or path.is_absolute() or str(model).startswith(".") or len(path.parts) > 2
    if is_path and not path.is_dir():
        raise ModelError(f"{model}: no such model directory; name one that save_pretrained wrote, or a hub id")
    try:
        # An adapter remembers the path of its base, and will be loaded from other folders.
        return from_pretrained(str(path.resolve() if path.is_dir() else model), **kwargs)
    except Exception as error:  # damaged files end in a dozen families of errors, and each should read as one sentence
        reason = str(error.__cause__ if isinstance(error, StrictDataclassError) else error).strip().split("\n")[0]
        if "Unrecognized configuration class" in reason:
            auto = from_pretrained.__self__.__name__
            reason = f"transformers has no {auto.removeprefix('AutoModelFor')} of this family of models"
        where = "this directory" if path.is_dir() else "no such directory here, and the hub gave no such model"
        raise ModelError(f"{model}: {where} ({reason})") from error
