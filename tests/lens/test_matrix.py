"""Every kind of point, cache, padding and mode, on twelve families: exact against plain torch, or refused.

The reference is torch alone: hooks on modules that are named here, at columns that are counted here.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

import affectlens as al
from affectlens.errors import LensError, NoSuchSite
from affectlens.lens.live import config_of
from affectlens.sites import Points
from tests.lens.families import BY_NAME, Batch
from tests.tiny_models import tiny

HOWTO = Path(__file__).parents[2] / "docs" / "howto" / "interventions.md"
KINDS = ("output", "input", "pre_activation", "gated", "heads", "residual")
CACHES = ("none", "dynamic", "static", "sliding", "state")
FACTOR = -2.0
LENGTHS = {1: (6,), 3: (3, 6, 5)}
STEPS = 3


class Plain(NamedTuple):
    """Where the points of a family are: the layer, and modules in it by their own names."""

    layer: str
    attention: str  # the projection at the end of the attention, or of what stands in its place
    roles: tuple[str, str]  # of that projection, and of the last one of the MLP
    gate: str = ""
    down: str = ""
    half: bool = False  # gate and up are one module, the gate first
    heads: bool = True
    changes: tuple[tuple[str, Any], ...] = ()
    caches: tuple[str, ...] = ("none", "dynamic", "static")

    def place(self, kind: str) -> tuple[str, str] | None:
        """Return the module of a kind of point and its side; None where it is to be refused."""
        found = {
            "output": (self.attention, "output"),
            "input": (self.attention, "input"),
            "heads": (self.attention, "input") if self.heads else ("", ""),
            "pre_activation": (self.gate, "output"),
            "gated": (self.down, "input"),
            "residual": (".", "output"),
        }[kind]
        return found if found[0] else None


_LLAMA = ("self_attn.o_proj", ("o_proj", "down_proj"), "mlp.gate_proj", "mlp.down_proj")
_SLIDES = ("none", "dynamic", "static", "sliding")
PLAIN = {
    "llama": Plain("model.layers.0", *_LLAMA),
    "phi3": Plain("model.layers.0", _LLAMA[0], _LLAMA[1], "mlp.gate_up_proj", "mlp.down_proj", half=True,
                  changes=(("sliding_window", 4),), caches=_SLIDES),
    "gpt2": Plain("transformer.h.0", "attn.c_proj", ("o_proj", "fc2"), "mlp.c_fc", "mlp.c_proj"),
    "mixtral": Plain("model.layers.0", _LLAMA[0], _LLAMA[1]),
    "qwen2_moe": Plain("model.layers.0", _LLAMA[0], _LLAMA[1], "mlp.shared_expert.gate_proj",
                       "mlp.shared_expert.down_proj"),
    "gemma3": Plain("model.language_model.layers.0", *_LLAMA, caches=_SLIDES,
                    changes=(("text_config.sliding_window", 4),)),
    "llava": Plain("model.language_model.layers.0", *_LLAMA),
    "qwen2_vl": Plain("model.language_model.layers.0", *_LLAMA),
    "qwen2_5_omni": Plain("model.language_model.layers.0", *_LLAMA),
    "t5_gated": Plain("decoder.block.0", "layer.0.SelfAttention.o", ("o_proj", "down_proj"),
                      "layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wo", caches=("none", "dynamic")),
    "mamba": Plain("backbone.layers.0", "mixer.out_proj", ("ssm_out_proj", ""), heads=False,
                   caches=("none", "state")),
    "rwkv": Plain("rwkv.blocks.0", "attention.output", ("o_proj", "fc2"), "feed_forward.key",
                  "feed_forward.value", caches=("none", "state")),
}  # fmt: skip
# transformers mixes the rows of a batch in each step of RWKV.
REFUSED = (("rwkv", "state", 3),)
CELLS = [(name, cache) for name, plain in PLAIN.items() for cache in CACHES if cache in plain.caches]


class Built(NamedTuple):
    """A model, and its points of all kinds at a span."""

    model: nn.Module
    lens: al.Lens
    points: Callable[[str], dict[str, Points]]


@pytest.fixture(scope="session")
def built() -> Callable[[str], Built]:
    """Build each family once."""
    made: dict[str, Built] = {}

    def build(name: str) -> Built:
        if name not in made:
            plain = PLAIN[name]
            model = BY_NAME[name].build(**dict(plain.changes)) if name in BY_NAME else tiny(name)
            lens = al.Lens(model)
            made[name] = Built(model, lens, lambda span: points_of(lens, plain, span))
        return made[name]

    return build


def points_of(lens: al.Lens, plain: Plain, span: str) -> dict[str, Points]:
    """Return a point of each kind in the first layer, at a span."""
    there = lens.sites.where(tower="language", layer=0, param="weight")
    stack = "decoder" if any(site.stack for site in there) else None
    mine = al.Sites(site for site in there if site.stack == stack and site.expert is None)
    found = {}
    for kind, role in product(KINDS, plain.roles):
        place = plain.place(kind)
        if place is None or (role == plain.roles[1]) != (kind in ("pre_activation", "gated")):
            continue
        sites = [site for site in mine.where(role=role) if "EncDec" not in site.label]
        found[kind] = al.Sites(sites[:1]).at(kind, span=span).expect(1)
    return found


class Columns:
    """Hooks of torch alone that scale the last column of each prompt and all later ones, and keep values."""

    def __init__(self, lasts: Sequence[int], count: int, *, whole: bool) -> None:
        self.lasts, self.count, self.whole = lasts, count, whole
        self.kept: dict[str, list[Tensor]] = {}

    @contextmanager
    def on(self, model: nn.Module, plain: Plain) -> Iterator[None]:
        """Install the hooks for a block."""
        layer, handles = model.get_submodule(plain.layer), []
        for kind in KINDS:
            place = plain.place(kind)
            if place is None:
                continue
            if (kind, place) == ("heads", plain.place("input")):  # one place, changed once
                self.kept[kind] = self.kept["input"]
                continue
            module = layer if place[0] == "." else layer.get_submodule(place[0])
            width = None
            if kind == "pre_activation" and plain.half:
                width = module.weight.shape[0] // 2
            handles.append(self._hook(module, kind, side=place[1], width=width))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, module: nn.Module, kind: str, *, side: str, width: int | None) -> Any:
        kept = self.kept.setdefault(kind, [])

        def scaled(values: Tensor) -> Tensor:
            new, steps = values.clone(), len(kept)
            # A mixture of experts flattens rows and positions into one dimension.
            mine = new.view(len(self.lasts), -1, new.shape[-1])[..., :width]
            start = 0 if self.whole or not steps else self.count + steps - 1  # the first column of the pass
            for row, last in enumerate(self.lasts):
                if last >= start:
                    mine[row, last - start] *= FACTOR
            mine[:, max(0, self.count - start) :] *= FACTOR
            kept.append(mine[:, self.count + steps - 1 - start :] if steps else mine)
            return new

        if side == "input":
            return module.register_forward_pre_hook(lambda _, args: (scaled(args[0]), *args[1:]))

        def output(_: nn.Module, __: Any, out: Any) -> Any:
            return (scaled(out[0]), *out[1:]) if isinstance(out, tuple) else scaled(out)

        return module.register_forward_hook(output)


def batch_of(name: str, *, rows: int, side: str) -> Batch:
    """Return rows of text of unequal length, padded on one side."""
    longest = max(LENGTHS[rows])
    ids, mask = (torch.zeros(rows, longest, dtype=torch.long) for _ in range(2))
    for row, length in enumerate(LENGTHS[rows]):
        where = slice(longest - length, None) if side == "left" else slice(length)
        ids[row, where] = torch.arange(10 * row + 11, 10 * row + 11 + length)
        mask[row, where] = 1
    found = {"input_ids": ids, "attention_mask": mask}
    if name == "t5_gated":
        found["decoder_input_ids"] = torch.arange(3 * rows).reshape(rows, 3) + 5
        found["decoder_input_ids"][:, 0] = 0  # the token that a decoder begins with
    if name == "gemma3":
        found["token_type_ids"] = torch.zeros_like(ids)
    return found


def lasts_of(batch: Batch) -> list[int]:
    """Return the column of the last token of each row, of the decoder where there is one."""
    if "decoder_input_ids" in batch:
        return [batch["decoder_input_ids"].shape[1] - 1] * len(batch["decoder_input_ids"])
    return [int(row.nonzero().max()) for row in batch["attention_mask"]]


def generate(model: nn.Module, batch: Batch, cache: str) -> Tensor:
    """Generate a few tokens with a kind of cache."""
    how: dict[str, Any] = {"use_cache": cache != "none"}
    if cache == "static":
        how |= {"cache_implementation": "static", "disable_compile": True}
    found: Tensor = model.generate(  # type: ignore[operator]
        **batch, **how, do_sample=False, max_new_tokens=STEPS, min_new_tokens=STEPS, pad_token_id=0
    )
    return found


def forward(model: nn.Module, batch: Batch, cache: str) -> Tensor:
    """Run a prompt, and behind its cache one token more."""
    static = {}
    if cache == "static":
        config = config_of(model).get_text_config()
        static = {"past_key_values": StaticCache(config=config, max_cache_len=16)}
    out = model(**batch, **static, use_cache=cache != "none")
    found = [out.logits]
    if cache != "none":
        decodes = "decoder_input_ids" in batch
        mask = batch["attention_mask"]
        step = {
            **{n: out[n] for n in ("past_key_values", "cache_params", "state") if out.get(n) is not None},
            ("decoder_input_ids" if decodes else "input_ids"): torch.full((len(mask), 1), 9),
            "attention_mask": mask if decodes else torch.nn.functional.pad(mask, (0, 1), value=1),
        }
        if decodes:
            step["encoder_outputs"] = (out.encoder_last_hidden_state,)
        if hasattr(model, "model") and hasattr(model.model, "rope_deltas"):  # these keep the last batch's
            step["position_ids"] = torch.full((3, len(mask), 1), mask.shape[1])
        if "token_type_ids" in batch:
            step["token_type_ids"] = torch.zeros(len(mask), 1, dtype=torch.long)
        found.append(model(**step, use_cache=True).logits)
    return torch.cat(found, dim=1)


RUNS = {"generate": generate, "forward": forward}


@torch.no_grad()
@pytest.mark.parametrize(("name", "cache"), CELLS)
def test_a_cell_is_exact(name: str, cache: str, built: Callable[[str], Built]) -> None:
    """Values, changes and outputs are those of plain torch, to the bit, on either side and in either mode."""
    model, lens, points = built(name)
    plain, spans = PLAIN[name], {span: points(span) for span in ("prompt", "last", "generated")}
    changed = [al.Scale(_all(spans[span].values()), factor=FACTOR) for span in ("last", "generated")]
    for run, rows, side, training in product(RUNS, LENGTHS, ("left", "right"), (False, True)):
        if (name, cache, rows) in REFUSED:
            continue
        batch, shown = batch_of(name, rows=rows, side=side), f"{run}, {rows} {side}, training {training}"
        lasts = lasts_of(batch)
        count = batch.get("decoder_input_ids", batch["input_ids"]).shape[1]
        model.train(training)
        try:
            torch.manual_seed(0)
            columns = Columns(lasts, count, whole=cache == "none")
            with columns.on(model, plain):
                expected = RUNS[run](model, batch, cache)
            torch.manual_seed(0)
            with (
                lens.intervene(*changed) as _,
                lens.record(_all(spans["prompt"].values(), *map(dict.values, spans.values()))) as recording,
            ):  # type: ignore[arg-type]
                found = RUNS[run](model, batch, cache)
        finally:
            model.eval()

        assert torch.equal(expected, found), shown
        real = batch["attention_mask"].bool() if "decoder_input_ids" not in batch else None
        for kind, kept in columns.kept.items():
            own = torch.ones(kept[0].shape[:2], dtype=torch.bool) if real is None else real
            values = {
                "prompt": kept[0][own],
                "last": kept[0][torch.arange(len(lasts)), lasts],
                "generated": torch.cat([kept[0][:, :0], *kept[1:]], dim=1).flatten(0, 1),
            }
            for span, theirs in values.items():
                ours = recording[spans[span][kind][0]].rows  # type: ignore[union-attr]
                assert torch.equal(theirs, ours), f"{shown}: {kind} at {span}"


@torch.no_grad()
@pytest.mark.parametrize(("name", "cache", "rows"), REFUSED)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cell_is_refused(
    side: str, run: str, name: str, cache: str, rows: int, built: Callable[[str], Built]
) -> None:
    """Where the model itself loses the positions, a span is an error."""
    model, lens, points = built(name)
    batch = batch_of(name, rows=rows, side=side)
    for chosen in points("generated").values():
        with lens.intervene(al.Scale(chosen, factor=FACTOR)), pytest.raises(LensError, match="positions"):
            RUNS[run](model, batch, cache)


def _all(*groups: Any) -> Points:
    return Points(point for group in groups for points in group for point in points)


@pytest.mark.parametrize("name", PLAIN)
def test_a_kind_without_a_place_is_refused(name: str, built: Callable[[str], Built]) -> None:
    """A point that no module computes by itself is an error before anything runs."""
    lens, plain = built(name).lens, PLAIN[name]
    for kind in KINDS:
        if plain.place(kind) is not None:
            continue
        for site in lens.sites.where(tower="language", layer=0, param="weight"):
            if kind in ("output", "input", "residual"):
                continue
            with pytest.raises((LensError, NoSuchSite)):
                lens.record(al.Sites([site]).at(kind))


def test_the_howto_shows_the_cells() -> None:
    """The tables of the how-to are those of this file."""
    text = HOWTO.read_text("utf-8")
    kinds = {
        name: ["exact" if plain.place(kind) else "refused" for kind in KINDS] for name, plain in PLAIN.items()
    }
    caches = {
        name: ["exact" if cache in plain.caches else "—" for cache in CACHES] for name, plain in PLAIN.items()
    }
    for columns, rows in ((KINDS, kinds), (CACHES, caches)):
        head = "| family | " + " | ".join(f"`{one}`" for one in columns) + " |"
        table = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
        assert rows == {
            cells[0]: list(cells[1:]) for cells in (re.findall(r"[^|`\s]+", line) for line in table)
        }
