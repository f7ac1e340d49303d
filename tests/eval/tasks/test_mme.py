"""MME. Sources: calculation.py and convert_answer_to_mme.py of the official eval_tool.zip; LLaVA's llava_mme.jsonl."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from eval.score import score_task
from eval.tasks import mme
from llavamod_offline.errors import EvalError
from tests.eval.fixtures import SHORT, answers, scored, write_image, write_jsonl

YES_NO = " Please answer yes or no."
IMAGES = {
    "existence": {"0001.png": (("Is there a dog?", "Yes"), ("Is there a cat?", "No"))},
    "artwork": {
        "10002.jpg": (("Is it from 1500?", "Yes"), ("Is it from 1900?", "No")),
        "10009.a.jpg": (("Is it by A?", "No"), ("Is it by B?", "Yes")),
    },
    # this category's references have two spaces before "Please"
    "code_reasoning": {"0020.png": (("Does it print 1? ", "Yes"), ("Does it print 2? ", "No"))},
}


def questions(root: Path) -> None:
    write_jsonl(
        root / "MME" / "llava_mme.jsonl",
        [
            {
                "question_id": f"{category}/{name}",
                "image": f"{category}/{name}",
                "text": question.strip() + SHORT,
                "category": category,
            }
            for category, images in IMAGES.items()
            for name, pair in images.items()
            for question, _ in pair
        ],
    )


def release(root: Path) -> Path:
    """The release's layout: in some categories questions have a folder, in others they lie beside the images."""
    questions(root)
    base = root / "MME" / "MME_Benchmark_release_version"
    for category, images in IMAGES.items():
        nested = category == "artwork"
        for name, pair in images.items():
            write_image(base / category / ("images" if nested else ".") / name)
            texts = base / category / ("questions_answers_YN" if nested else ".")
            texts.mkdir(exist_ok=True)
            lines = [f"{question}{YES_NO}\t{answer}" for question, answer in pair]
            (texts / f"{name.split('.')[0]}.txt").write_text("\n".join(lines) + "\n")
    return root


def templates(root: Path) -> Path:
    """The official tool's layout: one file per category, answers left blank."""
    questions(root)
    base = root / "MME" / "eval_tool" / "Your_Results"
    base.mkdir(parents=True)
    for category, images in IMAGES.items():
        lines = [f"{n}\t{q}{YES_NO}\t{a}\t\n" for n, pair in images.items() for q, a in pair]
        (base / f"{category}.txt").write_text("".join(lines))
    return root


def truth(root: Path) -> dict[str, str | None]:
    return {example.id: "Yes" if example.reference.yes else "No" for example in mme.load(root)}


@pytest.mark.parametrize(
    ("text", "read_as"),
    [
        ("Yes", "yes"),
        ("YES.", "yes"),
        ("yesterday", "yes"),
        ("No", "no"),
        ("Not at all", "no"),
        ("now", "no"),
        ("None", "no"),
        ("I know", "other"),  # "i kn": only the first four characters
        ("a no", "no"),
        ("The answer is yes", "other"),
        ("", "other"),
        ("y", "other"),
        (" \tYes\tor no", "yes"),
        ("no yes", "no"),
        ("eyes", "yes"),
        ("\nNo\r\n", "no"),
        ("I  no", "other"),  # the official tool does not collapse spaces
        ("a\tno", "no"),  # a tab counts as one
        ("No yes", "no"),
        ("nyes", "yes"),  # "yes" is looked for first
    ],
)
def test_parse(text: str, read_as: str) -> None:
    assert mme.parse(text) == read_as


def test_both_layouts_give_the_same_references(tmp_path: Path) -> None:
    one, two = release(tmp_path / "a"), templates(tmp_path / "b")
    assert [(e.id, e.prompt, e.reference) for e in mme.load(one)] == [
        (e.id, e.prompt, e.reference) for e in mme.load(two)
    ]
    filled = two / "MME" / "eval_tool" / "Your_Results" / "existence.txt"  # as in the tool's own example
    filled.write_text(filled.read_text().replace("\t\n", "\tNo, I think.\n"))
    assert [e.reference for e in mme.load(two)] == [e.reference for e in mme.load(one)]
    assert truth(one)["code_reasoning/0020.png#1"] == "Yes"
    assert [e.id for e in mme.load(one)][:2] == ["existence/0001.png#1", "existence/0001.png#2"]


def test_a_limit_does_not_part_the_two_questions_of_an_image(tmp_path: Path) -> None:
    examples = mme.load(release(tmp_path))
    assert mme.TASK.first(examples, 3) == examples[:4]


def test_images_are_found_in_both_places(tmp_path: Path) -> None:
    for example in mme.load(release(tmp_path)):
        assert example.source is not None
        assert example.source.read()


def test_category_scores_and_sums(tmp_path: Path) -> None:
    root = release(tmp_path)
    texts = truth(root)
    result = scored(mme, root, texts)
    assert result.metrics["perception"] == 400.0
    assert result.metrics["cognition"] == 200.0
    # one of artwork's four answers wrong: accuracy 75, both right for one image of two: 50
    texts["artwork/10002.jpg#2"] = "Yes"
    result = scored(mme, root, texts)
    assert result.metrics["artwork"] == pytest.approx(125.0)
    assert result.metrics["perception"] == pytest.approx(325.0)
    assert result.metrics["accuracy"] == pytest.approx(7 / 8)
    assert result.notes == ("3 of the 14 published categories, which are all that the sums cover",)


