"""`python -m llavamod_offline` runs `llavamod-offline`."""

from llavamod_offline.cli import main

main()
