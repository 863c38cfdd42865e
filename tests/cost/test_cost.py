"""The formulas by hand and against compiled programs; the ledger against known ones."""

import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import psjax
from psjax import cost
from tests.over_devices import divided, over_devices

WIDTHS = (3, 4, 5, 2)  # matrices of 12, 20 and 10 weights


def mesh(n=8):
    return Mesh(np.array(jax.devices()[:n]), "w")


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile()


def spread(f, n, in_specs, out_specs):
    return jax.shard_map(f, mesh=mesh(n), in_specs=in_specs, out_specs=out_specs, check_vma=False)


# ---------------------------------------------------------------------------------------- formulas


def test_as_printed_by_hand():
    """Of two workers, J = 10, B = 7."""
    assert cost.printed_data_parallel(WIDTHS, 7, 2) == (2 * 42, 4 * 7 * 42, 7)
    printed = cost.printed_independent_subnets(WIDTHS, 7, 2, 10)
    assert printed == ((22 + 42 / 2) / 10, 4 * 7 * (22 + 42 / 2), 14)
    meant = cost.printed_independent_subnets(WIDTHS, 7, 2, 10, ends_once=True)
    assert meant == ((22 + 20 / 2) / 10, 4 * 7 * (22 + 20 / 2), 14)


def test_the_printed_sum_counts_the_ends_of_a_lone_worker_twice():
    """With n = J = 1 nothing is split, and only `ends_once` gives data parallel's cost."""
    whole = cost.printed_data_parallel(WIDTHS, 7, 1)
    assert cost.printed_independent_subnets(WIDTHS, 7, 1, 1, ends_once=True) == whole
    assert cost.printed_independent_subnets(WIDTHS, 7, 1, 1).floats == whole.floats + 12 + 10


def test_without_coordinator_by_hand():
    """Of two workers, J = 10, B = 7: rings of 2 W floats; 6 operations a weight, first layer 4."""
    assert cost.data_parallel(WIDTHS, 7, 2) == (2 * 42, 14 * (4 * 12 + 6 * 30), 14)
    assert cost.data_parallel(WIDTHS, 7, 2, vectors=11).floats == 2 * 53
    assert cost.local_sgd(WIDTHS, 7, 2, 10, moments=2, vectors=11).floats == 2 * 3 * 53 / 10
    subnets = cost.independent_subnets(WIDTHS, 7, 2, 10)
    assert subnets == ((22 + 20 / 2) / 10, 2 * 7 * (4 * 6 + 6 * 5 + 6 * 5), 14)
    both = cost.independent_subnets(WIDTHS, 7, 2, 10, moments=2, split_vectors=9, shared=2)
    assert both.floats == 3 * (22 + 20 / 2 + 9 + 2 * 2) / 10


def test_a_lone_worker_sends_nothing_and_computes_what_sgd_does():
    alone = cost.data_parallel(WIDTHS, 7, 1)
    assert alone.floats == 0
    assert cost.local_sgd(WIDTHS, 7, 1, 10, moments=2) == alone
    assert cost.independent_subnets(WIDTHS, 7, 1, 10, split_vectors=9, shared=2) == alone


@pytest.mark.parametrize("n", [2, 3, 8])
def test_subnets_are_data_parallel_on_smaller_networks(n):
    """The work of n subnets of width N/n is that of n workers on the network of that width."""
    wide, narrow = (6, 72, 144, 5), (6, 72 // n, 144 // n, 5)
    subnets = cost.independent_subnets(wide, 7, n, 10)
    assert subnets[1:] == cost.data_parallel(narrow, 7, n)[1:]


@pytest.mark.parametrize("n", [2, 3, 7])
def test_the_exchange_is_twice_the_printed_inflow_less_the_share_at_home(n):
    args = (WIDTHS, 7, n, 10)
    inflow = Fraction(cost.printed_independent_subnets(*args, ends_once=True).floats)
    exchange = cost.independent_subnets(*args).floats
    assert exchange == pytest.approx(float(2 * (1 - Fraction(1, n)) * inflow), rel=1e-15)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: cost.data_parallel((3,), 7, 2), r"parallel\(widths=\(3,\)\): pass .*one layer"),
        (lambda: cost.independent_subnets((3, 2), 7, 2, 1), r"\(widths=\(3, 2\)\).*one hidden l"),
        (lambda: cost.local_sgd(WIDTHS, 7, 0, 1), r"local_sgd\(num_workers=0\): pass 1 or more"),
        (lambda: cost.printed_data_parallel(WIDTHS, 0, 1), r"parallel\(batch_size=0\)"),
        (lambda: cost.local_sgd(WIDTHS, 7, 1, 0), r"\(local_steps=0\)"),
        (lambda: cost.data_parallel((3, 0, 2), 7, 1), r"\(widths=\(3, 0, 2\)\): pass 1 or more"),
    ],
)
def test_numbers_that_make_no_network_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# -------------------------------------------------------------------------------------- operations

