"""Training sets of the toy world in common file formats: LLaVA JSON and RLAIF-V parquet."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Turn
from llavamod_offline.toyworld.conversations import captioned_from_habit, chatted, quizzed
from llavamod_offline.toyworld.draw import encode_scene
from llavamod_offline.toyworld.language import DESCRIBE, caption, hallucinated_caption
from llavamod_offline.toyworld.scene import Scene, missing_companion, random_scene

_SPEAKER = {"user": "human", "assistant": "gpt"}
_HABIT_SHARE = 0.9  # of captions of scenes that lack an object's companion: the share that names it anyway


def write_datasets(
    folder: Path,
    *,
    align: int,
    general: int,
    multitask: int,
    preference: int,
    error_share: float,
    seed: int,
    unseen: int = 0,
) -> dict[str, Path]:
    """Write `align.json`, `general.json`, `multitask.json`, `unseen.json` and `preference.parquet`, and images.

    `align` has captions, with the habits of captions on the web; `general` such captions, conversations and quizzes;
    `multitask` quizzes of counting, reading, charts and yes/no; `unseen` what `general` has, without errors;
    `preference` pairs. `error_share` of the answers in `general` and `multitask` belong to another image, like the
    noise of web data. Returns the file of each set; sizes are in samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)

    def general_turns(scene: Scene, rng: random.Random) -> list[Turn]:
        share = rng.random()
        if share < 0.4:
            return captioned_from_habit(scene, rng, _HABIT_SHARE)
        return chatted(scene, rng, 3) if share < 0.6 else quizzed(scene, rng, 4)

    def multitask_turns(scene: Scene, rng: random.Random) -> list[Turn]:
        return quizzed(scene, rng, 5)

    files = {}
    for name, size, speak, share in (
        ("align", align, partial(captioned_from_habit, share=_HABIT_SHARE), 0.0),
        ("general", general, general_turns, error_share),
        ("multitask", multitask, multitask_turns, error_share),
    ):
        rows = [_llava_row(folder, name, index, speak, rng, share) for index in range(size)]
        files[name] = folder / f"{name}.json"
        files[name].write_text(json.dumps(rows, indent=1))
    files["preference"] = folder / "preference.parquet"
    pq.write_table(_preference_table(preference, rng), files["preference"], row_group_size=100)
    rows = [_llava_row(folder, "unseen", index, general_turns, rng, 0.0) for index in range(unseen)]
    files["unseen"] = folder / "unseen.json"
    files["unseen"].write_text(json.dumps(rows, indent=1))
    return files


def _llava_row(
    folder: Path,
    name: str,
    index: int,
    speak: Callable[[Scene, random.Random], list[Turn]],
    rng: random.Random,
    error_share: float,
) -> dict[str, Any]:
    scene = random_scene(rng)
    image_format, extension = ("JPEG", "jpg") if index % 3 == 0 else ("PNG", "png")
    image = f"{name}/{index:06d}.{extension}"
    path = folder / "images" / image
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_scene(scene, image_format))
    turns = _with_errors(speak(scene, rng), speak, rng, error_share)
    said = [{"from": _SPEAKER[turn.role], "value": turn.text} for turn in turns]
    return {"id": f"{name}-{index:06d}", "image": image, "conversations": said}


def _with_errors(
    turns: list[Turn], speak: Callable[[Scene, random.Random], list[Turn]], rng: random.Random, error_share: float
) -> list[Turn]:
    """Replace a share of the answers by answers about other images to requests of the same kind."""
    replaced = []
    for position, turn in enumerate(turns):
        if turn.role == "assistant" and rng.random() < error_share:
            wanted = _kind_of_request(turns[position - 1].text)
            turn = next(
                said[i + 1]
                for said in (speak(random_scene(rng), rng) for _ in iter(int, 1))
                for i in range(0, len(said), 2)
                if _kind_of_request(said[i].text) == wanted and _sentence_like(said[i + 1]) == _sentence_like(turn)
            )
        replaced.append(turn)
    return replaced


def _kind_of_request(text: str) -> str:
    """The first two words of a request: enough to tell "How many" from "Is there"."""
    return " ".join(text.replace(IMAGE_PLACEHOLDER, "").split()[:2])


def _sentence_like(turn: Turn) -> bool:
    return turn.text.endswith(".")


def _preference_table(size: int, rng: random.Random) -> pa.Table:
    """Pairs of descriptions with RLAIF-V's columns; the rejected one names absent objects.

    Two scenes out of three lack an object's companion: pairs are made where models err, and judged by what is drawn.
    """
    rows = []
    for index in range(size):
        scene = random_scene(rng)
        while scene.is_chart or (index % 3 and missing_companion(scene.things) is None):
            scene = random_scene(rng)
        rows.append(
            {
                "ds_name": "toyworld",
                "image": {"bytes": encode_scene(scene), "path": f"{index:06d}.png"},
                "question": DESCRIBE,
                "chosen": caption(scene, rng),
                "rejected": hallucinated_caption(scene, rng),
                "origin_dataset": "toyworld",
                "origin_split": json.dumps({"model": "toyworld", "type": "detail_description"}),
                "idx": index,
                "image_path": f"preference/{index:06d}.png",
            }
        )
    schema = pa.schema(
        [
            ("ds_name", pa.string()),
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            *[(name, pa.string()) for name in ("question", "chosen", "rejected", "origin_dataset", "origin_split")],
            ("idx", pa.int64()),
            ("image_path", pa.string()),
        ]
    )
    return pa.Table.from_pylist(rows, schema=schema)
