"""`python -m vitcli` is `vit`."""

from vitcli.cli import main

main()
