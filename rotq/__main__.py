"""``python -m rotq``."""

from rotq.cli.main import main

main(prog_name="rotq")
