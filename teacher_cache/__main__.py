"""`cache-teacher`, also run as `python -m teacher_cache`: handles signals before the slow imports."""

from llavamod_offline import signals


def main() -> None:
    """Run the command."""
    signals.watch()
    from teacher_cache.cli.main import main

    main()


if __name__ == "__main__":
    main()
