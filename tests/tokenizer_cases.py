"""A small Granite-like tokenizer folder, nasty strings and conversations, for the tests of tokenizer and template."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END = "<|end_of_text|>"
FIRST_SPECIAL = [END, "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<filename>", "<reponame>"]
LAST_SPECIAL = ["<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"]

# Each feature that Granite's template uses: undefined-tolerant tests, `loop`, tojson with and without indent, the date.
TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set opening = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set opening = "Today is " + strftime_now('%B %d, %Y') + "." %}
    {%- if tools and documents %}
        {%- set opening = opening + " Answer from the documents, or with <|tool_call|> and a list." %}
    {%- elif tools %}
        {%- set opening = opening + " Answer with <|tool_call|> and a list." %}
    {%- elif documents %}
        {%- set opening = opening + " Answer from the documents." %}
    {%- endif %}
    {%- if 'citations' in controls and documents %}
        {%- set opening = opening + '\\n\\nCite them as <co>0</co>.' %}
    {%- endif %}
    {%- set turns = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + opening + '<|end_of_text|>\\n' }}
{%- if tools %}
    {{- '<|start_of_role|>tools<|end_of_role|>' }}
    {{- tools | tojson(indent=4) }}
    {{- '<|end_of_text|>\\n' }}
{%- endif %}
{%- if documents %}
    {{- '<|start_of_role|>documents<|end_of_role|>' }}
    {%- for document in documents %}
        {{- 'Document ' + loop.index0 | string + '\\n' + document['text'] }}
        {%- if not loop.last %}{{- '\\n\\n' }}{%- endif %}
    {%- endfor %}
    {{- '<|end_of_text|>\\n' }}
{%- endif %}
{%- for message in turns %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant' }}
        {%- if controls %}{{- ' ' + controls | tojson() }}{%- endif %}
        {{- '<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}"""

_CORPUS = [
    "the quick brown fox jumps over the lazy dog and then the other dog looks at the fox",
    "def main(arguments):\n    return [value for value in arguments if value is not None]\n",
    "Überraschung! Ça va très bien, merci. Привет, мир. 今日は世界。 emoji 🙂🙂🙃",
    "1 2 3 10 100 1,000.50 0x1f   2024-11-24",
    "    deeply\n        indented\n\n\ttext   with    spaces",
    "<tool_call>[{\"name\": \"search\", \"arguments\": {\"query\": \"weather\"}}]</tool_call>",
]  # fmt: skip


def make_backend() -> Tokenizer:
    """A byte-level BPE of a few hundred tokens with Granite's pre-tokenizer, its special ids first and last."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=FIRST_SPECIAL, show_progress=False)
    backend.train_from_iterator(_CORPUS * 3, trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in LAST_SPECIAL])
    return backend


def make_folder(folder: Path, **config: Any) -> Path:
    """Write tokenizer.json and tokenizer_config.json (its fields overridden by `config`) as Granite's are laid out."""
    folder.mkdir(parents=True, exist_ok=True)
    make_backend().save(str(folder / "tokenizer.json"))
    fields = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": LAST_SPECIAL,
        "bos_token": END,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": True,
        "eos_token": END,
        "model_max_length": 131072,
        "pad_token": END,
        "padding_side": "left",
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | config), encoding="utf-8")
    return folder


