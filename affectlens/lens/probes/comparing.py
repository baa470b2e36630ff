"""Whether a file's sites are those of the model that was loaded from it: same places, same values."""

from collections.abc import Iterator

import torch

from affectlens.checkpoints import Checkpoint
from affectlens.sites import ATTENTION, MLP, Site

PROBED = (*MLP, *ATTENTION, "fc1", "fc2", "k_nope")


def astray(file: Checkpoint, live: Checkpoint) -> Iterator[tuple[Site, str]]:
    """The sites of a file whose values the live model has elsewhere, each with what is wrong.

    Probes test the live model. That the slices and names of the file mean the same is what loading
    shows: transformers has put each tensor where it belongs.
    """
    for site in file.sites:
        if site.role not in PROBED or site.param != "weight":
            continue
        if site not in live.storage:
            yield site, "the loaded model has no such parameter"
        elif file.shape(site) != live.shape(site):
            yield (
                site,
                f"it has shape {file.shape(site)} in the file and {live.shape(site)} in the loaded model",
            )
        elif not _equal(file, live, site):
            yield site, "the loaded model has other values there"


def _equal(file: Checkpoint, live: Checkpoint, site: Site) -> bool:
    here = live.read(site)
    if here.device.type == "meta":
        return True
    there, here = file.read(site).to(here.dtype), here.cpu()
    # A NaN that was cast need not have the same bits, and is the same value all the same.
    return torch.equal(there, here) or bool(((there == here) | (there.isnan() & here.isnan())).all())
