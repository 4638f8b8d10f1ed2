"""Benchmarks run in a process that is prepared as `train.py` prepares it."""

from nlgmoe.process import prepare_process

prepare_process()
