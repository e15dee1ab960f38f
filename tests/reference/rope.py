"""Rotary positions as loops: Su et al. 2021 (arXiv:2104.09864), in float64."""

import math

import torch


def rotate(vector: torch.Tensor, position: int, base: float, layout: str, rotated: int) -> torch.Tensor:
    """R_m x (equations 14 and 15): each pair of the first `rotated` dimensions of x turned by m * theta_i."""
    vector = vector.double()
    turned = vector.clone()
    for i in range(rotated // 2):
        angle = position * base ** (-2 * i / rotated)
        first, second = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + rotated // 2)
        turned[first] = vector[first] * math.cos(angle) - vector[second] * math.sin(angle)
        turned[second] = vector[second] * math.cos(angle) + vector[first] * math.sin(angle)
    return turned


def rotate_all(states: torch.Tensor, positions: torch.Tensor, base: float, layout: str, rotated: int) -> torch.Tensor:
    """[B, H, T, D] at positions [B, T], one vector at a time."""
    turned = torch.zeros_like(states, dtype=torch.float64)
    for b in range(states.shape[0]):
        for h in range(states.shape[1]):
            for t in range(states.shape[2]):
                turned[b, h, t] = rotate(states[b, h, t], int(positions[b, t]), base, layout, rotated)
    return turned
