"""Judge an idea against the standard MoE of the claims: `make gate`; docs/gate.md has the contract and the rows."""
