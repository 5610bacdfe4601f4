"""rlhf_kit.models: log-probs, KL, masks and generation against naive loops and enumeration; roles, loading."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import layout, naive_logits, naive_logprobs, save_gpt2, save_llama, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerBase,
)

from rlhf_kit import models
from rlhf_kit.models import ModelError, Tokens
from rlhf_kit.models import logprobs as logprobs_module
from rlhf_kit.models.logprobs import check_logprobs

Zoo = dict[str, str]
EOS = 0
# Prompt and completion ids: unequal lengths, an empty completion (EOS at once), an EOS inside a prompt, one unfinished.
ROWS = [
    ([300, 301, 302, 303], [310, 311, EOS]),
    ([300], [EOS]),
    ([305, EOS, 306, 307, 308, 309, 300], [320, 321, 322, 323, 324]),
    ([311, 312], [330, 330, 331, EOS]),
]
# fp32 sums in another order (padding, batch): log-probs near -10 carry an error near 1e-6; a wrong position costs 0.1.
CLOSE = 2e-5


@pytest.fixture(params=["full", "lora", "4bit", "gpt2"])
def model(request: pytest.FixtureRequest, zoo: Zoo) -> models.Model:
    return models.load_causal(zoo[request.param]).eval()


def logprobs_of(model: models.Model, tokens: Tokens, temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        return models.completion_logprobs(model, tokens, temperature)[0]


# --- log-probs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_the_naive_loop(model: models.Model, temperature: float) -> None:
    tokens = layout(ROWS, pad=1, stops=[EOS])
    ours = logprobs_of(model, tokens, temperature)
    for row, (prompt, completion) in enumerate(ROWS):
        expected = naive_logprobs(model, prompt, completion, temperature)
        assert torch.allclose(ours[row, : len(completion)], expected, atol=CLOSE)
        assert (ours[row, len(completion) :] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entropy_equals_the_sum_over_the_vocabulary(model: models.Model, temperature: float) -> None:
    with torch.no_grad():
        _, ours = models.completion_logprobs(model, layout(ROWS, 1, [EOS]), temperature, with_entropy=True)
    for row, (prompt, completion) in enumerate(ROWS):
        p = (naive_logits(model, prompt, completion).double() / temperature).softmax(-1)
        assert torch.allclose(ours[row, : len(completion)].double(), -(p * p.log()).sum(-1), atol=CLOSE)
        assert (ours[row, len(completion) :] == 0).all()


def test_a_rows_logprobs_do_not_depend_on_its_company(model: models.Model) -> None:
    """The same alone, left-padded, in a bigger batch, under another pad id and cut into micro-batches."""
    together = logprobs_of(model, layout(ROWS, 1, [EOS]))
    wide = logprobs_of(model, layout(ROWS, 1, [EOS], left=5, right=3))
    other_pad = logprobs_of(model, layout(ROWS, 400, [EOS], left=2))
    pad_is_eos = logprobs_of(model, layout(ROWS, EOS, [EOS], left=2, right=2))
    bigger = logprobs_of(model, layout(ROWS * 3, 1, [EOS]))
    for row, pair in enumerate(ROWS):
        real = slice(0, len(pair[1]))
        alone = logprobs_of(model, layout([pair], 1, [EOS]))[0, real]
        micro = logprobs_of(model, layout(ROWS, 1, [EOS]).rows(torch.tensor([row, 0])))[0, real]
        for other in (together[row], wide[row], other_pad[row], pad_is_eos[row], bigger[row + 4]):
            assert torch.allclose(other[real], alone, atol=CLOSE)
        assert torch.allclose(micro, alone, atol=CLOSE)


def test_canary_gpt2_reads_left_padding_wrongly_without_positions(zoo: Zoo) -> None:
    """FACTS of the stack: this is why positions are given explicitly. If it fails, they may no longer be needed."""
    model = models.load_causal(zoo["gpt2"]).eval()
    prompt, completion = ROWS[0]
    tokens = layout([ROWS[0]], 1, [EOS], left=5)
    with torch.no_grad():
        logits = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).logits[0, -4:-1]
    without = logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
    assert (without - naive_logprobs(model, prompt, completion)).abs().max() > 0.1


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_chunked_equals_full_with_gradients(zoo: Zoo, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.load_causal(zoo[mode], trainable=True).eval()
    tokens = layout(ROWS, 1, [EOS])
    weights = torch.linspace(-1, 2, tokens.completion_mask.numel()).view(tokens.completion_mask.shape)

    def run() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        logprobs, entropy = models.completion_logprobs(model, tokens, 0.9, with_entropy=True)
        loss = ((logprobs + 0.3 * entropy) * weights).sum()
        return logprobs.detach(), entropy.detach(), gradients(model, loss)

    whole = run()
    calls: list[int] = []
    checkpoint = logprobs_module.checkpoint
    monkeypatch.setattr(logprobs_module, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    monkeypatch.setattr(logprobs_module, "LOGITS_CHUNK_GIB", 3 * 4 * model.config.vocab_size / 2**30)
    chunked = run()
    assert len(calls) == math.ceil(int(tokens.completion_mask.sum()) / 3)
    assert torch.allclose(whole[0], chunked[0], atol=1e-6) and torch.allclose(whole[1], chunked[1], atol=1e-5)
    assert whole[2].keys() == chunked[2].keys() and len(whole[2]) > 3
    for name, gradient in whole[2].items():
        assert torch.allclose(gradient, chunked[2][name], atol=1e-5 * gradient.abs().max().item()), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_value_and_policy_gradients_arrive_with_and_without_checkpointing(
    zoo: Zoo, mode: str, checkpointing: bool
) -> None:
    """Against one plain forward and backward of each role's own model, loaded alone."""
    tokens = layout(ROWS, 1, [EOS])
    roles = models.load_roles(zoo[mode], value=zoo[f"{mode}-reward"])
    roles.train()
    if checkpointing:
        roles.activation_checkpointing_enable()
    logprobs, _ = models.completion_logprobs(roles.use("policy"), tokens)
    logprobs.sum().backward()
    roles.values(tokens).sum().backward()
    ours = {name: p.grad for name, p in roles.trainable_parameters()}

    alone = models.load_causal(zoo[mode], trainable=True)
    expected = gradients(alone, models.completion_logprobs(alone, tokens)[0].sum())
    assert expected and max(g.abs().max() for g in expected.values()) > 0.1
    for name, gradient in expected.items():
        role_name = f"policy.{name}".replace(".default.", ".policy.")
        assert torch.allclose(ours[role_name], gradient, atol=1e-4 * gradient.abs().max().item()), name
    value = [gradient for name, gradient in ours.items() if name.startswith("value.")]
    assert value and all(gradient is not None and gradient.abs().max() > 0 for gradient in value)
    assert all(p.grad is None for p in roles.parameters() if not p.requires_grad)


