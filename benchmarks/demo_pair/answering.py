"""Ask the model: build `<picture or text> cue :` and read the next token.

Training works on embeddings, so that banked pictures and the frozen parts cost nothing; the
result is that of the public forward pass on the same tokens.
"""

import torch
from torch import nn

LONGEST = 44


class Asker:
    """Computes logits at the answer's position from banked features or token lists and a cue."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.colon = tokenizer.convert_tokens_to_ids(":")

    def word(self, text: str) -> int:
        """Return the id of a word that must be a single entry of the vocabulary."""
        number = self.tokenizer.convert_tokens_to_ids(text)
        if number == self.tokenizer.unk_token_id:
            raise ValueError(f"'{text}' is not one token of the vocabulary")
        return number

    def tokens(self, texts):
        return [self.tokenizer(t, add_special_tokens=False).input_ids[:LONGEST] for t in texts]

    def _run(self, embeds, mask=None):
        language = self.model.model.language_model
        hidden = language(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        return hidden.last_hidden_state

    def pictures(self, features, cue: str):
        """Return logits [batch, vocabulary] for `<image> cue :`."""
        seen = self.model.model.multi_modal_projector(features)
        end = torch.tensor([self.word(cue), self.colon])
        end = self.model.get_input_embeddings()(end).expand(len(features), -1, -1)
        return self.model.lm_head(self._run(torch.cat([seen, end], 1))[:, -1])

    def texts(self, tokens, cue: str, drop: float = 0.0, generator=None):
        """Return logits for `text cue :`; `drop` replaces that share of words by unknown."""
        ids, mask = self._pad([[*row, self.word(cue), self.colon] for row in tokens])
        if drop:
            gone = torch.rand(ids.shape, generator=generator) < drop
            gone[:, -2:] = False
            ids = ids.masked_fill(gone & (mask > 0), self.tokenizer.unk_token_id)
        hidden = self._run(self.model.get_input_embeddings()(ids), mask)
        return self.model.lm_head(hidden[:, -1])

    def reading_loss(self, tokens):
        """Return the next-token loss on plain text."""
        ids, mask = self._pad([[*row, self.tokenizer.eos_token_id] for row in tokens])
        hidden = self._run(self.model.get_input_embeddings()(ids), mask)[:, :-1]
        wanted = ids[:, 1:][mask[:, :-1] > 0]
        return nn.functional.cross_entropy(self.model.lm_head(hidden[mask[:, :-1] > 0]), wanted)

    def _pad(self, rows):
        width = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return ids, (torch.arange(width) >= width - lengths[:, None]).long()
