"""`python -m nlgmoe` is the `nlgmoe` command."""

from nlgmoe.cli.main import main

main()
