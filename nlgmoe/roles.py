"""Roles of parameters: their initial values, and whether weight decay applies; and the components of the model that have them.

    role      initial value                            weight decay
    weight    N(0, init_std)                           yes
    output    N(0, init_std / sqrt(2 * num_layers))    yes            output projections: they write to the residual stream
    bias      0                                        no
    scale     1                                        no             of norms

A module with parameters of its own declares them in an attribute `roles`, name -> role, to which those of its base classes are
added; torch's linear, embedding and norm layers are known. Its attribute `init_std`, if it has one that is not None, replaces the
model's.
"""

import re
from typing import Literal, get_args

from torch import nn

from nlgmoe.validation import SettingError

Role = Literal["weight", "output", "bias", "scale"]
# Linear layers that write to the residual stream, by name: an attention's `output`, a dense layer's `down`.
_OUTPUTS = re.compile(r"(^|\.)(output|(ffn|shared_expert)\.down)\.weight")
DECAYED = frozenset({"weight", "output"})
Component = Literal["router", "experts", "attention", "ffn", "norms", "embeddings"]
# The first pattern that fits a parameter's name. A router's own norm belongs to the router, an attention's to the norms; the
# mixing coefficient and the shared expert of a residual layer to the feed-forward layers, the head to the embeddings.
COMPONENTS: dict[Component, re.Pattern[str]] = {
    "router": re.compile(r"\.moe\.router\."),
    "experts": re.compile(r"\.moe\.experts\."),
    "ffn": re.compile(r"\.ffn\.|\.moe\.(shared_expert|coefficient)\."),
    "norms": re.compile(r"norm\."),
    "attention": re.compile(r"\.attention\."),
    "embeddings": re.compile(r"embedding\.|^head\."),
}


def declared_roles(module: nn.Module) -> dict[str, Role]:
    """Return the roles that a module and its classes declare, those of base classes included."""
    declared: dict[str, Role] = {}
    for holder in (*reversed(type(module).__mro__), module):
        declared |= vars(holder).get("roles", {})
    return declared


def role_of(name: str, module: nn.Module) -> Role:
    """Return the role of a parameter of `module` by its full name, such as `blocks.0.ffn.down.weight`."""
    leaf = name.rpartition(".")[2]
    declared = declared_roles(module)
    if leaf in declared:
        if declared[leaf] not in get_args(Role):
            declaration = f"{type(module).__name__} declares {leaf} as {declared[leaf]!r}"
            raise SettingError(f"{name}: {declaration}; a role is one of {', '.join(get_args(Role))}")
        return declared[leaf]
    if leaf == "bias" and isinstance(module, nn.Linear | nn.LayerNorm):
        return "bias"
    if leaf == "weight" and isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return "scale"
    if leaf == "weight" and isinstance(module, nn.Linear | nn.Embedding):
        if name.endswith(".project.weight"):
            raise SettingError(f"{name}: rename this layer: an output projection is named output, no longer project")
        return "output" if _OUTPUTS.search(name) else "weight"
    remedy = f"add roles = {{{leaf!r}: 'weight'}}, or 'output', 'bias' or 'scale', to the class (nlgmoe/roles.py)"
    raise SettingError(f"{name}: {type(module).__name__} does not declare its parameter {leaf}; {remedy}")


def component_of(name: str) -> Component:
    """Return the component of a parameter, or of a checkpoint's entry, by its full name."""
    for component, pattern in COMPONENTS.items():
        if pattern.search(name):
            return component
    raise SettingError(f"{name} belongs to no component of the model ({', '.join(COMPONENTS)}); see nlgmoe/roles.py")