A, W = jnp.ones((6, 5)), jnp.ones((5, 5))
ONE = 2 * 6 * 5 * 5  # A @ W
IMAGE = jnp.ones((2, 9, 8, 4))


def scan(f, x, length):
    return lax.scan(lambda c, _: (f(c), None), x, None, length=length)[0]


def conv(x, kernel, **options):
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    return lax.conv_general_dilated(
        x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


PROGRAMS = {
    "one": (lambda x: x @ W, ONE),
    "two": (lambda x: jnp.tanh(x @ W) @ W, 2 * ONE),
    "scan": (lambda x: scan(lambda c: c @ W, x, 7), 7 * ONE),
    "nested scans": (
        lambda x: scan(lambda c: scan(lambda d: jnp.tanh(d @ W), c, 3) @ W, x, 4),
        (12 + 4) * ONE,
    ),
    "fori_loop": (lambda x: lax.fori_loop(2, 7, lambda i, c: i * (c @ W), x), 5 * ONE),
    "vmap": (lambda x: jax.vmap(lambda a: a @ W)(jnp.stack([x, x + 1, x + 2])), 3 * ONE),
    "batched": (
        lambda x: jnp.einsum("bij,bjk->bik", *2 * [jnp.stack([x @ x.T] * 3)]),
        360 + 3 * 432,
    ),
    "branches": (lambda x: lax.cond(x[0, 0] > 0, lambda c: c @ W, lambda c: c @ W @ W, x), 2 * ONE),
    "grad": (lambda x: jax.grad(lambda w: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w)))(W), 5 * ONE),
    "nothing": (lambda x: jnp.sort(jnp.exp(x)).sum(), 0),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_products_are_counted_as_often_as_they_run(name):
    f, flops = PROGRAMS[name]
    program = compiled(f, A)
    assert cost.ledger(program).flops == flops
    assert cost.ledger(program.as_text()).flops == flops


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "VALID"},
        {"window_strides": (2, 1)},
        {"padding": ((2, 0), (-1, 3))},
        {"rhs_dilation": (2, 1)},
        {"lhs_dilation": (1, 3), "padding": ((0, 0), (1, 0))},
        {"feature_group_count": 2},
        {"batch_group_count": 2},
    ],
    ids=str,
)
def test_a_convolution_costs_what_xla_says(options):
    """Without padding and the zeros of a dilation, which XLA's own count leaves out too."""
    kernel = jnp.ones((3, 2, 4 // options.get("feature_group_count", 1), 6))
    program = compiled(lambda x: conv(x, kernel, **options), IMAGE)
    analysis = program.cost_analysis()
    assert analysis is not None
    assert cost.ledger(program).flops == analysis["flops"]


def test_a_convolution_s_gradients_cost_as_much_as_itself():
    """Strides make them convolutions with dilations: products with the zeros are none."""
    loss = lambda kernel, x: jnp.sum(conv(x, kernel, window_strides=(2, 2), padding="VALID") ** 2)
    kernel = jnp.ones((3, 2, 4, 6))
    forward = 2 * (2 * 4 * 4 * 6) * (3 * 2 * 4)
    assert cost.ledger(compiled(loss, kernel, IMAGE)).flops == forward
    assert cost.ledger(compiled(jax.grad(loss, (0, 1)), kernel, IMAGE)).flops == 3 * forward


def test_the_formulas_operations_are_those_of_a_compiled_step():
    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    params = [jnp.ones(shape) for shape in zip(WIDTHS, WIDTHS[1:])]
    program = compiled(jax.grad(loss), params, jnp.ones((7, 3)))
    assert cost.ledger(program).flops == cost.data_parallel(WIDTHS, 7, 1).flops


def test_a_loop_that_ends_by_its_data_needs_a_trip_count():
    program = compiled(lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ W, x), A)
    with pytest.raises(
        ValueError, match=r"loop %while\S* \(jit.*while\) has no known trip count; pass"
    ):
        cost.ledger(program)
    assert cost.ledger(program, trip_count=4).flops == 4 * ONE


def test_a_loop_in_which_nothing_is_counted_needs_none():
    program = compiled(lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x), A)
    assert cost.ledger(program).flops == 0


