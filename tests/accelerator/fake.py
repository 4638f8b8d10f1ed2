"""The fake accelerator in Python: the device `fake` of this process, and Lightning's view of it.

`install` is for a process of its own: PyTorch lets a process name its private device once, and has one accelerator.
"""

import hashlib
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lightning.pytorch.accelerators import Accelerator
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("fake_accelerator.cpp")
DEVICE = "fake"


def build() -> Path:
    """The extension's library; compiled if this machine has none of this source and this PyTorch."""
    name = "fake_accelerator_" + hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    library = folder / f"{name}.so"
    with FileLock(folder / "build.filelock"):
        if not library.exists():
            (folder / "lock").unlink(missing_ok=True)  # of a build that was killed: `load` would wait for it for ever
            options = {"extra_cflags": ["-O1"], "build_directory": str(folder), "is_python_module": False}
            cpp_extension.load(name, str(SOURCE), **options)
    return library


def install() -> None:
    torch.ops.load_library(build())
    torch.utils.rename_privateuse1_backend(DEVICE)
    torch._register_device_module(DEVICE, _device_module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


def take_reads() -> list[str]:
    return torch.ops.fake_accelerator.take_reads()


@contextmanager
def no_reads() -> Iterator[None]:
    """Any read of the device by the host is an error, on all threads."""
    before = torch.ops.fake_accelerator.forbid_reads(True)
    try:
        yield
    finally:
        torch.ops.fake_accelerator.forbid_reads(before)


def _device_module() -> types.ModuleType:
    module, ops = types.ModuleType(f"torch.{DEVICE}"), torch.ops.fake_accelerator
    vars(module).update(
        _initialized=True,  # else activation checkpointing would not restore the generator
        is_available=lambda: True,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        device_count=lambda: 1,
        current_device=lambda: 0,
        device=lambda index: nullcontext(),
        set_device=lambda device: None,
        synchronize=lambda device=None: None,
        manual_seed=lambda seed: ops.manual_seed(seed),
        manual_seed_all=lambda seed: ops.manual_seed(seed),
        get_rng_state=lambda device=None: ops.get_rng_state(),
        set_rng_state=lambda state, device=None: ops.set_rng_state(state),
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        get_device_name=lambda device=None: "Fake accelerator",
        get_device_properties=lambda device=None: types.SimpleNamespace(total_memory=80 << 30),
        max_memory_allocated=lambda device=None: 0,
        max_memory_reserved=lambda device=None: 0,
        empty_cache=lambda: None,
    )
    return module


class FakeAccelerator(Accelerator):
    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(DEVICE, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return DEVICE
