"""Chat templates of the shapes that checkpoints have."""

LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "Cutting Knowledge Date: December 2023" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{{ bos_token }}{% set system = '' %}
{% if messages[0]['role'] == 'system' %}
  {% set system = messages[0]['content'] + '\\n\\n' %}
  {% set messages = messages[1:] %}
{% endif %}
{% for message in messages %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
  {% endif %}
  {% if message['role'] == 'user' %}
{{ '[INST] ' + (system if loop.last else '') + message['content'] + '[/INST]' }}
  {%- else %}
    {% generation %}{{ ' ' + message['content'] | trim + eos_token }}{% endgeneration %}
  {%- endif %}
{% endfor %}"""

# It writes no beginning of sequence, ends in a line of its own, and starts with text.
CHAT = """{% for message in messages %}
### {{ message.role }}
{{ message.content }}
  {% if message.role == 'assistant' %}{{ eos_token }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
### assistant
{% endif %}
{{ '' if tools or documents else {'a': '<é>'} | tojson }}
"""

# The beginning of sequence hangs on the messages; spaces before a block and at the end.
MOODY = """  {% if messages[0].role == 'system' %}{{ bos_token }}{% endif %}
{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}
next:
  """

TEMPLATES = {"llama3": LLAMA3, "mistral": MISTRAL, "chat": CHAT, "moody": MOODY}
