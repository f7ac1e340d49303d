"""`llavamod-offline ask`: the answers of `eval-student`, as they are written, and a cached teacher's beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from eval.engines.hf import HfEngine
from eval.example import Example
from eval.files import FileImage
from llavamod_offline.cli import app
from llavamod_offline.demo.plan import TEACHER
from llavamod_offline.entrypoint import run_command
from llavamod_offline.errors import ConfigError, DataError, ModelError
from teacher_cache.ask.model import AskedModel, AskedQuestion
from tests.hub import write_snapshot
from tests.llavamod_offline.families.official import FAMILIES, write_family
from tests.teacher_cache.conftest import World
from tests.tiny import tiny_image, tiny_samples, write_tiny_llava
from tests.tiny_teachers import write_tiny_causal_lm

PROMPTS = ("Is there a dog?", "Which colour has the large square on the left of the star?", "How many?", "Why")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    for number, size in enumerate(((32, 24), (40, 90))):
        (folder / f"{number}.png").write_bytes(tiny_image(number, size))
    return sorted(folder.iterdir())


def answered(model: AskedModel, prompt: str, images: list[Path], most: int = 24) -> tuple[str, int, str]:
    pieces: list[str] = []
    found = model.answer(AskedQuestion.read(prompt, images), most, pieces.append)
    assert "".join(pieces) == found.text
    return found.text, found.n_tokens, found.finish


@pytest.mark.parametrize("template", ["qwen", "chatml"])
def test_answers_are_those_of_eval_student(tmp_path: Path, images: list[Path], template: str) -> None:
    folder = write_tiny_llava(tmp_path / "student", template=template, head_rows=448)
    model, engine = AskedModel(str(folder)), HfEngine(folder)
    texts = set()
    for number, prompt in enumerate(PROMPTS):
        shown = images[:1] if number < 3 else []
        source = FileImage(images[0].parent, (images[0].name,)) if shown else None
        theirs = engine.answer([Example(str(number), prompt, None, "0.png", source)], 24)[0]
        assert answered(model, prompt, shown) == (theirs.text, theirs.n_tokens, theirs.finish)
        texts.add(theirs.text)
    assert len(texts) == len(PROMPTS)


def test_the_toy_teacher_answers_in_words(images: list[Path]) -> None:
    """It ends its answer by itself, which random models never do."""
    folder = TEACHER
    engine = HfEngine(folder)
    source = FileImage(images[0].parent, (images[0].name,))
    theirs = engine.answer([Example("0", "Describe the image.", None, "0.png", source)], 64)[0]
    assert answered(AskedModel(str(folder)), "Describe the image.", images[:1], 64) == (
        theirs.text,
        theirs.n_tokens,
        "stop",
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_teachers_is_asked(tmp_path: Path, images: list[Path], name: str) -> None:
    model = AskedModel(str(write_family(name, tmp_path / "teacher")), template="chatml")
    texts = {answered(model, "What?", images[:count], 8)[0] for count in (0, 1, 2)}
    assert len(texts) > 1


def test_a_language_model_is_asked_without_images(tmp_path: Path, images: list[Path]) -> None:
    model = AskedModel(str(write_tiny_causal_lm(tmp_path / "text", "llama")), template="chatml")
    assert answered(model, "What?", [], 8)
    with pytest.raises(ModelError, match="a language model without images"):
        answered(model, "What?", images[:1], 8)


def test_what_does_not_fit_is_one_line(tmp_path: Path, images: list[Path]) -> None:
    model = AskedModel(str(write_tiny_llava(tmp_path / "student")))
    with pytest.raises(ConfigError, match="do not fit the model's 1024 positions: lower --max-new-tokens"):
        answered(model, "What?", images[:1], 1020)
    for text, problem in (("", "the question is empty"), ("<image> What?", "remove '<image>' from the question")):
        with pytest.raises(DataError, match=problem):
            AskedQuestion.read(text, [])


@dataclass(frozen=True)
class Result:
    """How the command ended."""

    status: int | str | None
    out: str
    err: str


Ask = Callable[..., Result]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run the command in this process."""

    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as caught:
            run_command(app, ["ask", *map(str, arguments)])
        captured = capsys.readouterr()
        return Result(caught.value.code, captured.out, captured.err)

    return run


