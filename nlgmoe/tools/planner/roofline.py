"""A lower bound on the time of a micro-batch's forward and backward pass on one rank, by part: a reference for profiles.

The time of a part is FLOPs / achievable rate of its matrix products, or bytes / memory bandwidth; parts do not overlap. Matrix
products count three times their forward pass. Bytes are those of this model's operations without `model.compile`, which fuses
some. Not included: embeddings, the final norm, kernel launches, dropped tokens (layers are balanced and dropless), and the
optimizer's step (see `cost.py`).

Letters: H hidden size, F inner size, E experts, k experts per token, T tokens per sequence, V vocabulary, P rows of the padded
table; r and c are the bytes of a value in the residual stream and inside a layer (`topology.BytesPer`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nlgmoe.config import GPTConfig
from nlgmoe.model.counting import expert_stacks, flops_per_token, matmul_flops, network_stacks
from nlgmoe.monitoring.hardware import Hardware
from nlgmoe.pyramid import experts_per_layer, moe_blocks
from nlgmoe.tools.planner.topology import BytesPer, Topology

# Achievable fractions of the data sheet's peaks. Estimates for an H100 in bf16: 600 TFLOP/s for large matrix products, 500 for
# grouped ones, 300 for causal attention forward and backward, 2.6 TB/s.
PRODUCTS, GROUPED, ATTENTION, MEMORY = 0.61, 0.51, 0.30, 0.78

LOGIT_BYTES = 60
"""Bytes that the router moves per logit, forward and backward, in fp32: softmax, choice, statistics, losses, gradients."""


@dataclass(frozen=True)
class Parts:
    """Parts, as fields, and their sum."""

    @property
    def total(self) -> float:
        """Sum of all fields."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Roofline(Parts):
    """Seconds of a micro-batch by part."""

    dense_products: float
    expert_products: float
    attention: float
    head_products: float
    head_rest: float
    elementwise: float
    router: float
    recomputation: float
    all_to_all: float

    def utilisation(self, config: GPTConfig, topology: Topology, gpu: Hardware) -> float:
        """Return the model FLOPs utilisation (MFU), without recomputation."""
        tokens = topology.micro_batch_size * config.seq_len
        return tokens * flops_per_token(config) / self.total / _peak(topology, gpu)


def roofline(config: GPTConfig, topology: Topology, gpu: Hardware, all_to_all: float) -> Roofline:
    """Compute the parts; `all_to_all` is given in seconds."""
    size, tokens = topology.bytes_per, topology.micro_batch_size * config.seq_len
    peak, bandwidth = _peak(topology, gpu), gpu.memory_bandwidth * MEMORY
    width = config.hidden_size
    experts = list(moe_blocks(config).values())
    top_k, shared = (config.moe.top_k, config.moe.mlp_type == "residual") if config.moe is not None else (0, False)
    dense = (config.num_layers - len(experts)) * matmul_flops(network_stacks(config, config.ffn_size))
    dense += shared * len(experts) * matmul_flops(network_stacks(config, config.shared_ffn_size))

    forward = tokens / peak  # seconds at the peak, for one FLOP per token
    dense_products = forward * (config.num_layers * 8 * width**2 + dense) / PRODUCTS
    expert_products = forward * len(experts) * top_k * matmul_flops(expert_stacks(config)) / GROUPED
    attention = forward * config.num_layers * 2 * width * config.seq_len / ATTENTION
    gate = sum(experts) * 2 * width * tokens / gpu.fp32_flops / PRODUCTS
    blocks = [block_bytes(config, count, size) for count in experts_per_layer(config)]
    elementwise, backward = (tokens * sum(passes) / bandwidth for passes in zip(*blocks, strict=True))
    logits = sum(experts) * LOGIT_BYTES * tokens / bandwidth
    recomputation = dense_products + expert_products + attention + gate + elementwise + logits / 2
    return Roofline(
        dense_products=3 * dense_products,
        expert_products=3 * expert_products,
        attention=3 * attention,
        head_products=3 * forward * 2 * width * config.padded_vocab_size / PRODUCTS,
        head_rest=head_bytes(config, tokens, topology) / bandwidth,
        elementwise=elementwise + backward,
        router=3 * gate + logits,
        recomputation=recomputation if topology.activation_checkpointing else 0.0,
        all_to_all=all_to_all,
    )


