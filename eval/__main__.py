"""`python -m eval` runs `eval-student`."""

from eval.cli import main

main()
