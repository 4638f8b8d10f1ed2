"""fit, validate, test, predict: `python train.py fit --config configs/quickstart.yaml`."""

from nlgmoe.process import prepare_threads

if __name__ == "__main__":
    prepare_threads()
    from nlgmoe.cli.train import main

    main()
