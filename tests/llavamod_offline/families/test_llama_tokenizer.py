"""Teachers whose tokenizer puts `<s>` first, like LLaVA-1.5 on Vicuna: the processor's ids, the model's log-probs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llavamod_offline.config import load_config
from llavamod_offline.data.encode.chat_template import to_jinja
from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.images import decode_image
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.families import open_family
from teacher_cache.capture.run import run_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.read.reader import open_cache
from tests.tiny import tiny_samples
from tests.tiny_llama import KINDS, llama_tokenizer
from tests.tiny_teachers import write_tiny_causal_lm, write_tiny_llava_llama

TEMPLATE = get_template("llava_v1")


def capture(tmp_path: Path, teacher: Path, *given: str) -> None:
    write_set(tiny_samples(12), tmp_path / "set")
    base = [f"data={tmp_path / 'set'}", f"teacher={teacher}", f"output={tmp_path / 'cache'}", "workers=1"]
    run_capture(load_config(CacheTeacherConfig, (), [*base, "capture.preset=exhaustive", *given]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_llava_is_captured_as_its_processor_words_it(tmp_path: Path, kind: str) -> None:
    folder = write_tiny_llava_llama(tmp_path / "teacher", tokenizer=llama_tokenizer(kind))
    (folder / "chat_template.jinja").write_text(to_jinja(TEMPLATE))
    capture(tmp_path, folder, "image_aspect=square")
    cache = open_cache(tmp_path / "cache")
    about = cache.fingerprint
    assert (about["template"]["name"], about["sequence"]["start_ids"]) == ("llava_v1", [1])
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.convert_tokens_to_ids("▁Yes.") != tokenizer.unk_token_id
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    teacher = open_family(folder, "auto", image_aspect="square", max_length=1024)
    for sample in tiny_samples(12):
        messages = [{"role": turn.role, "content": turn.text} for turn in sample.turns]
        text = processor.apply_chat_template(messages, tokenize=False)
        images = [decode_image(image, name=sample.key) for image in sample.images]
        inputs = processor(text=text, images=images or None, return_tensors="pt")
        sequence = teacher.encode(sample, "response")
        assert sequence.input_ids_T.tolist() == inputs["input_ids"][0].tolist()
        with torch.inference_mode():
            dense_TV = model(**inputs).logits[0, :, : cache.vocab_size].log_softmax(-1)
        live_N = dense_TV[sequence.prediction_rows_N, sequence.target_ids_N].numpy()
        assert np.allclose(cache.targets([(sample.key, "response")]).target_log_probs_N.numpy(), live_N, atol=1e-4)


@pytest.mark.parametrize("own", [True, False])
def test_a_language_model_begins_as_its_tokenizer_does(tmp_path: Path, own: bool) -> None:
    """Plain text begins with `<s>`; a chat template writes its special tokens itself, so none is added to it."""
    folder = write_tiny_causal_lm(tmp_path / "teacher", "llama", tokenizer=llama_tokenizer())
    if own:
        (folder / "chat_template.jinja").write_text(to_jinja(TEMPLATE))
    teacher = open_family(folder, "auto" if own else "llava_v1", image_aspect="auto", max_length=1024)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for sample in tiny_samples(12):
        if sample.images:
            continue
        text = "".join(part.text for part in TEMPLATE.render(sample.turns))
        messages = [{"role": turn.role, "content": turn.text} for turn in sample.turns]
        ids = tokenizer.apply_chat_template(messages, return_dict=False) if own else tokenizer(text)["input_ids"]
        assert teacher.encode(sample, "response").input_ids_T.tolist() == list(ids)
