"""All properties, in the order of the table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from nlgmoe.tools.check import batches, devices, gradients, ranks, slots, state, survivors, training, weights
from nlgmoe.tools.check.layer import Failed, Layer, NotApplicable

PROPERTIES: dict[str, Callable[[Layer], str]] = {
    "gradients equal finite differences": gradients.gradients_are_finite_differences,
    "the output's loss reaches the gate": gradients.output_reaches_the_gate,
    "the auxiliary loss reaches the gate": gradients.auxiliary_loss_reaches_the_gate,
    "used experts get gradients, others none": gradients.used_experts_get_gradients,
    "output = sum of weight * expert(x)": weights.output_is_the_weighted_sum,
    "weights sum as declared": weights.weights_sum_as_declared,
    "the gate is not squashed twice": weights.gate_is_not_squashed_twice,
    "likelier experts weigh more": weights.likelier_experts_weigh_more,
    "the balance loss sees a collapse": weights.balance_loss_sees_a_collapse,
    "the gate's scale reaches the output": weights.gate_scale_reaches_the_output,
    "capacity is the formula": slots.capacity_is_the_formula,
    "dropped tokens give zero": slots.dropped_tokens_give_zero,
    "the declared tokens are dropped": slots.the_declared_tokens_are_dropped,
    "padding takes no slot": slots.padding_takes_no_slot,
    "padding counts in no output or loss": slots.padding_counts_nowhere,
    "evaluation does not see neighbours": batches.evaluation_does_not_see_neighbours,
    "evaluation chooses as training does": batches.evaluation_chooses_as_training_does,
    "permuted tokens, permuted outputs": batches.permuted_tokens_give_permuted_outputs,
    "unusual sizes work": batches.unusual_sizes_work,
    "micro-batches add up": batches.micro_batches_add_up,
    "ranks equal one process": ranks.ranks_equal_one_process,
    "forward writes no state": state.forward_writes_no_state,
    "steps follow the requests": state.steps_follow_the_requests,
    "a resumed run is the same to the bit": state.a_resumed_run_is_the_same,
    "bf16 and fp16 are close to fp32": state.half_precision_is_close,
    "types do not leak": state.types_do_not_leak,
    "no expert is dead after 50 steps": training.no_expert_is_dead,
    "balancing lowers imbalance": training.balancing_lowers_imbalance,
    "the checkpoint's experts survived": survivors.experts_survived,
    "the host reads no device": devices.host_reads_nothing,
    "the GPU agrees with the CPU": devices.gpu_agrees_with_cpu,
}


@dataclass(frozen=True)
class Result:
    """The verdict on one property, with a reason in a line."""

    property: str
    verdict: Literal["pass", "fail", "not applicable"]
    reason: str
    seconds: float


def check_layer(layer: Layer, only: set[str] | None = None) -> Iterator[Result]:
    """Test the properties, or `only` some, one after the other."""
    for name, test in PROPERTIES.items():
        if only is not None and name not in only:
            continue
        begun = time.perf_counter()
        try:
            verdict, reason = "pass", test(layer)
        except NotApplicable as found:
            verdict, reason = "not applicable", str(found)
        except Failed as found:
            verdict, reason = "fail", str(found)
        except Exception as error:  # of the layer's code
            verdict, reason = "fail", f"{type(error).__name__}: {error}"
        text = " ".join(reason.split())
        yield Result(name, verdict, text[:300], time.perf_counter() - begun)  # type: ignore[arg-type]
