"""`nlgmoe check`: properties that any MoE layer must have, tested on a layer of this project, of a user or of another library."""
