"""A stranger's files run no code, fetch nothing, read nothing elsewhere, and never hang a load."""

import gc
import importlib.util
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn

import affectlens as al
from affectlens.checkpoints.hub import remote
from affectlens.errors import CheckpointError, LensError, MissingExtra
from affectlens.lens.inputs import rendering
from affectlens.lens.isolation import cleaned
from tests.checkpoints.hub.hub_server import Hub, posing
from tests.numbers import differ
from tests.small_models import tiny

CONFIG, TOKENS, PROCESSOR = "config.json", "tokenizer_config.json", "processor_config.json"
EVIL = {"code.py": "from pathlib import Path\nPath(__file__).with_name('RAN').touch()\nraise SystemExit\n"}

# file, setting, value: each would run, fetch or read something, or load another model, if it were kept
IGNORED = (
    (CONFIG, "attn_implementation", "evil/kernel"),
    (CONFIG, "_attn_implementation", {"": "evil/kernel"}),
    (CONFIG, "text_config.attn_implementation", "evil/kernel"),
    (CONFIG, "text_config._attn_implementation", "evil/kernel@main:kernel"),
    (CONFIG, "vision_config._attn_implementation_internal", "evil/kernel"),
    (CONFIG, "text_config.experts_implementation", "evil/kernel"),
    (CONFIG, "use_kernels", True),
    (CONFIG, "kernel_config", {"RMSNorm": "evil/kernel:RMSNorm"}),
    (CONFIG, "fusion_config", {"patch_embeddings": True}),
    (CONFIG, "quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    (CONFIG, "text_config.quantization_config", {"quant_method": "gptq", "bits": 4}),
    (CONFIG, "quantization_config", {"quant_method": "nothing"}),
    (CONFIG, "configuration_files", ["config.4.0.0.json"]),
    (CONFIG, "transformers_weights", "../other.safetensors"),
    (CONFIG, "_name_or_path", "/etc"),
    (CONFIG, "auto_map", {"AutoConfig": "code.C", "AutoModelForImageTextToText": "code.M"}),
    (CONFIG, "auto_map", {"AutoConfig": "evil/repo--code.C"}),
    (CONFIG, "dtype", "load"),
    (CONFIG, "torch_dtype", "nn"),
    (CONFIG, "dtype", "int8"),
    (CONFIG, "dtype", {"text_config": "float8_e4m3fn"}),
    (CONFIG, "return_dict", False),
    (CONFIG, "architectures", ["AutoModelForCausalLM", 7, {}]),
    (CONFIG, "architectures", ["RagTokenForGeneration"]),
    (TOKENS, "auto_map", {"AutoTokenizer": ["code.T", "code.F"]}),
    (TOKENS, "auto_map", ["code.T", None]),
    (TOKENS, "tokenizer_file", "/etc/passwd"),
    (TOKENS, "vocab_file", "/dev/zero"),
    (TOKENS, "fast_tokenizer_files", ["../tokenizer.json"]),
    (TOKENS, "init_inputs", ["/etc/passwd"]),
    (TOKENS, "name_or_path", "evil/repo"),
    (PROCESSOR, "auto_map", {"AutoProcessor": "code.P"}),
    (
        PROCESSOR,
        "audio_tokenizer",
        {"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "/etc"},
    ),
)

# setting, value → message
REFUSED = (
    (
        "text_config.num_hidden_layers",
        10**9,
        "'text_config.num_hidden_layers' = 1,000,000,000, but .* 113 tensors",
    ),
    ("text_config.num_hidden_layers", 9000, "more than 22,326,272 parameters, but the files hold 3,081,568"),
    ("vision_config.num_hidden_layers", 10**18, "num_hidden_layers' = 1,000,000,000,000,000,000"),
    ("text_config.hidden_size", 10**9, "'text_config.hidden_size' = 1,000,000,000"),
    ("text_config.intermediate_size", 10**15, "'text_config.intermediate_size' = 1,000,000,000,000,000"),
    ("text_config.vocab_size", 10**12, "'text_config.vocab_size' = 1,000,000,000,000"),
    ("text_config.num_attention_heads", 10**9, "num_attention_heads' = 1,000,000,000"),
    ("text_config.max_position_embeddings", 10**12, "max_position_embeddings' = 1,000,000,000,000"),
    ("vision_config.image_size", 10**7, "'vision_config.image_size' = 10,000,000"),
    ("num_labels", 10**9, "'num_labels' = 1,000,000,000"),
    (
        "text_config.hidden_size",
        256,
        r"embed_tokens.weight' has shape \(5420, 128\) in the files, .* makes it \(5420, 256\)",
    ),
    ("text_config.hidden_size", -5, "'text_config.hidden_size' = -5, but a count can't be negative"),
    (
        "text_config.num_hidden_layers",
        -1,
        "'text_config.num_hidden_layers' = -1, but a count can't be negative",
    ),
    ("vision_config.num_attention_heads", -4, "num_attention_heads' = -4, but a count can't be negative"),
    ("vision_config.patch_size", -16, "'vision_config.patch_size' = -16, but a count can't be negative"),
    ("text_config.hidden_size", "big", "expected int, got str"),
    ("text_config.num_attention_heads", 0, "integer modulo by zero"),
    ("text_config.vocab_size", 10**30, "Overflow"),
    ("text_config.hidden_act", "os.system", "KeyError 'os.system'"),
    ("text_config", None, "describes a model of more than"),
    ("text_config", [1, 2], "expected dict, got list"),
    ("text_config.rope_scaling", {"rope_type": "evil", "factor": "x"}, "can't load this"),
    ("text_config.pad_token_id", 10**9, "Padding_idx must be within num_embeddings"),
    ("vision_config.patch_size", 0, "by zero"),
    ("sub_configs", {"a": 1}, "no setter"),
    ("model_type", "../../x", "has model type `../../x`"),
    ("model_type", ["llava"], "can't load this"),
)

# setting, value of a model that loads → what its forward pass raises
NOT_RUN = (
    ("vision_feature_layer", -99, "IndexError|index out of range"),
    ("vision_feature_select_strategy", "full", "[Ii]mage features and image tokens do not match"),
)

# chat template → message
TEMPLATES = (
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "took more than"),
    ("{{ 10 ** 10 ** 10 }}", r"uses the operator \*\*"),
    ("{% set ns = namespace(x='x' * 999) %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
     "the chat template needs more than 50,000,000 bytes of memory"),
    ("{% set x = 'a' * 99999 %}{% set y = x * 99999 %}{{ y }}", "the chat template needs more than"),
    ("{{ '%09999999999d' % 1 }}", "the chat template needs more than"),
    ("{{ range(99999)|join('a' * 99999) }}", "the chat template needs more than"),
    ("{{ messages.__class__.__mro__ }}", "can't be rendered"),
    ("{% include '/etc/passwd' %}", "no loader for this environment|can't be rendered"),
    ("{{ raise_exception('no system role') }}", "'one': its chat can't be rendered: .*no system role"),
    ("{{ messages[0].content[7].text }", "can't be rendered"),
)  # fmt: skip


@pytest.fixture
def copy(demo: al.Demo, tmp_path: Path) -> Callable[..., Path]:
    """Copy the demo's base, with one setting changed and files added."""

    def copied(file: str = CONFIG, setting: str = "", value: object = None, **files: str) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(demo.base.store.source, folder)
        if setting:
            config = json.loads((folder / file).read_text())
            *sections, key = setting.split(".")
            at = config
            for section in sections:
                at = at[section]
            at[key] = value
            (folder / file).write_text(json.dumps(config))
        for name, content in files.items():
            (folder / name).write_text(content)
        return folder

    return copied


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Save a model with its own Python files, which leave a mark when they run."""
    folder = tmp_path / "own"
    tiny("llama").save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text())
    config["auto_map"] = {"AutoConfig": "conf.MyConfig", "AutoModelForCausalLM": "code.MyModel"}
    (folder / CONFIG).write_text(json.dumps({**config, "model_type": "mine"}))
    (folder / "conf.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass MyConfig(LlamaConfig):\n    model_type = 'mine'\n"
    )
    (folder / "code.py").write_text(
        "from pathlib import Path\n\nfrom transformers import LlamaForCausalLM\n\n"
        "from .conf import MyConfig\n\n"
        f"Path({str(folder / 'RAN')!r}).touch()\n\n\n"
        "class MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n"
    )
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Serve a local hub."""
    with posing(monkeypatch, cache=tmp_path / "cache") as server:
        yield server


def left() -> tuple[list[str], int, int]:
    """Return what a failed load could leave behind: files, models, changed settings."""
    gc.collect()
    models = sum(issubclass(type(thing), transformers.PreTrainedModel) for thing in gc.get_objects())
    files = [path.name for path in Path(tempfile.gettempdir()).glob("affectlens-*")]
    return files, models, transformers.utils.logging.get_verbosity()


@pytest.mark.parametrize(("file", "setting", "value"), IGNORED)
def test_settings_that_do_more_than_describe(
    copy: Callable[..., Path],
    lens: al.Lens,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    setting: str,
    value: object,
) -> None:
    """Settings that name code, kernels, quantisers, files or repositories have no effect.

    Neither a hub nor the user at the terminal is asked.
    """
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    folder = copy(file, setting, value, **EVIL)
    found = al.load(folder, dtype="float32")

    assert not list(folder.rglob("RAN"))
    assert [] == hub.requests
    assert all(torch.equal(lens.parameter(site), found.parameter(site)) for site in lens.sites)
    example = al.Example("1", "x", text="glad")
    assert torch.equal(lens.logits(example), found.logits(example))


@pytest.mark.parametrize(("setting", "value", "message"), REFUSED)
def test_configs_that_ask_for_too_much(
    copy: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    value: object,
    message: str,
) -> None:
    """A config that does not fit the files is an error of one line, soon, and leaves nothing behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder, before, began = copy(CONFIG, setting, value), left(), time.monotonic()

    with pytest.raises(LensError, match=message) as caught:
        al.load(folder)
    assert 20 > time.monotonic() - began
    assert 1 == len(str(caught.value).splitlines())
    assert "affectlens-" not in str(caught.value)
    assert before == left()


def test_an_adapter_beside_a_model_is_not_put_on(
    copy: Callable[..., Path], lens: al.Lens, tmp_path: Path
) -> None:
    """An adapter beside a model is ignored: transformers would load it, and the base that it names."""
    config = {"base_model_name_or_path": "../../../../etc", "peft_type": "LORA", "r": 8}
    folder = copy(**{"adapter_config.json": json.dumps(config)})
    save_file({"base_model.model.x.lora_A.weight": torch.ones(8, 4)}, folder / "adapter_model.safetensors")
    found = al.load(folder, dtype="float32")

    assert all(torch.equal(lens.parameter(site), found.parameter(site)) for site in lens.sites)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", CONFIG, "generation_config.json"])
def test_links_out_of_the_folder_are_not_followed(
    copy: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """A link to a file outside the folder is an error."""
    folder = copy()
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")

    with pytest.raises(CheckpointError, match=rf"{name}: links to a file outside the folder"):
        al.load(folder)


def test_a_pipe_in_the_place_of_a_file_does_not_block(copy: Callable[..., Path]) -> None:
    """A pipe in place of a file is an error: opening it would wait forever."""
    folder = copy()
    (folder / TOKENS).unlink()
    os.mkfifo(folder / TOKENS)

    with pytest.raises(CheckpointError, match=rf"{TOKENS}: .*not an ordinary file"):
        al.load(folder)


def test_a_tokenizer_that_can_not_be_read_is_told(copy: Callable[..., Path]) -> None:
    """A broken tokenizer warns, and raises an error when an example needs it; the model loads."""
    with pytest.warns(UserWarning, match="its tokenizer can't be read"):
        found = al.load(copy(**{"tokenizer.json": "{"}))

    assert found.processor is None
    with pytest.raises(
        LensError, match=r"^copy: its tokenizer can't be read \(.+\), so examples can't be prepared"
    ):
        found.logits(al.Example("1", "x", text="x"))


def test_a_pattern_of_a_tokenizer_that_takes_for_ever(copy: Callable[..., Path]) -> None:
    """A tokenizer's pattern that runs too long ends in an error, not in a panic."""
    folder = copy()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "pre_tokenizer": split}))

    with pytest.raises(LensError, match=r"the processor can't read these examples: .*retry-limit"):
        al.load(folder).logits(al.Example("1", "x", text="a" * 40 + "!"))


