"""A slow NumPy reference in float64, written from the paper alone; labels count from 0.

Equations are those of sections 4 and 5 of G-2023-36 (partially-separable loss, separable layers);
Gradients go home by `U_e^T`, weights by `w + U^+ (y - U w)` with the pseudo-inverse of all U_e,
one above another: a mean over the elements that hold an entry. Made for tiny cases.
"""

import itertools

import numpy as np

# --- 1 and 2: selections, equations (3), (4) and (7) ------------------------------------------


def _choices(shape, spec, indices):
    """Per dimension, the entries that an element takes, and whether the axis is kept, eq. (3)."""
    names = list(spec) + [None] * (len(shape) - len(spec))
    if len(names) != len(shape):
        msg = f"spec {spec} is longer than shape {shape}"
        raise ValueError(msg)
    chosen, kept = [], []
    for size, name in zip(shape, names, strict=True):
        if name is None or name not in indices:
            chosen.append(list(range(size)))
            kept.append(True)
            continue
        rank = np.ndim(indices[name])
        if rank > 1:
            msg = f"indices of {name!r} for one element have rank {rank}"
            raise ValueError(msg)
        entries = [int(i) for i in np.reshape(indices[name], -1)]
        if any(i < 0 or i > size for i in entries):
            msg = f"indices {entries} of {name!r} are outside 0..{size}"
            raise ValueError(msg)
        chosen.append(entries)
        kept.append(rank == 1)
    return chosen, kept


def slice_shape(shape, spec, indices):
    """Shape of what one element sees of a parameter, the n_i of eq. (3) as an array shape."""
    chosen, kept = _choices(shape, spec, indices)
    return tuple(len(entries) for entries, keep in zip(chosen, kept, strict=True) if keep)


def selection_matrix(shape, spec, indices):
    """The 0/1 matrix U_e of eq. (3) and (7); an index equal to the size gives rows of zeros."""
    shape = tuple(shape)
    chosen, _ = _choices(shape, spec, indices)
    positions = list(itertools.product(*chosen))  # C order: the last dimension runs fastest
    matrix = np.zeros((len(positions), int(np.prod(shape))))
    for row, position in enumerate(positions):
        if any(i == size for i, size in zip(position, shape, strict=True)):
            continue  # padding
        column = 0
        for i, size in zip(position, shape, strict=True):
            column = column * size + i
        matrix[row, column] = 1.0
    return matrix


def gather(x, spec, indices):
    """U_e w of eq. (3), as an array; padded entries are 0."""
    x = np.asarray(x, np.float64)
    matrix = selection_matrix(x.shape, spec, indices)
    flat = x.reshape(-1)
    taken = np.zeros(len(matrix))
    for row in range(len(matrix)):
        for column in np.flatnonzero(matrix[row]):  # one column, or none: no 0 * nan
            taken[row] = flat[column]
    return taken.reshape(slice_shape(x.shape, spec, indices))


def scatter_add(slices, shape, spec, elements):
    """The sum over e of U_e^T g_e, eq. (4); what lies in padded entries is dropped."""
    total = np.zeros(int(np.prod(shape)))
    for piece, indices in zip(slices, elements, strict=True):
        piece = np.asarray(piece, np.float64)
        if piece.shape != slice_shape(shape, spec, indices):
            msg = f"slice {piece.shape} is not {slice_shape(shape, spec, indices)}"
            raise ValueError(msg)
        matrix = selection_matrix(shape, spec, indices)
        flat = piece.reshape(-1)
        for row in range(len(matrix)):
            for column in np.flatnonzero(matrix[row]):
                total[column] += flat[row]
    return total.reshape(shape)


def scatter_mean(slices, x, spec, elements):
    """W + U^+ (y - U w) with U all elements' U_e of eq. (3), stacked; U^+ by SVD (tiny cases)."""
    x = np.asarray(x, np.float64)
    rows, values = [np.zeros((0, x.size))], [np.zeros(0)]
    for piece, indices in zip(slices, elements, strict=True):
        piece = np.asarray(piece, np.float64)
        if piece.shape != slice_shape(x.shape, spec, indices):
            msg = f"slice {piece.shape} is not {slice_shape(x.shape, spec, indices)}"
            raise ValueError(msg)
        rows.append(selection_matrix(x.shape, spec, indices))
        values.append(piece.reshape(-1))
    matrix, y = np.concatenate(rows), np.concatenate(values)
    real = matrix.sum(axis=1) > 0  # padded rows of U are zero: U^+ ignores them, whatever y holds
    matrix, y = matrix[real], y[real]
    w = x.reshape(-1)
    return (w + np.linalg.pinv(matrix) @ (y - matrix @ w)).reshape(x.shape)


