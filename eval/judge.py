"""Judges: language models that rate answers. One protocol, three kinds, and a record of every reply.

A record is a file of JSON lines {"key", "model", "messages", "reply"}; `key` is the SHA-256 of model and messages.
Recorded questions are never asked again, so a score can be reproduced from its record without the judge.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from eval.files import read_jsonl
from llavamod_offline.errors import ConfigError, EvalError

log = logging.getLogger(__name__)

Message = Mapping[str, str]
MAX_REPLY_TOKENS = 512
TIMEOUT_SECONDS = 120
TRIES = 3
_RETRIED = (408, 429, 500, 502, 503, 504)


class Judge(Protocol):
    """Replies to messages ({"role", "content"}) deterministically; `model` names it in the record."""

    model: str

    def complete(self, messages: Sequence[Message]) -> str:
        """Reply. Errors: `EvalError` on failure."""
        ...


class UrlJudge:
    """A server with OpenAI's chat completions API, such as a local vLLM; `url` ends before `/chat/completions`.

    The environment variable `key_variable` holds the key, if one is needed. urllib suffices for one kind of request;
    the `openai` client would add a dozen packages.
    """

    def __init__(self, url: str, model: str, *, key_variable: str = "") -> None:
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

    def complete(self, messages: Sequence[Message]) -> str:
        """Ask the server at temperature 0; busy servers and failed connections are retried twice."""
        body = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": MAX_REPLY_TOKENS}
        headers = {"Content-Type": "application/json"}
        if self._key_variable:
            headers["Authorization"] = f"Bearer {os.environ[self._key_variable]}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        for attempt in range(1, TRIES + 1):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                    return self._content(response.read())
            except urllib.error.HTTPError as error:
                if error.code not in _RETRIED or attempt == TRIES:
                    raise EvalError(f"judge {self.url}: status {error.code}: {_start(error.read())}") from error
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                if attempt == TRIES:
                    raise EvalError(f"judge {self.url}: cannot be reached: {error}: check --judge") from error
            time.sleep(attempt)
        raise AssertionError

    def _content(self, body: bytes) -> str:
        try:
            reply = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise EvalError(f"judge {self.url}: not a chat completion: {_start(body)}") from error
        if not isinstance(reply, str):
            raise EvalError(f"judge {self.url}: the reply contains no text: {_start(body)}")
        return reply


class LocalJudge:
    """A chat model in a local folder, run greedily in transformers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        from llavamod_offline.errors import ModelError
        from llavamod_offline.models.checkpoint import load_tokenizer

        self.tokenizer = load_tokenizer(folder)
        if not self.tokenizer.chat_template:
            raise ModelError(f"{folder}: the tokenizer has no chat template: use an instruction-tuned model")
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"{folder}: the judge cannot be loaded: {str(error).splitlines()[0]}") from error
        self._network = model.eval()
        self.model = folder.resolve().name

    def complete(self, messages: Sequence[Message]) -> str:
        """Reply greedily."""
        import torch
        from transformers import GenerationConfig

        prompt = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        ids_1T = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=MAX_REPLY_TOKENS,
            eos_token_id=self._network.generation_config.eos_token_id or self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
        )
        with torch.inference_mode():
            output_1X = self._network.generate(
                input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=settings
            )
        return str(self.tokenizer.decode(output_1X[0, ids_1T.shape[1] :], skip_special_tokens=True)).strip()


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

    def complete(self, messages: Sequence[Message]) -> str:
        """Look the reply up. Errors: `EvalError` if it was never recorded."""
        key = record_key(self.model, messages)
        if key not in self._replies:
            start = messages[-1]["content"].strip().splitlines()[-1][:60]
            raise EvalError(f"{self._path}: no recorded reply by '{self.model}' to '…{start}' ({key[:12]}…)")
        return self._replies[key]


def open_judge(name: str, *, model: str = "", key_variable: str = "") -> Judge:
    """Open the judge that `--judge` names: a URL, a model's folder, or a file of recorded replies."""
    if "://" in name:
        return UrlJudge(name, model, key_variable=key_variable)
    path = Path(name)
    if path.is_dir():
        return LocalJudge(path)
    if path.is_file():
        return RecordedJudge(path, model)
    raise ConfigError(f"judge '{name}': neither a URL, nor a model's folder, nor a file of recorded replies")


def ask(judge: Judge, questions: Mapping[str, str], record: Path) -> dict[str, str]:
    """Ask the judge each unrecorded question, recording every reply immediately → replies by id."""
    known = read_record(record)[0] if record.exists() else {}
    replies = {}
    record.parent.mkdir(parents=True, exist_ok=True)
    with record.open("ab") as stream, tqdm(questions.items(), desc="judge", disable=not sys.stderr.isatty()) as bar:
        for name, question in bar:
            messages = [{"role": "user", "content": question}]
            key = record_key(judge.model, messages)
            if key not in known:
                known[key] = judge.complete(messages)
                line = {"key": key, "model": judge.model, "messages": messages, "reply": known[key]}
                stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                stream.flush()
            replies[name] = known[key]
    log.info("judge %s: %d replies → %s", judge.model, len(replies), record)
    return replies


def record_key(model: str, messages: Sequence[Message]) -> str:
    """SHA-256 (hex) of a judge's model and the messages sent to it."""
    content = json.dumps([model, [[m["role"], m["content"]] for m in messages]], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def read_record(path: Path) -> tuple[dict[str, str], set[str]]:
    """Read a record → replies by key, and their models. Errors: `EvalError` naming the line."""
    replies, models = {}, set()
    for row in read_jsonl(path):
        messages: Any = row.values.get("messages")
        try:
            key = record_key(row.text("model"), messages)
        except (TypeError, KeyError) as error:
            raise row.error("'messages' must be a list of {role, content}") from error
        if row.text("key") != key:
            raise row.error("'key' does not match its model and messages: the record was edited, remove the line")
        replies[key] = row.text("reply")
        models.add(row.text("model"))
    return replies, models


def _start(body: bytes) -> str:
    return " ".join(body[:200].decode("utf-8", "replace").split())
