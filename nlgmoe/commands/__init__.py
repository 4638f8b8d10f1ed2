"""The subcommands of `nlgmoe`. Those of one tool are in its folder in `nlgmoe/tools/`."""
