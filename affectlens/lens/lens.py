"""The lens: a live model and its processor, addressed by the same sites as the files."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affectlens.checkpoints import Checkpoint, Source, open_checkpoint
from affectlens.checkpoints.memory import saved_tensors
from affectlens.errors import LensError
from affectlens.lens.hooks.places import module_name
from affectlens.lens.hooks.recording import Metric, Recording, record
from affectlens.lens.inputs.preparing import prepare, refuse_longer
from affectlens.lens.intervening import ActivationIntervention, Intervening, Intervention
from affectlens.lens.live import config_of, device_of
from affectlens.lens.paired import Paired
from affectlens.lens.running import forward, generated, started, typed
from affectlens.probes.claims import Verification
from affectlens.probes.verifying import verify
from affectlens.sites import Points, Site, Sites, Span
from affectlens.tasks import Example

if TYPE_CHECKING:
    from nnsight import NNsight
    from transformer_lens.model_bridge import TransformerBridge


class Lens:
    """Wrap any Hugging Face model that answers in text: causal, multimodal, omni or encoder-decoder.

    `processor` is the model's processor, or its tokenizer if it takes text alone. The model is put
    into evaluation mode; nothing else of it is changed outside a `with lens.intervene(...)` block.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        *,
        source: Checkpoint | None = None,
        remote_code: Mapping[str, Any] | None = None,
        unread: str = "",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise LensError(
                f"a lens wraps a module, not a {type(model).__name__}; al.load(…) makes one of files"
            )
        self.model = model.eval()
        self.processor = processor
        self.source = source  # the checkpoint the model was loaded from, if it was
        self.remote_code = remote_code  # the revision and files of the model's own code, if it ran any
        self.told: set[str] = set()  # remarks that were made, each once
        self._unread = unread  # why there is no processor, where there are files of one

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The live parameters, seen as a checkpoint."""
        return open_checkpoint(self.model)

    @property
    def sites(self) -> Sites:
        """Every site; the same as those of the checkpoint on disk."""
        return self.checkpoint.sites

    @cached_property
    def parameters(self) -> Mapping[str, Tensor]:
        """The live parameters and what else a save holds, by the model's own names; tied ones once."""
        return saved_tensors(self.model)

    @property
    def device(self) -> torch.device:
        """Where the input goes: the device of the input embedding."""
        return device_of(self.model)

    def module(self, site: Site) -> nn.Module:
        """The module whose weight a site is, or is a part of; raises `NoSuchSite`."""
        return self.model.get_submodule(module_name(self.checkpoint.at(site)))

    def parameter(self, site: Site) -> Tensor:
        """The live values of a site, sharing the model's memory; raises `NoSuchSite`.

        Of a site that an adapter changes: what it is in effect, computed in float32.
        """
        return self.checkpoint.read(site)

    def intervene(self, *interventions: Intervention | ActivationIntervention) -> Intervening:
        """Apply interventions, in order, for the length of a `with` block; blocks nest.

        On leaving, error or not, every parameter is the very tensor it was before, and no hook is left;
        inside it may be the donor's own memory, so train nothing there. A `Remark` is warned of once where a
        number could be misread: a donor of which something does not come along, zeros that delete a whole
        MLP, a point that nothing passed. Raises `LensError` for what can't be changed (offloaded, quantised
        or compiled parts, experts computed as one) before anything is.
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
        """Record what passes some points while examples, or prepared batches, are run.

        Sites mean the output of their modules, at the positions `where` (see `Sites.at`). Without examples
        it records what is run in a block: `with lens.record(points) as recording: lens.generate(example)`.

        `keep` is `"values"`, (batch, position, feature); `"mean"`, or `"second"`: the mean, and with it the
        uncentred second moment, over all positions, of any number of examples in the memory of one batch.
        `metric` turns the logits after each prompt, (batch, vocabulary), into a number an example or one in
        all; its gradients at what passed are then kept beside the values. Raises `LensError`, `NoSuchSite`.
        """
        if where is not None and not isinstance(places, Sites):
            raise LensError("where= is for sites; points have their span: sites.at(point, span=…)")
        points = places.at("output", span=where) if isinstance(places, Sites) else places
        recording = Recording(self, points, keep=keep, gradients=metric is not None)
        return record(recording, self, examples=examples, prompt=prompt, metric=metric, batch_size=batch_size)

    def paired(self, tuned: Source) -> Paired:
        """Keep a second model beside this one: only what differs, or the factors of an adapter.

        What it would take is known, and shown, before anything is loaded: see `Paired`.
        """
        return Paired(self, tuned)

    def nnsight(self, *interventions: Intervention | ActivationIntervention) -> "NNsight":
        """The same module as an `nnsight.NNsight`, each of whose runs has the interventions.

        See `affectlens.lens.doors.nnsight_door` for what a run is, and what importing nnsight does to Python.
        """
        from affectlens.lens.doors.nnsight_door import nnsight_of

        return nnsight_of(self, *interventions)

    def bridge(
        self,
        *interventions: Intervention | ActivationIntervention,
        dtype: torch.dtype | str | None = None,
    ) -> "TransformerBridge":
        """A TransformerLens bridge over a copy of the model, in which the interventions stay.

        See `affectlens.lens.doors.bridge`; `bridge_input` there makes its input of a prepared batch. Raises
        `LensError` for a model that TransformerLens has no adapter for, `MissingExtra` where that needs more.
        """
        from affectlens.lens.doors.bridge import bridge

        return bridge(self, *interventions, dtype=dtype)

    def verify(self, *examples: Example, prompt: str = "{text}") -> Verification:
        """Test on the live model what the names say: does each gate gate, is each v a v?

        The file that the model was loaded from is held to it, site by site. With examples their text and
        media are run; without, random ids and media as the config asks for them. What no input reaches is
        unverified. `.check()` raises `RoleRefuted` naming the tensors that do otherwise than their role says.
        """
        batch = typed(self.model, self.prepare(*examples, prompt=prompt)) if examples else None
        found = verify(self.model, self.checkpoint, batch=batch)
        return found.beside(self.source, self.checkpoint) if self.source is not None else found

    def prepare(self, *examples: Example, prompt: str = "{text}") -> dict[str, Tensor]:
        """Turn examples into one batch of model input, padded on the left (for an encoder, on the right).

        Raises `LensError` without a processor, when the placeholders for media in the rendered text are
        more or fewer than the media, when media would not reach the model, or when an example has more tokens
        than the model has positions. `affectlens.lens.spans` says where in the text the media stand.
        """
        for one in examples or (None,):
            if not isinstance(one, Example):
                shown = "nothing" if one is None else f"a {type(one).__name__}"
                raise LensError(f"a lens is shown examples, not {shown}: al.Example(id, label, text=…)")
        if self.processor is None:
            why = self._unread or "this lens has no processor"
            raise LensError(f"{why}, so it can't read examples: Lens(model, processor)")
        config = config_of(self.model)
        batch = prepare(self.processor, examples, prompt=prompt, config=config, why=self._unread)
        refuse_longer(batch, examples, config=config)
        return {name: tensor.to(self.device) for name, tensor in started(self.model, batch).items()}

    def logits(self, *examples: Example, prompt: str = "{text}") -> Float[Tensor, "batch vocabulary"]:
        """The logits after the last token of each example's prompt; after the first of a decoder's own."""
        return self.run(self.prepare(*examples, prompt=prompt))[:, -1]

    @torch.no_grad()
    def run(
        self, batch: Mapping[str, Tensor], *, last: int = 1, answer: int = 0
    ) -> Float[Tensor, "batch last vocabulary"]:
        """Run a prepared batch; returns the logits of the last `last` positions, in float32.

        The last `answer` tokens of the batch are an answer that is given: to interventions they are
        `"generated"`, and the prompt ends before them. Raises `LensError` where the model can't.
        """
        return forward(self.model, batch, last=last, answer=answer)

    @torch.no_grad()
    def generate(self, *examples: Example, prompt: str = "{text}", max_new_tokens: int = 8) -> list[str]:
        """Answer examples greedily; returns the new text of each. Raises `LensError` where it can't."""
        batch = self.prepare(*examples, prompt=prompt)
        return generated(self.model, batch, tokenizer=self.tokenizer, max_new_tokens=max_new_tokens)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, alone or inside the processor."""
        return getattr(self.processor, "tokenizer", self.processor)

    def __repr__(self) -> str:
        name, dtype = type(self.model).__name__, self.checkpoint.identity["dtype"]
        return f"Lens({name}: {self.checkpoint.parameters:,} parameters, {dtype}, {self.device})"
