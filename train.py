"""fit, validate, test, predict: `python train.py fit --config configs/quickstart.yaml`."""

from nlgmoe.process import prepare_process

if __name__ == "__main__":
    prepare_process()
    from nlgmoe.cli.train import main

    main()
