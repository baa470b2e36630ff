"""Names propose, a forward pass disposes: test the roles of a live model's parameters by what they do.

    storage ── groups (one MLP, expert or attention) ── a probe on a bench ──▶ verdicts by tensor ──▶ claims

A checkpoint's sites say which slice of which tensor is a gate, a query or another role. Each claim is tested
on copies of the modules, with inputs recorded from the model: it is confirmed, refuted, or unverified with a
reason.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from affectlens.checkpoints import Checkpoint
from affectlens.probes.attention import probe_attention
from affectlens.probes.bench import Bench, Unprobed, owner
from affectlens.probes.calls import Call, recorded
from affectlens.probes.claims import Claim, Verification
from affectlens.probes.feed_forward import probe_gated, probe_plain, worst
from affectlens.probes.responses import Seen
from affectlens.sites import Site, Storage

_FAMILIES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("q_proj", "k_proj", "k_nope", "v_proj", "o_proj"),
)
_ALIVE = 2  # experts of a stacked tensor that have to respond; the rest are cut out by the same rule


class _Group(NamedTuple):
    """The sites of one MLP (of one expert) or one attention."""

    sites: dict[str, tuple[Site, Storage]]
    home: str  # the innermost module that holds them all

    @property
    def storage(self) -> dict[str, Storage]:
        return {role: where for role, (_, where) in self.sites.items()}


def verify(
    model: nn.Module, checkpoint: Checkpoint, *, batch: Mapping[str, Tensor] | None = None
) -> Verification:
    """Test the roles that `checkpoint` gives the parameters of `model` by what they do in it.

    `batch` is an input of the model; without one, made-up inputs are tried for the model and each of its
    towers. The model keeps every bit: only copies of single modules are changed.
    """
    groups = _groups(checkpoint.storage, dict(model.named_modules(remove_duplicate=False)))
    chains = {name for group in groups for name in _chain(group.home)}
    modules = dict(model.named_modules())
    calls, failure = recorded(model, sorted(chains & modules.keys()), batch=batch)
    seen: dict[tuple[str, str], list[Seen]] = defaultdict(list)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for group in groups:
            stacked = {(w.tensor, r) for r, (_, w) in group.sites.items() if w.expert is not None}
            done = stacked and all(_alive(seen[key]) >= _ALIVE for key in stacked)
            for role, said in ({} if done else _probe(group, modules, calls, failure)).items():
                seen[group.sites[role][1].tensor, role].append(said)
    return Verification(tuple(_claims(checkpoint.storage, groups, seen)))


def _alive(seen: Iterable[Seen]) -> int:
    return sum(one.verdict != "unverified" for one in seen)


def _claims(
    storage: Mapping[Site, Storage], groups: Iterable[_Group], seen: Mapping[tuple[str, str], list[Seen]]
) -> Iterable[Claim]:
    by_tensor: dict[str, dict[str, Site]] = defaultdict(dict)
    for site, where in storage.items():
        if any(site.role in family for family in _FAMILIES) and _is_matrix(site, where):
            by_tensor[where.tensor].setdefault(site.role, site)
    for tensor, sites in by_tensor.items():
        found = {
            r: worst(seen.get((tensor, r), [Seen("unverified", "its partner matrices are missing")]))
            for r in sites
        }
        worst_first = sorted(
            found.items(), key=lambda item: ("refuted", "unverified", "confirmed").index(item[1].verdict)
        )
        role, said = worst_first[0]
        reason = f"{role}: {said.reason}" if len(found) > 1 else said.reason
        one = next(iter(sites.values()))
        yield Claim(tensor, one.parameter, one.tower, one.layer, tuple(sites), said.verdict, reason)


def _probe(
    group: _Group, modules: Mapping[str, nn.Module], calls: Mapping[str, Call], failure: str
) -> dict[str, Seen]:
    """Probe a group on the innermost module that was called; where no probe decides, give the reason."""
    probe, needs = _probe_for(group)
    if missing := needs - group.sites.keys():
        why = f"{' and '.join(sorted(missing))} not found beside it"
        return dict.fromkeys(group.sites, Seen("unverified", why))
    why, best = "", dict[str, Seen]()
    for name, call in _candidates(group, modules, calls):
        try:
            seen = probe(Bench(name, modules[name], call=call), group.storage)
        except Unprobed as problem:
            why = why or str(problem)
        except Exception as problem:  # a model may raise anything, and its check must not crash
            why = why or f"{type(problem).__name__}: {problem}"[:200]
        else:
            best = {role: worst([best.get(role, one), one]) for role, one in seen.items()}
            if _alive(best.values()) == len(group.sites):
                break
    why = why or f"no input reaches it{f' ({failure})' if failure else ''}"
    return {role: best.get(role, Seen("unverified", why)) for role in group.sites}


def _probe_for(
    group: _Group,
) -> tuple[Callable[[Bench, Mapping[str, Storage]], dict[str, Seen]], set[str]]:
    if "fc1" in group.sites or "fc2" in group.sites:
        return probe_plain, {"fc1", "fc2"}
    if group.sites.keys() & {"gate_proj", "up_proj", "down_proj"}:
        return probe_gated, {"gate_proj", "up_proj", "down_proj"}
    return probe_attention, set()


def _candidates(
    group: _Group, modules: Mapping[str, nn.Module], calls: Mapping[str, Call]
) -> Iterable[tuple[str, Call]]:
    chain = [name for name in _chain(group.home) if name in modules]
    yield from [(name, calls[name]) for name in chain if name in calls][:2]
    # For an expert that no token chose or a layer that was skipped, the call of a module of its kind serves.
    home = modules.get(group.home)
    if home is None:
        return
    for name, call in calls.items():
        other = modules[name]
        if name != group.home and type(other) is type(home) and _shapes(other) == _shapes(home):
            yield group.home, call
            return
    width = next(
        (w.shape[1] for r, (_, w) in group.sites.items() if r in ("gate_proj", "fc1") and len(w.shape) == 2),
        0,
    )
    # An MLP takes any states of its width; an attention needs masks and positions, which can't be made up.
    if width and "q_proj" not in group.sites:
        parameter = next(home.parameters())
        states = torch.randn(1, 8, width, device=parameter.device)
        yield group.home, Call((states,), {})


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in module.parameters()]


def _groups(storage: Mapping[Site, Storage], modules: Mapping[str, nn.Module]) -> list[_Group]:
    """Group the sites that work together: by layer and expert, then by the length of the shared path."""
    found: list[_Group] = []
    for family in _FAMILIES:
        parts: dict[tuple[object, ...], dict[str, list[tuple[Site, Storage]]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for site, where in storage.items():
            if site.role in family and _is_matrix(site, where):
                parts[site.tower, site.stack, site.layer, site.expert][site.role].append((site, where))
        for roles in parts.values():
            found += _clusters(family, roles)
    return found


def _is_matrix(site: Site, where: Storage) -> bool:
    return site.param != "bias" and len(where.shape) >= 2


def _clusters(family: tuple[str, ...], roles: Mapping[str, list[tuple[Site, Storage]]]) -> Iterable[_Group]:
    """Yield a group around each site of the last role; every other site joins the nearest group."""
    last = next(role for role in reversed(family) if role in roles)
    groups: list[dict[str, tuple[Site, Storage]]] = [{last: one} for one in roles[last]]
    for role in family:
        for one in roles.get(role, ()):
            if role == last:
                continue
            near = max(groups, key=lambda group: (_shared(one, group[last]), role not in group))
            if role in near:
                groups.append({role: one, last: near[last]} if _shared(one, near[last]) else {role: one})
            else:
                near[role] = one
    for group in groups:
        yield _Group(group, _common([owner(where.tensor) for _, where in group.values()]))


def _shared(one: tuple[Site, Storage], other: tuple[Site, Storage]) -> int:
    common = _common([owner(one[1].tensor), owner(other[1].tensor)])
    return len(common.split(".")) if common else 0


def _common(names: list[str]) -> str:
    parts = [name.split(".") for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)


def _chain(home: str) -> list[str]:
    """Return a module and the two around it, which usually ends at the layer."""
    parts = home.split(".") if home else []
    return [".".join(parts[: len(parts) - up]) for up in range(3) if len(parts) - up > 0] or [""]