@pytest.mark.parametrize(("setting", "value", "message"), NOT_RUN)
def test_a_model_that_can_not_run_is_told(
    copy: Callable[..., Path], demo: al.Demo, setting: str, value: object, message: str
) -> None:
    """A failure in the forward pass of a strange config is an error of one line."""
    found = al.load(copy(CONFIG, setting, value))
    example = demo.task("faces-unseen").examples[0]

    for run, what in ((found.logits, "run"), (found.generate, "answer")):
        with pytest.raises(LensError, match=f"^the model can't {what} these examples: .*{message}") as caught:
            run(example)
        assert str(caught.value).isprintable()


def test_a_placeholder_that_the_config_does_not_know_is_told(
    copy: Callable[..., Path], demo: al.Demo
) -> None:
    """A picture that would not reach the model is an error before anything runs."""
    found = al.load(copy(CONFIG, "image_token_index", 10**9))

    for run in (found.prepare, found.logits, found.generate):
        with pytest.raises(LensError, match="input has no position for a picture"):
            run(demo.task("faces-unseen").examples[0])


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("out of memory")])
def test_memory_that_runs_out_in_a_model_is_not_told(
    lens: al.Lens, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """An out-of-memory error passes unchanged, so that the caller can try a smaller batch."""

    def forward(**_: object) -> None:
        raise error

    batch = lens.prepare(al.Example("1", "x", text="x"))
    monkeypatch.setattr(lens.model, "forward", forward)

    with pytest.raises(type(error)) as caught:
        lens.run(batch)
    assert error is caught.value


def test_an_example_longer_than_the_model_is_told(copy: Callable[..., Path]) -> None:
    """An example longer than the model's positions is an error, unless the positions are scaled."""
    short = al.Example("short", "x", text="glad")
    long = al.Example("long", "x", text="glad " * 600)
    found = al.load(copy())
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    shutil.rmtree(found.source.store.source)

    with pytest.raises(LensError, match=r"example 'long' has \d{3,} tokens, .* 512 positions"):
        found.logits(short, long)
    stretched = al.load(copy(CONFIG, "text_config.rope_parameters", rope))
    assert 2 == len(stretched.logits(short, long))


def test_what_is_equal_may_be_nan(copy: Callable[..., Path]) -> None:
    """A NaN in a weight is not taken for a different weight."""
    folder = copy()
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        if "mlp.gate_proj" in name:
            value[0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = al.load(folder, dtype="float16").verify()

    assert not [claim for claim in found.refuted if "other values" in claim.reason]


@pytest.mark.parametrize(("template", "message"), TEMPLATES)
def test_chat_templates_are_bounded(
    copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, template: str, message: str
) -> None:
    """A chat template that runs too long, needs too much memory or fails is an error."""
    found = al.load(copy(**{"chat_template.jinja": template}))
    monkeypatch.setattr(rendering, "SECONDS", 0.3 if "took" in message else 30.0)
    monkeypatch.setattr(rendering, "_MEMORY", 50_000_000)
    limit = resource.getrlimit(resource.RLIMIT_AS)

    with pytest.raises(LensError, match=message):
        found.logits(al.Example("one", "x", text="x"))
    assert sys.gettrace() is None
    assert limit == resource.getrlimit(resource.RLIMIT_AS)


def test_how_answers_are_sought_is_not_for_a_file_to_say(copy: Callable[..., Path]) -> None:
    """Of the generation settings in a file, only the special tokens are used."""
    settings = {
        "num_return_sequences": 9,
        "custom_generate": "evil/repo",
        "eos_token_id": [3, 5],
        "pad_token_id": {},
    }
    found = al.load(copy(**{"generation_config.json": json.dumps(settings)}))

    assert [3, 5] == found.model.generation_config.eos_token_id
    assert 1 == len(found.generate(al.Example("1", "x", text="glad"), max_new_tokens=2))


def test_files_of_torch_are_loaded_by_the_restricted_reader(tmp_path: Path) -> None:
    """A pickle with tensors alone is loaded; any other pickle is an error."""
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    found = al.load(tmp_path / "model")

    expected = model.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in found.model.state_dict().items())
    torch.save({"x": Path}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin"):
        al.load(tmp_path / "model")


def test_what_is_loaded_is_what_was_opened(tmp_path: Path) -> None:
    """The loaded weights are those of the opened file, despite other files and later changes."""
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    torch.save({"evil": torch.ones(1)}, tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "../x.safetensors"}}'
    )
    found = al.load(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")

    expected = model.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in found.model.state_dict().items())


