"""What `psjax.infer_axes` finds in every model of the registry, as a table."""

from experiments._lib.command import run_script
from experiments.axes import table

if __name__ == "__main__":
    run_script(table.main, table.Args, table.__doc__)