def test_canary_4bit_gradients_survive_an_evaluation_forward(zoo: Zoo) -> None:
    """With AVX512-BF16 bitsandbytes repacks weights in a no-grad forward, and gradients vanish afterwards."""
    tokens = layout(ROWS, 1, [EOS])
    fresh, used = (models.load_causal(zoo["4bit"], trainable=True).eval() for _ in range(2))
    logprobs_of(used, tokens)
    expected, ours = (gradients(m, models.completion_logprobs(m, tokens)[0].sum()) for m in (fresh, used))
    assert expected.keys() == ours.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0 and torch.equal(ours[name], gradient), name


def test_logprobs_through_a_soft_capped_head() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=40, num_key_value_heads=2, head_dim=16, final_logit_softcapping=2.0, **sizes)
    model = Gemma2ForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    rows = [([5, 6], [7, 8, 9])]
    assert torch.allclose(logprobs_of(model, layout(rows, 1, [0]))[0], naive_logprobs(model, *rows[0]), atol=CLOSE)
    check_logprobs(model)


def test_a_head_that_alters_logits_is_refused_not_miscounted() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GraniteForCausalLM(GraniteConfig(vocab_size=40, num_key_value_heads=2, logits_scaling=8.0, **sizes)).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    with pytest.raises(ValueError, match="GraniteForCausalLM.*not supported"):
        check_logprobs(model)


# --- values ----------------------------------------------------------------------------------------------------------


