"""Two models in the memory of one and what differs: the second to the bit, and the first again."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import affectlens as al
from affectlens.errors import LensError, Remark
from tests.lens.families import BY_NAME, NAMES, base, logits, tuned
from tests.lens.test_lens import same, snapshot
from tests.small_models import nudge, tiny


def adapted(model: nn.Module, targets: list[str], **settings: Any) -> nn.Module:
    """A model with a LoRA adapter whose factors are not zero."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **settings)
    torch.manual_seed(3)
    found = peft.get_peft_model(model, config).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return found


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own


@pytest.mark.parametrize("name", NAMES)
def test_the_second_model_is_itself_to_the_bit(name: str) -> None:
    """Inside the block the logits are tuned's, outside base's, and every tensor is where it was."""
    model, batch = base(name), BY_NAME[name].batch()
    before, expected = snapshot(model), [logits(model, batch), logits(tuned(name), batch)]
    pair = al.Lens(model).paired(tuned(name))
    with pair.tuned():
        assert torch.equal(expected[1], logits(model, batch))

    assert torch.equal(expected[0], logits(model, batch))
    assert same(before, snapshot(model))


def test_only_what_differs_is_held(pair: tuple[Path, Path]) -> None:
    """The figure is known before anything is loaded, and it is the size of the tensors that moved."""
    lens = al.load(pair[0])
    found = lens.paired(pair[1])
    moved = [p for name, p in lens.parameters.items() if ".language_model.layers." in name]

    assert sum(p.numel() * p.element_size() for p in moved) == found.bytes
    assert len(moved) == len(found.differing)
    assert found._held is None
    assert "sites differ: what differs takes" in repr(found)
    with found.tuned():
        pass
    held = found._held or []
    assert sorted(p.data_ptr() for p in moved) == sorted(owner.data_ptr() for owner, _, _ in held)
    assert found.bytes == sum(value.numel() * value.element_size() for _, _, value in held)


def test_a_part_of_a_fused_matrix_holds_the_matrix() -> None:
    """A gate that moved is half of one tensor, which is swapped whole: up keeps its bits."""
    model = BY_NAME["phi3"].build()
    other = BY_NAME["phi3"].build()
    with al.Lens(other).intervene(al.Scale(al.Lens(other).sites.where(role="gate_proj"), factor=1.5)):
        found = al.Lens(model).paired(other)
        batch = BY_NAME["phi3"].batch()
        expected = logits(other, batch)
        with found.tuned():
            assert torch.equal(expected, logits(model, batch))

    assert {"gate_proj"} == {site.role for site in found.differing}


def test_what_is_held_is_a_donor_by_pointer() -> None:
    """A transplant from it swaps in the very tensors, and gives what the file would."""
    model, batch = base("llama"), BY_NAME["llama"].batch()
    lens = al.Lens(model)
    pair = lens.paired(tuned("llama"))
    gates = lens.sites.where(role="gate_proj")
    with lens.intervene(al.Transplant(gates, donor=tuned("llama"))):
        expected = logits(model, batch)
    with lens.intervene(al.Transplant(gates, donor=pair.donor)):
        assert torch.equal(expected, logits(model, batch))
        held = {id(value) for _, _, value in pair._held or ()}
        assert {value.data_ptr() for _, _, value in pair._held or ()} >= {
            lens.parameter(site).data_ptr() for site in gates
        }
    assert held


@pytest.mark.parametrize("family", ["llama", "llava", "phi3"])
def test_an_adapter_stays_its_factors(family: str, tmp_path: Path) -> None:
    """Held are A and B; what comes out are the bits of the model that PEFT makes."""
    targets = ["gate_up_proj", "qkv_proj"] if family == "phi3" else ["gate_proj", "q_proj"]
    batch = BY_NAME[family].batch()
    wrapped = adapted(BY_NAME[family].build(), targets)
    wrapped.save_pretrained(tmp_path)  # type: ignore[operator]
    expected = logits(wrapped, batch)
    model = BY_NAME[family].build()
    plain, before = logits(model, batch), snapshot(model)
    hooks = [len(m._forward_hooks) for m in model.modules()]  # transformers may have some
    pair = al.Lens(model).paired(tmp_path)
    factors = sum(p.numel() * 4 for name, p in wrapped.named_parameters() if "lora_" in name)

    assert factors == pair.bytes
    with quiet(), pair.tuned():
        assert same(before, snapshot(model))
        found = logits(model, batch)
    torch.testing.assert_close(expected, found, rtol=1e-5, atol=1e-6)
    assert family == "phi3" or torch.equal(expected, found)
    assert torch.equal(plain, logits(model, batch))
    assert hooks == [len(m._forward_hooks) for m in model.modules()]


def test_dora_is_held_as_weights(tmp_path: Path) -> None:
    """What is no product of factors is held merged."""
    batch = BY_NAME["llama"].batch()
    wrapped = adapted(BY_NAME["llama"].build(), ["gate_proj"], use_dora=True)
    wrapped.save_pretrained(tmp_path)  # type: ignore[operator]
    model = BY_NAME["llama"].build()
    pair = al.Lens(model).paired(tmp_path)
    gates = [p for name, p in model.named_parameters() if "gate_proj" in name]

    assert sum(p.numel() * 4 for p in gates) == pair.bytes
    with quiet(), pair.tuned():
        torch.testing.assert_close(logits(wrapped, batch), logits(model, batch), rtol=1e-4, atol=1e-5)


def test_another_config_is_told_once(save: Callable[..., Path]) -> None:
    """Weights are held and a config is not; said in the repr, and at the first switch."""
    one, two = tiny("llama"), nudge(tiny("llama"), "gate_proj")
    two.config.rms_norm_eps = 0.1
    pair = al.Lens(one).paired(save(two, "other-eps"))

    assert "rms_norm_eps" in repr(pair)
    with pytest.warns(Remark, match="rms_norm_eps"), pair.tuned():
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pair.tuned():
            pass


def test_the_dtype_in_which_both_are_run_tells_nothing_apart(lens: al.Lens, demo: al.Demo) -> None:
    """Files of one dtype, both run in another, say nothing; a model in memory is held to the live one."""
    other = al.load(demo.tuned, dtype="bfloat16").model

    assert () == lens.paired(demo.tuned).unlike
    assert "float32 → bfloat16" in " ".join(lens.paired(other).unlike)


def test_what_has_no_place_is_refused() -> None:
    """Another width is no difference that could be held."""
    with pytest.raises(LensError, match="that this model lacks"):
        al.Lens(tiny("llama")).paired(tiny("llama", intermediate_size=40))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_switch_that_breaks_off_is_undone(error: type[BaseException]) -> None:
    """Whatever breaks into the block, base is there again."""
    model = base("llama")
    before, pair = snapshot(model), al.Lens(model).paired(tuned("llama"))
    with pytest.raises(error), pair.tuned():
        raise error("stop")

    assert same(before, snapshot(model))


def quiet() -> Any:
    return warnings.catch_warnings(action="ignore", category=Remark)