def test_quantised_weights_are_unpacked(tmp_path: Path) -> None:
    """Quantised weights have the values that a diff reads, without the package that packed them."""
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.mlp.gate_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    weights[f"{name}_scale"] = torch.tensor(2.0)
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "model" / CONFIG).read_text())
    config["quantization_config"] = {"quant_method": "fbgemm_fp8"}
    (tmp_path / "model" / CONFIG).write_text(json.dumps(config))

    found = al.load(tmp_path / "model").model.state_dict()[name]
    assert torch.equal(2 * weights[name].float(), found)


def test_code_of_a_model_is_off(own: Path) -> None:
    """A model that needs its own code is an error that says how to allow it; opening it needs none."""
    message = r"own: a model of type 'mine' needs code of its own .*code.py.* trust_remote_code=True"
    with pytest.raises(LensError, match=message):
        al.load(own)

    assert not (own / "RAN").exists()
    assert 2 == len(al.open_checkpoint(own).sites.where(role="gate_proj"))


def test_code_runs_when_asked_for_and_is_written_down(own: Path) -> None:
    """The lens records which files ran and their hash; given as revision, the hash pins the code."""
    found = al.load(own, trust_remote_code=True)

    assert (own / "RAN").exists()
    assert "MyModel" == type(found.model).__name__
    assert found.remote_code is not None
    assert ["code.py", "conf.py"] == found.remote_code["files"]
    revision = found.remote_code["revision"]
    assert revision.startswith("sha256:")
    assert al.load(own, trust_remote_code=True, revision=revision).remote_code == found.remote_code
    (own / "conf.py").write_text((own / "conf.py").read_text() + "# other\n")
    with pytest.raises(LensError, match=f"expected the code of '{revision}'"):
        al.load(own, trust_remote_code=True, revision=revision)
    with pytest.raises(LensError, match="which is not run"):
        al.load(own)


