"""The paper's claims at a size that two CPU cores train: `make reproduce`; docs/results/claims.md has the results."""
