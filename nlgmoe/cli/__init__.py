"""The two commands: `train.py` (LightningCLI) and `nlgmoe`."""
