"""Find the tower, the stack and the layer of each module.

A part of the path names the tower, and the deepest one wins: `audio_tower.audio_adapter` is a projector. A
model that is a single tower does not name it, so its convolutions decide: over three colour channels it is a
vision tower, over any others an audio tower.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from itertools import zip_longest
from typing import NamedTuple

from affectlens.sites.names import INDEX, words
from affectlens.sites.site import Shape

# These towers own everything below them. Otherwise the deepest part of the path decides (`_PARTS`).
_OWNERS = (
    ("vocoder", r"token2wav code2wav vocoder hifi_?gan speech_decoder_postnet t2u_model"),
    ("talker", r"talker depth_decoder tts"),
    ("vq", r"vqmodel vq_model visual_tokenizer codec_model quantizer"),
    ("generation", r"generation_(?:embeddings|aligner|head) gen_(?:embed|aligner|head|vision_model)"),
    (
        "qformer",
        r"""
        (?:\w+_)?[qQ]_?[fF]ormer (?:\w+_)?query_tokens (?:video_frame|audio|multi)_position_embedding
        """,
    ),
)
_PARTS = (
    (
        "projector",
        r"""
        (?!vocab_)(?:\w+_)?projectors? mm_projector\w* multi_?modal_projector\w*
        (?:\w+_)?mergers?(?:_list)? (?:\w+_)?connectors? (?:\w+_)?aligner (?:\w+_)?adapt[eo]r
        (?:\w+_)?resampler(?:_model)? \w*compressor modality_projection
        (?:visual|vision|text|audio|image|speech|language|sound)_proj(?:ection)?(?:_layer)?
        image_to_text_projection high_res_vision_(?:neck|proj|alpha) embed_(?:vision|audio) mlp1 mlp_AR
        (?:enc|audio_enc)_to_dec_proj downsampler visual_embeddings_table linear_proj(?:ection)?
        img_projection\w* vision_embed_tokens image_newline view_sep[ae]rator \w*llama_proj\d?
        affectgpt_proj \w+_proj_for_\w+ multi_\w+_embs (?:\w+_)?attention_mlp fc_att
        \w*_feature_extens[eo]r (?:glb|sub)_GN
        """,
    ),
    (
        "vision",
        r"""
        visual vision (?:\w+_)?vi(?:sion|sual)_(?:tower|model|encoder|backbone|embeddings) vit vpm
        img_processor image_(?:tower|encoder|model|embed) video_(?:tower|model|encoder) vision_\w+_model
        pixel_level_module sam_model qwen2_model
        """,
    ),
    (
        "audio",
        r"""
        audio (?:audio|speech|sound|acoustic|asr|conditioning)_(?:tower|model|encoder|embed|encoder_model)
        apm (?:acoustic|semantic)_tokenizer_encoder (?:acoustic|semantic)_(?:encoder|model|decoder)
        speech_(?:encoder|decoder)_model whisper(?:_model)? beats hubert wav2vec2?(?:_\w+)? wavlm
        ln_(?:speech|audio)
        """,
    ),
    (
        "language",
        r"""
        language_model text_(?:model|decoder|encoder|tower|backbone|encoder_model) llm bert roberta
        """,
    ),
)
TOWERS = tuple(tower for tower, _ in (*_OWNERS, *_PARTS))
_OWNER = tuple((tower, re.compile(words(names))) for tower, names in _OWNERS)
_PART = tuple((tower, re.compile(words(names))) for tower, names in _PARTS)
_LISTS = words(
    r"(?:\w+_)?(?:layers|blocks) layer block h resblocks encoders decoders conformer attentions ffns "
    r"self_attends"
)
_INDEXED = re.compile(rf"(?:^|\.)(?P<list>{_LISTS})\.(?P<n>{INDEX})(?=\.)")
_INDEXED_NORM = re.compile(
    rf"(?:^|\.)(?P<local>layer_norm[12])\.(?P<n>{INDEX})$"
)  # XLM keeps its norms in lists
_SUBLISTS = frozenset(("attentions", "ffns", "layer_norm1", "layer_norm2"))  # XLM: a part of each layer
_NO_LAYERS = re.compile(r"conv_(?:layers|blocks)|(?:up|down)(?:sample_)?(?:blocks|layers)|deconv_layers")
_NO_LAYERS_BELOW = re.compile(r"pos_conv_embed|subsampl\w*|feature_extractor")
_STACKS = ("encoder", "decoder")
# A list of layers below these names alone gets no stack name; the tower's other lists get their path as one.
_PLAIN = frozenset(
    (
        *("model", "language_model", "transformer", "text_model", "llm", "thinker", "talker", "base_model"),
        *("layers", "blocks", "h", "layer", "encoder", "decoder"),
        *("vision_tower", "vision_model", "visual", "audio_tower"),
    )
)
_HEARS = re.compile(r"audio|speech|wav2vec|wavlm|hubert|asr|ctc|whisper|encodec|diarization")
_SEES = re.compile(r"vision|image|visual|(?:^|_)vit(?:_|$)|video")
_TOKENS = re.compile(
    r"(?:embed_tokens|char_embeddings(?:\.\w+)?|wte|word_embeddings?|tok(?:en)?_embeddings?|embed_in|\bshared)$"
)


class Position(NamedTuple):
    """Tower, stack, layer and the path below the layer (the whole path where there is no layer)."""

    tower: str
    stack: str | None
    layer: int | None
    local: str


def positions(modules: Mapping[str, Shape], model_type: str = "") -> dict[str, Position]:
    """Place each module, given the shape of its weight; `model_type` decides if nothing else does."""
    above = {module: _above_layer(module) for module in modules}
    towers = {path: _named(path) for path in {*above.values()}}
    named = {module: towers[path] for module, path in above.items()}
    split = _split_stacks(modules)
    unnamed = {m: shape for m, shape in modules.items() if named[m] is None}
    # Only modules whose path names no tower need their convolutions examined.
    senses = _senses(unnamed, split, named=set(named.values()), model_type=model_type)
    found = {}
    lists: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for module in modules:
        layer, local = _layer(module)
        tower = named[module] or _own(module, modules[module]) or senses[_group(module, split)]
        stack = _stack(module, split) if layer is not None else None
        found[module] = Position(tower, stack, layer, local)
        if layer is not None and stack is None:
            lists[tower].add(_list(module, local))
    apart = {tower: _apart(paths) for tower, paths in lists.items()}
    for module, at in found.items():
        if at.layer is not None and at.stack is None:
            found[module] = at._replace(stack=apart[at.tower][_list(module, at.local)])
    return found


def _own(module: str, shape: Shape) -> str | None:
    """Return the tower of a module that its own name decides: an `lm_head`, an embedding of RGB patches."""
    leaf = module.rpartition(".")[2]
    if leaf == "lm_head":
        return "language"
    return "vision" if "patch_embed" in module and len(shape) >= 4 and shape[1] == 3 else None


def _list(module: str, local: str) -> tuple[str, ...]:
    """Return the path of the list that contains a layer."""
    parts = (part for part in module.removesuffix(local).split(".") if part and not part.isdigit())
    return tuple(part for part in parts if part not in _SUBLISTS)


def _apart(paths: Collection[tuple[str, ...]]) -> dict[tuple[str, ...], str | None]:
    """Name each list of layers by the part of its path that the tower's other lists lack."""
    # A single list needs no name, so that a language model has the same sites inside any multimodal one.
    if len(paths) < 2:
        return dict.fromkeys(paths)
    start = next(i for i, parts in enumerate(zip_longest(*paths)) if len(set(parts)) > 1)
    ends = zip_longest(*(path[start:][::-1] for path in paths))
    stop = next((i for i, parts in enumerate(ends) if len(set(parts)) > 1), 0)
    return {
        path: None if _PLAIN.issuperset(path) else ".".join(path[start : len(path) - stop]) or None
        for path in paths
    }


