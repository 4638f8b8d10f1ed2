"""A MoE layer of this project, from a configuration, at small widths: in one process, and divided over two ranks."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as F

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.balance import add_router_losses, router_losses
from nlgmoe.layers.moe import MoELayer
from nlgmoe.layers.router import Router, TopKRouter
from nlgmoe.layers.routing import Routing, RoutingContext
from nlgmoe.model.gpt import initialise
from nlgmoe.pyramid import ExpertPlacement, experts_per_layer
from nlgmoe.tools.check.layer import Batch, Failed, Layer, NotApplicable, Output, gradients, require_close, trained
from nlgmoe.validation import SettingError

UNREAD = ("num_kv_heads", "head_dim", "attention", "rope_theta", "rotary_dim", "rotary_scaling")  # by a MoE layer
MOST_EXPERTS = 8  # of a layer under test, unless `top_k` is larger
RANKS = 2


@dataclass(frozen=True)
class OwnLayer(Layer):
    """The last MoE layer of a configuration."""

    config: GPTConfig = GPTConfig(1)  # noqa: RUF009 (frozen)

    @property
    def moe(self) -> MoEConfig:
        """Return the settings of the layer."""
        assert self.config.moe is not None
        return self.config.moe

    def build(self) -> nn.Module:
        return MoELayer(self.config, self.config.num_layers - 1)

    def forward(self, module: nn.Module, batch: Batch) -> Output:
        y, routing = module(batch.x, self._context(batch))
        return self._output(y, routing)

    def without_dispatch(self, module: nn.Module, batch: Batch) -> Output:
        """See `Layer`: runs router and expert network, and none of `LocalDispatcher`, which reads counts on a CPU."""
        x = batch.x.flatten(0, 1)
        routing = module.router(x, self._context(batch))  # type: ignore[operator]
        return self._output(self.weighted_sum(module, x, routing), routing)

    def _context(self, batch: Batch) -> RoutingContext:
        counted = torch.ones_like(batch.tokens) if batch.mask is None else batch.mask.long()
        positions = (counted.cumsum(1) - 1).clamp_min(0) + batch.first_position
        return RoutingContext(batch.tokens % self.config.vocab_size, batch.mask, batch.noise_key, positions)

    def _output(self, y: Tensor, routing: Routing) -> Output:
        aux, _ = add_router_losses(y.new_zeros((), dtype=routing.weight.dtype), self.moe, [routing])
        loss_coeff, z_loss_coeff = self.moe.loss_coefficients
        other = z_loss_coeff * router_losses([routing])[1]
        if loss_coeff and routing.probs is not None:
            other = other + sum(routing.losses.values())  # the router's own losses need not balance
        return Output(y, routing, aux, other)

    def capacity(self, tokens: int) -> int:
        """See `Layer`; the formula of the paper's code, in fp32."""
        share = np.float32(tokens / self.num_experts) * np.float32(self.moe.train_capacity_factor * self.top_k)
        return max(self.moe.min_capacity, math.ceil(share))

    def gate_weight(self, module: nn.Module) -> Tensor | None:
        """See `Layer`; None also for a weight of that shape whose product with the input does not give the logits.

        A gate that normalises its input, such as a cosine, or one of two factors, computes logits that no batch can set. None too
        if tokens of one id choose the same experts whatever the gate computes.
        """
        shape, router = (self.num_experts, self.hidden_size), module.router
        tensors: list[Tensor] = [*router.parameters(), *router.buffers()]  # type: ignore[union-attr]
        weight = next((tensor for tensor in tensors if tensor.shape == shape), None)
        if weight is None:
            return None
        with torch.no_grad():
            routings = [_route(module, scale * weight) for scale in (1, 2)]
            if len(weight) > 1 and bool((routings[0].expert == routings[0].expert[0]).all()):
                return None
            one, two = (routing.logits for routing in routings)  # [E, E]
            if one is None or two is None:
                return weight
            pair = torch.stack([one.flatten(), (weight @ weight.t()).flatten()])  # [2, E * E]
        linear = len(weight) == 1 or torch.corrcoef(pair)[0, 1] > 0.5
        return weight if linear and not torch.allclose(one, two, rtol=0.05) else None

    def gate_bias(self, module: nn.Module) -> Tensor | None:
        """See `Layer`: the logits of a token of zeros."""
        logits = _route(module, torch.zeros(1, self.hidden_size, dtype=next(module.parameters()).dtype)).logits
        return None if logits is None else logits[0]

    def gate(self, module: nn.Module) -> list[nn.Parameter]:
        return [value for value in module.router.parameters() if value.requires_grad]  # type: ignore[union-attr]

    def expert(self, module: nn.Module, index: int, x: Tensor) -> Tensor | None:
        assert isinstance(module, MoELayer)
        values = dict(module.experts.named_parameters())

        def linear(name: str, rows: Tensor) -> Tensor:
            y = rows @ values[f"{name}_weight"][index]
            return y + values[f"{name}_bias"][index] if module.experts.bias else y

        return module.experts.network.forward(x, linear)

    def join(self, module: nn.Module, x: Tensor, experts: Tensor) -> Tensor:
        assert isinstance(module, MoELayer)
        if module.shared_expert is None:
            return experts
        if module.coefficient is None:
            return experts + module.shared_expert(x)
        logits = module.coefficient(x)
        if self.moe.residual_mix == "sigmoid":
            return experts + module.shared_expert(x) * logits.sigmoid()
        share = F.softmax(logits, dim=-1)
        return experts * share[:, :1] + module.shared_expert(x) * share[:, 1:]

    def after_step(self, module: nn.Module, routings: Sequence[Routing]) -> bool:
        router = module.router
        assert isinstance(router, Router)
        router.after_step(torch.stack([routing.step_statistic for routing in routings]).sum(0))
        return router.learns_from_steps

    def odd(self) -> Layer:
        return own_layer(
            replace(self.config, hidden_size=15, ffn_hidden_size=13), self.name, width=15, layers=self.config.num_layers
        )

    def on_ranks(self) -> OwnLayer:
        """Return the layer with experts that the ranks divide, and a balance loss of each micro-batch."""
        multiple = math.lcm(RANKS, (self.moe.groups or (1, 1))[0])
        experts = multiple * -(-self.num_experts // multiple)
        moe = replace(self.moe, num_experts=experts, aux_scope="rank")
        return own_layer(replace(self.config, moe=moe), self.name, most=experts, layers=self.config.num_layers)

    def build_on_rank(self, whole: nn.Module) -> nn.Module:
        """Make this rank's share of `whole`, with its weights. A collective."""
        count = self.num_experts // distributed.get_world_size()
        first = distributed.get_rank() * count
        share = MoELayer(
            self.config, self.config.num_layers - 1, ExpertPlacement(first, count, distributed.group.WORLD)
        )
        share.dispatcher.equal_batches = True  # as in training on `PileDataModule`
        values = whole.state_dict()
        for name in values:
            if name.startswith("experts."):
                values[name] = values[name][first : first + count]
        share.to(next(whole.parameters()).dtype).load_state_dict(values)
        return share.train(whole.training)


@torch.no_grad()
def _route(module: nn.Module, x: Tensor) -> Routing:
    """Route tokens of one sequence and one id, `[N, H]`."""
    zero = torch.zeros(1, len(x), dtype=torch.long)
    routing: Routing = module.router(x, RoutingContext(zero, noise_key=(0, 0, 0), positions=zero))  # type: ignore[operator]
    return routing


def own_layer(config: GPTConfig, name: str, width: int = 16, most: int = MOST_EXPERTS, layers: int = 1) -> OwnLayer:
    """Return the last of the first `layers` MoE layers of a configuration, at small widths.

    It has at most 8 experts, or twice `top_k`, or the next number that the groups divide, with two experts a group.
    """
    if config.moe is None or not any(experts_per_layer(config)):
        raise SettingError(f"{name} has no MoE layer; set model.config.moe")
    top_k, (number, chosen) = config.moe.top_k, config.moe.groups or (1, 1)
    fewest = number * max(2, -(-top_k // chosen))  # two in each group
    divided = number * -(-max(most, 2 * top_k) // number)
    experts = min(max(experts_per_layer(config)), max(divided, fewest))
    inner = 13 if width % 2 else 16
    shared = inner if config.moe.mlp_type == "residual" else None
    moe = replace(config.moe, num_experts=experts, expert_interval=1, expert_ffn_size=inner, shared_ffn_size=shared)
    small = replace(
        config,
        seq_len=64,
        num_layers=layers,
        hidden_size=width,
        num_heads=1,
        ffn_hidden_size=inner,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        moe=moe,
        **dict.fromkeys(UNREAD),  # type: ignore[arg-type]
    )
    layer = MoELayer(small, layers - 1)
    initialise(layer, small, 0)  # refuses a parameter without a role, as training does
    router = layer.router
    order, drops = None, None
    if isinstance(router, TopKRouter) and type(router)._within_capacity is TopKRouter._within_capacity:
        order = {1: "random" if moe.random_token_selection else "position", 2: "position"}.get(top_k, "score")
    if "token_dropping" in moe.router_fields and not moe.token_dropping:
        drops = False
    elif moe.router_fields.issuperset({"token_dropping", "train_capacity_factor", "min_capacity"}):
        drops = True  # the router reads what `capacity` is computed from; else its capacity, if any, is its own
    return OwnLayer(
        name=name,
        hidden_size=width,
        num_experts=experts,
        top_k=top_k,
        weight_sum=router.weight_sum or ("free" if isinstance(router, TopKRouter) else None),
        order=order,  # type: ignore[arg-type]
        takes_mask=True,
        takes_key=True,
        drops=drops,
        drops_in_evaluation=moe.eval_token_dropping,
        estimated_gradient=router.estimated_gradient,
        config=small,
    )


def ranks_equal_one_process(layer: Layer) -> str:
    """Compare outputs and averaged gradients of two gloo ranks with those of one process that accumulates their micro-batches."""
    if not isinstance(layer, OwnLayer):
        raise NotApplicable("the layer does not declare how its experts are divided over ranks")
    if scalars := [name for name, parameter in layer.make().named_parameters() if parameter.dim() == 0]:
        raise Failed(f"{scalars[0]} has no dimension: DeepSpeed cannot send it to other ranks; give it the shape [1]")
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.spawn(_rank, (layer, Path(folder)), nprocs=RANKS, daemon=True)
        except Exception as error:
            files = sorted(Path(folder).glob("*.failed"), key=lambda file: file.stat().st_mtime_ns)
            if not files:
                raise
            raise Failed(files[0].read_text(encoding="utf-8")) from error  # the other rank fails as a consequence
    return f"{RANKS} ranks, one process with their micro-batches"


def _rank(rank: int, layer: OwnLayer, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        _compare(layer, rank, folder)
    except Exception as error:
        kind = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
        reason = " ".join(f"{RANKS} ranks, rank {rank}: {kind}{error}".split())[:200]
        (folder / f"{rank}.failed").write_text(reason, encoding="utf-8")
        os._exit(1)  # the other rank may wait in a collective


def _compare(layer: OwnLayer, rank: int, folder: Path) -> None:
    placed = layer.on_ranks()
    whole, batch = placed.make(), Batch.random(placed, 2 * RANKS, 8)
    parts = [batch[2 * part : 2 * part + 2] for part in range(RANKS)]
    runs = [_step(placed, whole, part, seed) for seed, part in enumerate(parts)]
    store = distributed.FileStore(str(folder / "store"), RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    try:
        actual, grads = _step(placed, placed.build_on_rank(whole), parts[rank], rank)
        require_close("output", actual, runs[rank][0], 1e-6)
        for name, gradient in grads.items():
            wanted = torch.stack([accumulated[name] for _, accumulated in runs]).mean(0)
            if gradient.shape == wanted.shape:
                distributed.all_reduce(gradient)
            else:  # a rank's experts have seen the tokens of all ranks
                wanted = wanted[rank * len(gradient) : (rank + 1) * len(gradient)]
            require_close(f"gradient of {name}", gradient / RANKS, wanted, 1e-6)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def _step(layer: Layer, module: nn.Module, batch: Batch, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    output = layer.run(module, batch, seed)
    loss = output.y.square().mean() + (0 if output.aux is None else output.aux)
    return output.y.detach(), gradients(trained(module), loss)
