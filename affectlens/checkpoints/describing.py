"""What a checkpoint is, in a dozen lines: towers, layers, the language model, what is unusual, coverage."""

from collections import Counter
from collections.abc import Iterator, Mapping

from affectlens.checkpoints.checkpoint import Checkpoint
from affectlens.errors import quoted
from affectlens.sites import Site, bare_name

_FUSED = ("qkv_proj", "kv_proj", "gate_up_proj", "kv_b_proj")


def describe(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Rows of (what, value) for people to read."""
    who = checkpoint.identity
    towers: Counter[str] = Counter()
    for site, storage in checkpoint.storage.items():
        towers[site.tower] += storage.size
    tied = "output embedding tied to the input embedding" if checkpoint.tied else "no"
    return [
        ("checkpoint", who["name"]),
        ("format", who["format"]),
        ("model type", who["model_type"]),
        ("parameters", f"{checkpoint.parameters:,} in {len(checkpoint.laid)} tensors"),
        *((f"· {tower}", f"{count:,}") for tower, count in towers.most_common()),
        ("language", _language(checkpoint)),
        ("dtype", who["dtype"]),
        ("tied", tied),
        ("header", who.get("header_sha256", "none: in memory")),
        *(("unusual", remark) for remark in unusual(checkpoint)),
        ("coverage", f"{coverage(checkpoint):.1%} of the parameters have a role"),
    ]


def coverage(checkpoint: Checkpoint) -> float:
    """The share of the parameters whose role is known."""
    named = sum(where.size for site, where in checkpoint.storage.items() if site.role != "other")
    return named / (checkpoint.parameters or 1)


def unusual(checkpoint: Checkpoint) -> Iterator[str]:
    """What a reader of a diff should know of this checkpoint, in sentences."""
    yield from checkpoint.remarks
    wrapped = [tensor for tensor in checkpoint.laid if bare_name(tensor) != tensor]
    if wrapped:
        yield f"names carry a wrapper's prefix or infix: {len(wrapped)} (first: {quoted(wrapped[0])})"
    whole = [
        t
        for t, laid in checkpoint.laid.items()
        if laid.place.role in _FUSED and not laid.fused and laid.place.param != "bias"
    ]
    if whole:
        reason = "are left whole, nothing says how to split them"
        yield f"{len(whole)} fused tensors {reason} (first: {quoted(whole[0])})"
    turned = sum(laid.transposed for laid in checkpoint.laid.values())
    if turned:
        yield f"{turned} matrices are stored (in, out) and read as (out, in)"
    dtypes = {header.dtype for header in checkpoint.store.headers.values()}
    if len(dtypes) > 1:
        yield f"{len(dtypes)} dtypes"
    yield from left_out(checkpoint.skipped)
    yield from checkpoint.store.notes


def left_out(skipped: Mapping[str, tuple[str, int]]) -> Iterator[str]:
    """What is stored and not read, a sentence a reason."""
    reasons: dict[str, list[str]] = {}
    for tensor, (why, _) in skipped.items():
        reasons.setdefault(why, []).append(tensor)
    for why, tensors in reasons.items():
        yield f"{len(tensors)} tensors are skipped: {why} (first: {quoted(tensors[0])})"


def _matrix(checkpoint: Checkpoint, site: Site) -> bool:
    return site.role in ("gate_proj", "fc1") and site.param == "weight" and len(checkpoint.shape(site)) >= 2


def _language(checkpoint: Checkpoint) -> str:
    sites = [site for site in checkpoint.storage if site.tower == "language"]
    layers = {(site.stack, site.layer) for site in sites if site.layer is not None}
    first = next((s for s in sites if _matrix(checkpoint, s)), None)
    if first is None:
        return f"{len(layers)} layers, no MLP that is known"
    inner, hidden = checkpoint.shape(first)[:2]
    kind = "gated MLP" if first.role == "gate_proj" else "plain MLP"
    experts = {site.expert for site in sites if site.expert is not None}
    extra = f", {len(experts)} experts" if experts else ""
    return f"{len(layers)} layers, hidden {hidden}, {kind} {inner}{extra}"
