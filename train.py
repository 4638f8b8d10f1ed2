"""fit, validate, test, predict: `python train.py fit --config configs/quickstart.yaml`."""

from nlgmoe.cli.train import main

if __name__ == "__main__":
    main()
