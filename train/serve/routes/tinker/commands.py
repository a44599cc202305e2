"""Reads the commands of Tinker's training API, and writes the answers to them."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from train.serve.protocol import requests
from train.serve.protocol.encryption import check_recipients
from train.serve.protocol.engine import EngineFacts
from train.serve.routes.tinker import wire
from train.serve.routes.tinker.bodies import JsonFields
from train.serve.routes.tinker.messages import Message, Tensor
from train.serve.storage.folders import adapter_name
from train.serve.storage.ledger import DISCARD, Row

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,127}")
_TEXT = re.compile(r"[^\ud800-\udfff]{1,1024}", re.DOTALL)  # what UTF-8 can say
_SEGMENT_OF_KIND = {  # of a checkpoint's path
    "save_weights": "weights",
    "save_weights_for_sampler": "sampler_weights",
    "save_weights_external": "external_weights",
}
_MAX_COMPLETIONS = 1024
_MAX_STOPS = 64


class TinkerCodec:
    """Reads commands from rows of the ledger, and encodes the answers to them."""

    def __init__(self, facts: EngineFacts, root: Path) -> None:
        """Stores the engine's limits, and the root folder of adapter names."""
        self._facts = facts
        self._root = root

    def read(self, row: Row) -> requests.Command:
        """Returns the command of a row of the ledger."""
        kind = row["kind"]
        folder = Path(row["folder"] or "")
        if kind == "forward_backward":
            _, message = wire.parse(row["payload"])
            return wire.gradient_of(message, self._facts)
        if kind == DISCARD:
            return requests.Discard()
        fields = JsonFields.parse(row["payload"])
        if kind == "create_model":
            return requests.Create(spec_of(fields, self._facts))
        if kind == "optim_step":
            return update_of(fields)
        if kind == "load_weights":
            return requests.Load(folder, fields.get("optimizer", bool, False))
        is_snapshot = not row["target"].startswith("tinker://")
        name = adapter_name(folder, self._root) if is_snapshot else None
        return requests.Save(
            path=folder,
            optimizer=kind == "save_weights",
            name=name,
            recipients=recipients_of(fields, kind),
        )

    def write(self, row: Row, result: requests.CommandResult) -> bytes:
        """Returns the body that answers a command with its result."""
        kind = row["kind"]
        target = row["target"]
        if isinstance(result, requests.GradientResult):
            return wire.encode_gradient(result)
        answer: dict[str, object] = {"type": kind}
        if kind == "create_model":
            answer["model_id"] = row["model"]
        elif isinstance(result, requests.UpdateResult):
            answer["metrics"] = dict(result.metrics)
        elif kind == "load_weights":
            answer |= {"model_id": row["model"], "path": json.loads(row["payload"])["path"]}
        elif isinstance(result, requests.SaveResult) and target.startswith("tinker://"):
            answer |= {"path": target, "size_bytes": result.size}
        else:
            answer["sampling_session_id"] = target
        return json.dumps(answer).encode()


def spec_of(fields: JsonFields, facts: EngineFacts) -> requests.AdapterSpec:
    """Returns the adapter that a create_model request describes."""
    _check_optimizer(fields, "optimizer_config")
    lora = fields.object("lora_config")
    spec = requests.AdapterSpec(
        rank=lora.get("rank", int, least=1, most=facts.max_rank),
        seed=lora.get("seed", int, None),
        attention=lora.get("train_attn", bool, True),
        mlp=lora.get("train_mlp", bool, True),
        unembed=lora.get("train_unembed", bool, True),
    )
    if not (spec.attention or spec.mlp or spec.unembed):
        raise requests.RequestError(
            "lora_config selects no weights to train. Set train_attn, train_mlp or train_unembed "
            "to true."
        )
    return spec


