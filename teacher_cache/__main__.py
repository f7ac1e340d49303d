"""`python -m teacher_cache` runs `cache-teacher`."""

from teacher_cache.cli.main import main

main()
