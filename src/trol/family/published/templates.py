"""How the published models were spoken to: system prompt, marks of turns, chat templates."""

from __future__ import annotations

from string import Template
from typing import NamedTuple

from trol.errors import unknown
from trol.family.processing import IMAGE_TOKEN

SYSTEM_PROMPT = (
    "You are AI model created by Byung-Kwan Lee, Ph.D. candidate, KAIST EE, of which AI model name "
    "is TroL (Traversal of Layers). You must give helpful, detailed, and polite answers to the "
    "user's questions"
)
"""What the models were told where nobody said anything else."""


class Marks(NamedTuple):
    """The marks of turns in one family's texts."""

    before_role: str
    after_role: str
    end: str
    """What ends a turn."""
    answer: str
    """What an answer begins after in a decoded text, as the published models were read."""


MARKS = {
    "internlm2": Marks("[UNUSED_TOKEN_146]", "\n", "[UNUSED_TOKEN_145]", "assistant\n"),
    "phi3": Marks("<|", "|>\n", "<|end|>", "<|assistant|>\n"),
}
"""By family."""


_TEMPLATE = Template("""\
{%- macro say(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'text' -%}
                {{- part.text -}}
            {%- else -%}
                {{- '$image' if loop.last else '$image\\n' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- '<s>' -}}
{%- if messages[0].role != 'system' -%}
    {{- "${before}system${after}$prompt$end\\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {{- ('' if loop.first else '\\n') + '$before' + message.role + '$after' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
            {{- say(message.content) + '$end\\n</s>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- say(message.content) + '$end' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '\\n${before}assistant$after' -}}
{%- endif -%}
""")


def chat_template(family: str) -> str:
    """The chat template of a family: turns joined by line ends, an image on a line of its own.

    Without a system message the conversation opens with `SYSTEM_PROMPT`; what the assistant says
    is marked as generation, its end included.
    """
    if family not in MARKS:
        raise unknown("family", family, MARKS)
    marks = MARKS[family]
    return _TEMPLATE.substitute(
        before=marks.before_role,
        after=marks.after_role.replace("\n", "\\n"),
        end=marks.end,
        prompt=SYSTEM_PROMPT,
        image=IMAGE_TOKEN,
    )
