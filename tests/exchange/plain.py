"""Codecs, encoded sums and rounds in loops over entries, float64, written for the tests alone."""

import math

import numpy as np

RATE, DECAY = 0.1, 0.5  # of the inner momentum


def int4(x, block=4):
    """What is decoded of an array, rounded to the nearest of 15 steps a block."""
    out = np.zeros_like(x)
    for start in range(0, len(x), block):
        scale = max(abs(v) for v in x[start : start + block]) / 7
        for i in range(start, start + block):
            out[i] = np.rint(x[i] / scale) * scale if scale > 0 else 0.0
    return out


def top_k(x, fraction=0.3):
    """The largest entries."""
    out = np.zeros_like(x)
    for i in sorted(range(len(x)), key=lambda i: -abs(x[i]))[: math.ceil(fraction * len(x))]:
        out[i] = x[i]
    return out


def encoded_sum(rows, encode_decode, block=1, divide=1):
    """Shards to their owners, decoded, added, encoded once more; and what each worker lost."""
    n, size = len(rows), len(rows[0])
    length = block * math.ceil(math.ceil(size / n) / block)
    padded = [np.concatenate([row, np.zeros(n * length - size)]) for row in rows]
    lost, total = [row.copy() for row in padded], []
    for owner in range(n):
        at = slice(owner * length, (owner + 1) * length)
        added = np.zeros(length)
        for worker, row in enumerate(padded):
            decoded = encode_decode(row[at])
            lost[worker][at] -= decoded
            added = added + decoded
        sent = encode_decode(added / divide)
        lost[owner][at] += added - sent * divide
        total.append(sent)
    return np.concatenate(total)[:size], [row[:size] for row in lost]


def trained(w, trace, targets, mine):
    """Momentum steps on half the squared distance; only entries of `mine` move."""
    w, trace = w.copy(), trace.copy()
    for target in targets:
        for i in range(len(w)):
            if mine[i]:
                trace[i] = (w[i] - target) + DECAY * trace[i]
                w[i] -= RATE * trace[i]
    return w, trace


class Workers:
    """n workers with a residual and a momentum of their own, and flat weights that they share."""

    def __init__(self, w, n, encode_decode, block):
        self.w, self.n = w.copy(), n
        self.traces = [np.zeros_like(w) for _ in range(n)]
        self.residuals = [np.zeros_like(w) for _ in range(n)]
        self.codec = encode_decode, block

    def change(self, targets, holds, bad=()):
        """What a round adds to the weights, and which entries anybody held."""
        size = len(self.w)
        holds = [h & np.array(e not in bad) for e, h in enumerate(holds)]
        count = [sum(int(h[i]) for h in holds) for i in range(size)]
        shares = []
        for e in range(self.n):
            if e not in bad:
                y, self.traces[e] = trained(self.w, self.traces[e], targets[e], holds[e])
            share = np.zeros(size)
            for i in range(size):
                share[i] = (y[i] - self.w[i]) / count[i] if holds[e][i] else 0.0
                share[i] += self.residuals[e][i] if count[i] else 0.0
            shares.append(share)
        total, lost = encoded_sum(shares, *self.codec)
        for e in range(self.n):
            for i in range(size):
                if count[i]:
                    self.residuals[e][i] = lost[e][i]
        return total, np.array(count) > 0
