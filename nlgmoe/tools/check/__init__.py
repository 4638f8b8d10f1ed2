"""`nlgmoe check`: properties that any MoE layer or attention must have, of this project or of others."""
