"""Second-order minimisation of partially-separable functions: one small matrix per element."""

from psjax import _public
from psjax.quasi_newton._hessian import SumOfSquares as SumOfSquares
from psjax.quasi_newton._hessian import element_gauss_newton as element_gauss_newton
from psjax.quasi_newton._hessian import element_hessian as element_hessian
from psjax.quasi_newton._hessian import hessian_operator as hessian_operator
from psjax.quasi_newton._minimize import STATUS as STATUS
from psjax.quasi_newton._minimize import Info as Info
from psjax.quasi_newton._minimize import State as State
from psjax.quasi_newton._minimize import minimize as minimize
from psjax.quasi_newton._model import approximation_bytes as approximation_bytes
from psjax.quasi_newton._model import operator as operator

__dir__ = _public.listing(globals())
