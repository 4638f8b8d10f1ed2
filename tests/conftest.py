"""Settings that every test runs under."""

import os

import torch
from hypothesis import settings

# Tensors here are tiny: more threads only wait for each other, and the suite runs one process per core.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# No deadlines: the machine decides how long an example takes, not the code. Derandomised: CI repeats itself.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
