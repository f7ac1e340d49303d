"""`train-student`, also as `python -m train`: handles signals before the slow imports."""

from llavamod_offline import signals


def main() -> None:
    """Run the command."""
    signals.watch()
    from train.cli import main

    main()


if __name__ == "__main__":
    main()
