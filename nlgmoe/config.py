"""The model's configuration: two frozen dataclasses that check their fields.

Names follow DeepSpeed's tutorial; docs/coming_from.md maps the flags of Megatron-DeepSpeed to fields.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from nlgmoe.parts import (
    ROUTER_FIELDS,
    AttentionConfig,
    ExpertConfig,
    RotaryScaling,
    RouterConfig,
    pack_parts,
    with_parts,
)
from nlgmoe.validation import SettingError, require_above, require_at_least, require_valid


@dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-experts layers.

    Attributes:
        num_experts: experts per MoE layer: one number for all of them, or one number per MoE position from the first to
            the last (the pyramid of PR-MoE, such as `[32, 32, 64]`). 0 makes the block at that position dense: `[0, 8, 0, 16]`.
        expert_interval: blocks from one MoE position to the next: with 2 the 2nd, 4th, ... blocks are positions; with 1 every
            block is, so that `num_experts` is a map of all layers.
        top_k: experts per token.
        mlp_type: `standard`, or `residual`: every token also passes a shared dense MLP (paper, section 4.1.1).
        residual_mix: how a residual layer joins the two: `learned` (a softmax of a linear layer with two outputs, as in
            DeepSpeed's code), `sum` (the paper's plain sum), or `sigmoid` (the shared expert times the sigmoid of a linear layer
            with one output and no bias, plus the experts: Qwen2-MoE, arXiv 2407.10671).
        expert_ffn_size: inner width of an expert, in values per token; null: the model's. `num_experts` 32 and `top_k` 4 at a
            quarter of the width are fine-grained experts (DeepSeekMoE, arXiv 2401.06066).
        shared_ffn_size: inner width of a residual layer's shared expert, in values per token; null: the model's.
        train_capacity_factor: capacity of an expert in training, in assignments, as a multiple of its fair share
            `top_k * tokens / experts`, rounded up; `tokens` counts one rank's micro-batch, padding included.
        eval_capacity_factor: capacity of an expert in evaluation, as that multiple; used only with `eval_token_dropping`.
        min_capacity: smallest capacity of an expert, in assignments.
        token_dropping: training drops assignments over capacity; if false, every assignment is computed (dropless). With `top_k`
            2 first choices are kept before second ones, each in token order; above 2 the most probable assignments do.
        eval_token_dropping: evaluation drops too, as in the tutorial; `token_dropping` is for training alone. By default
            evaluation is dropless, so that the output for a sequence never depends on its neighbours in the batch.
        random_token_selection: with `top_k` 1, in training, an expert that is over capacity keeps random tokens; if
            false, and in evaluation, it keeps the first tokens of the micro-batch, sequence by sequence.
        noise: training noise on the routing: `jitter` multiplies each value of the gate's input by U(0.99, 1.01), `rsample`
            adds Gumbel noise to the logits for the choice only, not for the weights (`top_k` 1 only).
        second_expert: with `top_k` 2, the second expert in training is a `sample` from the gate's distribution without the
            first, or the `argmax`; in evaluation it is the `argmax`.
        groups: `[8, 4]`: the experts of a layer are 8 groups of equal size, in order, and a token chooses its experts within the
            4 groups with the highest scores (DeepSeek-V2, arXiv 2405.04434, and V3); null: among all experts. A group's score is
            the maximum of its probabilities; with the sigmoid router, the sum of its two highest biased scores.
        normalize_weights: the weights of a token's kept experts sum to `gate_scale`; null: if `top_k` is above 1. Mixtral (arXiv
            2401.04088) and Qwen3-MoE normalise, OLMoE (arXiv 2409.02060) does not.
        gate_scale: multiplies the weights of the experts' outputs.
        gate_init_std: standard deviation of the gate's initial weights; null: the model's `init_std`.
        loss_coeff: weight of the load-balancing loss (`layers/balance.py`), which is summed over the MoE layers.
        z_loss_coeff: weight of the router z-loss, which is summed over the MoE layers.
        aux_scope: the load-balancing loss is computed from the loads of each rank's micro-batch alone (`rank`, as in DeepSpeed:
            any number of ranks computes the same), or of the micro-batches of all ranks together (`global`: depends on the
            number of ranks).
        router: another router than the paper's, by class_path (docs/laboratory.md; your own: docs/extending.md); its
            `reads_fields` lists those of `ROUTER_FIELDS` that it reads. null: the paper's, which reads all.
        expert: another expert network than the dense blocks', by class_path; null: `ffn_network`.
    """

    num_experts: int | list[int] = 8
    expert_interval: int = 2
    top_k: int = 1
    mlp_type: Literal["standard", "residual"] = "standard"
    residual_mix: Literal["learned", "sum", "sigmoid"] = "learned"
    expert_ffn_size: int | None = None
    shared_ffn_size: int | None = None
    train_capacity_factor: float = 1.0
    eval_capacity_factor: float = 1.0
    min_capacity: int = 4
    token_dropping: bool = True
    eval_token_dropping: bool = False
    random_token_selection: bool = True
    noise: Literal["jitter", "rsample"] | None = None
    second_expert: Literal["sample", "argmax"] = "sample"
    groups: list[int] | None = None
    normalize_weights: bool | None = None
    gate_scale: float = 1.0
    gate_init_std: float | None = None
    loss_coeff: float = 0.01
    z_loss_coeff: float = 0.0
    aux_scope: Literal["rank", "global"] = "rank"
    router: RouterConfig | None = None
    expert: ExpertConfig | None = None

    def __post_init__(self) -> None:
        require_valid(self)
        counts = self.num_experts if isinstance(self.num_experts, list) else [self.num_experts]
        if not counts:
            raise SettingError("num_experts is an empty list; give one number per MoE layer or a single number")
        if min(counts) < 0 or max(counts) < 1:
            problem = f"num_experts={self.num_experts} must have a number above 0 and none below 0"
            raise SettingError(f"{problem}; set moe to null for a dense model")
        fewest, top_k = min(count for count in counts if count), f"top_k={self.top_k}"
        require_at_least(1, self, "expert_interval")
        if not 1 <= self.top_k <= fewest:
            raise SettingError(f"{top_k} must be between 1 and the smallest num_experts ({fewest})")
        if self.groups is not None:
            number, chosen = self.groups if len(self.groups) == 2 else (1, 0)
            fits = 1 <= chosen <= number and not any(count % number for count in counts)
            if not fits or self.top_k > chosen * fewest // number:
                raise SettingError(
                    f"groups={self.groups} must be two numbers: of groups, which divides num_experts={self.num_experts}, and of "
                    f"groups that a token chooses from, with at least {top_k} experts, such as [8, 4]"
                )
        widths = ("expert_ffn_size", "shared_ffn_size")
        require_at_least(1, self, *widths, remedy=", or null for the model's ffn_hidden_size")
        factors = ("train_capacity_factor", "eval_capacity_factor")
        require_above(0, self, *factors, remedy="; 1.0 is an expert's fair share")
        require_at_least(0, self, "min_capacity")
        require_at_least(0, self, "loss_coeff", "z_loss_coeff", remedy="; 0 turns that loss off")
        require_above(0, self, "gate_scale")
        require_above(0, self, "gate_init_std", remedy=", or null for the model's init_std")
        if self.noise == "rsample" and self.top_k > 1:
            raise SettingError(f"noise=rsample works with top_k=1 only ({top_k}); use noise=jitter, or null")
        if self.normalize_weights and self.top_k == 1:
            problem = "normalize_weights=True with top_k=1 makes every weight the same, and the gate learns nothing"
            raise SettingError(f"{problem}; leave it out")
        if self.router is not None:
            self.router.check_settings(self)

    @property
    def router_fields(self) -> frozenset[str]:
        """The fields that the router reads, of `ROUTER_FIELDS`; the paper's reads all."""
        return ROUTER_FIELDS if self.router is None else self.router.reads_fields

    @property
    def loss_coefficients(self) -> tuple[float, float]:
        """Weights of balance loss and z-loss; 0 for one that the router does not read: it may balance in its own way."""
        read = self.router_fields
        return self.loss_coeff * ("loss_coeff" in read), self.z_loss_coeff * ("z_loss_coeff" in read)

    @property
    def mix_outputs(self) -> int:
        """Outputs of the linear layer that weights a residual layer's two branches; 0: there is none."""
        return {"learned": 2, "sigmoid": 1, "sum": 0}[self.residual_mix] if self.mlp_type == "residual" else 0

    @property
    def normalizes(self) -> bool:
        """True if the weights of a token's kept experts sum to `gate_scale`."""
        return self.top_k > 1 if self.normalize_weights is None else self.normalize_weights


