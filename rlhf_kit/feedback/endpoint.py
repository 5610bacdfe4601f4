"""Language models behind an OpenAI-compatible endpoint: asked in parallel, and a reply is paid for once."""

import hashlib
import json
import math
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from rlhf_kit.feedback.constitution import PLAIN, Template, as_chat, read_reply
from rlhf_kit.feedback.judging import FeedbackError
from rlhf_kit.feedback.language_model import ModelRater, Rules
from rlhf_kit.models import Prompt

CERTAIN = 1000.0  # log-odds of a word that was replied
ATTEMPTS = 3  # at getting an answer word
SCHEMA = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, request TEXT NOT NULL, reply TEXT NOT NULL)"


class EndpointRater(ModelRater):
    """A model at `base_url` (such as http://localhost:8000/v1) as a rater: asked in words, `concurrency` at a time.

    The key is read from the environment variable `key_variable` for each request and kept nowhere (None: a server
    without keys). The client tries 429, 5xx and timeouts again up to `max_retries` times. A `cache`, a SQLite file,
    keeps each reply. Where a reply is no answer word, the model is asked again, twice; then the judgment is skipped,
    with a note. price_per_million: of tokens in and out, for `costs`. options: of each request (temperature=0).
    """

    interface = "endpoint-1"

    def __init__(
        self,
        base_url: str,
        model: str,
        constitution: Rules = None,
        principle: str | None = None,
        template: Template = PLAIN,
        name: str | None = None,
        key_variable: str | None = "OPENAI_API_KEY",
        cache: str | Path | None = None,
        concurrency: int = 8,
        max_retries: int = 5,
        timeout: float = 60.0,
        price_per_million: tuple[float, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(name or f"endpoint:{model}", template, constitution, principle)
        try:
            import openai
        except ModuleNotFoundError:
            raise FeedbackError("an endpoint needs the openai package: pip install 'rlhf-kit[endpoint]'") from None
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or address.username or address.password or address.query:
            said = "is an address such as http://localhost:8000/v1, without a name, password or query"
            raise FeedbackError(f"base_url: {said}; keys belong in an environment variable")
        self.base_url, self.model, self.key_variable = base_url.rstrip("/"), model, key_variable
        self.concurrency, self.price_per_million = concurrency, price_per_million
        self.options = {"temperature": 0.0, **options}
        self.counts: Counter[str] = Counter()
        self._lock = Lock()  # of the counts
        self._key()  # raises if there is none
        self.cache = None if cache is None else Path(cache)
        self._sql(SCHEMA)
        # The client would keep a key that it is given, so each request brings its own. It follows no redirects, so that
        # a prompt goes to the address that was named and nowhere else.
        http = openai.DefaultHttpxClient(follow_redirects=False)
        self._client = openai.OpenAI(
            api_key="none", base_url=self.base_url, max_retries=max_retries, timeout=timeout, http_client=http
        )

    def _log_odds(self, texts: list[str], words: tuple[str, str]) -> list[float]:
        chats, odds = [as_chat("user", text) for text in texts], [math.nan] * len(texts)
        again = as_chat("user", f"Reply with one word and nothing else: {words[0]} or {words[1]}.")
        for _ in range(ATTEMPTS):
            waiting = [i for i, known in enumerate(odds) if math.isnan(known)]
            for i, reply in zip(waiting, self.replies([chats[i] for i in waiting]), strict=True):
                found = read_reply(reply, words)
                if found is not None:
                    odds[i] = CERTAIN * (1 - 2 * found)
                    continue
                chats[i] += [*as_chat("assistant", reply[:1000]), *again]  # what goes on for ever is not paid for twice
                last = " ".join(reply.split())[:80]
                self.why_skipped = f"asked {ATTEMPTS} times, {self.name} gave no answer word; its last reply: {last!r}"
        return odds

    def replies(self, chats: Sequence[Prompt]) -> list[str]:
        """A reply to each chat, in order; FeedbackError, without the key, if there is none."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self._reply, chats))  # the first error cancels the rest

    def _reply(self, chat: Any) -> str:
        import openai

        request = {"url": self.base_url, "model": self.model, "messages": list(chat), **self.options}
        text = json.dumps(request, sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if known := self._sql("SELECT reply FROM replies WHERE key = ?", digest):
            self._count({"from_cache": 1})
            return known[0][0]
        key = self._key()
        headers = {"Authorization": f"Bearer {key}" if key else openai.Omit()}
        self._count({"asked": 1})
        answer: Any = None
        try:
            answer = self._client.chat.completions.create(
                model=self.model, messages=list(chat), extra_body=self.options, extra_headers=headers
            )
            content = answer.choices[0].message.content
            if not isinstance(content, str):
                raise ValueError
        except openai.APIError as error:
            raise FeedbackError(self._reason(error)) from None
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError):  # no JSON, or none with a message
            error_said = " ".join(self._without_key(str(getattr(answer, "error", "") or "")).split())[:200]
            said = "answered without a message; is base_url that of a chat-completions server (it often ends in /v1)?"
            raise FeedbackError(f"{self.model} at {self.base_url}: {said} {error_said}".strip()) from None
        content = self._without_key(content.encode(errors="replace").decode())  # half an emoji cannot be kept
        self._sql("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", digest, text, content)
        used = {"in": getattr(answer.usage, "prompt_tokens", 0), "out": getattr(answer.usage, "completion_tokens", 0)}
        self._count({name: n for name, n in used.items() if isinstance(n, int)})
        return content

    def costs(self) -> str:
        """One line: requests, those that the cache saved, tokens and, with prices, the price."""
        n, prices = self.counts, self.price_per_million
        price = "" if prices is None else f", price {(n['in'] * prices[0] + n['out'] * prices[1]) / 1e6:.4f}"
        cached = f"{n['from_cache']} more from the cache"
        return f"{n['asked']} requests, {cached}, {n['in']} tokens in, {n['out']} out{price}"

    def _count(self, counts: dict[str, int]) -> None:
        with self._lock:
            self.counts.update(counts)

    def _reason(self, error: Any) -> str:
        said, wait = f"{error} {error.__cause__ or ''}", ""
        if hasattr(error, "response"):
            said = f"{error.status_code}: {error.response.text}"
            wait = self._without_key(f"Retry-After: {error.response.headers.get('Retry-After', 'not said')}, ")
        said = " ".join(self._without_key(said).split())[:200]
        tried = f"{said}; {wait}timeout={self._client.timeout} s, max_retries={self._client.max_retries}"
        check = f"check the model's name, base_url and key_variable={self.key_variable!r}"
        kept = f"replies are kept in {self.cache or 'no file (no cache)'}"
        return f"{self.model} at {self.base_url}: gave no answer ({tried}); {check}; {kept}"

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "") if self.key_variable else ""
        if self.key_variable and not re.fullmatch("[!-~]+", key):
            said = f"the environment variable {self.key_variable} is not set or holds no key (it has spaces, say)"
            raise FeedbackError(f"{said}; put the key there, or pass key_variable=None for a server without keys")
        return key

    def _without_key(self, text: str) -> str:
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
