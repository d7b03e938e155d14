"""Models of this package for lm-evaluation-harness. Needs the extra `eval`.

    from recurrentgemma.evaluation.harness import GriffinLM, register
    lm_eval.simple_evaluate(model=GriffinLM(model="nano"), tasks=["hellaswag"])

    register()  # and by name, beside the harness's own models
    lm_eval.simple_evaluate(model="recurrentgemma", model_args={"model": "nano"}, ...)

Tokens follow the harness's conventions: the begin token comes first, unless the text
spells it out, as a chat template does; spaces at the end of a context go with the
continuation; a text that is too long loses its beginning. What requests share is read
once and forked, and rows are padded at their end (`recurrentgemma.evaluation.scorer`).
Neither PyTorch nor transformers is needed.
"""

# The extra `eval` is not among what the type checker needs.
# pyright: reportMissingImports=false

from collections.abc import Sequence
from typing import Any

import lm_eval.models  # noqa: F401  fills the registry: a first entry would hide it
import tqdm
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import normalize_gen_kwargs

from recurrentgemma import _validation as check
from recurrentgemma.checkpoints import load
from recurrentgemma.evaluation.answer_cache import AnswerCache
from recurrentgemma.evaluation.scorer import Continuation, Scorer, Text
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.generation.sampling import Sampling
from recurrentgemma.tokenizer import END_OF_TURN, START_OF_TURN

NAME = "recurrentgemma"
"""Name among the harness's models."""
MAX_LENGTH = 8192
"""Default of the longest text in tokens: what RecurrentGemma and Gemma were trained on."""
BOS = "<bos>"
_ROLES = {"assistant": "model"}
# Settings of a request that change nothing here.
_WITHOUT_EFFECT = {"do_sample", "num_beams", "use_cache", "skip_special_tokens"}


