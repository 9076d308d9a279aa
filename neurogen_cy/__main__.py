"""`python -m neurogen_cy` is the command `neurogen`."""

from neurogen_cy.cli import main

main(prog_name="neurogen")
