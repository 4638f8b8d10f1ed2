"""Benchmarks run in a process that is prepared as `train.py` prepares it."""

from nlgmoe.process import prepare_threads

prepare_threads()
