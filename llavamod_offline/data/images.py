"""Images: encoded bytes → RGB → a vision tower's pixels, in the same way for packing, capture and training.

Outcomes of decoding:
  truncated, damaged, empty, or beyond one of the limits below → `DataError`
  a format other than JPEG (including MPO), PNG, WebP → `DataError`
  EXIF orientation → applied; an unreadable EXIF block → the image as stored
  transparency (LA, RGBA, a palette's or a grey's transparent colour) → over white, which keeps dark text readable
  16 bits per channel → the high byte; grey, black-and-white, palette, CMYK → Pillow's conversion to RGB
  animated → the first frame

Shape suffixes: I images, C channels, H and W pixels of the processed image, V the 256 values of a byte.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from llavamod_offline.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

Aspect = Literal["pad", "square"]
ASPECTS: tuple[Aspect, ...] = ("pad", "square")
AUTO_ASPECT = "auto"  # as the checkpoint states
DECODER = "rgb-over-white-1"  # what `decode_image` does, for fingerprints

# A side of 9,000 bounds the padded canvas at 243 MB; Qwen2-VL's processor also limits the ratio to 200.
MAX_IMAGE_SIDE = 9_000
# Images to be shrunk may have longer sides, because their number of pixels bounds the memory. A large JPEG is decoded
# at a fraction of its size.
MAX_PIXELS = MAX_IMAGE_SIDE**2
MAX_JPEG_PIXELS = 4 * MAX_PIXELS
MAX_ASPECT_RATIO = 200
MAX_ENCODED_BYTES = 128 * 2**20

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_PADDING_PROCESSOR = "LlavaImageProcessor"  # like CLIP's, but pads to a square first if `do_pad`
# The image processors of vision towers by their family's name.
_PROCESSORS = {
    name: family
    for family, kinds in {
        "clip": ("CLIPImageProcessor", "CLIPFeatureExtractor"),
        "siglip": ("SiglipImageProcessor",),
        "bit": ("BitImageProcessor",),  # DINOv2's
    }.items()
    for kind in kinds
    for name in (kind, f"{kind}Fast", f"{kind}Pil")
}
_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION_TAG = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_PNG_ORIENTATION_MARKS = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(encoded: bytes, *, name: str, max_side: int | None = None) -> Image.Image:
    """Decode a whole image to RGB. Errors: `DataError` naming the image, as listed above.

    `max_side`: the image will be shrunk to this; a JPEG of more than `MAX_PIXELS` may be decoded smaller, though not
    below this.
    """
    image, _ = _decode(encoded, name, max_side)
    return image


def image_extension(encoded: bytes, *, name: str, max_side: int | None = None) -> str:
    """Decode a whole image and return its format: `jpg`, `png` or `webp`. Parameters, errors: as `decode_image`."""
    _, extension = _decode(encoded, name, max_side)
    return extension


def image_size(encoded: bytes, *, name: str, max_side: int | None = None) -> tuple[int, int]:
    """The (width, height) of an image once upright, read from the header where possible. Errors: as `decode_image`."""
    _check_bytes(encoded, name)
    with _strict_pillow(), _decoding(name), Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
        _check_size(image, name, max_side)
        width, height = image.size
        # A PNG may state its orientation after its pixels, which Pillow then has to decode.
        if image.format == "PNG" and not any(mark in encoded for mark in _PNG_ORIENTATION_MARKS):
            return width, height
        return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def pad_to_square(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    """Centre an RGB image on a square canvas of one colour, an odd pixel at the right or bottom, as LLaVA pads."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), fill)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