def test_the_command_prints_the_answer(world: World, images: list[Path], ask: Ask) -> None:
    model = AskedModel(str(world.teacher))
    text, tokens, finish = answered(model, "Why?", images, 8)
    printed = ask(world.teacher, *images, "Why?", "--max-new-tokens", 8)
    assert (printed.status, printed.out) == (0, f"{text}\n")
    assert "did not end within --max-new-tokens 8" in printed.err
    said = json.loads(ask(world.teacher, *images, "Why?", "--max-new-tokens", 8, "--json").out)
    assert (said["text"], said["n_tokens"], said["finish"]) == (text, tokens, finish)
    assert (said["template"], said["question"], said["images"]) == ("qwen", "Why?", [str(image) for image in images])


def test_a_hub_id_is_asked(world: World, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    write_snapshot(tmp_path, "org/tiny", world.teacher)
    by_path, by_id = (ask(model, "Why?", "--max-new-tokens", 8) for model in (world.teacher, "org/tiny"))
    assert by_path == by_id
    assert "`hf download org/other`" in ask("org/other", "Why?").err


def test_mistakes_are_one_line(world: World, images: list[Path], ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    for arguments, problem in (
        (
            (world.teacher, tmp_path / "none.jpg", "Why?"),
            f"image '{tmp_path / 'none.jpg'}': cannot be read: No such file",
        ),
        ((world.teacher, tmp_path, "Why?"), "cannot be read: Is a directory"),
        (
            (world.teacher, tmp_path / "text.jpg", "Why?"),
            f"image '{tmp_path / 'text.jpg'}': not a JPEG, PNG or WebP file",
        ),
        ((world.teacher, images[0]), "the last argument is the question"),
        ((tmp_path / "none", "Why?"), f"{tmp_path / 'none'}: no such checkpoint folder"),
        ((tmp_path, "Why?"), f"{tmp_path}: no config.json"),
        ((world.teacher, "Why?", "--device", "cuda:7"), "device"),
        ((world.teacher, "Why?", "--dtype", "int8"), "--dtype is 'int8'"),
        ((world.teacher, "Why?", "--template", "x"), "template 'x' is unknown"),
        ((world.teacher, "Why?", "--cache", tmp_path), "--cache needs --key"),
        ((world.teacher, "Why?", "--key", "a"), "--key needs --cache"),
        ((world.teacher, "Why?", "--key", "a", "--cache", tmp_path / "none"), str(tmp_path / "none")),
    ):
        result = ask(*arguments)
        assert (result.status, result.out) == (2, ""), result
        assert problem in result.err
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1


@pytest.mark.parametrize("number", [0, 1, 3])
def test_the_teacher_agrees_with_its_cache(world: World, finished: Path, ask: Ask, tmp_path: Path, number: int) -> None:
    """Asked the captured question, it says what was captured; another model says something else."""
    sample = tiny_samples(24)[number]
    files = []
    for place, image in enumerate(sample.images):
        files.append(tmp_path / f"{place}.png")
        files[-1].write_bytes(image)
    question = sample.turns[0].text.replace("<image>\n", "")
    arguments = [*files, question, "--cache", finished, "--key", sample.key, "--max-new-tokens", 4]
    said = json.loads(ask(world.teacher, *arguments, "--json").out)["cache"]
    assert (said["key"], said["role"], said["same_question"]) == (sample.key, "response", True)
    assert said["tokens"][-1]["token"] == "'<|endoftext|>'"
    for token in said["tokens"]:
        assert token["teacher"] == pytest.approx(token["model"], rel=0.02, abs=1e-4)
        assert [name["token"] for name in token["teacher_top"]][:1] == [token["model_top"][0]["token"]]
    other = write_tiny_llava(tmp_path / "student", seed=5)
    compared = json.loads(ask(other, *arguments, "--json").out)["cache"]
    assert [t["teacher"] for t in compared["tokens"]] == [t["teacher"] for t in said["tokens"]]
    assert [t["model"] for t in compared["tokens"]] != [t["model"] for t in said["tokens"]]
    printed = ask(other, *arguments)
    assert printed.status == 0
    assert "token by token" in printed.out
    wrong = ask(world.teacher, "Something else?", *arguments[len(files) + 1 :])
    assert "was captured for another question" in wrong.out


def test_a_key_that_the_cache_lacks_names_some(world: World, finished: Path, ask: Ask) -> None:
    result = ask(world.teacher, "Why?", "--cache", finished, "--key", "nothing", "--max-new-tokens", 2)
    assert result.status == 2
    assert "no record of sample 'nothing': it has 24, such as tiny-" in result.err
