"""The implementations that `recurrentgemma.benchmarks.versus` sets side by side.

Each runs in a separate process and environment, because two of them have the same
import name and none should slow another down. An opponent is one file
with one class, `Opponent(directory)`, of these methods:

    logits(length) -> path of an .npy file with [length, vocab] float32 logits
    prefill(length) -> {"seconds"}: read `length` tokens, keep the cache
    generate(batch, prompt, new_tokens) -> {"seconds", "tokens" [batch, new_tokens]}:
        greedy, through the library's own sampling entry point
    train(length) -> {"seconds", "loss"}: loss, gradient and AdamW update, in place

`directory` is what `checkpoint.write` left: the same weights in each library's own
layout, and the tokens. `serve.py` runs an opponent, `worker.py` talks to it.
"""