def test_values_equal_the_head_on_a_row_alone_and_see_only_tokens_before(zoo: Zoo, mode: str) -> None:
    roles = models.load_roles(zoo[mode], value=zoo[f"{mode}-reward"]).eval()
    head = read_head(zoo[f"{mode}-reward"])
    backbone = models.load_backbone(zoo[f"{mode}-reward"]).eval()
    with torch.no_grad():
        values = roles.values(layout(ROWS, 1, [EOS], left=2, right=1))
        for row, (prompt, completion) in enumerate(ROWS):
            states = backbone(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
            expected = torch.stack([states[len(prompt) + t - 1] @ head for t in range(len(completion))])
            assert torch.allclose(values[row, : len(completion)], expected, atol=1e-4)
            assert (values[row, len(completion) :] == 0).all()
        assert values.abs().max() > 0.1
        prompt, completion = ROWS[2]
        before = roles.values(layout([(prompt, completion)], 1, [EOS]))
        for t in range(len(completion)):
            changed = [*completion[:t], 444, *completion[t + 1 :]]
            after = roles.values(layout([(prompt, changed)], 1, [EOS]))
            assert torch.equal(after[0, : t + 1], before[0, : t + 1])
            assert t + 1 == len(completion) or (after[0, t + 1 :] != before[0, t + 1 :]).all()


def read_head(directory: str) -> torch.Tensor:
    """(D,) the score head, found without the kit."""
    tensors: dict[str, torch.Tensor] = {}
    for file in Path(directory).glob("*.safetensors"):
        tensors |= load_file(file)
    (head,) = [tensor for key, tensor in tensors.items() if "score" in key]
    return head[0]


# --- KL --------------------------------------------------------------------------------------------------------------


def test_completion_kl_averages_to_the_enumerated_sequence_kl(zoo: Zoo) -> None:
    """All completions of two tokens: E_pi[completion_kl] = sum_y pi(y) log(pi(y) / ref(y)), in this order."""
    policy, reference = (models.load_causal(zoo[name]).eval() for name in ("words", "words-other"))
    vocabulary = range(len(word_tokenizer()))
    for prompt in ([2, 5], [3]):
        completions = [[EOS]] + [[a, b] for a in vocabulary if a != EOS for b in vocabulary]
        tokens = layout([(prompt, completion) for completion in completions], 1, [EOS])
        log_pi, log_ref = (
            torch.stack([naive_logprobs(m, prompt, y).double().sum() for y in completions]) for m in (policy, reference)
        )
        pi = log_pi.exp()
        assert pi.sum().item() == pytest.approx(1, abs=1e-6)
        expected = (pi * (log_pi - log_ref)).sum().item()
        reverse = (log_ref.exp() * (log_ref - log_pi)).sum().item()
        with torch.no_grad():
            ours = (pi * models.completion_kl(policy, reference, tokens).double()).sum().item()
        assert ours == pytest.approx(expected, abs=1e-5) and abs(expected - reverse) > 0.05


def test_completion_kl_at_a_temperature_is_the_kl_of_what_is_sampled(zoo: Zoo) -> None:
    policy, reference = (models.load_causal(zoo[name]).eval() for name in ("words", "words-other"))
    prompt, completion = [2, 5, 6], [4]
    p, q = ((naive_logits(m, prompt, completion)[0].double() / 0.5).log_softmax(-1) for m in (policy, reference))
    with torch.no_grad():
        ours = models.completion_kl(policy, reference, layout([(prompt, completion)], 1, [EOS]), 0.5)
    assert ours.item() == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-5)


def test_completion_kl_in_chunks(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference = (models.load_causal(zoo[name]).eval() for name in ("full", "full-other"))
    with torch.no_grad():
        whole = models.completion_kl(policy, reference, layout(ROWS, 1, [EOS]))
        monkeypatch.setattr(logprobs_module, "LOGITS_CHUNK_GIB", 1e-9)
        assert torch.allclose(models.completion_kl(policy, reference, layout(ROWS, 1, [EOS])), whole, atol=1e-5)
    assert whole.min() > 0.1


def test_kl_of_a_policy_against_itself_is_exactly_zero(zoo: Zoo, mode: str) -> None:
    roles = models.load_roles(zoo[mode]).eval()
    tokens = layout(ROWS, 1, [EOS])
    ours = logprobs_of(roles.use("policy"), tokens)
    theirs = logprobs_of(roles.use("reference"), tokens)
    assert torch.equal(ours, theirs) and (ours != 0).any()
    one, two = models.load_causal(zoo[mode]).eval(), models.load_causal(zoo[mode]).eval()
    with torch.no_grad():
        assert (models.completion_kl(one, two, tokens) == 0).all()


# --- tokens and masks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "stops", "expected"),
    [
        ([5, 6, 0, 1, 1], [0], [1, 1, 1, 0, 0]),  # up to and including the first EOS
        ([5, 6, 0, 0, 0], [0], [1, 1, 1, 0, 0]),  # pad == EOS
        ([0, 0, 0, 0, 0], [0], [1, 0, 0, 0, 0]),  # an empty completion is its EOS
        ([5, 7, 0, 5, 7], [0, 7], [1, 1, 0, 0, 0]),  # several stop tokens: the first of any
        ([5, 6, 5, 6, 5], [0, 7], [1, 1, 1, 1, 1]),  # unfinished
        ([1, 1, 5, 0, 1], [0], [1, 1, 1, 1, 0]),  # a pad id that was sampled is a token like any other
    ],
)
def test_completion_mask(ids: list[int], stops: list[int], expected: list[int]) -> None:
    assert models.completion_mask(torch.tensor([ids]), stops).tolist() == [expected]