def register() -> None:
    """Makes `GriffinLM` known to the harness as "recurrentgemma"."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=GriffinLM)


class GriffinLM(TemplateLM):
    """A model of this package, as the harness calls it."""

    def __init__(
        self,
        model: Any = "nano",
        *,
        batch_size: int | str = 8,
        max_length: int = MAX_LENGTH,
        max_gen_toks: int = 256,
        carry_state: bool = False,
        cache: AnswerCache | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """Loads the model.

        Args:
          model: a preset, a checkpoint, a `Sampler` or a `Scorer`.
          batch_size: rows at a time, unless `model` is a `Scorer`; changes no result.
          max_length: most tokens of a text that count; a longer one loses its beginning.
          max_gen_toks: most tokens of a generated text where the task says nothing.
          carry_state: whether rolling log-likelihoods read a document as one text of
            any length. False cuts it into windows of `max_length`, as the harness
            defines them: other, and comparable, figures.
          cache: answers that are known already, unless `model` is a `Scorer`.
          max_batch_size: not used; the harness may give it.
          device: not used; JAX chooses the device.

        Raises:
          ValueError: an argument is outside its range, or the model has no tokenizer.
        """
        super().__init__()
        self.max_length = check.integer("max_length", max_length, least=2)
        self.max_gen_toks = check.positive_integer("max_gen_toks", max_gen_toks)
        self.carry_state = check.boolean("carry_state", carry_state)
        self.name = model if isinstance(model, str) else "a model in memory"
        if isinstance(model, str):
            model = Sampler(*load(model), compile_ahead=False)
        if isinstance(model, Sampler):
            # The harness's command gives the number as text.
            model = Scorer(model, batch_size=int(batch_size), cache=cache)
        self.scorer = check.instance("model", model, Scorer, "a name or a Scorer")
        self.batch_size = self.scorer.batch_size

    @property
    def eot_token_id(self) -> int:
        """Id of the end token."""
        return self.scorer.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the begin token, which stands before an empty context."""
        return self.scorer.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in the harness's cache of requests."""
        return f"recurrentgemma-{self.scorer.tokenizer_digest}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Text that tells this template from others; None without one."""
        return "gemma turns" if chat_template else None

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results say of the model."""
        return {
            "model": self.name,
            "max_length": self.max_length,
            "carry_state": self.carry_state,
            "model_config": self.scorer.sampler.model.config.to_dict(),
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; None puts the begin token first unless the text spells it out.

        Turn markers and the begin token are recognised in texts that begin with
        `<bos>`: in those of `apply_chat_template`.
        """
        is_templated = string.startswith(BOS)
        if is_templated:
            ids = self._encode_turns(string.removeprefix(BOS))
        else:
            ids = self.scorer.tokenizer.encode(string, add_bos=False)
        begins = add_special_tokens is not False if not is_templated else True
        return [self.prefix_token_id, *ids] if begins else ids

    def _encode_turns(self, string: str) -> list[int]:
        tokenizer, ids = self.scorer.tokenizer, []
        while string:
            places = [
                (place, marker)
                for marker in (START_OF_TURN, END_OF_TURN)
                if (place := string.find(marker)) >= 0
            ]
            place, marker = min(places, default=(len(string), ""))
            ids += tokenizer.encode(string[:place], add_bos=False)
            ids += [tokenizer.special_id(marker)] if marker else []
            string = string[place + len(marker) :]
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Turns as text; what the system says comes first in the first user turn.

        Without `add_generation_prompt` the last turn stays open, to be continued.
        """
        text, system = BOS, ""
        for turn in chat_history:
            role, content = turn["role"], turn["content"]
            if role == "system":
                system += content + "\n\n"
                continue
            if role == "user":
                content, system = system + content, ""
            role = _ROLES.get(role, role)
            text += f"{START_OF_TURN}{role}\n{content}{END_OF_TURN}\n"
        if add_generation_prompt:
            return f"{text}{START_OF_TURN}model\n"
        return text.removesuffix(f"{END_OF_TURN}\n")

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is greedy."""
        asked = []
        for _, context, continuation in requests:
            row = [*context, *continuation][-(self.max_length + 1) :]
            count = min(len(continuation), len(row) - 1)
            start = len(row) - count
            asked.append(Continuation(row[:start], row[start:]))
        answers: dict[int, tuple[float, bool]] = {}
        for i, answer in self._shown(
            self.scorer.log_likelihoods(asked), len(asked), disable_tqdm
        ):
            answers[i] = tuple(answer)
            if requests[i][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return [answers[i] for i in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each document."""
        texts = [text for (text,) in (request.args for request in requests)]
        if self.carry_state:
            return [self._carried(text) for text in texts]
        items, owners = [], []
        for i, text in enumerate(texts):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                self.prefix_token_id,
                self.max_length,
                context_len=1,
            )
            some = [(None, *utils.make_disjoint_window(window)) for window in windows]
            items += some
            owners += [i] * len(some)
        totals = [0.0] * len(texts)
        found = self._loglikelihood_tokens(items, disable_tqdm)
        for i, (log_prob, _) in zip(owners, found, strict=True):
            totals[i] += log_prob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _carried(self, text: str) -> float:
        """The log-probability of a document as one text, whatever its length."""
        tokens = self.tok_encode(text)
        total = self.scorer.sampler.score(tokens).total_log_prob
        self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return total

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """The text that continues each context, until a stop string."""
        asked = [self._text(*request.args) for request in requests]
        texts: dict[int, str] = {}
        for i, text in self._shown(self.scorer.texts(asked), len(asked), disable_tqdm):
            texts[i] = text
            self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return [texts[i] for i in range(len(requests))]

    def _text(self, context: str, settings: dict[str, Any]) -> Text:
        given = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        count, until = given.pop("max_gen_toks"), given.pop("until")
        temperature = given.pop("temperature", 0.0)
        names = ("top_k", "top_p", "min_p", "repetition_penalty")
        filters = {name: given.pop(name) for name in names if name in given}
        if unknown := sorted(given.keys() - _WITHOUT_EFFECT):
            raise ValueError(
                f"generation_kwargs: expected settings that this model has, got "
                f"{', '.join(unknown)}; leave them out of the task"
            )
        # The last tokens, so that the text has room.
        tokens = self.tok_encode(context)[-max(1, self.max_length - count) :]
        return Text(
            tokens,
            count,
            tuple(stop for stop in until if stop),
            Sampling(temperature=temperature or 0.0, **filters),
        )

    @staticmethod
    def _shown(answers: Any, total: int, disable_tqdm: bool) -> Any:
        return tqdm.tqdm(answers, total=total, desc="requests", disable=disable_tqdm)
