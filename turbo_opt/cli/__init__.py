"""The command line: one file for each command or small family; `main` wires them."""