class ImagePreprocessor:
    """A checkpoint's image processor with our decoder and handling of the aspect ratio.

    `pad` pads to a square with the processor's mean colour, `int(mean · 255)`; `square` leaves it to the processor
    (LLaVA's `image_aspect_ratio`). `size`: (H, W). `byte_values_3V` float32: the processor's value of each byte in each
    channel, after resizing and cropping. Picklable, and safe in workers.
    Errors: `ConfigError` for another aspect, `ModelError` if the processor has no fixed output size.
    """

    def __init__(self, processor: CLIPImageProcessorPil, aspect: str = "pad") -> None:
        if aspect not in ASPECTS:
            raise ConfigError(f"image aspect '{aspect}' is unknown: choose one of {', '.join(ASPECTS)}")
        self.aspect = aspect
        self._processor = processor
        self.fill = tuple(int(mean * 255) for mean in processor.image_mean)
        self.size = _output_size(processor, aspect)
        self.byte_values_3V = _byte_values(processor)

    @classmethod
    def from_checkpoint(cls, folder: Path, aspect: str = "pad") -> ImagePreprocessor:
        """Read a checkpoint folder's processor. Errors: `ModelError` if it has none, or none of a known kind.

        `auto`: the aspect that the folder states, as exported students do; `pad` if it states none.
        """
        file, settings = read_processor_settings(Path(folder))
        kind = settings.get("image_processor_type", settings.get("feature_extractor_type"))
        stated = "pad"
        if kind == _PADDING_PROCESSOR:
            stated = "pad" if settings.get("do_pad") else "square"
            settings = {key: value for key, value in settings.items() if key != "do_pad"}
        elif kind not in _PROCESSORS:
            known = ", ".join((*_PROCESSORS, _PADDING_PROCESSOR))
            raise ModelError(f"{file}: image processor '{kind}' is none of {known}")
        family = _PROCESSORS.get(kind, "clip")
        module = importlib.import_module(f"transformers.models.{family}.image_processing_pil_{family}")
        processor = next(value for name, value in vars(module).items() if name.endswith("ImageProcessorPil"))
        aspect = stated if aspect == AUTO_ASPECT else aspect
        settings = {key: value for key, value in settings.items() if not key.endswith("_type")}
        try:
            return cls(processor.from_dict(settings), aspect)
        except (TypeError, ValueError, ModelError) as error:
            raise ModelError(f"{file}: {error}") from error

    def pixels(self, encoded: bytes, *, name: str) -> NDArray[np.float32]:
        """Decode and preprocess one image to [3, H, W] float32. Errors: `DataError` naming it."""
        return self.preprocess(decode_image(encoded, name=name))

    def preprocess(self, image: Image.Image) -> NDArray[np.float32]:
        """Convert an RGB image to pixels, bit for bit as the processor does."""
        import torch  # slow, and not needed for decoding alone

        bytes_1HW3 = torch.from_numpy(np.array(self.fit(image))[None])
        pixels_3HW: NDArray[np.float32] = pixel_values(bytes_1HW3, torch.from_numpy(self.byte_values_3V))[0].numpy()
        return pixels_3HW

    def pixel_bytes(self, encoded: bytes, out_HW3: NDArray[np.uint8], *, name: str) -> None:
        """Decode one image and write its bytes, to which `byte_values_3V` applies. Errors: `DataError` naming it."""
        out_HW3[:] = np.asarray(self.fit(decode_image(encoded, name=name)))

    def fit(self, image: Image.Image) -> Image.Image:
        """Pad, resize and crop an RGB image as the processor does; its remaining steps work byte by byte."""
        return self._sized(pad_to_square(image, self.fill) if self.aspect == "pad" else image)

    def _sized(self, image: Image.Image) -> Image.Image:
        """Resize and crop as the processor does, without its copies."""
        processor, (height, width) = self._processor, self.size
        if processor.do_resize:
            size = _plain_size(processor.size)
            if "shortest_edge" in size:
                edge, short = size["shortest_edge"], min(image.size)
                size = {"height": int(edge * image.height / short), "width": int(edge * image.width / short)}
            if image.size != (size["width"], size["height"]):  # else Pillow would copy it
                image = image.resize((size["width"], size["height"]), int(processor.resample))
        if image.size == (width, height):
            return image
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))  # black beyond the image

    def describe(self) -> dict[str, object]:
        """Everything that determines the pixels, as JSON values, for a fingerprint."""
        processor = self._processor
        fields: dict[str, object] = {
            "aspect": self.aspect,
            "decoder": DECODER,
            "height": self.size[0],
            "width": self.size[1],
        }
        switches = {name: bool(getattr(processor, name)) for name in ("do_resize", "do_center_crop", "do_rescale")}
        fields |= switches | {"do_normalize": bool(processor.do_normalize)}
        if switches["do_resize"]:
            fields |= {"size": _plain_size(processor.size), "resample": int(processor.resample)}
        if switches["do_rescale"]:
            fields["rescale_factor"] = float(processor.rescale_factor)
        if processor.do_normalize:
            fields["image_std"] = [float(value) for value in processor.image_std]
        if processor.do_normalize or self.aspect == "pad":
            fields["image_mean"] = [float(value) for value in processor.image_mean]
        return fields


def pixel_values(bytes_IHWC: Tensor, byte_values_CV: Tensor) -> Tensor:
    """Convert images stored as bytes to pixels [I, C, H, W], on any device, by each byte's value per channel.

    Values are looked up, not computed: they equal the image processor's bit for bit on every device.
    """
    images, height, width, channels = bytes_IHWC.shape
    pixels_ICHW = byte_values_CV.new_empty(images, channels, height, width)
    for channel, values_V in enumerate(byte_values_CV):
        bytes_ = bytes_IHWC[..., channel].flatten().int()
        pixels_ICHW[:, channel] = values_V.index_select(0, bytes_).view(images, height, width)
    return pixels_ICHW


def processor_settings(settings: Mapping[str, Any], aspect: str) -> dict[str, Any]:
    """An image processor's settings, changed to those of the transformers processor that handles `aspect` as we do."""
    kind = settings.get("image_processor_type")
    whole = {"do_center_crop": False} if _PROCESSORS.get(str(kind)) == "siglip" else {}  # unlike the new kind's default
    return {**whole, **settings, "image_processor_type": _PADDING_PROCESSOR, "do_pad": aspect == "pad"}


