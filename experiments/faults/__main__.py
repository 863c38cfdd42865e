"""Processes that die, stop, are slow, cannot write or cannot be reached: the matrix of faults."""

from experiments._lib.command import run_script
from experiments.faults import matrix

if __name__ == "__main__":
    run_script(matrix.main, matrix.Args, matrix.__doc__)
