"""Language models behind an OpenAI-compatible endpoint: asked in parallel, and never twice the same."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sqlite3
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from rlhf_kit.feedback.constitution import Constitution
from rlhf_kit.feedback.judging import Answer, FeedbackError, Question
from rlhf_kit.feedback.model_rater import ModelRater
from rlhf_kit.feedback.templates import PLAIN, Template, principles_for, read_reply
from rlhf_kit.models import Prompt
from rlhf_kit.progress import Countdown
from rlhf_kit.rewards import Completion

CERTAIN = 1000.0  # log-odds of a word that was replied
REFUSED = {401: "does not accept the key", 403: "does not allow the key to use the model", 404: "knows no such model"}
SCHEMA = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, request TEXT NOT NULL, reply TEXT NOT NULL)"


class Endpoint:
    """A model at `base_url` (such as http://localhost:8000/v1) that replies to prompts, `concurrency` at a time.

    The key is read from the environment variable `key_variable` for each request and kept nowhere (None: a server
    without keys). The openai client tries 429, 5xx and timeouts again up to `max_retries` times. With a `cache` (a
    SQLite file) each reply is kept by the SHA-256 of its whole request, and is never paid for again.
    price_per_million: of tokens in and out, for `costs`. `options` go into each request (temperature 0 by default).
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key_variable: str | None = "OPENAI_API_KEY",
        cache: str | Path | None = None,
        concurrency: int = 8,
        max_retries: int = 5,
        timeout: float = 60.0,
        price_per_million: tuple[float, float] | None = None,
        **options: Any,
    ) -> None:
        try:
            import openai
        except ModuleNotFoundError:
            raise FeedbackError("an endpoint needs the openai package: pip install 'rlhf-kit[endpoint]'") from None
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise FeedbackError(f"base_url {base_url!r}: is no address; write one such as http://localhost:8000/v1")
        if address.username or address.password or address.query:
            raise FeedbackError("base_url: holds a name, password or query; keys belong in an environment variable")
        self.base_url, self.model, self.key_variable = base_url.rstrip("/"), model, key_variable
        self.concurrency, self.price_per_million = concurrency, price_per_million
        self.options = {"temperature": 0.0, **options}
        self.asked = self.from_cache = self.tokens_in = self.tokens_out = self.uncounted = 0
        self._lock = Lock()  # of these counts
        self._key()  # raises if there is none
        self.cache = None if cache is None else Path(cache)
        if self.cache is not None:
            _sql(self.cache, SCHEMA)
            _sql(self.cache, "SELECT key, request, reply FROM replies LIMIT 1")
        # The client would keep a key that it is given, so each request brings its own. It follows no redirects, so that
        # a prompt goes to the address that was named and nowhere else.
        http = openai.DefaultHttpxClient(follow_redirects=False)
        self._client = openai.OpenAI(
            api_key="none", base_url=self.base_url, max_retries=max_retries, timeout=timeout, http_client=http
        )

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r}, {self.model!r})"

    def __call__(self, prompts: Sequence[Prompt], quiet: bool = False) -> list[str]:
        """A reply to each prompt, a text or a chat; unless `quiet` it prints how many are done and the time left."""
        chats = [[{"role": "user", "content": each}] if isinstance(each, str) else each for each in prompts]
        # With a cache a request that comes twice is asked once; without one each is a sample of its own.
        names = [i if self.cache is None else json.dumps(chat) for i, chat in enumerate(chats)]
        distinct = dict(zip(names, chats, strict=True))
        countdown = Countdown(f"replies of {self.model}", len(distinct))
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            futures = {name: pool.submit(self.reply, chat) for name, chat in distinct.items()}
            for done, future in enumerate(as_completed(futures.values()), 1):
                future.result()  # raises the first error, before all the rest is asked
                if not quiet:
                    countdown.at(done)
        finally:
            pool.shutdown(cancel_futures=True)
        return [futures[name].result() for name in names]

    def reply(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The model's reply to a chat; raises FeedbackError, without the key, if there is none."""
        import openai

        request = {"url": self.base_url, "model": self.model, "messages": list(messages), **self.options}
        text = json.dumps(request, sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(text.encode()).hexdigest()
        known = _sql(self.cache, "SELECT reply FROM replies WHERE key = ?", digest) if self.cache is not None else []
        with self._lock:
            self.from_cache += len(known)
            self.asked += not known
        if known:
            return known[0][0]
        key = self._key()
        headers = {"Authorization": f"Bearer {key}" if key else openai.Omit()}
        answer: Any = None
        try:
            answer = self._client.chat.completions.create(
                model=self.model, messages=request["messages"], extra_body=self.options, extra_headers=headers
            )
            content = answer.choices[0].message.content
        except openai.APIError as error:
            raise FeedbackError(f"{self.model} at {self.base_url}: {self._reason(error)}") from None
        except (ValueError, AttributeError, IndexError, TypeError):
            content = None  # what came is no JSON, or JSON without a message
        if not isinstance(content, str):
            raise FeedbackError(
                f"{self.model} at {self.base_url}: answered without a message; is base_url that of a chat-completions "
                "server (it often ends in /v1)?"
            )
        content = self._without_key(content)
        if self.cache is not None:
            _sql(self.cache, "INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", digest, text, content)
        usage = getattr(answer, "usage", None)
        with self._lock:
            self.uncounted += not usage
            self.tokens_in += getattr(usage, "prompt_tokens", None) or 0
            self.tokens_out += getattr(usage, "completion_tokens", None) or 0
        return content

    def costs(self) -> str:
        """One line: requests, those that the cache saved, tokens and, with prices, the price."""
        into, out = self.price_per_million or (math.nan, math.nan)
        price = (self.tokens_in * into + self.tokens_out * out) / 1e6
        return (
            f"{self.asked} requests, {self.from_cache} more from the cache, {self.tokens_in} tokens in, "
            f"{self.tokens_out} out"
            + ("" if math.isnan(price) else f", price {price:.4f}")
            + (f" ({self.uncounted} replies came without a count of tokens)" if self.uncounted else "")
        )

    def _reason(self, error: Any) -> str:
        """What an error of the client means, and what to do."""
        status, tried = getattr(error, "status_code", None), f"max_retries={self._client.max_retries}"
        if status in REFUSED:
            key = f"the key in {self.key_variable}" if self.key_variable else "key_variable (no key was sent)"
            return f"{REFUSED[status]} ({status}); check the model's name, base_url and {key}"
        kept = "replies are kept only with a cache, such as cache='replies.sqlite'"
        if self.cache is not None:
            kept = f"earlier replies are kept in {self.cache}, and the next attempt goes on from there"
        if status is None:
            cause = self._without_key(f"{error} {error.__cause__}")
            return f"gave no answer ({cause}; timeout={self._client.timeout} s, {tried}); {kept}"
        said = " ".join(self._without_key(error.response.text).split())[:200]
        if status != 429 and status < 500:
            return f"refuses the request ({status}: {said})"
        wait = self._without_key(error.response.headers.get("Retry-After", "nothing"))[:40]
        return f"still answers {status} (Retry-After: {wait}; {tried}: {said}); {kept}"

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "") if self.key_variable else ""
        if self.key_variable and not re.fullmatch("[!-~]+", key):
            raise FeedbackError(
                f"the environment variable {self.key_variable} is not set or holds no key (it has spaces or the like); "
                "put the key there, or pass key_variable=None for a server without keys"
            )
        return key

    def _without_key(self, text: str) -> str:
        """What a server said, in case it repeats the key."""
        key = self._key()
        return text.replace(key, "[key]") if key else text


class EndpointRater(ModelRater):
    """A model at an endpoint as a rater: asked in words about each principle, in both orders, all at once.

    A reply other than one of the answer words is asked again, at most `max_repeats` times; then the judgment is
    skipped, with a note. `connection` goes to `Endpoint`: key_variable, cache, concurrency, price_per_million, ...
    """

    interface = "endpoint-1"

    def __init__(
        self,
        base_url: str,
        model: str,
        constitution: Constitution | None = None,
        principle: str | None = None,
        template: Template = PLAIN,
        name: str | None = None,
        max_repeats: int = 2,
        **connection: Any,
    ) -> None:
        super().__init__(name or f"endpoint:{model}", template, principles_for(template, constitution, principle))
        self.endpoint = Endpoint(base_url, model, **connection)
        self.max_repeats = max_repeats
        self.unread: list[str] = []  # the last reply to each question that got no answer word

    def __call__(self, prompt: Prompt, completions: Sequence[Completion], question: Question) -> Answer:
        answer = super().__call__(prompt, completions, question)
        if answer != Answer():
            return answer
        said = " ".join(self.unread[-1].split())[:80]
        note = f"asked {self.max_repeats + 1} times, {self.name} gave no answer word; its last reply: {said!r}"
        return replace(answer, note=note)

    def costs(self) -> str:
        """What it took so far, in one line."""
        return self.endpoint.costs()

    def _log_odds(self, texts: list[str], words: tuple[str, str]) -> list[float]:
        chats = [[{"role": "user", "content": text}] for text in texts]
        odds, waiting = [math.nan] * len(texts), list(range(len(texts)))
        again = f"Reply with one word and nothing else: {words[0]} or {words[1]}."
        for _ in range(self.max_repeats + 1):
            for i, reply in zip(waiting, self.endpoint([chats[i] for i in waiting], quiet=True), strict=True):
                found = read_reply(reply, words)
                if found is not None:
                    odds[i] = CERTAIN * (1 - 2 * found)
                chats[i] += [{"role": "assistant", "content": reply}, {"role": "user", "content": again}]
            waiting = [i for i in waiting if math.isnan(odds[i])]
        self.unread += [chats[i][-2]["content"] for i in waiting]
        return odds


def _sql(cache: Path, statement: str, *values: str) -> list[tuple[str, ...]]:
    """Run a statement on the cache, which several threads and processes may share."""
    try:
        with closing(sqlite3.connect(cache, timeout=30)) as connection, connection:
            return connection.execute(statement, values).fetchall()
    except sqlite3.Error as error:
        raise FeedbackError(f"{cache}: cannot be used as a cache of replies ({error}); name another file") from None
