"""An edited checkpoint on disk equals the live intervention to the bit; the rest is the base's own bytes."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import affectlens as al
from affectlens.checkpoints import Checkpoint
from affectlens.checkpoints.folders import RECORD
from affectlens.errors import CheckpointError, LensError, NoSuchSite, WriteError
from affectlens.interventions import Randomise, Scale, Shuffle, Steer, Transplant, Zero
from affectlens.interventions.edits import Edits
from affectlens.sites import Site, Sites
from affectlens.writing import read_record, shards, write
from tests.checkpoints.hub.hub_server import posing
from tests.small_models import nudge
from tests.small_models import tiny as small
from tests.tiny_models import tiny

# How a base lies on disk: the type of model, and how it is saved.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "single": ("llama", {}),
    "sharded": ("qwen2", {"max_shard_size": "100KB"}),
    "fused": ("phi3", {}),
    "fused by head": ("bloom", {}),
    "experts one by one": ("mixtral", {}),
    "experts stacked": ("mixtral", {"save_original_format": False}),
    "interleaved and turned": ("gpt_oss", {"max_shard_size": "100KB"}),
    "turned": ("gpt2", {}),
    "towers": ("llava", {"max_shard_size": "100KB"}),
}
ON_WEIGHTS: dict[str, Callable[[Sites, Path], Any]] = {
    "transplant 0": lambda sites, tuned: Transplant(sites, donor=tuned, alpha=0.0),
    "transplant 0.5": lambda sites, tuned: Transplant(sites, donor=tuned, alpha=0.5),
    "transplant 1": lambda sites, tuned: Transplant(sites, donor=tuned),
    "transplant 2": lambda sites, tuned: Transplant(sites, donor=tuned, alpha=2.0),
    "zero": lambda sites, _: Zero(sites),
    "scale": lambda sites, _: Scale(sites, factor=0.3),
    "randomise": lambda sites, _: Randomise(sites, seed=3),
    "shuffle": lambda sites, tuned: Shuffle(sites, donor=tuned),
}
ERRORS = {
    "an error": (RuntimeError("broken"), RuntimeError),
    "Ctrl-C": (KeyboardInterrupt(), KeyboardInterrupt),
    "a full disk": (OSError(errno.ENOSPC, "no space"), WriteError),
}

Pairs = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Return the folders of a base and a tuned model of a layout, in bfloat16."""
    found: dict[str, tuple[Path, Path]] = {}

    def make(layout: str) -> tuple[Path, Path]:
        if layout not in found:
            kind, saving = LAYOUTS[layout]
            model = tiny(kind).bfloat16()
            folder = tmp_path_factory.mktemp("pair")
            model.save_pretrained(folder / "base", **saving)
            nudge(model, "", scale=0.05).save_pretrained(folder / "tuned")
            found[layout] = folder / "base", folder / "tuned"
        return found[layout]

    return make


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every tensor in several blocks."""
    monkeypatch.setattr(shards, "BLOCK", 5000)


def gates(checkpoint: Checkpoint) -> Sites:
    """Return the gates of the language model, or `fc1` of a model without gates."""
    roles = {site.role for site in checkpoint.sites}
    return checkpoint.sites.where(tower="language", role="gate_proj" if "gate_proj" in roles else "fc1")


def unlike(one: Checkpoint, other: Checkpoint) -> list[Site]:
    """Return the sites whose bits differ."""
    return [site for site in one.sites if not torch.equal(bits(one.read(site)), bits(other.read(site)))]


def bits(values: Tensor) -> Tensor:
    return values.detach().contiguous().reshape(-1).view(torch.uint8)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@dataclass(frozen=True)
class Mine:
    """An intervention of the user's own, which returns a dict."""

    sites: tuple[Site, ...]

    def edits(self, live: Checkpoint) -> Mapping[Site, Tensor]:
        return {site: torch.ones(live.shape(site)) for site in self.sites}


