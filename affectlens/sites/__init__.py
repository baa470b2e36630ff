"""WHERE: turn the names and shapes of tensors into canonical sites, each with its slice of storage.

    names, shapes ─ names ─▶ canonical names ─ placement (towers, roles, mlps) ─▶ tower, stack, layer, role
                  ─ fused, layout ─▶ the parts of each tensor ─ locating ─▶ Site → Storage

No module here needs torch or transformers.
"""

from affectlens.sites.layout import Laid, lay_out, record
from affectlens.sites.locating import locate, sites_of
from affectlens.sites.mlps import MLP
from affectlens.sites.names import bare_name, canonical, recognised
from affectlens.sites.points import Point, Points, Span
from affectlens.sites.roles import ATTENTION
from affectlens.sites.site import Cut, Site, Storage, Units, units
from affectlens.sites.sites import Sites
from affectlens.sites.tower_configs import heads, model_type, sections, ties
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
    "ties",
    "units",
]
