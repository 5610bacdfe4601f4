"""Language models behind an OpenAI-compatible chat-completions endpoint: asked patiently, and never twice the same."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from rlhf_kit.feedback.constitution import Constitution
from rlhf_kit.feedback.judging import Answer, FeedbackError, Question
from rlhf_kit.feedback.templates import PLAIN, Template, check_asked, questions, rank_by, read_reply
from rlhf_kit.models import Prompt
from rlhf_kit.progress import Countdown, clock
from rlhf_kit.rewards import Completion

LONGEST_WAIT = 600.0  # seconds; a server that asks for more is left alone
REFUSED = {
    401: "does not accept the key",
    403: "does not allow this key to use the model",
    404: "knows no such model or address",
}
SCHEMA = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, request TEXT NOT NULL, reply TEXT NOT NULL)"


class Endpoint:
    """A model at `base_url` (such as http://localhost:8000/v1), called with prompts for a reply each.

    The key is read from the environment variable `key_variable` for each request and kept nowhere (None: a server
    without keys). 429, 5xx and silence are tried again up to `max_retries` times, after the wait that the server asks
    for or exponentially longer ones from `backoff` seconds on, with jitter; 401, 403, 404 fail at once. With a `cache`
    (a SQLite file) each reply is kept by the SHA-256 of its whole request, and that is never paid for again.
    price_per_million: of tokens in and out, for `costs`. `options` go into each request (temperature 0 if not given).
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key_variable: str | None = "OPENAI_API_KEY",
        cache: str | Path | None = None,
        requests_per_minute: float | None = None,
        max_retries: int = 5,
        timeout: float = 60.0,
        backoff: float = 1.0,
        price_per_million: tuple[float, float] | None = None,
        **options: Any,
    ) -> None:
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise FeedbackError(f"base_url {base_url!r}: is no address; write one such as http://localhost:8000/v1")
        if address.username or address.password or address.query:
            raise FeedbackError("base_url: holds a name, password or query; keys belong in an environment variable")
        self.base_url, self.model = base_url.rstrip("/"), model
        self.key_variable = key_variable
        self.cache = None if cache is None else _Cache(Path(cache))
        self.max_retries, self.timeout, self.backoff = max_retries, timeout, backoff
        self.pause = 60 / requests_per_minute if requests_per_minute else 0.0
        self.price_per_million = price_per_million
        self.options = {"temperature": 0.0, **options}
        self.asked = self.from_cache = self.tokens_in = self.tokens_out = self.uncounted = 0
        self._next = 0.0  # on the monotonic clock: when the rate allows the next request
        self._key()

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r}, {self.model!r})"

    def __call__(self, prompts: Sequence[Prompt]) -> list[str]:
        """A reply to each prompt, a text or a chat; says how many are done and how long the rest will take."""
        countdown, replies = Countdown(f"replies of {self.model}", len(prompts)), []
        for done, prompt in enumerate(prompts, 1):
            replies.append(self.reply([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt))
            countdown.at(done)
        return replies

    def reply(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The model's reply to a chat; FeedbackError where none can be had, in one sentence without the key."""
        request = {"model": self.model, "messages": list(messages), **self.options}
        text = json.dumps({"url": self.base_url, **request}, sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(text.encode()).hexdigest()
        known = self.cache.get(key) if self.cache is not None else None
        if known is not None:
            self.from_cache += 1
            return known
        body = self._post(request)
        try:
            said = body["choices"][0]["message"]["content"]
            if not isinstance(said, str):
                raise TypeError
        except (KeyError, IndexError, TypeError):
            raise FeedbackError(
                f"{self._where}: answered without a message; is it a chat-completions server?"
            ) from None
        said = self._without_key(said)
        usage = body.get("usage") or {}
        self.uncounted += not usage
        self.tokens_in += int(usage.get("prompt_tokens") or 0)
        self.tokens_out += int(usage.get("completion_tokens") or 0)
        if self.cache is not None:
            self.cache.put(key, text, said)
        return said

    @property
    def price(self) -> float:
        """What this object's requests cost, in the currency of `price_per_million`; NaN where that was not given."""
        if self.price_per_million is None:
            return math.nan
        each = zip((self.tokens_in, self.tokens_out), self.price_per_million, strict=True)
        return sum(tokens * price / 1e6 for tokens, price in each)

    def costs(self) -> str:
        """One line: requests, those that the cache saved, tokens and, with prices, the price."""
        price = "" if self.price_per_million is None else f", price {self.price:.4f}"
        untold = f" ({self.uncounted} replies came without a count of tokens)" if self.uncounted else ""
        return (
            f"{self.asked} requests, {self.from_cache} more from the cache, {self.tokens_in} tokens in, "
            f"{self.tokens_out} out{price}{untold}"
        )

    def _post(self, request: dict[str, Any]) -> dict[str, Any]:
        """The body of the answer to a request, tried again while there is hope."""
        for attempt in range(self.max_retries + 1):
            self._keep_the_rate()
            self.asked += 1
            asked_to_wait = None
            try:
                response = httpx.post(
                    f"{self.base_url}/chat/completions", json=request, headers=self._headers(), timeout=self.timeout
                )
            except httpx.TimeoutException:
                trouble = f"gave no answer within {self.timeout:g} s"
            except httpx.TransportError as error:
                trouble = f"cannot be reached ({self._without_key(str(error))})"
            else:
                if response.status_code < 400:
                    return self._body(response)
                trouble = f"answered {response.status_code}"
                if response.status_code != 429 and response.status_code < 500:
                    self._give_up(response)
                asked_to_wait = _retry_after(response)
            if attempt == self.max_retries:
                break
            wait = self.backoff * 2**attempt * random.uniform(0.5, 1.0) if asked_to_wait is None else asked_to_wait
            if wait > LONGEST_WAIT:
                raise FeedbackError(f"{self._where}: {trouble} and asks to wait {clock(wait)}; {self._kept}")
            if wait > 5:
                print(f"  {self._where}: {trouble}; asking again in {clock(wait)}", flush=True)
            time.sleep(wait)
        tries = "once" if self.max_retries == 0 else f"{self.max_retries + 1} times"
        raise FeedbackError(f"{self._where}: {trouble}, asked {tries}; {self._kept}")

    def _body(self, response: httpx.Response) -> dict[str, Any]:
        try:
            body = response.json()
        except ValueError:
            body = None
        if response.status_code >= 300 or not isinstance(body, dict):
            raise FeedbackError(
                f"{self._where}: answered {response.status_code} without JSON; is base_url that of a chat-completions "
                "server (it often ends in /v1)?"
            )
        return body

    def _give_up(self, response: httpx.Response) -> None:
        code = response.status_code
        if code in REFUSED:
            key = f"the key in {self.key_variable}" if self.key_variable else "no key was sent, set key_variable"
            raise FeedbackError(f"{self._where}: {REFUSED[code]} ({code}); check the model's name, base_url and {key}")
        said = " ".join(self._without_key(response.text).split())[:200]
        raise FeedbackError(f"{self._where}: refuses the request ({code}: {said})")

    def _keep_the_rate(self) -> None:
        now = time.monotonic()
        time.sleep(max(0.0, self._next - now))
        self._next = max(now, self._next) + self.pause

    def _key(self) -> str:
        if self.key_variable is None:
            return ""
        key = os.environ.get(self.key_variable, "")
        if not key:
            raise FeedbackError(
                f"{self._where}: the environment variable {self.key_variable} is not set; put the key there, or pass "
                "key_variable=None for a server without keys"
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise FeedbackError(f"the environment variable {self.key_variable} holds no key: it has spaces or such")
        return key

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key()}"} if self.key_variable else {}

    def _without_key(self, text: str) -> str:
        """What a server said, should it repeat the key."""
        key = self._key()
        return text.replace(key, "[key]") if key else text

    @property
    def _where(self) -> str:
        return f"{self.model} at {self.base_url}"

    @property
    def _kept(self) -> str:
        if self.cache is None:
            return "pass cache='replies.sqlite' so that a next attempt goes on from where this one stopped"
        return f"earlier replies are kept in {self.cache.path}, and a next attempt goes on from there"


class EndpointRater:
    """A model at an endpoint as a rater: asked in words about each principle, in both orders, and averaged.

    A reply other than one of the answer words is asked again, at most `max_repeats` times; then the item is skipped,
    with a note. `connection` goes to `Endpoint`: key_variable, cache, requests_per_minute, price_per_million, ...
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
        self.endpoint = Endpoint(base_url, model, **connection)
        self.name = name or f"endpoint:{model}"
        self.template = template
        self.principles = questions(template, constitution, principle)
        self.max_repeats = max_repeats
        self.firsts: list[float] = []

    def __repr__(self) -> str:
        return f"EndpointRater({self.endpoint.base_url!r}, {self.endpoint.model!r})"

    @property
    def position_bias(self) -> float:
        """By how much the completion shown first was preferred above 1/2, over all that was asked; NaN before that."""
        return sum(self.firsts) / len(self.firsts) - 0.5 if self.firsts else math.nan

    def __call__(self, prompt: Prompt, completions: Sequence[Completion], question: Question) -> Answer:
        check_asked(question, self.name)
        try:
            if question == "rank":
                return rank_by(self.preference, prompt, list(completions))
            said = self._choose(self.template.rating(prompt, completions[0]), self.template.verdicts)
            return Answer(rating=1 - said)
        except GarbageError as error:
            return Answer(note=str(error))

    def preference(self, prompt: Prompt, a: Completion, b: Completion) -> float:
        """P(a is preferred to b): the share, by the principles' weights, of replies in both orders that say so.

        Exactly 1 - preference(prompt, b, a). Raises GarbageError where the model will not say.
        """
        if not self.template.compare:
            good = [1 - self._choose(self.template.rating(prompt, each), self.template.verdicts) for each in (a, b)]
            return (1 + good[0] - good[1]) / 2
        won, firsts = 0.0, []
        for principle in self.principles:
            one = self._choose(self.template.comparison(prompt, a, b, principle.compare), self.template.choices)
            other = self._choose(self.template.comparison(prompt, b, a, principle.compare), self.template.choices)
            won += principle.weight * (other - one) / 2  # the difference, for that of the other order is its negative
            firsts += [1 - one, 1 - other]
        self.firsts.append(sum(firsts) / len(firsts))
        share = won / sum(principle.weight for principle in self.principles)
        return 0.5 + round(share * 2.0**40) / 2.0**40

    def costs(self) -> str:
        """What it took so far, in one line."""
        return self.endpoint.costs()

    def _choose(self, text: str, words: tuple[str, str]) -> int:
        """0 or 1: which of two words the model replies."""
        messages, reply = [{"role": "user", "content": text}], ""
        for _ in range(self.max_repeats + 1):
            reply = self.endpoint.reply(messages)
            found = read_reply(reply, words)
            if found is not None:
                return found
            again = f"Reply with one word and nothing else: {words[0]} or {words[1]}."
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": again}]
        said = " ".join(reply.split())[:80]
        asked = f"asked {self.max_repeats + 1} times, {self.name} never said"
        raise GarbageError(f"{asked} {words[0]} or {words[1]}; its last reply: {said!r}")


class GarbageError(FeedbackError):
    """A model that was asked for one of two words kept saying something else."""


class _Cache:
    """Replies by the SHA-256 of their request, in a SQLite file that several processes may share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with closing(sqlite3.connect(path, timeout=30)) as connection, connection:
                connection.execute(SCHEMA)
                connection.execute("SELECT key, request, reply FROM replies LIMIT 1")
        except sqlite3.Error as error:
            raise FeedbackError(f"{path}: cannot be used as a cache of replies ({error}); name another file") from None

    def get(self, key: str) -> str | None:
        with closing(sqlite3.connect(self.path, timeout=30)) as connection:
            row = connection.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, request: str, reply: str) -> None:
        with closing(sqlite3.connect(self.path, timeout=30)) as connection, connection:
            connection.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", (key, request, reply))


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that a server asks to wait, which it says as a number or as a date."""
    said = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(said)
    except ValueError:
        return None
    return max(0.0, (until.astimezone(UTC) - datetime.now(UTC)).total_seconds())