@dataclass(frozen=True)
class Breaking:
    """An intervention that raises when it makes its third value."""

    sites: Sites
    error: BaseException

    def edits(self, live: Checkpoint) -> Edits:
        calls = []

        def edit(site: Site, wanted: slice | None = None) -> Tensor:
            calls.append(site)
            if len(calls) == 3:
                raise self.error
            return live.read(site, wanted)

        return Edits(self.sites, edit)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_base_with_all_of_tuned_is_tuned(layout: str, pairs: Pairs, tmp_path: Path) -> None:
    """Every tensor has tuned's bits, under the names, dtypes and shapes of base."""
    base, tuned = (al.open_checkpoint(side) for side in pairs(layout))

    found = write(base, Transplant(base.sites, donor=tuned), tmp_path / "out")

    assert [] == unlike(found, tuned)
    assert base.store.headers == found.store.headers
    assert base.sites == found.sites
    assert base.tied == found.tied


@pytest.mark.parametrize("layout", ["sharded", "fused", "experts one by one", "turned", "towers"])
def test_transformers_loads_what_was_written(layout: str, pairs: Pairs, tmp_path: Path) -> None:
    """The loaded model has tuned's parameters, tied ones too, under base's config and names."""
    base, tuned = pairs(layout)
    write(base, Transplant(al.open_checkpoint(base).sites, donor=tuned), tmp_path / "out")
    kind = type(tiny(LAYOUTS[layout][0]))
    found, expected = (kind.from_pretrained(folder) for folder in (tmp_path / "out", tuned))

    for (name, one), (other, two) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(one, two), name
    assert expected.state_dict().keys() == found.state_dict().keys()
    assert isinstance(al.load(tmp_path / "out"), al.Lens)


@pytest.mark.parametrize("layout", ["fused", "fused by head", "experts stacked", "turned", "towers"])
def test_what_is_written_is_the_live_intervention(layout: str, pairs: Pairs, tmp_path: Path) -> None:
    """For each intervention on weights, the file has the lens's values inside the block."""
    base, tuned = pairs(layout)
    lens, sites = al.load(base), gates(al.open_checkpoint(base))
    for name, make in ON_WEIGHTS.items():
        found = write(base, make(sites, tuned), tmp_path / name)

        with lens.intervene(make(sites, tuned)):
            wrong = [s for s in lens.sites if not torch.equal(bits(lens.parameter(s)), bits(found.read(s)))]
        assert [] == wrong, name


@pytest.mark.parametrize("layout", ["sharded", "fused", "interleaved and turned", "turned"])
def test_heads_and_neurons_are_written_as_live(layout: str, pairs: Pairs, tmp_path: Path) -> None:
    """One head of q, k, v and o and one neuron of each MLP matrix change; their neighbours stay."""
    base, tuned = pairs(layout)
    lens, before = al.load(base), al.open_checkpoint(base)
    sites = []
    for site in before.sites.where(tower="language", layer=1, param="weight"):
        parts = before.units(site)
        if parts:
            sites.append(site.at(**{parts.kind: parts.count - 1}))
    for number, one in enumerate((Transplant(sites, donor=tuned), Zero(sites))):
        found = write(base, one, tmp_path / str(number))

        with lens.intervene(one):
            assert [] == [
                s for s in lens.sites if not torch.equal(bits(lens.parameter(s)), bits(found.read(s)))
            ]
        assert {site.at() for site in sites} == set(unlike(before, found))


@pytest.mark.parametrize("layout", ["single", "fused", "experts stacked", "turned"])
def test_interventions_see_what_those_before_them_left(layout: str, pairs: Pairs, tmp_path: Path) -> None:
    """Scale, half a transplant on it, a user's own and a zeroed head give what they give live."""
    base, tuned = pairs(layout)
    lens, before = al.load(base), al.open_checkpoint(base)
    sites = gates(before)
    interventions = [
        Scale(sites, factor=0.5),
        Transplant(sites | before.sites.where(role="q_proj"), donor=tuned, alpha=0.5),
        Mine((sites[1],)),
        Zero(before.sites.where(role="q_proj", layer=0, param="weight")[0].at(head=1)),
    ]

    found = write(base, interventions, tmp_path / "out")

    with lens.intervene(*interventions):
        assert [] == [s for s in lens.sites if not torch.equal(bits(lens.parameter(s)), bits(found.read(s)))]
    names = [step["intervention"] for step in read_record(tmp_path / "out")["interventions"]]
    assert ["Scale", "Transplant", "Mine", "Zero"] == names


