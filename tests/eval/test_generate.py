"""Answering with a tiny LLaVA: batches, resuming, limits, bad input."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.engines.hf import HfEngine
from eval.engines.processor import ProcessorEngine
from eval.engines.prompts import asked_sample
from eval.example import Example
from eval.export.answers import export
from eval.files import FileImage
from eval.generate import EvalGenerateConfig, generate
from eval.predictions import read_predictions
from eval.score import score_task, sidecar
from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.sample import Turn
from llavamod_offline.errors import ConfigError, EvalError, ModelError
from llavamod_offline.storage.lock import LOCK_NAME, locked
from tests.eval.fixtures import gqa_root, pope_root, write_image
from tests.tiny import write_tiny_llava


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("model") / "student", head_rows=448)


@pytest.fixture
def examples(tmp_path: Path) -> list[Example[None]]:
    """Prompts of very different lengths, one of them without an image."""
    prompts = ["Is there a dog?", "What colour has the large square on the left of the star?" * 3, "Why", "How many?"]
    made = []
    for number, prompt in enumerate(prompts):
        write_image(tmp_path / f"{number}.png", number)
        source = None if number == 2 else FileImage(tmp_path, (f"{number}.png",))
        made.append(Example(str(number), prompt, None, f"{number}.png", source))
    return made


def config(model: Path, root: Path, output: Path) -> EvalGenerateConfig:
    return EvalGenerateConfig(
        model=str(model), root=str(root), output=str(output), tasks=["pope"], batch_size=5, max_new_tokens=6
    )


def test_a_left_padded_batch_gives_the_tokens_of_single_questions(model: Path, examples: list[Example[None]]) -> None:
    engine = HfEngine(model)
    together = engine.answer(examples, 24)
    alone = [engine.answer([example], 24)[0] for example in examples]
    assert together == alone
    assert len({answer.text for answer in together}) == len(examples)


def test_generation_is_greedy_decoding_without_a_cache(model: Path, examples: list[Example[None]]) -> None:
    engine = HfEngine(model)
    example = examples[0]
    ids = torch.from_numpy(engine.encoder.encode_prompt([Turn("user", f"<image>\n{example.prompt}")]))[None]
    assert example.source is not None
    pixels = torch.from_numpy(np.asarray(engine.family.images(asked_sample(example))[0].inputs["pixel_values"]))[None]
    prompt_length = ids.shape[1]
    for _ in range(12):
        with torch.no_grad():
            logits = engine.model(input_ids=ids, pixel_values=pixels).logits[0, -1]
        logits[[engine.encoder.image_token_id, *range(len(engine.encoder.tokenizer), 448)]] = -torch.inf
        ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
        if ids[0, -1] == engine.encoder.end_id:
            break
    answer = ids[0, prompt_length:].tolist()
    stopped = answer[-1] == engine.encoder.end_id
    text = engine.encoder.tokenizer.decode(answer[:-1] if stopped else answer, skip_special_tokens=True).strip()
    assert engine.answer([example], 12)[0].text == text


def test_no_answer_holds_the_image_token_or_a_row_beyond_the_tokenizer(
    tmp_path: Path, examples: list[Example[None]]
) -> None:
    engine = HfEngine(write_tiny_llava(tmp_path / "model", head_rows=448, tied=False))
    free = engine.answer(examples[:1], 1)
    first = engine.encoder.tokenizer(free[0].text, add_special_tokens=False)["input_ids"][0]
    head = engine.model.get_output_embeddings().weight
    with torch.no_grad():
        head[engine.encoder.image_token_id] = 3 * head[first]
        head[447] = 5 * head[first]
    assert engine.answer(examples[:1], 1) == free
    head.data[first] *= 0.001
    assert engine.answer(examples[:1], 1) != free


def test_an_answer_ends_at_the_templates_end_token(
    model: Path, examples: list[Example[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = HfEngine(model)
    free = engine.answer([examples[0]], 12)[0]
    assert free.finish == "length"
    assert free.n_tokens == 12
    ids: list[int] = engine.encoder.tokenizer(free.text, add_special_tokens=False)["input_ids"]
    third = ids[2]
    monkeypatch.setattr(engine.encoder, "end_id", third)
    stopped = engine.answer([examples[0]], 12)[0]
    assert stopped.finish == "stop"
    assert stopped.n_tokens == ids.index(third)


def test_a_run_that_was_killed_goes_on_and_gives_the_same_file(model: Path, tmp_path: Path) -> None:
    root = pope_root(tmp_path / "data")
    whole = generate(config(model, root, tmp_path / "whole"))["pope"]
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 12
    path = generate(config(model, root, tmp_path / "cut"))["pope"]
    path.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    generate(config(model, root, tmp_path / "cut"))
    assert path.read_bytes() == whole.read_bytes()
    score = score_task("pope", root, whole)
    assert (score.n, score.n_missing) == (12, 0)
    assert "image_aspect pad" in score.protocol
    assert "max_new_tokens 6" in score.protocol


def test_other_settings_do_not_continue_a_file(model: Path, tmp_path: Path) -> None:
    root = pope_root(tmp_path / "data")
    settings = config(model, root, tmp_path / "out")
    path = generate(settings)["pope"]
    with pytest.raises(EvalError, match="max_new_tokens 6, not 7"):
        generate(replace(settings, max_new_tokens=7))
    with pytest.raises(EvalError, match='image_aspect "pad", not "square"'):
        generate(replace(settings, image_aspect="square"))
    sidecar(path).unlink()
    with pytest.raises(EvalError, match="was not written by this command"):
        generate(settings)


def test_what_a_limit_asked_is_what_is_scored(model: Path, tmp_path: Path) -> None:
    root = pope_root(tmp_path / "data")
    path = generate(replace(config(model, root, tmp_path / "out"), limit=3))["pope"]
    assert [prediction.id for prediction in read_predictions(path, "pope")] == ["1", "2", "3"]
    assert len((path.parent / "answers.jsonl").read_text().splitlines()) == 3
    score = score_task("pope", root, path)
    assert (score.n, score.limit, score.n_missing, len(score.verdicts)) == (3, 3, 0, 3)
    assert score.protocol.startswith("pope: 3 questions, the first ones (limit 3) | not the published set of 8910 | ")
    assert score.counts.startswith("n 3 (limit 3), missing 0, ")
    assert (score.as_json()["n"], score.as_json()["limit"]) == (3, 3)
    export("pope", root, path, tmp_path / "again.jsonl", model=model.name)
    assert (tmp_path / "again.jsonl").read_bytes() == (path.parent / "answers.jsonl").read_bytes()
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(EvalError, match=r"1 question \('3'\) without a prediction"):
        score_task("pope", root, path)
    sidecar(path).write_text('{"limit": "all"}')
    with pytest.raises(EvalError, match="'limit' must be a whole number"):
        score_task("pope", root, path)


def test_a_limit_beyond_the_questions_asks_all(model: Path, tmp_path: Path) -> None:
    root = pope_root(tmp_path / "data")
    path = generate(replace(config(model, root, tmp_path / "out"), limit=100))["pope"]
    score = score_task("pope", root, path)
    assert (score.n, score.limit) == (12, 100)


def test_several_benchmarks_in_one_run(model: Path, tmp_path: Path) -> None:
    root = gqa_root(pope_root(tmp_path / "data"), {"1": {"answer": "yes", "isBalanced": True}})
    paths = generate(replace(config(model, root, tmp_path / "out"), tasks=["gqa", "pope"]))
    assert sorted(paths) == ["gqa", "pope"]
    assert score_task("gqa", root, paths["gqa"]).n == 1


def test_repeated_predictions_are_repaired_and_score_agrees(model: Path, tmp_path: Path) -> None:
    root = pope_root(tmp_path / "data")
    path = generate(config(model, root, tmp_path / "out"))["pope"]
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, *lines[3:9]]))
    before = score_task("pope", root, path)
    generate(config(model, root, tmp_path / "out"))
    assert path.read_bytes() == whole
    assert score_task("pope", root, path) == before
    path.write_bytes(whole + lines[0].replace(b'"text": "', b'"text": "not '))
    for command in (lambda: generate(config(model, root, tmp_path / "out")), lambda: score_task("pope", root, path)):
        with pytest.raises(EvalError, match="lines 1 and 13 are different predictions for '1'"):
            command()


def test_a_second_command_on_the_output_is_refused(model: Path, tmp_path: Path) -> None:
    root, output = pope_root(tmp_path / "data"), tmp_path / "out"
    with locked(output / "pope"), pytest.raises(ConfigError, match=f"^output: {output}/pope is in use by process "):
        generate(config(model, root, output))
    with locked(output / "gqa"):  # another benchmark in the same output
        path = generate(config(model, root, output))["pope"]
    assert not (path.parent / LOCK_NAME).exists()


def test_a_complete_output_of_another_model_is_refused_and_of_the_same_elsewhere_is_not(
    model: Path, tmp_path: Path
) -> None:
    root = pope_root(tmp_path / "data")
    path = generate(config(model, root, tmp_path / "out"))["pope"]
    before = path.read_bytes()
    generate(config(Path(shutil.copytree(model, tmp_path / "moved")), root, tmp_path / "out"))
    assert path.read_bytes() == before
    other = write_tiny_llava(tmp_path / "other", seed=5)
    message = r'was generated with max_new_tokens 6, not 5; model "student", not "other"; model_sha256 "'
    with pytest.raises(EvalError, match=message):
        generate(replace(config(other, root, tmp_path / "out"), max_new_tokens=5))


def test_bad_settings_are_one_line_errors(model: Path, tmp_path: Path) -> None:
    root = pope_root(tmp_path / "data")
    good = config(model, root, tmp_path / "out")
    with pytest.raises(ConfigError, match="tasks: 'popes' is unknown"):
        replace(good, tasks=["popes"])
    with pytest.raises(ConfigError, match="batch_size is 0: must be at least 1"):
        replace(good, batch_size=0)
    with pytest.raises(ModelError, match="no such checkpoint"):
        generate(replace(good, model=str(tmp_path / "nothing")))
    with pytest.raises(ConfigError, match="template 'vicuna' is unknown"):
        generate(replace(good, template="vicuna"))
    with pytest.raises(EvalError, match="do not fit the model's 1024 positions"):
        generate(replace(good, max_new_tokens=1024))


def test_any_checkpoint_answers_by_its_own_processor(tmp_path: Path, examples: list[Example[None]]) -> None:
    """A LLaVA whose chat template gives the same prompt gives the same answers through its own processor."""
    folder = write_tiny_llava(tmp_path / "model", template=None)
    with pytest.raises(ModelError, match="no chat template"):
        ProcessorEngine(folder)
    system = get_template("qwen").system[0].text
    template = (
        system + "USER: {% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<image>\n"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %} ASSISTANT:"
    )
    (folder / "chat_template.jinja").write_text(template)
    theirs, ours = ProcessorEngine(folder), HfEngine(folder, template="qwen", image_aspect="square")
    assert [a.text for a in theirs.answer(examples, 8)] == [a.text for a in ours.answer(examples, 8)]
    assert theirs.answer([examples[2]], 8) == theirs.answer(examples, 8)[2:3]
    assert theirs.describe()["template"] == "the checkpoint's chat template"
    with pytest.raises(ModelError, match="no such checkpoint"):
        ProcessorEngine(tmp_path / "nothing")


def test_a_student_is_asked_in_the_wording_of_its_training(tmp_path: Path) -> None:
    """As its chat template words it; answers begun with another template are continued with that one."""
    root = pope_root(tmp_path / "root")
    student = write_tiny_llava(tmp_path / "student", template="chatml")
    runs = {name: replace(config(student, root, tmp_path / name), template=name) for name in ("auto", "chatml", "qwen")}
    texts = {name: generate(given)["pope"].read_text() for name, given in runs.items()}
    assert texts["auto"] == texts["chatml"] != texts["qwen"]
    continued = replace(runs["auto"], output=str(tmp_path / "qwen"))
    assert generate(continued)["pope"].read_text() == texts["qwen"]
