"""Turn examples into the input of a live model, with the tokens of the labels that may answer them.

examples ── sound tracks ── prompts, labels ── media ──▶ checked batch on the model's device
"""

from collections.abc import Sequence
from functools import partial

from affectlens.errors import LensError
from affectlens.lens.inputs.choices import Choices, choices
from affectlens.lens.inputs.padding import with_valid_padding
from affectlens.lens.inputs.preparing import prepare, refuse_longer
from affectlens.lens.inputs.prompt_format import PromptFormat
from affectlens.lens.inputs.sound_tracks import heard
from affectlens.lens.live import Live, config_of, device_of, encodes, remark
from affectlens.lens.running import decoder_ids, started
from affectlens.tasks import Example


def ask(
    live: Live,
    examples: Sequence[Example],
    *,
    prompt: str = "{text}",
    labels: Sequence[str] = (),
    form: PromptFormat | None = None,
) -> Choices:
    """Return a batch of prompts, with the token ids of each label behind each of them.

    Prompts are written as `form` writes them, by default as the model's own template does. Raises
    `LensError`.
    """
    for one in examples or (None,):
        if not isinstance(one, Example):
            shown = "nothing" if one is None else f"a {type(one).__name__}"
            raise LensError(f"expected examples, got {shown}; make one: al.Example(id, label, text=…)")
    form, config = form or live.prompt_format, config_of(live.model)
    if form.placeholder("video"):
        hears, kind = form.placeholder("audio") is not None, type(form.processor).__name__
        examples = heard(examples, hears=hears, processor=kind, say=partial(remark, live))
    if labels and not encodes(live.model):
        found = choices(form, examples, labels=labels, prompt=prompt, config=config)
    else:  # a decoder begins its answer anew
        texts = [form.prompt(example, prompt) for example in examples]
        batch = prepare(form, examples, texts=texts, config=config)
        ids = tuple(decoder_ids(live.model, form.tokenizer, label=label) for label in labels)
        found = Choices(batch, (ids,) * len(examples))
    refuse_longer(found.batch, examples, config=config)
    batch = started(live.model, with_valid_padding(found.batch, live.model, tokenizer=form.tokenizer))
    device = device_of(live.model)
    return Choices({name: tensor.to(device) for name, tensor in batch.items()}, found.labels)
