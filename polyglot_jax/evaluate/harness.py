"""Our models in lm-evaluation-harness 0.4: `--model polyglot_jax --model_args path=runs/mine`.

The harness finds no models by itself, so this launcher registers ours and gives every argument to the harness's own
command line:

    python -m polyglot_jax.evaluate.harness run --model polyglot_jax --model_args path=runs/mine --tasks kobest

Needs lm-eval (requirements-harness.txt). Tokens, truncation and answers are those of its `hf` model.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from tqdm import tqdm

from polyglot_jax.config import InputError, MeshConfig, SampleConfig, from_plain
from polyglot_jax.evaluate.perplexity import windows
from polyglot_jax.language_model import load
from polyglot_jax.scoring import Pair
from polyglot_jax.sharding import make_mesh

_DTYPES = (None, "float32", "bfloat16", "float16")
_ROWS = 8
"""Prompts continued at a time where no batch size is given."""
_OTHER_NAMES = {"max_gen_toks": "max_new_tokens", "num_beams": "beams", "no_repeat_ngram_size": "no_repeat_ngram"}
"""What the harness's tasks call settings of ours."""


@register_model("polyglot_jax")
class HarnessModel(TemplateLM):
    """path: whatever `polyglot_jax.load` takes. dtype: as there. data, fsdp, tensor: sizes of the mesh's axes.

    batch_size: contexts at a time; "auto" or none: by their length. device and max_batch_size are the harness's and
    change nothing: JAX_PLATFORMS chooses the device.
    """

    def __init__(
        self,
        path: str,
        dtype: str | None = None,
        data: int = -1,
        fsdp: int = 1,
        tensor: int = 1,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if dtype not in _DTYPES:
            raise InputError(f"dtype={dtype}: must be one of {', '.join(_DTYPES[1:])}; none: by the device")
        is_given = batch_size is not None and not str(batch_size).startswith("auto")
        if is_given and not re.fullmatch(r"0*[1-9]\d{0,8}", str(batch_size), re.ASCII):
            raise InputError(f"batch_size={batch_size}: must be a whole number above 0, or auto")
        self._batch_size = int(batch_size) if is_given else None
        self._lm = load(path, make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor)), dtype)
        if self._lm.tokenizer is None:
            raise InputError(f"{path}: came without a tokenizer.json; put the model's own beside its weights")

    @property
    def eot_token_id(self) -> int:
        return self._lm.config.data.eos_id

    @property
    def max_length(self) -> int:
        return self._lm.config.model.context

    @property
    def max_gen_toks(self) -> int:
        return 256

    @property
    def tokenizer_name(self) -> str:
        return self._lm.tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        # As the `hf` model does: what the tokenizer puts around a text, unless it is told not to.
        return self._lm.tokenizer.encode(string, add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        pairs = [Pair(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(pairs), desc="scoring", disable=disable_tqdm) as progress:
            for batch in self._lm.scored(pairs, self._batch_size):
                for number, score, greedy in zip(*batch, strict=True):
                    answers[number] = float(score), bool(greedy)
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
                progress.update(len(batch.numbers))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        found = [
            list(windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, self.max_length))
            for request in requests
        ]
        flat = [(None, pair.context, pair.continuation) for pairs in found for pair in pairs]
        scores = iter(self._loglikelihood_tokens(flat, disable_tqdm))
        sums = [float(np.sum([next(scores)[0] for _ in pairs])) for pairs in found]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts: list[str] = []
        rows, batches = self._batch_size or _ROWS, []
        # Neighbours of equal settings: what is drawn depends on a request's place among all, not on its batch.
        for _, group in itertools.groupby(requests, lambda request: repr(request.args[1])):
            same = list(group)
            settings = self._settings(same[0].args[1])  # all are checked before the first text is made
            batches += [(same[start : start + rows], *settings) for start in range(0, len(same), rows)]
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm) as progress:
            for batch, sample, until in batches:
                room = self.max_length - sample.max_new_tokens
                prompts = [self.tok_encode(request.args[0])[-room:] for request in batch]
                made = self._lm.generate(prompts, stop=until, first=len(texts), **dataclasses.asdict(sample))
                for request, text in zip(batch, made, strict=True):
                    self.cache_hook.add_partial("generate_until", request.args, text)
                texts += made
                progress.update(len(batch))
        return texts

    def _settings(self, given: Mapping[str, Any]) -> tuple[SampleConfig, list[str]]:
        """How tokens are chosen and where a text stops, by a task's generation_kwargs; what is not named is as the
        harness has it, whatever the checkpoint says. InputError for what is not understood."""
        try:
            settings = normalize_gen_kwargs(given, self.max_gen_toks)
        except (TypeError, ValueError) as error:
            raise InputError(f"generation_kwargs={given}: not understood ({error})") from error
        until = settings.pop("until")
        if not all(isinstance(text, str) for text in until):
            raise InputError(f"until={given['until']!r}: must be a string or a list of strings")
        del settings["do_sample"]  # the temperature says it
        named = {_OTHER_NAMES.get(name, name): value for name, value in settings.items()}
        sample = from_plain(SampleConfig, named, "generation_kwargs")
        if sample.max_new_tokens >= self.max_length:
            raise InputError(f"max_gen_toks={sample.max_new_tokens}: must be less than model.context={self.max_length}")
        eos = self._lm.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        return sample, handle_stop_sequences(until, eos=eos)


def main() -> None:
    """The harness's own command line, which knows our model now."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
