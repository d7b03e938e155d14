"""Loss by position and effective remembrance, against plain forward passes."""

import jax
import numpy as np

from recurrentgemma.benchmarks import forgetting
from tests.models import forward, random_model, random_tokens, tiny_config


def test_nats_by_position_are_those_of_one_forward_pass():
    model = random_model(tiny_config())
    rows = np.asarray(random_tokens((2, 30)))
    nats = forgetting.nats_by_position(model, rows)
    log_p = jax.nn.log_softmax(forward(model, rows[:, :-1])[0])
    expected = -np.take_along_axis(np.asarray(log_p), rows[:, 1:, None], 2)[..., 0]
    np.testing.assert_allclose(nats, expected, rtol=1e-4, atol=1e-4)


def test_a_window_forgets_what_lies_beyond_it():
    """Of local attention alone; the whole past against its last tokens."""
    config = tiny_config(
        block_pattern=("local_attention",), num_layers=1, attention_window=4
    )
    model, [row] = random_model(config), np.asarray(random_tokens((1, 24)))
    distances = forgetting.effective_remembrance(model, row, [16, 24], [2, 5, 16])
    assert distances.shape == (2, 3)
    assert distances[:, 0].min() > 1e-3
    np.testing.assert_allclose(distances[:, 1:], 0, atol=1e-4)

    hidden = forward(model, row[None, :16])[0][0, -1], forward(model, row[None, 14:16])
    whole, near = jax.nn.softmax(hidden[0]), jax.nn.softmax(hidden[1][0][0, -1])
    np.testing.assert_allclose(
        distances[0, 0], 0.5 * np.abs(whole - near).sum(), atol=1e-5
    )