def read_processor_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Find an image processor's settings as transformers does: in the processor's file, else in a file of their own.

    Result: the file and its settings. Errors: `ModelError` if it is missing or unreadable.
    """
    file = folder / "processor_config.json"
    if file.is_file() and "image_processor" in (nested := _read_object(file)):
        return file, _checked(file, nested["image_processor"])
    file = folder / "preprocessor_config.json"
    if file.is_file():
        return file, _read_object(file)
    raise ModelError(f"{folder}: no preprocessor_config.json: name a checkpoint folder with its image processor")


def _decode(encoded: bytes, name: str, max_side: int | None) -> tuple[Image.Image, str]:
    _check_bytes(encoded, name)
    with _strict_pillow(), _decoding(name), Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
        _check_size(image, name, max_side)
        extension = _EXTENSIONS[str(image.format)]
        if max_side is not None and image.width * image.height > MAX_PIXELS:
            scale = max_side / max(image.size)
            image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))  # affects JPEGs only
        image.load()
        return _to_rgb(_upright(image)), extension


def _check_bytes(encoded: bytes, name: str) -> None:
    if not encoded:
        raise DataError(f"image '{name}': is empty (0 bytes): download or copy it again")
    if len(encoded) > MAX_ENCODED_BYTES:
        raise DataError(f"image '{name}': {len(encoded)} bytes, more than {MAX_ENCODED_BYTES}")


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn any decoder's error into a `DataError` naming the image."""
    try:
        yield
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"image '{name}': not a JPEG, PNG or WebP file: convert it") from error
    except Exception as error:
        raise DataError(f"image '{name}': cannot be decoded: {error or type(error).__name__}") from error


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Suppress Pillow's warnings (bad EXIF: handled here), swap its pixel limit for ours, refuse truncated images."""
    lenient, pixels = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = lenient, pixels


def _check_size(image: Image.Image, name: str, max_side: int | None) -> None:
    """Refuse, by the header alone, images that take too much memory to decode, pad or resize."""
    said = f"image '{name}': {image.width}×{image.height} pixels"
    most = MAX_JPEG_PIXELS if image.format in ("JPEG", "MPO") else MAX_PIXELS
    if max_side is None and max(image.size) > MAX_IMAGE_SIDE:
        raise DataError(f"{said}, more than {MAX_IMAGE_SIDE} a side: shrink it, for instance by `pack --max-side`")
    if image.width * image.height > most:
        raise DataError(f"{said}, more than the {most:,} that --max-side can shrink: shrink it with another program")
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise DataError(f"{said}, longer than {MAX_ASPECT_RATIO}:1: crop it")


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    return image.transpose(_ORIENTATIONS[orientation]) if orientation in _ORIENTATIONS else image


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # a damaged EXIF block counts as none
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        high_byte_HW = (np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        return Image.fromarray(high_byte_HW).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _read_object(file: Path) -> dict[str, Any]:
    try:
        return _checked(file, json.loads(file.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not readable as JSON: {error}") from error


def _checked(file: Path, settings: Any) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise ModelError(f"{file}: expected an object with an image processor's settings")
    return settings


def _output_size(processor: CLIPImageProcessorPil, aspect: str) -> tuple[int, int]:
    if getattr(processor, "do_pad", None):
        raise ModelError("it pads images (do_pad), which is not supported")
    if processor.do_resize and set(_plain_size(processor.size)) not in ({"height", "width"}, {"shortest_edge"}):
        raise ModelError(f"its size is {_plain_size(processor.size)}: expected shortest_edge, or height and width")
    if processor.do_center_crop:
        return int(processor.crop_size["height"]), int(processor.crop_size["width"])
    size = _plain_size(processor.size) if processor.do_resize else {}
    if {"height", "width"} <= size.keys():
        return size["height"], size["width"]
    if size.keys() == {"shortest_edge"} and aspect == "pad":
        return size["shortest_edge"], size["shortest_edge"]
    raise ModelError(f"its output size depends on the image (aspect '{aspect}'): set a crop, or height and width")


def _byte_values(processor: CLIPImageProcessorPil) -> NDArray[np.float32]:
    """The processor's value of each byte in each channel, [3, V]: it rescales and normalises pixel by pixel."""
    values_31V = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    if processor.do_rescale:
        values_31V = processor.rescale(values_31V, processor.rescale_factor)
    if processor.do_normalize:
        values_31V = processor.normalize(values_31V, processor.image_mean, processor.image_std)
    return np.ascontiguousarray(values_31V[:, 0], dtype=np.float32)


def _plain_size(size: Any) -> dict[str, int]:
    return {str(key): int(value) for key, value in dict(size).items() if value is not None}
