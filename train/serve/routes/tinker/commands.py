"""Commands of Tinker's training API: read from requests and from the ledger, and answered."""

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
_SEGMENT = {
    "save_weights": "weights",
    "save_weights_for_sampler": "sampler_weights",
    "save_weights_external": "external_weights",
}
_MOST_COMPLETIONS = 1024


class TinkerCodec:
    """Reads commands from rows of the ledger, and writes the answers to them."""

    def __init__(self, facts: EngineFacts, root: Path) -> None:
        """Keeps the engine's limits, and the folder beneath which adapters are named."""
        self._facts, self._root = facts, root

    def read(self, row: Row) -> requests.Command:
        """Returns the command of a row, by its kind, payload, folder and target."""
        kind, folder = row["kind"], Path(row["folder"] or "")
        if kind == "forward_backward":
            return wire.gradient_of(wire.parse(row["payload"])[1], self._facts)
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
        return requests.Save(folder, kind == "save_weights", name, recipients_of(fields, kind))

    def write(self, row: Row, result: requests.CommandResult) -> bytes:
        """Returns the body that a client gets for a command's result."""
        kind, target = row["kind"], row["target"]
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
    """Returns the adapter that a create_model asks for."""
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
            "lora_config trains nothing: set train_attn, train_mlp or train_unembed"
        )
    return spec


def update_of(fields: JsonFields) -> requests.Update:
    """Returns the step that an optim_step asks for."""
    for name in ("optimizer_params", "optim_params"):
        _check_optimizer(fields, name)
    adam, usual = fields.object("adam_params"), requests.Update()
    below_one = float(np.nextafter(1.0, 0.0))
    return requests.Update(
        learning_rate=adam.get("learning_rate", float, usual.learning_rate, 0),
        beta1=adam.get("beta1", float, usual.beta1, 0, below_one),
        beta2=adam.get("beta2", float, usual.beta2, 0, below_one),
        eps=adam.get("eps", float, usual.eps, 0),
        weight_decay=adam.get("weight_decay", float, usual.weight_decay, 0),
        grad_clip_norm=max(0.0, adam.get("grad_clip_norm", float, usual.grad_clip_norm)),
    )


def check_numbers(fields: JsonFields, *names: str) -> None:
    """Raises a RequestError for a number that is null, as JSON writes NaN and infinities.

    Commands that were taken in before are executed again as they were then: so this is a check of
    what comes, and none of what the ledger has.
    """
    for name in names:
        if name in fields.values and fields.values[name] is None:
            raise requests.RequestError(
                f"{name} is null, which JSON writes for NaN and infinities: give a finite number, "
                "or leave it out"
            )


def _check_optimizer(fields: JsonFields, name: str) -> None:
    kind = fields.object(name, {}).get("type", str, "adamw")
    if kind != "adamw":
        raise requests.RequestError(f"the optimizer {kind[:40]!r} is not offered; there is adamw")


def path_of(fields: JsonFields, kind: str, model: str, seq: int) -> str:
    """Returns the tinker:// path that a save makes; its name cannot leave its folder."""
    name = fields.get("path", str, f"{seq:06d}")
    if not _NAME.fullmatch(name):
        raise requests.RequestError(
            f"{name[:140]!r} is no name of a checkpoint: take 128 letters, digits and _ . = + - at "
            "most, the first a letter, a digit or _"
        )
    fields.get("ttl_seconds", int, None, least=1, most=10 * 366 * 86400)
    fields.metadata()
    return f"tinker://{model}/{_SEGMENT[kind]}/{name}"


def recipients_of(fields: JsonFields, kind: str) -> tuple[str, ...]:
    """Returns the public keys for which an export is encrypted.

    Raises:
      RequestError: it is no export, or one is no key.
    """
    given = fields.get("age_encryption_recipients", list, None) or []
    if given and kind != "save_weights_external":
        raise requests.RequestError("age_encryption_recipients are for save_weights_external alone")
    return check_recipients(given)