def test_finished_is_whether_the_last_real_token_is_a_stop() -> None:
    rows = [([5], [6, 7, 0]), ([5], [9]), ([5], [6, 7, 6, 7]), ([5], [0])]
    tokens = layout(rows, pad=0, stops=[0, 9])
    assert models.finished(tokens, [0, 9]).tolist() == [True, True, False, True]


def test_rows_trims_shared_padding_and_nothing_else() -> None:
    tokens = layout(ROWS, 1, [EOS], left=3, right=2)
    for index in ([0, 1], [1], [2, 3], [3, 0, 2], [0, 1, 2, 3]):
        part = tokens.rows(torch.tensor(index))
        prompts, completions = zip(*(ROWS[row] for row in index), strict=True)
        width, length = max(map(len, prompts)), max(map(len, completions))
        assert part.input_ids.shape == (len(index), width + length) and part.completion_mask.shape == (
            len(index),
            length,
        )
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            assert part.input_ids[row][part.attention_mask[row].bool()].tolist() == prompt + completion
            assert part.completion_ids[row][part.completion_mask[row].bool()].tolist() == completion
    assert all(
        torch.equal(a, b) for a, b in zip(tokens.rows(slice(1, 3)), tokens.rows(torch.tensor([1, 2])), strict=True)
    )


def test_rows_keeps_a_real_pad_id_at_the_front_of_a_prompt() -> None:
    tokens = layout([([1, 1, 5], [6]), ([5], [6])], pad=1, stops=[EOS])
    assert tokens.rows(torch.tensor([0])).input_ids.tolist() == [[1, 1, 5, 6]]
    assert tokens.rows(torch.tensor([1])).input_ids.tolist() == [[5, 6]]


def test_encode_text_and_chat_agree(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["where does the otter live ?", "what food does the owl like ?"]
    chats = [[{"role": "user", "content": text}] for text in texts]
    expected = [tokenizer(text)["input_ids"] for text in texts]
    assert models.encode(tokenizer, texts) == expected  # type: ignore[arg-type]
    assert models.encode(tokenizer, chats) == expected  # type: ignore[arg-type]


def test_encode_pairs_is_prompt_completion_and_eos_in_text_and_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = ["where does the otter live ?", "why ?"]
    completions = [" by the river .", " the owl likes to eat mice ."]
    tokens = models.encode_pairs(tokenizer, prompts, completions)  # type: ignore[arg-type]
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        head, tail = tokenizer(prompt)["input_ids"], tokenizer(completion)["input_ids"] + [EOS]
        assert tokens.input_ids[row][tokens.attention_mask[row].bool()].tolist() == head + tail
        assert tokens.completion_ids[row][tokens.completion_mask[row].bool()].tolist() == tail
        assert (
            not tokens.attention_mask[row]
            .bool()[: tokens.input_ids.shape[1] - tokens.completion_mask.shape[1]]
            .logical_not()[-len(head) :]
            .any()
        )  # prompts stand against the completion: padding is on the left
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    replies = [[{"role": "assistant", "content": completion[1:]}] for completion in completions]
    for theirs in (replies, [reply[0]["content"] for reply in replies]):
        chat = models.encode_pairs(tokenizer, chats, theirs)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(chat, tokens, strict=True))


def test_encode_pairs_refuses_a_token_that_spans_prompt_and_completion(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="row 1.*one token spans.*without a space"):
        models.encode_pairs(tokenizer, ["why ?", "where does the "], [" yes .", "otter live ?"])


# --- generation ------------------------------------------------------------------------------------------------------


