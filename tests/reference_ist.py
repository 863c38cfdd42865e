"""A slow NumPy reference of independent subnet training in float64, written from the paper alone.

*Distributed Learning of Neural Networks using Independent Subnet Training* (B. Yuan,
A. Kyrillidis, C. Jermaine), arXiv:1910.02120: Algorithm 1 (a round),
Algorithm 2 (local steps) and section 5 (every neuron's input is normalised over the batch, in place
of the factor n^2 of equation (2)). Made for tiny cases; a reader should be able to check every loop
by eye.

What is computed. A network with t weight matrices is a list of t dicts of arrays:

  params[l] = {"kernel": [N_l, N_{l+1}], "scale": [N_{l+1}], "shift": [N_{l+1}]}   l = 0 .. t-2
  params[t-1] = {"kernel": [N_{t-1}, classes], "bias": [classes]}

`scale` and `shift` may be left out, each by itself. With z = a_l W_l, and mu, v the mean and the
population variance of z over the batch, neuron by neuron, a hidden layer gives

  a_{l+1} = f(scale * (z - mu) / sqrt(v + eps) + shift),   f = relu or tanh,

the last one gives scores a W + b, and the loss is the mean over the batch of the softmax cross
entropy. There is no running mean: a batch normalises itself.

The hidden neurons are split, one owner each: `partition[l]` with 0 <= l <= t-2 is a list of n lists
of neurons of the layer that params[l] makes. A layer that `partition` does not name is held whole
by everybody. Inputs and classes are never split, so that the output bias is held by all.

The state of an optimizer is {"count": steps done} and, for each of its moments, a list of dicts
like `params`: "trace" for momentum, "mu" and "nu" for Adam. Moments travel with their entries.

After a round, an entry of a weight or of a moment that one subnet held is that subnet's; one that
several held is their arithmetic mean; one that nobody held is what it was, bit for bit. The paper
has only the first kind and the last.
"""

from typing import NamedTuple

import numpy as np


class Optimizer(NamedTuple):
    """optax's `sgd(lr)`, `sgd(lr, momentum)` or `adam(lr, b1, b2, eps)`, by name."""

    name: str  # "sgd", "momentum" or "adam"
    learning_rate: float
    momentum: float = 0.9
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    @property
    def moments(self):
        return {"sgd": (), "momentum": ("trace",), "adam": ("mu", "nu")}[self.name]


# --- the network ----------------------------------------------------------------------------------


def init_params(rng, sizes, scale=True, shift=True):
    """Random parameters of layers of these sizes, input and classes included; nothing is 0 or 1."""
    params = []
    for depth in range(len(sizes) - 1):
        layer = {
            "kernel": rng.normal(size=(sizes[depth], sizes[depth + 1])) / np.sqrt(sizes[depth])
        }
        if depth == len(sizes) - 2:
            layer["bias"] = rng.normal(size=sizes[depth + 1])
        else:
            if scale:
                layer["scale"] = 1 + 0.3 * rng.normal(size=sizes[depth + 1])
            if shift:
                layer["shift"] = 0.3 * rng.normal(size=sizes[depth + 1])
        params.append(layer)
    return params


def _forward(params, inputs, activation, eps):
    """Scores, and for each hidden layer what the backward pass needs."""
    a = np.asarray(inputs, np.float64)
    batch = len(a)
    kept = []
    for layer in params[:-1]:
        z = a @ layer["kernel"]
        normal, deviation = np.zeros(z.shape), np.zeros(z.shape[1])
        y, out = np.zeros(z.shape), np.zeros(z.shape)
        for i in range(z.shape[1]):
            mean = sum(z[b, i] for b in range(batch)) / batch
            variance = sum((z[b, i] - mean) ** 2 for b in range(batch)) / batch
            deviation[i] = np.sqrt(variance + eps)
            for b in range(batch):
                normal[b, i] = (z[b, i] - mean) / deviation[i]
                y[b, i] = normal[b, i]
                if "scale" in layer:
                    y[b, i] *= layer["scale"][i]
                if "shift" in layer:
                    y[b, i] += layer["shift"][i]
                out[b, i] = {"relu": lambda x: max(x, 0.0), "tanh": np.tanh}[activation](y[b, i])
        kept.append({"a": a, "normal": normal, "deviation": deviation, "y": y})
        a = out
    return a @ params[-1]["kernel"] + params[-1]["bias"], a, kept


def scores(params, inputs, activation="relu", eps=1e-5):
    """Scores `[B, classes]` of the network, normalised over this batch."""
    return _forward(params, inputs, activation, eps)[0]