def counts(shape, spec, elements):
    """How many elements hold each entry: the diagonal of the sum of U_e^T U_e, eq. (3)."""
    total = np.zeros(int(np.prod(shape)))
    for indices in elements:
        for row in selection_matrix(shape, spec, indices):
            total += row
    return total.reshape(shape)


# --- 3 and 4: networks, section 5 -------------------------------------------------------------


def sigmoid(z):
    """1 / (1 + e^-z), the activation of the networks of section 5, as their authors ran it."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(z, np.float64)))


def conv_avg_pool(x, kernel, bias, pool):
    """'VALID' correlation, + bias, then the mean over pool x pool windows: section 5's layers."""
    x, kernel, bias = (np.asarray(a, np.float64) for a in (x, kernel, bias))
    batch, height, width, inputs = x.shape
    rows, columns, kernel_inputs, outputs = kernel.shape
    if inputs != kernel_inputs or bias.shape != (outputs,):
        msg = f"x {x.shape}, kernel {kernel.shape}, bias {bias.shape} do not fit"
        raise ValueError(msg)
    convolved = np.zeros((batch, height - rows + 1, width - columns + 1, outputs))
    for b, i, j, o in np.ndindex(*convolved.shape):
        patch = x[b, i : i + rows, j : j + columns, :]
        convolved[b, i, j, o] = np.sum(patch * kernel[:, :, :, o]) + bias[o]
    pooled = np.zeros((batch, convolved.shape[1] // pool, convolved.shape[2] // pool, outputs))
    for b, i, j, o in np.ndindex(*pooled.shape):
        window = convolved[b, i * pool : (i + 1) * pool, j * pool : (j + 1) * pool, o]
        pooled[b, i, j, o] = np.sum(window) / pool**2
    return pooled


def _dense(x, kernel, bias):
    """X [B, in] times kernel [in, out] + bias [out], one group of a layer of section 5.2."""
    x, kernel, bias = (np.asarray(a, np.float64) for a in (x, kernel, bias))
    result = np.zeros((x.shape[0], kernel.shape[1]))
    for b, o in np.ndindex(*result.shape):
        result[b, o] = np.sum(x[b] * kernel[:, o]) + bias[o]
    return result


def _layers(params, name):
    """The layers name_0, name_1, ... in order (section 5.3 stacks them)."""
    found = []
    while f"{name}_{len(found)}" in params:
        found.append(params[f"{name}_{len(found)}"])
    return found


def _check_names(params, layers):
    """Refuse a layer that the forward pass would leave out (section 5.3)."""
    if len(params) != layers:
        msg = f"{layers} layers were understood of {sorted(params)}"
        raise ValueError(msg)


def psnet_scores(params, x, pools):
    """Scores [B, C] of a partitioned network: separable layers, sections 5.2 and 5.3."""
    convolutions, separable = _layers(params, "Conv"), _layers(params, "SeparableDense")
    _check_names(params, len(convolutions) + 1 + len(separable))
    if len(pools) != len(convolutions) + 1:
        msg = f"{len(pools)} pools for {len(convolutions)} convolutions and a fan-out"
        raise ValueError(msg)
    for layer, pool in zip(convolutions, pools[:-1], strict=True):
        x = sigmoid(conv_avg_pool(x, layer["kernel"], layer["bias"], pool))
    fan_out = params["FanOutConv_0"]
    scores = []
    for c in range(len(fan_out["kernel"])):
        h = sigmoid(conv_avg_pool(x, fan_out["kernel"][c], fan_out["bias"][c], pools[-1]))
        h = h.reshape(len(h), -1)  # (h, w, f)
        for i, layer in enumerate(separable):
            h = _dense(h, layer["kernel"][c], layer["bias"][c])
            if i < len(separable) - 1:
                h = sigmoid(h)
        if h.shape[1] != 1:
            msg = f"class {c} ends in {h.shape[1]} outputs instead of one score"
            raise ValueError(msg)
        scores.append(h[:, 0])
    return np.stack(scores, axis=1)


def lenet_scores(params, x, pools):
    """Scores [B, C] of a LeNet, section 5.1: only the last layer is private to a class."""
    convolutions, dense = _layers(params, "Conv"), _layers(params, "Dense")
    _check_names(params, len(convolutions) + len(dense) + 1)
    if len(pools) != len(convolutions):
        msg = f"{len(pools)} pools for {len(convolutions)} convolutions"
        raise ValueError(msg)
    for layer, pool in zip(convolutions, pools, strict=True):
        x = sigmoid(conv_avg_pool(x, layer["kernel"], layer["bias"], pool))
    h = np.asarray(x, np.float64).reshape(len(x), -1)  # (h, w, channels)
    for layer in dense:
        h = sigmoid(_dense(h, layer["kernel"], layer["bias"]))
    last = params["FanOutDense_0"]
    scores = []
    for c in range(len(last["kernel"])):
        score = _dense(h, last["kernel"][c], last["bias"][c])
        if score.shape[1] != 1:
            msg = f"class {c} ends in {score.shape[1]} outputs instead of one score"
            raise ValueError(msg)
        scores.append(score[:, 0])
    return np.stack(scores, axis=1)


# --- 5: losses, one value a sample ------------------------------------------------------------


def safe_exp(z, bound):
    """e^min(z, B) (1 + max(z - B, 0)): the exponential of eq. (6c), its tangent above B."""
    z = np.asarray(z, np.float64)
    return np.exp(np.minimum(z, bound)) * (1.0 + np.maximum(z - bound, 0.0))


def exp_squared(z):
    """e^(2z), the phi that the authors ran in place of eq. (6c)'s."""
    return np.exp(2.0 * z)


def softplus(z):
    """log(1 + e^z), the phi of one-vs-each in the place of eq. (6c)'s exp (Titsias 2016)."""
    return np.logaddexp(0.0, z)


def hinge_squared(z):
    """max(0, 1 + z)^2, the phi of the squared hinge in the place of eq. (6c)'s exp."""
    return np.maximum(0.0, 1.0 + z) ** 2


def _scores_and_labels(scores, labels):
    """Scores in float64 and labels as ints 0..C-1, those of eq. (1) less one; others refused."""
    scores, labels = np.asarray(scores, np.float64), [int(y) for y in labels]
    if len(scores) != len(labels) or any(y < 0 or y >= scores.shape[1] for y in labels):
        msg = f"labels {labels} do not fit scores {scores.shape}"
        raise ValueError(msg)
    return scores, labels


def over_margins(scores, labels, phi):
    """Per sample, the sum over j != y of phi(c_j - c_y): eq. (6b) for one sample."""
    scores, labels = _scores_and_labels(scores, labels)
    losses = np.zeros(len(labels))
    for i, y in enumerate(labels):
        for j in range(scores.shape[1]):
            if j != y:
                losses[i] += phi(scores[i, j] - scores[i, y])
    return losses


def psl(scores, labels):
    """Per sample, the sum over j != y of e^(c_j - c_y): eq. (6b), which is (6a) less 1."""
    return over_margins(scores, labels, np.exp)


def psl_squared(scores, labels):
    """Per sample, the sum over j != y of e^(2(c_j - c_y)): eq. (6b) as the authors ran it."""
    return over_margins(scores, labels, exp_squared)


def nll(scores, labels):
    """Per sample, -log softmax(c)_y: eq. (2)."""
    scores, labels = _scores_and_labels(scores, labels)
    losses = np.zeros(len(labels))
    for i, y in enumerate(labels):
        top = np.max(scores[i])
        losses[i] = top + np.log(np.sum(np.exp(scores[i] - top))) - scores[i, y]
    return losses


def one_vs_each(scores, labels):
    """Per sample, the sum over j != y of softplus(c_j - c_y): eq. (6b) with phi = softplus."""
    return over_margins(scores, labels, softplus)


def squared_hinge(scores, labels):
    """Per sample, the sum over j != y of max(0, 1 + c_j - c_y)^2: eq. (6b) with that phi."""
    return over_margins(scores, labels, hinge_squared)


def one_vs_all(scores, labels):
    """Per sample, the sum over j of softplus(-c_y or c_j): eq. (3) with C one-score elements."""
    scores, labels = _scores_and_labels(scores, labels)
    losses = np.zeros(len(labels))
    for i, y in enumerate(labels):
        for j in range(scores.shape[1]):
            losses[i] += softplus(-scores[i, j] if j == y else scores[i, j])
    return losses


# --- 6: elements, equations (6b) and (6c) -----------------------------------------------------


def element_loss(scores_k, scores_j, labels, k, phi=np.exp):
    """h_kj of eq. (6c): 1/L times the sum of phi(c_j - c_k) over the samples labelled k."""
    total = 0.0
    for score_k, score_j, label in zip(scores_k, scores_j, labels, strict=True):
        if int(label) == k:
            total += phi(np.float64(score_j) - np.float64(score_k))
    return total / len(labels)


def sum_of_elements(scores, labels, phi=np.exp):
    """The sum over k and j != k of h_kj: eq. (6b)."""
    scores, labels = _scores_and_labels(scores, labels)
    total = 0.0
    for k in range(scores.shape[1]):
        for j in range(scores.shape[1]):
            if j != k:
                total += element_loss(scores[:, k], scores[:, j], labels, k, phi)
    return total


# --- 7 and 8: derivatives and an optimizer ----------------------------------------------------


def finite_difference(f, x, eps=1e-6):
    """Central differences of a scalar f of an array: the gradient of eq. (4), to about 1e-9."""
    x = np.asarray(x, np.float64)
    gradient = np.zeros(x.shape)
    for position in np.ndindex(*x.shape):
        above, below = x.copy(), x.copy()
        above[position] += eps
        below[position] -= eps
        gradient[position] = (f(above) - f(below)) / (above[position] - below[position])
    return gradient


def adam(params, grads_fn, steps, lr, b1=0.9, b2=0.999, eps=1e-8):
    """Adam on a flat vector with grads_fn(w), eq. (4); eps outside the root, as published."""
    w = np.array(params, np.float64)
    first, second = np.zeros(w.shape), np.zeros(w.shape)
    for t in range(1, steps + 1):
        gradient = np.asarray(grads_fn(w.copy()), np.float64)
        for i in range(w.size):
            first[i] = b1 * first[i] + (1.0 - b1) * gradient[i]
            second[i] = b2 * second[i] + (1.0 - b2) * gradient[i] ** 2
            unbiased_first = first[i] / (1.0 - b1**t)
            unbiased_second = second[i] / (1.0 - b2**t)
            w[i] -= lr * unbiased_first / (np.sqrt(unbiased_second) + eps)
    return w


# --- 9: counts --------------------------------------------------------------------------------


def weight_counts(shapes, specs, C):
    """(n, n_j, n_kj, common) of eq. (7), from boolean masks of what each score depends on."""
    masks = []
    for j in range(C):
        parts = []
        for shape, spec in zip(shapes, specs, strict=True):
            axes = [axis for axis, name in enumerate(spec) if name == "class"]
            if len(axes) > 1 or any(shape[axis] != C for axis in axes):
                msg = f"no single class axis of size {C} in {shape}, {spec}"
                raise ValueError(msg)
            part = np.zeros(shape, bool)
            where = [slice(None)] * len(shape)
            for axis in axes:
                where[axis] = j
            part[tuple(where)] = True
            parts.append(part.reshape(-1))
        masks.append(np.concatenate(parts))
    score = {int(mask.sum()) for mask in masks}
    pairs = itertools.combinations(range(C), 2)
    element = {int((masks[k] | masks[j]).sum()) for k, j in pairs}
    if len(score) != 1 or len(element) != 1:
        msg = f"the classes differ: scores {score}, elements {element}"
        raise ValueError(msg)
    common = int(np.logical_and.reduce(masks).sum())
    return masks[0].size, score.pop(), element.pop(), common
