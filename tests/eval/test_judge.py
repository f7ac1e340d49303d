"""Judges: a real server on this machine, a local model, recorded replies; and scores recomputed from a record."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from eval.judge import LocalJudge, RecordedJudge, Reply, UrlJudge, ask, open_judge, read_record, record_key
from eval.score import score_task
from eval.scorers.chair import parse_objects
from llavamod_offline.errors import ConfigError, EvalError, ModelError
from tests.eval.fixtures import answers, halbench_root, mmhal_root, write_jsonl
from tests.tiny import write_tiny_language_model, write_tiny_llava


class Server(BaseHTTPRequestHandler):
    """A chat server that replies from a list: a number is a status, bytes are sent verbatim."""

    replies: ClassVar[list[str | int | bytes]] = []
    seen: ClassVar[list[dict[str, Any]]] = []
    keys: ClassVar[list[str | None]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append(json.loads(body))
        self.keys.append(self.headers.get("Authorization"))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, int):
            self.send_response(reply)
            content = b'{"error": "no\nwell"}'
        else:
            self.send_response(200)
            message = {"role": "assistant", "content": reply}
            content = reply if isinstance(reply, bytes) else json.dumps({"choices": [{"message": message}]}).encode()
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("eval.judge.time.sleep", lambda _: None)
    Server.replies, Server.seen, Server.keys = ["Rating: 5"], [], []
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


QUESTION = [{"role": "user", "content": "Rate it."}]


def test_a_server_is_asked_at_temperature_0(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert UrlJudge(url + "/", "big").complete(QUESTION) == Reply("Rating: 5")
    assert Server.seen == [{"model": "big", "messages": QUESTION, "temperature": 0, "max_tokens": 512}]
    assert Server.keys == [None]
    assert open_judge(url, model="big", max_tokens=4000).complete(QUESTION) == Reply("Rating: 5")
    assert Server.seen.pop()["max_tokens"] == 4000
    Server.keys.pop()
    monkeypatch.setenv("MY_KEY", "secret")
    UrlJudge(url, "big", key_variable="MY_KEY").complete(QUESTION)
    assert Server.keys[1] == "Bearer secret"


def test_a_busy_server_is_asked_again_and_a_refusal_is_one_line(url: str) -> None:
    Server.replies = [503, 429, "Rating: 1"]
    assert UrlJudge(url, "big").complete(QUESTION) == Reply("Rating: 1")
    for reply, message in (
        (400, "status 400"),
        (500, "status 500"),
        (b"<html>", "not a chat completion"),
        (b"[]", "not a chat completion"),
        (b'{"error": {"message": "overloaded"}}', "not a chat completion"),
    ):
        Server.replies = [reply]
        with pytest.raises(EvalError, match=message) as error:
            UrlJudge(url, "big").complete(QUESTION)
        assert "\n" not in str(error.value)
    with pytest.raises(EvalError, match="cannot be reached"):
        UrlJudge("http://127.0.0.1:9/v1", "big").complete(QUESTION)


WITHOUT_TEXT = {
    b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}': 'no text (finish_reason "stop")',
    b'{"choices": [{"message": {"content": null}, "finish_reason": "content_filter"}]}': "content_filter",
    b'{"choices": [{"message": {"content": "", "refusal": "I cannot."}}]}': "refusal: I cannot.",
    b'{"choices": [{"message": {"content": " \\n"}}]}': "no text",
    b'{"choices": [{"message": {"content": [{"type": "text"}]}}]}': "no text",
    b'{"choices": [{"message": {"content": "Rating: 0 is bad", "cut": 1}, "finish_reason": "length"}]}': "cut off",
    b'{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}': "cut off",
    b'{"choices": [{"message": null}]}': "no text",
    b'{"choices": [{}]}': "no text",
    b'{"choices": []}': "no choices",
    b'{"choices": null}': "no choices",
    b"{}": "no choices",
}


@pytest.mark.parametrize("body", WITHOUT_TEXT)
def test_a_reply_without_text_is_recorded_and_counts_as_unreadable(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, body: bytes
) -> None:
    root = mmhal_root(tmp_path / "data", 60)
    path = write_jsonl(tmp_path / "a.jsonl", answers({n: f"It is {n}." for n in range(60)}))
    Server.replies = [*["Rating: 6"] * 7, body, "Rating: 6"]
    score = score_task("mmhal", root, path, judge=UrlJudge(url, "big"))
    assert score.n_unparsed == 1
    assert score.metrics["score"] == pytest.approx(6 * 59 / 60)
    assert score.verdicts["7"].read_as == ""
    line = json.loads((tmp_path / "a.judge.jsonl").read_text().splitlines()[7])
    assert WITHOUT_TEXT[body] in line["unreadable"]
    assert "1 of 60 replies are unreadable" in caplog.text
    assert score_task("mmhal", root, path, judge=UrlJudge(url, "big")) == score
    assert len(Server.seen) == 60  # none is asked again
    assert score_task("mmhal", root, path, judge=open_judge(str(tmp_path / "a.judge.jsonl"))) == score


def test_above_2_percent_of_replies_without_text_there_is_no_headline(url: str, tmp_path: Path) -> None:
    root = mmhal_root(tmp_path / "data", 4)
    path = write_jsonl(tmp_path / "a.jsonl", answers({n: f"It is {n}." for n in range(4)}))
    Server.replies = [b'{"choices": [{"message": {"content": null}}]}', "Rating: 6"]
    score = score_task("mmhal", root, path, judge=UrlJudge(url, "big"))
    assert (score.n_unparsed, score.metrics["score"]) == (1, None)


def test_every_reply_is_recorded_and_replayed(url: str, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    Server.replies = ["Rating: 1", "Rating: 2", "Rating: 3"]
    judge = UrlJudge(url, "big")
    assert ask(judge, {"a": "one", "b": "two"}, record) == {"a": "Rating: 1", "b": "Rating: 2"}
    assert ask(judge, {"b": "two", "c": "three"}, record) == {"b": "Rating: 2", "c": "Rating: 3"}
    assert len(Server.seen) == 3
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["messages"][0]["content"] for line in lines] == ["one", "two", "three"]
    again = RecordedJudge(record)
    assert again.model == "big"
    assert ask(again, {"c": "three"}, tmp_path / "other.jsonl") == {"c": "Rating: 3"}
    with pytest.raises(EvalError, match="no recorded reply by 'big' to '…four'"):
        ask(again, {"d": "four"}, tmp_path / "other.jsonl")


def test_what_was_answered_before_a_failure_is_kept(url: str, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    Server.replies = ["Rating: 1", 400]
    with pytest.raises(EvalError):
        ask(UrlJudge(url, "big"), {"a": "one", "b": "two"}, record)
    Server.replies = ["Rating: 2"]
    assert ask(UrlJudge(url, "big"), {"a": "one", "b": "two"}, record) == {"a": "Rating: 1", "b": "Rating: 2"}


def test_an_edited_record_is_refused(tmp_path: Path) -> None:
    line = {"key": record_key("m", QUESTION), "model": "m", "messages": QUESTION, "reply": "Rating: 5"}
    assert RecordedJudge(write_jsonl(tmp_path / "r.jsonl", [line])).complete(QUESTION) == Reply("Rating: 5")
    for change, message in (
        ({"messages": [{"role": "user", "content": "Rate that."}]}, "does not match"),
        ({"model": "n"}, "does not match"),
        ({"messages": "x"}, "'messages' must be a list"),
        ({"reply": 5}, "field 'reply' must be a string"),
        ({"unreadable": 5}, "field 'unreadable' must be a string"),
    ):
        with pytest.raises(EvalError, match=message):
            RecordedJudge(write_jsonl(tmp_path / "r.jsonl", [{**line, **change}]))


def test_judges_are_told_apart_by_what_they_are(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="name its model with --judge-model"):
        open_judge(url)
    with pytest.raises(ConfigError, match="neither a URL, nor"):
        open_judge(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="--judge-max-tokens is 0: must be at least 1"):
        open_judge(url, model="m", max_tokens=0)
    with pytest.raises(ConfigError, match="expected a URL such as"):
        open_judge("file:///etc/passwd", model="m")
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ConfigError, match="NO_KEY is not set"):
        open_judge(url, model="m", key_variable="NO_KEY")
    rows = []
    for model in ("m", "n"):
        rows.append({"key": record_key(model, QUESTION), "model": model, "messages": QUESTION, "reply": model})
    record = write_jsonl(tmp_path / "r.jsonl", rows)
    with pytest.raises(ConfigError, match="has replies by 2 models"):
        open_judge(str(record))
    assert open_judge(str(record), model="n").complete(QUESTION) == Reply("n")
    with pytest.raises(ConfigError, match="no reply by 'o'"):
        open_judge(str(record), model="o")


def test_options_that_a_judge_does_not_use_are_refused(tmp_path: Path) -> None:
    record = tmp_path / "r.jsonl"
    record.write_text("")
    with pytest.raises(ConfigError, match=r"--judge-max-tokens: .* has replies already: remove it"):
        open_judge(str(record), max_tokens=9)
    folder = write_tiny_language_model(tmp_path / "judge")
    with pytest.raises(ConfigError, match=r"--judge-model: .* is a model, not a server: remove it"):
        open_judge(str(folder), model="m")


@pytest.mark.parametrize("end", ["edited", "cut"])
def test_a_record_whose_last_line_is_not_ended_goes_on(url: str, tmp_path: Path, end: str) -> None:
    """An editor left out the last line break, or a full disk cut the line: no reply is glued to it."""
    record = tmp_path / "r.jsonl"
    ask(UrlJudge(url, "m"), {"1": "a", "2": "b"}, record)
    whole = record.read_bytes()
    record.write_bytes(whole[:-1] if end == "edited" else whole[:-9])
    asked = len(Server.seen)
    ask(UrlJudge(url, "m"), {"1": "a", "2": "b", "3": "c"}, record)
    assert len(Server.seen) - asked == (1 if end == "edited" else 2)
    assert len(read_record(record)[0]) == 3


def test_half_a_surrogate_pair_is_replaced(url: str, tmp_path: Path) -> None:
    Server.replies = ["Rating: 5 \ud83d"]
    assert ask(UrlJudge(url, "m"), {"1": "a"}, tmp_path / "r.jsonl") == {"1": "Rating: 5 \ufffd"}
    assert len(read_record(tmp_path / "r.jsonl")[0]) == 1


def test_a_local_model_judges(tmp_path: Path) -> None:
    folder = write_tiny_language_model(tmp_path / "judge")
    with pytest.raises(ModelError, match="no chat template"):
        LocalJudge(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    judge = open_judge(str(folder), max_tokens=8)
    assert re.fullmatch("judge@[0-9a-f]{12}", judge.model)
    assert judge.complete(QUESTION) == judge.complete(QUESTION)
    assert "cut off at 8 tokens" in judge.complete(QUESTION).unreadable
    with pytest.raises(ModelError, match="cannot be loaded"):
        LocalJudge(_with_chat(write_tiny_llava(tmp_path / "llava"), template))


def _with_chat(folder: Path, template: str) -> Path:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return folder


def test_mmhal_is_scored_by_a_server_and_again_from_its_record(url: str, tmp_path: Path) -> None:
    root = mmhal_root(tmp_path / "data", 4)
    path = write_jsonl(tmp_path / "a.jsonl", answers({n: f"It is {n}." for n in range(4)}))
    Server.replies = ["Rating: 6", "Rating: 0", "Rating: 5", "Rating: 1"]
    score = score_task("mmhal", root, path, judge=UrlJudge(url, "big"))
    assert score.metrics["score"] == 3.0
    assert score.metrics["hallucination_rate"] == 0.5
    sent = Server.seen[0]["messages"][0]["content"]
    for part in ("Cat, Tree", "Question 0?", "Answer 0.", "It is 0."):
        assert part in sent
    assert "judge: big at temperature 0, template mmhal-default-1 (sha256 " in score.protocol
    again = score_task("mmhal", root, path, judge=open_judge(str(tmp_path / "a.judge.jsonl")))
    assert again == score
    template = tmp_path / "official.txt"
    template.write_text("{}|{}|{}|{}")
    Server.replies = ["Rating: 4"]
    own = score_task("mmhal", root, path, judge=UrlJudge(url, "big"), judge_template=template)
    assert own.metrics["score"] == 4.0
    assert Server.seen[-1]["messages"][0]["content"] == "Cat, Tree|Question 3?|Answer 3.|It is 3."
    assert "template official.txt (sha256 " in own.protocol


@pytest.mark.parametrize(
    ("reply", "objects"),
    [
        ('["cat", "dining table"]', ["cat", "dining table"]),
        ('Here they are:\n["cat"]', ["cat"]),
        ('```json\n["cat",\n"dog"]\n```', ["cat", "dog"]),
        ("[]", []),
        ("cat, dog", None),
        ('{"objects": 1}', None),
        ("[1, 2]", None),
        ("", None),
    ],
)
def test_parse_objects(reply: str, objects: list[str] | None) -> None:
    assert parse_objects(reply) == objects


def test_object_halbench_with_a_judge_counts_every_object_once(url: str, tmp_path: Path) -> None:
    """Source: RLAIF-V's eval_gpt_obj_halbench.py with --use_gpt (`get_gpt_resp`, `get_pred_objs_match`)."""
    root = halbench_root(
        tmp_path / "data",
        ("dog, puppy", "cat", "car", "dining table, table", "chair, seat", "toilet"),
        {11: (["dog"], ["A dog."]), 12: (["cat"], ["A cat."]), 13: ([], ["Sea."])},
    )
    texts: dict[str | int, str] = {11: "A dog, a dog and a wooden table here.", 13: "Cars!"}
    texts[12] = "A toilet with a seat beside one cat."
    path = write_jsonl(tmp_path / "a.jsonl", answers(texts))
    Server.replies = ['["dog", "dogs", "wooden table"]', '["toilet", "seat", "cat"]']
    score = score_task("object_halbench", root, path, judge=UrlJudge(url, "big"))
    assert len(Server.seen) == 2  # an answer of at most three words counts as mentioning nothing
    assert score.metrics["object_hall"] == pytest.approx(2 / 4)  # dog, table!, toilet!, cat
    assert score.metrics["response_hall"] == 1.0
    assert "variant: chair_llm:big" in score.protocol
    assert "chair_string" not in score.protocol
    Server.replies = ["no list"]
    refused = score_task("object_halbench", root, path, judge=UrlJudge(url, "other"))
    assert refused.n_unparsed == 2
    assert refused.metrics["response_hall"] is None


def test_other_benchmarks_take_no_judge(url: str, tmp_path: Path) -> None:
    from tests.eval.fixtures import pope_root

    root = pope_root(tmp_path / "data", ("yes",))
    path = write_jsonl(tmp_path / "a.jsonl", answers({1: "Yes", 2: "Yes", 3: "Yes"}))
    with pytest.raises(ConfigError, match="task 'pope' takes no judge"):
        score_task("pope", root, path, judge=UrlJudge(url, "big"))