def _above_layer(module: str) -> str:
    """Return the path above the layer: everything inside a layer belongs to the layer's tower."""
    layer, local = _layer(module)
    return module if layer is None else module.removesuffix(local)


def _named(module: str) -> str | None:
    parts = module.split(".")
    for tower, pattern in _OWNER:
        if any(pattern.fullmatch(part) for part in parts):
            return tower
    for part in reversed(parts):
        for tower, pattern in _PART:
            if pattern.fullmatch(part):
                return tower
    return None


def _layer(module: str) -> tuple[int | None, str]:
    # XLM: `layer_norm1.3` is the first norm of layer 3.
    if match := _INDEXED_NORM.search(module):
        return int(match["n"]), match["local"]
    for match in _INDEXED.finditer(module):
        # Convolutions before the first layer may form a list too.
        if _NO_LAYERS_BELOW.search(module[: match.start()]):
            return None, module
        # A list of bare linears (`mlp.layers.0`) is not a list of the model's layers.
        if not _NO_LAYERS.fullmatch(match["list"]) and match.end() < len(module):
            return int(match["n"]), module[match.end() + 1 :]
    return None, module


def _root(module: str) -> tuple[str, str] | None:
    """Split a path at its first `encoder` or `decoder`: the path above, and which of them it is."""
    parts = module.split(".")
    for index, part in enumerate(parts):
        if part in _STACKS:
            return ".".join(parts[:index]), part
    return None


