"""A chat model's prompts: its template, applied by `transformers`."""

from typing import Any

import tokenizers
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from nlgmoe.data.model_files import TOKENIZER, chat_template, named_tokens
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.validation import SettingError


def transformers_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return the tokenizer as `transformers` uses it, with the model's special tokens; without any, all are end-of-document."""
    files = tokenizer.files
    end = tokenizer.decode([tokenizer.eod_id])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(files[TOKENIZER]),
        chat_template=chat_template(files),
        clean_up_tokenization_spaces=False,
        **(named_tokens(files) or dict.fromkeys(("bos_token", "eos_token", "pad_token"), end)),
    )


def chat_prompts(tokenizer: Tokenizer, messages: list[str]) -> list[list[int]]:
    """Return the token ids of conversations of one message of the user each, up to where the model's answer begins."""
    theirs = transformers_tokenizer(tokenizer)
    if theirs.chat_template is None:
        raise SettingError(
            f"chat=true: tokenizer {tokenizer.name} has no chat template; leave out --chat, or import the model with its "
            "tokenizer_config.json or chat_template.jinja"
        )
    prompts = []
    for message in messages:
        tokenizer.check(message)
        conversation = [{"role": "user", "content": message}]
        try:
            ids: Any = theirs.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            raise SettingError(
                f"chat=true: the template of tokenizer {tokenizer.name} cannot be used ({error}); leave out --chat"
            ) from error
        prompts.append(ids)
    return prompts
