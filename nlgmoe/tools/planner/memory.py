"""Bytes on one rank: weights, gradients, optimizer, activations and ZeRO's buffers.

Activations are what this model's forward pass saves for its backward pass, counted tensor by tensor;
`tests/model/test_activation_memory.py` compares with the tensors that autograd saves. They assume: slots where experts have a
capacity, as on GPUs; fused kernels of attention (no T x T matrix is saved) and of RMSNorm (on CPUs it keeps one more tensor);
balanced routing (a rank receives as many rows as it sends); CUDA's dropout (one byte per mask entry).

Letters: N tokens of a rank's micro-batch, H hidden size, F inner size, E experts, k experts per token, A heads, P rows of the
padded table; r and c are the bytes of a value in the residual stream and inside a layer (`topology.BytesPer`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from operator import add

from nlgmoe.config import GPTConfig
from nlgmoe.layers.attention import attention_config
from nlgmoe.layers.experts import BIAS_WIDTH
from nlgmoe.layers.grouped_gemm import training_slots
from nlgmoe.model.counting import count_parameters
from nlgmoe.parts import require_paper_parts
from nlgmoe.pyramid import experts_at, experts_per_layer
from nlgmoe.tools.planner.muon import muon_step
from nlgmoe.tools.planner.topology import BytesPer, Topology
from nlgmoe.validation import SettingError

BUCKET = 200_000_000
"""Elements of a ZeRO reduction bucket: Lightning's default. Several GPUs have two: one is reduced while the other is filled."""