def update_of(fields: JsonFields) -> requests.Update:
    """Returns the AdamW step that an optim_step request describes."""
    for name in ("optimizer_params", "optim_params"):
        _check_optimizer(fields, name)
    adam = fields.object("adam_params")
    defaults = requests.Update()
    max_beta = float(np.nextafter(1.0, 0.0))  # the largest number below 1
    return requests.Update(
        learning_rate=adam.get("learning_rate", float, defaults.learning_rate, least=0),
        beta1=adam.get("beta1", float, defaults.beta1, least=0, most=max_beta),
        beta2=adam.get("beta2", float, defaults.beta2, least=0, most=max_beta),
        eps=adam.get("eps", float, defaults.eps, least=0),
        weight_decay=adam.get("weight_decay", float, defaults.weight_decay, least=0),
        grad_clip_norm=max(0.0, adam.get("grad_clip_norm", float, defaults.grad_clip_norm)),
    )


def check_numbers(fields: JsonFields, *names: str) -> None:
    """Raises a RequestError for a null number, which JSON clients send for NaN and infinities.

    Commands that were taken in before are executed again as they were then: so this is a check of
    what comes, and none of what the ledger has.
    """
    for name in names:
        if name in fields.values and fields.values[name] is None:
            raise requests.RequestError(
                f"{name} is null, which JSON writes for NaN and infinities. Pass a finite number, "
                f"or remove {name}."
            )


def _check_optimizer(fields: JsonFields, name: str) -> None:
    """Raises a RequestError if a field names an optimizer other than AdamW."""
    kind = fields.object(name, {}).get("type", str, "adamw")
    if kind != "adamw":
        raise requests.RequestError(f"the optimizer {kind[:40]!r} is not supported. Use adamw.")


def path_of(fields: JsonFields, kind: str, model: str, seq: int) -> str:
    """Returns the tinker:// path of a save, after checking its name."""
    name = fields.get("path", str, f"{seq:06d}")
    if not _NAME.fullmatch(name):
        raise requests.RequestError(
            f"{name[:140]!r} is not a valid name of a checkpoint. Use at most 128 letters, digits "
            "and _ . = + -, and begin with a letter, a digit or _."
        )
    fields.get("ttl_seconds", int, None, least=1, most=10 * 366 * 86400)
    fields.metadata()
    return f"tinker://{model}/{_SEGMENT_OF_KIND[kind]}/{name}"


def recipients_of(fields: JsonFields, kind: str) -> tuple[str, ...]:
    """Returns the public keys that may decrypt an export.

    Raises:
      RequestError: it is no export, or one is no key.
    """
    recipients = fields.get("age_encryption_recipients", list, None) or []
    if recipients and kind != "save_weights_external":
        raise requests.RequestError(
            "age_encryption_recipients only work with save_weights_external. Remove them, or call "
            "save_weights_external."
        )
    return check_recipients(recipients)


def _read_targets(fields: JsonFields) -> Message | None:
    """Returns the message with the tokens to score at each place of a prompt, or None.

    Raises:
      RequestError: It is none of int64, -1 for none.
    """
    name = "target_prompt_logprobs"
    if fields.get(name, dict, None) is None:
        return None
    tensor_fields = fields.object(name)

    def read_integers(key: str) -> np.ndarray:
        """Returns a list field of integers as an array; raises a RequestError for other values."""
        values = tensor_fields.get(key, list)
        if not all(type(value) is int and -1 <= value < 2**31 for value in values):
            raise requests.RequestError(
                f"{key} of {name} holds a value that is neither an id nor an index. Pass integers."
            )
        return np.array(values, "<i8")

    dtype = tensor_fields.get("dtype", str)
    if dtype != "int64":
        raise requests.RequestError(f"{name} has the dtype {dtype[:40]!r}. Pass int64.")
    tensor = Tensor(dtype=wire.I64, shape=read_integers("shape").tolist())
    is_sparse = tensor_fields.get("sparse_crow_indices", list, None) is not None
    if is_sparse:
        tensor.sparse_csr.values = read_integers("data").tobytes()
        tensor.sparse_csr.crow_indices = read_integers("sparse_crow_indices").tobytes()
        tensor.sparse_csr.col_indices = read_integers("sparse_col_indices").tobytes()
    else:
        tensor.dense = read_integers("data").tobytes()
    return tensor