def _split_stacks(modules: Iterable[str]) -> frozenset[str]:
    """Find the paths below which there are an encoder and a decoder, both with layers."""
    found: dict[str, set[str]] = defaultdict(set)
    for module in modules:
        if (root := _root(module)) and _layer(module)[0] is not None:
            found[root[0]].add(root[1])
    return frozenset(path for path, stacks in found.items() if len(stacks) == 2)


def _stack(module: str, split: frozenset[str]) -> str | None:
    root = _root(module)
    return root[1] if root and root[0] in split else None


def _group(module: str, split: frozenset[str]) -> str:
    return _stack(module, split) or ""


def _senses(
    modules: Mapping[str, Shape], split: frozenset[str], *, named: set[str | None], model_type: str
) -> dict[str, str]:
    """Find the tower of each group of modules whose path names none, from its convolutions and embeddings."""
    groups = {module: _group(module, split) for module in modules}
    # A stack that attends to another one produces text, whatever its input is.
    words = {group for module, group in groups.items() if _TOKENS.search(module)}
    if words:
        words |= {group for module, group in groups.items() if re.search(r"EncDecAtt|encoder_attn", module)}
    # Language models have convolutions too, in state spaces and short filters.
    sequence = {g for m, g in groups.items() if re.search(r"A_log$|\.conv1d$|\.mixer\.", m)}
    kernels = [
        (groups[module], shape)
        for module, shape in modules.items()
        if len(shape) >= 3
        and (_layer(module)[0] is None or "language" in named or groups[module] not in words | sequence)
    ]
    default = "audio" if _HEARS.search(model_type) else "vision" if _SEES.search(model_type) else "language"
    found = dict.fromkeys(groups.values(), "language" if words or "language" in named else default)
    sees = (
        "vision" in named
        or default == "vision"
        or any(len(shape) >= 4 and shape[1] == 3 for _, shape in kernels)
    )
    for group, _ in kernels:
        found[group] = "vision" if sees else "audio"
    # Vision transformers without a convolution embed their patches with a linear layer.
    for module, group in groups.items():
        if re.search(r"patch_(?:embed\w*|projection)", module) and found[group] == "language":
            found[group] = "vision"
    return {group: "language" if group in words else tower for group, tower in found.items()}
