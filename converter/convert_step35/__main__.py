"""`python -m convert_step35` is `convert-step35`."""

from convert_step35.cli import main

main()
