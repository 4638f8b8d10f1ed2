"""The paper's claims at a size that two CPU cores train: `make reproduce`; docs/reproduce.md has the results."""
