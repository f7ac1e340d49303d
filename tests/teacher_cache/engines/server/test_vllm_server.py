"""A real vLLM server on a CPU as the teacher: the Hugging Face engine's log-probs, even after the server was killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from llavamod_offline.data.encode.tokenize import Positions
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.families import Family, open_family
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.families.llava.export import save_llava
from teacher_cache.engines.hf import HfCaptureEngine
from teacher_cache.engines.listed import listed_ids
from teacher_cache.engines.protocol import CaptureEngine, Request
from teacher_cache.engines.server.client import ServerClient
from teacher_cache.engines.server.engine import ServerCaptureEngine
from teacher_cache.engines.server.served import ask_served
from teacher_cache.engines.server.settings import ServerSettings
from teacher_cache.format.record import RecordSettings
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.sequences import SequenceRecord
from tests.teacher_cache.engines.vllm_world import HEAD_OF_32, Captured, assert_listed
from tests.tiny import tiny_samples, write_tiny_llava
from tests.vllm_cpu import NEEDS_VLLM
from tests.vllm_cpu.server import VllmServer

pytestmark = NEEDS_VLLM

Serve = Callable[[Path], VllmServer]
BAD = Sample("bad", (Turn("user", "purple zebra?"), Turn("assistant", "A purple zebra.")))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    servers: list[VllmServer] = []

    def started(folder: Path) -> VllmServer:
        server = VllmServer(folder, tmp_path / "server.log")
        servers.append(server)
        server.start()
        server.wait()
        return server

    yield started
    for server in servers:
        server.kill()


def _llava(folder: Path) -> Path:
    """A tiny LLaVA with one token whose embedding is NaN, which only the sample `BAD` contains."""
    sound = write_tiny_llava(folder.parent / "sound", hidden=HEAD_OF_32, tied=False)
    model, teacher = load_llava(sound), open_family(sound, "qwen", image_aspect="pad", max_length=64)
    poison = teacher.encoder.tokenizer("purple zebra", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    save_llava(model, folder, tokenizer=teacher.encoder.tokenizer, processor_source=sound)
    return folder


def _engine(
    server: VllmServer,
    teacher: Family,
    kept: RecordSettings,
    *,
    positions: Positions = "response",
    concurrency: int = 4,
) -> ServerCaptureEngine:
    size = min(len(teacher.encoder.tokenizer), teacher.head_rows)
    settings = ServerSettings(concurrency=concurrency, patience_seconds=3600)  # starting may take long
    with ServerClient(server.url, settings) as client:
        served = ask_served(client, model=None, listed=listed_ids(kept.top_k, size))
    return ServerCaptureEngine(server.url, settings, served, teacher, kept, vocab_size=size, positions=positions)


def _hf(engine: ServerCaptureEngine) -> HfCaptureEngine:
    return HfCaptureEngine(
        engine.teacher.load(torch.float32),
        engine.teacher,
        engine.settings,
        vocab_size=engine.vocab_size,
        seed=0,
        batch_size=8,
        positions=engine.positions,
    )


def _requests(teacher: Family, samples: list[Sample]) -> list[Request]:
    return [Request(row, s, tuple(teacher.encode(s, role) for role in s.roles)) for row, s in enumerate(samples)]


def _captured(engine: CaptureEngine, requests: list[Request]) -> Captured:
    outcomes = list(engine.capture(requests))
    assert not [outcome for outcome in outcomes if isinstance(outcome, Rejection)]
    return {(o.key, o.role): o for o in outcomes if isinstance(o, SequenceRecord)}


def _assert_served(engine: ServerCaptureEngine, requests: list[Request]) -> None:
    assert_listed(_captured(_hf(engine), requests), _captured(engine, requests))


def test_a_served_teacher_gives_the_log_probs_of_the_hugging_face_engine(serve: Serve, tmp_path: Path) -> None:
    """A kill in the middle changes nothing. This is one test because servers start slowly."""
    folder = _llava(tmp_path / "teacher")
    server, teacher = serve(folder), open_family(folder, "qwen", image_aspect="auto", max_length=500)
    samples = [*tiny_samples(12, seed=9), *tiny_samples(4, seed=9, preference=True)]
    assert {0, 1, 2} <= {len(sample.images) for sample in samples}
    requests = _requests(teacher, samples)
    top_12 = RecordSettings(1.0, 12, 0, 1.0, ())
    size = min(len(teacher.encoder.tokenizer), teacher.head_rows)
    _assert_served(_engine(server, teacher, top_12), requests)
    _assert_served(_engine(server, teacher, RecordSettings(1.0, size, 0, 1.0, ()), positions="all"), requests[:4])
    (rejected,) = _engine(server, teacher, top_12).capture(_requests(teacher, [BAD]))
    assert isinstance(rejected, Rejection)
    assert rejected.reason == "the teacher's logits are not finite (NaN or inf)"
    _assert_nothing_lost(server, _engine(server, teacher, top_12, concurrency=1), requests)


def _assert_nothing_lost(server: VllmServer, engine: ServerCaptureEngine, requests: list[Request]) -> None:
    """Kill the server between two replies and start it again while the engine waits for it."""
    undisturbed = _captured(engine, requests)
    found: Captured = {}
    for number, outcome in enumerate(engine.capture(requests)):
        assert isinstance(outcome, SequenceRecord)
        found[outcome.key, outcome.role] = outcome
        if number == 5:
            server.kill()
            server.start()
    assert list(found) == list(undisturbed)
    assert_listed(undisturbed, found)  # a restarted server may batch its first forward passes differently
