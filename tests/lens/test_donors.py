"""A donor is more than its weights: what a transplant of all of them leaves behind is told, and only that."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import affectlens as al
from affectlens.errors import Remark
from tests.lens.families import BY_NAME, NAMES, base, logits, tuned
from tests.lens.test_families import told
from tests.lens.test_wrapping import adapted
from tests.numbers import differ
from tests.small_models import nudge
from tests.tiny_models import tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}


def moved(name: str, **changes: object) -> nn.Module:
    """A donor with other weights, and something else that is not a weight."""
    return nudge(BY_NAME[name].build(**changes), "", scale=0.02)


# What differs: live, donor, and what has to be said of it.
DIFFERENCES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "turning": (lambda: base("llama"), lambda: moved("llama", **ROPE), r"config.*rope_theta"),
    "eps": (lambda: base("llama"), lambda: moved("llama", rms_norm_eps=1e-2), "config.*rms_norm_eps"),
    "eps of a section": (
        lambda: base("llava"),
        lambda: moved("llava", text_config__rms_norm_eps=1e-2),
        r"config.*text_config\.rms_norm_eps",
    ),
    "eps of another tower": (
        lambda: base("qwen2_audio"),
        lambda: moved("qwen2_audio", audio_config__scale_embedding=True),
        "config.*audio_config.scale_embedding",
    ),
    "activation": (lambda: base("llama"), lambda: moved("llama", hidden_act="gelu"), "config.*hidden_act"),
    "dtype": (
        lambda: base("llama"),
        lambda: moved("llama").double(),
        r"float64 in .* and float32 here",
    ),
    "narrower": (
        lambda: base("llama"),
        lambda: tuned("llama", torch.bfloat16),
        r"bfloat16 in .* and float32 here",
    ),
    "wider": (
        lambda: base("llama", torch.bfloat16),
        lambda: tuned("llama"),
        r"float32 in .* and bfloat16 here",
    ),
    "untied": (
        lambda: base("gemma3"),
        lambda: moved("gemma3", tie_word_embeddings=False, text_config__tie_word_embeddings=False),
        "output embedding of this model is its input embedding",
    ),
    "tied": (
        lambda: BY_NAME["gemma3"].build(tie_word_embeddings=False, text_config__tie_word_embeddings=False),
        lambda: tuned("gemma3"),
        "output embedding of .* is its input embedding",
    ),
    "apart": (lambda: base("llama"), lambda: adapted("llama"), "adapter.*merged"),
}


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_what_does_not_come_along_is_told(kind: str) -> None:
    """Every weight is transplanted, and yet it is not the donor: the remark says why."""
    live, donor, words = (make() if callable(make) else make for make in DIFFERENCES[kind])
    lens = al.Lens(live)
    sites = al.Sites(site for site in lens.sites if site in al.Lens(donor).sites)

    with pytest.warns(Remark, match=words), lens.intervene(al.Transplant(sites, donor=donor)):
        pass


@pytest.mark.parametrize(
    "kind", ["turning", "eps", "eps of a section", "activation", "wider", "untied", "tied"]
)
def test_what_is_told_makes_a_difference(kind: str) -> None:
    """With all of its weights, and without what was told, the logits are not the donor's."""
    live, donor, _ = (make() if callable(make) else make for make in DIFFERENCES[kind])
    lens = al.Lens(live)
    batch = BY_NAME["gemma3" if "tied" in kind else "llava" if "section" in kind else "llama"].batch()
    sites = al.Sites(site for site in lens.sites if site in al.Lens(donor).sites)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Remark)
        with lens.intervene(al.Transplant(sites, donor=donor)):
            found = logits(live, batch)

    assert differ(logits(donor, batch).float(), found.float())


@pytest.mark.parametrize("kind", ["turning", "eps of a section", "narrower", "untied"])
def test_it_is_told_of_a_donor_on_disk_as_well(kind: str, tmp_path: Path) -> None:
    """A folder has its config beside its weights."""
    live, donor, words = (make() if callable(make) else make for make in DIFFERENCES[kind])
    donor.save_pretrained(tmp_path)  # type: ignore[operator]
    lens = al.Lens(live)
    sites = al.Sites(site for site in lens.sites if site in al.Lens(donor).sites)

    with pytest.warns(Remark, match=words), lens.intervene(al.Transplant(sites, donor=tmp_path)):
        pass