@pytest.mark.parametrize("link", [False, True])
def test_what_is_not_edited_is_the_bytes_of_base(link: bool, pairs: Pairs, tmp_path: Path) -> None:
    """Shards without an edit are copies, or links if asked; in the others only the gates differ from base."""
    base, tuned = pairs("sharded")
    before = al.open_checkpoint(base)
    sites = gates(before).where(layer=0)
    found = write(base, Transplant(sites, donor=tuned), tmp_path / "out", link=link)
    changed = set()
    for file in sorted(base.glob("*.safetensors")):
        copy = tmp_path / "out" / file.name
        if file.read_bytes() != copy.read_bytes():
            changed.add(file.name)
        assert (link and file.name not in changed) == file.samefile(copy)
        with safe_open(file, "pt") as one, safe_open(copy, "pt") as two:
            assert list(one.offset_keys()) == list(two.offset_keys())
            assert one.metadata() == two.metadata()
    index = json.loads((base / "model.safetensors.index.json").read_text())

    assert {index["weight_map"][before.at(site).tensor] for site in sites} == changed
    assert len(changed) < len(set(index["weight_map"].values()))
    assert list(sites) == unlike(before, found)
    assert (base / "model.safetensors.index.json").read_bytes() == (
        tmp_path / "out" / "model.safetensors.index.json"
    ).read_bytes()


