"""The least time of a micro-batch's forward and backward pass on one rank, part by part: what to hold a profile against.

A part takes its FLOPs / the rate that products of its kind reach, or the bytes that it moves / the rate of the memory; parts
follow each other. Products count three times their forward pass. Bytes are those of the operations that this model calls, without
`model.compile`, which fuses some. Left out: embeddings, the final norm, launches, dropped tokens (the loads are those of a
balanced dropless layer), and the optimizer's step (`cost.py` has it).

Letters: H hidden size, F inner size, E experts, k experts per token, T tokens per sequence, V vocabulary, P rows of the padded
table; r and c are the bytes of a value in the residual stream and inside a layer (`topology.BytesPer`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nlgmoe.config import GPTConfig
from nlgmoe.model.counting import flops_per_token
from nlgmoe.monitoring.hardware import Hardware
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.tools.planner.topology import BytesPer, Topology

# Shares of the data sheet's peaks. Estimates for an H100 in bf16: 600 TFLOP/s for large products, 500 for grouped ones, 300 for
# causal attention forward and backward, 2.6 TB/s.
PRODUCTS, GROUPED, ATTENTION, MEMORY = 0.61, 0.51, 0.30, 0.78

LOGIT_BYTES = 60
"""Of the router per logit, forward and backward, in fp32: softmax, choice, statistics, losses, and their gradients."""


@dataclass(frozen=True)
class Roofline:
    """Seconds of a micro-batch by part; the parts follow each other."""

    dense_products: float
    expert_products: float
    attention: float
    head_products: float
    head_rest: float
    elementwise: float
    router: float
    recomputation: float
    all_to_all: float

    @property
    def total(self) -> float:
        """The whole micro-batch."""
        return sum(getattr(self, field.name) for field in fields(self))

    def utilisation(self, config: GPTConfig, topology: Topology, gpu: Hardware) -> float:
        """The model's FLOPs utilisation (MFU), which does not count what is computed again."""
        tokens = topology.micro_batch_size * config.seq_len
        return tokens * flops_per_token(config) / self.total / _peak(topology, gpu)


def roofline(config: GPTConfig, topology: Topology, gpu: Hardware, all_to_all: float) -> Roofline:
    """The parts; `all_to_all` seconds are added as they are."""
    size, tokens = topology.bytes_per, topology.micro_batch_size * config.seq_len
    peak, bandwidth = _peak(topology, gpu), gpu.memory_bandwidth * MEMORY
    width, network = config.hidden_size, 4 * config.hidden_size * config.ffn_size  # FLOPs of two matrices
    experts = [count for count in experts_per_layer(config) if count]
    top_k, shared = (config.moe.top_k, config.moe.mlp_type == "residual") if config.moe is not None else (0, False)
    dense = config.num_layers - len(experts) + shared * len(experts)

    forward = tokens / peak  # seconds of a FLOP a token, at the peak
    dense_products = forward * (config.num_layers * 8 * width**2 + dense * network) / PRODUCTS
    expert_products = forward * len(experts) * top_k * network / GROUPED
    attention = forward * config.num_layers * 2 * width * config.seq_len / ATTENTION
    gate = sum(experts) * 2 * width * tokens / gpu.fp32_flops / PRODUCTS
    blocks = [block_bytes(config, count, size) for count in experts_per_layer(config)]
    elementwise, backward = (tokens * sum(passes) / bandwidth for passes in zip(*blocks, strict=True))
    logits = sum(experts) * LOGIT_BYTES * tokens / bandwidth
    again = dense_products + expert_products + attention + gate + elementwise + logits / 2
    return Roofline(
        dense_products=3 * dense_products,
        expert_products=3 * expert_products,
        attention=3 * attention,
        head_products=3 * forward * 2 * width * config.padded_vocab_size / PRODUCTS,
        head_rest=head_bytes(config, tokens, topology) / bandwidth,
        elementwise=elementwise + backward,
        router=3 * gate + logits,
        recomputation=again if topology.activation_checkpointing else 0.0,
        all_to_all=all_to_all,
    )


def _peak(topology: Topology, gpu: Hardware) -> float:
    return gpu.fp32_flops if topology.bytes_per.compute == 4 else gpu.half_flops


def block_bytes(config: GPTConfig, experts: int, size: BytesPer) -> tuple[int, int]:
    """Bytes per token that a block moves in its forward and in its backward pass, beside products, attention and router."""
    width, ffn, r, c = config.hidden_size, config.ffn_size, size.residual, size.compute
    # Two norms and two additions; backward also the gradients of q, k and v, joined and copied, and those of the two biases.
    forward, backward = 10 * width * r, 12 * width * r + 16 * width * c
    if config.hidden_dropout:  # read, written, and its mask, twice
        forward += 2 * width * (2 * c + 1)
        backward += 2 * width * (2 * c + 1)
    moe = config.moe
    if not experts or (moe is not None and moe.mlp_type == "residual"):
        forward += 2 * ffn * c  # the GELU
        backward += 3 * ffn * c + (ffn + width) * c  # its gradient; those of the biases
    if not experts:
        return forward, backward
    assert moe is not None
    # Of an assignment: biases as a product and a sum, the GELU, the rows gathered twice, and multiplied by the gate in fp32.
    row = 4 * (ffn + width) * c + 2 * ffn * c + 4 * width * c + (c + 4) * width
    # The GELU again and its gradient, the biases', two sums into rows that were set to zero; the gate's and what it multiplies.
    row_backward = 5 * ffn * c + (ffn + width) * c + 8 * width * c + (18 + 4 + c + 4) * width
    forward += moe.top_k * row + (4 * (moe.top_k + 1) * width if moe.top_k > 1 else 0)  # the sum over a token's experts
    backward += moe.top_k * row_backward + 3 * width * c  # the gradients of experts and gate meet
    cast = (c + 4) * width if c == 2 else 0  # to fp32, or back
    forward, backward = forward + 2 * cast, backward + 2 * cast  # into the gate, and out of the layer
    if moe.mlp_type == "residual":
        backward += 3 * width * c  # the gradients of MLP and experts meet
        if moe.residual_mix == "learned":  # both branches in fp32, and their weights
            forward, backward = forward + 28 * width + 2 * cast, backward + (48 + 3 * c) * width + 2 * cast
        else:
            forward, backward = forward + (4 + c + 4) * width, backward + cast
    return forward, backward


def head_bytes(config: GPTConfig, tokens: int, topology: Topology) -> int:
    """Bytes that the chunked loss moves beside its products, forward and backward."""
    c, table = topology.bytes_per.compute, config.padded_vocab_size * config.hidden_size
    logit = 8 + 8  # log-softmax, and its exponential in place, in fp32
    if c == 2:
        logit += 2 * (2 + 4)  # to fp32, and the gradient back
    chunks = -(-tokens // topology.loss_chunk_size)
    # The table's gradient, in fp32: a chunk's is added to it; in the end it is scaled, and cast.
    return tokens * config.padded_vocab_size * logit + table * (chunks * (4 + 4 + c) + 3 * 4 + c)