def test_a_condition_runs_once_more_than_its_loop():
    condition = lambda c: (c @ W).sum() < 9
    program = compiled(lambda x: lax.while_loop(condition, lambda c: c @ W.T, x), A)
    assert cost.ledger(program, trip_count=4).flops == (4 + 5) * ONE


def test_calls_into_other_libraries_are_named():
    program = compiled(jnp.linalg.qr, W)
    assert any("geqrf" in target for target in cost.ledger(program).custom_calls)
    assert not cost.ledger(compiled(lambda x: x @ W, A)).custom_calls


def test_memory_is_the_compiler_s():
    program = jax.jit(lambda x, y: (x + y, x.sum()), donate_argnums=0).lower(A, A).compile()
    memory = cost.ledger(program).memory
    assert memory is not None
    argument, output, temp, alias = memory
    assert (argument, alias) == (2 * A.nbytes, A.nbytes)
    assert output >= A.nbytes + 4
    assert memory.total == argument + output + temp - alias
    assert cost.ledger(program.as_text()).memory is None


@pytest.mark.parametrize(
    ("program", "error", "match"),
    [
        (jax.jit(lambda x: x), TypeError, r"ledger\(compiled\): got .*; pass jax.jit"),
        (jax.jit(lambda x: x).lower(A), TypeError, r"got Lowered; pass .*compile\(\)"),
        (jax.jit(lambda x: x).lower(A).as_text(), ValueError, "not of a compiled program"),
    ],
)
def test_what_is_not_compiled_is_refused(program, error, match):
    with pytest.raises(error, match=match):
        cost.ledger(program)


# ------------------------------------------------------------------------------------ collectives

ROWS = 24  # of an array [24, 5] of 4 bytes on every device
BYTES = 4 * ROWS * 5


COLLECTIVES = {  # bytes that a device sends, for b bytes of operand and n devices
    "all-reduce": (lambda x, n: lax.psum(x, "w"), lambda b, n: Fraction(2 * b * (n - 1), n)),
    "all-gather": (lambda x, n: lax.all_gather(x, "w"), lambda b, n: b * (n - 1)),
    "reduce-scatter": (
        lambda x, n: lax.psum_scatter(x, "w", tiled=True),
        lambda b, n: Fraction(b * (n - 1), n),
    ),
    "all-to-all": (
        lambda x, n: lax.all_to_all(x, "w", 0, 0, tiled=True),
        lambda b, n: Fraction(b * (n - 1), n),
    ),
    "collective-permute": (
        lambda x, n: lax.ppermute(x, "w", [(i, (i + 1) % n) for i in range(n)]),
        lambda b, n: b,
    ),
}


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("kind", COLLECTIVES)
def test_a_collective_sends_all_but_its_own_slice(kind, n):
    f, sent = COLLECTIVES[kind]
    program = compiled(spread(lambda x: f(x, n), n, P("w"), P("w")), jnp.ones((n * ROWS, 5)))
    ledger = cost.ledger(program)
    assert ledger.num_devices == n
    assert ledger.bytes == n * sent(BYTES, n)
    assert ledger.bytes_per_device == sent(BYTES, n)
    (one,) = ledger.collectives
    assert (one.kind, one.dtype, one.elements, one.count) == (kind, "f32", ROWS * 5, 1)
    assert one.group_size == (2 if kind == "collective-permute" else n)


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_in_a_scan_a_collective_counts_as_often_as_it_runs(kind):
    f, sent = COLLECTIVES[kind]
    body = lambda c: c + 1 + f(c, 4).sum()
    program = compiled(
        spread(lambda x: scan(lambda c: scan(body, c, 3), x, 5), 4, P("w"), P("w")),
        jnp.ones((4 * ROWS, 5)),
    )
    ledger = cost.ledger(program, metrics_below=0)
    assert ledger.bytes == 15 * 4 * sent(BYTES, 4)
    assert [c.count for c in ledger.collectives] == [15]


