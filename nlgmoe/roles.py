"""Roles of parameters: their initial values, and whether weight decay applies.

    role      initial value                            weight decay
    weight    N(0, init_std)                           yes
    project   N(0, init_std / sqrt(2 * num_layers))    yes            output projections: they write to the residual stream
    bias      0                                        no
    scale     1                                        no             of norms

A module with parameters of its own declares them in an attribute `roles`, name -> role; torch's linear, embedding and norm
layers are known. Its attribute `init_std`, if it has one that is not None, replaces the model's.
"""

from typing import Literal, get_args

from torch import nn

from nlgmoe.validation import SettingError

Role = Literal["weight", "project", "bias", "scale"]
DECAYED = frozenset({"weight", "project"})


def role_of(name: str, module: nn.Module) -> Role:
    """Return the role of a parameter of `module` by its full name, such as `blocks.0.ffn.project.weight`."""
    leaf = name.rpartition(".")[2]
    declared: dict[str, Role] = getattr(module, "roles", {})
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
        return "project" if name.endswith("project.weight") else "weight"
    remedy = f"add roles = {{{leaf!r}: 'weight'}}, or 'project', 'bias' or 'scale', to the class (nlgmoe/roles.py)"
    raise SettingError(f"{name}: {type(module).__name__} does not declare its parameter {leaf}; {remedy}")