def hostile_config() -> GenerationConfig:
    """Everything a downloaded generation_config could do to the distribution."""
    return GenerationConfig(
        eos_token_id=EOS,
        do_sample=True,
        temperature=0.3,
        top_k=2,
        top_p=0.5,
        min_p=0.3,
        typical_p=0.4,
        epsilon_cutoff=0.05,
        eta_cutoff=0.05,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=1,
        suppress_tokens=[4, 5],
        begin_suppress_tokens=[6],
        bad_words_ids=[[7]],
        sequence_bias=[[[8], 5.0]],
    )


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_first_tokens_are_drawn_from_the_softmax_whatever_the_generation_config(zoo: Zoo, temperature: float) -> None:
    model = models.load_causal(zoo["words"])
    model.generation_config = hostile_config()
    prompt, n = [2, 4, 5, 10], 6000
    torch.manual_seed(0)
    tokens = models.generate(model, models.load_tokenizer(zoo["words"]), [prompt] * n, 1, temperature)
    counts = tokens.completion_ids[:, 0].bincount(minlength=12).double()
    expected = n * (naive_logits(model, prompt, [0])[0].double() / temperature).softmax(-1)
    assert expected.min() > 5  # or chi-square would not hold
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 37.4  # 11 degrees of freedom: exceeded once in ten thousand
    assert (
        model.generation_config.top_k == 2 and model.generation_config.min_p == 0.3
    )  # and the model's own is put back


def test_greedy_generation_equals_the_naive_argmax_loop_for_left_padded_prompts(model: models.Model, zoo: Zoo) -> None:
    tokenizer = models.load_tokenizer(zoo["full"])
    prompts = [[300, 301, 302, 303, 304], [305], [306, EOS, 307]]  # an EOS inside a prompt stays attended
    tokens = models.generate(model, tokenizer, prompts, 6, temperature=0)
    for row, prompt in enumerate(prompts):
        expected: list[int] = []
        while len(expected) < 6 and expected[-1:] != [EOS]:
            expected.append(int(naive_logits(model, prompt + expected, [0])[0].argmax()))
        assert tokens.completion_ids[row][tokens.completion_mask[row].bool()].tolist() == expected
        assert tokens.input_ids[row][tokens.attention_mask[row].bool()].tolist() == prompt + expected


