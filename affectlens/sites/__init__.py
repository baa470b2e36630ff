"""WHERE: names and shapes become canonical sites, and each site knows its slice of storage.

    names, shapes ── naming ──▶ canonical names ── roles ──▶ tower, layer, role ── locating ──▶ Site

Neither torch nor transformers is needed to say where a parameter belongs.
"""

from affectlens.sites.locating import locate
from affectlens.sites.roles import ATTENTION, MLP
from affectlens.sites.site import Site
from affectlens.sites.sites import Sites
from affectlens.sites.storage import Cut, Storage

__all__ = ["ATTENTION", "MLP", "Cut", "Site", "Sites", "Storage", "locate"]
