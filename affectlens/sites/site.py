"""The site: one canonical, unfused parameter, the key of everything that follows."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Site:
    """Name a parameter by what it does and where, not by how a file happens to store it.

    Two layouts of one model give equal sites: `parameter`, the canonical name as transformers
    names it in memory, is shown but takes no part in the comparison.

    >>> Site("language", "gate_proj", layer=12)
    language.12.gate_proj
    """

    tower: str
    role: str
    layer: int | None = None
    stack: str | None = None
    param: str = "weight"
    expert: int | None = None
    label: str = ""  # tells apart the sites of a layer that share a role, e.g. its norms
    parameter: str = field(default="", compare=False)

    def __repr__(self) -> str:
        layer = None if self.layer is None else str(self.layer)
        expert = None if self.expert is None else f"experts.{self.expert}"
        role = f"{self.role}({self.label})" if self.label else self.role
        param = None if self.param == "weight" else self.param
        return ".".join(p for p in (self.tower, self.stack, layer, expert, role, param) if p)

    def __lt__(self, other: "Site") -> bool:
        return _order(self) < _order(other)


def _order(site: Site) -> tuple[object, ...]:
    layer = -1 if site.layer is None else site.layer
    expert = -1 if site.expert is None else site.expert
    return site.tower, site.stack or "", layer, expert, site.role, site.label, site.param
