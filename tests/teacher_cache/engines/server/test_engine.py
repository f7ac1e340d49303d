"""A served teacher against a real server's recorded replies: the same records, whatever happens in between."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llavamod_offline.errors import ConfigError, LlavaModError, ModelError
from llavamod_offline.families import Family, open_family
from teacher_cache.engines.hf import HfCaptureEngine
from teacher_cache.engines.protocol import Request
from teacher_cache.engines.server.client import ServerClient
from teacher_cache.engines.server.engine import ServerCaptureEngine
from teacher_cache.engines.server.requests import COMPLETIONS, TOKENS, check_served
from teacher_cache.engines.server.served import ask_served
from teacher_cache.engines.server.settings import ServerSettings
from teacher_cache.format.record import RecordSettings
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.sequences import SequenceRecord
from tests.llavamod_offline.families.official import write_family
from tests.teacher_cache.engines.server.replaying import (
    DISABLED,
    LISTED,
    NOT_FINITE,
    TOO_MANY_LISTED,
    Fault,
    ReplayServer,
    cut_short,
    hang_up,
    refusal,
    replaying,
    samples,
    status,
    write_recorded_llava,
)
from tests.teacher_cache.engines.vllm_world import Captured, assert_listed, assert_same
from tests.tiny_teachers import write_tiny_qwen_vl

KEPT = RecordSettings(1.0, LISTED, 0, 1.0, ())
PROBE_TOKENS = 40  # at most; the samples have more
SETTINGS = ServerSettings(concurrency=2, patience_seconds=20.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recorded_llava(tmp_path_factory.mktemp("served") / "teacher")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Family:
    return open_family(folder, "qwen", image_aspect="auto", max_length=500)


@pytest.fixture
def server() -> Iterator[ReplayServer]:
    with replaying() as server:
        yield server


def _engine(server: ReplayServer, teacher: Family, settings: ServerSettings = SETTINGS) -> ServerCaptureEngine:
    with ServerClient(server.url, settings) as client:
        served = ask_served(client, model=None, listed=LISTED)
    size = min(len(teacher.encoder.tokenizer), teacher.head_rows)
    return ServerCaptureEngine(server.url, settings, served, teacher, KEPT, vocab_size=size)


def _requests(teacher: Family) -> list[Request]:
    return [Request(row, s, tuple(teacher.encode(s, r) for r in s.roles)) for row, s in enumerate(samples())]


def _captured(engine: ServerCaptureEngine) -> Captured:
    outcomes = list(engine.capture(_requests(engine.teacher)))
    found = {(o.key, o.role): o for o in outcomes if isinstance(o, SequenceRecord)}
    assert len(found) == len(outcomes) == len(samples())
    return found


@pytest.fixture(scope="module")
def undisturbed(teacher: Family) -> Captured:
    with replaying() as server:
        return _captured(_engine(server, teacher))


def test_recorded_answers_give_the_log_probs_of_the_hugging_face_engine(
    teacher: Family, server: ReplayServer, undisturbed: Captured
) -> None:
    engine = _engine(server, teacher)
    hf = HfCaptureEngine(
        teacher.load(torch.float32),
        teacher,
        KEPT,
        vocab_size=engine.vocab_size,
        seed=0,
        batch_size=4,
    )
    expected = {(o.key, o.role): o for o in hf.capture(_requests(teacher)) if isinstance(o, SequenceRecord)}
    assert_listed(expected, undisturbed)


def test_text_goes_to_completions_and_images_go_with_tokens(teacher: Family, server: ReplayServer) -> None:
    _captured(_engine(server, teacher))
    assert (server.asked[COMPLETIONS], server.asked[TOKENS]) == (2, 2)


@pytest.mark.parametrize(
    "faults",
    [
        [hang_up],
        [cut_short, cut_short],
        [status(503)],
        [status(502, b"<html>Bad Gateway</html>")],
        [status(429, Retry_After="0"), status(429, Retry_After="soon")],
        [status(500), status(500)],
        [hang_up, status(503), status(500), cut_short],
    ],
)
def test_a_server_that_fails_for_a_while_loses_nothing(
    teacher: Family, server: ReplayServer, undisturbed: Captured, faults: list[Fault]
) -> None:
    engine = _engine(server, teacher)
    server.faults.extend(faults)
    assert_same(undisturbed, _captured(engine))
    assert sum(server.asked[path] for path in (COMPLETIONS, TOKENS)) == len(samples()) + len(faults)


def test_an_outage_is_told_once(
    teacher: Family, server: ReplayServer, caplog: pytest.LogCaptureFixture, undisturbed: Captured
) -> None:
    server.faults.extend([hang_up] * 3)
    with caplog.at_level(logging.INFO):
        _captured(_engine(server, teacher, dataclasses.replace(SETTINGS, concurrency=1)))
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        f"{server.url}: no answer",
        f"{server.url} answers again",
    ]


def test_a_server_that_stays_away_ends_the_capture_in_one_line(teacher: Family, server: ReplayServer) -> None:
    engine = _engine(server, teacher, dataclasses.replace(SETTINGS, patience_seconds=0.2))
    server.faults.extend([status(503)] * 100)
    with pytest.raises(ModelError) as refused:
        _captured(engine)
    assert str(refused.value).startswith(f"{server.url}: sample 'tiny-")
    assert "503: went wrong, for 0 seconds: start the server, or correct engine.url" in str(refused.value)


def test_what_the_server_refuses_is_one_line_at_once(teacher: Family, server: ReplayServer) -> None:
    engine = _engine(server, teacher, dataclasses.replace(SETTINGS, concurrency=1))
    server.faults.append(refusal(*DISABLED))
    with pytest.raises(ModelError) as refused:
        _captured(engine)
    assert "sample 'tiny-" in str(refused.value)
    assert "was refused: 403: Scale-out endpoints are disabled. Restart vllm serve with --enable" in str(refused.value)
    assert sum(server.asked[path] for path in (COMPLETIONS, TOKENS)) == 1


def test_logits_that_are_not_finite_reject_their_sequence_alone(teacher: Family, server: ReplayServer) -> None:
    engine = _engine(server, teacher)
    server.faults.append(refusal(*NOT_FINITE))
    outcomes = list(engine.capture(_requests(teacher)))
    (rejected,) = [outcome for outcome in outcomes if isinstance(outcome, Rejection)]
    assert rejected.reason == "the teacher's logits are not finite (NaN or inf)"
    assert len(outcomes) == len(samples())


def test_a_server_that_lists_too_few_ids_is_refused_at_once(server: ReplayServer) -> None:
    server.probe_faults.append(refusal(*TOO_MANY_LISTED))
    with (
        pytest.raises(
            ConfigError, match=r"max allowed: 20 .*: restart the server with --max-logprobs 64, or lower cap"
        ),
        ServerClient(server.url, SETTINGS) as client,
    ):
        ask_served(client, model=None, listed=64)


def test_a_request_at_which_the_server_fails_again_and_again_is_named(
    teacher: Family, server: ReplayServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teacher_cache.engines.server.client._LONGEST_WAIT", 0.01)
    engine = _engine(server, teacher, dataclasses.replace(SETTINGS, concurrency=1))
    server.faults.extend([status(500)] * 6)
    with pytest.raises(ModelError, match=r"sample 'tiny-\d+' \(response\) failed 6 times: 500: went wrong: read the"):
        _captured(engine)


def test_another_prompt_is_refused_with_the_first_difference(teacher: Family, server: ReplayServer) -> None:
    engine = _engine(server, teacher)

    def other(reply: dict[str, Any]) -> None:
        for holder in (reply, reply["choices"][0]):
            if len(holder.get("prompt_token_ids") or ()) > PROBE_TOKENS:
                holder["prompt_token_ids"][7] += 1

    server.change = other
    with pytest.raises(ModelError, match=r"sample 'tiny-\d+': vLLM ran a prompt of .* first differ at 7"):
        _captured(engine)


@pytest.mark.parametrize("name", ["prompt_token_ids", "prompt_logprobs"])
def test_a_server_that_does_not_say_is_refused(teacher: Family, server: ReplayServer, name: str) -> None:
    engine = _engine(server, teacher)

    def less(reply: dict[str, Any]) -> None:
        if len(reply.get("prompt_token_ids") or reply["choices"][0]["prompt_token_ids"]) > PROBE_TOKENS:
            for holder in (reply, reply["choices"][0]):
                holder.pop(name, None)

    server.change = less
    with pytest.raises(ModelError, match=r"sample 'tiny-\d+' \(response\): the server .*: serve with vLLM 0\.32"):
        _captured(engine)


def test_no_more_requests_at_once_than_set(teacher: Family, server: ReplayServer) -> None:
    server.seconds = 0.2
    _captured(_engine(server, teacher, dataclasses.replace(SETTINGS, concurrency=3)))
    assert server.most_at_once == 3


@pytest.mark.parametrize(
    "faults",
    [[hang_up], [status(502)], [status(503), hang_up], [status(504)]],
    ids=["lost", "502", "503 and lost", "504"],
)
def test_another_model_after_an_outage_is_refused(teacher: Family, server: ReplayServer, faults: list[Fault]) -> None:
    engine = _engine(server, teacher, dataclasses.replace(SETTINGS, concurrency=1))
    results = engine.capture(_requests(teacher))
    next(results)

    def other(reply: dict[str, Any]) -> None:
        for entry in (reply["choices"][0].get("prompt_logprobs") or [])[1:]:
            for value in entry.values():
                value["logprob"] *= 0.5

    server.change = other
    server.faults += faults
    with pytest.raises(ModelError, match="the server has another model under the name 'teacher'"):
        list(results)


def test_leaving_early_waits_for_nothing(teacher: Family, server: ReplayServer) -> None:
    engine = _engine(server, teacher, dataclasses.replace(SETTINGS, concurrency=1, patience_seconds=600))
    results = engine.capture(_requests(teacher))
    next(results)
    server.faults.extend([status(503, Retry_After="60")] * 10)
    began = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 30


def test_a_broken_image_is_rejected_alone(teacher: Family, server: ReplayServer, undisturbed: Captured) -> None:
    engine, requests = _engine(server, teacher), _requests(teacher)
    row = next(number for number, request in enumerate(requests) if len(request.sample.images) == 1)
    broken = dataclasses.replace(requests[row].sample, images=(b"\x89PNG broken",))
    requests[row] = dataclasses.replace(requests[row], sample=broken)
    outcomes = list(engine.capture(requests))
    (rejected,) = [outcome for outcome in outcomes if isinstance(outcome, Rejection)]
    assert (rejected.key, "cannot be decoded" in rejected.reason or "not a JPEG" in rejected.reason) == (
        broken.key,
        True,
    )
    kept = {(o.key, o.role): o for o in outcomes if isinstance(o, SequenceRecord)}
    assert_same({name: record for name, record in undisturbed.items() if name[0] != broken.key}, kept)


def test_a_sequence_longer_than_the_server_takes_is_rejected(teacher: Family, server: ReplayServer) -> None:
    engine = _engine(server, teacher)
    longest = max(len(s.input_ids_T) for r in _requests(teacher) for s in r.sequences)
    engine.served = dataclasses.replace(engine.served, longest=longest)
    server_models = engine.served  # what the server says now is compared with what it said before
    engine._check_same = lambda client: None  # type: ignore[method-assign]
    rejected = [o for o in engine.capture(_requests(teacher)) if isinstance(o, Rejection)]
    assert [item.reason for item in rejected] == [f"{longest} tokens, the server takes {server_models.longest - 1}"]


def test_teachers_that_a_server_changes_are_refused(teacher: Family, tmp_path: Path) -> None:
    """Qwen2-VL; and a processor that, like DINOv2's, resizes to more than it crops to, even images already cropped."""
    check_served(teacher)
    qwen = open_family(write_tiny_qwen_vl(tmp_path / "qwen", "2"), "qwen", image_aspect="auto", max_length=500)
    dino = open_family(write_family("llava_dinov2", tmp_path / "dino"), "qwen", image_aspect="auto", max_length=500)
    for family, reason in (
        (qwen, "for this family, or has not been compared"),
        (dino, "its image processor changes even images"),
    ):
        with pytest.raises(ConfigError, match=f"{reason}.*: set engine.kind=hf or vllm"):
            check_served(family)