def _peak(topology: Topology, gpu: Hardware) -> float:
    return gpu.fp32_flops if topology.bytes_per.compute == 4 else gpu.half_flops


def block_bytes(config: GPTConfig, experts: int, size: BytesPer) -> tuple[int, int]:
    """Return the bytes per token that a block moves, (forward, backward), without matrix products, attention and router."""
    width, r, c = config.hidden_size, size.residual, size.compute
    # Values that the nonlinearity reads and writes, forward and backward, of the inner width; matrices into it.
    passes, passes_back, into = {"gelu": (2, 3, 1), "swiglu": (5, 8, 2)}[config.ffn_network]
    # Queries, keys and values of a token; those that are normed and rotated.
    heads, keys, bias = config.num_heads * config.head_size, config.kv_heads * config.head_size, int(config.bias)
    joined, turned = heads + 2 * keys, heads + keys
    # Two norms and two additions; backward also the gradients of q, k and v, joined, and of the two biases.
    forward, backward = 10 * width * r, 12 * width * r + (2 * joined + bias * (joined + width)) * c
    if config.rope_theta is not None:
        forward, backward = forward + 11 * turned * c, backward + 10 * turned * c
    if config.qk_norm is not None:
        forward, backward = forward + 2 * turned * c, backward + 3 * turned * c
    if config.hidden_dropout:  # read, written, and its mask, twice
        forward += 2 * width * (2 * c + 1)
        backward += 2 * width * (2 * c + 1)
    moe = config.moe
    if not experts or (moe is not None and moe.mlp_type == "residual"):
        ffn = config.shared_ffn_size if experts else config.ffn_size
        forward += passes * ffn * c
        backward += passes_back * ffn * c + bias * (into * ffn + width) * c  # and the gradients of the biases
    if not experts:
        return forward, backward
    assert moe is not None
    ffn = config.expert_ffn_size
    # Per assignment: biases as a product and a sum, the nonlinearity, two gathers of the row, multiplication by the gate in fp32.
    row = 4 * bias * (into * ffn + width) * c + passes * ffn * c + 4 * width * c + (c + 4) * width
    # The nonlinearity's gradient, the biases' gradients, two sums into zeroed rows; gradients of gate and output.
    row_backward = passes_back * ffn * c + bias * (into * ffn + width) * c + 8 * width * c + (18 + 4 + c + 4) * width
    forward += moe.top_k * row + (4 * (moe.top_k + 1) * width if moe.top_k > 1 else 0)  # the sum over a token's experts
    backward += moe.top_k * row_backward + 3 * width * c  # sum of the gradients of experts and gate
    cast = (c + 4) * width if c == 2 else 0  # to fp32, or back
    forward, backward = forward + 2 * cast, backward + 2 * cast  # into the gate, and out of the layer
    if moe.mlp_type == "residual":
        backward += 3 * width * c  # sum of the gradients of MLP and experts
        if moe.residual_mix == "learned":  # both branches in fp32, and their weights
            forward, backward = forward + 28 * width + 2 * cast, backward + (48 + 3 * c) * width + 2 * cast
        else:
            forward, backward = forward + (4 + c + 4) * width, backward + cast
    return forward, backward


def head_bytes(config: GPTConfig, tokens: int, topology: Topology) -> int:
    """Return the bytes that the chunked loss moves without matrix products, forward and backward."""
    c, table = topology.bytes_per.compute, config.padded_vocab_size * config.hidden_size
    logit = 8 + 8  # log-softmax, and its exponential in place, in fp32
    if c == 2:
        logit += 2 * (2 + 4)  # to fp32, and the gradient back
    chunks = -(-tokens // topology.loss_chunk_size)
    # The table's gradient, in fp32: each chunk's gradient is added; at the end it is scaled and cast.
    return tokens * config.padded_vocab_size * logit + table * (chunks * (4 + 4 + c) + 3 * 4 + c)
