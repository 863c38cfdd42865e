"""Partitioned quasi-Newton in a trust region, in NumPy and plain loops."""

import numpy as np


def rank_one(B, s, y):
    r = y - B @ s
    if np.linalg.norm(s) == 0 or abs(r @ s) < 1e-8 * np.linalg.norm(r) * np.linalg.norm(s):
        return None
    return B if r @ s == 0 else B + np.outer(r, r) / (r @ s)


def rank_two(B, s, y):
    if not y @ s > 1e-8 * np.linalg.norm(y) * np.linalg.norm(s):
        return None
    Bs = B @ s
    return B + np.outer(y, y) / (y @ s) - np.outer(Bs, Bs) / (s @ Bs)


RULES = {"sr1": rank_one, "bfgs": rank_two}


def to_boundary(s, d, radius):
    a, b, c = d @ d, 2 * s @ d, s @ s - radius**2
    return (-b + np.sqrt(b * b - 4 * a * c)) / (2 * a)


def conjugate_gradients(H, g, radius, tolerance):
    s, r = np.zeros_like(g), g.copy()
    d = -r
    if np.linalg.norm(r) <= tolerance:
        return s
    for _ in range(len(g)):
        curvature = d @ H @ d
        if curvature <= 0:
            return s + to_boundary(s, d, radius) * d
        alpha = (r @ r) / curvature
        if np.linalg.norm(s + alpha * d) >= radius:
            return s + to_boundary(s, d, radius) * d
        s, old = s + alpha * d, r @ r
        r = r + alpha * H @ d
        if np.linalg.norm(r) <= tolerance:
            return s
        d = -r + (r @ r) / old * d
    return s


def minimize(elements, rows, w, steps, update, radius=1.0):
    """`elements[e](u) -> value, gradient, Hessian`; `rows[e]`, what it sees. Every w and radius."""
    B = [np.eye(len(row)) for row in rows]
    fresh = [True] * len(rows)
    found = []
    for _ in range(steps):
        n = len(w)
        f, g, H = 0.0, np.zeros(n), np.zeros((n, n))
        own = []
        for e, row in enumerate(rows):
            value, gradient, hessian = elements[e](w[row])
            own.append(gradient)
            f += value
            model = hessian if update == "exact" else B[e]
            for i, a in enumerate(row):
                g[a] += gradient[i]
                for j, b in enumerate(row):
                    H[a, b] += model[i, j]
        norm = np.linalg.norm(g)
        s = conjugate_gradients(H, g, radius, min(0.1, np.sqrt(norm)) * norm)
        after = sum(elements[e](w[row] + s[row])[0] for e, row in enumerate(rows))
        if update != "exact":
            for e, row in enumerate(rows):
                y = elements[e](w[row] + s[row])[1] - own[e]
                start = B[e]
                if fresh[e] and y @ s[row] > 1e-8 * np.linalg.norm(y) * np.linalg.norm(s[row]):
                    start = (y @ y) / (y @ s[row]) * start
                new = RULES[update](start, s[row], y)
                if new is not None:
                    B[e], fresh[e] = new, False
        rounding = 10 * np.finfo(float).eps * max(1, abs(f))
        ratio = (f - after + rounding) / (-(g @ s + s @ H @ s / 2) + rounding)
        if ratio < 0.25:
            radius_after = 0.5 * np.linalg.norm(s)
        elif ratio > 0.75 and np.linalg.norm(s) >= 0.99 * radius:
            radius_after = 2 * radius
        else:
            radius_after = radius
        if ratio > 1e-4:
            w = w + s
        radius = radius_after
        found.append((w.copy(), radius))
    return found
