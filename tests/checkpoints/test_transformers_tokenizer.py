"""A folder for transformers opens there by itself, and reads and writes the same text."""

import io
import itertools
import json
import random
from pathlib import Path

import jax.numpy as jnp
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from recurrentgemma import Sampler, Sampling, Tokenizer
from recurrentgemma.checkpoints import save
from recurrentgemma.checkpoints.hugging_face import MODEL_TYPES
from recurrentgemma.checkpoints.transformers_tokenizer import tokenizer_json
from tests.checkpoints.test_round_trips import TOKENIZER
from tests.checkpoints.test_transformers import in_transformers, needs_transformers
from tests.models import random_model, tiny_config

SOURCE = Path(__file__).read_text(encoding="utf-8")
USER_DEFINED = ["\n\n", "\n\n\n", "▁▁", "▁▁▁▁", "<b>", "</b>", "\t"]
MARKERS = ["<start_of_turn>", "<end_of_turn>", "<unused0>"]


def train(**options) -> bytes:
    """A SentencePiece model of this file's text, with Gemma's settings."""
    model = io.BytesIO()
    gemma = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
        "eos_piece": "<eos>",
        "bos_piece": "<bos>",
        "user_defined_symbols": [*MARKERS, *USER_DEFINED],
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCE.splitlines()),
        model_writer=model,
        **{**gemma, **options},
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """By name: the bundled one, one with control tokens, and one like Gemma's."""
    return {
        "nano": Tokenizer(NANO),
        "golden": Tokenizer(TOKENIZER),
        "gemma": Tokenizer(train()),
    }


NANO = TOKENIZER.parents[3] / "recurrentgemma" / "assets" / "nano" / "tokenizer.model"
KINDS = ["nano", "golden", "gemma"]


def texts() -> list[str]:
    """Texts of which none spells a special token."""
    rng = random.Random(0)
    some = ["", " ", "  ", "\n", "\n\n\n\n\n", " a", "a ", "é", "▁", " ▁ ", "<0x41>"]
    some += [
        "<b>x</b><b",
        "日本語 ünïcödé 🎉👩‍👩‍👧 \u200d\ufeff",
        "\0\x01\x7f",
        "e\u0301",
        "\r\n\t ",
    ]
    for alphabet in ("aeth n", " \n<b>/\t", SOURCE[:400] + "é中🎉▁"):
        some += [
            "".join(rng.choice(alphabet) for _ in range(rng.randrange(50)))
            for _ in range(200)
        ]
    for marker in MARKERS:
        assert not any(marker in text for text in some)
    return [*some, *SOURCE.replace("<", "(").split("\n\n")]


def encode(content: dict, text: str) -> list[int]:
    """What a tokenizer.json says: pieces that are cut out, then pairs by rank."""
    model = content["model"]
    vocab = model["vocab"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    cut = [t["content"] for t in content["added_tokens"] if t["normalized"]]
    cut.sort(key=len, reverse=True)
    text = text.replace(" ", "▁")
    ids, run = [], ""

    def end_run():
        nonlocal run
        parts = [*run]
        run = ""
        while pairs := [
            (ranks[pair], i)
            for i, pair in enumerate(itertools.pairwise(parts))
            if pair in ranks
        ]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        for part in parts:
            whole = [vocab[part]] if part in vocab else None
            ids.extend(whole or [vocab[f"<0x{byte:02X}>"] for byte in part.encode()])

    while text:
        piece = next((piece for piece in cut if text.startswith(piece)), None)
        if piece is None:
            run += text[0]
        else:
            end_run()
            ids.append(vocab[piece])
        text = text[len(piece or text[0]) :]
    end_run()
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_by_rank_give_the_ids_of_sentencepiece(kind, tokenizers):
    content = tokenizer_json(tokenizers[kind])
    for text in texts():
        expected = tokenizers[kind].encode(text, add_bos=False)
        assert encode(content, text) == expected, text


def test_without_the_order_of_scores_ids_differ(tokenizers):
    content = tokenizer_json(tokenizers["gemma"])
    content["model"]["merges"].reverse()
    assert any(
        encode(content, text) != tokenizers["gemma"].encode(text, add_bos=False)
        for text in texts()
    )


def edited(change) -> bytes:
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(TOKENIZER.read_bytes())
    change(model)
    return model.SerializeToString()


def equal_scores(model):
    one, two, *_ = (p for p in model.pieces if p.type == 1 and len(p.piece) > 1)
    one.score = two.score


def unused_piece(model):
    model.pieces[-1].type = model.pieces[-1].UNUSED


def no_character(model):
    [piece] = [piece for piece in model.pieces if piece.piece == "t"]
    piece.piece = "\u4e2d"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: train(model_type="unigram"), "of type BPE, .* got 'UNIGRAM'"),
        (lambda: train(add_dummy_prefix=True), "no space put before texts"),
        (lambda: train(remove_extra_whitespaces=True), "no spaces removed"),
        (
            lambda: train(normalization_rule_name="nfkc"),
            "no normalisation, .* got 'nfkc'",
        ),
        (lambda: edited(unused_piece), "without unused pieces"),
        (lambda: edited(equal_scores), "whose pieces differ in score"),
        (lambda: edited(no_character), "a piece for each character"),
    ],
)
def test_tokenizers_that_transformers_would_read_differently(make, message, tmp_path):
    tokenizer = Tokenizer(make())
    model = random_model(CONFIGS["gemma"](vocab_size=tokenizer.vocab_size))
    with pytest.raises(ValueError, match=f"^tokenizer: expected .*{message}"):
        save(tmp_path / "saved", model, tokenizer, format="hugging_face")
    assert not (tmp_path / "saved").exists()
    save(tmp_path / "saved", model, tokenizer)