def test_devices_that_keep_what_they_have_send_nothing():
    """Of eight, one to itself, three to others."""
    pairs = [(0, 0), (1, 2), (2, 1), (3, 4)]
    f = spread(lambda x: lax.ppermute(x, "w", pairs), 8, P("w"), P("w"))
    assert cost.ledger(compiled(f, jnp.ones((8, 5)))).bytes == 3 * 5 * 4


def test_a_collective_over_one_axis_of_a_mesh_stays_in_its_groups():
    square = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    spec = P(("a", "b"))
    for axis, g in {"a": 2, "b": 4}.items():
        f = lambda x, axis=axis: lax.psum(x, axis)
        program = compiled(
            jax.shard_map(f, mesh=square, in_specs=spec, out_specs=spec, check_vma=False),
            jnp.ones((8, 5)),
        )
        assert cost.ledger(program).bytes == (8 // g) * 2 * (g - 1) * 5 * 4
        assert cost.ledger(program).collectives[0].group_size == g


def test_what_the_partitioner_inserts_is_read_too():
    """`jit` over shardings writes its groups as axes of a mesh."""
    square = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    rows, whole = (NamedSharding(square, spec) for spec in (P("b"), P()))
    f = jax.jit(lambda x: x.sum(0), in_shardings=rows, out_shardings=whole)
    program = f.lower(jnp.ones((8, 5))).compile()
    assert cost.ledger(program).bytes == 2 * 2 * 3 * 5 * 4


def test_the_loss_is_told_from_the_gradients_it_is_summed_with():
    def step(w, x):
        loss, grad = jax.value_and_grad(lambda w: jnp.sum((x @ w) ** 2))(w)
        return lax.psum((loss, grad), "w")

    program = compiled(spread(step, 8, (P(), P("w")), P()), W, jnp.ones((8, 5)))
    (merged,) = re.findall(r"= (.*) all-reduce\(", program.as_text() or "")
    assert merged.startswith("(")  # one operation on a tuple
    ledger = cost.ledger(program)
    assert [c.elements for c in ledger.metrics] == [1]
    assert [c.elements for c in ledger.collectives] == [25]
    assert ledger.bytes == 2 * 7 * 25 * 4
    assert cost.ledger(program, metrics_below=0).bytes == 2 * 7 * 26 * 4
    assert cost.ledger(program, metrics_below=26).bytes == 0


# ------------------------------------------------------------------------------------------- texts


def text(line, rest=""):
    """A program of eight devices, as XLA writes one."""
    return f"""HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}
{rest}
ENTRY %main (x: f32[16,4], y: bf16[8]) -> f32[16,4] {{
  %x = f32[16,4]{{1,0:T(8,128)S(1)}} parameter(0)
  %y = bf16[8]{{0}} parameter(1)
  {line}
}}
"""


@pytest.mark.parametrize(
    ("groups", "sizes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", [2] * 4),
        ("{{0,1,2,3,4,5,6,7}}", [8]),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", [1] * 8),
        ("{{0,1,2,3,4},{5,6,7}}", [5, 3]),
        ("{}", [8]),
        ("{{0}}", [8]),  # of replicas, of which there is one
        ("[1,8]<=[8]", [8]),
        ("[2,4]<=[8]", [4] * 2),
        ("[4,2]<=[2,4]T(1,0)", [2] * 4),
        ("[4,2]<=[2,2,2]T(0,2,1)", [2] * 4),
        ("mesh['a'=2,'b'=4] {'b'}", [4] * 2),
        ("mesh['a'=2,'b'=4] {'a','b'}", [8]),
        ("mesh['a'=2,'b'=1,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", [2] * 4),
        ("mesh['a'=2,'b'=4] {'a','b':(1)2}", [4] * 2),
    ],
)
def test_groups_are_read_however_xla_writes_them(groups, sizes):
    line = (
        "ROOT %r = f32[16,4]{1,0} all-reduce(%x), channel_id=1, "
        f"replica_groups={groups}, use_global_device_ids=true, to_apply=%add"
    )
    ledger = cost.ledger(text(line))
    assert ledger.bytes == sum(2 * (g - 1) * 256 for g in sizes)
    assert ledger.collectives[0].group_size == max(sizes)


