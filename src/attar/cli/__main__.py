"""`python -m attar.cli`: the command line where the `attar` script is not on the path."""

from attar.cli import main

main()
