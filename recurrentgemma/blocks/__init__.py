"""Residual blocks and the temporal-mixing blocks they hold.

A temporal-mixing block is a module in a file here and a line in `TEMPORAL_MIXERS`:

    mixer = Mixer(config, runtime, rngs=rngs)
    y, state = mixer(x, chunk, state)
    state = mixer.init_state(batch_size, capacity)

x and y are [B, T, D] in the compute dtype; the state is any pytree with the batch axis
first whose shapes do not depend on T. At padding (position -1) the state must not
change and y must be finite; position 0 starts a document, which sees nothing before it.
"""

from recurrentgemma.blocks.attention import GlobalAttentionBlock, LocalAttentionBlock
from recurrentgemma.blocks.min_gru import MinGRUBlock
from recurrentgemma.blocks.recurrent import RecurrentBlock

TEMPORAL_MIXERS = {
    "recurrent": RecurrentBlock,
    "local_attention": LocalAttentionBlock,
    "global_attention": GlobalAttentionBlock,
    "min_gru": MinGRUBlock,
}
