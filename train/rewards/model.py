"""Rewards by a model that `train.classify --labels pairs` trained."""

import sys

import jax
import numpy as np

from lora_jax.training.data.comparisons import as_text, encode
from lora_jax.training.data.rows import question
from train.adapters.source import find_adapter
from train.console.errors import UserError, as_user_errors
from train.predict.batches import probabilities
from train.predict.classifier import Classifier
from train.predict.texts import TokenizedTexts
from train.rewards.reward import RewardBatch, RewardValues
from train.run.classifiers import read_classifier_info

_BATCH_SIZE = 32  # completions in memory at once


class RewardModel:
    """Judges a completion by a model's score of it after its prompt, in this process."""

    def __init__(self, folder: str) -> None:
        """Reads the model that a run left in a folder, over the base that it names.

        Raises:
          UserError: there is none, or its base cannot be read.
        """
        source = find_adapter(folder, "--reward")
        if source.num_labels != 1:
            raise UserError(
                f"{source.given} holds no reward model: name the folder of a run of "
                "`train.classify --labels pairs`"
            )
        tokenizer = source.find_tokenizer("copy it there, or train the reward model again")
        with as_user_errors(UserError, prefix=f"{source.given}: its base cannot be read: "):
            base = source.about.get("model", "")
            outline = read_classifier_info(base, 1, tokenizer=tokenizer)
        outline = outline.quantized(source.quantize)
        source.check(outline)
        self._apply, self._params = Classifier(outline, source, ()).load()
        self._given, self._tokenizer = source.given, outline.tokenizer
        self._most: int = source.about.get("seq_len", outline.max_tokens)
        self._has_said = False

    def __call__(self, batch: RewardBatch) -> RewardValues:
        """Returns the scores; says once that texts are shortened."""
        prompts = [as_text(question({"prompt": text}, "a row").messages) for text in batch.prompts]
        texts = list(zip(prompts, batch.completions, strict=True))
        encoded, n_shortened = encode(texts, self._tokenizer, self._most)
        if n_shortened and not self._has_said:
            self._has_said = True
            print(
                f"{self._given} reads {self._most} tokens: {n_shortened} of {len(texts)} prompts "
                "lose their beginning, and so do later ones",
                file=sys.stderr,
            )
        ids, types = ([np.array(text, np.int32) for text in each] for each in encoded.values())
        tokens = TokenizedTexts(ids, types, self._most, self._tokenizer.pad_token_id or 0)
        scores = probabilities(
            self._apply, self._params, tokens, batch_size=_BATCH_SIZE, of=jax.nn.identity
        )
        return RewardValues(scores[:, 0])
