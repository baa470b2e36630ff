"""How large each tower of a live model is, and where it lies."""

from collections.abc import Mapping

from torch import Tensor

from affectlens.checkpoints import Checkpoint

COLUMNS = ("tower", "parameters", "sites", "layers", "dtype", "device", "memory")


def tower_sizes(checkpoint: Checkpoint, parameters: Mapping[str, Tensor]) -> list[tuple[object, ...]]:
    """Return a row of `COLUMNS` for each tower of a live model; a tied tensor counts once."""
    rows: list[tuple[object, ...]] = []
    for tower in dict.fromkeys(site.tower for site in checkpoint.storage):
        sites = [site for site in checkpoint.storage if site.tower == tower]
        names = dict.fromkeys(checkpoint.storage[site].tensor for site in sites)
        tensors = [parameters[name] for name in names if name in parameters]
        dtypes = dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
        devices = dict.fromkeys(str(tensor.device) for tensor in tensors)
        layers = {site.layer for site in sites if site.layer is not None}
        count, size = sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
        where = (", ".join(dtypes), ", ".join(devices), f"{size / 1e6:,.1f} MB")
        rows.append((tower, count, len(sites), len(layers), *where))
    return rows
