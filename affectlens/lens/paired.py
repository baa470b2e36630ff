"""Keep a second model beside the first: only the tensors that differ, or its adapter's factors."""

import torch
from torch import Tensor, nn

from affectlens.checkpoints import Checkpoint, Source, open_checkpoint
from affectlens.checkpoints.checkpoint import AdapterChange
from affectlens.checkpoints.memory import HELD, MemoryStore
from affectlens.checkpoints.pairing import pair
from affectlens.checkpoints.store import JoinedStore
from affectlens.errors import LensError
from affectlens.lens.holding import Running, hold
from affectlens.lens.hooks.places import parameter_name
from affectlens.lens.hooks.recomputing import refuse_late
from affectlens.lens.live import Live, as_donor, remark
from affectlens.lens.restoring import Swaps, atomic, interruptible, raise_waiting
from affectlens.lens.swapping import Beside, Swap, beside, fits_beside, guard, swapped
from affectlens.sites import Site, Sites


class Paired:
    """Holds what a tuned model has and the live one does not, and switches between the two by pointer.

        pair = lens.paired("runs/affect")  # reads and compares; the repr says what would be kept
        with pair.tuned():                 # loaded at the first use
            lens.logits(example)

    Of a LoRA adapter the factors are kept and applied as PEFT does, to the input of each matrix. Everything
    else that differs is kept as whole tensors. Raises `LensError` where the tuned model has parameters that
    this model lacks.
    """

    def __init__(self, lens: Live, tuned: Source | Live) -> None:
        self._lens, self._state = lens, _state(lens)
        self.source: Checkpoint = open_checkpoint(as_donor(tuned), base=lens.checkpoint.untouched)
        pairing = pair(lens.checkpoint.untouched, self.source)
        if unmatched := pairing.reshaped | pairing.only_tuned:
            name = self.source.store.name
            raise LensError(
                f"{name} has {len(unmatched)} parameters that this model lacks or has in another shape; "
                f"first: {unmatched[0]}. Load the base that it was tuned from"
            )
        # Files are compared with files: the dtype in which a model runs does not tell two models apart.
        files = lens.source if self.source.change is None and self.source.store.format != "memory" else None
        self.unlike = pairing.unlike if files is None else pair(files, self.source).unlike
        self._factors = {
            site: one for site, one in self.source.factors.items() if fits_beside(lens, site, factors=one)
        }
        self.differing = Sites(s for s in pairing.comparable if s in self._factors or self._differs(s))
        self._held: list[Swap] | None = None
        self._hooks: list[tuple[nn.Module, Beside]] = []

    @property
    def bytes(self) -> int:
        """Bytes held beside the live model: the tensors that differ, and the factors of an adapter."""
        names = {
            parameter_name(self._lens.checkpoint.at(site))
            for site in self.differing
            if site not in self._factors
        }
        tensors = [self._lens.parameters[name] for name in names]
        factors = {
            (id(f.store), n): f.store.headers[n] for f in self._factors.values() for n in (f.pair.a, f.pair.b)
        }
        sizes = [torch.Size(header.shape).numel() * _width(header.dtype) for header in factors.values()]
        return sum(t.numel() * t.element_size() for t in tensors) + sum(sizes)

    @property
    def donor(self) -> Checkpoint:
        """The tuned model as a donor of interventions; what is held is read from memory, by pointer."""
        if self._factors:
            return self.source
        self._load()
        live = self._lens.checkpoint.untouched
        names = {id(parameter): name for name, parameter in self._lens.parameters.items()}
        held = {names[id(owner)]: value for owner, _, value in self._held or ()}
        store = MemoryStore(held, name=self.source.store.name, config=self.source.config)
        parts = {name: (store if name in held else live.store, name) for name in live.store.headers}
        return Checkpoint(JoinedStore(store, parts, config=self.source.config), like=live)

    def effective(self) -> Checkpoint:
        """Return the live weights combined with the factors: the effective weights inside `tuned()`."""
        live = self._lens.checkpoint
        change = AdapterChange(live, laid={}, whole={}, factors=self._factors, skipped={})
        found = Checkpoint(live.store, change=change)
        found.untouched = live.untouched
        return found

    def tuned(self) -> "Switched":
        """Switch to the tuned model for the length of a `with` block."""
        return Switched(self)

    def _differs(self, site: Site) -> bool:
        here, there = self._lens.checkpoint.untouched.read(site), self.source.read(site)
        return not torch.equal(here, there.to(device=here.device, dtype=here.dtype))

    def _tuned(self, site: Site) -> Tensor:
        """Read a site of tuned; a file that holds only trained parameters leaves the others as in base."""
        side = self.source if site in self.source.storage else self._lens.checkpoint.untouched
        return side.read(site)

    def _load(self) -> None:
        if self._held is not None:
            return
        live, groups = self._lens.checkpoint, dict[str, list[Site]]()
        for site, where in live.storage.items():
            groups.setdefault(parameter_name(where), []).append(site)
        changed = {parameter_name(live.at(site)) for site in self.differing - self._factors}
        held: list[Swap] = []
        for name in sorted(changed):  # one parameter at a time, so that the peak memory is what is kept
            held += swapped(self._lens, {site: self._tuned(site) for site in groups[name]})
        self._hooks = [beside(self._lens, site, factors=one) for site, one in self._factors.items()]
        self._held = held

    def __repr__(self) -> str:
        tensors = self._lens.parameters.values()
        whole = sum(t.numel() * t.element_size() for t in tensors)
        kind = "the factors of an adapter" if self._factors else "what differs"
        count = f"{len(self.differing)} of {len(self._lens.checkpoint.sites)} sites differ"
        lines = [f"Paired({count}: {kind} takes {_size(self.bytes)} beside {_size(whole)})", *self.unlike]
        return "\n".join(lines)


