"""What a run is judged by: a GPU of `HARDWARE`, given by name, or this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from nlgmoe.config import GPTConfig
from nlgmoe.device import default_device, product_name
from nlgmoe.hardware import HARDWARE, RESERVED, Hardware, board_of, hardware
from nlgmoe.tools.planner.cost import Communication, Cost, Memory, communication_of, estimate, memory_of
from nlgmoe.tools.planner.topology import Topology


@dataclass(frozen=True)
class Machine:
    """What each rank runs on.

    Attributes:
        name: in words.
        memory: bytes for tensors; None: unknown.
        rates: published rates; None: unknown, so that no time is predicted.
        is_cpu: it is a CPU.
    """

    name: str
    memory: int | None
    rates: Hardware | None
    is_cpu: bool = False


@dataclass(frozen=True)
class Prediction:
    """Of one topology on a machine.

    Attributes:
        memory: bytes of a rank.
        communication: bytes that a rank sends.
        cost: times; None: the machine's rates are unknown.
        fits: whether the memory suffices; None: the machine's is unknown.
    """

    memory: Memory
    communication: Communication
    cost: Cost | None
    fits: bool | None


def named_machine(name: str) -> Machine:
    """Return a GPU of `HARDWARE`."""
    gpu = hardware(name)
    return Machine(name, int(gpu.memory - RESERVED), gpu)


def this_machine(accelerator: str, ranks_per_node: int) -> Machine:
    """Return this machine's accelerator or CPU; a GPU of which nothing is known if the run needs one and there is none.

    Args:
        accelerator: Lightning's `accelerator`; `auto` means a CPU only for one rank.
        ranks_per_node: ranks that share a CPU's memory.
    """
    device = torch.device(default_device())
    if accelerator == "cpu" or (device.type == "cpu" and accelerator == "auto" and ranks_per_node == 1):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Machine("this machine's CPU", memory // ranks_per_node - RESERVED, None, is_cpu=True)
    if device.type == "cpu":
        return Machine("GPU", None, None)
    name = product_name(device) or device.type
    memory, board = torch.get_device_module(device).get_device_properties(device).total_memory, board_of(name)
    return Machine(f"this machine's {name}", memory - RESERVED, None if board is None else HARDWARE[board])


def predict(config: GPTConfig, topology: Topology, machine: Machine, utilisation: float) -> Prediction:
    """Predict what is known of the machine."""
    memory = memory_of(config, topology)
    cost = None if machine.rates is None else estimate(config, topology, machine.rates, utilisation)
    fits = None if machine.memory is None else memory.total <= machine.memory
    return Prediction(memory, communication_of(config, topology), cost, fits)
