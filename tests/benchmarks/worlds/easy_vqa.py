"""easy-VQA (MIT licence, the package `easy-vqa`): 48,248 short questions about 5,000 drawn images of 64×64 pixels.

The training split is written in LLaVA's JSON, for `pack`, and the test split in GQA's layout, for `eval-student`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import easy_vqa

from llavamod_offline.toyworld.language import SHORT_ANSWER

TRAINING_IMAGES = Path(easy_vqa.__file__).parent / "data" / "train" / "images"
ROUNDS = 4  # questions per conversation at most


def write_training_set(file: Path, *, images: int, seed: int, wrong: float = 0.0) -> Path:
    """Write conversations about `images` randomly chosen training images, which lie in `TRAINING_IMAGES`.

    A fraction `wrong` of the answers is replaced by another answer of the same kind.
    """
    texts, answers, image_ids = easy_vqa.get_train_questions()
    others = {answer: sorted(set(kind) - {answer}) for kind in _kinds(answers) for answer in kind}
    asked: dict[int, list[tuple[str, str]]] = {}
    for text, answer, image in zip(texts, answers, image_ids, strict=True):
        asked.setdefault(image, []).append((text, answer))
    rng, errors = random.Random(seed), random.Random(seed)  # separate, so that `wrong` does not change the questions
    rows = []
    for image in rng.sample(sorted(asked), images):
        turns = []
        for place, (text, answer) in enumerate(rng.sample(asked[image], min(ROUNDS, len(asked[image])))):
            value = f"<image>\n{text}{SHORT_ANSWER}" if place == 0 else text
            if errors.random() < wrong:
                answer = errors.choice(others[answer])
            turns += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(image), "image": f"{image}.png", "conversations": turns})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=1))
    return file


def _kinds(answers: list[str]) -> list[set[str]]:
    """Groups of answers that can replace each other: yes and no, shapes, colours."""
    shapes = {"circle", "rectangle", "triangle"}
    return [{"yes", "no"}, shapes, set(answers) - shapes - {"yes", "no"}]


def write_test_split(root: Path, *, questions: int) -> None:
    """Write the first `questions` of the test split below `root/gqa`, with links to their images."""
    texts, answers, image_ids = (part[:questions] for part in easy_vqa.get_test_questions())
    paths, folder = easy_vqa.get_test_image_paths(), root / "gqa"
    (folder / "data" / "images").mkdir(parents=True, exist_ok=True)
    for image in set(image_ids):
        link = folder / "data" / "images" / f"{image}.png"
        link.unlink(missing_ok=True)  # an earlier run's may point into another installation
        link.symlink_to(paths[image])
    rows, references = [], {}
    for place, (text, answer, image) in enumerate(zip(texts, answers, image_ids, strict=True)):
        identifier = f"{place:06d}"
        rows.append({"question_id": identifier, "image": f"{image}.png", "text": text + SHORT_ANSWER})
        kind = "verify" if answer in ("yes", "no") else "query"
        references[identifier] = {"answer": answer, "isBalanced": True, "types": {"structural": kind}}
    (folder / "llava_gqa_testdev_balanced.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(references))
