"""`llavamod-offline`, also as `python -m llavamod_offline`: handles signals before the slow imports."""

from llavamod_offline import signals


def main() -> None:
    """Run the command."""
    signals.watch()
    from llavamod_offline.cli import main

    main()


if __name__ == "__main__":
    main()
