"""`python -m nlgmoe` is the `nlgmoe` command."""

from nlgmoe.cli.start import nlgmoe

nlgmoe()
