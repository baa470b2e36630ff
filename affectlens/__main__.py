"""`python -m affectlens` is the command line."""

from affectlens.cli import main

main()
