"""Token ids of requests as lm-evaluation-harness has its `hf` model encode them. Imports that library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]


class RequestEncoder(TemplateLM):
    """A model of the library that has a tokenizer and no weights: the library itself cuts pairs into context and continuation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer: Any = tokenizer

    def pairs(self, requests: Sequence[Any]) -> list[tuple[Ids, Ids]]:
        """Token ids of context and continuation, for every request for a log-likelihood."""
        encoded: list[tuple[Ids, Ids]] = self.loglikelihood(list(requests), disable_tqdm=True)
        return encoded

    def prompt(self, text: str) -> Ids:
        """Of a prompt that is to be continued: with special tokens, unless it begins with one."""
        return self.encode(text, str(self.tokenizer.bos_token)) if self.tokenizer.bos_token else self.encode(text, None)

    def encode(self, text: str, begin: str | None) -> Ids:
        special = {"add_special_tokens": False} if begin is not None and text.startswith(begin) else {}
        return list(self.tokenizer.encode(text, **special))

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_settings: object) -> Ids:
        if add_special_tokens is None:
            return self.encode(string, str(self.tokenizer.decode(self.prefix_token_id)))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, Ids, Ids]], **_settings: object) -> list[tuple[Ids, Ids]]:
        return [(context, continuation) for _, context, continuation in requests]

    # The library's class demands these two. They answer for a model, and this one only cuts texts into tokens: nobody may ask.

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        def write(messages: list[dict[str, str]]) -> str:
            settings = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **settings))

        try:
            return write(chat_history)
        except TemplateError:  # templates that know no system message
            return write([message for message in chat_history if message["role"] != "system"])
