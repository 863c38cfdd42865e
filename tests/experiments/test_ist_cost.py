"""Figure 2 of the paper of independent subnets."""

from experiments.ist import cost as figure2


def test_the_committed_table_of_figure_2_is_what_the_formulas_give(tmp_path):
    figure2.main(figure2.Args(out=tmp_path))
    committed = (figure2.RESULTS / "figure2.csv").read_text()
    assert (tmp_path / "figure2.csv").read_text() == committed
    assert (tmp_path / "figure2.png").stat().st_size < 200_000
