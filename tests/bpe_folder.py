"""A small byte-level BPE tokenizer, written like a Hugging Face folder."""

import json

import tokenizers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}\n"
    "  {% if message.role == 'bad' %}{{ raise_exception('no role ' + message.role) }}{% endif %}\n"
    "{% generation %}{{ '<|im_start|>' + message.role + '\\n' + message.content + eos_token }}"
    "{% endgeneration %}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_bpe(folder, chat=CHAT, text="the special magic number for the river is", vocab_size=400):
    """Train on `text` and write tokenizer.json, its config and three end tokens."""
    codec = tokenizers.Tokenizer(tokenizers.models.BPE())
    codec.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    codec.decoder = tokenizers.decoders.ByteLevel()
    codec.train_from_iterator(
        [text] * 50,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    folder.mkdir(exist_ok=True)
    codec.save(str(folder / "tokenizer.json"))
    config = {
        "eos_token": {"content": SPECIAL[2]},
        "bos_token": SPECIAL[1],
        "pad_token": SPECIAL[0],
        "chat_template": chat,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    return folder
