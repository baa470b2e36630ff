"""Configs from strangers are read with care, and the numbers of names and parameters are limited."""

from typing import Any

import pytest

from affectlens.errors import CheckpointError
from affectlens.sites import Site, locate, locating, model_type, recognised, sections

# a config → its model type
TYPES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"model_type": "llava"}, "llava"),
    ({}, ""),
    ({"model_type": None}, ""),
    ({"model_type": ["llava"]}, ""),
    ({"model_type": "x" * 101}, ""),
)


@pytest.mark.parametrize(("config", "kind"), TYPES)
def test_a_type_is_a_short_text(config: dict[str, Any], kind: str) -> None:
    """Any other value counts as missing."""
    assert kind == model_type(config)


def test_a_tower_has_its_own_settings() -> None:
    """A tower has the outermost section of its name, or the settings at the top level."""
    config = {
        "model_type": "llava",
        "n": 0,
        "thinker": {"text_config": {"n": 2}},
        "text_config": {"n": 1, "model_type": "llama"},
        "vision_config": [],
    }
    found = sections(config, ["language", "vision"])

    assert {"n": 1, "model_type": "llama"} == found["language"]
    assert {**config, "model_type": "llava"} == found["vision"]


def test_only_types_of_transformers_without_code_of_their_own_are_recognised() -> None:
    """Remote code may give another model a known type."""
    assert recognised({"model_type": "llama"})
    assert not recognised({"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}})
    assert not recognised({"model_type": "brand_new"})


def test_a_thousand_names_side_by_side_are_a_list() -> None:
    """Names in a long list are not siblings, so each has its own name and shape alone."""
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    shapes = {names[0]: (4, 2), names[1]: (4, 2), names[2]: (2, 4)}
    crowd = {f"model.layers.0.mlp.x{number}.weight": (4, 2) for number in range(1000)}

    assert Site("language", "up_proj", 0) in locate(shapes)
    assert Site("language", "up_proj", 0) not in locate(shapes | crowd)


def test_parameters_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header of a few bytes may claim any number of experts."""
    monkeypatch.setattr(locating, "_MOST", 100)

    with pytest.raises(CheckpointError, match="has more than 100 parameters, counting each expert"):
        locate({f"model.layers.{layer}.mlp.experts.gate_up_proj": (64, 0, 4) for layer in (0, 1)})