@pytest.mark.parametrize("theta", [5e5, 1e4])
def test_a_config_as_it_was_written_formerly_is_understood(theta: float, tmp_path: Path) -> None:
    """Most files on the hub say `rope_theta` by itself, where transformers now has a section of its own."""
    tuned("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    config = json.loads((tmp_path / "config.json").read_text())
    assert 1e4 == config.pop("rope_parameters")["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": theta, "rope_scaling": None}))
    lens = al.Lens(base("llama"))
    said = " ".join(told(lens, al.Transplant(lens.sites, donor=tmp_path)))

    assert ("rope_theta" in said) == (theta == 5e5)


@pytest.mark.parametrize("model_type", ["glm4_moe", "gemma4_text"])
def test_buffers_that_are_saved_come_along_or_are_told(model_type: str) -> None:
    """What a save holds is transplanted with the rest; left out of the sites, it is told."""
    live, donor = tiny(model_type), nudge(tiny(model_type), "", scale=0.02)
    saved = {name: t for name, t in donor.named_buffers() if name in donor.state_dict()}
    for number, tensor in enumerate(saved.values()):
        tensor += 0.25 * torch.arange(1, tensor.numel() + 1) + number
    lens, ids = al.Lens(live), {"input_ids": torch.arange(3, 11).reshape(1, -1)}
    before, expected = logits(live, ids), logits(donor, ids)
    assert [] == told(lens, al.Transplant(lens.sites, donor=donor))
    with lens.intervene(al.Transplant(lens.sites, donor=donor)):
        assert torch.equal(expected, logits(live, ids))
    assert torch.equal(before, logits(live, ids))

    buffers = {name for name, _ in live.named_buffers()}
    weights = al.Sites(s for s in lens.sites if lens.checkpoint.at(s).tensor not in buffers)
    assert len(saved) == len(lens.sites) - len(weights)
    with pytest.warns(Remark, match="buffer"), lens.intervene(al.Transplant(weights, donor=donor)):
        assert differ(expected, logits(live, ids))


@pytest.mark.parametrize("name", NAMES)
def test_where_nothing_differs_nothing_is_told(name: str, tmp_path: Path) -> None:
    """Live or from files, all sites or some, wholly or in part: no remark."""
    tuned(name).save_pretrained(tmp_path)  # type: ignore[operator]
    lens = al.Lens(base(name))
    for donor in (tuned(name), tmp_path):
        for sites in (lens.sites, lens.sites.where(role="o_proj")):
            assert [] == told(lens, al.Transplant(sites, donor=donor))
            assert [] == told(lens, al.Transplant(sites, donor=donor, alpha=0.5))


def test_a_loaded_model_is_no_other_than_its_files(tmp_path: Path) -> None:
    """Opened from a folder, in its own dtype: its own files as a donor are told nothing of."""
    base("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    lens = al.Lens(al.load(tmp_path).model)

    assert [] == told(lens, al.Transplant(lens.sites, donor=tmp_path))


def test_a_remark_is_made_once_a_lens() -> None:
    """A sweep of a thousand transplants is told once what all of them leave behind."""
    lens = al.Lens(base("llama"))
    change = al.Transplant(lens.sites, donor=moved("llama", rms_norm_eps=1e-2))

    assert [1, 0, 0] == [len(told(lens, change)) for _ in range(3)]


def test_of_sites_that_are_not_touched_nothing_is_told() -> None:
    """Tying is told where the embeddings are transplanted, a dtype where a site has another."""
    live, donor, _ = (make() if callable(make) else make for make in DIFFERENCES["untied"])
    lens = al.Lens(live)
    said = told(lens, al.Transplant(lens.sites.where(role="gate_proj", tower="language"), donor=donor))

    assert not [one for one in said if "embedding" in one and "config" not in one]
