"""Chat templates by name, each written from the published format of its prompts."""

from __future__ import annotations

from collections.abc import Mapping

# Stanford Alpaca (Taori et al. 2023), README, "Data Release"; turns after the first in the same way.
_ALPACA = """
{%- set headings = {'user': 'Instruction', 'user_context': 'Input', 'assistant': 'Response'} -%}
{%- set turns = namespace(told='', written=[]) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- set turns.told = message['content'] | trim -%}
  {%- elif message['role'] in headings -%}
    {%- set turn = '### ' + headings[message['role']] + ':\\n' + message['content'] | trim -%}
    {%- set turns.written = turns.written + [turn] -%}
  {%- endif -%}
{%- endfor -%}
{%- set asking = add_generation_prompt and messages and messages[-1]['role'] != 'assistant' -%}
{%- set first = [turns.told] if turns.told else [] -%}
{{- (first + turns.written + (['### Response:\\n'] if asking else [])) | join('\\n\\n') -}}
"""

# OpenAI, ChatML (openai-python, chatml.md at v0.27).
_CHATML = """
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}
"""

# LG AI Research, EXAONE 3.0 and 3.5 model cards: a conversation begins with a system turn, an empty one if need be.
_EXAONE = """
{%- if messages and messages[0]['role'] != 'system' -%}
  {{- '[|system|][|endofturn|]\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- '[|' + message['role'] + '|]' + message['content'] -}}
  {{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{{- '[|assistant|]' if add_generation_prompt else '' -}}
"""

# Meta, Llama 3 model cards and prompt formats.
_LLAMA3 = """
{{- bos_token if messages else '' -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt else '' -}}
"""

# Mistral AI, mistral-common, "tokenization of chats": version 1, a system prompt inside the first instruction.
_MISTRAL = """
{%- set told = messages[0]['content'] + '\\n\\n' if messages and messages[0]['role'] == 'system' else '' -%}
{{- bos_token -}}
{%- for message in (messages[1:] if told else messages) -%}
  {%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}
    {{- raise_exception('after the system message, user and assistant speak in turns') -}}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- ' [INST] ' + (told if loop.first else '') + message['content'] + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + message['content'] + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""

TEMPLATES: Mapping[str, str] = {
    "alpaca": _ALPACA.strip(),
    "chatml": _CHATML.strip(),
    "exaone": _EXAONE.strip(),
    "llama3": _LLAMA3.strip(),
    "mistral": _MISTRAL.strip(),
}
