"""Theorems about an optimizer's state: how it travels, what it is refused for, what it is given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from optax import contrib

import psjax
from tests.over_devices import divided, over_devices

H, IN, OUT, J = (
    6,
    4,
    5,
    3,
)  # hidden neurons, the only dimension of this size; inputs, classes, steps
ROWS = np.array([[0, 3, 4], [1, 2, 5]])
AXES = {"in": P(None, "h"), "bias": P("h"), "stack": [P("h", None), P()]}


def init(seed=0, dtype=float):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return {"in": draw(IN, H), "bias": draw(H), "stack": [draw(H, OUT), draw(OUT)]}


def loss_fn(w, x):
    out, shift = w["stack"]
    return jnp.mean((jnp.tanh(x @ w["in"] + w["bias"]) @ out + shift - 1) ** 2)


def make_batches(seed=0, n=2, dtype=float):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, J, 7, IN)), dtype)


def select(params, axes=AXES, rows=ROWS):
    return psjax.select(axes, {"h": rows}, like=params)


def multi_steps():
    return optax.MultiSteps(optax.adam(0.05), 2).gradient_transformation()


kernels = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
OPTIMIZERS = {
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(0.05),
    "lamb": lambda: optax.lamb(0.05),
    "lars": lambda: optax.lars(0.05),
    "global norm": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.05)),
    "muon": lambda: contrib.muon(0.05),
    "adafactor": lambda: optax.adafactor(0.05, factored=False),
    "sophia": lambda: contrib.sophia(0.05),
    "polyak": lambda: optax.polyak_sgd(0.1),
    "plateau": lambda: optax.chain(
        optax.adam(0.05), contrib.reduce_on_plateau(patience=1, cooldown=0)
    ),
    "schedule free": lambda: contrib.schedule_free_sgd(0.05, warmup_steps=2),
    "multi steps": multi_steps,
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.05),
    "masked": lambda: optax.chain(
        optax.masked(optax.trace(0.9), kernels), optax.scale_by_learning_rate(0.1)
    ),
    "partition": lambda: optax.partition(
        {True: optax.adam(0.05), False: optax.sgd(0.1, momentum=0.9)}, kernels
    ),
    "line search": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=8)
    ),
    "prodigy": lambda: contrib.prodigy(1.0),
    "amsgrad": lambda: optax.amsgrad(0.05),
    "count an entry": lambda: optax.chain(psjax.ist.scale_by_adam(), optax.scale(-0.05)),
}


def rows_of(x, rows):
    """An element's part: its rows of every dimension of size H."""
    x = np.asarray(x)
    for d in (d for d, n in enumerate(x.shape) if n == H):
        x = np.take(x, rows, axis=d)
    return jnp.asarray(x)


def put_back(old, new):
    """What two elements give back: rows where they are, floats averaged, the first one's else."""
    old = np.asarray(old)
    if H not in old.shape:
        floating = jnp.issubdtype(old.dtype, jnp.inexact)
        return jnp.asarray(np.mean(np.stack(new), axis=0) if floating else new[0])
    x = np.moveaxis(old, old.shape.index(H), 0).copy()
    for rows, own in zip(ROWS, new, strict=True):
        x[rows] = np.moveaxis(np.asarray(own), old.shape.index(H), 0)
    return jnp.asarray(np.moveaxis(x, 0, old.shape.index(H)))


def by_hand(optimizer, loss_fn, params, state, batches):
    """A round with optax alone: one subnet after the other, from its own slices."""

    @jax.jit
    def step(params, state, x):
        value_fn = lambda params: loss_fn(params, x)
        value, grads = jax.value_and_grad(value_fn)(params)
        fns = dict(obj_fn=value_fn) if sophia else dict(value_fn=value_fn)
        options = dict(value=value, grad=grads, **fns)
        updates, state = optimizer.update(grads, state, params, **options)
        return optax.apply_updates(params, updates), state

    sophia = any("sophia" in str(type(s)).lower() for s in jax.tree.leaves(state, is_leaf=_named))
    optimizer, found = optax.with_extra_args_support(optimizer), []
    for rows, own in zip(ROWS, batches, strict=True):
        one = jax.tree.map(functools.partial(rows_of, rows=rows), (params, state))
        for x in own:
            one = step(*one, x)
        found.append(one)
    return jax.tree.map(lambda old, *new: put_back(old, new), (params, state), *found)


