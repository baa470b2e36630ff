"""Names become sites: correct for every family listed here, in both layouts, and never a guess."""

import pytest
import torch
from safetensors import safe_open

import affectlens as al
from affectlens.checkpoints.memory import from_module
from affectlens.errors import CheckpointError
from affectlens.sites import locate
from tests.small_models import TEXT, tiny

TEXT_ONLY = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
MULTIMODAL = ("llava", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")

# (canonical name, tower, layer, role) of names that a leaf table alone gets wrong.
TRAPS = (
    ("model.layers.0.mlp.gate.weight", "language", 0, "router"),
    ("model.layers.0.mlp.shared_expert_gate.weight", "language", 0, "shared_expert_gate"),
    ("model.layers.0.self_attn.gate_proj.weight", "language", 0, "attn_out_gate"),
    ("model.layers.0.mlp.up_proj.weight", "language", 0, "other"),
    ("model.layers.0.mlp.experts.down_proj", "language", 0, "other"),
    ("model.layers.0.attention.frobnicate.weight", "language", 0, "other"),
    ("visual.merger_list.3.weight", "projector", None, "proj"),
    ("visual.blocks.1.attn.proj.weight", "vision", 1, "o_proj"),
)


@pytest.mark.parametrize("model_type", TEXT_ONLY + MULTIMODAL)
def test_every_gated_mlp_of_the_language_model_is_found(model_type: str) -> None:
    """Gate and up have the shape (MLP width, hidden), down its transpose, once in each layer."""
    sites = from_module(tiny(model_type))
    wide = (TEXT["intermediate_size"], TEXT["hidden_size"])

    for role, shape in (("gate_proj", wide), ("up_proj", wide), ("down_proj", wide[::-1])):
        found = sites.sites.where(tower="language", role=role).expect(2)
        assert [0, 1] == [site.layer for site in found]
        assert {shape} == {sites.shape(site) for site in found}


@pytest.mark.parametrize("model_type", TEXT_ONLY + MULTIMODAL)
def test_no_parameter_is_without_a_role(model_type: str) -> None:
    """In the families listed here every parameter has a role, and every element is in one site."""
    model = tiny(model_type)
    checkpoint = from_module(model)

    assert [] == [site.parameter for site in checkpoint.sites if site.role == "other"]
    assert sum(p.numel() for p in model.parameters()) == checkpoint.parameters


@pytest.mark.parametrize("model_type", TEXT_ONLY + MULTIMODAL)
def test_disk_and_memory_give_the_same_sites(model_type: str, save) -> None:  # type: ignore[no-untyped-def]
    """A saved model has the sites of the live one, with the same values, in every layout."""
    model = tiny(model_type)
    live, stored = from_module(model), al.open_checkpoint(save(model, model_type))

    assert live.sites == stored.sites
    assert [site.parameter for site in live.sites] == [site.parameter for site in stored.sites]
    assert all(torch.equal(live.read(site), stored.read(site)) for site in live.sites)


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_canonical_names_are_those_of_the_live_model(model_type: str, save) -> None:  # type: ignore[no-untyped-def]
    """`parameter` is the name that transformers gives the parameter in memory."""
    model = tiny(model_type)
    stored = al.open_checkpoint(save(model, model_type))

    assert {site.parameter for site in stored.sites} <= {name for name, _ in model.named_parameters()}


def test_fused_vision_qkv_is_split_in_thirds(save) -> None:  # type: ignore[no-untyped-def]
    """The q, k and v of Qwen's vision tower are the thirds that its forward pass uses."""
    folder = save(tiny("qwen2_5_vl"), "fused")
    checkpoint = al.open_checkpoint(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        name = next(key for key in file.keys() if key.endswith("blocks.1.attn.qkv.weight"))  # noqa: SIM118
        thirds = file.get_tensor(name).chunk(3)

    for role, expected in zip(("q_proj", "k_proj", "v_proj"), thirds, strict=True):
        (site,) = checkpoint.sites.where(tower="vision", layer=1, role=role, param="weight").expect(1)
        assert torch.equal(expected, checkpoint.read(site))


@pytest.mark.parametrize(("name", "tower", "layer", "role"), TRAPS)
def test_traps(name: str, tower: str, layer: int | None, role: str) -> None:
    """A parameter that only looks like a gate, a layer or a known role gets another role."""
    (site,) = locate({name: (4, 4)})

    assert (tower, layer, role) == (site.tower, site.layer, site.role)


def test_wrappers_are_stripped() -> None:
    """Prefixes of training frameworks make no difference."""
    name = "model.layers.0.self_attn.q_proj.weight"
    plain = locate({name: (4, 4)})

    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "base_model.model."):
        assert plain.keys() == locate({prefix + name: (4, 4)}).keys()


def test_text_model_and_the_language_model_inside_llava_share_sites() -> None:
    """A multimodal model's language layers pair with those of the text model it was built on."""
    text, inside = from_module(tiny("llama")).sites, from_module(tiny("llava")).sites

    assert text == inside.where(tower="language")


def test_two_tensors_that_claim_one_site_are_refused() -> None:
    """Two tensors with the same site are an error."""
    names = ("model.layers.0.self_attn.q_proj.weight", "module.model.layers.0.self_attn.q_proj.weight")

    with pytest.raises(CheckpointError, match="names the same parameter"):
        locate(dict.fromkeys(names, (4, 4)))


def test_layers_of_an_encoder_and_a_decoder_are_kept_apart() -> None:
    """Layer numbers repeat across stacks, and cross attention is not self-attention."""
    names = (
        "model.encoder.layers.0.self_attn.q_proj.weight",
        "model.decoder.layers.0.self_attn.q_proj.weight",
        "model.decoder.layers.0.encoder_attn.q_proj.weight",
    )

    sites = al.Sites(locate(dict.fromkeys(names, (4, 4))))

    assert ["decoder", "decoder", "encoder"] == sorted(str(site.stack) for site in sites)
    assert {"", "encoder_attn"} == {site.label for site in sites.where(stack="decoder")}


def test_structures_that_the_table_does_not_know_stay_apart() -> None:
    """Two parameters with the same place and role are two sites, in any order of the file."""
    names = (
        "model.layers.0.a.layers.0.self_attn.q_proj.weight",
        "model.layers.0.a.layers.1.self_attn.q_proj.weight",
    )

    one, two = (locate(dict.fromkeys(order, (4, 4))) for order in (names, names[::-1]))

    assert 2 == len(one)
    assert one == two


def test_experts_are_numbered() -> None:
    """Each expert's gate is a separate site with the expert's index."""
    roles = ("gate_proj", "up_proj", "down_proj")
    names = [f"model.layers.0.mlp.experts.{i}.{role}.weight" for i in (0, 7) for role in roles]

    gates = al.Sites(locate(dict.fromkeys(names, (4, 4)))).where(role="gate_proj").expect(2)

    assert [(0, ""), (7, "")] == [(site.expert, site.label) for site in gates]
    assert "language.0.experts.7.gate_proj" == repr(gates[1])


def test_names_too_long_for_patterns_have_no_role() -> None:
    """A hostile name takes no time."""
    name = "a_" * 500_000 + "norm.weight"

    (site,) = locate({name: (4,)})

    assert "other" == site.role


def test_a_part_of_a_model_is_read_beside_the_whole() -> None:
    """A file with `up_proj` alone is placed with the help of a checkpoint that has the gate."""
    name = "model.layers.0.mlp.{}_proj.weight"
    whole = {name.format(kind): (4, 4) for kind in ("gate", "up", "down")}

    assert ["other"] == [site.role for site in locate({name.format("up"): (4, 4)})]
    assert ["up_proj"] == [site.role for site in locate({name.format("up"): (4, 4)}, context=whole)]


def test_layers_may_differ_in_width() -> None:
    """Shapes are compared within a layer, since some models widen their MLPs with depth."""
    names = {
        f"model.layers.{layer}.mlp.{kind}_proj.weight": (4, width) if kind == "down" else (width, 4)
        for layer, width in enumerate((8, 12, 16))
        for kind in ("gate", "up", "down")
    }

    assert ["down_proj", "gate_proj", "up_proj"] * 3 == [site.role for site in al.Sites(locate(names))]


def test_three_matrices_in_a_row_are_no_gated_mlp() -> None:
    """`fc1, fc2, fc3` of a classifier head have the names of a gated MLP, but not its shapes."""
    names = {
        f"emotion_head.fc{n}.weight": shape for n, shape in ((1, (128, 64)), (2, (64, 128)), (3, (5, 64)))
    }

    assert not {"gate_proj", "up_proj"} & {site.role for site in locate(names)}


LONE = (
    {"moe.gate_proj": (8, 64), "moe.experts.0.w1": (32, 64), "moe.experts.0.w2": (64, 32)},
    {"ffn.gate_proj": (8, 64), "ffn.fc_in": (32, 64), "ffn.fc_out": (64, 32)},
    {"mlp.gate_proj": (4, 64), "mlp.up_proj": (256, 64), "mlp.down_proj": (64, 256)},
    {"self_attn.gate_proj": (64, 64), "self_attn.up_proj": (64, 64)},
)


@pytest.mark.parametrize("modules", LONE)
def test_a_gate_by_name_alone_is_no_gate(modules: dict[str, tuple[int, int]]) -> None:
    """Routers and output gates named like a gate do not fit the MLP beside them."""
    sites = locate({f"model.layers.0.{module}.weight": shape for module, shape in modules.items()})

    assert "gate_proj" not in {site.role for site in sites}


GROUPED = {"num_attention_heads": 4, "head_dim": 16}
HEADS = (
    ("gpt_neox", "attention.query_key_value", (192, 64), GROUPED, {"num_attention_heads": 5}),
    (
        *("internlm2", "attention.wqkv", (128, 64)),
        *({**GROUPED, "num_key_value_heads": groups} for groups in (2, 3)),
    ),
)


@pytest.mark.parametrize(("kind", "leaf", "shape", "right", "wrong"), HEADS)
def test_slices_by_head_need_the_number_of_heads(
    kind: str, leaf: str, shape: tuple[int, int], right: dict[str, int], wrong: dict[str, int]
) -> None:
    """A config that contradicts the shape leaves the tensor whole."""
    names = {f"model.layers.0.{leaf}.weight": shape, "model.layers.0.attention.wo.weight": (64, 64)}

    split, whole = (locate(names, config={"model_type": kind, **heads}) for heads in (right, wrong))

    assert {"q_proj", "k_proj", "v_proj", "o_proj"} == {site.role for site in split}
    assert {"qkv_proj", "o_proj"} == {site.role for site in whole}


def test_experts_of_a_file_are_called_as_the_live_model_stacks_them() -> None:
    """Mixtral's `experts.0.w1` is a part of `experts.gate_up_proj` in memory."""
    names = {f"model.layers.0.block_sparse_moe.experts.0.{w}.weight": (4, 4) for w in ("w1", "w2", "w3")}

    found = {site.role: site.parameter for site in locate(names, config={"model_type": "mixtral"})}

    both, down = (f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    assert {"gate_proj": both, "up_proj": both, "down_proj": down} == found
