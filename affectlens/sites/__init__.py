"""WHERE: names and shapes become canonical sites, and each site knows its slice of storage.

    names, shapes ─ naming ─▶ canonical names ─ placing (towers, roles, mlps) ─▶ tower, stack, layer, role
                  ─ fusing ─▶ the parts of fused tensors ─ locating ─▶ Site, and Storage: where it lies

Neither torch nor transformers is needed to say where a parameter belongs.
"""

from affectlens.sites.layout import Laid, lay_out, record
from affectlens.sites.locating import locate, sites_of
from affectlens.sites.mlps import MLP
from affectlens.sites.names import bare_name, canonical, recognised
from affectlens.sites.points import Point, Points, Span
from affectlens.sites.roles import ATTENTION
from affectlens.sites.site import Cut, Site, Storage, Units, units
from affectlens.sites.sites import Sites
from affectlens.sites.tower_configs import heads, model_type, sections
from affectlens.sites.tree import drawn, layers, nodes

__all__ = [
    "ATTENTION",
    "MLP",
    "Cut",
    "Laid",
    "Point",
    "Points",
    "Site",
    "Sites",
    "Span",
    "Storage",
    "Units",
    "bare_name",
    "canonical",
    "drawn",
    "heads",
    "lay_out",
    "layers",
    "locate",
    "model_type",
    "nodes",
    "recognised",
    "record",
    "sections",
    "sites_of",
    "units",
]