@pytest.mark.parametrize("drop_every", [1, 3, 8, 100])
def test_rows_that_have_ended_leave_the_batch_and_the_others_do_not_notice(
    model: models.Model, zoo: Zoo, drop_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, length = models.load_tokenizer(zoo["full"]), 20
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
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.generation_config.eos_token_id = [stop]
    in_flight: list[int] = []
    handle = inner.get_input_embeddings().register_forward_hook(lambda *hook: in_flight.append(len(hook[2])))
    try:
        tokens = models.generate(model, tokenizer, prompts, length, temperature=0)
    finally:
        handle.remove()
        inner.generation_config.eos_token_id = EOS
    for row, (written, end) in enumerate(zip(expected, ends, strict=True)):
        assert tokens.completion_ids[row, :end].tolist() == written[:end]
        assert tokens.completion_mask[row].tolist() == [1] * end + [0] * (tokens.completion_mask.shape[1] - end)
    steps = range(max(ends))
    assert in_flight == [sum(end > step // drop_every * drop_every for end in ends) for step in steps]
    assert min(ends) < max(ends)


def test_a_recurrent_model_generates_too(zoo: Zoo) -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=320, hidden_size=16, num_hidden_layers=2, state_size=4, eos_token_id=EOS)
    model, tokenizer = MambaForCausalLM(config).eval(), models.load_tokenizer(zoo["full"])
    prompt = [300, 301, 302]
    tokens = models.generate(model, tokenizer, [prompt, prompt], 12, temperature=0)
    written: list[int] = []
    with torch.no_grad():
        while len(written) < 12 and written[-1:] != [EOS]:
            written.append(int(model(torch.tensor([prompt + written])).logits[0, -1].argmax()))
    for ids, mask in zip(tokens.completion_ids, tokens.completion_mask, strict=True):
        assert ids[mask.bool()].tolist() == written


def test_generation_is_the_same_in_train_mode_with_checkpointing_and_restores_the_mode(
    model: models.Model, zoo: Zoo
) -> None:
    """Trap: generate() in train mode with checkpointing drops the cache and only its first token is right."""
    tokenizer, prompts = models.load_tokenizer(zoo["full"]), [[300, 301, 302], [305]]
    expected = models.generate(model, tokenizer, prompts, 6, temperature=0)
    assert not model.training
    model.train()
    model.activation_checkpointing_enable()  # type: ignore[operator]
    again = models.generate(model, tokenizer, prompts, 6, temperature=0)
    assert model.training and all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_generation_stops_at_every_stop_token_and_pads_after(zoo: Zoo) -> None:
    model, tokenizer = models.load_causal(zoo["words"]), models.load_tokenizer(zoo["words"])
    tokenizer.pad_token = tokenizer.eos_token  # pad == EOS
    model.generation_config.eos_token_id = [10, 6]
    assert models.stop_ids(model, tokenizer) == [0, 6, 10]
    torch.manual_seed(0)
    tokens = models.generate(model, tokenizer, [[2, 4], [3]] * 30, 8)
    endings = set()
    for ids, mask in zip(tokens.completion_ids.tolist(), tokens.completion_mask.tolist(), strict=True):
        first = next((t for t, token in enumerate(ids) if token in (0, 6, 10)), len(ids) - 1)
        endings.add(ids[first])
        assert mask == [1] * (first + 1) + [0] * (len(ids) - first - 1)
        assert set(ids[first + 1 :]) <= {0}
    assert {0, 6, 10} <= endings


def test_decode_leaves_out_what_follows_the_stop_token(tokenizer: PreTrainedTokenizerBase) -> None:
    by_the_river = tokenizer(" by the river")["input_ids"]
    tokens = layout([([300], [*by_the_river, EOS]), ([300], [EOS]), ([300, 301], by_the_river)], 1, [EOS])
    tokens.input_ids[0, -1] = tokens.input_ids[1, -1] = by_the_river[0]  # garbage behind the end, if there is room
    assert models.decode_completions(tokenizer, tokens)[1:] == ["", " by the river"]
    wide = layout([([300], [*by_the_river, EOS])], 1, [EOS], right=2)
    wide.input_ids[0, -2:] = torch.tensor(by_the_river[:2])
    assert models.decode_completions(tokenizer, wide) == [" by the river"]


def test_generation_beyond_the_models_positions_is_refused(zoo: Zoo) -> None:
    with pytest.raises(ValueError, match="60 tokens and max_completion_length=5 exceed the model's 64 positions"):
        models.generate(models.load_causal(zoo["full"]), models.load_tokenizer(zoo["full"]), [[300] * 60, [300]], 5)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_what_is_no_model_is_said_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "no such architecture"}')
    loaders: list[Callable[..., object]] = [
        models.load_causal,
        models.load_tokenizer,
        models.max_length,
        models.load_backbone,
    ]
    for load in loaders:
        for path, says in (
            (tmp_path / "absent", "no such model directory"),
            (tmp_path / "empty", "holds no model"),
            (tmp_path / "file", "no such model directory"),
            ("./absent", "no such model directory"),
            ("nobody/nothing", "no such directory here, and the hub gave no such model"),
            (tmp_path / "broken", "this directory"),
        ):
            with pytest.raises(ModelError) as error:
                load(path)
            message = str(error.value)
            assert message.startswith(str(path)) and says in message and "\n" not in message


def test_an_adapter_whose_base_is_gone_names_the_base(zoo: Zoo, tmp_path: Path) -> None:
    adapter = shutil.copytree(zoo["lora"], tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")})
    )
    with pytest.raises(ModelError, match="gone: no such model directory"):
        models.load_causal(adapter)


def test_a_half_written_model_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    half = shutil.copytree(zoo["full"], tmp_path / "half")
    (half / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="half: this directory"):
        models.load_causal(half)


def test_4bit_weights_do_not_train_without_an_adapter(zoo: Zoo) -> None:
    with pytest.raises(ModelError, match="4-bit weights cannot be trained"):
        models.load_causal(zoo["full"], load_in_4bit=True, trainable=True)
    with pytest.raises(ModelError, match="4-bit weights cannot be trained"):
        models.load_roles(zoo["full"], load_in_4bit=True)


def test_a_directory_remembers_that_it_stands_on_4_bits(zoo: Zoo) -> None:
    def linear(model: models.Model) -> str:
        return type(models.decoder(model).layers[0].self_attn.q_proj.base_layer).__name__

    assert linear(models.load_causal(zoo["4bit"])) == "Linear4bit"
    assert linear(models.load_causal(zoo["4bit"], load_in_4bit=False)) == "Linear"
    assert linear(models.load_causal(zoo["lora"])) == "Linear"
    assert linear(models.load_causal(zoo["lora"], load_in_4bit=True)) == "Linear4bit"


def test_load_causal_trains_what_it_should(zoo: Zoo, mode: str) -> None:
    frozen, trained = (models.load_causal(zoo[mode], trainable=trainable) for trainable in (False, True))
    assert not any(p.requires_grad for p in frozen.parameters())
    learning = {name for name, p in trained.named_parameters() if p.requires_grad}
    every = {name for name, _ in trained.named_parameters()}
    assert learning == (every if mode == "full" else {name for name in every if "lora_" in name})
    assert all(p.dtype == torch.float32 for p in trained.parameters() if p.requires_grad)


def test_tokenizers_pad_on_the_left_and_never_with_eos(zoo: Zoo, tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(zoo["full"])
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == 1
    save_llama(tmp_path / "m", word_tokenizer(), hidden=32)
    bare = word_tokenizer()
    for pad in (None, bare.eos_token):
        bare.pad_token = pad
        bare.save_pretrained(tmp_path / "m")
        assert models.load_tokenizer(tmp_path / "m").pad_token_id == 1  # the only special token that is not in use
    bare.chat_template = "{{ '<|pad|>' }}"  # closes a turn, say
    bare.save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match="no token to pad with"):
        models.load_tokenizer(tmp_path / "m")
    bare.eos_token = None
    bare.save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match="no EOS token"):
        models.load_tokenizer(tmp_path / "m")


