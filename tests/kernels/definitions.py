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


def linear_states(x, a, h0):
    """y of `linear_scan`, without gradients."""
    x, a, h = _float64(x, a, h0)
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        h = a[:, t] * h + x[:, t]
        y[:, t] = h
    return y


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


def rg_lru_with_gates(x, r_kernel, r_bias, i_kernel, i_bias, *arguments):
    """Products with block-diagonal matrices, block by block; then `rg_lru`."""
    x, *parameters = _float64(x, r_kernel, r_bias, i_kernel, i_bias)
    groups, size = parameters[1].shape
    blocks = [slice(g * size, (g + 1) * size) for g in range(groups)]

    def logits(kernel, bias):
        return np.concatenate(
            [x[..., blocks[g]] @ kernel[g] + bias[g] for g in range(groups)], axis=-1
        )

    found = rg_lru(x, logits(*parameters[:2]), logits(*parameters[2:]), *arguments)
    for name, kernel, full_name in (
        ("r", parameters[0], "grad_recurrence_logits"),
        ("i", parameters[2], "grad_input_logits"),
    ):
        upstream = found.pop(full_name)
        parts = [(x[..., block], upstream[..., block]) for block in blocks]
        found[f"grad_{name}_kernel"] = np.stack(
            [np.einsum("bti,bto->io", *part) for part in parts]
        )
        found[f"grad_{name}_bias"] = np.stack([d.sum((0, 1)) for _, d in parts])
        through = [d @ matrix.T for (_, d), matrix in zip(parts, kernel, strict=True)]
        found["grad_x"] = found["grad_x"] + np.concatenate(through, axis=-1)
    return found


def recurrent_step(
    x, parameters, positions, h, conv_state, y_cotangent, h_cotangent, conv_cotangent
):
    """Parameters are a dict of arrays by name; gates are [G, in, out] and [G, out]."""
    x, h, conv_state, dy, dh, dconv = _float64(
        x, h, conv_state, y_cotangent, h_cotangent, conv_cotangent
    )
    p = dict(zip(parameters, _float64(*parameters.values()), strict=True))
    inputs = np.concatenate([conv_state, x[:, None]], axis=1)
    back = np.arange(inputs.shape[1])[::-1]
    seen = (positions[:, None] >= back) | (back == 0)
    inside, hold = positions[:, None] >= back[1:], (positions < 0)[:, None, None]
    kernel = seen[..., None] * p["conv_kernel"]
    u = (kernel * inputs).sum(1) + p["conv_bias"]

    blocks = u.reshape(len(u), len(p["input_gate_kernel"]), -1)
    gates = {}
    for name in ("recurrence_gate", "input_gate"):
        logits = np.einsum("bgi,gio->bgo", blocks, p[f"{name}_kernel"])
        gates[name] = (logits + p[f"{name}_bias"]).reshape(u.shape)[:, None]
    recurrence = rg_lru(
        *(u[:, None], gates["recurrence_gate"], gates["input_gate"], p["a_param"]),
        *(positions[:, None], h, dy[:, None], dh),
    )
    result = {
        "y": recurrence["y"][:, 0],
        "h": recurrence["h_last"],
        "conv_state": np.where(hold, conv_state, inside[..., None] * inputs[:, 1:]),
        "grad_h": recurrence["grad_h0"],
        "grad_a_param": recurrence["grad_a_param"],
    }
    du = recurrence["grad_x"][:, 0]
    for name in ("recurrence_gate", "input_gate"):
        logits = recurrence[f"grad_{name.removesuffix('_gate')}_logits"]
        d_logits = logits.reshape(blocks.shape)
        du += np.einsum("bgo,gio->bgi", d_logits, p[f"{name}_kernel"]).reshape(u.shape)
        result[f"grad_{name}_kernel"] = np.einsum("bgi,bgo->gio", blocks, d_logits)
        result[f"grad_{name}_bias"] = d_logits.sum(0)
    d_inputs = kernel * du[:, None]
    d_inputs[:, 1:] += np.where(hold, 0, inside[..., None] * dconv)
    d_inputs[:, :-1] += np.where(hold, dconv, 0)
    return result | {
        "grad_conv_kernel": (seen[..., None] * inputs * du[:, None]).sum(0),
        "grad_conv_bias": du.sum(0),
        "grad_conv_state": d_inputs[:, :-1],
        "grad_x": d_inputs[:, -1],
    }


def attention(q, k, v, positions, window, scale, soft_cap, out_cotangent):
    """A whole sequence without a cache, every query beside every key."""
    q, k, v, upstream = _float64(q, k, v, out_cotangent)
    length, per_group = q.shape[1], q.shape[2] // k.shape[2]
    index = np.arange(length)
    document = np.maximum.accumulate(np.where(positions == 0, index, 0), axis=1)
    seen = (index <= index[:, None])[None] & (index >= document[..., None])
    seen = seen & (positions >= 0)[..., None]
    if window is not None:
        seen = seen & (index >= index[:, None] - window)[None]
    seen = seen[:, None]  # [B, 1, queries, keys]

    # Sequences as [B, heads, T, H]; the key of each query head stands beside it.
    q, upstream = (np.swapaxes(array, 1, 2) for array in (q, upstream))
    keys, values = (
        np.repeat(np.swapaxes(array, 1, 2), per_group, axis=1) for array in (k, v)
    )
    scores = scale * (q @ np.swapaxes(keys, 2, 3))
    slope = np.ones(())
    if soft_cap is not None:
        slope = 1 - np.tanh(scores / soft_cap) ** 2
        scores = soft_cap * np.tanh(scores / soft_cap)
    scores = np.where(seen, scores, -np.inf)
    # Padding sees nothing: its largest score and its total stand in for none.
    largest = np.where(seen.any(-1, keepdims=True), scores.max(-1, keepdims=True), 0)
    weights = np.exp(scores - largest)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = weights @ values
    inner = (out * upstream).sum(-1, keepdims=True)
    d_scores = weights * (upstream @ np.swapaxes(values, 2, 3) - inner) * slope * scale

    def of_keys(gradient):
        batch, heads, *shape = gradient.shape
        grouped = gradient.reshape(batch, heads // per_group, per_group, *shape)
        return np.swapaxes(grouped.sum(2), 1, 2)

    return {
        "out": np.swapaxes(out, 1, 2),
        "grad_q": np.swapaxes(d_scores @ keys, 1, 2),
        "grad_k": of_keys(np.swapaxes(d_scores, 2, 3) @ q),
        "grad_v": of_keys(np.swapaxes(weights, 2, 3) @ upstream),
    }


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