def test_categories_equal_the_official_loop(tmp_path: Path) -> None:
    """calculation.py: accuracy over all questions, plus the share of images with both right, each times 100."""
    root, rng = release(tmp_path), random.Random(3)
    for _ in range(20):
        texts = {name: rng.choice(("Yes", "No", "Maybe", "not sure")) for name in truth(root)}
        metrics, sums = scored(mme, root, texts).metrics, {"perception": 0.0, "cognition": 0.0}
        for category, images in IMAGES.items():
            right, pairs_right, asked = 0, 0, 0
            for name, pair in images.items():
                hits = 0
                for number, (_, label) in enumerate(pair, 1):
                    said = texts[f"{category}/{name}#{number}"].lower()
                    hits += ("yes" if said == "yes" else "no" if said.startswith("no") else "other") == label.lower()
                right, asked = right + hits, asked + 2
                pairs_right += hits == 2
            expected = 100 * right / asked + 100 * pairs_right / len(images)
            assert metrics[category] == pytest.approx(expected)
            sums["cognition" if category == "code_reasoning" else "perception"] += expected
        assert metrics["perception"] == pytest.approx(sums["perception"])
        assert metrics["cognition"] == pytest.approx(sums["cognition"])


def test_the_fourteen_categories() -> None:
    assert len(mme.PERCEPTION) == 10
    assert len(mme.COGNITION) == 4
    assert not set(mme.PERCEPTION) & set(mme.COGNITION)


def test_references_with_carriage_returns_and_odd_line_breaks(tmp_path: Path) -> None:
    root = release(tmp_path)
    path = root / "MME" / "MME_Benchmark_release_version" / "existence" / "0001.txt"
    text = f"\ufeffIs there a dog?{YES_NO}\tYes\r\nIs there\u2028a cat?{YES_NO}\tNo\r\n\r\n"
    path.write_bytes(text.encode())
    assert truth(root)["existence/0001.png#2"] == "No"


def test_neither_yes_nor_no_is_wrong_and_counted(tmp_path: Path) -> None:
    root = release(tmp_path)
    result = scored(mme, root, {**truth(root), "existence/0001.png#2": "Maybe"})
    assert result.n_unparsed == 1
    assert result.metrics["existence"] == pytest.approx(50.0)


def test_llava_answers_share_a_question_id_and_may_come_in_any_order(tmp_path: Path) -> None:
    """LLaVA's file gives two questions the same id; the prompt tells them apart, whichever suffix it has."""
    root = release(tmp_path / "data")
    rows = []
    for example in reversed(mme.load(root)):
        prompt = example.prompt.replace(SHORT, YES_NO) if example.reference.yes else example.prompt
        rows += answers({example.aliases[0]: str(truth(root)[example.id])}, {example.aliases[0]: prompt})
    path = write_jsonl(tmp_path / "answers.jsonl", rows)
    score = score_task("mme", root, path)
    assert score.metrics["perception"] == 400.0
    assert score.n == 8
    with pytest.raises(EvalError, match="duplicating an earlier one"):
        score_task("mme", root, write_jsonl(path, [*rows, rows[0]]))


def test_categories_of_other_names_enter_no_sum(tmp_path: Path) -> None:
    root = tmp_path
    write_jsonl(
        root / "MME" / "llava_mme.jsonl",
        [{"question_id": "maps/1.png", "image": "maps/1.png", "text": t + SHORT} for t in ("Is it A?", "Is it B?")],
    )
    folder = root / "MME" / "MME_Benchmark_release_version" / "maps"
    folder.mkdir(parents=True)
    (folder / "1.txt").write_text(f"Is it A?{YES_NO}\tYes\nIs it B?{YES_NO}\tNo\n")
    result = scored(mme, root, {"maps/1.png#1": "yes", "maps/1.png#2": "no"})
    assert result.metrics["maps"] == 200.0
    assert result.metrics["perception"] is None
    assert "in no sum: maps" in result.notes


def test_an_image_needs_two_questions_and_every_question_an_answer(tmp_path: Path) -> None:
    root = release(tmp_path)
    path = root / "MME" / "llava_mme.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))
    with pytest.raises(EvalError, match="image 'existence/0001' has 1 question, expected 2"):
        mme.load(root)
    path.write_text("".join(lines).replace("Is there a dog?", "Is there a hog?"))
    with pytest.raises(EvalError, match=r"line 1: no answer to 'Is there a hog\?' about existence/0001.png"):
        mme.load(root)
    path.write_text("".join(lines))
    (root / "MME" / "MME_Benchmark_release_version" / "existence" / "0001.txt").write_text("Is there a dog? Yes\n")
    with pytest.raises(EvalError, match=r"0001.txt: line 1: expected a question, a tab, and Yes or No"):
        mme.load(root)