@dataclass(frozen=True)
class GPTConfig:
    """A pre-norm decoder. The defaults are the paper's block, GPT-3's; `configs/block/` has those of open models.

    Attributes:
        vocab_size: number of token ids; logits exist for exactly these.
        seq_len: longest sequence that the model reads, in tokens; the number of learned positions, if positions are learned.
            Training and evaluation read sequences of `data.seq_len`.
        num_layers: number of transformer blocks.
        hidden_size: width of the residual stream, in values per token.
        num_heads: number of attention heads; they divide `hidden_size`, unless `head_dim` is set.
        ffn_hidden_size: inner width of the feed-forward layers and of every expert, in values per token; null
            means `4 * hidden_size`.
        hidden_dropout: dropout probability on the embeddings and on the output of each branch.
        attention_dropout: dropout probability on the attention weights.
        init_std: standard deviation of the initial weights; `init_std / sqrt(2 * num_layers)` in output projections.
        layer_norm_eps: added to the variance in LayerNorms, and to the mean square in RMSNorms.
        vocab_size_multiple: the embedding table is padded to a multiple of this (for fast GEMMs); padding gets no logits.
        ffn_network: network of feed-forward layers, shared experts and experts: `gelu`, two matrices (the paper's), or `swiglu`
            (arXiv 2002.05202), three matrices of the same inner width, and so 1.5 times the parameters.
        norm: `layernorm`, or `rmsnorm` (arXiv 1910.07467), which has no mean and no bias.
        rope_theta: rotary position embeddings (arXiv 2104.09864) with this base: values i and i + D / 2 of a head are rotated by
            position * rope_theta^(-2i / D), such as 10000; null: learned positions.
        rotary_dim: the number of values of a head that are rotated, the first ones; even; null: all.
        rotary_scaling: a change of the rotary frequencies for texts longer than those of training, by class_path: `nlgmoe.Yarn`
            or `nlgmoe.Llama3`; null: none.
        attention: another attention than multi-head attention, by class_path: `nlgmoe.MLAConfig`, or your own
            (docs/extending.md); its `reads_fields` lists those of `ATTENTION_FIELDS` that it reads.
        attention_scale: multiple of the product of a query and a key in the softmax; null: 1 / sqrt(width of a head).
        num_kv_heads: number of key and value heads, each shared by `num_heads / num_kv_heads` query heads (arXiv 2305.13245);
            null: `num_heads`.
        head_dim: width of a head, in values; null: `hidden_size / num_heads`.
        qk_norm: RMSNorm of queries and keys: of each `head`, or of the whole `projection`; null: none.
        bias: biases in attention, feed-forward layers, experts and LayerNorms; the learned residual mix always has one.
        qkv_bias: biases of queries, keys and values; null: as `bias`.
        embedding_scale: multiple of the token embeddings that is read (Granite's `embedding_multiplier`).
        residual_scale: multiple of each branch's output that is added to the residual stream.
        logit_scale: multiple of the final norm's output from which logits are computed.
        tied_embeddings: the head and the token embedding share one matrix.
        moe: mixture-of-experts layers, or null for a dense model.
    """

    vocab_size: int
    seq_len: int = 2048
    num_layers: int = 24
    hidden_size: int = 1024
    num_heads: int = 16
    ffn_hidden_size: int | None = None
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_std: float = 0.014
    layer_norm_eps: float = 1e-5
    vocab_size_multiple: int = 128
    ffn_network: Literal["gelu", "swiglu"] = "gelu"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    rope_theta: float | None = None
    rotary_dim: int | None = None
    rotary_scaling: RotaryScaling | None = None
    attention: AttentionConfig | None = None
    attention_scale: float | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: Literal["projection", "head"] | None = None
    bias: bool = True
    qkv_bias: bool | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    tied_embeddings: bool = True
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        require_valid(self)
        sizes = ("vocab_size", "seq_len", "num_layers", "hidden_size", "num_heads", "vocab_size_multiple")
        require_at_least(1, self, *sizes, "num_kv_heads", "head_dim", "rotary_dim")
        require_at_least(1, self, "ffn_hidden_size", remedy=", or null for 4 * hidden_size")
        scales = ("attention_scale", "embedding_scale", "residual_scale", "logit_scale")
        require_above(0, self, "init_std", "layer_norm_eps", *scales)
        require_above(0, self, "rope_theta", remedy=", or null for learned positions")
        self._check_attention()
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if self.moe is None:
            return
        counts, interval = self.moe.num_experts, self.moe.expert_interval
        positions = self.num_layers // interval
        if positions < 1:
            problem = f"expert_interval={interval} leaves no MoE layer among num_layers={self.num_layers}"
            raise SettingError(f"{problem}; lower it, or set moe to null")
        if isinstance(counts, list) and len(counts) != positions:
            blocks = f"num_layers={self.num_layers} with expert_interval={interval} makes {positions} MoE positions"
            raise SettingError(f"num_experts={counts} has {len(counts)} entries, but {blocks}")

    def _check_attention(self) -> None:
        if self.head_dim is None and self.attention is None and self.hidden_size % self.num_heads:
            raise SettingError(f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}")
        if self.num_heads % self.kv_heads:
            raise SettingError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.attention is not None:
            self.attention.check_settings(self)
        if self.rope_theta is None:
            return
        if self.rotary_dim is not None and self.rotary_dim > self.head_size:
            problem = f"rotary_dim={self.rotary_dim} is above the {self.head_size} values of a head"
            raise SettingError(f"{problem}; null rotates all of them")
        if self.rotary_size % 2:
            problem = f"rope_theta={self.rope_theta} rotates pairs of values, but {self.rotary_size} values of a head are rotated"
            raise SettingError(f"{problem}; set an even head_dim, rotary_dim, or other num_heads")

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def has_qkv_bias(self) -> bool:
        """True if queries, keys and values have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def rotary_size(self) -> int:
        """Number of values of a head that are rotated."""
        return (self.attention or AttentionConfig()).rotary_size(self)

    @property
    def ffn_size(self) -> int:
        """Inner width of a feed-forward layer."""
        return 4 * self.hidden_size if self.ffn_hidden_size is None else self.ffn_hidden_size

    @property
    def expert_ffn_size(self) -> int:
        """Inner width of an expert."""
        return self.ffn_size if self.moe is None or self.moe.expert_ffn_size is None else self.moe.expert_ffn_size

    @property
    def shared_ffn_size(self) -> int:
        """Inner width of a shared expert."""
        return self.ffn_size if self.moe is None or self.moe.shared_ffn_size is None else self.moe.shared_ffn_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: `vocab_size` rounded up to `vocab_size_multiple`."""
        return -(-self.vocab_size // self.vocab_size_multiple) * self.vocab_size_multiple

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON and YAML, which `from_dict` reads. Parts that are null are left out."""
        values = pack_parts(asdict(self), self)
        if self.moe is not None:
            values["moe"] = pack_parts(values["moe"], self.moe)
        return values

    @staticmethod
    def from_dict(values: dict[str, Any]) -> GPTConfig:
        """Build the configuration from `to_dict`'s values; see `part_from_dict` for classes outside `nlgmoe`."""
        moe = values.get("moe")
        if moe is not None:
            if not isinstance(moe, dict):
                raise SettingError(f"moe={moe!r} must hold settings by name, or be null for a dense model")
            values = {**values, "moe": MoEConfig(**with_parts(moe))}
        return GPTConfig(**with_parts(values))
