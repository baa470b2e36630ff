"""The claims of a file, compared with the model that was loaded from it."""

from pathlib import Path

import pytest

import affectlens as al
from affectlens.errors import RoleRefuted
from tests.tiny_models import tiny


def test_a_role_that_is_wrong_only_in_the_file_is_refuted(tmp_path: Path) -> None:
    """Probes see the live, stacked experts; the values of the file's `w1` and `w3` are compared with them."""
    tiny("mixtral").save_pretrained(tmp_path)
    lens = al.load(tmp_path, dtype="float32")
    assert not lens.verify().refuted

    file = al.open_checkpoint(tmp_path)
    gate, up = (file.sites.where(role=role, layer=0, expert=1)[0] for role in ("gate_proj", "up_proj"))
    file.storage[gate], file.storage[up] = file.storage[up], file.storage[gate]
    found = al.Lens(lens.model, source=file).verify()

    with pytest.raises(RoleRefuted, match=r"layers.0.block_sparse_moe.experts.1.w3.weight' is not gate_proj"):
        found.check()
    assert 2 == len(found.refuted)


def test_unverified_claims_are_told_with_the_reason() -> None:
    """The repr names each claim that no probe decided, so that nobody takes it for confirmed."""
    found = al.Lens(tiny("gemma3")).verify()

    assert found.unverified
    for claim in found.unverified:
        assert f"unverified: {claim.tensor}: {claim.reason}" in repr(found)


def test_all_that_is_stored_is_loaded(tmp_path: Path) -> None:
    """The automatic causal class of Whisper is its decoder alone; the class of the files has both halves."""
    tiny("whisper", "WhisperForConditionalGeneration").save_pretrained(tmp_path)

    lens = al.load(tmp_path)

    assert lens.source is not None
    assert lens.source.sites == lens.sites
    assert not lens.verify().refuted