def test_an_adapter_without_a_tokenizer_uses_its_bases(zoo: Zoo, tmp_path: Path) -> None:
    adapter = shutil.copytree(zoo["lora"], tmp_path / "adapter")
    for file in adapter.glob("token*"):
        file.unlink()
    assert models.load_tokenizer(adapter).get_vocab() == models.load_tokenizer(zoo["full"]).get_vocab()


def test_base_of_and_same_base(zoo: Zoo, tmp_path: Path) -> None:
    assert models.is_adapter(zoo["lora"]) and not models.is_adapter(zoo["full"])
    assert models.base_of(zoo["lora"]) == zoo["full"] == models.base_of(zoo["full"])
    (tmp_path / "link").symlink_to(zoo["full"])
    assert models.same_base(zoo["lora"], tmp_path / "link") and models.same_base(zoo["lora"], zoo["4bit"])
    assert not models.same_base(zoo["lora"], zoo["full-other"])


def test_notes_are_added_to(tmp_path: Path) -> None:
    assert models.read_notes(tmp_path) == {}
    models.write_notes(tmp_path, a=1)
    models.write_notes(tmp_path, b=2.5)
    assert models.read_notes(tmp_path) == {"a": 1, "b": 2.5}


def test_max_length(zoo: Zoo) -> None:
    assert models.max_length(zoo["full"]) == models.max_length(zoo["lora"]) == models.max_length(zoo["gpt2"]) == 64


def test_score_heads_are_read_from_full_and_adapter_directories(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    head = models.read_score_head(zoo[f"{mode}-reward"])
    assert head.shape == (1, 64) and head.dtype == torch.float32
    assert torch.equal(head[0], read_head(zoo[f"{mode}-reward"]).float())
    with pytest.raises(ModelError, match="not a reward model"):
        models.read_score_head(zoo[mode])


def test_a_score_head_of_several_outputs_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(zoo["full"], num_labels=3)
    model.save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="3 outputs"):
        models.read_score_head(tmp_path / "three")


# --- roles -----------------------------------------------------------------------------------------------------------


def test_roles_play_the_models_they_were_cast_from(zoo: Zoo, mode: str) -> None:
    roles = models.load_roles(zoo[mode], zoo[f"{mode}-other"], zoo[f"{mode}-reward"]).eval()
    tokens = layout(ROWS, 1, [EOS])
    for role, directory in (("policy", zoo[mode]), ("reference", zoo[f"{mode}-other"])):
        ours = logprobs_of(roles.use(role), tokens)
        assert torch.allclose(ours, logprobs_of(models.load_causal(directory).eval(), tokens), atol=CLOSE)
    assert (logprobs_of(roles.use("policy"), tokens) - logprobs_of(roles.use("reference"), tokens)).abs().max() > 0.1


def test_adapters_can_have_their_bare_base_as_reference(zoo: Zoo) -> None:
    roles = models.load_roles(zoo["lora"], reference=zoo["full"]).eval()
    tokens = layout(ROWS, 1, [EOS])
    expected = logprobs_of(models.load_causal(zoo["full"]).eval(), tokens)
    assert torch.allclose(logprobs_of(roles.use("reference"), tokens), expected, atol=CLOSE)
    assert (logprobs_of(roles.use("policy"), tokens) - expected).abs().max() > 0.1


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_fresh_adapter_starts_as_the_identity(zoo: Zoo, load_in_4bit: bool) -> None:
    roles = models.load_roles(zoo["full"], lora={"r": 4}, load_in_4bit=load_in_4bit).eval()
    tokens = layout(ROWS, 1, [EOS])
    expected = logprobs_of(models.load_causal(zoo["full"], load_in_4bit).eval(), tokens)
    assert torch.allclose(logprobs_of(roles.use("policy"), tokens), expected, atol=CLOSE)
    assert torch.equal(logprobs_of(roles.use("policy"), tokens), logprobs_of(roles.use("reference"), tokens))


