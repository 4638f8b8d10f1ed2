"""Nodes and GPUs of a launch, which Megatron's own flags do not say."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from nlgmoe.tools.megatron.arguments import Arguments, is_count
from nlgmoe.tools.megatron.launch import Launch

_DEVICE_FLAGS = ("--num_gpus", "--nproc_per_node", "--nproc-per-node")
_NODE_FLAGS = ("--num_nodes", "--nnodes")


@dataclass(frozen=True)
class Cluster:
    """GPUs of each node, nodes, and a comment where they are guessed."""

    devices: int
    nodes: int
    comment: str = ""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.devices * self.nodes


def read_cluster(launch: Launch, arguments: Arguments) -> Cluster | None:
    """Return the launcher's counts, or those of the variables that the tutorial's scripts keep them in; None with a problem."""
    devices, nodes = (_given(names, launch, arguments) for names in (_DEVICE_FLAGS, _NODE_FLAGS))
    if arguments.problems and 0 in (devices, nodes):
        return None
    programs = [word.rpartition("/")[2] for word in launch.launcher]
    # torchrun starts one process if it is not told how many
    if devices is None and {"torchrun", "torch.distributed.launch", "torch.distributed.run"} & set(programs):
        devices = 1
    if devices is not None:
        return Cluster(devices, nodes or 1)
    if programs[:1] in (["python"], ["python3"]):
        return Cluster(1, 1, "started by python alone: one process")
    name = next((name for name in ("NUM_GPUS", "world_size") if launch.variables.get(name)), None)
    if name is None:
        arguments.problem(
            programs[0] if programs else "the launch",
            "does not say how many GPUs; add --num_gpus and --num_nodes, or to --run-script --variables.NUM_GPUS",
        )
        return None
    total = _count(launch.variables[name], name, arguments)
    if not total:
        return None
    per_node = launch.variables.get("NUM_GPUS_PERNODE", "")
    known = int(per_node) if is_count(per_node) else None
    devices = known or (total // nodes if nodes else min(total, 8))
    if devices < 1 or total % devices:
        arguments.problem(f"{name}={total}", f"is no multiple of {devices} GPUs a node; correct it")
        return None
    return Cluster(devices, total // devices, "" if known else f"{name}={total}; 8 to a node is an assumption")


def _given(names: tuple[str, ...], launch: Launch, arguments: Arguments) -> int | None:
    """Return the last of these flags of the launcher, or among Megatron's; 0 with a problem."""
    words = [part for word in launch.launcher for part in word.split("=", 1)]
    found = [(name, value) for name, value in pairwise(words) if name in names]
    found += [(name, arguments.uses[name].values[0]) for name in names if name in arguments.uses]
    return _count(found[-1][1], " ".join(found[-1]), arguments) if found else None


def _count(text: str, subject: str, arguments: Arguments) -> int:
    if is_count(text) and int(text) > 0:
        return int(text)
    arguments.problem(subject, f"is {text or 'empty'}, not a count; correct it")
    return 0