def _named(x):
    return "SophiaState" in str(type(x))


def close(a, b, tolerance=1e-9):
    def check(path, x, y):
        assert jnp.shape(x) == jnp.shape(y), path
        np.testing.assert_allclose(x, y, tolerance, tolerance, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, a, b)


# ------------------------------------------------------------------------------- what travels


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_round_is_the_optimizer_alone_on_every_subnet_s_slices(name):
    """Two rounds, the second from the state of the first, which is zero nowhere."""
    optimizer = OPTIMIZERS[name]()
    params = expected = init()
    state = expected_state = jax.tree.map(jnp.asarray, optimizer.init(params))
    update = jax.jit(psjax.local_update(loss_fn, optimizer))
    for number in range(2):
        batches = make_batches(number)
        params, state, metrics = update(params, state, select(params), batches)
        expected, expected_state = by_hand(optimizer, loss_fn, expected, expected_state, batches)
    assert metrics.finite.all()
    close((params, state), (expected, expected_state))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["adafactor", "sm3"])
def test_a_state_reduced_over_undivided_dimensions_travels_by_those_left(name):
    """Rows and columns of a shared matrix; the rows of a divided one, whose columns are one."""
    optimizer = {"adafactor": optax.adafactor(0.1, 2), "sm3": optax.sm3(0.1)}[name]
    params = {"trunk": init()["in"][:, :3], "own": init()["bias"]}

    def loss(w, x):
        return jnp.mean((jnp.sum(x @ w["trunk"], 1, keepdims=True) - w["own"]) ** 2)

    selection = select(params, {"trunk": P(), "own": P("h")})
    state, batches = optimizer.init(params), make_batches()
    new = psjax.local_update(loss, optimizer)(params, state, selection, batches)
    close(new[:2], by_hand(optimizer, loss, params, state, batches))


def test_a_constant_keeps_its_bits_however_many_elements_hold_it():
    """A mean of 3 or 7 equal numbers need not be that number."""
    optimizer = optax.inject_hyperparams(contrib.muon)(learning_rate=0.1)
    params = init(dtype=jnp.float32)
    state = optimizer.init(params)
    update = jax.jit(psjax.local_update(loss_fn, optimizer))
    whole = psjax.replicas(params, 7)
    new = update(params, state, whole, make_batches(n=7, dtype=jnp.float32))[1]
    coefficients = lambda s: [x for x in jax.tree.leaves(s) if jnp.shape(x) == (3,)]
    for a, b in zip(coefficients(new), coefficients(state), strict=True):
        np.testing.assert_array_equal(a, b)
    rate = state.hyperparams["learning_rate"]
    np.testing.assert_array_equal(new.hyperparams["learning_rate"], rate)


def keyed(typed):
    """An optimizer with a key for state."""
    make = jax.random.key if typed else jax.random.PRNGKey

    def update(updates, key, params=None):
        del params
        key, now = jax.random.split(key)
        noise = jax.random.normal(now)
        return jax.tree.map(lambda g: -0.1 * g + 0.01 * noise, updates), key

    return optax.GradientTransformation(lambda params: make(3), update)


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("wrapper", [None, "shard_map", "pmap"])
def test_keys_travel_whole(typed, wrapper):
    optimizer, params = keyed(typed), init(dtype=jnp.float32)
    state, batches = optimizer.init(params), make_batches(dtype=jnp.float32)
    expected = state
    for _ in range(J):
        expected = jax.random.split(expected)[0]
    selection = select(params)
    if wrapper is None:
        run = jax.jit(psjax.local_update(loss_fn, optimizer))
    else:
        inner = psjax.local_update(loss_fn, optimizer, axis_name="workers")
        run = over_devices(inner, wrapper, 2)
        selection, batches = selection.split(2), divided(batches, 2)
    new, key, metrics = run(params, state, selection, batches)
    assert metrics.finite.all()
    assert not np.array_equal(new["bias"], params["bias"])
    data = jax.random.key_data if typed else lambda x: x
    np.testing.assert_array_equal(data(key), data(expected))


