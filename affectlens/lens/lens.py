"""The lens: a live model and its processor, addressed by the same sites as the files."""

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affectlens.checkpoints import Checkpoint, open_checkpoint
from affectlens.errors import LensError
from affectlens.lens.intervening import Intervening, Intervention
from affectlens.lens.preparing import prepare, refuse_longer
from affectlens.lens.telling import told
from affectlens.lens.verifying import Verification, verify
from affectlens.sites import Site, Sites
from affectlens.tasks import Example


class Lens:
    """Wrap any Hugging Face causal or multimodal language model.

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
        self.model = model.eval()
        self.processor = processor
        self.source = source  # the checkpoint the model was loaded from, if it was
        self.remote_code = remote_code  # the revision and files of the model's own code, if it ran any
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
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The live parameters by the model's own names; tied ones once."""
        return dict(self.model.named_parameters())

    @property
    def device(self) -> torch.device:
        """Where the input goes: the device of the first parameter."""
        return next(iter(self.parameters.values())).device

    def parameter(self, site: Site) -> Tensor:
        """The live values of a site, sharing the model's memory; raises `NoSuchSite`."""
        return self.checkpoint.read(site)

    def intervene(self, *interventions: Intervention) -> Intervening:
        """Apply interventions, in order, for the length of a `with` block.

        On leaving, error or not, every parameter is the very tensor it was before.
        """
        return Intervening(interventions, parameters=self.parameters, live=self.checkpoint)

    def verify(self, *examples: Example, prompt: str = "{text}") -> Verification:
        """Test on the live model what the names say: does each gate gate, is each v a v?

        The file that the model was loaded from is held to it, site by site. With examples their text and
        media are run; without, random ids and media as the config asks for them. What no input reaches is
        unverified. `.check()` raises `RoleRefuted` naming the tensors that do otherwise than their role says.
        """
        batch = self._typed(self.prepare(*examples, prompt=prompt)) if examples else None
        found = verify(self.model, self.checkpoint, batch=batch)
        return found.beside(self.source, self.checkpoint) if self.source is not None else found

    def prepare(self, *examples: Example, prompt: str = "{text}") -> dict[str, Tensor]:
        """Turn examples into one batch of model input, padded on the left.

        Raises `LensError` without a processor, when the placeholders for media in the rendered text are
        more or fewer than the media, or when an example has more tokens than the model has positions.
        """
        if self.processor is None:
            why = self._unread or "this lens has no processor"
            raise LensError(f"{why}, so it can't read examples: Lens(model, processor)")
        batch = prepare(self.processor, examples, prompt=prompt)
        refuse_longer(batch, examples, config=getattr(self.model, "config", None))
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def logits(self, *examples: Example, prompt: str = "{text}") -> Float[Tensor, "batch vocabulary"]:
        """The logits after the last token of each example's prompt."""
        return self.run(self.prepare(*examples, prompt=prompt))[:, -1]

    @torch.inference_mode()
    def run(self, batch: Mapping[str, Tensor], *, last: int = 1) -> Float[Tensor, "batch last vocabulary"]:
        """Run a prepared batch; returns the logits of the last `last` positions, in float32.

        Raises `LensError` where the model can't.
        """
        only = {"logits_to_keep": last} if self._keeps else {}
        with told("the model can't run these examples"):
            out = self.model(**self._typed(batch), use_cache=False, **only)
        logits: Tensor = out.logits
        return logits[:, -last:].float()

    @torch.inference_mode()
    def generate(self, *examples: Example, prompt: str = "{text}", max_new_tokens: int = 8) -> list[str]:
        """Answer examples greedily; returns the new text of each. Raises `LensError` where it can't."""
        batch = self._typed(self.prepare(*examples, prompt=prompt))
        # A checkpoint's own generation settings may sample, search or punish repetition.
        settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
        settings |= {"no_repeat_ngram_size": 0, "max_new_tokens": max_new_tokens}
        settings["pad_token_id"] = self.tokenizer.pad_token_id
        with told("the model can't answer these examples"):
            out = self.model.generate(**batch, **settings)  # type: ignore[operator]
        new = out[:, batch["input_ids"].shape[1] :]
        texts: Sequence[str] = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return list(texts)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, alone or inside the processor."""
        return getattr(self.processor, "tokenizer", self.processor)

    @cached_property
    def _keeps(self) -> bool:
        # Where a model can, it computes the logits of the last positions alone.
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def _typed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Pictures come in float32; token ids stay whole numbers.
        dtype = next(iter(self.parameters.values())).dtype
        return {n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.items()}

    def __repr__(self) -> str:
        name, dtype = type(self.model).__name__, self.checkpoint.identity["dtype"]
        return f"Lens({name}: {self.checkpoint.parameters:,} parameters, {dtype}, {self.device})"
