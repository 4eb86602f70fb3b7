"""The chat template to train with: one that marks what the assistant says, because only that is learnt."""

import re

# how Llama 3.1 writes a message, and the same text with the mark around what the assistant says
HEADER = r"{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
CONTENT = "message['content'] | trim + '<|eot_id|>' }}"
MESSAGE = f"{HEADER}+ {CONTENT}"
MARKED = (
    HEADER + " }}{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- " + CONTENT + "{%- endgeneration %}"
    "{%- else %}{{- " + CONTENT + "{%- endif %}"
)  # fmt: skip


def training_template(tokenizer, name: str) -> str:
    """The template of model ``name`` if it has the marks, else the same with them: of Llama 3.1 here, of others by TRL.

    Raises ValueError: the model has no template, nobody knows where the marks go, or the text depends on the day.
    """
    try:
        template = tokenizer.get_chat_template().replace(MESSAGE, MARKED)
        if not re.search(r"{%-?\s*generation\s*-?%}", template):
            from trl.chat_template_utils import get_training_chat_template  # slow, and seldom needed

            template = get_training_chat_template(tokenizer) or ""
    except ValueError:
        template = ""
    if not template:
        raise ValueError(
            f"{name} has no chat template with {{% generation %}} around what the assistant says, and TRL knows none "
            "for it: take Llama 3 or 3.1 Instruct or a Qwen, or put the marks into a copy on the Hub"
        )
    if "strftime_now" in template:
        raise ValueError(
            f"the chat template of {name} writes today's date into each dialogue, so a retry tomorrow would learn "
            "another text: put a fixed date into a copy on the Hub"
        )
    return template
