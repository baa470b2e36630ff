"""Measure the cost of a lens: python -m benchmarks.lens [--size mid|small] [--repeats N]

Hooks: the same edit written by hand with torch's `register_forward_hook` and through `lens.intervene`, in
turns on one model and one batch; CPU seconds of a forward pass on one thread, the ratio taken repeat by
repeat. Memory: RssAnon of a process that loads base, and then keeps beside it a tuning of `gate_proj` alone,
whole or as an adapter.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import affectlens as al
from benchmarks.diff.timing import spread

SIZES = {
    "mid": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
            "num_key_value_heads": 4, "vocab_size": 16_000},
    "small": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 256},
}  # fmt: skip
SHAPE = (4, 64)  # batch, positions
Block = Callable[[], AbstractContextManager[object]]


def built(size: str) -> nn.Module:
    """Build a random Llama of a size, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**SIZES[size])).eval()
    return model


@contextmanager
def by_hand(modules: list[nn.Module], hook: Callable[..., object], *, before: bool = False) -> Iterator[None]:
    """Set torch's own hooks for the length of a block."""
    register = "register_forward_pre_hook" if before else "register_forward_hook"
    handles = [getattr(module, register)(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def contestants(lens: al.Lens) -> dict[str, tuple[Block, Block]]:
    """Return the same edit in every layer, by hand and through the lens."""
    gates, downs = (lens.sites.where(role=role) for role in ("gate_proj", "down_proj"))
    outputs = [lens.module(site) for site in gates]
    layers = [lens.model.get_submodule(f"model.layers.{site.layer}") for site in downs]
    width = lens.parameter(downs[0]).shape[0]
    vector, kept = torch.randn(width), list[Tensor]()

    def scaled(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return output * 0.5

    def neuron(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        new = args[0].clone()
        new[..., 3:4] = 0
        return (new, *args[1:])

    def steered(_: nn.Module, __: object, output: Tensor) -> Tensor:
        new = output.clone()
        new[:, -1] += vector
        return new

    def keeps(_: nn.Module, __: object, output: Tensor) -> None:
        kept.append(output.clone())

    def recording() -> AbstractContextManager[object]:
        kept.clear()
        return by_hand(layers, keeps)

    neurons = al.Sites(site.at(neuron=3) for site in downs)
    return {
        "scale the gate's pre-activation": (
            lambda: by_hand(outputs, scaled),
            lambda: lens.intervene(al.Scale(gates.at("pre_activation"), factor=0.5)),
        ),
        "zero one neuron of act(gate)·up": (
            lambda: by_hand([lens.module(site) for site in downs], neuron, before=True),
            lambda: lens.intervene(al.Zero(neurons.at("gated"))),
        ),
        "steer the residual at the last token": (
            lambda: by_hand(layers, steered),
            lambda: lens.intervene(al.Steer(downs.at("residual", span="last"), vector=vector)),
        ),
        "record the residual": (recording, lambda: lens.record(downs.at("residual"))),
    }


def overhead(size: str, repeats: int) -> Iterator[tuple[str, list[float]]]:
    """Yield the ratio of lens to hand for each edit; the logits are the same bits."""
    lens = al.Lens(built(size))
    batch = {"input_ids": torch.randint(3, SIZES[size]["vocab_size"], SHAPE)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    for name, (hand, ours) in contestants(lens).items():
        found = []
        for number in range(repeats + 1):
            order = (hand, ours) if number % 2 else (ours, hand)
            took = {block: _timed(lens, batch, block) for block in order}
            assert torch.equal(took[hand][1], took[ours][1]), name
            found.append(took[ours][0] / took[hand][0])
        yield name, found[1:]  # the first is for warming up


@torch.no_grad()
def _timed(lens: al.Lens, batch: dict[str, Tensor], block: Block) -> tuple[float, Tensor]:
    start = time.process_time()
    with block():
        logits = lens.model(**batch, use_cache=False).logits
    return time.process_time() - start, logits


HELD = """
import sys, re, torch, affectlens as al
from pathlib import Path
torch.set_num_threads(1)
def anonymous():
    import gc; gc.collect()
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
with __import__("warnings").catch_warnings(action="ignore"):
    al.load(sys.argv[3]); before = anonymous()
    lens = al.load(sys.argv[1]); ids = torch.arange(3, 11)[None]
    lens.model(input_ids=ids); one = anonymous()
    pair = lens.paired(sys.argv[2]); told = pair.bytes
    with pair.tuned(): lens.model(input_ids=ids)
    size = sum(p.numel() * p.element_size() for p in lens.parameters.values())
    print(one - before, anonymous() - one, told, size)
"""


def held(size: str) -> Iterator[tuple[str, float, float, float, float]]:
    """Yield bytes by kind of tuning: the model, what is kept beside it, that as announced, the parameters."""
    import peft

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        built(size).save_pretrained(folder / "base")
        built("small").save_pretrained(folder / "warm")
        model = built(size)
        for name, parameter in model.named_parameters():
            if "gate_proj" in name:
                parameter.data += 0.01
        model.save_pretrained(folder / "gates moved")
        adapter = peft.get_peft_model(
            built(size), peft.LoraConfig(r=16, target_modules=["gate_proj", "up_proj"])
        )
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        adapter.save_pretrained(str(folder / "adapter of rank 16"))
        for kind in ("gates moved", "adapter of rank 16"):
            command = [
                sys.executable,
                "-c",
                HELD,
                str(folder / "base"),
                str(folder / kind),
                str(folder / "warm"),
            ]
            run = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            one, more, told, parameters = map(float, re.findall(r"-?\d+", run.stdout)[-4:])
            yield kind, one, more, told, parameters


def main() -> None:
    """Print both tables."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--size", choices=SIZES, default="mid")
    asked.add_argument("--repeats", type=int, default=20)
    given = asked.parse_args()
    torch.set_num_threads(1)
    print(f"\n| edit in every layer of {given.size} | lens / by hand, median [least, most] |\n| --- | --- |")
    for name, ratios in overhead(given.size, given.repeats):
        print(f"| {name} | {spread(ratios)} |")
    print("\n| kept beside base | announced | measured | all memory / (parameters + announced) |")
    print("| --- | --- | --- | --- |")
    for kind, one, more, told, parameters in held(given.size):
        ratio = (one + more) / (parameters + told)
        print(f"| {kind} | {told / 1e6:.1f} MB | {more / 1e6:.1f} MB | {ratio:.2f} |")


if __name__ == "__main__":
    main()