def test_a_system_that_can_not_copy_gives_the_same_bytes(
    pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the system lacks the call, refuses or copies nothing, the bytes are read and written."""
    base, tuned = pairs("sharded")
    one = Transplant(gates(al.open_checkpoint(base)), donor=tuned)
    write(base, one, tmp_path / "0")

    def refusing(*_: object) -> int:
        raise OSError(errno.EXDEV, "across disks")

    for number, copier in enumerate((None, refusing, lambda *_: 0), start=1):
        monkeypatch.setattr(os, "copy_file_range", copier, raising=False)
        write(base, one, tmp_path / str(number))
        for file in (tmp_path / "0").glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / str(number) / file.name).read_bytes()


@pytest.mark.parametrize("error", ERRORS)
def test_what_breaks_off_leaves_nothing(error: str, pairs: Pairs, tmp_path: Path) -> None:
    """On error half way through the weights no folder, file or new parent is left behind."""
    raised, expected = ERRORS[error]
    base = pairs("sharded")[0]
    before = listing(base.parent)
    with pytest.raises(expected):
        write(base, Breaking(al.open_checkpoint(base).sites, raised), tmp_path / "new" / "out")

    assert [] == listing(tmp_path)
    assert before == listing(base.parent)


def test_a_rename_that_fails_leaves_nothing(
    pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the last step leaves nothing behind either."""

    def denied(*_: object) -> None:
        raise OSError(errno.EACCES, "denied")

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(WriteError, match=r"out: can't be written \(Permission denied\)"):
        write(pairs("single")[0], Mine((gates(al.open_checkpoint(pairs("single")[0]))[0],)), tmp_path / "out")

    assert [] == listing(tmp_path)


def test_a_full_disk_is_told(pairs: Pairs, tmp_path: Path) -> None:
    """A limit on file sizes gives the same error as a full disk; the message has the system's words."""
    base = pairs("single")[0]
    sites = gates(al.open_checkpoint(base))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(WriteError, match="File too large"):
            write(base, Zero(sites), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert [] == listing(tmp_path)


def test_a_base_that_changes_meanwhile_is_told(pairs: Pairs, tmp_path: Path) -> None:
    """The output may mix two versions of the base, so it is removed."""
    base = shutil.copytree(pairs("sharded")[0], tmp_path / "base")

    class Touching:
        def edits(self, live: Checkpoint) -> Edits:
            def edit(site: Site, wanted: slice | None = None) -> Tensor:
                os.utime(next(base.glob("*-00002-*")))
                return live.read(site, wanted)

            return Edits(gates(live), edit)

    with pytest.raises(CheckpointError, match="changed while it was read"):
        write(base, Touching(), tmp_path / "out")

    assert ["base"] == [path.name for path in tmp_path.iterdir()]


@pytest.mark.parametrize("place", ["itself", "inside", "through a link", "a file", "in use"])
def test_no_place_that_is_taken_is_written_to(place: str, pairs: Pairs, tmp_path: Path) -> None:
    """Base's folder by any name, files, and folders in use are refused and not touched."""
    base = shutil.copytree(pairs("single")[0], tmp_path / "base")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes").write_text("kept")
    out = {
        "itself": base,
        "inside": base / "new" / "out",
        "through a link": tmp_path / "link" / "out",
        "a file": tmp_path / "file",
        "in use": tmp_path / "used",
    }[place]
    before = listing(tmp_path)

    with pytest.raises(WriteError, match=r"not empty|is inside|is a file"):
        write(base, Zero(gates(al.open_checkpoint(base))), out)

    assert before == listing(tmp_path)


def test_an_empty_folder_is_a_place(pairs: Pairs, tmp_path: Path) -> None:
    """An empty folder is accepted as the output."""
    (tmp_path / "out").mkdir()
    base = pairs("single")[0]

    assert write(base, Zero(gates(al.open_checkpoint(base))), tmp_path / "out").sites


def test_what_lies_beside_the_weights_goes_along(pairs: Pairs, tmp_path: Path) -> None:
    """They become shards with an index; tensors that shared storage are tied again after loading."""
    base = shutil.copytree(pairs("single")[0], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    with_code = {**config, "auto_map": {"AutoModel": "modeling_mine.Mine"}}
    kept = (
        "tokenizer.json",
        "chat_template.jinja",
        "vocab.txt",
        "LICENSE",
        "NOTICE.txt",
        "preprocessor_config.json",
    )
    left = ("optimizer.pt", "adapter_config.json", "adapter_model.safetensors", "README.md", RECORD,
            "pytorch_model.bin", "other.index.json", "events.out.tfevents")  # fmt: skip
    code = ("modeling_mine.py", "deeper/more.py")
    (base / "deeper").mkdir()
    for name in (*kept, *left, *code):
        (base / name).write_text('{"not": "ours"}')
    for number, said in enumerate((config, with_code)):
        (base / "config.json").write_text(json.dumps(said))
        out = tmp_path / f"out {number}"
        write(base, Zero(gates(al.open_checkpoint(base))), out)

        own = {"config.json", "generation_config.json", "model.safetensors", RECORD}
        files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        assert own | {*kept} | ({*code} if number else set()) == files
        assert "affectlens.edited/1" == read_record(out)["format"]
        assert [said] == [json.loads((out / "config.json").read_text())]


def test_torch_s_files_become_safetensors(
    pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's files become shards with an index; tensors that shared storage are tied again after loading."""
    monkeypatch.setattr(shards, "SHARD", 20_000)
    model = small("qwen2", tie_word_embeddings=True, num_hidden_layers=3).bfloat16()
    for folder in (tmp_path / "base", tmp_path / "tuned"):
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        nudge(model, "")
    base, tuned = (al.open_checkpoint(tmp_path / name) for name in ("base", "tuned"))

    found = write(base, Transplant(base.sites, donor=tuned), tmp_path / "out")

    assert [] == unlike(tuned, found)
    assert found.tied
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    files = [load_file(file) for file in sorted((tmp_path / "out").glob("model-*.safetensors"))]
    assert 1 < len(files)
    assert set(tuned.store.headers) == {name for file in files for name in file}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_over_its_base_is_written_merged(pairs: Pairs, tmp_path: Path) -> None:
    """An adapter is merged; with its gates reverted on top, only its other changes remain."""
    peft = pytest.importorskip("peft")
    model = small("llama")
    model.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=2, target_modules=["gate_proj", "q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    base = al.open_checkpoint(tmp_path / "base")
    tuned = al.open_checkpoint(tmp_path / "adapter", base=base)

    merged = write(tuned, [], tmp_path / "merged")
    reverted = write(tuned, Transplant(gates(base), donor=base), tmp_path / "reverted")

    assert [] == unlike(tuned, merged)
    assert list(base.sites.where(role="q_proj")) == unlike(base, reverted)
    step = read_record(tmp_path / "merged")["interventions"][0]
    assert ("Transplant", "adapter") == (step["intervention"], step["donor"]["name"])


def test_the_record_says_what_was_done(pairs: Pairs, tmp_path: Path) -> None:
    """It has each intervention, the sources by hash and the edits by role, and no path or command."""
    base, tuned = pairs("single")
    before = al.open_checkpoint(base)
    found = write(
        base, [Transplant(gates(before), donor=tuned, alpha=0.5), Zero(gates(before)[0])], tmp_path / "out"
    )
    text = (tmp_path / "out" / RECORD).read_text()
    record = read_record(tmp_path / "out")
    first, second = record["interventions"]

    assert before.identity == record["base"]
    assert al.open_checkpoint(tuned).identity == first.pop("donor")
    assert {"intervention": "Transplant", "alpha": 0.5, "sites": [repr(s) for s in gates(before)]} == first
    assert {"intervention": "Zero", "sites": [repr(gates(before)[0])]} == second
    size = sum(before.at(site).size for site in gates(before))
    counts = {"sites": 2, "tensors": 2, "parameters": size}
    assert {**counts, "roles": {"language gate_proj": counts}} == record["edited"]
    assert str(base.parent) not in text
    assert str(tmp_path) not in text
    assert {"affectlens", "torch"} <= record["versions"].keys()
    assert any(RECORD in note for note in found.store.notes)


def test_what_weights_do_not_carry_over_is_told(tmp_path: Path) -> None:
    """Another config setting and another dtype are listed."""
    model = small("llama")
    model.save_pretrained(tmp_path / "base")
    model.config.rms_norm_eps = 1e-3
    model.bfloat16().save_pretrained(tmp_path / "tuned")
    base = al.open_checkpoint(tmp_path / "base")
    write(base, Transplant(gates(base), donor=tmp_path / "tuned"), tmp_path / "out")

    told = " ".join(read_record(tmp_path / "out")["not_carried_over"]["tuned"])
    assert "rms_norm_eps" in told
    assert "another dtype" in told


@pytest.mark.parametrize(
    ("kind", "settings", "role", "deletes"),
    [
        ("llama", {}, "gate_proj", True),
        ("llama", {}, "down_proj", True),
        ("llama", {}, "q_proj", False),
        ("llama", {"mlp_bias": True}, "gate_proj", True),  # whose own biases are zeroed with them
        ("llama", {"hidden_act": "sigmoid"}, "gate_proj", False),
        ("gpt2", {}, "fc1", False),
    ],
)
def test_deleting_the_mlp_is_told_where_it_holds(
    kind: str, settings: dict[str, Any], role: str, deletes: bool, tmp_path: Path
) -> None:
    """Zero, or Scale by 0, of a gate, up or down deletes a gated MLP without biases."""
    small(kind, **settings).save_pretrained(tmp_path / "base")
    sites = al.open_checkpoint(tmp_path / "base").sites.where(role=role)

    def told(name: str, one: object) -> bool:
        write(tmp_path / "base", one, tmp_path / name)  # type: ignore[arg-type]
        return any("deletes the MLP" in words for words in read_record(tmp_path / name)["notices"])

    assert deletes == told("zero", Zero(sites))
    assert deletes == told("scale", Scale(sites, factor=0.0))
    assert not told("other", Scale(sites, factor=0.5))
    if settings.get("mlp_bias"):
        assert not told("weights", Zero(sites.where(param="weight")))


def test_what_can_not_be_written_is_refused(pairs: Pairs, tmp_path: Path) -> None:
    """A live model, activations, no intervention and a missing site are each refused."""
    base = al.open_checkpoint(pairs("single")[0])
    site, other = gates(base)[0], pairs("sharded")[1]
    cases: tuple[tuple[object, object, type[Exception], str], ...] = (
        (small("llama"), Zero(site), CheckpointError, "only in memory"),
        (base, Zero(base.sites.at("output")), LensError, "changes activations"),
        (
            base,
            Steer(base.sites.where(role="down_proj").at("output"), vector=torch.ones(64)),
            LensError,
            "no weights",
        ),
        (base, [], LensError, "nothing to write"),
        (
            base,
            Transplant(base.sites.where(role="norm"), donor=pairs("turned")[0]),
            NoSuchSite,
            "has no site",
        ),
    )
    for source, intervention, expected, words in cases:
        with pytest.raises(expected, match=words):
            write(source, intervention, tmp_path / "out")  # type: ignore[arg-type]
    assert other.exists()
    assert [] == listing(tmp_path)


def test_packed_weights_are_refused_and_the_rest_is_written(tmp_path: Path) -> None:
    """A weight stored as fp8 numbers and scales can't be edited; a norm in the same file can."""
    model = small("llama")
    model.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    base = al.open_checkpoint(tmp_path / "base")

    with pytest.raises(CheckpointError, match=r"gate_proj.*stored packed"):
        write(base, Zero(gates(base)), tmp_path / "out")
    found = write(base, Zero(base.sites.where(role="norm")), tmp_path / "out")

    assert list(base.sites.where(role="norm")) == unlike(base, found)


def test_a_second_copy_of_an_edited_tensor_is_refused(pairs: Pairs, tmp_path: Path) -> None:
    """A reader of the second copy would see the old weights."""
    base = shutil.copytree(pairs("sharded")[0], tmp_path / "base")
    files = sorted(base.glob("*.safetensors"))
    first, second = (load_file(file) for file in files[:2])
    site = next(s for s in al.open_checkpoint(base).sites if al.open_checkpoint(base).at(s).tensor in first)
    tensor = al.open_checkpoint(base).at(site).tensor
    save_file({**second, tensor: first[tensor]}, files[1])

    with pytest.raises(CheckpointError, match="is stored in two files"):
        write(base, Zero(site), tmp_path / "out")


def test_a_part_of_a_model_is_edited_as_a_file(pairs: Pairs, tmp_path: Path) -> None:
    """A single file is copied with its companions; the output may be inside its folder."""
    folder = tmp_path / "folder"
    shutil.copytree(pairs("single")[0], folder)
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    base = al.open_checkpoint(folder / "mine.safetensors")

    found = write(base, Zero(gates(base)), folder / "out")

    assert list(gates(base)) == unlike(base, found)
    assert (folder / "out" / "model.safetensors").exists()
    assert isinstance(al.load(folder / "out").model, nn.Module)


def test_a_base_on_a_hub_is_fetched_into_its_cache(
    pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The licence comes along; the record names repository and commit, and no folder of the cache."""
    base = pairs("sharded")[0]
    files = {path.name: path.read_bytes() for path in base.iterdir()} | {"LICENSE": b"free"}
    with posing(monkeypatch, cache=tmp_path / "cache") as hub:
        commit = hub.push("lab/tiny", files)
        sites = gates(al.open_checkpoint("lab/tiny"))
        found = write("lab/tiny", Zero(sites), tmp_path / "out", link=True)

    record = read_record(tmp_path / "out")
    assert list(sites) == unlike(al.open_checkpoint(base), found)
    assert ("lab/tiny", commit) == (record["base"]["name"], record["base"]["revision"])
    assert b"free" == (tmp_path / "out" / "LICENSE").read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert str(tmp_path) not in (tmp_path / "out" / RECORD).read_text()


def test_rows_without_a_value_take_no_time(tmp_path: Path) -> None:
    """A header may claim any number of empty rows."""
    tensors = {
        "model.layers.0.mlp.gate_proj.weight": torch.empty(2**60, 0),
        "model.norm.weight": torch.ones(4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    base = al.open_checkpoint(tmp_path / "model.safetensors")

    found = write(base, Zero(base.sites), tmp_path / "out")

    assert base.store.headers == found.store.headers
    assert not found.read(found.sites.where(role="norm")[0]).any()


def test_a_donors_bytes_are_copied_from_where_they_lie(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tensors of one dtype are copied as bytes; another alpha, dtype or part makes them anew."""
    base, tuned = tiny("llama"), nudge(tiny("llama"), "gate_proj")
    folders = [save(model, name) for name, model in (("lying-base", base), ("lying-tuned", tuned))]
    half = save(nudge(tiny("llama"), "gate_proj").to(torch.bfloat16), "lying-half")
    made: list[str] = []
    blocks = shards.blocks
    monkeypatch.setattr(
        shards, "blocks", lambda store, tensor: (made.append(tensor), blocks(store, tensor))[1]
    )
    gates = al.open_checkpoint(folders[0]).sites.where(role="gate_proj")
    plans = {
        "as it is": Transplant(gates, donor=folders[1]),
        "half of it": Transplant(gates, donor=folders[1], alpha=0.5),
        "another dtype": Transplant(gates, donor=half),
        "a part of it": Transplant(gates[0].at(neuron=1), donor=folders[1]),
    }
    counts = {}
    for name, plan in plans.items():
        made.clear()
        found = write(folders[0], plan, tmp_path / name)
        counts[name] = len(made)
        live = al.Lens(tiny("llama"))
        with live.intervene(plan):
            assert all(torch.equal(live.parameter(site), found.read(site)) for site in found.sites)

    assert {"as it is": 0, "half of it": 2, "another dtype": 2, "a part of it": 1} == counts
