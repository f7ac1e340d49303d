"""Judges: language models that rate answers. One protocol, three kinds, and a record of every reply.

A record is a file of JSON lines {"key", "model", "messages", "reply"}; `key` is the SHA-256 of model and messages.
Recorded questions are never asked again, so a score can be reproduced from its record without the judge.
A reply without text, or one that was cut off, is recorded with its reason as "unreadable", and counts as such.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

from eval.files import end_last_line, read_jsonl
from llavamod_offline.errors import ConfigError, EvalError, ModelError, first_line
from llavamod_offline.models.hub import checkpoint_folder
from llavamod_offline.progress import track
from llavamod_offline.signals import keeping

log = logging.getLogger(__name__)

Message = Mapping[str, str]
MAX_REPLY_TOKENS = 512
TIMEOUT_SECONDS = 120
TRIES = 3
_RETRIED = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Reply:
    """A judge's reply; `unreadable`: why it has no usable text, empty if it has some."""

    text: str
    unreadable: str = ""

    @property
    def readable(self) -> str:
        """The text to read; empty if there is none."""
        return "" if self.unreadable else self.text


class Judge(Protocol):
    """Replies to messages ({"role", "content"}) deterministically; `model` names it in the record."""

    model: str

    def complete(self, messages: Sequence[Message]) -> Reply:
        """Reply. Errors: `EvalError` on failure."""
        ...


class UrlJudge:
    """A server with OpenAI's chat completions API, such as a local vLLM; `url` ends before `/chat/completions`.

    The environment variable `key_variable` holds the key, if one is needed. urllib suffices for one kind of request;
    the `openai` client would add a dozen packages.
    """

    def __init__(self, url: str, model: str, *, key_variable: str = "", max_tokens: int = MAX_REPLY_TOKENS) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"judge '{url}': expected a URL such as http://localhost:8000/v1")
        if not model:
            raise ConfigError(f"judge '{url}': name its model with --judge-model")
        if key_variable and not os.environ.get(key_variable):
            raise ConfigError(f"judge '{url}': the environment variable {key_variable} is not set")
        self.url = url.rstrip("/") + "/chat/completions"
        self.model = model
        self._key_variable = key_variable
        self._max_tokens = max_tokens

    def complete(self, messages: Sequence[Message]) -> Reply:
        """Ask the server at temperature 0; busy servers and failed connections are retried twice."""
        body = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": self._max_tokens}
        headers = {"Content-Type": "application/json"}
        if self._key_variable:
            headers["Authorization"] = f"Bearer {os.environ[self._key_variable]}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        for attempt in range(1, TRIES + 1):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                    return self._reply(response.read())
            except urllib.error.HTTPError as error:
                if error.code not in _RETRIED or attempt == TRIES:
                    raise EvalError(f"judge {self.url}: status {error.code}: {_start(error.read())}") from error
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                if attempt == TRIES:
                    raise EvalError(f"judge {self.url}: cannot be reached: {error}: check --judge") from error
            time.sleep(attempt)
        raise AssertionError

    def _reply(self, body: bytes) -> Reply:
        try:
            completion = json.loads(body)
        except ValueError as error:
            raise EvalError(f"judge {self.url}: not a chat completion: {_start(body)}") from error
        if not isinstance(completion, dict) or completion.get("error"):
            raise EvalError(f"judge {self.url}: not a chat completion: {_start(body)}")
        choices = completion.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            return Reply("", "no choices")
        message, finish = choice.get("message"), choice.get("finish_reason")
        text = message.get("content") if isinstance(message, dict) else None
        if finish == "length":
            return Reply(text if isinstance(text, str) else "", _cut_off(self._max_tokens))
        if not isinstance(text, str) or not text.strip():
            refusal = message.get("refusal") if isinstance(message, dict) else None
            return Reply("", f"refusal: {refusal}" if refusal else f"no text (finish_reason {json.dumps(finish)})")
        return Reply(text)


class LocalJudge:
    """A chat model in a local folder, run greedily in transformers, on a GPU if there is one.

    `model`: its name and a digest of its files, so that replies of another model of this name are not taken for its.
    """

    def __init__(self, folder: Path, *, max_tokens: int = MAX_REPLY_TOKENS) -> None:
        from transformers import AutoModelForCausalLM

        from eval.engines.hf import checkpoint_digest
        from llavamod_offline.models.checkpoint import load_tokenizer
        from llavamod_offline.models.device import pick_device
        from llavamod_offline.models.hub import checkpoint_name

        self.tokenizer = load_tokenizer(folder)
        if not self.tokenizer.chat_template:
            raise ModelError(f"{folder}: the tokenizer has no chat template: use an instruction-tuned model")
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"{folder}: the judge cannot be loaded: {first_line(error)}") from error
        self._device = pick_device("auto")
        self._network = model.eval().to(self._device)
        self.model = f"{checkpoint_name(folder)}@{checkpoint_digest(folder)[:12]}"
        self._max_tokens = max_tokens

    def complete(self, messages: Sequence[Message]) -> Reply:
        """Reply greedily."""
        import torch
        from transformers import GenerationConfig

        prompt = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        ids_1T = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].to(self._device)
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=self._max_tokens,
            eos_token_id=self._network.generation_config.eos_token_id or self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
        )
        with torch.inference_mode():
            output_1X = self._network.generate(
                input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=settings
            )
        ids_G = output_1X[0, ids_1T.shape[1] :]
        text = str(self.tokenizer.decode(ids_G, skip_special_tokens=True)).strip()
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        if int(ids_G[-1]) not in ends:
            return Reply(text, _cut_off(self._max_tokens))
        return Reply(text, "" if text else "no text")


