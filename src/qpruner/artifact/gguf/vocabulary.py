"""The tokenizer of a model in the words of a GGUF file.

Byte-pair encodings are of two kinds there. In one, tokens are spelled in an alphabet of bytes, merges are listed, and
how text is cut into words before is known by a name: llama.cpp has the cutting rules of well-known models and no
others. In the other, as SentencePiece has it, spaces are written as ▁ and merges are the tokens themselves, by
descending score; nothing is cut before. A tokenizer whose cutting rule has no name is written in that second way: its
tokens never reach over a cut, so that merging without cuts nearly always gives the same ones.
"""

import json

from transformers.convert_slow_tokenizer import bytes_to_unicode

from qpruner.errors import ModelError
from qpruner.model.load import TOKENIZER_FILES, Source, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
SPACE = "▁"
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id", "pad": "pad_token_id"}

# How text is cut into words, as tokenizer.json has it -> llama.cpp's name for it.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CUTS = {
    f"{_ENDINGS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    f"{_ENDINGS}|{_WORDS}|\\p{{N}}|{_REST}": "qwen2",
}
LETTERS = {letter: byte for byte, letter in bytes_to_unicode().items()}  # of the alphabet of bytes


def write_vocabulary(writer, source: Source, size: int) -> list[str]:
    """Add tokens, merges or scores, special tokens and chat template; what cannot be said is returned in sentences.

    Args:
        size: embeddings of the model; tokens that the tokenizer lacks are filled up.
    """
    if source.folder is None or not any((source.folder / file).is_file() for file in TOKENIZER_FILES):
        writer.add_tokenizer_model("no_vocab")
        return ["the model has no tokenizer, and so the file has none"]
    tokenizer = load_tokenizer(source)
    if not getattr(tokenizer, "backend_tokenizer", None):
        raise ModelError(f"the tokenizer of {source.name!r} has no tokenizer.json, which GGUF files are made from.")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = content["model"]["type"]
    if kind != "BPE":
        raise ModelError(f"the tokenizer of {source.name!r} is of type {kind!r}. Accepted: BPE.")
    vocabulary = dict(tokenizer.get_vocab())
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    for token, i in vocabulary.items():
        if i < size:
            tokens[i], types[i] = token, NORMAL
    for added in content["added_tokens"]:
        if added["id"] < size:
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    notes, ranks = [], {}
    for i, (first, second) in enumerate(_merges(content)):
        ranks.setdefault(first + second, i)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    if content["model"].get("byte_fallback"):
        _like_sentencepiece(writer, content, tokens, types, scores)
        prefix = _prepends(content.get("normalizer")) or _prepends(content.get("pre_tokenizer"))
        writer.add_add_space_prefix(prefix)
    elif (name := cut_name(content["pre_tokenizer"])) and ranks:  # llama.cpp refuses a list of no merges
        _in_bytes(writer, content, name)
    elif '"ByteLevel"' not in json.dumps(content["pre_tokenizer"]):
        raise ModelError(
            f"the tokenizer of {source.name!r} knows neither bytes nor a fallback to them, and llama.cpp has no way "
            "to read text like it. Accepted: byte-level BPE, and BPE with byte fallback."
        )
    else:
        _as_text(tokens, types)
        _like_sentencepiece(writer, content, tokens, types, scores)
        writer.add_add_space_prefix(False)
        notes.append(
            "llama.cpp has no name for the rule by which this tokenizer cuts text into words; the file has it merge "
            "tokens without cuts, so that some texts may become other tokens"
        )
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, attribute in SPECIAL.items():
        if (i := getattr(tokenizer, attribute, None)) is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    with_special, without = (tokenizer("a", add_special_tokens=s)["input_ids"] for s in (True, False))
    writer.add_add_bos_token(with_special[:1] == [tokenizer.bos_token_id] and with_special != without)
    writer.add_add_eos_token(with_special[-1:] == [tokenizer.eos_token_id] and with_special != without)
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(tokenizer.chat_template)
    return notes


def _in_bytes(writer, content: dict, name: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_merges([" ".join(pair) for pair in _merges(content)])


def _merges(content: dict) -> list[tuple[str, str]]:
    return [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in content["model"]["merges"]]


def cut_name(pre_tokenizer: dict | None) -> str | None:
    """llama.cpp's name for a cutting rule; None where it has none."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return CUTS.get(steps[0]["pattern"].get("Regex"))
    return None


def _as_text(tokens: list[str], types: list[int]) -> None:
    """Spelled as what they stand for instead of in the alphabet of bytes, in place; single bytes that are no character
    by their number."""
    for i, token in enumerate(tokens):
        if types[i] != NORMAL:
            continue
        data = bytes(LETTERS[letter] for letter in token)
        try:
            tokens[i] = data.decode().replace(" ", SPACE)
        except UnicodeDecodeError:
            # A piece of a character, if it is of several bytes, is never made of the bytes that stand for it.
            tokens[i], types[i] = (f"<0x{data[0]:02X}>", BYTE) if len(data) == 1 else (f"[PIECE{i}]", UNUSED)


def _like_sentencepiece(writer, content: dict, tokens: list[str], types: list[int], scores: list[float]) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores)
    for i, token in enumerate(tokens):
        if types[i] == NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = BYTE
    unknown = content["model"].get("unk_token")
    if unknown in tokens:
        types[tokens.index(unknown)] = UNKNOWN


def _prepends(step: dict | None) -> bool:
    """Whether a space is put in front of a text."""
    if not step:
        return False
    several = step.get("normalizers") or step.get("pretokenizers")
    if several:
        return any(map(_prepends, several))
    return step.get("prepend") == SPACE or step.get("prepend_scheme") in ("always", "first")