def _targets(fields: JsonFields) -> Message | None:
    """Returns the tensor of tokens to score at each place of a prompt, as a message, or None.

    Raises:
      RequestError: It is none of int64, -1 for none.
    """
    name = "target_prompt_logprobs"
    if fields.get(name, dict, None) is None:
        return None
    given = fields.object(name)

    def integers(part: str) -> np.ndarray:
        values = given.get(part, list)
        if not all(type(value) is int and -1 <= value < 2**31 for value in values):
            raise requests.RequestError(
                f"{part} of {name} holds what is neither an id nor an index"
            )
        return np.array(values, "<i8")

    if (kind := given.get("dtype", str)) != "int64":
        raise requests.RequestError(f"{name} are {kind[:40]!r}; they are to be int64")
    tensor = Tensor(dtype=wire.I64, shape=integers("shape").tolist())
    if given.get("sparse_crow_indices", list, None) is None:
        tensor.dense = integers("data").tobytes()
    else:
        tensor.sparse_csr.values = integers("data").tobytes()
        tensor.sparse_csr.crow_indices = integers("sparse_crow_indices").tobytes()
        tensor.sparse_csr.col_indices = integers("sparse_col_indices").tobytes()
    return tensor


def sample_of(
    fields: JsonFields, facts: EngineFacts, adapter: str | None
) -> tuple[requests.SampleRequest, Callable[[requests.SampleResult], bytes]]:
    """Returns the sample that an asample asks for, and a function that encodes its result.

    Raises:
      RequestError: It has a chunk that is no text, or asks for what is not offered.
    """
    if fields.get("prompt_alt_tokens_k", int, 0):
        raise requests.RequestError(
            "prompt_alt_tokens_k is not offered; there are prompt_logprobs, topk_prompt_logprobs "
            "and target_prompt_logprobs"
        )
    if fields.get("record_stability_info", bool, False):
        raise requests.RequestError(
            "record_stability_info is not offered, nor is the loss stable_reinforce: choose "
            "another, such as importance_sampling"
        )
    chunks = []
    for chunk in fields.object("prompt").get("chunks", list):
        piece = JsonFields(chunk, "a chunk of the prompt")
        if (kind := piece.get("type", str, "encoded_text")) != "encoded_text":
            raise requests.RequestError(
                f"a chunk of the prompt is {kind[:40]!r}; there is encoded_text"
            )
        chunks.append(piece.get("tokens", list))
    prompt = wire.tokens_of(chunks, facts, "the prompt")
    params = fields.object("sampling_params", {})
    check_numbers(params, "temperature", "top_p")
    room = facts.max_length - len(prompt)
    stop_ids, stop = _stops(params, facts)
    top_k = params.get("top_k", int, -1, least=-1)
    last = fields.get("prompt_logprobs_last_n", int, None, least=1, most=max(1, len(prompt) - 1))
    targets = _targets(fields)
    sample = requests.SampleRequest(
        adapter=adapter,
        prompt=prompt.tolist(),
        n=fields.get("num_samples", int, 1, least=1, most=_MOST_COMPLETIONS),
        max_tokens=min(room, params.get("max_tokens", int, room, least=0)),
        temperature=params.get("temperature", float, 1.0, least=0),
        top_k=top_k if top_k > 0 else -1,
        top_p=params.get("top_p", float, 1.0, least=1e-9, most=1),
        seed=params.get("seed", int, None),
        stop_ids=stop_ids,
        stop=stop,
        prompt_logprobs=fields.get("prompt_logprobs", bool, False) or last is not None,
        top_prompt=fields.get("topk_prompt_logprobs", int, 0, least=0, most=requests.TOP),
        top=fields.get("topk_sample_logprobs", int, 0, least=0, most=requests.TOP),
        targets=None if targets is None else wire.target_ids(targets),
    )
    return sample, partial(wire.encode_samples, last=last, targets=targets)


def _stops(params: JsonFields, facts: EngineFacts) -> tuple[frozenset[int], tuple[str, ...]]:
    """Returns the tokens and the texts that end a completion.

    The end of a text is among them, unless the client gives an empty list.
    """
    given = params.values.get("stop")
    if given is None:
        return frozenset(facts.eos), ()
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or len(given) > 64:
        raise requests.RequestError("stop is to be a text, or a list of 64 texts or tokens at most")
    if all(isinstance(entry, str) and _TEXT.fullmatch(entry) for entry in given):
        return frozenset(facts.eos if given else ()), tuple(given)
    if all(type(entry) is int and 0 <= entry < facts.vocab_size for entry in given):
        return frozenset([*facts.eos, *given]), ()
    raise requests.RequestError("stop has an entry that is neither a text nor a token")
