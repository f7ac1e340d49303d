"""Which template a capture uses: the teacher's own by default, and on resuming the one it began with."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from llavamod_offline.config import load_config
from llavamod_offline.errors import CacheError, ConfigError
from teacher_cache.audit.run import audit_cache
from teacher_cache.capture.run import run_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.plan.estimate import make_plan
from teacher_cache.read.reader import open_cache
from tests.llavamod_offline.data.encode.test_chat_template import QWEN_VL, THINKING
from tests.tiny import write_tiny_llava, write_tiny_set
from tests.tiny_teachers import write_tiny_qwen_vl


def settings(tmp_path: Path, teacher: Path, *given: str) -> CacheTeacherConfig:
    data = tmp_path / "set"
    if not data.exists():
        write_tiny_set(data, 4, shard_samples=2)
    return load_config(
        CacheTeacherConfig, (), [f"data={data}", f"teacher={teacher}", f"output={tmp_path / 'c'}", *given]
    )


def template(tmp_path: Path) -> str:
    return str(open_cache(tmp_path / "c").fingerprint["template"]["name"])


@pytest.mark.parametrize("name", ["qwen", "chatml"])
def test_a_student_of_ours_teaches_in_its_own_wording(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = write_tiny_llava(tmp_path / "teacher", template=name)
    with caplog.at_level(logging.INFO):
        run_capture(settings(tmp_path, teacher))
    assert template(tmp_path) == name
    assert f"template: {name}, that of {teacher}" in caplog.messages


def test_a_teacher_from_elsewhere_is_captured_in_the_wording_of_its_processor(tmp_path: Path) -> None:
    """Its processor's chat template, which older checkpoints keep in a file of its own, not the tokenizer's."""
    teacher = write_tiny_qwen_vl(tmp_path / "teacher")
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    chat = QWEN_VL.replace("IMAGE", image)
    (teacher / "chat_template.json").write_text(json.dumps({"chat_template": chat}))
    run_capture(settings(tmp_path, teacher))
    assert template(tmp_path) == "chatml"
    wrong = chat.replace(image, "<image>")  # another model's image wording
    (teacher / "chat_template.json").write_text(json.dumps({"chat_template": wrong}))
    assert run_capture(settings(tmp_path, teacher)).complete  # the capture already begun continues
    with pytest.raises(ConfigError, match="words turns with images differently"):
        run_capture(settings(tmp_path, teacher, f"output={tmp_path / 'other'}"))


def test_a_teacher_that_cannot_be_followed_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    teacher = write_tiny_llava(tmp_path / "teacher", template=None)
    (teacher / "chat_template.jinja").write_text(THINKING)
    for use in (run_capture, lambda config: make_plan(config, samples=4, seconds=1)):
        with pytest.raises(ConfigError, match=r"template 'auto': .*teacher.*set template to qwen, chatml") as caught:
            use(settings(tmp_path, teacher))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()
    assert run_capture(settings(tmp_path, teacher, "template=chatml")).complete


def test_what_was_begun_with_another_wording_is_continued_with_it(tmp_path: Path) -> None:
    teacher = write_tiny_llava(tmp_path / "teacher")
    run_capture(settings(tmp_path, teacher, "template=chatml", "slice=0/2"))
    assert run_capture(settings(tmp_path, teacher)).complete
    assert template(tmp_path) == "chatml"
    assert audit_cache(open_cache(tmp_path / "c"), settings(tmp_path, teacher), sequences=4).ok
    with pytest.raises(CacheError, match=r"template\.name: was chatml, now qwen"):
        run_capture(settings(tmp_path, teacher, "template=qwen"))
