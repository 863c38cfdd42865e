"""Figures 1, 3 and 5 of the paper, as the script draws them."""

from PIL import Image

from experiments.psl import structure as script


def test_the_script_draws_three_panels_and_prints_the_paper_s_counts(tmp_path, capsys):
    script.main(script.Args(out=tmp_path / "structure.png"))
    printed = capsys.readouterr().out
    assert "n=44426" in printed
    assert "n=53780, score=6314, element=11588" in printed
    assert "common=0" in printed
    with Image.open(tmp_path / "structure.png") as image:
        assert image.size[0] == 840
    assert (tmp_path / "structure.png").stat().st_size < 200_000
