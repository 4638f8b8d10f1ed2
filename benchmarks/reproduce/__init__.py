"""The paper's claims at a size that two CPU cores train: `make reproduce`; docs/claims.md has the results."""
