"""The command of `experiments.axes.table`."""

from experiments._run import run_script
from experiments.axes import table

if __name__ == "__main__":
    run_script(table.main, table.Args, table.__doc__)