# fmt: off
NASTY = [
    "", " ", "  ", "   ", "\n", "\n\n\n", "\t", "\r\n", "\r", " \n ", "\u00a0", "\u3000", "\u2028",
    "\u0085", "\x00", "\x00\x01\x02", "\x1f", "\x7f", "\ufeff", "\ufffd", "\ufffe", "\U0010ffff", "\ue000",
    "\u200b", "\u200d", "\u202e", "\u0301", "e\u0301", "é", "a", "Hello", " Hello", "Hello ", "  Hello  ",
    "Hello, world!", "hello world hello", "HELLO", "I'm", "I'M", "don't they'll we've", "'s't're've'm'll'd",
    "''''", "it’s", "1", "12", "123", "1234567890", " 1", "  1", "   1", "1 2  3   4", "3.14159", "-1e-10",
    "0x1F", "1,000,000", "½", " ½", "²³", "٣٤٥", "१२३", "Ⅷ", "①②", "१ १", "a1b2c3", "1a", "x  1",
    "if x:\n    return  1\n", "\tdef f():\n\t\tpass", "a\n\n\nb", "a \n b", "foo   bar", " " * 50,
    "\n" * 50, "a" * 200, "ab" * 100, "=" * 80, "<|end_of_text|>", " <|end_of_text|> ", "a<|end_of_text|>b",
    "<|start_of_role|>user<|end_of_role|>", "<|tool_call|>", "<tool_call>[{}]", "<|end_of_text",
    "<||end_of_text||>", "<<|end_of_text|>>", "<|end_of_text|><|end_of_text|>", "<fim_prefix><fim_suffix>",
    "<FIM_PREFIX>", "🙂", "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "日本語テキスト", "한국어", "العربية", "עברית",
    "ไทย", "Ελληνικά", "русский", "Ünïcödé", "ﬁ ﬂ", "Ａｂｃ", "ǅ", "ß", "İi", "http://a.b/c?d=e&f=g#h",
    "a@b.co", "C:\\x\\y", "{\"a\": [1, null]}", "$x^2 + y_i$", "—–…“”", "!!!???...", "a.b,c;d:e", "\\n\\t",
    "\"'`", "𝔘𝔫𝔦", "𐍈", "क्षि", "a\u0300\u0301\u0302\u0303",
]
# fmt: on

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Today\'s weather for <a city> & "more" — für alle',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
DOCUMENTS = [{"title": "One", "text": "Granite is a rock."}, {"title": "Two", "text": " It's hard. \n"}]

# name -> (messages, keywords of apply_chat_template)
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one turn": ([{"role": "user", "content": "Hi"}], {}),
    "no generation prompt": ([{"role": "user", "content": "Hi"}], {"add_generation_prompt": False}),
    "many turns": (
        [
            {"role": "system", "content": "Be brief.\n"},
            {"role": "user", "content": "  1 + 1?  "},
            {"role": "assistant", "content": "2", "tool_calls": None},
            {"role": "user", "content": "naïve 🙂 <b>&amp;</b> 'quoted' \"text\""},
        ],
        {},
    ),
    "tools": ([{"role": "user", "content": "Weather in Bern?"}], {"tools": TOOLS}),
    "tool replay": (
        [
            {"role": "user", "content": "Weather in Bern?"},
            {"role": "assistant", "content": '<|tool_call|>[{"name": "weather", "arguments": {"city": "Bern"}}]'},
            {"role": "tool_response", "content": '{"sky": "grey"}'},
        ],
        {"tools": TOOLS},
    ),
    "documents": ([{"role": "user", "content": "What is it?"}], {"documents": DOCUMENTS}),
    "tools and documents": ([{"role": "user", "content": "What?"}], {"documents": DOCUMENTS, "tools": TOOLS}),
    "controls": (
        [{"role": "user", "content": "What?"}],
        {"documents": DOCUMENTS, "controls": {"citations": True, "hallucinations": True, "length": "kurz & bündig"}},
    ),
}


def check_ids(ours: Any, theirs: Any) -> None:
    """Our ids and texts are those of a transformers tokenizer on every nasty string and on the whole of them."""
    assert len(NASTY) >= 100
    for text in [*NASTY, "".join(NASTY), " ".join(NASTY)]:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], repr(text)
        assert ids == theirs.encode(text), repr(text)
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), repr(text)


def check_renderings(ours: Any, theirs: Any) -> None:
    """Our text and ids are those of transformers' apply_chat_template in every conversation."""
    for name, (messages, keywords) in CONVERSATIONS.items():
        keywords = {"add_generation_prompt": True} | keywords
        expected = theirs.apply_chat_template(messages, tokenize=False, **keywords)
        assert ours.apply_chat_template(messages, **keywords) == expected, name
        expected_ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **keywords)
        assert ours.apply_chat_template(messages, tokenize=True, **keywords) == expected_ids, name
