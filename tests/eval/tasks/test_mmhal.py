"""MMHal-Bench. Sources: RLAIF-V's eval/eval_gpt_mmhal.py and summarize_gpt_mmhal_review.py; its answer template."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.judge_template import JudgeTemplate
from eval.score import score_task
from eval.tasks import mmhal
from llavamod_offline.errors import ConfigError, EvalError
from tests.eval.fixtures import answers, mmhal_root, write_image, write_jsonl
from tests.tiny import tiny_image


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Fine.\nRating: 6, very informative", 6),
        ("rating:0", 0),
        ("**Rating:** 4", 4),
        ("Rating: **3**", 3),
        ("A Rating: 2 would be harsh. Rating: 5", 5),  # the last; the official reader makes this 0
        ("Rating: 7", None),
        ("Rating: 12", None),
        ("I give it 5", None),
        ("Rating (0-6): 6", 6),
        ("Rating: [[6]]", 6),
        ("**Rating**: 6", 6),
        ("**Rating:** 6", 6),
        ("Rating: 6/6", 6),
        ("Rating: 6.", 6),
        ("6/6", None),
        ("Rating: 4.5", None),
        ("Rating: 5/10", None),
        ("Rating: 0-6", None),
        ("Rating: 0 to 6", None),
        ("Rating: -1", None),
        ("Rating: 10", None),
        ("Rating: 60", None),
        ("I give a rating of 5.", 5),
        ("The rating is 4", 4),
        ("Rating [[6]] 3 sentences", 6),
        ("Rating (6): 3 reasons", 6),
        ("Rating: 6 (no hallucination)", 6),
        ('{"rating": 5}', 5),
        ("<rating>5</rating>", 5),
        ("Rating (out of 6): 2", 2),
        ("Rating: 2 out of 6", 2),
        ("Rating: 0. Later Rating: 4.5", None),
        ("Rating: 1\nRating: 3", 3),
        ("Rating: 6, no", 6),
        ("Rating:\n\n5", 5),
        ("Rating - 5", 5),
        ("Rating: 0,5", None),
        ("Rating scale 0-6", None),
        ("Rating: 4, as the answer\n\nNote: a rating of 5 would need more.", 4),
        ("Rating: 4, no hallucination.\nA rating of 2 would need a false statement.", 4),
        ("Rating: 6.0", 6),
        (r"Rating: \boxed{5}", 5),
        ("Rating: 3, 2 objects", 3),
        ("Rating (0 = worst, 6 = best): 6", 6),
        ("rating: 5 - no hallucination", 5),
        ("Rating = 4", 4),
        ("Rating: 6\n3 sentences", 6),
        ("Rating: 5 – 2 objects are named", 5),
        ("grating 5", None),
        ("Rating: 0 - 6", None),
        ("Rating: 0 - 6 is the scale. Rating: 2", 2),
        ("", None),
    ],
)
def test_parse_rating(reply: str, rating: int | None) -> None:
    assert mmhal.parse_rating(reply) == rating


def test_scores_by_hand(tmp_path: Path) -> None:
    examples = mmhal.load(mmhal_root(tmp_path, 4))
    texts: dict[str, str | None] = dict.fromkeys("0123", "A")
    replies = {"0": "Rating: 6", "1": "Rating: 3", "2": "Rating: 2", "3": "Rating: 1"}
    metrics = mmhal.score_judged(examples, texts, replies).metrics
    assert metrics["score"] == 3.0
    assert metrics["hallucination_rate"] == 0.5  # below 3
    assert metrics["informativeness"] == pytest.approx((3 + 0 + 2 + 1) / 4 / 3)
    assert metrics["score_attribute"] == 4.5  # by the file's question_type, not by position
    assert metrics["score_other"] == 1.5


def test_unparsed_replies_count_0_and_above_2_percent_there_is_no_headline(tmp_path: Path) -> None:
    examples = mmhal.load(mmhal_root(tmp_path, 100))
    texts: dict[str, str | None] = {example.id: "A" for example in examples}
    replies = {example.id: "Rating: 6" for example in examples}
    result = mmhal.score_judged(examples, texts, {**replies, "0": "?", "1": "?"})
    assert result.n_unparsed == 2
    assert result.metrics["score"] == pytest.approx(5.88)
    result = mmhal.score_judged(examples, texts, {**replies, "0": "?", "1": "?", "2": "?"})
    assert result.n_unparsed == 3
    assert result.metrics["score"] is None
    assert result.metrics["hallucination_rate"] is None
    assert "no headline: 3 of 100" in result.notes[0]


def test_a_missing_answer_counts_0_and_is_not_asked_about(tmp_path: Path) -> None:
    examples = mmhal.load(mmhal_root(tmp_path, 2))
    result = mmhal.score_judged(examples, {"0": "A", "1": None}, {"0": "Rating: 4"})
    assert result.metrics["score"] == 2.0
    assert result.metrics["hallucination_rate"] == 0.5
    assert result.n_unparsed == 0


def test_the_prompt_is_the_bare_question(tmp_path: Path) -> None:
    assert mmhal.load(mmhal_root(tmp_path, 1))[0].prompt == "Question 0?"


def test_images_by_id_by_source_and_embedded(tmp_path: Path) -> None:
    root = mmhal_root(tmp_path, 3)
    write_image(root / "mmhal" / "images" / "1_o.jpg", 31)  # as in image_src
    first, second, third = (example.source for example in mmhal.load(root))
    assert first is not None
    assert second is not None
    assert third is not None
    assert first.read() == tiny_image(0)
    assert second.read() == tiny_image(31)
    import base64

    rows = [{"image_id": f"id{n}", "image": base64.b64encode(tiny_image(40 + n)).decode()} for n in range(3)]
    write_jsonl(root / "mmhal" / "mmhal-bench_with_image.jsonl", rows)
    source = mmhal.load(root)[2].source
    assert source is not None
    assert source.read() == tiny_image(42)


def test_without_a_judge_it_says_how_to_name_one(tmp_path: Path) -> None:
    root = mmhal_root(tmp_path / "data", 1)
    with pytest.raises(EvalError, match="pass --judge URL"):
        score_task("mmhal", root, write_jsonl(tmp_path / "a.jsonl", answers({0: "A"})))


def test_a_template_has_a_placeholder_for_everything(tmp_path: Path) -> None:
    values = {"image_content": "Cat, {x}", "question": "{}", "gt_answer": "G", "model_answer": "{question}"}
    path = tmp_path / "template.txt"
    path.write_text("C {} Q {} G {} A {}\n")  # placeholders as in RLAIF-V's template
    assert JudgeTemplate.read(path, mmhal.SLOTS).fill(values) == "C Cat, {x} Q {} G G A {question}\n"
    path.write_text('{"a": 1} {model_answer} {gt_answer} {question} {image_content} {question}')
    assert JudgeTemplate.read(path, mmhal.SLOTS).fill(values) == '{"a": 1} {question} G {} Cat, {x} {}'
    for bad in ("{} {} {}", "{question}", "{question} {} {} {}", ""):
        path.write_text(bad)
        with pytest.raises(ConfigError, match="a template needs the placeholders"):
            JudgeTemplate.read(path, mmhal.SLOTS)
    with pytest.raises(ConfigError, match="cannot be read"):
        JudgeTemplate.read(tmp_path / "none.txt", mmhal.SLOTS)
    assert "Rating: 0" in mmhal.DEFAULT_TEMPLATE.fill(values)
