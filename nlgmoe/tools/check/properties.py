"""All properties, in the order of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from nlgmoe.tools.check import inputs, own, routing, training
from nlgmoe.tools.check.layer import Failed, Layer, NotApplicable

Test = Callable[[Layer], str]  # takes the layer, returns the reason of a pass, and raises `Failed` or `NotApplicable`
PROPERTIES: dict[str, tuple[Test, ...]] = {
    "gradients equal finite differences": (training.gradients_are_finite_differences,),
    "the losses reach the gate": (training.output_reaches_the_gate, training.auxiliary_loss_reaches_the_gate),
    "output = sum of weight * expert(x)": (routing.output_is_the_weighted_sum,),
    "weights sum as declared": (routing.weights_sum_as_declared,),
    "weights follow the logits": (routing.weights_follow_the_logits,),
    "the balance loss sees a collapse": (routing.balance_loss_sees_a_collapse,),
    "capacity is the formula": (routing.capacity_is_the_formula,),
    "the declared tokens are dropped": (routing.the_declared_tokens_are_dropped,),
    "padding counts in no output or loss": (routing.padding_counts_nowhere,),
    "evaluation does not see neighbours": (
        inputs.evaluation_does_not_see_neighbours,
        inputs.permuted_tokens_give_permuted_outputs,
    ),
    "a token sees no later one": (inputs.sees_no_later_token,),
    "evaluation chooses as training does": (inputs.evaluation_chooses_as_training_does,),
    "unusual sizes work": (inputs.unusual_sizes_work,),
    "micro-batches add up": (inputs.micro_batches_add_up,),
    "ranks equal one process": (own.ranks_equal_one_process,),
    "forward writes no state": (training.forward_writes_no_state,),
    "steps follow the requests": (training.steps_follow_the_requests,),
    "a resumed run is the same to the bit": (training.a_resumed_run_is_the_same,),
    "50 steps balance the load": (training.no_expert_is_dead, training.balancing_lowers_imbalance),
    "types are kept": (inputs.half_precision_is_close, inputs.types_do_not_leak),
    "the host reads no device": (inputs.host_reads_nothing,),
    "the GPU agrees with the CPU": (inputs.gpu_agrees_with_cpu,),
}


@dataclass(frozen=True)
class Result:
    """The verdict on one property, with a reason in a line."""

    property: str
    verdict: Literal["pass", "fail", "not applicable"]
    reason: str


def check_layer(layer: Layer, only: set[str] | None = None) -> Iterator[Result]:
    """Test the properties, or `only` some, one after the other.

    A property fails if one of its tests does, and is not applicable if none of them is applicable.
    """
    for name, tests in PROPERTIES.items():
        if only is not None and name not in only:
            continue
        reasons = {"fail": "", "pass": "", "not applicable": ""}
        for test in tests:
            try:
                verdict, reason = "pass", test(layer)
            except NotApplicable as error:
                verdict, reason = "not applicable", str(error)
            except Failed as error:
                verdict, reason = "fail", str(error)
            except Exception as error:  # of the layer's code
                verdict, reason = "fail", f"{type(error).__name__}: {error}"
            text = " ".join(reason.split())
            if text not in reasons[verdict]:
                reasons[verdict] += "; " * bool(reasons[verdict]) + text
        verdict = next(verdict for verdict, text in reasons.items() if text)
        yield Result(name, verdict, reasons[verdict][:300])  # type: ignore[arg-type]