INDICES = 13 * 8
"""Bytes of the indices of an assignment that is sent to another rank."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. Gradients and activations are added, although their peaks are at different times."""

    weights: int  # weights used in computation, and autocast's copies
    gradients: int  # of the weights, as they are in every micro-batch: ZeRO 1 keeps, without accumulation, its shard
    optimizer: int  # Adam's moments and fp32 master weights
    forward: int  # activations in the forward pass
    backward: int  # activations beside buckets: in the backward pass; with accumulation also in the next forward pass
    buckets: int  # ZeRO's reduction buffers
    step: (
        int  # in the optimizer's step, after activations and buckets are freed: ZeRO's flat gradients, Muon's matrices
    )
    host: int  # offloaded optimizer state in host memory; not part of `total`

    @property
    def total(self) -> int:
        """Bytes of GPU memory."""
        return self.weights + self.gradients + self.optimizer + max(self.activations + self.buckets_at_peak, self.step)

    @property
    def activations(self) -> int:
        """Bytes of activations at the peak."""
        return self.backward if self.buckets_at_peak else max(self.forward, self.backward)

    @property
    def buckets_at_peak(self) -> int:
        """Bytes of buckets at the peak, which is in a forward pass without them if the head needs more."""
        return self.buckets if self.backward + self.buckets > self.forward else 0


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters on one rank, replicated on `copies` ranks."""

    parameters: int
    copies: int


def parameter_groups(config: GPTConfig, topology: Topology) -> list[ParameterGroup]:
    """Return the dense parameters, then the experts of every MoE layer."""
    require_paper_parts(config, "the cost model supports", ["moe.expert"])
    count, layers = count_parameters(config), experts_per_layer(config)
    groups = [ParameterGroup(count.total - count.experts, topology.gpus)]
    for experts, degree in zip(layers, topology.degrees(config), strict=True):
        if experts:
            size = count.experts // sum(layers) * (experts // degree)
            groups.append(ParameterGroup(size, topology.gpus // degree))
    return groups


def memory_of(config: GPTConfig, topology: Topology) -> Memory:
    """Return the bytes on one rank.

    ZeRO 1 and 2 shard the optimizer state over the ranks that replicate its weights; ZeRO 2 the gradients too.
    """
    groups = parameter_groups(config, topology)
    size = topology.bytes_per
    full = sum(group.parameters for group in groups)
    sharded = sum(-(-group.parameters // group.copies) for group in groups)  # rounded up: ZeRO pads
    count = count_parameters(config)
    positions = config.seq_len * config.hidden_size if config.rope_theta is None else 0
    embedding = 0 if config.tied_embeddings else config.padded_vocab_size * config.hidden_size
    uncast = count.norms + count.router + positions + embedding  # parameters that autocast leaves in fp32
    optimizer = (sharded if topology.zero_stage else full) * (size.master + size.moments)
    muon = muon_step(config, topology)
    optimizer -= muon.state * size.moments // 2
    in_fp32 = size.accumulated > size.gradient  # the step needs no copy
    copies = 4 + (size.gradient if size.gradient < 4 else 0)  # bytes of the flat gradient, in fp32 and before
    buckets = 2 if topology.gpus > 1 else 1
    forward, backward = activations_by_pass(config, topology)
    if topology.accumulation > 1:  # ZeRO keeps its buckets from the first micro-batch to the step
        backward = max(forward, backward)
    sharded_step = topology.zero_stage and not topology.offload_optimizer
    reduced_at_once = topology.zero_stage == 1 and topology.accumulation == 1
    return Memory(
        weights=full * size.weight + (full - uncast) * size.cast,
        gradients=(sharded if topology.zero_stage == 2 or reduced_at_once else full) * size.accumulated,
        optimizer=0 if topology.offload_optimizer else optimizer,
        forward=forward,
        backward=backward,
        buckets=buckets * BUCKET * size.gradient if topology.zero_stage else 0,
        step=muon.memory + (copies * sharded if sharded_step and not in_fp32 else 0),
        host=optimizer if topology.offload_optimizer else 0,
    )


def activations_by_pass(config: GPTConfig, topology: Topology) -> tuple[int, int]:
    """Return the peak bytes of one rank's activations in the forward pass, and in the backward pass, where gradients are reduced.

    The first is at the end, in the head. The second is in a block: its temporary gradients, two inner and two outer values per
    network that a token passes, are added to what this and earlier blocks saved (with checkpointing: to what this one saves
    when it is recomputed), and to the head's gradients, since a tied table's last part is that of the embedding.
    """
    size, length = topology.bytes_per, topology.length(config)
    tokens = topology.micro_batch_size * length
    kept, transient = head_bytes(config, tokens, topology)
    ends = 16 * tokens + tokens * config.hidden_size * size.residual  # ids and positions; input of the final norm
    ends += tokens * config.hidden_size if config.hidden_dropout else 0
    blocks = [saved_by_block(config, layer, tokens, length, size) for layer in range(config.num_layers)]
    if config.moe is not None:  # orders, slots and rows of the all-to-all
        ends += sum(degree > 1 for degree in topology.degrees(config)) * tokens * config.moe.top_k * INDICES
    working = [tokens * _working(config, experts, size) for experts in experts_per_layer(config)]
    if not topology.activation_checkpointing:
        return ends + sum(blocks) + kept + transient, ends + kept + max(map(add, accumulate(blocks), working))
    inputs = sum(saved_by_checkpointed_block(config, layer, tokens, size) for layer in range(config.num_layers))
    return ends + inputs + kept + transient, ends + inputs + kept + max(map(add, blocks, working))


def saved_by_block(config: GPTConfig, block: int, tokens: int, seq_len: int, size: BytesPer) -> int:
    """Return the bytes that one block saves for `tokens` in sequences of `seq_len`, its input included."""
    width, r, c = config.hidden_size, size.residual, size.compute
    # Saved values: before and after the GELU; two products, SiLU, product.
    inner = {"gelu": 2, "swiglu": 4}[config.ffn_network]
    # Input of each norm; mean and 1/std of a row, or 1/rms in fp32.
    norms = 2 * (width * r + (2 * r if config.norm == "layernorm" else 4))
    attention = attention_config(config).saved_bytes(config, c)
    if attention is None:
        name = type(config.attention).__name__
        raise SettingError(
            f"the cost model does not know the memory of {name} (model.config.attention): it has no saved_bytes"
        )
    dropout = 2 * width if config.hidden_dropout else 0
    per_token = norms + attention + dropout
    # Cosines and sines in half precision, of queries and of keys, for the positions of one sequence.
    rotation = 4 * config.rotary_size * c * seq_len if config.rope_theta is not None and c == 2 else 0
    experts = experts_at(config, block)
    if not experts:
        return tokens * (per_token + width * c + inner * config.ffn_size * c) + rotation

    moe = config.moe
    assert moe is not None
    residual, jitter = moe.mlp_type == "residual", moe.noise == "jitter"
    # Gate, residual mix and combination compute in fp32. If the norm's output is fp32, they share it.
    copies = r != 4
    separate = copies or c != r or jitter  # experts and MLP read another tensor than the one saved by the gate
    gate = 4 * width * (2 if jitter else 1)  # input in fp32, and the noise
    gate += 2 * 4 * experts + 4  # logits, probabilities and logsumexp
    # The experts' input, inner values, output (for the gradient of the gate's weight); of rows that are counted a row of ones.
    slots = training_slots(config, experts, tokens)
    row = (2 * width + inner * config.expert_ffn_size + (BIAS_WIDTH * config.bias if slots is None else 0)) * c
    rows = row * (tokens * moe.top_k if slots is None else slots * experts)
    # Chosen expert, token and assignment of a row; weight and scale; a mask.
    indices = moe.top_k * (3 * 8 + 4 + 4 + 1)
    per_token += gate + indices
    if residual:
        per_token += inner * config.shared_ffn_size * c
        if separate:  # else it shares the gate's input
            per_token += width * c
        if moe.mix_outputs:
            # The shared expert, and of the learned mix the experts; their weights, or the gate and `expert_share`.
            per_token += (c + (4 if moe.residual_mix == "learned" else 0)) * width + 8
            per_token += 4 * width if copies or (jitter and c != r) else 0  # input
    gate_weights = 4 * experts * width if size.weight == 2 else 0  # in fp32
    return tokens * per_token + rows + rotation + gate_weights


def saved_by_checkpointed_block(config: GPTConfig, block: int, tokens: int, size: BytesPer) -> int:
    """Return the bytes that a recomputed block saves: its input and its routing."""
    moe, experts = config.moe, experts_at(config, block)
    routing = 0
    if moe is not None and experts:
        # Logits, probabilities and logsumexp; choice, weight and kept of each assignment.
        routing = 2 * 4 * experts + 4 + moe.top_k * (8 + 4 + 1)
        if moe.mix_outputs:
            routing += 4 * moe.mix_outputs  # weights of experts and MLP, or `expert_share`
    return tokens * (config.hidden_size * size.residual + routing)


def head_bytes(config: GPTConfig, tokens: int, topology: Topology) -> tuple[int, int]:
    """Return the bytes of the chunked head that are (saved for the loss's backward pass, temporary while it is computed).

    Saved: the gradients of hidden states and unembedding (fp32, `[P, H]`), which the forward pass computes. Temporary: the
    hidden states, and for a chunk of tokens two fp32 values per logit (logit and probability), or in half precision the
    probability, the gradient and the product `[P, H]` if that is more.
    """
    size, table = topology.bytes_per, config.padded_vocab_size * config.hidden_size
    hidden = tokens * config.hidden_size * size.compute
    logits = min(topology.loss_chunk_size, tokens) * config.padded_vocab_size
    running = 2 * 4 * logits
    if size.compute == 2:
        running = max(running, (4 + 2) * logits + 2 * table)
    return hidden + 4 * table, hidden + running


def _working(config: GPTConfig, experts: int, size: BytesPer) -> int:
    """Return the bytes per token of the temporary gradients of a block."""
    width, moe, extra = config.hidden_size, config.moe, 0
    inner = [config.ffn_size]
    if moe is not None and experts:
        inner = [config.expert_ffn_size] * moe.top_k + [config.shared_ffn_size] * (moe.mlp_type == "residual")
        extra = moe.top_k * 2 * width * 4 if size.compute == 2 else 0  # experts' outputs and gradients in fp32
    matrices = {"gelu": 2, "swiglu": 3}[config.ffn_network]
    return matrices * sum(ffn + width for ffn in inner) * size.compute + extra
