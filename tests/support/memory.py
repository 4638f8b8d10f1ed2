"""How much memory a piece of code holds at once."""

import tracemalloc
from collections.abc import Callable

from torch import distributed
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def peak_bytes(job: Callable[[], object]) -> int:
    """Most that `job` allocated at once: tensors on the CPU, and objects of Python such as `bytes`.

    Ranks trace allocations from then on: to stop that crashes a process in which a thread of gloo allocates at that moment.
    """
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        job()
    _, objects = tracemalloc.get_traced_memory()
    if not distributed.is_initialized():
        tracemalloc.stop()
    return peak_of_tensors(found) + objects - before


def peak_of_tensors(profiler: profile) -> int:
    live = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            live += event.nbytes()
            most = max(most, live)
    return most
