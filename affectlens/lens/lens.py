"""Lens: a live model and its processor, addressed by the same sites as its files."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affectlens import html
from affectlens.checkpoints import Checkpoint, Source
from affectlens.checkpoints.chat_templates import ChatTemplate
from affectlens.errors import LensError
from affectlens.lens.asking import ask
from affectlens.lens.current import Current
from affectlens.lens.greedy import settings_for
from affectlens.lens.holding import Running, looked_up, refuse_other_thread, switched_off
from affectlens.lens.hooks.places import module_name
from affectlens.lens.hooks.recording import Metric, Recording, record
from affectlens.lens.inputs.batching import Numbers, batches
from affectlens.lens.inputs.padding import padding_id
from affectlens.lens.inputs.prompt_format import PromptFormat, templates
from affectlens.lens.intervening import ActivationIntervention, Intervening, Intervention
from affectlens.lens.live import Live, device_of, remark, tokenizer_of
from affectlens.lens.paired import Paired
from affectlens.lens.restoring import atomic
from affectlens.lens.running import forward, generated, mixes_rows, typed
from affectlens.lens.tower_sizes import COLUMNS, tower_sizes
from affectlens.probes.claims import Verification
from affectlens.probes.verifying import verify
from affectlens.sites import Points, Site, Sites, Span
from affectlens.tasks import Example

if TYPE_CHECKING:
    from nnsight import NNsight
    from transformer_lens.model_bridge import TransformerBridge


class Lens(Live):
    """A Hugging Face model that answers in text, addressed by site.

    Causal, multimodal, omni and encoder-decoder models, with or without a PEFT adapter.

    `processor` is the model's processor, or its tokenizer if it takes text alone. The model is put
    into evaluation mode; nothing else of it changes outside a `with lens.intervene(...)` block.

    >>> import affectlens as al
    >>> base, tuned, _, tasks = al.load_demo()
    >>> lens = al.load(base, dtype="float32")
    >>> lens
    Lens(LlavaForConditionalGeneration: 3,081,568 parameters, float32, cpu)
    >>> example, prompt = tasks[0].examples[0], tasks[0].prompt
    >>> lens.logits(example, prompt=prompt).ndim
    2
    >>> gates = lens.sites.where(tower="language", role="gate_proj")
    >>> with lens.intervene(al.Transplant(gates, donor=tuned)):
    ...     logits = lens.logits(example, prompt=prompt)
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        *,
        source: Checkpoint | None = None,
        remote_code: Mapping[str, Any] | None = None,
        template_options: Mapping[str, Any] | None = None,
        cue: str = "",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise LensError(
                f"Lens takes an nn.Module, got a {type(model).__name__}; to load files, use al.load(…)"
            )
        self.model = model.eval()
        self.processor = processor
        self.source = source  # the checkpoint the model was loaded from, if it was
        self.remote_code = remote_code  # the revision and files of the model's own code, if it ran any
        self.known = Current()
        self._form: tuple[Any, PromptFormat] | None = None
        self.told: set[str] = set()  # remarks made so far; each is made once
        self.template_options = dict(template_options or {})  # passed to the chat template
        self.template: ChatTemplate | None = None  # used instead of the processor's own
        self.cue = cue  # written behind each prompt
        self.unread = ""  # why the processor could not be read, where there are files of one

    @atomic
    def __enter__(self) -> "Lens":
        self._switched = switched_off(self)
        return self

    @atomic
    def __exit__(self, *_: object) -> None:
        self._switched.undo()

    @property
    def checkpoint(self) -> Checkpoint:
        """The live parameters, seen as a checkpoint: adapters count as they are now."""
        if self.shown is not None:
            return self.shown
        found = looked_up(self)
        if self.source is not None:
            found.tokenizer = self.source.tokenizer
        return found

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The live parameters and persistent buffers, by the model's own names; tied ones once."""
        return self.known.parameters(self.model)

    @property
    def device(self) -> torch.device:
        """The device of the input embedding, where inputs go."""
        return device_of(self.model)

    def module(self, site: Site) -> nn.Module:
        """Return the module whose weight contains a site. Raises `NoSuchSite`."""
        return self.model.get_submodule(module_name(self.checkpoint.at(site)))

    def parameter(self, site: Site) -> Tensor:
        """Return the live values of a site, sharing the model's memory. Raises `NoSuchSite`.

        For a site that an adapter changes: the effective values, base plus factors, computed in float32, with
        the adapters that are active now. Raises `CheckpointError` where these values are unknown.
        """
        refuse_other_thread(self)
        return self.checkpoint.read(site)

    def intervene(self, *interventions: Intervention | ActivationIntervention) -> Intervening:
        """Apply interventions, in order, for the length of a `with` block; blocks nest.

        On leaving, error or not, every parameter is the very tensor it was before, and no hook remains.
        Inside, a parameter may be the donor's own memory, so don't train there. A `Remark` warns once where a
        number could be misread: a transplant that leaves something of the donor behind, zeros that delete a
        whole MLP, a point that matched no position. Raises `LensError`, before anything is changed, for what
        can't be changed: offloaded, quantised or compiled parts, experts computed together.
        """
        return Intervening(self, interventions)

    def record(
        self,
        places: Points | Sites,
        *examples: Example | Mapping[str, Tensor],
        where: Span = None,
        prompt: str = "{text}",
        keep: str = "values",
        metric: Metric | None = None,
        batch_size: int = 32,
    ) -> Recording:
        """Record the activations at some points while examples, or prepared batches, are run.

        Sites mean the output of their modules, at the positions `where` (see `Sites.at`). Without examples,
        use it as a block: `with lens.record(points) as recording: lens.generate(example)`.

        `keep` is `"values"`, (batch, position, feature); `"mean"`, over all positions; or `"second"`, the
        mean and the uncentred second moment. The last two need the memory of one batch only.
        `metric` maps the logits after each prompt, (batch, vocabulary), to one number per example or one in
        all; its gradients at the points are then kept beside the values. Raises `LensError`, `NoSuchSite`.
        """
        if where is not None and not isinstance(places, Sites):
            raise LensError("where= applies to sites only; give points their span: sites.at(point, span=…)")
        points = places.at("output", span=where) if isinstance(places, Sites) else places
        recording = Recording(self, points, keep=keep, gradients=metric is not None)
        return record(recording, self, examples=examples, prompt=prompt, metric=metric, batch_size=batch_size)

    def paired(self, tuned: Source | Live) -> Paired:
        """Keep a second model beside this one: only what differs, or the factors of an adapter.

        Its repr shows the memory that it needs before anything is loaded: see `Paired`.
        """
        return Paired(self, tuned)

    def nnsight(self, *interventions: Intervention | ActivationIntervention) -> "NNsight":
        """Return the same module as an `nnsight.NNsight`; the interventions apply in each of its runs.

        See `affectlens.lens.doors.nnsight_door` for what a run is and what importing nnsight does to Python.
        """
        from affectlens.lens.doors.nnsight_door import nnsight_of

        return nnsight_of(self, *interventions)

    def bridge(
        self,
        *interventions: Intervention | ActivationIntervention,
        dtype: torch.dtype | str | None = None,
    ) -> "TransformerBridge":
        """Return a TransformerLens bridge over a copy of the model, with the interventions applied for good.

        See `affectlens.lens.doors.bridge`; `bridge_input` there turns a prepared batch into its input. Raises
        `LensError` for a model without an adapter, `MissingExtra` where the adapter needs a package.
        """
        from affectlens.lens.doors.bridge import bridge

        return bridge(self, *interventions, dtype=dtype)

    def verify(self, *examples: Example, prompt: str = "{text}") -> Verification:
        """Test the roles that names claim on the live model: does each gate gate, is each v a v?

        The file that the model was loaded from is then compared with it, site by site. Examples are run with
        their media; without examples, random ids and media that fit the config. Modules that no input reaches
        stay unverified. `.check()` raises `RoleRefuted` with the tensors that contradict their role.
        """
        batch = typed(self.model, self.prepare(*examples, prompt=prompt)) if examples else None
        with Running(self):
            found = verify(self.model, self.checkpoint, batch=batch)
        return found.beside(self.source, self.checkpoint) if self.source is not None else found

    def prepare(self, *examples: Example, prompt: str = "{text}") -> dict[str, Tensor]:
        """Turn examples into one batch of model input, padded on the left (for an encoder, on the right).

        `affectlens.lens.spans` returns the positions of the media in the text. Raises `LensError` without a
        processor, when the rendered text has more or fewer placeholders than there are media, when media
        would not reach the model, or when an example has more tokens than the model has positions.

        The sound track of a film is one of the example's sounds; a `Remark` says so where the processor takes
        none. Some models read padding (most recurrent ones): `logits`, `generate`, `record` and `evaluate`
        run examples of different lengths one length at a time with them, and so should you.
        """
        return ask(self, examples, prompt=prompt).batch

    @property
    def prompt_format(self) -> PromptFormat:
        """The way in which prompts are written for this model. Raises `LensError` without a processor."""
        if self.processor is None:
            why = self.unread or "this lens has no processor"
            raise LensError(f"{why}, so examples can't be prepared; give one: Lens(model, processor)")
        own = templates(self.processor)
        key = (self.processor, own, dict(self.template_options), self.cue, self.unread, self.template)
        if self._form is None or self._form[0] != key:  # a user may set another template at any time
            say = partial(remark, self)
            form = PromptFormat(key[0], key[2], key[3], unread=key[4], template=key[5], say=say)
            self._form = key, form
        return self._form[1]

    def logits(self, *examples: Example, prompt: str = "{text}") -> Float[Tensor, "batch vocabulary"]:
        """Return the logits after each prompt; of an encoder-decoder, after the decoder's first token."""
        parts = self._batches(examples, prompt)
        found = {
            n: row for numbers, batch in parts for n, row in zip(numbers, self.run(batch)[:, -1], strict=True)
        }
        return torch.stack([found[number] for number in sorted(found)])

    @torch.no_grad()
    def run(
        self, batch: Mapping[str, Tensor], *, last: int = 1, answer: int = 0
    ) -> Float[Tensor, "batch last vocabulary"]:
        """Run a prepared batch and return the logits at the last `last` tokens of each row, in float32.

        Rows may be padded on either side. The last `answer` tokens of each row are a given answer:
        interventions treat them as `"generated"`, and the prompt ends before them. Raises `LensError` where
        the model can't run the batch.
        """
        with Running(self):
            return forward(self.model, batch, last=last, answer=answer)

    @torch.no_grad()
    def generate(
        self,
        *examples: Example,
        prompt: str = "{text}",
        max_new_tokens: int = 8,
        settings: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Answer examples greedily and return the new text of each. Raises `LensError`.

        The model's own generation settings (sampling, beams, penalties, forced tokens) are not used; a
        `Remark` names them. `settings` asks for others: `{"do_sample": True, "temperature": 0.7}`.
        """
        usual = {"max_new_tokens": max_new_tokens, "pad_token_id": padding_id(self.model, self.tokenizer)}
        chosen = usual | settings_for(self, settings)
        found: dict[int, str] = {}
        size = 1 if mixes_rows(self.model) else len(examples)
        for numbers, batch in self._batches(examples, prompt, size=size):
            with Running(self):
                texts = generated(self.model, batch, tokenizer=self.tokenizer, settings=chosen)
            found |= zip(numbers, texts, strict=True)
        return [found[number] for number in sorted(found)]

    def _batches(
        self, examples: Sequence[Example], prompt: str, *, size: int | None = None
    ) -> Iterator[tuple[Numbers, dict[str, Tensor]]]:
        """Yield examples in batches of `size`, by default one; where padding changes answers, by length."""
        if not examples:
            self.prepare()  # raises
        make = partial(self.prepare, prompt=prompt)
        yield from batches(self, examples, make=make, tensors=dict, size=size or len(examples))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, alone or inside the processor."""
        return tokenizer_of(self.processor)

    def __repr__(self) -> str:
        name, dtype = type(self.model).__name__, self.checkpoint.identity["dtype"]
        return f"Lens({name}: {self.checkpoint.parameters:,} parameters, {dtype}, {self.device})"

    def _repr_html_(self) -> str:
        return html.table(COLUMNS, tower_sizes(self.checkpoint, self.parameters), caption=repr(self))
