"""The two commands: `train.py` (LightningCLI) and `nlgmoe`."""

# Private names of other libraries that this folder uses: name, files, reason, the public way that is missing.
BORROWED = (
    (
        "argparse.ArgumentParser._actions",
        ("hints.py", "train.py"),
        "the settings of a parser, to check names before it parses",
        "argparse and jsonargparse list no options",
    ),
    (
        "jsonargparse._typehints.ActionTypeHint._typehint",
        ("hints.py", "train.py"),
        "their types, to say what null and sections are; set for trainer.strategy and trainer.limit_*",
        "`Action.type` is None for a type hint; `RunTrainer.__init__` could annotate those that are set",
    ),
    (
        "lightning.pytorch.cli.LightningCLI._run_subcommand",
        ("train.py",),
        "the allocator is configured after the trainer exists, for a run only",
        "`after_instantiate_classes` is called by `load_config` too",
    ),
)
