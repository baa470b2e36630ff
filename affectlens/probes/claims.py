"""Claim and Verification: a role that names assign, the verdict on it, and the table of all verdicts.

Probes decide the claims on a live model; `beside` adds where a file disagrees with the model loaded from it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from affectlens import html, printable
from affectlens.checkpoints import Checkpoint
from affectlens.errors import RoleRefuted
from affectlens.sites import ATTENTION, MLP, Site

PROBED = (*MLP, *ATTENTION, "fc1", "fc2", "k_nope")
VERDICTS = ("confirmed", "refuted", "unverified")


@dataclass(frozen=True)
class Claim:
    """The roles that names give one tensor, and the verdict of the live model on them."""

    tensor: str
    parameter: str
    tower: str
    layer: int | None
    roles: tuple[str, ...]
    verdict: str
    reason: str


@dataclass(frozen=True)
class Verification:
    """All claims of a model's roles, each with its verdict."""

    claims: tuple[Claim, ...]

    @property
    def confirmed(self) -> tuple[Claim, ...]:
        """The claims that the model confirms."""
        return self._where("confirmed")

    @property
    def refuted(self) -> tuple[Claim, ...]:
        """The claims that the model contradicts."""
        return self._where("refuted")

    @property
    def unverified(self) -> tuple[Claim, ...]:
        """The claims that no probe could decide, each with the reason."""
        return self._where("unverified")

    def check(self) -> "Verification":
        """Return itself; raise `RoleRefuted` if the model contradicts a claim."""
        if self.refuted:
            said = "; ".join(
                f"{c.tensor!r} is not {' + '.join(c.roles)}: {c.reason}" for c in self.refuted[:8]
            )
            more = f"; and {len(self.refuted) - 8} more" if len(self.refuted) > 8 else ""
            raise RoleRefuted(f"{len(self.refuted)} of {len(self.claims)} claims refuted: {said}{more}")
        return self

    def beside(self, file: Checkpoint, live: Checkpoint) -> "Verification":
        """Return the claims and those that a file makes differently from the model loaded from it."""
        found = tuple(
            Claim(file.at(site).tensor, site.parameter, site.tower, site.layer, (site.role,), "refuted", why)
            for site, why in _disagreeing(file, live)
        )
        return Verification(self.claims + found)

    def _where(self, verdict: str) -> tuple[Claim, ...]:
        return tuple(claim for claim in self.claims if claim.verdict == verdict)

    def _rows(self) -> list[tuple[object, ...]]:
        counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for claim in self.claims:
            counts[claim.tower, " + ".join(claim.roles)][claim.verdict] += 1
        return [(*key, *(count[v] for v in VERDICTS)) for key, count in sorted(counts.items())]

    def __repr__(self) -> str:
        lines = [f"{len(self.claims)} claims: " + ", ".join(f"{len(self._where(v))} {v}" for v in VERDICTS)]
        for tower, roles, *counts in self._rows():
            said = ", ".join(f"{n} {v}" for n, v in zip(counts, VERDICTS, strict=True) if n)
            lines.append(f"{printable.plain(tower):10} {roles:22} {said}")
        for claim in (*self.refuted, *self.unverified):
            lines.append(f"{claim.verdict}: {printable.plain(claim.tensor)}: {printable.plain(claim.reason)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        drawn = html.table(("tower", "role", *VERDICTS), self._rows(), caption=f"{len(self.claims)} claims")
        for verdict in ("refuted", "unverified"):
            rows = [(c.tensor, " + ".join(c.roles), c.reason) for c in self._where(verdict)]
            drawn += html.table(("tensor", "claimed", "seen"), rows, caption=verdict) if rows else ""
        return drawn


def _disagreeing(file: Checkpoint, live: Checkpoint) -> Iterator[tuple[Site, str]]:
    """Yield the sites of a file that the live model does not have there, each with the reason.

    Probes test the live model alone. Its values show whether the file's names and slices mean the same, since
    transformers has put each stored tensor in its place.
    """
    for site in file.sites:
        if site.role not in PROBED or site.param != "weight":
            continue
        if site not in live.storage:
            yield site, "the loaded model has no such parameter"
        elif file.shape(site) != live.shape(site):
            here, there = live.shape(site), file.shape(site)
            yield site, f"it has shape {there} in the file and {here} in the loaded model"
        elif not _equal(file, live, site):
            yield site, "the loaded model has other values there"


def _equal(file: Checkpoint, live: Checkpoint, site: Site) -> bool:
    here = live.read(site)
    if here.device.type == "meta":
        return True  # its values are on disk, so nothing contradicts the file
    there, here = file.read(site).to(here.dtype), here.cpu()
    # `torch.equal` takes no NaN for equal; two NaNs in one place are no disagreement.
    return torch.equal(there, here) or bool(((there == here) | (there.isnan() & here.isnan())).all())