def gemma(**fields):
    defaults = {
        "block_pattern": ("global_attention",),
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "rope_fraction": 1.0,
        "attention_bias": False,
        "attention_window": 2048,
        "mlp_bias": False,
        "lru_width": 24,
        "num_gate_blocks": 1,
        "embedding_scale": 24**0.5,
        "logits_soft_cap": None,
    }
    return tiny_config(**{**defaults, **fields})


def gemma2(**fields):
    return gemma(
        block_pattern=("local_attention", "global_attention"),
        attention_soft_cap=50.0,
        logits_soft_cap=30.0,
        attention_window=64,
        post_norms=True,
        **fields,
    )


def recurrent_gemma(**fields):
    return tiny_config(
        num_heads=3,
        num_gate_blocks=3,
        lru_width=36,
        attention_window=64,
        embedding_scale=float(jnp.bfloat16(24**0.5)),
        **fields,
    )


CONFIGS = {"recurrent_gemma": recurrent_gemma, "gemma": gemma, "gemma2": gemma2}
TOKENIZERS = dict(zip(CONFIGS, KINDS, strict=True))
PROMPTS = ["def f(x):", "The  end\n", "x = 1, 2"]
CHATS = [
    [{"role": "user", "content": "Hi  there\n"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "é?"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": " b"},
        {"role": "user", "content": "c"},
    ],
]
NEW_TOKENS = 24

OPEN_ALONE = """
import json, sys
for absent in ("sentencepiece", "google.protobuf", "recurrentgemma"):
    sys.modules[absent] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

with open(sys.argv[1], encoding="utf-8") as file:
    asked = json.load(file)
answers = {}
for folder in asked["folders"]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generated = []
    for prompt in asked["prompts"]:
        inputs = tokenizer(prompt, return_tensors="pt")
        [row] = model.generate(**inputs, max_new_tokens=asked["new_tokens"])
        new = row[inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        generated.append([inputs["input_ids"][0].tolist(), new.tolist(), text])
    ids = [tokenizer(text)["input_ids"] for text in asked["texts"]]
    answers[folder] = {
        "ids": ids,
        "texts": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        "literal": tokenizer(
            "<start_of_turn>", split_special_tokens=True, add_special_tokens=False
        )["input_ids"],
        "chats": [
            tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_dict=False
            )
            for chat in asked["chats"]
        ],
        "generated": generated,
        "ends": model.generation_config.eos_token_id,
    }
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump(answers, file)
"""


def written_model(kind, tokenizer):
    """A model that writes neither bytes nor special tokens: text that can be shown."""
    model = random_model(CONFIGS[kind](vocab_size=tokenizer.vocab_size))
    shown = [
        tokenizer.byte_of(token) is None and token > tokenizer.unk_id
        for token in range(tokenizer.vocab_size)
    ]
    embedding = model.embedder.embedding
    embedding[...] = embedding[...] * jnp.asarray(shown)[:, None]
    return model


@needs_transformers
def test_every_folder_opens_in_transformers_alone(tokenizers, tmp_path):
    assert set(CONFIGS) == set(MODEL_TYPES)
    models = {}
    for kind, name in TOKENIZERS.items():
        models[kind] = written_model(kind, tokenizers[name])
        folder = tmp_path / kind
        save(folder, models[kind], tokenizers[name], format="hugging_face")
    asked = {
        "folders": list(CONFIGS),
        "texts": texts(),
        "prompts": PROMPTS,
        "chats": CHATS,
        "new_tokens": NEW_TOKENS,
    }
    (tmp_path / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    in_transformers(OPEN_ALONE, "asked.json", "answers.json", folder=tmp_path)
    answers = json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))
    for kind, name in TOKENIZERS.items():
        _compare(answers[kind], models[kind], tokenizers[name])


def _compare(answer, model, tokenizer):
    ids = [tokenizer.encode(text) for text in texts()]
    assert answer["ids"] == ids
    assert answer["texts"] == [tokenizer.decode(row) for row in ids]
    assert answer["literal"] == tokenizer.encode("<start_of_turn>", add_bos=False)
    end = tokenizer.special_id("<end_of_turn>")
    assert answer["ends"] == [tokenizer.eos_id, end]
    one, two, three = CHATS
    assert answer["chats"] == [
        tokenizer.format_turn(one[0]["content"]),
        tokenizer.format_turn(f"{two[0]['content']}\n\n{two[1]['content']}"),
        [
            *tokenizer.format_turn(three[0]["content"]),
            # The answer follows text that the model has read already.
            *tokenizer.encode(three[1]["content"], add_bos=False),
            end,
            *tokenizer.encode("\n", add_bos=False),
            *tokenizer.format_turn(three[2]["content"], add_bos=False),
        ],
    ]
    sampler = Sampler(model, tokenizer)
    greedy = Sampling(temperature=0)
    samples = sampler(PROMPTS, max_new_tokens=NEW_TOKENS, sampling=greedy)
    for prompt, sample, theirs in zip(
        PROMPTS, samples, answer["generated"], strict=True
    ):
        assert theirs == [tokenizer.encode(prompt), list(sample.tokens), sample.text]
        assert sample.text
