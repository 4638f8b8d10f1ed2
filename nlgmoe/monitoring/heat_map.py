"""A picture of who works: a row for each MoE layer, a cell for each of its experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WIDTH, ROW, GAP = 512, 24, 2  # pixels
DOUBLINGS = 2.0  # the colours end at 4 times the fair share, and at a quarter of it
IDLE, FAIR, BUSY = (np.array(colour, dtype=float) for colour in ((33, 102, 172), (247, 247, 247), (178, 24, 43)))
DEAD = np.zeros(3)


def heat_map(loads: Sequence[np.ndarray]) -> np.ndarray:
    """Loads as colours: white is a fair share, red more, blue less, black nothing at all.

    Args:
        loads: `[E]` of each layer, in any unit; layers may differ in E.

    Returns:
        `[height, width, 3]` uint8, the first layer on top.
    """
    rows = []
    for load in loads:
        cells = load[np.arange(WIDTH) * len(load) // WIDTH] / max(load.mean(), 1e-9)  # [width]
        place = np.log2(np.clip(cells, 2**-DOUBLINGS, 2**DOUBLINGS))[:, None] / DOUBLINGS  # [width, 1] in [-1, 1]
        colours = FAIR + np.where(place > 0, BUSY - FAIR, IDLE - FAIR) * np.abs(place)
        colours[cells == 0] = DEAD
        row = np.repeat(colours[None], ROW, axis=0)
        rows.append(np.concatenate([row, np.full((GAP, WIDTH, 3), 255.0)]))
    return np.concatenate(rows)[:-GAP].round().astype(np.uint8)