class RecordedJudge:
    """Replies from a record; `model` may be omitted if the record has only one."""

    def __init__(self, path: Path, model: str = "") -> None:
        self._path = path
        self._replies, models = read_record(path)
        if model and model not in models:
            raise ConfigError(
                f"{path}: no reply by '{model}', only by {', '.join(sorted(models)) or 'none'}: change --judge-model"
            )
        if not model and len(models) != 1:
            raise ConfigError(f"{path}: has replies by {len(models)} models: name one with --judge-model")
        self.model = model or models.pop()

    def complete(self, messages: Sequence[Message]) -> Reply:
        """Look the reply up. Errors: `EvalError` if it was never recorded."""
        key = record_key(self.model, messages)
        if key not in self._replies:
            start = messages[-1]["content"].strip().splitlines()[-1][:60]
            raise EvalError(
                f"{self._path}: no recorded reply by '{self.model}' to '…{start}' ({key[:12]}…): give the template it "
                "was asked with (--judge-template), or ask the judge first (score --judge)"
            )
        return self._replies[key]


def open_judge(name: str, *, model: str = "", key_variable: str = "", max_tokens: int | None = None) -> Judge:
    """Open the judge that `--judge` names: a URL, a model's folder or Hub id, or a file of recorded replies.

    Errors: `ConfigError` for any other name, and for options that this kind of judge does not use.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"--judge-max-tokens is {max_tokens}: must be at least 1")
    limit = MAX_REPLY_TOKENS if max_tokens is None else max_tokens
    if "://" in name:
        return UrlJudge(name, model, key_variable=key_variable, max_tokens=limit)
    given = {"--judge-model": model, "--judge-key-variable": key_variable, "--judge-max-tokens": max_tokens}
    if os.path.isfile(name):
        _refuse_unused(given, ("--judge-key-variable", "--judge-max-tokens"), f"'{name}' has replies already")
        return RecordedJudge(Path(name), model)
    folder = checkpoint_folder(name)
    if folder.is_dir():
        _refuse_unused(given, ("--judge-model", "--judge-key-variable"), f"'{name}' is a model, not a server")
        return LocalJudge(folder, max_tokens=limit)
    raise ConfigError(f"judge '{name}': neither a URL, nor a model's folder or Hub id, nor a file of recorded replies")


def _refuse_unused(given: Mapping[str, object], unused: Sequence[str], why: str) -> None:
    for option in unused:
        if given[option]:
            raise ConfigError(f"{option}: {why}: remove it")


def ask(judge: Judge, questions: Mapping[str, str], record: Path) -> dict[str, str]:
    """Ask the judge each unrecorded question, recording each reply at once; returns replies by id ("": unreadable)."""
    if record.exists():
        end_last_line(record)
    known = read_record(record)[0] if record.exists() else {}
    replies: dict[str, Reply] = {}
    record.parent.mkdir(parents=True, exist_ok=True)
    with (
        keeping(lambda: f"{len(known)} replies are in {record}" if known else ""),
        record.open("ab") as stream,
    ):
        for name, question in track(list(questions.items()), "judge", "question"):
            messages = [{"role": "user", "content": question}]
            key = record_key(judge.model, messages)
            if key not in known:
                reply = known[key] = _valid(judge.complete(messages))
                line = {"key": key, "model": judge.model, "messages": messages, "reply": reply.text}
                line |= {"unreadable": reply.unreadable} if reply.unreadable else {}
                stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                stream.flush()
            replies[name] = known[key]
    log.info("judge %s: %d replies → %s", judge.model, len(replies), record)
    unreadable = [reply.unreadable for reply in replies.values() if reply.unreadable]
    if unreadable:
        log.warning(
            "judge %s: %d of %d replies are unreadable, the first: %s; remove their lines from %s to ask again",
            *(judge.model, len(unreadable), len(replies), unreadable[0], record),
        )
    return {name: reply.readable for name, reply in replies.items()}


def _valid(reply: Reply) -> Reply:
    """A reply as UTF-8 can hold it: a server may send half of a surrogate pair."""
    return Reply(*(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in astuple(reply)))


def record_key(model: str, messages: Sequence[Message]) -> str:
    """SHA-256 (hex) of a judge's model and the messages sent to it."""
    content = json.dumps([model, [[m["role"], m["content"]] for m in messages]], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def read_record(path: Path) -> tuple[dict[str, Reply], set[str]]:
    """Read a record; returns replies by key, and their models. Errors: `EvalError` naming the line."""
    replies, models = {}, set()
    for row in read_jsonl(path):
        messages: Any = row.values.get("messages")
        try:
            key = record_key(row.text("model"), messages)
        except (TypeError, KeyError) as error:
            raise row.error("'messages' must be a list of {role, content}") from error
        if row.text("key") != key:
            raise row.error("'key' does not match its model and messages: the record was edited, remove the line")
        replies[key] = Reply(row.text("reply"), row.text("unreadable") if "unreadable" in row.values else "")
        models.add(row.text("model"))
    return replies, models


def _cut_off(max_tokens: int) -> str:
    return f"cut off at {max_tokens} tokens (see --judge-max-tokens)"


def _start(body: bytes) -> str:
    return " ".join(body[:200].decode("utf-8", "replace").split())