def sample_of(
    fields: JsonFields, facts: EngineFacts, adapter: str | None
) -> tuple[requests.SampleRequest, Callable[[requests.SampleResult], bytes]]:
    """Returns the sample that an asample request describes, and an encoder of its result.

    Raises:
      RequestError: It has a chunk that is no text, or asks for what is not offered.
    """
    if fields.get("prompt_alt_tokens_k", int, 0):
        raise requests.RequestError(
            "prompt_alt_tokens_k is not supported. Use prompt_logprobs, topk_prompt_logprobs or "
            "target_prompt_logprobs."
        )
    if fields.get("record_stability_info", bool, False):
        raise requests.RequestError(
            "record_stability_info and the loss stable_reinforce are not supported. Choose another "
            "loss, such as importance_sampling."
        )
    prompt = wire.tokens_of(_read_chunks(fields), facts, "the prompt")
    params = fields.object("sampling_params", {})
    check_numbers(params, "temperature", "top_p")
    max_tokens = facts.max_length - len(prompt)
    stop_ids, stop_texts = _read_stops(params, facts)
    top_k = params.get("top_k", int, -1, least=-1)
    max_scored = max(1, len(prompt) - 1)
    n_scored = fields.get("prompt_logprobs_last_n", int, None, least=1, most=max_scored)
    targets = _read_targets(fields)
    sample = requests.SampleRequest(
        adapter=adapter,
        prompt=prompt.tolist(),
        n=fields.get("num_samples", int, 1, least=1, most=_MAX_COMPLETIONS),
        max_tokens=min(max_tokens, params.get("max_tokens", int, max_tokens, least=0)),
        temperature=params.get("temperature", float, 1.0, least=0),
        top_k=top_k if top_k > 0 else -1,
        top_p=params.get("top_p", float, 1.0, least=1e-9, most=1),
        seed=params.get("seed", int, None),
        stop_ids=stop_ids,
        stop=stop_texts,
        prompt_logprobs=fields.get("prompt_logprobs", bool, False) or n_scored is not None,
        top_prompt=fields.get("topk_prompt_logprobs", int, 0, least=0, most=requests.TOP),
        top=fields.get("topk_sample_logprobs", int, 0, least=0, most=requests.TOP),
        targets=None if targets is None else wire.target_ids(targets),
    )
    return sample, partial(wire.encode_samples, n_scored=n_scored, targets=targets)


def _read_chunks(fields: JsonFields) -> list[list]:
    """Returns the tokens of each chunk of a prompt; raises a RequestError if one is not text."""
    chunks: list[list] = []
    for chunk in fields.object("prompt").get("chunks", list):
        chunk_fields = JsonFields(chunk, "a chunk of the prompt")
        kind = chunk_fields.get("type", str, "encoded_text")
        if kind != "encoded_text":
            raise requests.RequestError(
                f"a chunk of the prompt has the type {kind[:40]!r}. Pass chunks of the type "
                "encoded_text."
            )
        chunks.append(chunk_fields.get("tokens", list))
    return chunks


def _read_stops(params: JsonFields, facts: EngineFacts) -> tuple[frozenset[int], tuple[str, ...]]:
    """Returns the stop tokens and the stop texts of a completion.

    The end of a text is among them, unless the client gives an empty list.
    """
    value = params.values.get("stop")
    if value is None:
        return frozenset(facts.eos), ()
    if value == []:
        return frozenset(), ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _MAX_STOPS:
        raise requests.RequestError(
            "stop has the wrong type, or too many entries. Pass a text, or a list of at most 64 "
            "texts or tokens."
        )
    are_texts = all(isinstance(stop, str) and _TEXT.fullmatch(stop) for stop in stops)
    if are_texts:
        return frozenset(facts.eos), tuple(stops)
    are_tokens = all(type(stop) is int and 0 <= stop < facts.vocab_size for stop in stops)
    if are_tokens:
        return frozenset([*facts.eos, *stops]), ()
    raise requests.RequestError(
        "stop has an entry that is neither a text nor a token. Pass texts or token ids."
    )
