"""Language models behind an OpenAI-compatible endpoint: asked in parallel, and never twice the same."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from rlhf_kit.feedback.constitution import PLAIN, Principle, Template, read_reply
from rlhf_kit.feedback.judging import Answer, FeedbackError, Question
from rlhf_kit.feedback.language_model import ModelRater
from rlhf_kit.models import Prompt
from rlhf_kit.progress import Countdown
from rlhf_kit.rewards import Completion

CERTAIN = 1000.0  # log-odds of a word that was replied
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
        if address.scheme not in ("http", "https") or address.username or address.password or address.query:
            raise FeedbackError(
                "base_url: is an address such as http://localhost:8000/v1, without a name, password or query; keys "
                "belong in an environment variable"
            )
        self.base_url, self.model, self.key_variable = base_url.rstrip("/"), model, key_variable
        self.concurrency, self.price_per_million = concurrency, price_per_million
        self.options = {"temperature": 0.0, **options}
        self.counts: Counter[str] = Counter()
        self._lock = Lock()  # of these counts
        self._key()  # raises if there is none
        self.cache = None if cache is None else Path(cache)
        self._sql(SCHEMA)
        # The client would keep a key that it is given, so each request brings its own. It follows no redirects, so that
        # a prompt goes to the address that was named and nowhere else.
        http = openai.DefaultHttpxClient(follow_redirects=False)
        self._client = openai.OpenAI(
            api_key="none", base_url=self.base_url, max_retries=max_retries, timeout=timeout, http_client=http
        )

    def __call__(self, prompts: Sequence[Prompt], quiet: bool = False) -> list[str]:
        """A reply to each prompt, a text or a chat; unless `quiet` it prints how many are done and the time left."""
        chats = [[{"role": "user", "content": each}] if isinstance(each, str) else each for each in prompts]
        # With a cache a request that comes twice is asked once; without one each is a sample of its own.
        names = [i if self.cache is None else json.dumps(chat) for i, chat in enumerate(chats)]
        distinct, replies = dict(zip(names, chats, strict=True)), []
        countdown = Countdown(f"replies of {self.model}", len(distinct))
        with ThreadPoolExecutor(self.concurrency) as pool:
            for text in pool.map(self.reply, distinct.values()):  # the first error cancels all the rest
                replies.append(text)
                if not quiet:
                    countdown.at(len(replies))
        found = dict(zip(distinct, replies, strict=True))
        return [found[name] for name in names]

    def reply(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The model's reply to a chat; raises FeedbackError, without the key, if there is none."""
        import openai

        request = {"url": self.base_url, "model": self.model, "messages": list(messages), **self.options}
        text = json.dumps(request, sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(text.encode()).hexdigest()
        known = self._sql("SELECT reply FROM replies WHERE key = ?", digest)
        self._count(from_cache=len(known), asked=1 - len(known))
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
        self._sql("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", digest, text, content)
        usage = getattr(answer, "usage", None)
        tokens_in, tokens_out = (getattr(usage, name, None) or 0 for name in ("prompt_tokens", "completion_tokens"))
        self._count(uncounted=int(not usage), tokens_in=tokens_in, tokens_out=tokens_out)
        return content

    def costs(self) -> str:
        """One line: requests, those that the cache saved, tokens and, with prices, the price."""
        n = self.counts
        line = f"{n['asked']} requests, {n['from_cache']} more from the cache"
        line += f", {n['tokens_in']} tokens in, {n['tokens_out']} out"
        if self.price_per_million is not None:
            into, out = self.price_per_million
            line += f", price {(n['tokens_in'] * into + n['tokens_out'] * out) / 1e6:.4f}"
        return line + (f" ({n['uncounted']} replies came without a count of tokens)" if n["uncounted"] else "")

    def _reason(self, error: Any) -> str:
        """What an error of the client says, without the key, and what to do."""
        status = getattr(error, "status_code", None)
        said = f"{error} {error.__cause__ or ''}" if status is None else f"{status}: {error.response.text}"
        said = " ".join(self._without_key(said).split())[:200]
        if status in (401, 403, 404):
            return f"refuses ({said}); check the model's name, base_url and key_variable={self.key_variable!r}"
        if status is not None and status != 429 and status < 500:
            return f"refuses the request ({said})"
        wait = self._without_key(error.response.headers.get("Retry-After", "")) if status else ""
        kept = "none without a cache" if self.cache is None else f"in {self.cache}, and the next attempt goes on there"
        return (
            f"gave no answer ({said}; Retry-After: {wait or 'not said'}; timeout={self._client.timeout} s, "
            f"max_retries={self._client.max_retries}); earlier replies are kept: {kept}"
        )

    def _count(self, **counts: int) -> None:
        with self._lock:
            self.counts.update(counts)

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

    def _sql(self, statement: str, *values: str) -> list[tuple[str, ...]]:
        """Run a statement on the cache, which several threads and processes may share; [] without a cache."""
        if self.cache is None:
            return []
        try:
            with closing(sqlite3.connect(self.cache, timeout=30)) as connection, connection:
                return connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise FeedbackError(f"{self.cache}: cannot be used as a cache ({error}); name another file") from None


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
        constitution: Sequence[Principle] | None = None,
        principle: str | None = None,
        template: Template = PLAIN,
        name: str | None = None,
        max_repeats: int = 2,
        **connection: Any,
    ) -> None:
        super().__init__(name or f"endpoint:{model}", template, constitution, principle)
        self.endpoint, self.max_repeats = Endpoint(base_url, model, **connection), max_repeats
        self.costs = self.endpoint.costs
        self.unread = ""  # the last reply that was no answer word

    def __call__(self, prompt: Prompt, completions: Sequence[Completion], question: Question) -> Answer:
        answer = super().__call__(prompt, completions, question)
        if answer != Answer():
            return answer
        said = " ".join(self.unread.split())[:80]
        note = f"asked {self.max_repeats + 1} times, {self.name} gave no answer word; its last reply: {said!r}"
        return replace(answer, note=note)

    def _log_odds(self, texts: list[str], words: tuple[str, str]) -> list[float]:
        chats = [[{"role": "user", "content": text}] for text in texts]
        odds, waiting = [math.nan] * len(texts), list(range(len(texts)))
        again = f"Reply with one word and nothing else: {words[0]} or {words[1]}."
        for _ in range(self.max_repeats + 1):
            for i, reply in zip(waiting, self.endpoint([chats[i] for i in waiting], quiet=True), strict=True):
                found = read_reply(reply, words)
                if found is not None:
                    odds[i] = CERTAIN * (1 - 2 * found)
                else:
                    self.unread = reply
                    chats[i] += [{"role": "assistant", "content": reply}, {"role": "user", "content": again}]
            waiting = [i for i in waiting if math.isnan(odds[i])]
        return odds
