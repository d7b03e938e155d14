"""A conversation reads only what is new, and can be taken back, saved and continued."""

import jax.numpy as jnp
import pytest

from recurrentgemma.generation import chunk_reader
from recurrentgemma.generation.chat import Chat
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.generation.sampling import Sampling
from tests.generation.test_sampler import GOLDEN, Tokenizer
from tests.golden_models import load_golden

GREEDY = Sampling(0)
WARNING = "ignore:This model does not end its turns"
END_OF_TURN = 5


@pytest.fixture(scope="module")
def sampler():
    tokenizer = Tokenizer(GOLDEN / "tokenizer.model")
    return Sampler(load_golden(GOLDEN), tokenizer, compile_ahead=False)


def _chat(sampler, **settings):
    return Chat(sampler, sampling=GREEDY, max_new_tokens=12, **settings)


@pytest.mark.filterwarnings(WARNING)
def test_a_turn_is_what_the_whole_transcript_gives(sampler):
    """Turn by turn: the tokens of everything said, in one prompt without a prefix."""
    tokenizer = sampler.tokenizer
    chat, transcript = _chat(sampler, system="Be brief."), []
    for text in ("Where is the ferry?", "And <end_of_turn> now?", "Why?"):
        if transcript:
            ended = transcript[-1] == END_OF_TURN
            transcript += [] if ended else [END_OF_TURN]
            transcript += tokenizer.encode("\n", add_bos=False)
            transcript += tokenizer.format_turn(text, add_bos=False)
        else:
            transcript += tokenizer.format_turn("Be brief.\n\n" + text)
        [sample] = sampler([transcript], max_new_tokens=12, sampling=GREEDY)
        assert chat.send(text) == sample.text
        transcript += sample.tokens
        assert chat.num_tokens == len(transcript)


@pytest.mark.filterwarnings(WARNING)
def test_a_turn_reads_only_what_is_new(sampler, monkeypatch):
    chat = _chat(sampler)
    chat.send("A long text. " * 20)
    before, read = chat.num_tokens, []
    read_chunk = chunk_reader.read_chunk
    monkeypatch.setattr(
        chunk_reader,
        "read_chunk",
        lambda *args: read.append(int(args[3][0])) or read_chunk(*args),
    )
    chat.send("Yes?")
    assert 0 < sum(read) <= chat.num_tokens - before


@pytest.mark.filterwarnings(WARNING)
def test_undo_reset_and_an_abandoned_turn(sampler):
    chat = _chat(sampler)
    first = chat.send("One")
    length = chat.num_tokens
    second = chat.send("Two")
    chat.undo()
    assert chat.num_tokens == length
    next(iter(chat.stream("Two")))
    assert chat.num_tokens == length
    assert chat.send("Two") == second
    chat.undo(), chat.undo()
    with pytest.raises(ValueError, match="no turn to take back"):
        chat.undo()
    assert chat.num_tokens == 0
    assert chat.send("One") == first
    chat.reset()
    assert chat.num_tokens == 0
    assert chat.send("One") == first


@pytest.mark.filterwarnings(WARNING)
def test_a_saved_conversation_goes_on(sampler, tmp_path):
    chat = _chat(sampler)
    with pytest.raises(ValueError, match="nothing was said"):
        chat.save(tmp_path / "chat")
    chat.send("One")
    chat.save(tmp_path / "chat")
    answer = chat.send("Two")
    later = _chat(sampler)
    later.load(tmp_path / "chat")
    assert later.send("Two") == answer
    with pytest.raises(ValueError, match="There is no prefix"):
        later.load(tmp_path / "missing")
    assert later.num_tokens == chat.num_tokens


@pytest.mark.filterwarnings(WARNING)
def test_a_turn_that_is_read_late_erases_nothing(sampler):
    chat = _chat(sampler)
    late = chat.stream("One")
    chat.send("Two")
    length = chat.num_tokens
    with pytest.raises(ValueError, match="stream: expected it to be read before"):
        list(late)
    assert chat.num_tokens == length
    begun = chat.stream("Three")
    next(begun)
    chat.undo()
    with pytest.raises(ValueError, match="stream: expected it to be read before"):
        list(begun)
    assert chat.num_tokens == 0


@pytest.mark.filterwarnings(WARNING)
def test_undo_takes_the_seed_back_too(sampler):
    chat = Chat(sampler, sampling=Sampling(1.5), max_new_tokens=12, seed=3)
    first = chat.send("One")
    chat.undo()
    assert chat.send("One") == first
    second = chat.send("Two")
    chat.undo()
    assert chat.send("Two") == second
    chat.reset()
    assert chat.send("One") == first


def test_only_a_model_that_does_not_end_its_turns_warns(sampler, recwarn):
    with pytest.warns(UserWarning, match="not instruction-tuned"):
        _chat(sampler).send("Hello")
    model = load_golden(GOLDEN)
    # Hidden states that share a direction, in which <end_of_turn> lies furthest.
    embedding = model.embedder.embedding[...].at[:, 0].set(20.0)
    model.embedder.embedding[...] = embedding.at[END_OF_TURN, 0].set(60.0)
    model.final_norm.scale[...] = jnp.zeros_like(model.final_norm.scale[...])
    for block in model.blocks:
        block.mlp.down.kernel[...] *= 0
        for out in ("linear_out", "proj_out"):
            if hasattr(block.mixer, out):
                getattr(block.mixer, out).kernel[...] *= 0
    recwarn.clear()
    assert _chat(Sampler(model, sampler.tokenizer)).send("Hello") == ""
    assert not recwarn.list


def test_bad_input_is_refused(sampler):
    with pytest.raises(ValueError, match="expected something to say"):
        _chat(sampler).send(" \n")
    with pytest.raises(ValueError, match="expected one with a tokenizer"):
        Chat(Sampler(sampler.model))
