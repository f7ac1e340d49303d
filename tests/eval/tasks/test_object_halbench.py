"""Object HalBench, string variant. Source: RLAIF-V's eval/eval_gpt_obj_halbench.py, `compute_chair`."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from eval.score import score_task
from eval.tasks import object_halbench
from llavamod_offline.errors import EvalError
from tests.eval.fixtures import answers, halbench_root, scored, write_jsonl
from tests.tiny import tiny_image

SYNONYMS = ("dog, puppy", "cat, kitten", "person, man, woman", "car", "dining table, table")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Image 11 has a dog (instance) and a table (caption only); 12 a cat and a person; 13 nothing."""
    return halbench_root(
        tmp_path / "data",
        SYNONYMS,
        {
            11: (["dog"], ["A puppy under a table.", "An animal"]),
            12: (["cat", "person"], ["A woman with a kitten."]),
            13: ([], ["A sunset over the sea."]),
        },
    )


def test_true_objects_come_from_instances_and_captions(root: Path) -> None:
    found = {example.id: sorted(example.reference.objects) for example in object_halbench.load(root)[:2]}
    assert found == {"11": ["dining table", "dog"], "12": ["cat", "person"]}


def test_rates_count_mentions_and_the_reported_one_leaves_silent_descriptions_out(root: Path) -> None:
    result = scored(
        object_halbench,
        root,
        {
            "11": "A dog and a puppy at a table.",  # 3 true mentions
            "12": "A cat, two cars and another car.",  # 1 true, 2 false mentions
            "13": "A sunset.",  # mentions no object of the list
        },
    )
    assert result.metrics["response_hall"] == pytest.approx(1 / 2)  # CHAIRs_refine, "Response Hall."
    assert result.metrics["response_hall_all"] == pytest.approx(1 / 3)  # CHAIRs
    assert result.metrics["object_hall"] == pytest.approx(2 / 6)  # CHAIRi, "Object Hall."
    assert result.metrics["object_recall"] == pytest.approx(3 / 4)
    assert result.metrics["mean_words"] == pytest.approx((8 + 7 + 2) / 3)
    assert result.notes == ("1 descriptions mention no object in the list",)
    assert result.verdicts["12"].read_as == "cat, car!, car!"
    assert [result.verdicts[name].right for name in ("11", "12", "13")] == [1.0, 0.0, 1.0]


def test_no_object_at_all_leaves_the_rates_undefined(root: Path) -> None:
    result = scored(object_halbench, root, dict.fromkeys(("11", "12", "13"), "Nothing."))
    assert result.metrics["response_hall"] is None
    assert result.metrics["object_hall"] is None
    assert result.metrics["response_hall_all"] == 0.0


def test_a_missing_description_counts_as_a_false_mention(root: Path) -> None:
    result = scored(object_halbench, root, {"11": "A dog.", "12": None, "13": "A sunset."})
    assert result.metrics["response_hall"] == pytest.approx(1 / 2)
    assert result.metrics["object_hall"] == pytest.approx(1 / 2)


def test_the_protocol_names_the_variant_and_answers_may_count_from_zero(root: Path, tmp_path: Path) -> None:
    texts: dict[str | int, str] = {0: "A dog.", 1: "A cat.", 2: "A car."}
    by_index = score_task("object_halbench", root, write_jsonl(tmp_path / "a.jsonl", answers(texts)))
    by_image = write_jsonl(tmp_path / "b.jsonl", answers({11: "A dog.", 12: "A cat.", 13: "A car."}))
    assert score_task("object_halbench", root, by_image).metrics == by_index.metrics
    assert by_index.metrics["object_hall"] == pytest.approx(1 / 3)
    assert "variant: chair_string" in by_index.protocol
    assert "not the published set of 300" in by_index.protocol


def test_images_are_read_from_the_question_file(root: Path) -> None:
    for example in object_halbench.load(root):
        assert example.source is not None
        assert example.source.read() == tiny_image(int(example.id))


def test_damaged_files_are_named(root: Path) -> None:
    folder = root / "object_halbench"
    path = folder / "obj_halbench_300_with_image.jsonl"
    good = path.read_text()
    row = json.loads(good.splitlines()[0])
    write_jsonl(path, [{**row, "image": "no base64!"}])
    source = object_halbench.load(root)[0].source
    assert source is not None
    with pytest.raises(EvalError, match="not a base64 image"):
        source.read()
    write_jsonl(path, [{**row, "image_id": 99, "image": base64.b64encode(b"x").decode()}])
    with pytest.raises(EvalError, match="line 1: image 99 is not annotated in"):
        object_halbench.load(root)
    path.write_text(good)
    annotations = folder / "annotations"
    instances = annotations / "instances_val2014.json"
    content = instances.read_text()
    instances.write_text(content.replace('"dog"', '"zebra"'))
    with pytest.raises(EvalError, match=r"category 'zebra' is not in synonyms_refine.txt"):
        object_halbench.load(root)
    instances.write_text("{}")
    with pytest.raises(EvalError, match=r"instances_val2014.json: no list 'categories'"):
        object_halbench.load(root)
    instances.unlink()
    with pytest.raises(EvalError, match=r"annotations: no instances_\*.json"):
        object_halbench.load(root)