def test_without_a_value_model_values_start_at_zero(zoo: Zoo, mode: str) -> None:
    roles = models.load_roles(zoo[mode]).eval()
    with torch.no_grad():
        assert (roles.values(layout(ROWS, 1, [EOS])) == 0).all()


def test_values_from_a_normalised_reward_model_are_in_its_units(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    reward = shutil.copytree(zoo[f"{mode}-reward"], tmp_path / "reward")
    tokens = layout(ROWS, 1, [EOS])
    with torch.no_grad():
        raw = models.load_roles(zoo[mode], value=reward).eval().values(tokens)
        models.write_notes(reward, shift=1.5, scale=4.0)
        ours = models.load_roles(zoo[mode], value=reward).eval().values(tokens)
    assert torch.allclose(ours, (raw - 1.5) / 4.0 * tokens.completion_mask, atol=1e-5)


def test_policy_and_value_learn_and_the_rest_is_frozen_whoever_was_used_last(zoo: Zoo, mode: str) -> None:
    roles = models.load_roles(zoo[mode], value=zoo[f"{mode}-reward"])
    for role in ("reference", "value", "policy", "reference"):
        roles.use(role)
        learning = {name for name, p in roles.named_parameters() if p.requires_grad}
        listed = {id(p) for _, p in roles.trainable_parameters()}
        assert learning == {name for name, p in roles.named_parameters() if id(p) in listed}
        if mode != "full":
            adapters = {name for name, _ in roles.named_parameters() if ".policy." in name or ".value." in name}
            assert learning == adapters | {"value_head.weight", "value_head.bias"}
    assert all(p.dtype == torch.float32 for _, p in roles.trainable_parameters())
    count = len(list(roles.trainable_parameters()))
    if mode == "full":  # the policy with its head, the value model's backbone, its head and bias
        alone = len(list(models.load_causal(zoo["full"]).parameters()))
        assert count == alone + (alone - 1) + 2


def test_roles_have_no_dropout_left(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    gpt2 = save_gpt2(tmp_path / "gpt2", tokenizer, dropout=0.5)
    tokens = layout(ROWS, 1, [EOS])
    for lora in (None, {"r": 4, "lora_dropout": 0.5}):
        roles = models.load_roles(gpt2, lora=lora).train()
        with torch.no_grad():
            first, _ = models.completion_logprobs(roles.use("policy"), tokens)
            again, _ = models.completion_logprobs(roles.use("policy"), tokens)
        assert torch.equal(first, again)


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

    # Both folders are model directories of their own: they can be cast again, and read by the libraries alone.
    again = models.load_roles(tmp_path / "out", value=tmp_path / "out" / "value").eval()
    tokens = layout(ROWS, 1, [EOS])
    roles.eval()
    with torch.no_grad():
        assert torch.allclose(again.values(tokens), roles.values(tokens), atol=1e-5)
    assert torch.allclose(
        logprobs_of(again.use("policy"), tokens), logprobs_of(roles.use("policy"), tokens), atol=CLOSE
    )
    if mode != "4bit":
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        expected = naive_logprobs(alone, *ROWS[0])
        assert torch.allclose(logprobs_of(roles.use("policy"), tokens)[0, :3], expected, atol=CLOSE)


def test_roles_that_cannot_share_a_base_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="adapters need one base"):
        models.load_roles(zoo["lora"], value=zoo["full-reward"])
    with pytest.raises(ModelError, match="adapters need one base"):
        models.load_roles(zoo["lora"], reference=zoo["full-other"])
    with pytest.raises(ModelError, match="is an adapter already"):
        models.load_roles(zoo["lora"], lora={})
    with pytest.raises(ModelError, match="no such model directory"):
        models.load_roles(tmp_path / "absent")
    with pytest.raises(ModelError, match="not a reward model"):
        models.load_roles(zoo["full"], value=zoo["full"])


def test_canary_peft_set_adapter_flips_requires_grad(zoo: Zoo) -> None:
    """Trap: why Roles.use() sets requires_grad again after each switch."""
    base = models.load_causal(zoo["full"])
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"), adapter_name="one"
    )
    model.add_adapter("two", model.peft_config["one"])
    model.set_adapter("two")
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".one." in name)