def value_and_grad(params, inputs, labels, activation="relu", eps=1e-5):
    """The mean cross entropy of a batch, and its gradient with respect to every parameter."""
    out, hidden, kept = _forward(params, inputs, activation, eps)
    batch, classes = out.shape
    loss, d_out = 0.0, np.zeros(out.shape)
    for b in range(batch):
        top = max(out[b])
        total = sum(np.exp(out[b, c] - top) for c in range(classes))
        loss += (top + np.log(total) - out[b, labels[b]]) / batch
        for c in range(classes):
            probability = np.exp(out[b, c] - top) / total
            d_out[b, c] = (probability - (1 if c == labels[b] else 0)) / batch

    grads = [None] * len(params)
    d_bias = np.zeros(classes)
    for b in range(batch):
        for c in range(classes):
            d_bias[c] += d_out[b, c]
    grads[-1] = {"kernel": hidden.T @ d_out, "bias": d_bias}
    d_a = d_out @ params[-1]["kernel"].T

    for depth in reversed(range(len(params) - 1)):
        layer, saved = params[depth], kept[depth]
        normal, y, d_z = saved["normal"], saved["y"], np.zeros(d_a.shape)
        grads[depth] = {name: np.zeros(x.shape) for name, x in layer.items()}
        for i in range(d_a.shape[1]):
            d_normal = np.zeros(batch)
            for b in range(batch):
                slope = (y[b, i] > 0) if activation == "relu" else 1 - np.tanh(y[b, i]) ** 2
                d_y = d_a[b, i] * slope
                if "scale" in layer:
                    grads[depth]["scale"][i] += d_y * normal[b, i]
                if "shift" in layer:
                    grads[depth]["shift"][i] += d_y
                d_normal[b] = d_y * (layer["scale"][i] if "scale" in layer else 1.0)
            # The mean and the deviation depend on every sample's z.
            mean = sum(d_normal) / batch
            mean_along = sum(d_normal[b] * normal[b, i] for b in range(batch)) / batch
            for b in range(batch):
                d_z[b, i] = (d_normal[b] - mean - normal[b, i] * mean_along) / saved["deviation"][i]
        grads[depth]["kernel"] = saved["a"].T @ d_z
        d_a = d_z @ layer["kernel"].T
    return loss, grads


# --- optimizers, Algorithm 2 ----------------------------------------------------------------------


def init_state(params, optimizer):
    """A count of 0 and moments of zeros."""
    zeros = lambda: [{k: np.zeros(np.shape(x)) for k, x in layer.items()} for layer in params]
    return {"count": 0, **{moment: zeros() for moment in optimizer.moments}}


def apply_gradient(params, opt_state, grads, optimizer):
    """One step, entry by entry; returns new parameters and a new state."""
    params, opt_state = _copy(params), _copy_state(opt_state)
    opt_state["count"] += 1
    step, lr = opt_state["count"], optimizer.learning_rate
    for depth, layer in enumerate(params):
        for name, x in layer.items():
            for i in np.ndindex(x.shape):
                g = grads[depth][name][i]
                if optimizer.name == "sgd":
                    x[i] -= lr * g
                elif optimizer.name == "momentum":
                    trace = opt_state["trace"][depth][name]
                    trace[i] = g + optimizer.momentum * trace[i]
                    x[i] -= lr * trace[i]
                else:
                    mu, nu = opt_state["mu"][depth][name], opt_state["nu"][depth][name]
                    mu[i] = optimizer.b1 * mu[i] + (1 - optimizer.b1) * g
                    nu[i] = optimizer.b2 * nu[i] + (1 - optimizer.b2) * g**2
                    mu_hat = mu[i] / (1 - optimizer.b1**step)
                    nu_hat = nu[i] / (1 - optimizer.b2**step)
                    x[i] -= lr * mu_hat / (np.sqrt(nu_hat) + optimizer.eps)
    return params, opt_state


def local_steps(params, opt_state, batches, optimizer, activation="relu", eps=1e-5):
    """Algorithm 2: J steps on a list of J batches `(inputs [B, N_0], labels [B])`.

    Returns new parameters, the new state, and the list of the J losses, each before its step.
    """
    losses = []
    for inputs, labels in batches:
        loss, grads = value_and_grad(params, inputs, labels, activation, eps)
        params, opt_state = apply_gradient(params, opt_state, grads, optimizer)
        losses.append(loss)
    return params, opt_state, losses


# --- a round, Algorithm 1 -------------------------------------------------------------------------


def subnet_indices(params, partition, s):
    """For each layer and name, one list of indices a dimension: what subnet `s` holds of it."""
    held = []
    for depth, layer in enumerate(params):
        before, after = (np.shape(layer["kernel"])[d] for d in (0, 1))
        rows = partition[depth - 1][s] if depth - 1 in partition else range(before)
        columns = partition[depth][s] if depth in partition else range(after)
        held.append(
            {
                name: [list(rows), list(columns)] if name == "kernel" else [list(columns)]
                for name in layer
            }
        )
    return held


def fetch(tree, held):
    """A subnet's copy of its entries of the weights, or of one moment (lines 7 to 10)."""
    mine = []
    for layer, indices in zip(tree, held, strict=True):
        piece = {}
        for name, x in layer.items():
            piece[name] = np.zeros([len(chosen) for chosen in indices[name]])
            for i in np.ndindex(piece[name].shape):
                home = tuple(chosen[k] for chosen, k in zip(indices[name], i, strict=True))
                piece[name][i] = x[home]
        mine.append(piece)
    return mine


