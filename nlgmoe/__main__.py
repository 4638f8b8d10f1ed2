"""`python -m nlgmoe` is the `nlgmoe` command."""

from nlgmoe.commands.main import main

main()
