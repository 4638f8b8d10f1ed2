"""The `nlgmoe` command."""

from __future__ import annotations

from jsonargparse import auto_cli

from nlgmoe.cli.prepare_data import prepare_data


def main(args: list[str] | None = None) -> None:
    """Run one of the subcommands; mistakes in the settings end with one line instead of a traceback."""
    try:
        auto_cli({"prepare-data": prepare_data}, args=args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
