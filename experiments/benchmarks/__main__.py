"""The machine that figures are measured on, and the benchmarks that there are."""

from experiments.__main__ import listed
from experiments._lib.machine import machine

if __name__ == "__main__":
    print(machine(), listed("experiments.benchmarks."), sep="\n\n")
