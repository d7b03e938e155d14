"""The ops as float64 NumPy loops, gradients by hand: the truth of the contract tests.

Each returns a dict of named arrays, gradients (`grad_...`) of the sum of every result
times its cotangent.
"""

import numpy as np


def linear_scan(x, a, h0, y_cotangent, last_cotangent, reverse=False):
    x, a, h0, dy, dlast = _float64(x, a, h0, y_cotangent, last_cotangent)
    length = x.shape[1]
    times = list(range(length))[:: -1 if reverse else 1]
    y, grad_x, grad_a = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    before = {}
    h = h0
    for t in times:
        before[t] = h
        h = a[:, t] * h + x[:, t]
        y[:, t] = h
    last = h
    grad_h = dlast
    for t in reversed(times):
        grad_h = grad_h + dy[:, t]
        grad_x[:, t] = grad_h
        grad_a[:, t] = grad_h * before[t]
        grad_h = grad_h * a[:, t]
    return {
        "y": y,
        "h_last": last,
        "grad_x": grad_x,
        "grad_a": grad_a,
        "grad_h0": grad_h,
    }


def rg_lru(x, recurrence_logits, input_logits, a_param, positions, h0, dy, dlast):
    x, recurrence_logits, input_logits, a_param = _float64(
        x, recurrence_logits, input_logits, a_param
    )
    r, i = _sigmoid(recurrence_logits), _sigmoid(input_logits)
    c = -8 * np.log1p(np.exp(a_param))
    decay = np.exp(c * r)
    root = np.sqrt(-np.expm1(2 * c * r))
    start, hold = (positions == 0)[..., None], (positions < 0)[..., None]
    a = np.where(start, 0, np.where(hold, 1, decay))
    multiplier = np.where(start, 1, np.where(hold, 0, root))
    scan = linear_scan(multiplier * i * x, a, h0, dy, dlast)
    d_input = scan["grad_x"]
    slope = -(decay**2) / np.maximum(root, 1 / 2000)
    d_log_a = scan["grad_a"] * decay + d_input * i * x * slope
    d_log_a = np.where(start | hold, 0, d_log_a)
    return {
        "y": scan["y"],
        "h_last": scan["h_last"],
        "grad_x": d_input * multiplier * i,
        "grad_recurrence_logits": d_log_a * c * r * (1 - r),
        "grad_input_logits": d_input * multiplier * x * i * (1 - i),
        "grad_a_param": -8 * _sigmoid(a_param) * (d_log_a * r).sum((0, 1)),
        "grad_h0": scan["grad_h0"],
    }


def attention(q, k, v, positions, window, scale, soft_cap, out_cotangent):
    """A whole sequence without a cache, one query of one row after another."""
    q, k, v, cotangent = _float64(q, k, v, out_cotangent)
    out, grad_q = np.zeros_like(q), np.zeros_like(q)
    grad_k, grad_v = np.zeros_like(k), np.zeros_like(v)
    batch, length, heads, _ = q.shape
    per_group = heads // k.shape[2]
    for b in range(batch):
        document = 0
        for t in range(length):
            if positions[b, t] < 0:
                continue
            if positions[b, t] == 0:
                document = t
            first = document if window is None else max(document, t - window)
            seen = slice(first, t + 1)
            for n in range(heads):
                g = n // per_group
                keys, values = k[b, seen, g], v[b, seen, g]
                scores = scale * (keys @ q[b, t, n])
                capped = scores if soft_cap is None else np.tanh(scores / soft_cap)
                logits = scores if soft_cap is None else soft_cap * capped
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                out[b, t, n] = weights @ values
                upstream = cotangent[b, t, n]
                d_scores = weights * (values @ upstream - out[b, t, n] @ upstream)
                if soft_cap is not None:
                    d_scores *= 1 - capped**2
                grad_v[b, seen, g] += np.outer(weights, upstream)
                grad_k[b, seen, g] += scale * np.outer(d_scores, q[b, t, n])
                grad_q[b, t, n] = scale * (d_scores @ keys)
    return {"out": out, "grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}


def ring(positions, window):
    """For each row, {position: index in the sequence} of what a ring must hold."""
    held = []
    for row in positions:
        tokens: dict[int, int] = {}
        for index, position in enumerate(row):
            if position == 0:
                tokens = {}
            if position >= 0:
                tokens[int(position)] = index
        newest = max(tokens, default=-1)
        held.append({p: i for p, i in tokens.items() if p > newest - window})
    return held


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _float64(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]
