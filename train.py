"""fit, validate, test, predict: `python train.py fit --config configs/quickstart.yaml`."""

from nlgmoe.cli.start import train

if __name__ == "__main__":
    train()
