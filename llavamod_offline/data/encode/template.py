"""Conversation templates: turns → segments of text, each marked as supervised or not.

Supervision follows from the segments; nothing downstream searches rendered text for answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Turn
from llavamod_offline.errors import ConfigError, DataError

_LLAVA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation; a `special` piece is the name of one special token."""

    text: str
    supervised: bool = False
    special: bool = False


ROLES = ("system", "user", "assistant")
TOOL_ROLES = ("tools", "tool_calls", "tool")
SystemTurn = tuple[tuple[Segment, ...], tuple[Segment, ...]]  # what is before and after its text


class WordsTools(Protocol):
    """The wording of conversations with tools, by a checkpoint's chat template."""

    @property
    def chat_template(self) -> str:
        """The chat template."""
        ...

    def bytes_around(self, template: Template) -> tuple[int, int]:
        """Upper bounds on the bytes added to a sample's own texts: once for its tools, and per turn."""
        ...

    def __call__(self, template: Template, turns: Sequence[Turn]) -> list[Segment]:
        """Render turns. Errors: `DataError` if this cannot be done faithfully."""
        ...


@dataclass(frozen=True)
class Template:
    """How turns are worded: plain text, except for the special token `end` and segments marked as special.

    A conversation reads: system · (user_prefix · text · assistant_prefix · answer_prefix · answer · end · separator)*,
    without the last separator. The answer (with `answer_prefix`) and its `end` token are supervised. A system turn
    replaces `system`, between the two parts of `system_turn`; None: the template has no such turn. `image_prefix`
    replaces `user_prefix` before a text that begins with an image; None: it does not. `strips`: the roles whose texts,
    or texts between images, lose the white space around them. `tool_wording` renders conversations with tools by the
    checkpoint's chat template; None: the template cannot word them.
    """

    name: str
    system: tuple[Segment, ...]
    user_prefix: tuple[Segment, ...]
    assistant_prefix: tuple[Segment, ...]
    answer_prefix: str
    end: str
    separator: str
    system_turn: SystemTurn | None = None
    image_prefix: tuple[Segment, ...] | None = None
    strips: tuple[str, ...] = ()
    tool_wording: WordsTools | None = field(default=None, repr=False, compare=False)

    def render(self, turns: Sequence[Turn]) -> list[Segment]:
        """Render turns; if the last is not the assistant's, the result is a prompt that ends where the answer begins.

        Errors: `DataError` for a system turn or tools if the template has none.
        """
        if any(turn.role in TOOL_ROLES for turn in turns):
            if self.tool_wording is None:
                raise DataError(f"template '{self.name}' has no wording for tools: remove them from the sample")
            return self.tool_wording(self, turns)
        segments = list(self.system)
        if turns and turns[0].role == "system":
            if self.system_turn is None:
                raise DataError(f"template '{self.name}' has no system turn: remove it from the sample")
            before, after = self.system_turn
            segments = [*before, Segment(self.strip(turns[0])), *after]
            turns = turns[1:]
        for turn in turns:
            text = self.strip(turn)
            if turn.role == "user":
                own = self.image_prefix if text.startswith(IMAGE_PLACEHOLDER) else None
                prefix = self.user_prefix if own is None else own
                segments += [*prefix, Segment(text), *self.assistant_prefix]
            else:
                segments.append(Segment(self.answer_prefix + text, supervised=True))
                segments.append(Segment(self.end, supervised=True, special=True))
                if self.separator:
                    segments.append(Segment(self.separator))
        if turns and turns[-1].role == "assistant" and self.separator:
            segments.pop()
        return segments

    def strip(self, turn: Turn) -> str:
        """A turn's text without the white space that the template drops."""
        if turn.role not in self.strips:
            return turn.text
        return IMAGE_PLACEHOLDER.join(piece.strip() for piece in turn.text.split(IMAGE_PLACEHOLDER))


def _special(name: str) -> Segment:
    return Segment(name, special=True)


TEMPLATES = {
    # LLaVA-MoD's `--version qwen` (its conv_phi): base models, ends with <|endoftext|>, not ChatML.
    "qwen": Template(
        name="qwen",
        system=(Segment(_LLAVA_SYSTEM + " "),),
        user_prefix=(Segment("USER: "),),
        assistant_prefix=(Segment(" ASSISTANT:"),),
        answer_prefix=" ",
        end="<|endoftext|>",
        separator="",
        system_turn=((), (Segment(" "),)),
    ),
    # ChatML as Qwen's instruction-tuned models use it.
    "chatml": Template(
        name="chatml",
        system=(
            _special("<|im_start|>"),
            Segment("system\nYou are a helpful assistant."),
            _special("<|im_end|>"),
            Segment("\n"),
        ),
        user_prefix=(_special("<|im_start|>"), Segment("user\n")),
        assistant_prefix=(_special("<|im_end|>"), Segment("\n"), _special("<|im_start|>"), Segment("assistant\n")),
        answer_prefix="",
        end="<|im_end|>",
        separator="\n",
        system_turn=((_special("<|im_start|>"), Segment("system\n")), (_special("<|im_end|>"), Segment("\n"))),
    ),
    # LLaVA-1.5's `--version v1` on Vicuna: the wording of "qwen" with Llama's end token.
    "llava_v1": Template(
        name="llava_v1",
        system=(Segment(_LLAVA_SYSTEM + " "),),
        user_prefix=(Segment("USER: "),),
        assistant_prefix=(Segment(" ASSISTANT:"),),
        answer_prefix=" ",
        end="</s>",
        separator="",
        system_turn=((), (Segment(" "),)),
    ),
}


AUTO = "auto"  # selects the wording a checkpoint was trained with: see `chat_template.choose_template`
OWN = "tokenizer"  # selects the tokenizer's own template: see `chat_template.choose_template`


def get_template(name: str) -> Template:
    """Look up a template by name. Errors: `ConfigError` listing the known names."""
    if name not in TEMPLATES:
        raise ConfigError(f"template '{name}' is unknown: choose one of {', '.join((*TEMPLATES, OWN, AUTO))}")
    return TEMPLATES[name]
