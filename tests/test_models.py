"""rlhf_kit.models: log-probs, KL, masks and generation against naive loops and enumeration; loading and roles."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import layout, naive_logits, naive_logprobs, save_gpt2, score_head, word_tokenizer
from transformers import PreTrainedTokenizerBase

from rlhf_kit import models
from rlhf_kit.models import ModelError, Tokens
from rlhf_kit.models import logprobs as logprobs_module
from rlhf_kit.models.logprobs import check_logprobs

Zoo = dict[str, str]
EOS = 0
# Prompt and completion ids: unequal lengths, an empty completion (EOS at once), an EOS inside a prompt, one unfinished,
# the pad id 1 at the start of a prompt.
ROWS = [
    ([300, 301, 302, 303], [310, 311, EOS]),
    ([300], [EOS]),
    ([305, EOS, 306, 307, 308, 309, 300], [320, 321, 322, 323, 324]),
    ([1, 311, 312], [330, 330, 331, EOS]),
]
TOKENS = layout(ROWS, 1, [EOS])
# fp32 sums in another order (padding, batch): log-probs near -10 carry an error near 1e-6; a wrong position costs 0.1.
CLOSE = 2e-5


@pytest.fixture(params=["full", "lora", "4bit", "gpt2"])
def model(request: pytest.FixtureRequest, zoo: Zoo) -> models.Model:
    return models.load_causal(zoo[request.param])


def logprobs_of(model: models.Model, tokens: Tokens = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return models.completion_logprobs(model, tokens)[0]


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_entropy_equal_the_naive_loop(model: models.Model, temperature: float) -> None:
    with torch.no_grad():
        ours, entropy = models.completion_logprobs(model, TOKENS, temperature, with_entropy=True)
    for row, (prompt, completion) in enumerate(ROWS):
        real, logits = slice(len(completion)), naive_logits(model, prompt, completion)
        assert torch.allclose(ours[row, real], naive_logprobs(model, prompt, completion, temperature), atol=CLOSE)
        p = (logits.double() / temperature).softmax(-1)
        assert torch.allclose(entropy[row, real].double(), -(p * p.log()).sum(-1), atol=CLOSE)
    assert not ours[TOKENS.completion_mask == 0].any() and not entropy[TOKENS.completion_mask == 0].any()


def test_a_rows_logprobs_do_not_depend_on_its_company(model: models.Model) -> None:
    """The same alone, left-padded, under another pad id, with pad == EOS, in a bigger batch and in micro-batches."""
    layouts = [TOKENS, layout(ROWS, 1, [EOS], left=5, right=3), layout(ROWS, 400, [EOS], left=2)]
    layouts += [layout(ROWS, EOS, [EOS], left=2, right=2), layout(ROWS * 3, 1, [EOS])]
    together = [logprobs_of(model, tokens) for tokens in layouts]
    for row, pair in enumerate(ROWS):
        real = slice(len(pair[1]))
        alone = logprobs_of(model, layout([pair], 1, [EOS]))[0, real]
        micro = logprobs_of(model, TOKENS.rows(torch.tensor([row, 0])))[0]
        for other in (*(each[row] for each in together), together[-1][row + 4], micro):
            assert torch.allclose(other[real], alone, atol=CLOSE)


def test_chunked_equals_full_with_gradients(zoo: Zoo, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = models.load_causal(zoo[mode], trainable=True).eval(), models.load_causal(zoo["full-other"])
    weights = torch.linspace(-1, 2, TOKENS.completion_mask.numel()).view(TOKENS.completion_mask.shape)

    def run() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        logprobs, entropy = models.completion_logprobs(model, TOKENS, 0.9, with_entropy=True)
        found = gradients(model, ((logprobs + 0.3 * entropy) * weights).sum())
        return [each.detach() for each in (logprobs, entropy, models.completion_kl(model, other, TOKENS))], found

    whole, whole_gradients = run()
    calls: list[int] = []
    checkpoint = logprobs_module.checkpoint
    monkeypatch.setattr(logprobs_module, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    monkeypatch.setattr(logprobs_module, "LOGITS_CHUNK_GIB", 3 * 4 * model.config.vocab_size / 2**30)
    chunked, chunked_gradients = run()
    assert len(calls) == 2 * math.ceil(int(TOKENS.completion_mask.sum()) / 3)
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(whole, chunked, strict=True)) and whole[2].min() > 0.1
    assert whole_gradients.keys() == chunked_gradients.keys() and len(whole_gradients) > 3
    for name, gradient in whole_gradients.items():
        assert torch.allclose(gradient, chunked_gradients[name], atol=1e-5 * gradient.abs().max().item()), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_policy_and_value_gradients_with_and_without_checkpointing(zoo: Zoo, mode: str, checkpointing: bool) -> None:
    """Against a plain forward and backward of the policy's own model, loaded alone.

    In 4 bits a forward without gradients comes first, as load_roles checks the log-probs; on CPUs with AVX512-BF16
    bitsandbytes would then repack the weights, and the gradients would vanish.
    """
    roles = models.load_roles(zoo[mode], value=zoo[f"{mode}-reward"])
    roles.train()
    if checkpointing:
        roles.activation_checkpointing_enable()
    models.completion_logprobs(roles.use("policy"), TOKENS)[0].sum().backward()
    roles.values(TOKENS).sum().backward()
    ours = {name: p.grad for name, p in roles.trainable_parameters()}
    alone = models.load_causal(zoo[mode], trainable=True)
    expected = gradients(alone, models.completion_logprobs(alone, TOKENS)[0].sum())
    assert expected and max(g.abs().max() for g in expected.values()) > 0.1
    for name, gradient in expected.items():
        role_name = f"policy.{name}".replace(".default.", ".policy.")
        assert torch.allclose(ours[role_name], gradient, atol=1e-4 * gradient.abs().max().item()), name
    value = [gradient for name, gradient in ours.items() if name.startswith("value.")]
    assert value and all(gradient is not None and gradient.abs().max() > 0 for gradient in value)
    assert all(p.grad is None for p in roles.parameters() if not p.requires_grad)


def small(config: type[Any], **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    more |= {"vocab_size": 40, "num_key_value_heads": 2}
    model = transformers.AutoModelForCausalLM.from_config(config(**sizes, **more)).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    return model


def test_what_a_model_does_to_its_logits_is_done_to_log_probs_or_refused() -> None:
    row = [5, 6], [7, 8, 9]
    for model in (
        small(transformers.Gemma2Config, head_dim=16, final_logit_softcapping=2.0),
        small(transformers.GraniteConfig, logits_scaling=8.0),
        small(transformers.CohereConfig, logit_scale=0.25),
    ):
        assert torch.allclose(logprobs_of(model, layout([row], 1, [0]))[0], naive_logprobs(model, *row), atol=CLOSE)
        check_logprobs(model)
    model = small(transformers.LlamaConfig)
    model.register_forward_hook(lambda module, given, output: setattr(output, "logits", 3 * output.logits))
    with pytest.raises(ValueError, match="LlamaForCausalLM.*not supported"):
        check_logprobs(model)


def test_values_equal_the_head_on_a_row_alone_and_see_only_tokens_before(zoo: Zoo, mode: str) -> None:
    reward = zoo[f"{mode}-reward"]
    roles, backbone, head = models.load_roles(zoo[mode], value=reward), models.load_backbone(reward), score_head(reward)
    with torch.no_grad():
        values = roles.eval().values(layout(ROWS, 1, [EOS], left=2, right=1))
        for row, (prompt, completion) in enumerate(ROWS):
            states = backbone(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
            expected = states[len(prompt) - 1 : -1] @ head
            assert torch.allclose(values[row, : len(completion)], expected, atol=1e-4)
            assert (values[row, len(completion) :] == 0).all()
        assert values.abs().max() > 0.1
        prompt, completion = ROWS[2]
        before = roles.values(layout([(prompt, completion)], 1, [EOS]))[0]
        for t in range(len(completion)):
            changed = [*completion[:t], 444, *completion[t + 1 :]]
            after = roles.values(layout([(prompt, changed)], 1, [EOS]))[0]
            assert torch.equal(after[: t + 1], before[: t + 1]) and (after[t + 1 :] != before[t + 1 :]).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_completion_kl_averages_to_the_enumerated_sequence_kl(zoo: Zoo, temperature: float) -> None:
    """All completions of two tokens: E_pi[completion_kl] = sum_y pi(y) log(pi(y) / ref(y)), in this order."""
    policy, reference = (models.load_causal(zoo[name]) for name in ("words", "words-other"))
    prompt, vocabulary = [2, 5], range(len(word_tokenizer()))
    completions = [[EOS]] + [[a, b] for a in vocabulary if a != EOS for b in vocabulary]
    log_pi, log_ref = (
        torch.stack([naive_logprobs(each, prompt, y, temperature).double().sum() for y in completions])
        for each in (policy, reference)
    )
    pi = log_pi.exp()
    assert pi.sum().item() == pytest.approx(1, abs=1e-6)
    expected, reverse = (pi * (log_pi - log_ref)).sum().item(), (log_ref.exp() * (log_ref - log_pi)).sum().item()
    tokens = layout([(prompt, completion) for completion in completions], 1, [EOS])
    with torch.no_grad():
        ours = (pi * models.completion_kl(policy, reference, tokens, temperature).double()).sum().item()
    assert ours == pytest.approx(expected, abs=1e-5) and abs(expected - reverse) > 0.05


def test_completion_mask() -> None:
    for ids, stops, expected in (
        ([5, 6, 0, 1, 1], [0], [1, 1, 1, 0, 0]),  # up to and including the first EOS
        ([5, 6, 0, 0, 0], [0], [1, 1, 1, 0, 0]),  # pad == EOS
        ([0, 0, 0, 0, 0], [0], [1, 0, 0, 0, 0]),  # an empty completion is its EOS
        ([5, 7, 0, 5, 7], [0, 7], [1, 1, 0, 0, 0]),  # several stop tokens: the first of any
        ([5, 6, 5, 6, 5], [0, 7], [1, 1, 1, 1, 1]),  # unfinished
        ([1, 1, 5, 0, 1], [0], [1, 1, 1, 1, 0]),  # a pad id that was sampled is a token like any other
    ):
        assert models.completion_mask(torch.tensor([ids]), stops).tolist() == [expected]


@pytest.mark.parametrize("index", [[0, 1], [1], [2, 3], [3, 0, 2], slice(1, 3)])
def test_rows_trims_shared_padding_and_nothing_else(index: Any) -> None:
    part = layout(ROWS, 1, [EOS], left=3, right=2).rows(index if isinstance(index, slice) else torch.tensor(index))
    chosen = ROWS[index] if isinstance(index, slice) else [ROWS[row] for row in index]
    assert all(torch.equal(ours, expected) for ours, expected in zip(part, layout(chosen, 1, [EOS]), strict=True))


def test_texts_and_chats_are_rendered_to_the_same_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    texts: list[Any] = ["where does the otter live ?", "why ?"]
    completions = [" by the river .", " the owl likes to eat mice ."]
    heads = [tokenizer(text)["input_ids"] for text in texts]
    rows = [(head, [*tokenizer(text)["input_ids"], EOS]) for head, text in zip(heads, completions, strict=True)]
    chats: list[Any] = [[{"role": "user", "content": text}] for text in texts]
    closed, bare = [text + tokenizer.eos_token for text in completions], [text[1:] for text in completions]
    replies = [[{"role": "assistant", "content": text}] for text in bare]
    assert models.encode(tokenizer, texts) == models.encode(tokenizer, chats) == heads
    for prompts, answers in ((texts, completions), (texts, closed), (chats, replies), (chats, bare)):
        tokens = models.encode_pairs(tokenizer, prompts, answers)
        assert models.encode(tokenizer, prompts, answers) == [head + tail for head, tail in rows]
        for ours, expected in zip(tokens, layout(rows, 0, [EOS]), strict=True):
            assert torch.equal(ours, expected)


def test_encode_pairs_refuses_a_token_that_spans_prompt_and_completion(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="row 1.*one token spans.*move the spaces"):
        models.encode_pairs(tokenizer, ["why ?", "where does the "], [" yes .", "otter live ?"])


def test_decode_leaves_out_what_follows_the_stop_token(tokenizer: PreTrainedTokenizerBase) -> None:
    words = tokenizer(" by the river")["input_ids"]
    tokens = layout([([300], [*words, EOS]), ([300], [EOS]), ([300, 301], words)], 1, [EOS], right=2)
    tokens.input_ids[tokens.attention_mask == 0] = words[0]  # garbage where nothing was written
    assert models.decode_completions(tokenizer, tokens) == [" by the river", "", " by the river"]


HOSTILE = {"do_sample": True, "temperature": 0.3, "top_k": 2, "top_p": 0.5, "min_p": 0.3, "typical_p": 0.4}
HOSTILE |= {"epsilon_cutoff": 0.05, "eta_cutoff": 0.05, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
HOSTILE |= {"min_new_tokens": 1, "suppress_tokens": [4, 5], "begin_suppress_tokens": [6], "bad_words_ids": [[7]]}
HOSTILE |= {"sequence_bias": [[[8], 5.0]]}


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_first_tokens_are_drawn_from_the_softmax_whatever_the_generation_config(zoo: Zoo, temperature: float) -> None:
    model = models.load_causal(zoo["words"])
    own = model.generation_config = transformers.GenerationConfig(eos_token_id=EOS, **HOSTILE)
    prompt, n = [2, 4, 5, 10], 6000
    torch.manual_seed(0)
    tokens = models.generate(model, models.load_tokenizer(zoo["words"]), [prompt] * n, 1, temperature)
    counts = tokens.completion_ids[:, 0].bincount(minlength=12).double()
    expected = n * (naive_logits(model, prompt, [0])[0].double() / temperature).softmax(-1)
    assert expected.min() > 5  # or chi-square would not hold
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 37.4  # 11 degrees of freedom: exceeded once in ten thousand
    assert model.generation_config is own and own.top_k == 2 and own.min_p == 0.3  # it is put back


@pytest.mark.parametrize("drop_every", [3, 100])
def test_greedy_equals_the_naive_argmax_loop_whichever_rows_have_ended(
    model: models.Model, zoo: Zoo, drop_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, length = models.load_tokenizer(zoo["full"]), 13
    prompts = [[300, 301, 302, 303, 304], [305], [306, EOS, 307], [310, 311], [30] * 7, [42, 17]]
    expected = []
    for prompt in prompts:
        written: list[int] = []
        while len(written) < length:
            written.append(int(naive_logits(model, prompt + written, [0])[0].argmax()))
        expected.append(written)
    stop = expected[0][4]  # a token that ends the first completion early, as a second EOS
    ends = [next((t + 1 for t, token in enumerate(row) if token in (stop, EOS)), length) for row in expected]
    monkeypatch.setattr("rlhf_kit.models.generation.DROP_EVERY", drop_every)
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.generation_config.eos_token_id = [stop]
    assert models.stop_ids(model, tokenizer) == sorted({EOS, stop})
    in_flight: list[int] = []
    inner.get_input_embeddings().register_forward_hook(lambda *hook: in_flight.append(len(hook[2])))
    tokens = models.generate(model, tokenizer, prompts, length, temperature=0)
    for row, (prompt, written, end) in enumerate(zip(prompts, expected, ends, strict=True)):
        assert tokens.input_ids[row][tokens.attention_mask[row].bool()].tolist() == prompt + written[:end]
        assert tokens.completion_mask[row].tolist() == [1] * end + [0] * (tokens.completion_mask.shape[1] - end)
    assert in_flight == [sum(end > step // drop_every * drop_every for end in ends) for step in range(max(ends))]
    assert min(ends) < max(ends)


def test_a_recurrent_model_generates_too(zoo: Zoo) -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=320, hidden_size=16, num_hidden_layers=2, state_size=4)
    model, prompt, written = transformers.MambaForCausalLM(config).eval(), [300, 301, 302], []
    tokens = models.generate(model, models.load_tokenizer(zoo["full"]), [prompt, prompt], 12, temperature=0)
    with torch.no_grad():
        while len(written) < 12 and written[-1:] != [EOS]:
            written.append(int(model(torch.tensor([prompt + written])).logits[0, -1].argmax()))
    for ids, mask in zip(tokens.completion_ids, tokens.completion_mask, strict=True):
        assert ids[mask.bool()].tolist() == written


def test_generation_is_the_same_in_train_mode_with_checkpointing(model: models.Model, zoo: Zoo) -> None:
    """In train mode with checkpointing, `generate` would drop the cache: only its first token would be right."""
    tokenizer, prompts = models.load_tokenizer(zoo["full"]), [[300, 301, 302], [305]]
    expected = models.generate(model, tokenizer, prompts, 6, temperature=0)
    assert not model.training
    model.train()
    model.activation_checkpointing_enable()  # type: ignore[operator]
    again = models.generate(model, tokenizer, prompts, 6, temperature=0)
    assert model.training and all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_generation_beyond_the_models_positions_is_refused(zoo: Zoo) -> None:
    with pytest.raises(ValueError, match="60 tokens and max_completion_length=5 exceed the model's 64 positions"):
        models.generate(models.load_causal(zoo["full"]), models.load_tokenizer(zoo["full"]), [[300] * 60, [300]], 5)


@pytest.mark.parametrize("load", [models.load_causal, models.load_tokenizer, models.max_length, models.load_backbone])
def test_what_is_no_model_is_said_in_one_sentence(load: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "no such architecture"}')
    for path, says in (
        (tmp_path / "absent", "no such model directory"),
        (tmp_path / "file", "no such model directory"),
        ("./absent", "no such model directory"),
        (tmp_path / "empty", "holds no model"),
        ("nobody/nothing", "no such directory here, and the hub gave no such model"),
        (tmp_path / "broken", "this directory"),
    ):
        with pytest.raises(ModelError) as error:
            load(path)
        message = str(error.value)
        assert message.startswith(str(path)) and says in message and "\n" not in message


def test_a_model_that_is_not_whole_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    half, adapter = shutil.copytree(zoo["full"], tmp_path / "half"), shutil.copytree(zoo["lora"], tmp_path / "adapter")
    (half / "model.safetensors").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for path, says in ((half, "half: this directory"), (adapter, "gone: no such model directory")):
        with pytest.raises(ModelError, match=says):
            models.load_causal(path)


def test_what_is_no_causal_lm_or_does_not_fit_its_config_is_said_in_one_sentence(zoo: Zoo, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tied = transformers.LlamaConfig(**sizes, vocab_size=512, tie_word_embeddings=True)
    wrong: dict[str, Any] = {
        "or has an encoder .bert": transformers.BertLMHeadModel(transformers.BertConfig(**sizes)),
        "or has an encoder .t5": transformers.T5Model(transformers.T5Config(d_model=32, num_layers=1, d_ff=32)),
        "is a .'LlamaForSequenceClassification'": transformers.LlamaForSequenceClassification(tied),
        "lack lm_head.weight": transformers.AutoModel.from_pretrained(zoo["full"]),
        "sizes at model.layers.0": {"num_hidden_layers": -1},
        "sizes at model.layers.1": {"num_hidden_layers": 1},
        "sizes at lm_head.weight": {"vocab_size": 100},
        "not a multiple of the number of attention heads": {"num_attention_heads": 5, "head_dim": None},
    }
    for place, (says, change) in enumerate(wrong.items()):
        path = shutil.copytree(zoo["full"], tmp_path / str(place))
        if isinstance(change, dict):
            config = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(config | change))
        else:
            change.save_pretrained(path)
        with pytest.raises(ModelError, match=says) as error:
            models.load_causal(path)
        assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match="6: token .* is beyond the model's 100"):
        models.load_tokenizer(tmp_path / "6")
    transformers.LlamaForCausalLM(tied).base_model.save_pretrained(tmp_path / "bare")  # its embeddings are its head
    assert len(models.load_causal(tmp_path / "bare").lm_head.weight) == 512


def test_what_is_frozen_is_bf16_on_a_gpu_unless_asked_or_noted(zoo: Zoo) -> None:
    asked = [(None, {}, True), (None, {}, False), (None, {"dtype": "float32"}, True), ("bfloat16", {}, False)]
    found = [models.loading.frozen_dtype(*each) for each in asked]
    assert found == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    with pytest.raises(ModelError, match="float16.*choose float32 or bfloat16"):
        models.load_causal(zoo["full"], dtype="float16")


def test_a_directory_remembers_that_it_stands_on_4_bits(zoo: Zoo) -> None:
    def linear(model: Any) -> str:
        return type(models.decoder(model).layers[0].self_attn.q_proj.base_layer).__name__

    assert (
        linear(models.load_causal(zoo["4bit"]))
        == linear(models.load_causal(zoo["lora"], load_in_4bit=True))
        == "Linear4bit"
    )
    assert (
        linear(models.load_causal(zoo["lora"]))
        == linear(models.load_causal(zoo["4bit"], load_in_4bit=False))
        == "Linear"
    )


def test_load_causal_is_ready_to_use_or_trains_what_it_should(zoo: Zoo, mode: str) -> None:
    drawn = torch.get_rng_state()
    ready, trained = models.load_causal(zoo[mode]), models.load_causal(zoo[mode], trainable=True)
    assert torch.equal(torch.get_rng_state(), drawn)  # a run must not depend on when a model is loaded
    assert not any(p.requires_grad for p in ready.parameters()) and not any(m.training for m in ready.modules())
    learning = {name for name, p in trained.named_parameters() if p.requires_grad}
    every = {name for name, _ in trained.named_parameters()}
    assert learning == (every if mode == "full" else {name for name in every if "lora_" in name})
    assert all(p.dtype == torch.float32 for p in trained.parameters() if p.requires_grad)


def test_tokenizers_pad_on_the_left_and_never_with_eos(zoo: Zoo, tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(zoo["full"])
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == 1
    shutil.copytree(zoo["words"], tmp_path / "m")
    bare = word_tokenizer()
    for pad in (None, bare.eos_token):
        bare.pad_token = pad
        bare.save_pretrained(tmp_path / "m")
        assert models.load_tokenizer(tmp_path / "m").pad_token_id == 1  # the only special token that is not in use
    wrong = ("chat_template", "{{ '<|pad|>' }}", "no token to pad with"), ("eos_token", None, "no EOS token")
    for name, value, says in wrong:
        setattr(bare, name, value)
        bare.save_pretrained(tmp_path / "m")
        with pytest.raises(ModelError, match=says):
            models.load_tokenizer(tmp_path / "m")


def test_an_adapter_has_the_tokenizer_the_positions_and_the_weights_of_its_base(zoo: Zoo, tmp_path: Path) -> None:
    adapter = shutil.copytree(zoo["lora"], tmp_path / "adapter")
    for file in adapter.glob("token*"):
        file.unlink()
    assert models.load_tokenizer(adapter).get_vocab() == models.load_tokenizer(zoo["full"]).get_vocab()
    assert models.max_length(adapter) == models.max_length(zoo["gpt2"]) == 64
    (tmp_path / "link").symlink_to(zoo["full"])
    assert models.same_base(adapter, tmp_path / "link") and models.same_base(adapter, zoo["4bit"])
    assert not models.same_base(adapter, zoo["full-other"])


def test_a_score_head_of_several_outputs_and_damaged_files_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(zoo["full"], num_labels=3)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="3 outputs"):
        models.read_score_head(tmp_path)
    for name, read in (("model.safetensors", models.read_score_head), ("rlhf_kit.json", models.read_notes)):
        (tmp_path / name).write_bytes(b"[1, ")
        with pytest.raises(ModelError, match=f"{name}: is damaged"):
            read(tmp_path)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_fresh_adapter_is_the_identity_and_the_bare_base_can_be_the_reference(zoo: Zoo, load_in_4bit: bool) -> None:
    bare = logprobs_of(models.load_causal(zoo["full"], load_in_4bit=load_in_4bit))
    fresh = models.load_roles(zoo["full"], lora={"r": 4}, load_in_4bit=load_in_4bit).eval()
    assert torch.allclose(logprobs_of(fresh.use("policy")), bare, atol=CLOSE)
    assert torch.equal(logprobs_of(fresh.use("policy")), logprobs_of(fresh.use("reference")))
    trained = models.load_roles(zoo["lora"], reference=zoo["full"], load_in_4bit=load_in_4bit).eval()
    assert torch.allclose(logprobs_of(trained.use("reference")), bare, atol=CLOSE)
    assert (logprobs_of(trained.use("policy")) - bare).abs().max() > 0.1


def test_values_start_at_zero_or_in_the_units_of_a_normalised_reward_model(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    reward = shutil.copytree(zoo[f"{mode}-reward"], tmp_path / "reward")
    with torch.no_grad():
        assert (models.load_roles(zoo[mode]).eval().values(TOKENS) == 0).all()
        raw = models.load_roles(zoo[mode], value=reward).eval().values(TOKENS)
        models.write_notes(reward, shift=1.5, scale=4.0)
        ours = models.load_roles(zoo[mode], value=reward).eval().values(TOKENS)
    assert torch.allclose(ours, (raw - 1.5) / 4.0 * TOKENS.completion_mask, atol=1e-5)


@pytest.mark.parametrize("lora", [None, {"r": 4, "lora_dropout": 0.5}])
def test_roles_have_no_dropout_left(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, lora: Any) -> None:
    roles = models.load_roles(save_gpt2(tmp_path / "gpt2", tokenizer, dropout=0.5), lora=lora).train()
    assert torch.equal(logprobs_of(roles.use("policy")), logprobs_of(roles.use("policy")))


def test_roles_are_saved_and_loaded_bit_for_bit(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    roles = models.load_roles(zoo[mode], value=zoo[f"{mode}-reward"])
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in roles.trainable_parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    saved = {name: p.detach().clone() for name, p in roles.trainable_parameters()}
    roles.save(tmp_path / "out")
    fresh = models.load_roles(zoo[mode], value=zoo[f"{mode}-reward"])
    assert not all(torch.equal(p, saved[name]) for name, p in fresh.trainable_parameters())
    fresh.load(tmp_path / "out")
    assert all(torch.equal(p, saved[name]) for name, p in fresh.trainable_parameters())

    # Both folders are model directories of their own: the kit loads them again, and so does transformers alone.
    again = models.load_roles(tmp_path / "out", value=tmp_path / "out" / "value").eval()
    ours = logprobs_of(roles.eval().use("policy"))
    assert torch.allclose(logprobs_of(again.use("policy")), ours, atol=CLOSE)
    with torch.no_grad():
        assert torch.allclose(again.values(TOKENS), roles.values(TOKENS), atol=1e-5)
    if mode != "4bit":
        alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        assert torch.allclose(ours[0, :3], naive_logprobs(alone, *ROWS[0]), atol=CLOSE)


def test_roles_that_cannot_be_are_refused(zoo: Zoo) -> None:
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("lora", {"value": zoo["full-reward"]}, "adapters need one base"),
        ("lora", {"lora": {}}, "is an adapter already"),
        ("full", {"value": zoo["full"]}, "not a reward model"),
        ("full", {"load_in_4bit": True}, "4-bit weights cannot be trained"),
        ("full", {"dtype": "bfloat16"}, "bf16 weights cannot be trained"),
    ]
    for policy, settings, says in wrong:
        with pytest.raises(ModelError, match=says):
            models.load_roles(zoo[policy], **settings)
