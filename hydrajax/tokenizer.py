"""Text to ids and back: a Hugging Face `tokenizer.json` read as it is, or plain UTF-8 bytes.

`tokenizers.Tokenizer.from_file` is the only reader: transformers 5 rebuilds some tokenizers and
then splits text in another way. Text that a user typed never turns into special ids; only text
that a chat template has rendered is encoded with `special=True`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from hydrajax.typing import UserError

# Everything that belongs to a tokenizer; `save_tokenizer` copies these byte for byte.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
BYTES_JSON = b'{"type":"bytes"}\n'
NONE = -1  # an id that the tokenizer does not have, as in ModelConfig
_TYPED = 0xF0000  # private-use plane: stands for a special token that a chat user typed


class Codec(Protocol):
    """The part that differs between a tokenizer file and bytes."""

    vocab_size: int

    def encode_batch(self, texts: Sequence[str], special: bool) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int], special: bool) -> str: ...


class ByteCodec:
    """UTF-8 bytes are ids 0..255, then bos, eos and pad."""

    vocab_size = 259

    def encode_batch(self, texts, special):
        return [list(text.encode("utf-8", "surrogatepass")) for text in texts]

    def decode(self, ids, special):
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


class FileCodec:
    """A `tokenizer.json`, held twice: once blind to special tokens, once seeing them."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._plain = tokenizers.Tokenizer.from_file(str(path))
            self._special = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exceptions
            raise UserError(f"{path}: `tokenizers` cannot read it as tokenizer.json ({e}).") from e
        self._plain.encode_special_tokens = True
        for codec in (self._plain, self._special):  # settings left behind by whoever saved the file
            codec.no_truncation()
            codec.no_padding()
        self.vocab_size = max(self._plain.get_vocab(with_added_tokens=True).values()) + 1

    def __reduce__(self):  # worker processes read the file again: pickling loses settings
        return FileCodec, (self.path,)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        added = self._plain.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    def id_of(self, token: str) -> int:
        found = self._plain.token_to_id(token)
        return NONE if found is None else found

    def encode_batch(self, texts, special):
        codec = self._special if special else self._plain
        return [e.ids for e in codec.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids, special):
        return self._plain.decode(list(ids), skip_special_tokens=not special)


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Tokenizer:
    """Encodes, decodes and renders chats; ids that do not exist are -1."""

    codec: Codec
    source: Path | None  # folder of the files; None for bytes
    eos_ids: tuple[int, ...]  # the first one ends documents
    bos_id: int
    pad_id: int
    chat_template: str
    names: dict[str, str]  # bos_token, eos_token, ...: what templates may refer to

    @property
    def vocab_size(self) -> int:
        return self.codec.vocab_size

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_template)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the bytes of tokenizer.json."""
        data = BYTES_JSON if self.source is None else (self.source / FILES[0]).read_bytes()
        return hashlib.sha256(data).hexdigest()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return ids, never with an added bos; `special` lets special tokens in the text count."""
        return self.codec.encode_batch([text], special)[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts on all cores."""
        return self.codec.encode_batch(texts, False)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return text; `special` keeps special tokens visible."""
        return self.codec.decode([int(i) for i in ids], special)

    def stream(self) -> "TextStream":
        """Return a decoder that is fed one id at a time."""
        return TextStream(self.decode)

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """Render messages ({"role", "content"}) to the text that the model was tuned on."""
        if not self.chat_template:
            raise UserError(
                f"The tokenizer of {self.source or 'bytes'} has no chat template; "
                "give a plain prompt or a teacher tuned on chats."
            )
        try:
            return _template(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.names,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as e:
            raise UserError(
                f"Chat template of {self.source}: {e} (messages need `role` and `content`)."
            ) from e

    def encode_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
        """Render and encode a chat; special tokens typed inside a message stay plain text."""
        special = getattr(self.codec, "special_tokens", {})
        hidden = {token: chr(_TYPED + i) for i, token in enumerate(special)}
        typed = {mark: token for token, mark in hidden.items()}

        def hide(text):
            for token, mark in hidden.items():
                text = text.replace(token, mark)
            return text

        safe = [{k: hide(v) if isinstance(v, str) else v for k, v in m.items()} for m in messages]
        text = self.apply_chat_template(safe, add_generation_prompt)
        pieces = re.split(f"([{chr(_TYPED)}-{chr(_TYPED + len(hidden))}])", text)
        ids = [self.encode(typed.get(p, p), special=p not in typed) for p in pieces if p]
        return [i for piece in ids for i in piece]


class TextStream:
    """Turns ids into text as they come, holding back bytes until their character is whole."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []  # the last text that went out, then what is still waiting
        self._sent = 0  # how many of them went out: decoders need left context for spaces

    def push(self, token: int) -> str:
        """Return the text that this id completes, often all of it, sometimes none."""
        self._ids.append(int(token))
        if self._decode(self._ids).endswith("\ufffd"):
            return ""
        return self.finish()

    def finish(self) -> str:
        """Return what is left, with broken characters replaced."""
        text = self._decode(self._ids)[len(self._decode(self._ids[: self._sent])) :]
        del self._ids[: self._sent]
        self._sent = len(self._ids)
        return text


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load a folder with tokenizer.json, that file itself, or "bytes"."""
    if str(source) == "bytes":
        return Tokenizer(ByteCodec(), None, (257,), 256, 258, "", {})
    path = Path(source)
    path = path / FILES[0] if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"No tokenizer at {path}; give a folder with tokenizer.json, or 'bytes'.")
    if path.stat().st_size < 64 and _read_json(path) == json.loads(BYTES_JSON):
        return load_tokenizer("bytes")
    codec, folder = FileCodec(path), path.parent
    config = _read_json(folder / "tokenizer_config.json")
    names = {k: _content(v) for k, v in config.items() if k.endswith("_token") and _content(v)}
    eos_ids = [codec.id_of(names.get("eos_token", "")), *_eos_ids(folder)]
    return Tokenizer(
        codec,
        folder,
        tuple(dict.fromkeys(i for i in eos_ids if i != NONE)),
        codec.id_of(names.get("bos_token", "")),
        codec.id_of(names.get("pad_token", "")),
        _chat_template(folder, config),
        names,
    )


def check_vocabulary(tokenizer: Tokenizer, rows: int, name: str) -> None:
    """Raise UserError unless a model's embedding of so many rows has one for every token."""
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{name} has ids up to {tokenizer.vocab_size - 1}, but the model's embedding has only "
            f"{rows} rows; use the tokenizer of this model."
        )


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Copy the tokenizer's files into a run folder, byte for byte."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer.source is None:
        (folder / FILES[0]).write_bytes(BYTES_JSON)
        return
    for name in FILES:
        path = tokenizer.source / name
        if path.is_file() and path.resolve() != (folder / name).resolve():
            (folder / name).write_bytes(path.read_bytes())


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON ({e}).") from e
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(data).__name__}.")
    return data


def _content(token: Any) -> str:
    """Return the text of a token entry, which is a string or {"content": ...}."""
    return (token.get("content") if isinstance(token, dict) else token) or ""


def _eos_ids(folder: Path) -> list[int]:
    """Return further end ids: chat models name several in generation_config.json."""
    config = _read_json(folder / "config.json")
    for ids in (
        _read_json(folder / "generation_config.json").get("eos_token_id"),
        config.get("eos_token_id"),
        config.get("model", {}).get("eos_ids"),
    ):
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def _chat_template(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    template = config.get("chat_template") or ""
    if isinstance(template, list):  # several named templates
        template = {t["name"]: t["template"] for t in template}.get("default", "")
    return template


class _Generation(jinja2.ext.Extension):
    """Accepts {% generation %}, a mark around assistant turns that changes no text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _template(source: str) -> jinja2.Template:
    """Compile a template where it can reach neither Python nor the machine."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def strftime_now(fmt):
        import datetime

        return datetime.datetime.now().strftime(fmt)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return env.from_string(source)
