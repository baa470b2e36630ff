"""The site: one canonical, unfused parameter, the key of everything that follows."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Site:
    """Name a parameter by what it does and where, not by how a file happens to store it.

    Two layouts of one model give equal sites: `parameter`, the canonical name as transformers
    names it in memory, is shown but takes no part in the comparison. `head` and `neuron` go below the
    parameter: one head of q, k, v or o, one unit of an MLP.

    >>> Site("language", "gate_proj", layer=12)
    language.12.gate_proj
    >>> Site("language", "q_proj", layer=12).at(head=3)
    language.12.q_proj[head 3]
    """

    tower: str
    role: str
    layer: int | None = None
    stack: str | None = None
    param: str = "weight"
    expert: int | None = None
    label: str = ""  # tells apart the sites of a layer that share a role, e.g. its norms
    parameter: str = field(default="", compare=False)
    head: int | None = None
    neuron: int | None = None

    def at(self, *, head: int | None = None, neuron: int | None = None) -> "Site":
        """The head or neuron of this number; with neither, the whole parameter."""
        if head is not None and neuron is not None:
            raise ValueError("a head or a neuron, not both: no matrix has both")
        if head is neuron is None and self.head is self.neuron is None:
            return self
        return replace(self, head=head, neuron=neuron)

    def __repr__(self) -> str:
        layer = None if self.layer is None else str(self.layer)
        expert = None if self.expert is None else f"experts.{self.expert}"
        role = f"{self.role}({self.label})" if self.label else self.role
        param = None if self.param == "weight" else self.param
        name = ".".join(p for p in (self.tower, self.stack, layer, expert, role, param) if p)
        below = {"head": self.head, "neuron": self.neuron}
        return name + "".join(f"[{kind} {n}]" for kind, n in below.items() if n is not None)

    def __lt__(self, other: "Site") -> bool:
        return _order(self) < _order(other)


def _order(site: Site) -> tuple[object, ...]:
    layer, expert, head, neuron = (
        -1 if n is None else n for n in (site.layer, site.expert, site.head, site.neuron)
    )
    return site.tower, site.stack or "", layer, expert, site.role, site.label, site.param, head, neuron