def test_none_is_kept_in_parameters_and_state():
    params = {**init(dtype=jnp.float32), "frozen": None}
    axes = {**AXES, "frozen": None}
    optimizer = optax.adam(0.1)
    state = optimizer.init(params)
    selection = dict(psjax.select(AXES, {"h": ROWS}, like={k: params[k] for k in AXES}).indices)
    try:
        selection = psjax.select(axes, selection, like=params)
    except ValueError:  # axes have no leaf where the parameters have none
        selection = psjax.select(AXES, selection, like=params)
    batches = make_batches(dtype=jnp.float32)
    new, new_state, _ = psjax.local_update(loss_fn, optimizer)(params, state, selection, batches)
    assert new["frozen"] is None
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert not np.array_equal(new["in"], params["in"])


class Pair(tuple):
    """A tuple by position with a path of its own, as of a state of modules."""


jax.tree_util.register_pytree_with_keys(
    Pair,
    lambda p: ([(jax.tree_util.GetAttrKey(k), x) for k, x in zip("ab", p)], None),
    lambda _, xs: Pair(xs),
)


@pytest.mark.parametrize("make", [list, tuple, Pair, lambda xs: {"kernel": xs[0], "x": xs[1]}])
def test_containers_of_every_kind_have_moments(make):
    w = [jnp.ones((H, 2)), jnp.ones((2, H))]
    params, axes = make(w), make([P("h", None), P()])
    first = lambda p: jax.tree.leaves(p)[0]
    optimizer = optax.adam(0.1)
    update = psjax.local_update(lambda p, x: jnp.sum(first(p)) * x, optimizer)
    selection = psjax.select(axes, {"h": ROWS[:1]}, like=params)
    new, state, _ = update(params, optimizer.init(params), selection, jnp.ones((1, J)))
    held = np.isin(np.arange(H), ROWS[0])
    np.testing.assert_allclose(first(new)[held], 1 - 0.1 * J, rtol=1e-4)
    for x in (first(new), 1 + first(state[0].mu)):
        np.testing.assert_array_equal(x[~held], 1)


