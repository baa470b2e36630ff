"""Write a conversation as the model's own chat template does, and the answer behind it.

example ── messages in the form that the template takes ──▶ prompt
        ── the same with an assistant turn ──▶ prompt and answer, and where the answer begins
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from affectlens.checkpoints.chat_templates import ChatTemplate
from affectlens.errors import LensError, quoted
from affectlens.lens.failures import told
from affectlens.lens.inputs.placeholders import MEDIA
from affectlens.lens.inputs.rendering import rendered, variables
from affectlens.tasks import Example
from affectlens.tasks.written_answers import THOUGHTS, UNSPACED

# Both mean: answer at once, without writing a thought first.
_WITHOUT_THOUGHT = {"enable_thinking": False, "thinking": False}
# In the format of gpt-oss, a thought is a message of its own, and the answer the next one.
_CLOSED = {"<|channel|>final<|message|>": "<|end|><|start|>assistant<|channel|>final<|message|>"}
_PROBE = "qzxjk"  # no template contains it
_PRINTED_PARTS = re.compile(r"['\"]type['\"]\s*:\s*['\"]text['\"]")  # a list of parts, printed by a template
# These processors put the placeholders in front of the text themselves.
ADDS_PLACEHOLDERS = ("Blip2Processor", "InstructBlipProcessor", "Florence2Processor", "GitProcessor")
_PARTS = {"image": "image_processor", "audio": "feature_extractor", "video": "video_processor"}
# Scripts without spaces between words, and their punctuation.
_UNSPACED = re.compile(f"[{UNSPACED}\u3000-\u303f\uff00-\uffef]")


@dataclass(frozen=True)
class Answered:
    """A prompt, and what stands before and after an answer to it in the whole conversation."""

    prompt: str
    before: str
    after: str = ""
    trims: tuple[bool, bool] = (False, False)  # the template removes spaces before, behind an answer
    spaced: bool = False  # an answer in a script with spaces is a new word

    def saying(self, label: str) -> tuple[str, int]:
        """Return the text of prompt and answer in one, and where the answer ends."""
        said = label.lstrip() if self.trims[0] else label
        said = said.rstrip() if self.trims[1] else said
        space = " " if self.spaced and _parts_words(self.before[-1:], said[:1]) else ""
        whole = f"{self.before}{space}{said}"
        return whole + self.after, len(whole)


@dataclass(frozen=True)
class PromptFormat:
    """The way in which prompts are written for a model: its template, and how the template is called.

    `template` is by default that of the processor or of its tokenizer. `options` are passed to it. `cue` is
    written behind every prompt, e.g. to close a thought. `unread` is the reason if only a tokenizer could be
    loaded instead of a processor. `say` is given remarks.
    """

    processor: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    cue: str = ""
    unread: str = ""
    template: ChatTemplate | None = None
    say: Callable[[str], None] = field(default=lambda words: None, compare=False)

    @cached_property
    def used(self) -> ChatTemplate | None:
        """The template that prompts are written with; None where there is none."""
        own, tokenizers = templates(self.processor)
        found = ChatTemplate(own or tokenizers, tokenizers=not own or self.processor is self.tokenizer)
        return self.template or (found if found.text else None)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, alone or inside the processor."""
        return getattr(self.processor, "tokenizer", self.processor)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the template is given beside the messages: no thought where it can be told so."""
        known = variables(self.used.text) if self.used is not None else frozenset()
        unknown = sorted(set(self.options) - known)
        if unknown:
            raise LensError(
                f"the chat template reads no option {', '.join(map(quoted, unknown))}. Names it reads: "
                f"{', '.join(sorted(known)) or 'none (there is no chat template)'}"
            )
        return {name: value for name, value in _WITHOUT_THOUGHT.items() if name in known} | dict(self.options)

    def adds_special_tokens(self, texts: Sequence[str]) -> bool:
        """Return whether the tokenizer adds its special tokens, as transformers decides for a template.

        A tokenizer's template writes them itself; behind a processor's they are added, unless the template
        wrote the beginning-of-sequence token: a second one would change the logits.
        """
        if self.used is not None and self.used.tokenizers:
            return False
        token = self.tokenizer.bos_token
        return not (token and all(text.startswith(token) for text in texts))

    def prompt(self, example: Example, prompt: str) -> str:
        """Return the text that an example is shown as, with a placeholder for each medium."""
        messages = example.chat(prompt)
        if example.closing:
            self.say(
                "examples end with a turn of the assistant; it may hold the answer that is asked for, so "
                "it is left out"
            )
        if self.used is None:
            return self._bare(example, messages) + self.cue
        with told(f"example {quoted(example.id)}: its chat can't be rendered"):
            found = self._rendered(messages)
            self._check_shown(example, messages, found)
        return found + self.cue

    def answered(self, example: Example, prompt: str) -> Answered:
        """Return the prompt of an example and the place of its answer, as the model's own template writes it.

        A template that writes an empty thought before an answer gets it into the prompt. Raises `LensError`
        for a prompt that ends inside a thought: a label is no thought.
        """
        text = self.prompt(example, prompt)
        found = Answered(text, text, spaced=self.used is None)
        if self.used is not None and not self.cue:
            found = _placed(text, self._with_answer([*example.chat(prompt), _said(_PROBE)]), self._trims)
        if opened := _inside_thought(found.prompt, example.chat(prompt)):
            closed = _CLOSED.get(opened[1], f"\n{opened[1]}\n\n")
            raise LensError(
                f"example {quoted(example.id)}: the chat template opens a thought with {opened[0]}, so the "
                f"model thinks first, and a label can't be scored there. Close the thought with "
                f"al.load(…, cue={closed!r}), or let it write: answer='greedy' and enough max_new_tokens"
            )
        return found

    @cached_property
    def _trims(self) -> tuple[bool, bool]:
        """Whether the template removes spaces before an answer, and behind it."""
        user = {"role": "user", "content": _PROBE[:1]}
        plain, before, behind = (
            self._with_answer([user, _said(words)]) for words in (_PROBE, f" {_PROBE}", f"{_PROBE} ")
        )
        shown = _PROBE in plain
        return shown and before == plain, shown and behind == plain

    def _with_answer(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return a chat that ends with an assistant turn; "" where the template refuses one."""
        try:
            return self._rendered(messages, cue=False)
        except LensError:
            raise
        except Exception:
            self.say("the chat template refuses an assistant turn, so labels are written behind its cue")
            return ""

    def _rendered(self, messages: Sequence[Mapping[str, Any]], *, cue: bool = True) -> str:
        formed = [{**message, "content": self._formed(message)} for message in messages]
        return self._by_template(formed, cue=cue)

    def _by_template(self, messages: Sequence[Mapping[str, Any]], *, cue: bool) -> str:
        assert self.used is not None
        owner = self.tokenizer if self.used.tokenizers else self.processor
        return rendered(owner, messages, template=self.used.text, add_generation_prompt=cue, **self.settings)

    def _formed(self, message: Mapping[str, Any]) -> Any:
        """Return the content of a message in a form that the template takes: a string or a list of parts."""
        content, (string, parts) = message["content"], self._takes(str(message["role"]))
        if isinstance(content, str):
            return content if string or not parts else [{"type": "text", "text": content}]
        return list(content) if parts or not string else self._words(content)

    def _takes(self, role: str) -> tuple[bool, bool]:
        """Return whether the template shows a string, and whether it shows a list of parts, in this role."""
        if role not in self._forms:
            if role in ("system", "assistant"):
                user = {"role": "user", "content": _PROBE[:1]}
                user["content"] = self._formed(user)
            place: Callable[[Any], list[Any]] = {
                "system": lambda one: [one, user],
                "assistant": lambda one: [user, one, user],
            }.get(role, lambda one: [one])
            forms = (_PROBE, [{"type": "text", "text": _PROBE}])
            string, parts = (self._shows(place({"role": role, "content": form})) for form in forms)
            self._forms[role] = string, parts
        return self._forms[role]

    @cached_property
    def _forms(self) -> dict[str, tuple[bool, bool]]:
        return {}

    def _shows(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        try:
            found = self._by_template(messages, cue=True)
        except LensError:
            raise
        except Exception:
            return False
        return _PROBE in found and not _PRINTED_PARTS.search(found)

    def _check_shown(self, example: Example, messages: Sequence[Mapping[str, Any]], text: str) -> None:
        """Raise `LensError` where the template left out a text of the user; make a remark for other roles."""
        there = _squeezed(text)
        for message in messages:
            parts = [message] if isinstance(message["content"], str) else message["content"]
            texts = [str(part.get("content", part.get("text", ""))) for part in parts]
            if all(_squeezed(words) in there for words in texts):
                continue
            if message["role"] == "user":
                raise LensError(
                    f"example {quoted(example.id)}: the chat template leaves out the text of the user, "
                    f"{quoted(_texts(message['content']))}"
                )
            self.say(f"the chat template leaves out or changes texts in the role {message['role']}")

    def _bare(self, example: Example, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of an example for a model without a chat template."""
        if example.messages:
            self.say(
                "this model has no chat template: the turns of a chat are joined by line feeds, without roles"
            )
        if type(self.processor).__name__ in ADDS_PLACEHOLDERS:
            return "\n".join(_texts(message["content"]) for message in messages)
        if example.messages:
            return "\n".join(self._words(message["content"]) for message in messages)
        places = [token for medium, n in example.media.items() for token in [self.placeholder(medium)] * n]
        return "\n".join([*filter(None, places), *(_texts(message["content"]) for message in messages)])

    def _words(self, content: str | Sequence[Mapping[str, Any]]) -> str:
        """Return the content of a message as one string, with the placeholders of its media."""
        if isinstance(content, str):
            return content
        tokens = [self.placeholder(part["type"]) for part in content if part["type"] in MEDIA]
        return "\n".join([*filter(None, tokens), _texts(content)])

    def placeholder(self, medium: str) -> str | None:
        """Return the placeholder of a medium in a text; None where the processor does not take the medium."""
        found = getattr(self.processor, f"{medium}_token", None)
        # A tokenizer may know the placeholder too, although it can't read the medium.
        reads = getattr(self.processor, _PARTS[medium], None) or getattr(
            self.processor, f"{medium}_processor", None
        )
        return str(found) if found is not None and reads is not None else None


def _parts_words(end: str, beginning: str) -> bool:
    """Return whether a space stands between a text and the next word, given their characters there."""
    there = bool(end and beginning) and not (end.isspace() or beginning.isspace())
    opens = there and unicodedata.category(end) in ("Ps", "Pi")  # brackets and quotation marks
    return there and not opens and not _UNSPACED.search(end + beginning)


def templates(processor: Any) -> tuple[Any, Any]:
    """Return the chat templates of a processor and of its tokenizer."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return getattr(processor, "chat_template", None), getattr(tokenizer, "chat_template", None)


def _texts(content: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the texts of a message, which is a string or a list of parts."""
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", "")) for part in content if part.get("type") == "text")


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _said(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": words}


def _placed(prompt: str, whole: str, trims: tuple[bool, bool]) -> Answered:
    """Find the place of an answer in a rendered chat whose beginning is the prompt."""
    before, found, after = whole.partition(_PROBE)
    shown, asked = _squeezed(before), _squeezed(prompt)
    if not found or not shown.startswith(asked):
        # The template writes a past answer in another form than the one that it asks for.
        return Answered(prompt, prompt, trims=trims)
    opened = _open_thought(prompt)
    closes = opened is not None and shown[len(asked) :] == opened[1]
    return Answered(before if closes else prompt, before, after, trims=trims)


def _inside_thought(prompt: str, messages: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """Return the tags of a thought that a prompt opens behind the last message, and leaves open."""
    words = _texts(messages[-1]["content"]).strip() if messages else ""
    behind = prompt.rpartition(words)[2] if words in prompt and words else ""
    begun = (tags for tags in THOUGHTS if behind.rfind(tags[0]) > behind.rfind(tags[1]))
    return next(begun, _open_thought(prompt))


def _open_thought(prompt: str) -> tuple[str, str] | None:
    """Return the tags of a thought that the end of a prompt opens."""
    end = prompt.rstrip()
    return next((tags for tags in THOUGHTS if end.endswith(tags[0])), None)