def test_the_key_is_sent(teacher: Family, server: ReplayServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sesame")
    _captured(_engine(server, teacher, dataclasses.replace(SETTINGS, key_variable="TEACHER_KEY")))
    assert server.keys == {"Bearer sesame"}


def test_what_is_no_vllm_server_is_one_line(server: ReplayServer) -> None:
    settings = dataclasses.replace(SETTINGS, patience_seconds=0.0)
    for url in (f"{server.url}/elsewhere", "http://127.0.0.1:1"):
        with pytest.raises(LlavaModError) as refused, ServerClient(url, settings) as client:
            ask_served(client, model=None, listed=LISTED)
        assert str(refused.value).startswith(f"{url}: its version")
        assert "\n" not in str(refused.value)


def test_an_address_may_end_with_the_version_of_the_interface(server: ReplayServer) -> None:
    with ServerClient(f"{server.url}/v1/", SETTINGS) as client:
        served = ask_served(client, model="teacher", listed=LISTED)
    assert (served.version, served.longest) == ("0.32.0", 512)
    assert json.loads(json.dumps(served.system_fingerprint)).startswith("vllm-0.32.0-")
    with (
        pytest.raises(ConfigError, match=r"it has no model 'other': set engine\.server\.model to one of teacher"),
        ServerClient(server.url, SETTINGS) as client,
    ):
        ask_served(client, model="other", listed=LISTED)