class Switched:
    """Block in which the tuned model replaces the live one."""

    def __init__(self, paired: Paired) -> None:
        self._paired, self._swaps = paired, Swaps()

    @atomic
    def __enter__(self) -> None:
        self._swaps.open()
        try:
            lens = self._paired._lens
            hold(self._swaps, lens.model, adapters_off=lens.adapters_off)
            self._ready()
            guard(self._swaps, lens, edits=self._paired.differing)
            refuse_late(self._swaps, lens.model)
            for owner, name, value in self._paired._held or ():
                self._swaps.swap(owner, name, value=value)
            if self._paired._hooks and not any(hook.on for _, hook in self._paired._hooks):
                self._put(self._paired._hooks)
            raise_waiting()
        except BaseException:
            self._swaps.undo()
            raise

    @atomic
    def __exit__(self, *_: object) -> None:
        self._swaps.undo()

    def _put(self, hooks: list[tuple[nn.Module, Beside]]) -> None:
        """Apply the factors; a nested block of the same pair finds them applied."""
        lens = self._paired._lens
        for site in self._paired._factors:
            parameter = lens.parameters[parameter_name(lens.checkpoint.at(site))]
            if parameter in HELD:  # tuned = untouched base + factors
                self._swaps.swap(parameter, "data", value=HELD[parameter][0].before)
        self._swaps.swap(lens, "shown", value=self._paired.effective())
        for module, hook in hooks:
            self._swaps.swap(hook, "on", value=True)
            self._swaps.hook(module, hook, side="weights")

    @interruptible
    def _ready(self) -> None:
        lens = self._paired._lens
        if _state(lens) != self._paired._state:
            raise LensError(
                "tensors or adapters of the model have changed since it was paired; pair it again: "
                "lens.paired(…)"
            )
        for words in self._paired.unlike:
            remark(self._paired._lens, words)
        self._paired._load()


def _state(lens: Live) -> object:
    """Return what tells whether a lens's model, with the adapters that it runs with, has changed."""
    with Running(lens):
        return lens.known.state(lens.model)


def _width(dtype: str) -> int:
    kind: torch.dtype = getattr(torch, dtype)
    return kind.itemsize


def _size(count: int) -> str:
    size, unit = next(
        (count / 1000**power, unit)
        for power, unit in ((3, "GB"), (2, "MB"), (1, "kB"), (0, "B"))
        if count >= 1000**power or not power
    )
    return f"{size:.3g} {unit}"
