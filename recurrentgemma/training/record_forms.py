"""Records, such as the lines of a JSONL file, as documents.

A record is an object with the fields of one form:

    {"text": "..."}                                     a Document
    {"prompt": "...", "response": "..."}                a Completion
    {"messages": [{"role": "user", "content": "..."},
                  {"role": "assistant", "content": "..."}, ...]}    a Conversation
    {"turns": [...]}                                    the same

Turns alternate between the roles `user` and `assistant` (or `model`); the last one is the
model's. A first turn of the role `system` is put before the text of the user's first turn,
as `Chat` does. The text of a turn may be called `text`. Fields that are null are ignored.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from recurrentgemma import _validation as check
from recurrentgemma.training.documents import Completion, Conversation, Document

ANY_FIELD = "*"
"""Among the ignored fields: all that are not those of a form."""
SYSTEM = "system"
ROLES = {"user": "user", "assistant": "model", "model": "model", SYSTEM: SYSTEM}


def document_of(record: Any, ignored: Collection[str] = ()) -> Document | None:
    """The document that a record describes; None if its text is empty.

    Args:
      record: the object, as `json.loads` returns it.
      ignored: names of fields that are not used; "*" stands for all unknown ones.

    Raises:
      ValueError: the record has the fields of no form, or one that is unknown; there
          is no response; a value is not what its field is for.
    """
    if not isinstance(record, Mapping):
        check.refuse("record", "a JSON object", record)
    fields = _fields("record", record, FORMS, ignored)
    return FORMS[tuple(fields)](fields, ignored)


def _text(fields: Mapping[str, Any], _: Collection[str]) -> Document | None:
    text = _string("text", fields["text"])
    return Document(_name(text), text) if text else None


def _completion(fields: Mapping[str, Any], _: Collection[str]) -> Completion:
    prompt = _string("prompt", fields["prompt"])
    response = _string("response", fields["response"], empty=False)
    return Completion(_name(prompt, response), prompt + response, len(prompt))


def _conversation(fields: Mapping[str, Any], ignored: Collection[str]) -> Conversation:
    [(name, messages)] = fields.items()
    if not isinstance(messages, list):
        check.refuse(name, "a list of turns", messages)
    turns = [_turn(f"{name}[{i}]", turn, ignored) for i, turn in enumerate(messages)]
    system = turns.pop(0)[1] if turns and turns[0][0] == SYSTEM else ""
    first = len(messages) - len(turns)
    for i, (role, _) in enumerate(turns):
        expected = ("user", "model")[i % 2]
        if role != expected:
            check.refuse(
                f"{name}[{first + i}].role",
                f"a turn of the {expected}",
                role,
                "the user's turn comes first, and the model's after each",
            )
    if not turns or len(turns) % 2:
        raise ValueError(
            f"{name}: expected a turn of the model at the end, got none; there is no "
            "response to learn"
        )
    texts = [text for _, text in turns]
    if system:
        texts[0] = f"{system}\n\n{texts[0]}"
    pairs = tuple(zip(texts[::2], texts[1::2], strict=True))
    return Conversation(_name(*texts), "\n".join(texts), pairs)


_Maker = Callable[[Mapping[str, Any], Collection[str]], Document | None]
FORMS: dict[tuple[str, ...], _Maker] = {
    ("text",): _text,
    ("prompt", "response"): _completion,
    ("messages",): _conversation,
    ("turns",): _conversation,
}
"""What the fields of a record mean."""
TURN_FORMS = [("role", "content"), ("role", "text")]


def _turn(name: str, turn: Any, ignored: Collection[str]) -> tuple[str, str]:
    """The role (user, model or system) and the text of a turn."""
    if not isinstance(turn, Mapping):
        check.refuse(name, "an object with a role and a content", turn)
    fields = _fields(name, turn, TURN_FORMS, ignored)
    (_, role), (text_field, text) = fields.items()
    role = ROLES[check.choice(f"{name}.role", role, ROLES)]
    return role, _string(f"{name}.{text_field}", text, empty=False)


def _fields(
    name: str,
    record: Mapping[str, Any],
    forms: Collection[tuple[str, ...]],
    ignored: Collection[str],
) -> dict[str, Any]:
    """The fields of a record, in the order of the form that they have.

    Raises:
      ValueError: they are those of no form.
    """
    known = {field for form in forms for field in form}
    given = {
        str(field)
        for field, value in record.items()
        if value is not None
        and field not in ignored
        and (field in known or ANY_FIELD not in ignored)
    }
    for form in forms:
        if given == set(form):
            return {field: record[field] for field in form}
    unknown = ", ".join(sorted(given - known))
    raise ValueError(
        f"{name}: expected the fields {', or '.join(map(' and '.join, forms))}, got "
        + (", ".join(sorted(given)) or "none")
        + (unknown and f"; to leave {unknown} out, name it in ignored_fields")
    )


def _string(name: str, value: Any, *, empty: bool = True) -> str:
    """A text of valid Unicode; half of a surrogate pair is none."""
    if not isinstance(value, str):
        check.refuse(name, "a text", value)
    if not value and not empty:
        check.refuse(name, "a text that is not empty", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        check.refuse(name, "a text that UTF-8 can encode", value)
    return value


def _name(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
