"""`python -m train` runs `train-student`."""

from train.cli import main

main()
