"""An image of expert loads: a row for each MoE layer, a cell for each expert."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WIDTH, ROW, GAP = 512, 24, 2  # pixels
DOUBLINGS = 2.0  # colours saturate at 4 times and a quarter of the fair share
IDLE, FAIR, BUSY = (np.array(colour, dtype=float) for colour in ((33, 102, 172), (247, 247, 247), (178, 24, 43)))
DEAD = np.zeros(3)


def heat_map(loads: Sequence[np.ndarray]) -> np.ndarray:
    """Draw loads as colours: white is the fair share (uniform load), red more, blue less, black zero.

    Args:
        loads: `[E]` for each layer, in any unit; layers may differ in E.

    Returns:
        `[height, width, 3]` uint8, the first layer on top.
    """
    rows = []
    for load in loads:
        cells = load[np.arange(WIDTH) * len(load) // WIDTH] / max(load.mean(), 1e-9)  # [width]
        scale = np.log2(np.clip(cells, 2**-DOUBLINGS, 2**DOUBLINGS))[:, None] / DOUBLINGS  # [width, 1] in [-1, 1]
        colours = FAIR + np.where(scale > 0, BUSY - FAIR, IDLE - FAIR) * np.abs(scale)
        colours[cells == 0] = DEAD
        row = np.repeat(colours[None], ROW, axis=0)
        rows.append(np.concatenate([row, np.full((GAP, WIDTH, 3), 255.0)]))
    return np.concatenate(rows)[:-GAP].round().astype(np.uint8)
