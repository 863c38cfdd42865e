"""Find, check and narrow the axes of the parameters of any function."""

from psjax import _public
from psjax.axes._axes import Axes as Axes
from psjax.axes._axes import Axis as Axis
from psjax.axes._axes import Fixed as Fixed
from psjax.axes._check import check_axes as check_axes
from psjax.axes._infer import Told as Told
from psjax.axes._infer import coupled_axes as coupled_axes
from psjax.axes._infer import infer_axes as infer_axes
from psjax.axes._narrow import narrow as narrow

__dir__ = _public.listing(globals())