def test_code_of_another_repository_is_refused(own: Path) -> None:
    """Code in another repository is refused: no revision of this one pins it."""
    config = json.loads((own / CONFIG).read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "other/repo--code.MyModel"
    (own / CONFIG).write_text(json.dumps(config))

    with pytest.raises(LensError, match=r"its code is in another repository .'other/repo--code.MyModel'"):
        al.load(own, trust_remote_code=True)
    assert not (own / "RAN").exists()


def test_trust_changes_nothing_where_there_is_no_code(copy: Callable[..., Path]) -> None:
    """Trust has no effect on a model that transformers builds itself."""
    assert al.load(copy(**EVIL), trust_remote_code=True).remote_code is None


def test_code_on_a_hub_is_pinned_to_the_commit(hub: Hub, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch is resolved to a commit before its code is read; code pushed later does not run."""
    files = {path.name: path.read_bytes() for path in own.iterdir()}
    commit = hub.push("lab/own", files)
    checkpoint = al.open_checkpoint("lab/own")
    hub.push("lab/own", {**files, "code.py": b"raise SystemExit('pushed meanwhile')"})
    with pytest.raises(LensError, match="which is not run"):
        al.load("lab/own", revision=commit)
    assert not (own / "RAN").exists()

    for found in (
        al.load(checkpoint, trust_remote_code=True),
        al.load("lab/own", trust_remote_code=True, revision=commit),
        al.load(f"lab/own@{commit}", trust_remote_code=True),
    ):
        assert {"revision": commit, "files": ["code.py", "conf.py"]} == found.remote_code
        assert found.source is not None
        assert commit == found.source.identity["revision"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert commit == al.load(f"lab/own@{commit}", trust_remote_code=True).remote_code["revision"]  # type: ignore[index]


def test_a_model_on_a_hub_is_fetched_with_what_belongs_to_it(hub: Hub, demo: al.Demo, lens: al.Lens) -> None:
    """Only weights, config and processor files are downloaded; the second load uses the cache."""
    files = {path.name: path.read_bytes() for path in Path(demo.base.store.source).iterdir()}
    hub.push("lab/base", {**files, "code.py": b"raise SystemExit", "photo.png": b"x", "big.gguf": b"x"})
    found = al.load("lab/base", dtype="float32")
    example = al.Example("1", "x", text="glad")

    assert torch.equal(lens.logits(example), found.logits(example))
    assert "lab/base" == found.source.identity["name"]  # type: ignore[union-attr]
    assert {"code.py", "photo.png", "big.gguf"}.isdisjoint(hub.sent)
    sent = dict(hub.sent)
    al.load("lab/base")
    assert sent["model.safetensors"] == hub.sent["model.safetensors"]


def test_a_hub_that_stalls_under_a_load(hub: Hub, demo: al.Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that stalls ends in an error that names the file."""
    monkeypatch.setattr(remote, "PATIENCE", 0.5)
    files = {path.name: path.read_bytes() for path in Path(demo.base.store.source).iterdir()}
    hub.push("lab/base", files)
    hub.fail("stall", at="cdn", times=99)

    with pytest.raises(CheckpointError, match=r"model.safetensors: no data from the hub"):
        al.load("lab/base")


def test_what_is_not_there_is_told(hub: Hub) -> None:
    """A path that does not exist is an error, and no hub is asked for it."""
    for path in ("nowhere", "/no/where/at/all", "x" * 5000, "nul\0", "../..x/y/z"):
        with pytest.raises(CheckpointError, match="there is no such file or folder"):
            al.load(path)
    assert [] == hub.requests


def test_a_revision_needs_a_hub(demo: al.Demo) -> None:
    """A folder has no revision, except for the hash of its code."""
    with pytest.raises(LensError, match="base is a local path, so it has no revision 'main'"):
        al.load(demo.base, revision="main")


def test_cleaning_keeps_what_describes_a_model() -> None:
    """Cleaning removes the settings that name something elsewhere, at any depth, and keeps the others."""
    config: dict[str, Any] = {
        "model_type": "llama",
        "attn_implementation": "eager",
        "dtype": "bfloat16",
        "layers": [{"auto_map": 1, "kind": "x"}],
    }

    assert {**config, "layers": [{"kind": "x"}]} == cleaned(config)
    assert config == cleaned(config, code=True)


def test_a_model_that_was_not_loaded_ran_no_code() -> None:
    """A lens over a module that was not loaded has no record of code."""
    assert al.Lens(nn.Linear(2, 2)).remote_code is None


SPREAD = {
    "model.vision_tower": "disk", "model.multi_modal_projector": "cpu",
    "model.language_model.embed_tokens": "disk", "model.language_model.layers.0": "cpu",
    "model.language_model.layers.1": "disk",
    "model.language_model.norm": "cpu", "model.language_model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip


def test_a_model_is_spread_over_memory_and_disk(pair: tuple[Path, Path], tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A spread model has the logits and sites of the whole one, and its files on disk are deleted with it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lens, whole = al.load(pair[0], device_map=SPREAD), al.load(pair[0])
    ids = torch.arange(1, 9).reshape(1, -1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    assert any(parameter.is_meta for parameter in lens.model.parameters())
    torch.testing.assert_close(whole.run(batch), lens.run(batch), atol=1e-6, rtol=1e-6)
    assert whole.sites == lens.sites
    assert all(torch.equal(whole.checkpoint.read(site), lens.checkpoint.read(site)) for site in whole.sites)
    assert (torch.device("cpu"), 1) == (lens.device, len(list(tmp_path.glob("affectlens-offloaded-*"))))
    del lens
    gc.collect()
    assert [] == list(tmp_path.glob("affectlens-offloaded-*"))


def test_offloaded_weights_are_not_changed(pair: tuple[Path, Path]) -> None:
    """A change of offloaded weights is an error before anything changes; those in memory can be changed."""
    lens = al.load(pair[0], device_map=SPREAD)
    layers = lens.sites.where(tower="language", role="gate_proj")
    ids = torch.arange(1, 9).reshape(1, -1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = lens.run(batch)

    with pytest.raises(LensError, match="offloaded"), lens.intervene(al.Scale(layers, factor=2.0)):
        pass
    assert torch.equal(before, lens.run(batch))
    with lens.intervene(al.Scale(layers.where(layer=0), factor=2.0)):
        assert differ(before, lens.run(batch))
    assert torch.equal(before, lens.run(batch))


@pytest.mark.parametrize("places", ["auto", {"": "cpu"}])
def test_a_map_of_one_place_is_that_place(pair: tuple[Path, Path], places: Any) -> None:
    """With one device in the map nothing is offloaded."""
    lens = al.load(pair[0], device_map=places)

    assert not any(parameter.is_meta for parameter in lens.model.parameters())
    assert al.load(pair[0]).sites == lens.sites


def test_places_that_can_not_be_are_told(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors: an unknown dtype, two placements, an unknown or incomplete map, and no accelerate."""
    with pytest.raises(LensError, match="unknown dtype 'int8': give a floating-point dtype"):
        al.load(pair[0], dtype="int8")
    with pytest.raises(LensError, match="give device or device_map, not both"):
        al.load(pair[0], device="cpu", device_map="auto")
    with pytest.raises(LensError, match=r"unknown device_map 'cuda'\. Known: auto"):
        al.load(pair[0], device_map="cuda")
    with pytest.raises(LensError, match="transformers can't load this"):
        al.load(pair[0], device_map={"lm_head": "cpu", "model.vision_tower": "disk"})
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *_: None if name == "accelerate" else find(name)
    )
    with pytest.raises(MissingExtra, match=r"accelerate, which isn't installed. Try: pip install"):
        al.load(pair[0], device_map="auto")
