"""Text from a model or an artifact in the terminal, token by token."""

from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from qpruner.errors import CorpusError, ModelError
from qpruner.model.load import inspect_source, load_model, load_tokenizer, quiet

Write = Callable[[str], None]


class Speaker:
    """A model that goes on with texts, or answers where its tokenizer knows how a conversation is written. Final.

    Takes the likeliest token each time, or, with a seed, draws from what the model predicts.
    """

    def __init__(self, model: str, *, seed: int | None = None, trust_remote_code: bool = False):
        source = inspect_source(model, trust_remote_code=trust_remote_code)
        self.tokenizer, self.context = load_tokenizer(source), source.context_length
        self.model = load_model(source, fast_dtype())
        if torch.cuda.is_available():
            self.model.cuda()
        if not self.model.can_generate():
            raise ModelError(f"{source.name!r} is no model that generates text.")
        self.seed, self.said = seed, []

    @property
    def converses(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def say(self, text: str, write: Write, *, max_new_tokens: int) -> str:
        """What the model makes of a text; every piece of it goes to `write` as soon as it is known.

        In a conversation, what was said before belongs to it.

        Raises:
            CorpusError: the text leaves no room in the model's context.
        """
        ids = self._ids(text)
        room = None if self.context is None else self.context - ids.shape[1]
        if not ids.shape[1] or (room is not None and room < 1):
            raise CorpusError(
                f"the text has {ids.shape[1]} tokens, and this model takes 1 to {(self.context or 0) - 1:,} before it "
                "goes on. Give another one."
            )
        streamer, pieces = Pieces(self.tokenizer, write), []
        streamer.also = pieces.append
        pad = self.tokenizer.pad_token_id
        options = dict(
            max_new_tokens=min(max_new_tokens, room or max_new_tokens), do_sample=self.seed is not None,
            attention_mask=torch.ones_like(ids), streamer=streamer,
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
        )  # fmt: skip
        with quiet(), torch.random.fork_rng(enabled=self.seed is not None), torch.inference_mode():
            if self.seed is not None:
                torch.manual_seed(self.seed)
            self.model.generate(ids, **options)
        answer = "".join(pieces)
        self.said += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return answer

    def _ids(self, text: str) -> torch.Tensor:
        if self.converses:
            turns = [*self.said, {"role": "user", "content": text}]
            written = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            found = self.tokenizer(written, add_special_tokens=False, return_tensors="pt")
        else:
            found = self.tokenizer(text, return_tensors="pt")
        return found["input_ids"].long().to(self.model.device)


class Pieces(TextStreamer):
    """Hands on what is certain of a text that is being written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write: Write = write
        self.also: Write = lambda text: None

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)
        self.also(text)


def fast_dtype() -> torch.dtype:
    """bfloat16 on a GPU, and on a CPU that multiplies in it; float32 on others."""
    if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32
