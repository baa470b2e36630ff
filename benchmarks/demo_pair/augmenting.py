"""Make fresh variants of emoji pictures: small geometry, colour, background, noise.

Works on whole batches of RGBA tensors, because one picture at a time through PIL would cost
more than the model does.
"""

import math

import torch
from drawing import SMALL
from torch import nn


def augment(rgba, turns, generator, strength=1.0):
    """Return RGB pictures in 0..1 of the size of `rgba` [batch, 4, height, width] (0..1).

    `turns` are clockwise quarter turns per picture; `strength` 0 gives the plain picture on a
    white ground.
    """
    n = len(rgba)

    def noise(*shape):
        return torch.rand(*shape, generator=generator) * 2 - 1

    angle = noise(n) * 0.25 * strength + turns * (math.pi / 2)
    scale = 1.0 + 0.18 * strength * noise(n)
    flip = torch.where(torch.rand(n, generator=generator) < 0.5 * min(strength, 1.0), -1.0, 1.0)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = noise(n, 2) * 0.10 * strength
    theta = torch.stack([cos * flip, sin * flip, shift[:, 0], -sin, cos, shift[:, 1]], 1)
    alpha = rgba[:, 3:]
    stacked = torch.cat([rgba[:, :3] * alpha, alpha], 1)
    grid = nn.functional.affine_grid(theta.view(n, 2, 3), list(stacked.shape), align_corners=False)
    moved = nn.functional.grid_sample(stacked, grid, mode="bilinear", align_corners=False)
    ground = 1.0 - strength * 0.5 * torch.rand(n, 3, 1, 1, generator=generator) ** 2
    picture = moved[:, :3] + (1 - moved[:, 3:]) * ground
    return recolour(picture, generator, strength)


def recolour(picture, generator, strength=1.0):
    """Change brightness, contrast, saturation and tint; keep the geometry."""
    n = len(picture)

    def noise(*shape):
        return (torch.rand(*shape, generator=generator) * 2 - 1) * strength

    grey = picture.mean(1, keepdim=True)
    picture = grey + (picture - grey) * (1 + 0.5 * noise(n, 1, 1, 1))
    middle = picture.mean((1, 2, 3), keepdim=True)
    picture = middle + (picture - middle) * (1 + 0.25 * noise(n, 1, 1, 1))
    return (picture * (1 + 0.12 * noise(n, 3, 1, 1)) + 0.08 * noise(n, 1, 1, 1)).clamp(0, 1)


def shrink(picture):
    """Return the student's 64 px version of 112 px pictures."""
    size = (SMALL, SMALL)
    return nn.functional.interpolate(picture, size, mode="bilinear", antialias=True).clamp(0, 1)


def as_rgba(pixels):
    """Return uint8 [n, height, width, 4] arrays as float [n, 4, height, width] in 0..1."""
    return torch.as_tensor(pixels).permute(0, 3, 1, 2).float() / 255
