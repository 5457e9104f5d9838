"""One command for a machine with a GPU: `make gpu`, or `python -m bench.gpu`."""
