"""What every primitive does to dimensions: the table of rules.

A rule is a function `dims(walk, step)`. It returns the values that the equation makes from
`step.ins`: it passes dimensions on, unites them with `walk.unite`, makes new ones with
`walk.value`, or fixes them with `walk.fix` and a reason. A rule may also say how to evaluate the
equation in a narrower program, where dimension `d` has `rows(d)` rows: `params(rows, step)` gives
the equation's parameters there, or `bind(narrow, step, ins)` gives its results. Without either, the
equation is evaluated unchanged.

`points` means that the rule can handle integers that are row numbers (`Value.points`). In other
rules, such an integer fixes the rows.

To add a primitive, write one function in the file of its family and one line here. A primitive
without a rule fixes all dimensions that it touches.
"""

from psjax.axes import _calls as calls
from psjax.axes import _entries as entries
from psjax.axes import _indexing as indexing
from psjax.axes import _moves as moves
from psjax.axes import _products as products
from psjax.axes._walk import Rule

ENTRYWISE = Rule(entries.entrywise)
CALL = Rule(calls.call, points=True, bind=calls.inline)
REMAT = Rule(calls.call, points=True, bind=calls.bind_remat)
CUSTOM_VJP = Rule(calls.custom_vjp, points=True, bind=calls.bind_vjp)
IDENTITY = Rule(entries.identity, points=True)
COMPARE = Rule(entries.equal, points=True)
SIGN = Rule(entries.compare_with_zero, points=True)
SCATTER = Rule(indexing.scatter, points=True)
SUM = Rule(products.reduce_rows)
ORDERED = Rule(products.cumulative)
POOL = Rule(products.pool)
KEYS = Rule(products.random_keys)

RULES: dict[str, Rule] = {
    # Entry by entry.
    **dict.fromkeys([*entries.UNARY, *entries.BINARY], ENTRYWISE),
    **dict.fromkeys([*entries.SAME, "convert_element_type"], IDENTITY),
    "platform_index": Rule(entries.scalar),
    "bitcast_convert_type": Rule(entries.bitcast),
    "eq": COMPARE,
    "ne": COMPARE,
    "lt": SIGN,
    "ge": SIGN,
    "add": Rule(entries.add, points=True),
    "select_n": Rule(entries.select_case, points=True),
    "clamp": Rule(entries.clamp, points=True),
    # The same entries in other places.
    "broadcast_in_dim": Rule(moves.broadcast, moves.shape_params, points=True),
    "reshape": Rule(moves.reshape, moves.reshape_params, points=True),
    "transpose": Rule(moves.transpose, points=True),
    "squeeze": Rule(moves.squeeze, points=True),
    "rev": Rule(moves.rev),
    "tile": Rule(moves.tile),
    "slice": Rule(moves.slice_rows, moves.slice_params, points=True),
    "split": Rule(moves.split, moves.split_params, points=True),
    "unstack": Rule(moves.unstack),
    "concatenate": Rule(moves.concatenate, points=True),
    "pad": Rule(moves.pad),
    # By indices.
    "gather": Rule(indexing.gather, indexing.gather_params, points=True),
    "scatter": SCATTER,
    "scatter-add": SCATTER,
    "scatter-mul": SCATTER,
    "scatter-min": SCATTER,
    "scatter-max": SCATTER,
    "dynamic_slice": Rule(indexing.dynamic_slice, points=True, bind=indexing.bind_slice),
    "dynamic_update_slice": Rule(
        indexing.dynamic_update_slice, points=True, bind=indexing.bind_update
    ),
    "iota": Rule(indexing.count_rows, moves.shape_params, points=True),
    "argmax": Rule(indexing.argmax),
    "argmin": Rule(indexing.argmax),
    "top_k": Rule(indexing.top_k),
    "sort": Rule(indexing.sort_rows, points=True),
    # Sums and products.
    "reduce_sum": SUM,
    "reduce_max": SUM,
    "reduce_min": SUM,
    "reduce_prod": SUM,
    "reduce_and": SUM,
    "reduce_or": SUM,
    "reduce_xor": SUM,
    "cumsum": ORDERED,
    "cumprod": ORDERED,
    "cummax": ORDERED,
    "cummin": ORDERED,
    "cumlogsumexp": ORDERED,
    "dot_general": Rule(products.dot),
    "conv_general_dilated": Rule(products.conv, products.conv_params),
    "reduce_window_sum": POOL,
    "reduce_window_max": POOL,
    "reduce_window_min": POOL,
    # Random numbers.
    "random_bits": Rule(products.random_bits, products.bits_params),
    "random_seed": KEYS,
    "random_wrap": KEYS,
    "random_unwrap": KEYS,
    "random_fold_in": KEYS,
    "random_split": KEYS,
    "random_clone": KEYS,
    # Programs inside.
    "jit": CALL,
    "pjit": CALL,
    "closed_call": CALL,
    "core_call": CALL,
    "remat2": REMAT,
    "checkpoint": REMAT,
    "remat": REMAT,
    "cond": Rule(calls.cond, points=True, bind=calls.bind_cond),
    "while": Rule(calls.while_loop, points=True, bind=calls.bind_while),
    "scan": Rule(calls.scan, points=True, bind=calls.bind_scan),
    "custom_jvp_call": Rule(calls.custom_jvp, points=True, bind=calls.bind_jvp),
    "custom_vjp_call": CUSTOM_VJP,
    "custom_vjp_call_jaxpr": CUSTOM_VJP,
}