def bring_home(tree, pieces, helds):
    """Lines 14 to 19: held once, set; held by several, their mean; held by nobody, untouched."""
    result = _copy(tree)
    for depth, layer in enumerate(tree):
        for name in layer:
            returned = {}  # home index -> the values that came back, in the order of the subnets
            for piece, held in zip(pieces, helds, strict=True):
                for i in np.ndindex(piece[depth][name].shape):
                    home = tuple(chosen[k] for chosen, k in zip(held[depth][name], i, strict=True))
                    returned.setdefault(home, []).append(piece[depth][name][i])
            for home, values in returned.items():
                result[depth][name][home] = (
                    values[0] if len(values) == 1 else sum(values) / len(values)
                )
    return result


def ist_round(params, opt_state, partition, batches, optimizer, activation="relu", eps=1e-5):
    """Lines 3 to 19 of Algorithm 1, for given membership: fetch, J local steps each, bring home.

    Args:
      params: the whole network.
      opt_state: the whole state.
      partition: {layer: n lists of its neurons}, of any lengths; see the top of the file.
      batches: n lists, one a subnet, of J batches `(inputs [B, N_0], labels [B])`.
      optimizer: every subnet's.
      activation: "relu" or "tanh".
      eps: of the normalisation.

    Returns:
      New parameters, new state, and losses[s][j].
    """
    _check_partition(params, partition, len(batches))
    helds = [subnet_indices(params, partition, s) for s in range(len(batches))]
    ends, losses = [], []
    for held, its_batches in zip(helds, batches, strict=True):
        mine = fetch(params, held)
        my_state = {"count": opt_state["count"]}
        for moment in optimizer.moments:
            my_state[moment] = fetch(opt_state[moment], held)
        mine, my_state, my_losses = local_steps(
            mine, my_state, its_batches, optimizer, activation, eps
        )
        ends.append((mine, my_state))
        losses.append(my_losses)

    new_params = bring_home(params, [mine for mine, _ in ends], helds)
    new_state = {"count": opt_state["count"] + len(batches[0])}
    for moment in optimizer.moments:
        pieces = [state[moment] for _, state in ends]
        new_state[moment] = bring_home(opt_state[moment], pieces, helds)
    return new_params, new_state, losses


# --- what it is compared with ---------------------------------------------------------------------


def data_parallel_step(params, opt_state, batches, optimizer, activation="relu", eps=1e-5):
    """One step with the mean of n workers' gradients of the whole network, a batch each.

    Every worker normalises over its own batch. Returns new parameters, new state and n losses.
    """
    results = [value_and_grad(params, *batch, activation, eps) for batch in batches]
    mean = [{k: np.zeros(x.shape) for k, x in layer.items()} for layer in params]
    for depth, layer in enumerate(mean):
        for name, x in layer.items():
            for i in np.ndindex(x.shape):
                x[i] = sum(grads[depth][name][i] for _, grads in results) / len(results)
    params, opt_state = apply_gradient(params, opt_state, mean, optimizer)
    return params, opt_state, [loss for loss, _ in results]


def local_sgd_round(params, opt_state, batches, optimizer, activation="relu", eps=1e-5):
    """J steps of n copies of the whole network, each on its batches; then every entry's mean.

    Moments are averaged as weights are. Returns as `ist_round`.
    """
    ends = [local_steps(params, opt_state, own, optimizer, activation, eps) for own in batches]

    def mean(trees):
        result = _copy(trees[0])
        for depth, layer in enumerate(result):
            for name, x in layer.items():
                for i in np.ndindex(x.shape):
                    x[i] = sum(tree[depth][name][i] for tree in trees) / len(trees)
        return result

    new_state = {"count": opt_state["count"] + len(batches[0])}
    for moment in optimizer.moments:
        new_state[moment] = mean([state[moment] for _, state, _ in ends])
    return mean([p for p, _, _ in ends]), new_state, [losses for _, _, losses in ends]


# --- helpers --------------------------------------------------------------------------------------


def _copy(tree):
    return [{k: np.array(x, np.float64) for k, x in layer.items()} for layer in tree]


def _copy_state(opt_state):
    return {k: x if k == "count" else _copy(x) for k, x in opt_state.items()}


def _check_partition(params, partition, n):
    for depth, lists in partition.items():
        if not 0 <= depth < len(params) - 1 or len(lists) != n:
            msg = f"layer {depth} of {len(params)} in {len(lists)} lists for {n} subnets"
            raise ValueError(msg)
        owned = [int(i) for own in lists for i in own]
        size = params[depth]["kernel"].shape[1]
        if len(set(owned)) < len(owned) or any(i < 0 or i >= size for i in owned):
            msg = f"layer {depth} of {size} neurons: {lists} are not one owner each"
            raise ValueError(msg)