def test_names_of_axes_follow_the_shapes_of_the_state_and_no_path():
    """A tail of a path that is a parameter's by accident, of the shape of another's."""

    def of(params):
        return {"w": jax.tree.map(jnp.zeros_like, params["deep"]["w"]), "n": jnp.zeros(())}

    optimizer = optax.GradientTransformation(of, lambda g, s, p=None: (g, s))
    params = {"w": jnp.ones((H, H)), "deep": {"w": jnp.ones((H, H))}}
    axes = {"w": P("h", None), "deep": {"w": P(None, "k")}}
    assert psjax.ist.state_axes(optimizer, axes, params) == {"w": P(None, "k"), "n": P()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_axes_are_those_of_the_parameters_where_it_has_their_shape(name):
    """The names are not those of the sizes: every dimension of one size."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((8,) * x.ndim, jnp.float32), init())
    optimizer = OPTIMIZERS[name]()
    axes = psjax.ist.state_axes(optimizer, AXES, shapes)
    state = jax.eval_shape(optimizer.init, shapes)
    is_spec = lambda x: isinstance(x, P)
    for (path, spec), x in zip(
        jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_spec), jax.tree.leaves(state)
    ):
        tails = ("['in']", "['bias']", "['stack'][0]", "['stack'][1]")
        tail = next((t for t in tails if jax.tree_util.keystr(path).endswith(t)), None)
        expected = dict(zip(tails, (*AXES.values(),)[:2] + (*AXES["stack"],))).get(tail, P())
        assert spec == (expected if x.shape not in ((), (1,)) else P()), path


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (optax.adafactor(0.1, 2), r"v_(row|col)\['in'\].* reduced over axis 'h' of \['in'\]"),
        (optax.sm3(0.1), r"\['in'\]\[0\].* reduced over axis 'h' of \['in'\].*optax.partition"),
        (optax.lbfgs(), r"weights_memory, of shape \(10,\).* depends on the gradients"),
    ],
)
@pytest.mark.parametrize("containers", [dict, list])
def test_a_state_reduced_over_a_divided_axis_is_refused_by_name(optimizer, message, containers):
    params, axes = {"in": init(dtype=jnp.float32)["in"]}, {"in": AXES["in"]}
    if containers is list:
        params, axes = list(params.values()), list(axes.values())
        message = message.replace(r"\['in'\]", r"\[0\]")
    update = psjax.local_update(lambda p, x: jnp.sum(x @ jax.tree.leaves(p)[0]), optimizer)
    selection, batches = select(params, axes), make_batches(dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"local_update\(optimizer=\.\.\.\): .*" + message):
        update(params, optimizer.init(params), selection, batches)
    if "lbfgs" not in message and "weights" not in message:
        with pytest.raises(ValueError, match="state_axes.*reduced over axis 'h'"):
            psjax.ist.state_axes(optimizer, axes, params)


def test_where_nothing_is_divided_every_state_is_plain_training():
    optimizer, params = optax.lbfgs(linesearch=None, learning_rate=0.1), init(dtype=jnp.float32)
    batches, state = make_batches(n=1, dtype=jnp.float32), optimizer.init(params)
    update = psjax.local_update(loss_fn, optimizer)
    new, _, _ = update(params, state, psjax.replicas(params, 1), batches)
    for x in batches[0]:
        grads = jax.grad(loss_fn)(params, x)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    close(new, params, 1e-4)


def test_a_state_reduced_over_dropped_weights_is_refused():
    """Its rows would move where `Selection.drop` promises that nothing does."""
    params = {"w": jnp.ones((IN, OUT))}
    selection = psjax.replicas(params, 2).drop({"w": np.arange(OUT) > 1})
    update = psjax.local_update(lambda w, x: jnp.sum(w["w"]) * x, optax.adafactor(0.1, 2))
    with pytest.raises(ValueError, match=r"reduced over dropped weights of \['w'\]"):
        update(params, optax.adafactor(0.1, 2).init(params), selection, jnp.ones((2, J)))


def test_the_state_of_other_parameters_is_refused():
    params, optimizer = init(dtype=jnp.float32), optax.adam(0.1)
    update = psjax.local_update(loss_fn, optimizer)
    other = optimizer.init({"in": params["in"]})
    message = r"has \[0\].mu\['in'\] .* by the shapes of the parameters it has \[0\].mu\['bias'\]"
    with pytest.raises(ValueError, match=message):
        update(params, other, select(params), make_batches(dtype=jnp.float32))


def test_an_optimizer_that_decides_by_the_shapes_of_a_subnet_is_refused():
    """A row of a matrix is a vector, which muon leaves to Adam."""
    params, optimizer = {"w": jnp.ones((H, 3))}, contrib.muon(0.1)
    selection = psjax.select({"w": P("h", None)}, {"h": np.arange(H)}, like=params)
    update = psjax.local_update(lambda p, x: jnp.sum(p["w"]) * x, optimizer)
    with pytest.raises(ValueError, match=r"decides by shapes.* other index sets"):
        update(params, optimizer.init(params), selection, jnp.ones((H, J)))


UNEVEN = [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.centralize(), optax.sgd(0.1)),
        optax.chain(optax.clip_by_block_rms(1e6), optax.sgd(0.1)),
        optax.adafactor(0.1, factored=False),
        contrib.muon(0.1),
    ],
)
def test_what_counts_the_entries_of_a_leaf_is_refused_with_uneven_shares(optimizer):
    params = init(dtype=jnp.float32)
    update = psjax.local_update(loss_fn, optimizer)
    arguments = params, optimizer.init(params)
    batches = make_batches(dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"local_update\(optimizer=.*\): the shares are uneven"):
        update(*arguments, select(params, rows=UNEVEN), batches)
    assert update(*arguments, select(params), batches)[2].finite.all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    ["adamw", "lamb", "lars", "global norm", "polyak", "schedule free", "line search", "own"],
)
def test_what_takes_sums_is_exact_with_uneven_shares(name):
    """The element of two rows, beside one of four, ends where it ends alone."""
    own = optax.adafactor(
        0.1,
        factored=False,
        clipping_threshold=None,
        multiply_by_parameter_scale=False,
    )
    optimizer = own if name == "own" else OPTIMIZERS[name]()
    params, batches = init(), make_batches()
    state = optimizer.init(params)
    update = jax.jit(psjax.local_update(loss_fn, optimizer))
    both, _, _ = update(params, state, select(params, rows=UNEVEN), batches)
    alone, _, _ = update(params, state, select(params, rows=UNEVEN[1:]), batches[1:])
    rows = np.array(UNEVEN[1])
    close(both["in"][:, rows], alone["in"][:, rows], 1e-12)
    close(both["stack"][0][rows], alone["stack"][0][rows], 1e-12)
    assert not np.array_equal(both["in"][:, rows], params["in"][:, rows])


def test_an_epsilon_that_is_zero_in_float16_is_refused():
    params = init(dtype=jnp.float16)
    batches = make_batches(dtype=jnp.float16)

    def train(optimizer):
        update = jax.jit(psjax.local_update(loss_fn, optimizer))
        return update(params, optimizer.init(params), select(params), batches)

    with pytest.raises(ValueError, match=r"0 in float16 .*eps=1e-4"):
        train(optax.adam(0.1))
    for optimizer in (optax.adam(0.1, eps=1e-4), optax.sgd(0.1, momentum=0.9)):
        assert train(optimizer)[2].finite.all()


def without_axis_name(make, params, selection, alone=False):
    """A round in a shard_map of two devices, the parameters the same on both."""
    mesh = jax.make_mesh((2,), ("w",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    optimizer = optax.sgd(0.1)

    def run(params, selection, batches):
        one = jax.tree.map(lambda x: x[0], (selection, batches))
        if alone:
            params = jax.tree.map(lambda x: jax.lax.pcast(x, "w", to="varying"), params)
        new, _, _ = make(loss_fn, optimizer)(params, optimizer.init(params), *one)
        return jax.tree.map(lambda x: x[None], new)

    specs = P(), P("w"), P("w")
    mapped = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("w")))
    batches = make_batches(dtype=jnp.float32)
    return mapped(params, selection.split(2), divided(batches, 2))


@pytest.mark.parametrize("name", ["local_update", "local_sgd", "data_parallel"])
def test_an_axis_name_that_was_forgotten_is_named(name):
    params = init(dtype=jnp.float32)
    make = {"local_update": psjax.local_update}.get(name) or getattr(psjax.baselines, name)
    selection = select(params) if name == "local_update" else psjax.replicas(params, 2)
    with pytest.raises(ValueError, match=r"axis_name=None\).* Pass axis_name='w'"):
        without_axis_name(make, params, selection)


def test_devices_that_train_alone_say_so():
    params = init(dtype=jnp.float32)
    new = without_axis_name(psjax.local_update, params, select(params), alone=True)
    assert new["in"].shape == (2, IN, H)


# ----------------------------------------------------------------------------- what else comes back


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_auxiliary_outputs_come_back_by_element_and_step(chunk_size):
    params, optimizer = init(dtype=jnp.float32), optax.sgd(0.1)
    batches = make_batches(dtype=jnp.float32)

    def loss(w, x):
        value = loss_fn(w, x)
        return value, {"double": 2 * value, "first": x[0]}

    arguments = params, optimizer.init(params), select(params), batches
    update = psjax.local_update(loss, optimizer, has_aux=True, chunk_size=chunk_size)
    new, _, metrics = update(*arguments)
    plain, _, expected = psjax.local_update(loss_fn, optimizer, chunk_size=chunk_size)(*arguments)
    close(new, plain, 0)
    assert expected.aux is None
    np.testing.assert_array_equal(metrics.aux["double"], 2 * expected.loss)
    np.testing.assert_array_equal(metrics.aux["first"], batches[:, :, 0])


def test_auxiliary_outputs_follow_the_overwritten_entries():
    """And the optimizer's state is that of what is trained."""
    params = {"params": init(dtype=jnp.float32), "seen": {"x": jnp.zeros(H)}, "n": jnp.int32(0)}
    axes = {"params": AXES, "seen": {"x": P("h")}, "n": P()}

    def loss(w, x):
        moved = {"seen": {"x": w["seen"]["x"] + w["params"]["bias"]}, "n": w["n"] + 1}
        return loss_fn(w["params"], x), (moved, x[0])

    optimizer = optax.adam(0.1)
    update = psjax.local_update(loss, optimizer, mutable=("seen", "n"), has_aux=True)
    state = optimizer.init({"params": params["params"]})
    selection = psjax.select(axes, {"h": ROWS}, like=params)
    batches = make_batches(dtype=jnp.float32)
    new, new_state, metrics = update(params, state, selection, batches)
    assert new["n"] == J == new_state[0].count
    assert (new["seen"]["x"] != 0).all()
    np.testing.assert_array_equal(metrics.aux, batches[:, :, 0])
    plain, _, _ = psjax.local_update(loss_fn, optimizer)(
        params["params"], optimizer.init(params["params"]), select(params["params"]), batches
    )
    close(new["params"], plain, 1e-6)


@pytest.mark.usefixtures("x64")
def test_the_baselines_give_their_optimizers_the_value_too():
    """Polyak's step of the mean loss; a line search over it, on one device as on two."""
    params, batches = init(), make_batches()
    whole = psjax.replicas(params, 2)
    mean = lambda w, x: (loss_fn(w, x[0]) + loss_fn(w, x[1])) / 2
    for name in ("polyak", "line search"):
        optimizer = OPTIMIZERS[name]()
        update = psjax.baselines.data_parallel(loss_fn, optimizer)
        new = update(params, optimizer.init(params), whole, batches)[0]
        expected, state = params, optimizer.init(params)
        for j in range(J):
            value_fn = lambda w, j=j: mean(w, batches[:, j])
            value, grads = jax.value_and_grad(value_fn)(expected)
            options = dict(value=value, grad=grads, value_fn=value_fn)
            updates, state = optimizer.update(grads, state, expected, **options)
            expected = optax.apply_updates(expected, updates)
        close(new, expected)
        inner = psjax.baselines.data_parallel(loss_fn, optimizer, axis_name="workers")
        run = over_devices(inner, "shard_map", 2)
        spread = run(params, optimizer.init(params), whole.split(2), divided(batches, 2))[0]
        close(spread, expected)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_mean_gradient_of_many_workers_is_summed_in_float32(dtype):
    """1000 of 100 workers is past float16; 600 ones are 256 in bfloat16."""
    size, n = {jnp.float16: (1000.0, 100), jnp.bfloat16: (1.0, 600)}[dtype]
    params = {"w": jnp.zeros(1, dtype)}
    update = psjax.baselines.data_parallel(lambda w, x: jnp.sum(x * w["w"]), optax.sgd(1.0))
    batches = jnp.full((n, 1), size, dtype)
    new, _, metrics = update(
        params, optax.sgd(1.0).init(params), psjax.replicas(params, n), batches
    )
    assert metrics.finite.all()
    assert new["w"].dtype == dtype
    assert new["w"] == -size
