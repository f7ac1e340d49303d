"""`eval-student`, also as `python -m eval`: handles signals before the slow imports."""

from llavamod_offline import signals


def main() -> None:
    """Run the command."""
    signals.watch()
    from eval.cli import main

    main()


if __name__ == "__main__":
    main()
