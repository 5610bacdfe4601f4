"""rlhf_kit.sampling: the samples frame, its KL, and best-of-n."""

from typing import Any

import pandas as pd
import pytest
from datasets import Dataset
from tiny import naive_logits

from rlhf_kit import models, sampling

Zoo = dict[str, str]
EOS = 0
QUESTIONS = ["where does the otter live ?", "why ?", "what food does the owl like ?"]
PROMPTS = Dataset.from_dict({"prompt": QUESTIONS, "kind": ["ask", "odd", "ask"], "seen": [True, False, True]})


def test_a_row_for_each_prompt_and_sample_with_the_prompts_columns(zoo: Zoo, mode: str) -> None:
    frame = sampling.sample(zoo[mode], PROMPTS, n=4, max_completion_length=6, batch_tokens=40)
    columns = ["prompt_id", "sample", "prompt", "completion", "finished", "n_tokens", "kind", "seen"]
    assert list(frame.columns) == columns
    assert frame[["prompt_id", "sample"]].values.tolist() == [[i, k] for i in range(3) for k in range(4)]
    for row in frame.itertuples():
        assert {name: getattr(row, name) for name in PROMPTS.column_names} == PROMPTS[row.prompt_id]
        assert 1 <= row.n_tokens <= 6 and (row.finished or row.n_tokens == 6)
        assert "<|endoftext|>" not in row.completion and "<|pad|>" not in row.completion
    assert frame["finished"].dtype == bool
    assert frame["completion"].nunique() > 6


def test_greedy_completions_equal_the_naive_loop_whatever_the_batch(zoo: Zoo, mode: str) -> None:
    model, tokenizer = models.load_causal(zoo[mode]).eval(), models.load_tokenizer(zoo[mode])
    for tokens in (2**15, 30):
        frame = sampling.sample(zoo[mode], PROMPTS, n=2, temperature=0, max_completion_length=5, batch_tokens=tokens)
        for row in frame.itertuples():
            prompt, ids = tokenizer(row.prompt)["input_ids"], []
            while len(ids) < 5 and ids[-1:] != [EOS]:
                ids.append(int(naive_logits(model, prompt + ids, [0])[0].argmax()))
            assert row.completion == tokenizer.decode(ids, skip_special_tokens=True)
            assert row.n_tokens == len(ids) and row.finished == (ids[-1] == EOS)


def test_the_seed_decides(zoo: Zoo) -> None:
    first, again, other = (sampling.sample(zoo["full"], PROMPTS, 3, max_completion_length=6, seed=s) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(first, again)
    assert first["completion"].tolist() != other["completion"].tolist()


def test_kl_to_itself_is_exactly_zero(zoo: Zoo, mode: str) -> None:
    frame = sampling.sample(zoo[mode], PROMPTS, n=2, max_completion_length=6, reference=zoo[mode])
    assert (frame["kl"] == 0).all()


def test_mean_kl_of_samples_approaches_the_enumerated_kl(zoo: Zoo) -> None:
    """One-token completions: each sample's kl is the exact KL of the first token's distributions."""
    prompts = Dataset.from_dict({"prompt": ["a c", "b"]})
    frame = sampling.sample(zoo["words"], prompts, n=3, max_completion_length=1, reference=zoo["words-other"])
    policy, reference = (models.load_causal(zoo[name]).eval() for name in ("words", "words-other"))
    for prompt_id, ids in enumerate([[2, 4], [3]]):
        p, q = (naive_logits(model, ids, [0])[0].double().log_softmax(-1) for model in (policy, reference))
        expected = (p.exp() * (p - q)).sum().item()
        assert frame[frame.prompt_id == prompt_id]["kl"].tolist() == pytest.approx([expected] * 3, abs=1e-5)


def test_chat_prompts_give_the_completions_of_the_same_text(zoo: Zoo) -> None:
    chats = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in PROMPTS["prompt"][:]]})
    text, chat = (sampling.sample(zoo["full"], prompts, n=2, max_completion_length=6) for prompts in (PROMPTS, chats))
    assert chat["completion"].tolist() == [[{"role": "assistant", "content": each}] for each in text["completion"]]
    assert chat["prompt"][0] == [{"role": "user", "content": "where does the otter live ?"}]


def test_a_column_of_the_same_name_is_kept_beside_the_sampled_one(zoo: Zoo) -> None:
    prompts = Dataset.from_dict({"prompt": ["why ?"], "completion": [" because ."], "n_tokens": [77]})
    frame = sampling.sample(zoo["full"], prompts, max_completion_length=3)
    assert frame["completion_dataset"].tolist() == [" because ."] and frame["n_tokens_dataset"].tolist() == [77]
    assert frame["n_tokens"][0] <= 3


def test_nothing_to_sample_is_said(zoo: Zoo) -> None:
    for prompts, n, words in ((PROMPTS.select([]), 1, "got 0 prompts"), (PROMPTS, 0, "n=0")):
        with pytest.raises(ValueError, match=words):
            sampling.sample(zoo["full"], prompts, n)


def test_score_gives_rewards_the_other_columns() -> None:
    frame = pd.DataFrame({"prompt": ["a", "b"], "completion": [" x", " yy"], "prompt_id": [0, 1], "kind": ["p", "q"]})

    def length_and_kind(prompts: list[str], completions: list[str], kind: list[str], **columns: Any) -> list[float]:
        assert columns == {"prompt_id": [0, 1]} and prompts == ["a", "b"]
        return [len(completion) + (name == "q") for completion, name in zip(completions, kind, strict=True)]

    scored = sampling.add_rewards(frame, {"gold": length_and_kind, "half": lambda p, c, **_: [0.5, 0.5]})
    assert scored["gold"].tolist() == [2, 4] and scored["half"].tolist() == [0.5, 0.5]
    assert list(frame.columns) == ["prompt", "completion", "prompt_id", "kind"]  # the frame given is left as it was


def test_best_of_n_by_hand() -> None:
    frame = pd.DataFrame({"prompt_id": [0, 0, 0, 1, 1, 1], "sample": [0, 1, 2] * 2, "completion": list("abcdef")})
    frame["gold"] = [1.0, 3.0, 2.0, 5.0, 4.0, 6.0]
    for n, best in ((None, ["b", "f"]), (2, ["b", "d"]), (1, ["a", "d"])):
        assert sampling.best_of_n(frame, by="gold", n=n)["completion"].tolist() == best
    shuffled = frame.sample(frac=1, random_state=0)
    assert sampling.best_of_n(shuffled, by="gold")["completion"].tolist() == ["b", "f"]
    with pytest.raises(ValueError, match="no column 'proxy'"):
        sampling.best_of_n(frame, by="proxy")
