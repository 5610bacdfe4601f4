"""Models, tokenizers, templates and rows as people bring them: what is trained is what is sampled and scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_train import COMMON, DEMONSTRATIONS, PREFERENCES, PROMPTS
from tiny import save_llama
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_kit import data, feedback, models, sampling, train
from rlhf_kit.data import DataError
from rlhf_kit.feedback import Answer
from rlhf_kit.models import ModelError
from rlhf_kit.ppo import PPOConfig, PPOTrainer
from rlhf_kit.rewards import RewardModel

FEW: dict[str, Any] = {**COMMON, "max_steps": 2, "max_length": 60}
# An answer's turn ends with a token that is not EOS, as in the chats of many base models.
TURNS = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '<|over|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    "{{ '<|turn|>' + m['role'] + '\n' + (m['content'] | trim) + '<|over|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
THINKING = TURNS.replace("assistant\n'", "assistant\nthink: '")


def chat_of(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    made = PreTrainedTokenizerFast.from_pretrained(tokenizer.name_or_path)
    made.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|over|>"]})
    made.chat_template = template
    return made


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


PAIRS = {
    "chosen": [said(text) for text in PREFERENCES["chosen"]],
    "rejected": [said(text) for text in PREFERENCES["rejected"]],
}
CHATS = Dataset.from_dict({"prompt": [user(text) for text in PROMPTS], **PAIRS})


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> str:
    return save_llama(tmp_path_factory.mktemp("chatty") / "model", chat_of(tokenizer, TURNS))


def longer(reward: str = "n_tokens") -> Any:
    """A rater that prefers the longer answer."""

    def rater(prompt: Any, completions: Any, question: str) -> Answer:
        lengths = [len(str(completion)) for completion in completions]
        return Answer(ranks=tuple(1 + sum(other > length for other in lengths) for length in lengths))

    rater.name = "longer"  # type: ignore[attr-defined]
    return rater


def test_a_chat_stays_a_chat_from_its_sample_to_every_trainer(chatty: str, tmp_path: Path) -> None:
    samples = sampling.sample(chatty, CHATS.select_columns(["prompt"]), n=2, max_completion_length=6)
    assert all(completion[0]["role"] == "assistant" for completion in samples["completion"])
    pairs = feedback.collect(samples, longer())
    data.check(pairs, tokenizer=models.load_tokenizer(chatty))
    reward = train.reward_model(chatty, pairs, str(tmp_path / "reward"), **FEW)
    train.dpo(chatty, pairs, tmp_path / "dpo", **FEW)
    kto = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"} for row in pairs for side in PAIRS
    ]
    train.kto(chatty, Dataset.from_list(kto), tmp_path / "kto", **FEW)
    scored = sampling.add_rewards(samples, {"reward": RewardModel(reward)})
    assert scored["reward"].map(pd.notna).all() and scored["reward"].nunique() > 4


def test_the_token_that_closes_a_turn_ends_a_completion_and_is_saved(chatty: str, tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(chatty)
    over = tokenizer.convert_tokens_to_ids("<|over|>")
    rows = Dataset.from_dict({"prompt": CHATS["prompt"][:], "completion": [said("yes .")] * 8})
    out = train.sft(chatty, rows, tmp_path / "sft", **{**FEW, "max_steps": 60, "learning_rate": 1e-2})
    assert over in json.loads((tmp_path / "sft" / "generation_config.json").read_text())["eos_token_id"]
    samples = sampling.sample(out, rows.select_columns(["prompt"]), max_completion_length=12, temperature=0)
    assert samples["finished"].all() and samples["completion"].map(lambda chat: chat[0]["content"]).eq("yes .").all()


class TestTokens:
    """Special tokens come once, and no space is lost."""

    def spaced(self, tokenizer: PreTrainedTokenizerBase, **special: Any) -> PreTrainedTokenizerFast:
        """Words with the space before them, whose decoder drops a first one, as sentencepiece does."""
        words = ["<s>", "</s>", "<pad>", *"▁abcdefghijklmnopqrstuvwxyz?.", "▁the", "▁owl"]
        inner = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], ignore_merges=True))
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        inner.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
        inner.post_processor = TemplateProcessing(single="<s>:0 $A:0 </s>:0", special_tokens=[("<s>", 0), ("</s>", 1)])
        return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")

    def test_a_tokenizer_that_ends_texts_and_drops_spaces(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        path = save_llama(tmp_path / "spaced", self.spaced(tokenizer))
        loaded = models.load_tokenizer(path)
        plain, rendered = models.encode(loaded, ["the owl", "<s>the owl"])
        assert plain == rendered and plain[0] == 0 and plain.count(0) == 1 and 1 not in plain
        tokens = models.encode_pairs(loaded, ["the owl"] * 2, [" the owl .", " the owl .</s>"])
        assert tokens.input_ids[0].equal(tokens.input_ids[1]) and tokens.input_ids[0].tolist().count(1) == 1
        assert models.decode_completions(loaded, tokens) == [" the owl ."] * 2

    def test_what_is_rendered_beforehand_is_trained_and_scored_as_what_is_not(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        path = save_llama(tmp_path / "spaced", self.spaced(tokenizer))
        plain = Dataset.from_dict(
            {"prompt": ["the owl ?", "the ?"], "chosen": [" yes .", " a ."], "rejected": [" no .", " b ."]}
        )
        marked = plain.map(lambda row: {"prompt": f"<s>{row['prompt']}", "chosen": f"{row['chosen']}</s>"})
        scores = []
        for name, rows in (("plain", plain), ("marked", marked)):
            reward = RewardModel(train.reward_model(path, rows, tmp_path / name, **{**FEW, "max_steps": 3}))
            scores.append([*reward(rows["prompt"][:], rows["chosen"][:]), *reward(["the ?"], [" no ."])])
        assert scores[0] == scores[1]


def fault_of(template: str, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str:
    with pytest.raises(DataError) as error:
        data.check(Dataset.from_list(rows), ("prompt", "chosen", "rejected"), "mine", chat_of(tokenizer, template))
    return str(error.value)


@pytest.mark.parametrize(
    ("template", "change", "words"),
    [
        (
            STRICT,
            {"prompt": [{"role": "system", "content": "be kind"}, *user("a ?")]},
            ["row 1", "no system turns here"],
        ),
        (THINKING, {}, ["row 0", "think: ", "generation prompt"]),
        (TURNS, {"chosen": [*said("a"), *user("b ?"), *said("c")]}, ["row 1", "'chosen'", "assistant messages only"]),
    ],
)
def test_a_row_that_a_template_does_not_take_is_named(
    template: str, change: dict[str, Any], words: list[str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [dict(CHATS[0]), {**CHATS[1], **change}]
    message = fault_of(template, rows, tokenizer)
    assert all(word in message for word in ("mine", *words)), message
    model = save_llama(tmp_path / "model", chat_of(tokenizer, template))
    with pytest.raises(DataError, match=words[0]):
        train.dpo(model, Dataset.from_list(rows), tmp_path / "dpo", **FEW)
    assert not (tmp_path / "dpo").exists()


def test_a_text_before_chats_is_named_with_the_step_that_mends_it(chatty: str) -> None:
    dataset = Dataset.from_dict({**CHATS.to_dict(), "prompt": PROMPTS})
    with pytest.raises(DataError, match=r"row 0 .*'chosen'.*remove_columns\('prompt'\)"):
        data.check(dataset, tokenizer=models.load_tokenizer(chatty))


def test_parts_of_text_are_joined_and_other_parts_refused(chatty: str) -> None:
    tokenizer = models.load_tokenizer(chatty)
    parts = [{"role": "user", "content": [{"type": "text", "text": "where "}, {"type": "text", "text": "?"}]}]
    [row] = data.ready(Dataset.from_dict({"prompt": [parts]}), tokenizer, ["prompt"])["prompt"]
    assert row == user("where ?") and models.encode(tokenizer, [parts]) == models.encode(tokenizer, [row])
    picture = [{"role": "user", "content": [{"type": "image"}]}]
    with pytest.raises(DataError, match="row 0.*not text"):
        sampling.sample(chatty, Dataset.from_dict({"prompt": [picture]}))
    with pytest.raises(DataError, match="column 'tools'"):
        sampling.sample(chatty, Dataset.from_dict({"prompt": [user("a ?")], "tools": ["[{}]"]}))


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "reward_model"])
def test_rows_that_are_too_long_are_counted_aloud_and_none_left_is_an_error(
    zoo: Any, tmp_path: Path, method: str
) -> None:
    long = {"prompt": "where " * 50, "completion": " x", "chosen": " x", "rejected": " y", "label": True}
    columns = {**DEMONSTRATIONS.to_dict(), **PREFERENCES.to_dict(), "label": [True, False] * 4}
    rows = [*Dataset.from_dict(columns), long, long]
    keep = {"sft": ["prompt", "completion"], "kto": ["prompt", "completion", "label"]}.get(
        method, ["prompt", "chosen", "rejected"]
    )
    dataset = Dataset.from_list(rows).select_columns(keep)
    with pytest.warns(UserWarning, match="2 of 10 rows are left out.*max_length=40"):
        getattr(train, method)(zoo["full"], dataset, tmp_path / "out", **{**FEW, "max_length": 40})
    with pytest.raises(DataError, match="2 of 2 rows are left out.*max_length=.*none is left"):
        getattr(train, method)(zoo["full"], dataset.select([8, 9]), tmp_path / "none", **{**FEW, "max_length": 40})
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("method", ["sft", "dpo", "reward_model"])
def test_what_is_not_finite_stops_at_its_step_and_is_never_published(zoo: Any, tmp_path: Path, method: str) -> None:
    rows = DEMONSTRATIONS if method == "sft" else PREFERENCES
    with pytest.raises(ModelError, match=r"step \d+: the gradient is not finite"):
        getattr(train, method)(zoo["full"], rows, tmp_path / "fast", **{**FEW, "max_steps": 30, "learning_rate": 1e10})
    broken = AutoModelForCausalLM.from_pretrained(zoo["full"], dtype=torch.float32)
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    models.load_tokenizer(zoo["full"]).save_pretrained(tmp_path / "broken")
    with pytest.raises(ModelError, match="step 1: the gradient is not finite"):
        getattr(train, method)(tmp_path / "broken", rows, tmp_path / "out", **FEW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


@pytest.mark.parametrize("margin", [float("nan"), None, "much"])
def test_a_margin_that_is_no_number_is_named_before_training(zoo: Any, tmp_path: Path, margin: Any) -> None:
    margins: list[Any] = [0.5] * 8 if not isinstance(margin, str) else ["0.5"] * 8
    rows = PREFERENCES.add_column("margin", [*margins[:3], margin, *margins[4:]])
    with pytest.raises(DataError, match="column 'margin'.*finite number"):
        train.reward_model(zoo["full"], rows, tmp_path / "out", **FEW)


def test_a_generation_config_that_would_not_save_is_mended_before_training(zoo: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(zoo["full"], dtype=torch.float32)
    model.save_pretrained(tmp_path / "warm")
    models.load_tokenizer(zoo["full"]).save_pretrained(tmp_path / "warm")
    settings = GenerationConfig.from_pretrained(zoo["full"]).to_dict() | {"temperature": 0.9, "do_sample": False}
    (tmp_path / "warm" / "generation_config.json").write_text(json.dumps(settings))
    args = PPOConfig(
        output_dir=str(tmp_path / "x"), max_steps=1, per_device_train_batch_size=8, max_completion_length=4
    )
    rule = lambda prompts, completions, **columns: [float(len(text)) for text in completions]  # noqa: E731
    trainer = PPOTrainer(tmp_path / "warm", rule, args, Dataset.from_dict({"prompt": PROMPTS}), callbacks=[])
    trainer.train()
    trainer.save_model(str(tmp_path / "ppo"))
    assert (tmp_path / "ppo" / "model.safetensors").exists()


def test_an_adapter_is_kept_whole_or_refused_by_name(
    zoo: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def adapted(name: str, config: Any, resize: int | None = None) -> Path:
        base = AutoModelForCausalLM.from_pretrained(zoo["full"], dtype=torch.float32)
        if resize:
            base.resize_token_embeddings(resize, mean_resizing=False)
        get_peft_model(base, config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    prompts = Dataset.from_dict({"prompt": PROMPTS[:2]})
    tuned = adapted("tuned", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ModelError, match="PROMPT_TUNING.*LoRA only"):
        sampling.sample(tuned, prompts)
    whole = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    resized = adapted("resized", LoraConfig(modules_to_save=["embed_tokens"], **whole), resize=600)
    with pytest.raises(ModelError, match="resized.*vocabulary of"):
        sampling.sample(resized, prompts)
    with pytest.raises(ModelError, match="embed_tokens.*merge"):
        train.reward_model(
            adapted("modules", LoraConfig(modules_to_save=["embed_tokens"], **whole)),
            PREFERENCES,
            tmp_path / "r",
            **FEW,
        )
    patterns = adapted("patterns", LoraConfig(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 9}, **whole))
    train.reward_model(patterns, PREFERENCES, tmp_path / "kept", **FEW)  # its reloaded scores are compared inside
    assert json.loads((tmp_path / "kept" / "adapter_config.json").read_text())["alpha_pattern"] == {"q_proj": 9}


def test_an_adapter_finds_its_base_from_another_folder(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(zoo["full"]).parent)
    out = train.sft("full", DEMONSTRATIONS, tmp_path / "sft", lora={"r": 2}, **FEW)
    monkeypatch.chdir(tmp_path)
    assert len(sampling.sample(out, Dataset.from_dict({"prompt": PROMPTS[:1]}), max_completion_length=2)) == 1


def test_a_base_that_is_stored_in_4_bits_is_loaded_so(zoo: Any, tmp_path: Path) -> None:
    stored = models.load_causal(zoo["full"], load_in_4bit=True)
    stored.save_pretrained(tmp_path / "stored")
    models.load_tokenizer(zoo["full"]).save_pretrained(tmp_path / "stored")
    assert models.is_4bit(tmp_path / "stored", None)
    prompts = Dataset.from_dict({"prompt": PROMPTS[:4]})
    ours, theirs = (
        sampling.sample(path, prompts, max_completion_length=6, temperature=0, load_in_4bit=four)["completion"].tolist()
        for path, four in ((tmp_path / "stored", None), (zoo["full"], True))
    )
    assert ours == theirs
    with pytest.raises(ModelError, match="stored in 4 bits"):
        models.load_causal(tmp_path / "stored", load_in_4bit=False)


# Names of ours, of pandas and of TRL: a person's column may have any of them.
OWN = "sample kl prompt_id finished n_tokens completion prompts self text images input_ids item labels trainer_state"


def test_own_columns_reach_a_reward_by_their_names_whatever_these_are(zoo: Any, tmp_path: Path) -> None:
    own = {name: [f"{name} {row}" for row in range(8)] for name in OWN.split()}
    prompts = Dataset.from_dict({"prompt": PROMPTS, **own})
    passed_on = set(own) - {"completion", "prompts", "self"}

    def reward(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        assert passed_on <= set(columns)
        for name in passed_on:
            assert columns[name] == [f"{name} {PROMPTS.index(prompt)}" for prompt in prompts]
        return [float(len(text)) for text in completions]

    samples = sampling.sample(zoo["full"], prompts, n=2, max_completion_length=3, reference=zoo["full"])
    scored = sampling.add_rewards(samples, {"score": reward})
    assert scored["score"].tolist() == scored["completion"].map(len).tolist() and scored["kl"].abs().max() < 1e-6
    assert scored["kl_dataset"].tolist() == [f"kl {row}" for row in range(8) for _ in range(2)]
    settings = COMMON | {"max_steps": 1, "max_completion_length": 3}
    train.grpo(zoo["full"], reward, prompts, tmp_path / "grpo", **settings)
    args = PPOConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=8, max_completion_length=3)
    PPOTrainer(zoo["full"], reward, args, prompts, callbacks=[]).train()


@pytest.mark.parametrize("method, rows", [("sft", DEMONSTRATIONS), ("dpo", PREFERENCES)])
def test_own_columns_are_not_trained_on(zoo: Any, tmp_path: Path, method: str, rows: Dataset) -> None:
    """TRL would train on `text`, take `images` for those of a prompt, and `input_ids` for its own tokens."""
    own = {
        name: [f"{name} {row}" for row in range(8)] for name in ("text", "images", "input_ids", "messages", "labels")
    }
    more = Dataset.from_dict(rows.to_dict() | own)
    outs = [getattr(train, method)(zoo["full"], each, tmp_path / str(i), **FEW) for i, each in enumerate((rows, more))]
    for one, other in zip(*(models.load_causal(out).parameters() for out in outs), strict=True):
        assert torch.equal(one, other)
