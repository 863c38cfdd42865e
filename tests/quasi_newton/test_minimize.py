"""Partitioned quasi-Newton: every form is the dense one, in plain loops, step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import psjax
from psjax import quasi_newton as qn
from tests.quasi_newton import reference

pytestmark = pytest.mark.usefixtures("x64")
N = 12
CHAIN = np.stack([np.arange(N - 2), np.arange(1, N - 1), np.arange(2, N)], axis=1)


def element(u, d=1.0):
    """Not convex, and of another scale in each direction."""
    u = jnp.ravel(u)
    return d * (10 * (u[1] - u[0] ** 2) ** 2 + (1 - u[0]) ** 2 + jnp.cos(u[-1] * u[0]))


def start(n=N):
    return jnp.asarray(np.random.default_rng(0).normal(size=n))


def chain(w, rows=CHAIN):
    return psjax.select(P("i"), {"i": rows}, like=w)


def of_numpy(fn):
    """Value, gradient and Hessian of an element function at a NumPy vector."""
    fns = [jax.jit(f) for f in (fn, jax.grad(fn), jax.hessian(fn))]
    return lambda u: tuple(np.asarray(f(u)) for f in fns)


def run(update, steps, w, selection, *args, fn=element, **options):
    options = dict(rtol=0.0, atol=0.0, max_steps=steps, restart=None) | options
    return jax.jit(qn.minimize(fn, update, **options))(w, selection, *args)


def same(a, b, rtol=1e-9):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-11)


# ----------------------------------------------------------------------- the same, in plain loops


@pytest.mark.parametrize("update", ["sr1", "bfgs", "exact"])
@pytest.mark.parametrize("rows", [CHAIN, np.arange(N)[None]], ids=["chain", "one element"])
def test_it_is_the_method_in_plain_loops_step_by_step(update, rows):
    w, fn = start(), element
    if len(rows) == 1:  # the sum as one element: the dense methods

        def fn(u):
            return sum(element(u[row]) for row in CHAIN)

    want = reference.minimize([of_numpy(fn)] * len(rows), rows, np.asarray(w), 12, update)
    selection = chain(w, rows)
    state = None
    step = jax.jit(qn.minimize(fn, update, rtol=0.0, atol=0.0, max_steps=1, restart=None))
    for expected, radius in want:
        w, info = step(w, selection, state=state)
        state = info.state
        same(w, expected)
        same(state.radius, radius)


def test_exact_hessians_are_newtons_method_near_a_minimum():
    w, info = run("exact", 50, start(), chain(start()), atol=1e-12)
    assert info.status == 0
    f = lambda w: sum(element(w[row]) for row in CHAIN)
    moved = w + 1e-7
    near, _ = run("exact", 1, moved, chain(w))
    newton = moved - jnp.linalg.solve(jax.hessian(f)(moved), jax.grad(f)(moved))
    # The conjugate gradients stop at a residual of the gradient times the root of its norm.
    assert jnp.linalg.norm(near - newton) < 0.1 * jnp.linalg.norm(moved - w)
    assert jnp.linalg.norm(near - w) < 0.1 * jnp.linalg.norm(moved - w)


# --------------------------------------------------------------------------- the approximations


@pytest.mark.parametrize("update", ["sr1", "bfgs"])
@pytest.mark.parametrize("memory", [None, 3])
def test_the_secant_equation_of_every_element(update, memory):
    """After every step, B s = y for each element that was updated."""
    selection = chain(start())
    grads = lambda w: psjax.element_value_and_grad(element)(w, selection)[1]
    step = jax.jit(
        qn.minimize(element, update, memory=memory, rtol=0.0, atol=0.0, max_steps=1, restart=None)
    )
    w, state, updated = start(), None, 0
    for _ in range(8):
        before = w
        w, info = step(w, selection, state=state)
        state = info.state
        if not info.accepted[0]:
            continue
        s, y = selection.gather(w - before), grads(w) - grads(before)
        from psjax.quasi_newton._updates import product

        image = product(update, state.approximation[0])(s)
        good = np.isclose(image, y, rtol=1e-9, atol=1e-10).all(axis=1)
        assert good.sum() >= info.updated[0] * len(CHAIN) - 1e-9
        updated += good.sum()
    assert updated >= 30


@pytest.mark.parametrize("update", ["sr1", "bfgs"])
def test_limited_memory_that_is_never_full_is_the_matrix(update):
    w, selection = start(), chain(start())
    same(
        run(update, 8, w, selection, memory=8)[0],
        run(update, 8, w, selection)[0],
        rtol=1e-7,  # the compact form solves with matrices of products of steps
    )


@pytest.mark.parametrize("update", ["sr1", "bfgs"])
def test_limited_memory_converges(update):
    w, info = run(update, 400, start(), chain(start()), memory=2, atol=1e-5)
    assert info.status == 0
    assert info.gradient_norm <= 1e-5


def test_hessians_at_the_start_are_exact_for_quadratics():
    """Then every direction is known, and as many steps are needed as by exact Hessians."""
    quadratic = lambda u: (u[0] - u[1] + 0.5 * u[2]) ** 2 + (u[0] - 1) ** 2
    w, selection = start(), chain(start())
    options = dict(fn=quadratic, atol=1e-9)
    exact, of_exact = run("exact", 30, w, selection, **options)
    found, info = run("sr1", 30, w, selection, start="hessian", **options)
    assert info.status == of_exact.status == 0
    same(found, exact, rtol=1e-8)
    assert info.steps == of_exact.steps


# ------------------------------------------------------------------------------------ invariances


@pytest.mark.parametrize("update", ["sr1", "bfgs", "exact"])
def test_the_order_of_elements_does_not_matter(update):
    w, order = start(), np.random.default_rng(1).permutation(len(CHAIN))
    one, other = (run(update, 10, w, chain(w, rows))[0] for rows in (CHAIN, CHAIN[order]))
    same(one, other, rtol=1e-8)


def test_elements_of_several_kinds_are_one_sum():
    w = start()
    d = jnp.linspace(0.5, 2, len(CHAIN))
    halves = [slice(0, 4), slice(4, None)]
    want, of_one = run("sr1", 10, w, chain(w), d, in_axes=0)
    found, info = run(
        "sr1",
        10,
        w,
        [chain(w, CHAIN[half]) for half in halves],
        [d[half] for half in halves],
        fn=[element, element],
        in_axes=0,
    )
    same(found, want)
    same(info.values, of_one.values)


@pytest.mark.parametrize("update", ["sr1", "bfgs", "exact", "gauss_newton"])
def test_elements_over_devices_are_the_same_sum(update):
    w, fn = start(), element
    if update == "gauss_newton":
        fn = qn.SumOfSquares(lambda u: jnp.stack([10 * (u[1] - u[0] ** 2), 1 - u[2]]))
    options = dict(rtol=0.0, atol=0.0, max_steps=6, restart=None)
    want, _ = jax.jit(qn.minimize(fn, update, **options))(w, chain(w))
    parts = chain(w).split(8)
    fit = qn.minimize(fn, update, axis_name="workers", **options)
    in_pmap, _ = jax.pmap(fit, "workers", in_axes=(None, 0))(w, parts)
    for own in in_pmap:
        same(own, want, rtol=1e-8)
    mesh = jax.make_mesh((8,), ("workers",), axis_types=(jax.sharding.AxisType.Auto,))
    of_shard = lambda w, part: fit(w, jax.tree.map(lambda x: x[0], part))[0]
    shard = jax.jit(jax.shard_map(of_shard, mesh=mesh, in_specs=(P(), P("workers")), out_specs=P()))
    same(shard(w, parts), want, rtol=1e-8)


def test_padding_and_elements_that_are_not_valid_change_nothing():
    """Uneven rows, padded; and elements of padding whose function is NaN at 0."""
    w = start() ** 2 + 1
    fn = lambda u: jnp.sum(jnp.where(u == 0, 0.0, (jnp.log(jnp.where(u == 0, 1.0, u)) - u) ** 2))
    rows = [[0, 1, 2], [2, 3], [4, 5, 6], [7], [8, 9, 10], [10, 11]]
    want, _ = run("sr1", 8, w, [chain(w, [r]) for r in rows], fn=[fn] * len(rows))
    found, _ = run("sr1", 8, w, chain(w, rows), fn=fn)
    same(found, want)


def test_gradients_at_padding_teach_nothing():
    """The padded entry of [2, 3] has a gradient that changes from point to point."""
    fn = lambda u: (jnp.sum(u) - 1) ** 2 + jnp.cos(jnp.sum(u**2))
    w, rows = start(), [[0, 1, 2], [2, 3], [4, 5, 6], [7], [8, 9, 10], [10, 11]]
    want, _ = run("sr1", 8, w, [chain(w, [r]) for r in rows], fn=[fn] * len(rows))
    found, _ = run("sr1", 8, w, chain(w, rows), fn=fn)
    same(found, want)


def test_what_is_dropped_stays_zero_for_the_elements_and_is_not_moved():
    w = start()
    selection = chain(w).drop(jnp.arange(N) != 3)
    found, info = run("sr1", 20, w, selection)
    assert found[3] == w[3]
    assert info.accepted.any()


def test_trees_of_several_leaves_and_dtypes():
    """The trunk is shared by all elements: they see 4 of its entries and one row of the head."""
    rng = np.random.default_rng(0)
    params = {
        "trunk": jnp.asarray(rng.normal(size=(2, 2))),
        "head": jnp.asarray(rng.normal(size=(5, 2)), jnp.float32),
    }
    axes = {"trunk": P(), "head": P("class")}
    x, y = jnp.asarray(rng.normal(size=(5, 2))), jnp.asarray(rng.normal(size=5))
    fn = lambda p, x, y: (p["head"].astype(float) @ jnp.tanh(p["trunk"] @ x) - y) ** 2
    s = psjax.select(axes, {"class": np.arange(5)}, like=params)
    found, info = run("sr1", 60, params, s, x, y, fn=fn, in_axes=0, atol=1e-4)
    assert info.status == 0
    assert found["head"].dtype == jnp.float32
    assert info.value < 1e-6


# ----------------------------------------------------------------------------------- as a function


def test_one_program_for_every_index_set():
    w = start()
    fit = jax.jit(qn.minimize(element, max_steps=3))
    rng = np.random.default_rng(0)
    for _ in range(3):
        rows = np.stack([rng.permutation(N)[:3] for _ in range(10)])
        fit(w, psjax.select(P("i"), {"i": rows}, like=w, specialize=False))
    assert fit._cache_size() == 1


def test_a_state_goes_on_as_if_nothing_had_happened():
    w, selection = start(), chain(start())
    want, whole = run("sr1", 9, w, selection)
    first, half = run("sr1", 4, w, selection)
    found, rest = (
        run("sr1", 5, first, selection, state=half.state)
        if False
        else jax.jit(qn.minimize(element, rtol=0.0, atol=0.0, max_steps=5, restart=None))(
            first, selection, state=half.state
        )
    )
    same(found, want)
    same(rest.values, whole.values[4:])


def test_steps_to_where_the_value_is_not_finite_are_refused():
    fn = lambda u: -jnp.log(u[0]) + 30 * u[0]
    w = jnp.full(4, 0.9)
    s = psjax.select(P("i"), {"i": np.arange(4)[:, None]}, like=w)
    found, info = run("sr1", 100, w, s, fn=fn, radius=100.0, atol=1e-8)
    assert info.status == 0
    assert not info.accepted[0]
    same(found, np.full(4, 1 / 30), rtol=1e-6)
    assert np.isfinite(info.values[: info.steps]).all()


def test_the_history_has_an_entry_per_step():
    w, info = run("sr1", 200, start(), chain(start()), atol=1e-6)
    steps = int(info.steps)
    assert 0 < steps < 200
    for name in ("values", "gradient_norms", "radii", "ratios", "updated"):
        history = getattr(info, name)
        assert np.isfinite(history[:steps]).all(), name
        assert np.isnan(history[steps:]).all(), name
    assert (np.diff(info.values[:steps]) <= 1e-12).all()
    same(info.values[steps - 1], info.value)
    value, gradient = psjax.value_and_grad(element)(w, chain(w))
    same(info.value, value)
    same(info.gradient_norm, jnp.linalg.norm(gradient))


def test_single_precision():
    w = start().astype(jnp.float32)
    found, info = run("sr1", 100, w, chain(w), atol=1e-2)
    assert info.status == 0
    assert found.dtype == info.value.dtype == info.state.radius.dtype == jnp.float32


def test_least_squares_by_gauss_newton():
    """Every element is a measurement of two of the unknowns; the solution has no residual."""
    truth = np.linspace(1, 2, N)
    pairs = np.stack([np.arange(N - 1), np.arange(1, N)], axis=1)
    residual = lambda u, d: u[0] * u[1] - d
    d = jnp.asarray(truth[:-1] * truth[1:])
    ends = qn.SumOfSquares(lambda u: u[0] - 1.0)
    w = jnp.full(N, 1.5)
    found, info = run(
        "gauss_newton",
        50,
        w,
        [chain(w, pairs), chain(w, [[0]])],
        [d, jnp.zeros(1)],
        fn=[qn.SumOfSquares(residual), qn.SumOfSquares(lambda u, d: u[0] - 1.0)],
        in_axes=0,
        atol=1e-10,
    )
    assert ends(jnp.array([2.0])) == 0.5
    assert info.status == 0
    same(found, truth, rtol=1e-7)


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(update="newton"), r"update='newton'\): pass one of \('sr1', 'bfgs', 'exact'"),
        (dict(start="zero"), r"start='zero'\): pass one of \('identity', 'hessian'\)"),
        (dict(memory=0), r"memory=0\): pass an integer of at least 1"),
        (dict(max_steps=0), r"max_steps=0\): pass an integer of at least 1"),
        (dict(restart=0), r"restart=0\): pass an integer of at least 1"),
        (dict(update="exact", memory=3), r"this update keeps no pairs"),
        (dict(memory=3, start="hessian"), r"without memory, can start from Hessians"),
    ],
)
def test_wrong_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        qn.minimize(element, **options)


def test_what_cannot_be_minimised_is_refused_at_the_call():
    w = start()
    with pytest.raises(ValueError, match=r"no elements"):
        qn.minimize(element)(w, chain(w)[:0])
    with pytest.raises(
        ValueError, match=r"10 of 3 entries\) take 720 bytes, more than max_bytes=7"
    ):
        qn.minimize(element, max_bytes=700)(w, chain(w))
    assert qn.approximation_bytes(chain(w), w) == 10 * 9 * 8
    assert qn.approximation_bytes(chain(w), w, memory=5) == 10 * 2 * 5 * 3 * 8
    with pytest.raises(ValueError, match=r"the value is nan .* both must be finite"):
        qn.minimize(lambda u: jnp.sum(jnp.log(u)))(-jnp.ones(N), chain(w))
    integers = jnp.arange(N)
    with pytest.raises(ValueError, match=r"is int64; parameters must be floating"):
        qn.minimize(element)(integers, chain(integers))
    with pytest.raises(ValueError, match="must return a scalar"):
        qn.minimize(lambda u: u)(w, chain(w))
    with pytest.raises(TypeError, match=r"must be psjax.quasi_newton.SumOfSquares"):
        qn.minimize(element, "gauss_newton")
    with pytest.raises(ValueError, match="2 kinds of element need as many selections, got 1"):
        qn.minimize([element, element])(w, [chain(w)])


def test_not_finite_at_the_start_inside_jit_is_a_status():
    fit = jax.jit(qn.minimize(lambda u: jnp.sum(jnp.log(u))))
    w, info = fit(-jnp.ones(N), chain(start()))
    assert qn.STATUS[info.status].startswith("value or gradient are not finite")
    assert info.steps == 0


def test_a_gradient_that_is_wrong_ends_the_search():
    @jax.custom_jvp
    def fn(u):
        return jnp.sum(u**2)

    fn.defjvp(lambda p, t: (fn(p[0]), -2 * jnp.sum(p[0] * t[0])))  # of the wrong sign
    w, info = run("sr1", 500, start(), chain(start()), fn=fn, restart=10)
    assert qn.STATUS[info.status].startswith("no step decreases the value")
    same(w, start())


# ------------------------------------------------------------------------------ second derivatives


@functools.cache
def dense_hessian():
    return np.asarray(jax.hessian(lambda w: sum(element(w[row]) for row in CHAIN))(start()))


def test_hessians_of_elements_add_up_to_that_of_the_sum():
    w, s = start(), chain(start())
    for chunk_size in (None, 3):
        matrices = qn.element_hessian(element, chunk_size=chunk_size)(w, s)
        total = np.zeros((N, N))
        for row, matrix in zip(CHAIN, np.asarray(matrices)):
            total[np.ix_(row, row)] += matrix
        same(total, dense_hessian())


def test_products_with_the_hessian():
    w, s = start(), chain(start())
    v = jnp.cos(jnp.arange(N) + 1.0)
    same(qn.hessian_operator(element)(w, s)(v), dense_hessian() @ v)
    matrices = qn.element_hessian(element)(w, s)
    same(qn.operator(matrices, s, w, "exact")(v), dense_hessian() @ v)
    solution, _ = jax.scipy.sparse.linalg.cg(
        lambda v: qn.operator(matrices, s, w, "exact")(v) + 100 * v, v, tol=1e-12
    )
    same(solution, np.linalg.solve(dense_hessian() + 100 * np.eye(N), v))


def test_gauss_newton_is_the_product_of_jacobians(any_type):
    w, s = start(), chain(start())
    residual = lambda u: jnp.stack([u[0] * u[1], jnp.sin(u[2])])
    matrices = qn.element_gauss_newton(qn.SumOfSquares(residual))(w, s)
    for row, matrix in zip(CHAIN, matrices):
        jacobian = np.asarray(jax.jacobian(residual)(w[row]))
        same(matrix, jacobian.T @ jacobian)
    with pytest.raises(TypeError, match="pass psjax.quasi_newton.SumOfSquares"):
        qn.element_gauss_newton(element)