@pytest.mark.parametrize("groups", ["{{0,1},{2,3}}", "[2,2]<=[4]", "device[8]"])
def test_groups_that_are_not_understood_are_refused(groups):
    line = f"ROOT %r = f32[16,4] all-reduce(%x), channel_id=1, replica_groups={groups}"
    with pytest.raises(ValueError, match=r"groups of %r do not hold the program's 8 devices"):
        cost.ledger(text(line))


ALL = "channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}"
WRAPPED = """
%wrapped (p: f32[16,4]) -> f32[2,4] {
  %p = f32[16,4]{1,0} parameter(0)
  ROOT %rs = f32[2,4]{1,0} reduce-scatter(%p), ALL, dimensions={0}, to_apply=%add
}, execution_thread="main"
""".replace("ALL", ALL)
PAIRS = {
    "all-reduce": (
        f"%s = f32[16,4]{{1,0}} all-reduce-start(%x), {ALL}, to_apply=%add\n"
        "  ROOT %d = f32[16,4]{1,0} all-reduce-done(%s)",
        2 * 7 * 256,
    ),
    "all-gather": (
        f"%s = (f32[16,4]{{1,0}}, f32[128,4]{{1,0}}) all-gather-start(%x), {ALL}\n"
        "  ROOT %d = f32[128,4]{1,0} all-gather-done(%s)",
        8 * 7 * 256,
    ),
    "collective-permute": (
        "%s = (f32[16,4]{1,0}, f32[16,4]{1,0}) collective-permute-start(%x), channel_id=1, "
        "source_target_pairs={{0,1},{1,0},{2,2}}\n"
        "  ROOT %d = f32[16,4]{1,0} collective-permute-done(%s)",
        2 * 256,
    ),
    "reduce-scatter": (
        "%s = ((f32[16,4]{1,0}), f32[2,4]{1,0}) async-start(f32[16,4]{1,0} %x), calls=%wrapped\n"
        "  ROOT %d = f32[2,4]{1,0} async-done(((f32[16,4]), f32[2,4]) %s), calls=%wrapped",
        7 * 256,
    ),
    "all-to-all": (
        f"%s = ((f32[16,4]{{1,0}}), f32[16,4]{{1,0}}) all-to-all-start(%x), {ALL}\n"
        "  ROOT %d = f32[16,4]{1,0} all-to-all-done(%s)",
        7 * 256,
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_a_pair_of_start_and_done_counts_once(kind):
    lines, sent = PAIRS[kind]
    ledger = cost.ledger(text(lines, WRAPPED))
    assert [c.kind for c in ledger.collectives] == [kind]
    assert ledger.bytes == sent


def test_a_tuple_is_counted_array_by_array():
    line = (
        "ROOT %r = (f32[16,4]{1,0}, /*index=1*/bf16[8]{0}) all-reduce(%x, /*index=1*/%y), "
        f"{ALL}, to_apply=%add, "
        'metadata={op_name="jit(step)/vmap(f)/psum"}'
    )
    first, second = cost.ledger(text(line)).collectives
    assert (first.dtype, first.elements, first.bytes) == ("f32", 64, 2 * 7 * 256)
    assert (second.dtype, second.elements, second.bytes) == ("bf16", 8, 2 * 7 * 16)
    assert second.op_name == "jit(step)/vmap(f)/psum"


BODY = """
%body (t: (s32[], f32[16,4])) -> (s32[], f32[16,4]) {
  %t = (s32[], f32[16,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %c = f32[16,4]{1,0} get-tuple-element(%t), index=1
  %r = f32[16,4]{1,0} all-reduce(%c), ALL, to_apply=%add
  ROOT %o = (s32[], f32[16,4]{1,0}) tuple(%i, %r)
}

%condition (t.1: (s32[], f32[16,4])) -> pred[] {
  %t.1 = (s32[], f32[16,4]{1,0}) parameter(0)
  ROOT %p = pred[] constant(true)
}
""".replace("ALL", ALL)


@pytest.mark.parametrize(
    "config",
    [
        '{"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}',
        r'"{\"known_trip_count\":{\"n\":\"3\"}}"',
    ],
)
def test_trip_counts_are_read_however_xla_writes_them(config):
    line = (
        "ROOT %w = (s32[], f32[16,4]) while(%x), condition=%condition, body=%body, "
        f"backend_config={config}"
    )
    assert cost.ledger(text(line, BODY)).bytes == 3 * 2 * 7 * 256


def test_of_a_conditional_the_branch_that_sends_most_counts():
    line = (
        "ROOT %c = (s32[], f32[16,4]) conditional(%i, %x, %x), true_computation=%body, "
        "false_computation=%condition"
    )
    assert cost.ledger(text(line, BODY)).bytes == 2 * 7 * 256


def test_a_product_handed_to_cublas_counts():
    line = (
        "ROOT %g = (f32[16,16]{1,0}, s8[4194304]{0}) custom-call(%x, %x), "
        'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
        '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
        '"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[]}}}'
    )
    ledger = cost.ledger(text(line))
    assert (ledger.flops, ledger.custom_calls) == (2 * 16 * 16 * 4, ())


@pytest.mark.parametrize("kind", ["ragged-all-to-all", "collective-broadcast", "send"])
def test_what_sends_in_other_ways_is_refused(kind):
    with pytest.raises(ValueError, match=f"%r is a {kind}, whose bytes"):
        cost.ledger(text(f"ROOT %r = f32[16,4] {kind}(%x), {ALL}"))


# -------------------------------------------------------------------------------------- one round


def exchange_round(n, moments, widths, local_steps, train=True):
    """A round of independent subnet training over n workers that hold the weights, by hand.

    W1 [N0, N1] and W2 [N1, N2] lie in shards of columns, W3 [N2, N3] in shards of rows, the output
    bias whole; a worker's neurons of each hidden layer are `n` equal groups, one of every owner's.
    """
    trade = lambda parts: lax.all_to_all(parts, "w", 0, 0)
    columns = lambda parts: parts.swapaxes(0, 1).reshape(parts.shape[1], -1)
    apart = lambda w: w.reshape(w.shape[0], n, -1).swapaxes(0, 1)

    def fetch(params, one, two, rows):
        w1, w2, w3, b = params
        mine = [trade(w1[:, one].swapaxes(0, 1)), trade(w2[rows[:, :, None], two[:, None]])]
        return [*map(columns, mine), trade(w3[two]).reshape(-1, widths[3]), b]

    def give_back(params, own, one, two, rows):
        w1, w2, w3, _ = params
        back1, back2 = (trade(apart(w)) for w in own[:2])
        back3 = trade(own[2].reshape(n, -1, widths[3]))
        return [
            w1.at[:, one].set(back1.swapaxes(0, 1)),
            w2.at[rows[:, :, None], two[:, None]].set(back2),
            w3.at[two].set(back3),
            lax.psum(own[3], "w") / n,
        ]

    def loss_fn(params, batch):
        x, y = batch
        w1, w2, w3, b = params
        return jnp.mean((jnp.tanh(jnp.tanh(x @ w1) @ w2) @ w3 + b - y) ** 2)

    def local(trees, batch):
        params, *rest = trees
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        for k, old in enumerate(rest):
            rest[k] = jax.tree.map(lambda m, g: 0.9 * m + g ** (k + 1), old, grads)  # noqa: B023
        update = rest[0] if rest else grads
        return [jax.tree.map(lambda w, u: w - 0.1 * u, params, update), *rest], loss

    def one_round(trees, draws, batches):  # draws [owner, subnet, neuron of the owner's]
        (draw1, draw2), me = draws, lax.axis_index("w")
        rows = draw1 + widths[1] // n * jnp.arange(n)[:, None, None]
        where = draw1[me], draw2[me], rows.swapaxes(0, 1).reshape(n, -1)
        own = [fetch(tree, *where) for tree in trees]
        if train:
            own, losses = lax.scan(local, own, batches)
        else:
            own, losses = jax.tree.map(lambda w: w + 1, own), jnp.zeros(1)
        new = [give_back(tree, mine, *where) for tree, mine in zip(trees, own)]
        return new, lax.pmean(losses[-1], "w")

    shapes = [*zip(widths, widths[1:]), (widths[3],)]
    specs = [P(None, "w"), P(None, "w"), P("w"), P()]
    trees = [[jnp.zeros(shape) for shape in shapes] for _ in range(1 + moments)]
    batch = [jnp.ones((local_steps, BATCH * n, width)) for width in (widths[0], widths[3])]
    permutation = np.random.default_rng(0).permuted
    draws = [permutation(np.arange(w).reshape(n, -1) % (w // n), axis=1) for w in widths[1:3]]
    draws = [d.reshape(n, n, -1) for d in draws]
    in_specs = ([specs] * (1 + moments), P(), [P(None, "w")] * 2)
    f = spread(one_round, n, in_specs, (in_specs[0], P()))
    return f, (trees, draws, batch)


BATCH, STEPS = 4, 3


@pytest.mark.parametrize("moments", [0, 1, 2])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_round_between_sharded_workers_sends_what_the_formula_says(n, moments):
    widths = (6, 64, 128, 10)
    f, args = exchange_round(n, moments, widths, STEPS)
    ledger = cost.ledger(compiled(f, *args))
    formula = cost.independent_subnets(widths, BATCH, n, STEPS, moments=moments, shared=widths[3])
    assert ledger.bytes == 4 * STEPS * formula.floats
    assert n * ledger.flops == STEPS * formula.flops
    kinds = [c.kind for c in ledger.collectives]
    assert kinds.count("all-to-all") == 2 * 3 * (1 + moments)
    assert kinds.count("all-reduce") == 1 + moments
    assert [c.elements for c in ledger.metrics] == [1]


@pytest.mark.parametrize("n", [2, 4])
def test_the_round_measured_above_is_an_exchange(n):
    """Subnets that add one to all they hold: every end weight once, 1/n of the others, the bias."""
    f, args = exchange_round(n, 0, (3, 16, 32, 5), STEPS, train=False)
    ((w1, w2, w3, b),), _ = jax.jit(f)(*args)
    for whole in (w1, w3, b):
        np.testing.assert_array_equal(whole, 1)
    np.testing.assert_array_equal(np.sum(np.asarray(w2), axis=1), 32 // n)
    np.testing.assert_array_equal(np.sum(np.asarray(w2), axis=0), 16 // n)


OPTIMIZERS = {0: optax.sgd(0.1), 1: optax.sgd(0.1, momentum=0.9), 2: optax.adam(0.1)}  # by moments


def compiled_baseline(baseline, n, moments):
    """A round of STEPS steps over n devices, of a network of `WIDTHS` without vectors."""

    def loss_fn(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x)

    params = [jnp.ones(shape) for shape in zip(WIDTHS, WIDTHS[1:])]
    optimizer = OPTIMIZERS[moments]
    update = baseline(loss_fn, optimizer, axis_name="workers")
    selection, batches = psjax.replicas(params, n), jnp.ones((n, STEPS, BATCH, WIDTHS[0]))
    arguments = params, optimizer.init(params), selection.split(n), divided(batches, n)
    return over_devices(update, "shard_map", n).lower(*arguments).compile()


@pytest.mark.parametrize("moments", OPTIMIZERS)
@pytest.mark.parametrize("n", [2, 4])
def test_a_round_of_local_sgd_sends_and_computes_what_the_formula_says(n, moments):
    ledger = cost.ledger(compiled_baseline(psjax.baselines.local_sgd, n, moments))
    formula = cost.local_sgd(WIDTHS, BATCH, n, STEPS, moments=moments)
    assert ledger.bytes == pytest.approx(4 * STEPS * formula.floats, abs=0)
    assert n * ledger.flops == STEPS * formula.flops


@pytest.mark.parametrize("n", [2, 4])
def test_data_parallel_steps_send_and_compute_what_the_formula_says(n):
    ledger = cost.ledger(compiled_baseline(psjax.baselines.data_parallel, n, 2))
    formula = cost.data_parallel(WIDTHS, BATCH, n)
    assert ledger.bytes == 4 * STEPS * formula.floats
    assert n * ledger.flops == STEPS * formula.flops
