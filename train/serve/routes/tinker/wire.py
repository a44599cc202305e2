"""Converts Tinker's protobuf bodies to the engine's requests, and results to bodies."""

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np
import zstandard
from google.protobuf.message import DecodeError

from train.serve.protocol.engine import EngineFacts
from train.serve.protocol.requests import (
    LOSSES,
    Datum,
    Gradient,
    GradientResult,
    RequestError,
    SampleResult,
    Top,
)
from train.serve.routes.tinker.messages import (
    ForwardBackwardOutput,
    ForwardBackwardRequest,
    Message,
    SampleResponse,
)

MOST_BYTES = 64 * 2**20  # of a body, and of the arrays that it stands for
MOST_UNPACKED = 4  # compressed bodies in memory at the same time, each with up to MOST_BYTES
_UNPACKING = threading.BoundedSemaphore(MOST_UNPACKED)
# The types of tensors by their numbers on the wire; bf16 is read as its bits.
_TYPES: dict[int, np.dtype] = {
    1: np.dtype("<f4"),
    2: np.dtype("<i8"),
    3: np.dtype("<i4"),
    4: np.dtype("<u2"),
}
_F32 = 1
I64 = 2
_I32 = 3
_BF16 = 4
_CLIP_BOUNDS = ("clip_low_threshold", "clip_high_threshold")
_CONFIG_NAMES = {
    "ppo": _CLIP_BOUNDS,
    "cispo": _CLIP_BOUNDS,
    "gspo": _CLIP_BOUNDS,
    "dro": ("beta",),
}
# Reasons why a completion ended.
_STOP = 0
_LENGTH = 1


def _decompress(body: bytes, encoding: str) -> bytes:
    """Returns the content of a body; raises a RequestError for an unknown encoding."""
    if encoding in ("", "identity"):
        return body
    if encoding != "zstd":
        raise RequestError(f"Content-Encoding {encoding[:40]!r} is not supported. Use zstd.")
    try:
        content = _unpack(body)
    except (zstandard.ZstdError, MemoryError) as error:
        raise RequestError(
            f"the body is not valid zstd ({error}). Compress the body with zstd, or remove "
            "Content-Encoding."
        ) from error
    if content is None:
        raise RequestError(f"the body has more than {MOST_BYTES} bytes. Send fewer data at once.")
    return content


def _unpack(body: bytes) -> bytes | None:
    """Returns the content of a zstd frame, or None if it has more than `MOST_BYTES`.

    An oversized content is freed here: the traceback of an error would hold it longer.
    """
    if zstandard.frame_content_size(body) > MOST_BYTES:
        return None
    with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(body) as reader:
        content = reader.read(MOST_BYTES + 1)
    return content if len(content) <= MOST_BYTES else None


@contextlib.contextmanager
def unpacking_turn(encoding: str) -> Iterator[None]:
    """Waits until fewer than `MOST_UNPACKED` compressed bodies are in memory.

    A body that is not compressed does not wait.

    Args:
      encoding: the Content-Encoding of the body.
    """
    if encoding in ("", "identity"):
        yield
        return
    with _UNPACKING:
        yield


def parse(body: bytes, encoding: str = "") -> tuple[bytes, Message]:
    """Returns the body of a forward_backward without its Content-Encoding, and its message.

    Raises:
      RequestError: It is garbage, has an unknown encoding, or more than `MOST_BYTES`.
    """
    body = _decompress(body, encoding)
    try:
        return body, ForwardBackwardRequest.FromString(body)
    except (DecodeError, UnicodeDecodeError) as error:
        raise RequestError(
            "the body is not a ForwardBackwardRequest in protobuf. Check the version of the client."
        ) from error


def gradient_of(message: Message, facts: EngineFacts) -> Gradient:
    """Returns the engine's command for a forward_backward message.

    Raises:
      RequestError: A loss, an input, a shape or a token that there is not.
    """
    loss = message.loss_fn
    if loss not in LOSSES:
        raise RequestError(f"loss_fn {loss[:40]!r} is unknown. Use one of {', '.join(LOSSES)}.")
    if not message.data:
        raise RequestError("data is empty. Send at least one datum.")
    budget = _ByteBudget()
    data = [
        _read_datum(datum, f"datum {i}", loss, facts, budget)
        for i, datum in enumerate(message.data)
    ]
    return Gradient(
        data=data,
        loss=loss,
        config=_read_config(message, loss),
        forward_only=message.forward_only,
    )


def tokens_of(
    chunks: Sequence[bytes | Sequence[int]], facts: EngineFacts, label: str
) -> np.ndarray:
    """Returns the tokens of all chunks of a text, [n] int32.

    Raises:
      RequestError: None, too many, or ids that the vocabulary has not.
    """
    chunk_ids = [_read_ids(chunk, label) for chunk in chunks]
    tokens = np.concatenate([np.zeros(0, np.int64), *chunk_ids])
    if not 1 <= len(tokens) <= facts.max_length:
        raise RequestError(
            f"{label} has {len(tokens)} tokens. Send sequences of 1 to {facts.max_length} tokens."
        )
    return _check_ids(tokens, facts, label)


def encode_gradient(result: GradientResult) -> bytes:
    """Returns the body for the result of a `Gradient`."""
    message = ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    # Consecutive data with as many targets a token are one record.
    for trailing_shape, group in groupby(result.logprobs, key=lambda logps: logps.shape[1:]):
        arrays = [np.ascontiguousarray(logps, "<f4") for logps in group]
        sizes = [array.nbytes for array in arrays]
        record = message.loss_fn_outputs.add(num_datums=len(arrays))
        field = record.fields["logprobs"]
        field.data = b"".join(array.tobytes() for array in arrays)
        field.offsets = np.cumsum([0, *sizes]).astype("<i8").tobytes()
        field.dtype = _F32
        field.trailing_shape.extend(trailing_shape)
    for name, value in result.metrics.items():
        message.metrics[name] = value
    return message.SerializeToString()


def target_ids(message: Message) -> np.ndarray:
    """Returns the token ids in a tensor, int32 [prompt - 1, k], with -1 for missing ones.

    Raises:
      RequestError: It is no tensor.
    """
    tensor = _read_tensor(message, "target_prompt_logprobs", _ByteBudget(), fill=-1)
    return tensor.astype(np.int32)


def encode_samples(
    result: SampleResult, n_scored: int | None = None, targets: Message = None
) -> bytes:
    """Returns the body for the completions of a sample.

    Args:
      result: the completions.
      n_scored: how many of the prompt's last tokens were to be scored; None for all.
      targets: the tensor of tokens that were to be scored, too, whose layout their scores get.
    """
    message = SampleResponse(prompt_cache_hit_tokens=result.cached)
    for completion in result.completions:
        sequence = message.sequences.add(
            stop_reason=_STOP if completion.stopped else _LENGTH,
            tokens=completion.tokens.astype("<i4").tobytes(),
            logprobs=completion.logprobs.astype("<f4").tobytes(),
        )
        if completion.top is not None:
            _write_top(sequence.topk_sampled_logprobs, completion.top)
    unscored = slice(0 if n_scored is None else -n_scored)
    if result.prompt_logprobs is not None:
        prompt_logprobs = result.prompt_logprobs.astype("<f4")
        prompt_logprobs[unscored] = np.nan
        message.prompt_logprobs = prompt_logprobs.tobytes()
    if result.top_prompt is not None:
        top = Top(result.top_prompt.ids.copy(), result.top_prompt.logprobs.copy())
        top.ids[unscored] = 0
        top.logprobs[unscored] = -99999.0
        _write_top(message.topk_prompt_logprobs, top)
    if result.targets is not None:
        message.target_prompt_logprobs.CopyFrom(targets)
        _write_scores(message.target_prompt_logprobs, result.targets.astype("<f4"))
    return message.SerializeToString()


def _write_scores(tensor: Message, scores: np.ndarray) -> None:
    """Replaces the token ids in a tensor by their scores, in the same layout."""
    tensor.dtype = _F32
    if tensor.HasField("sparse_csr"):
        row_offsets = np.frombuffer(tensor.sparse_csr.crow_indices, "<i8")
        columns = np.frombuffer(tensor.sparse_csr.col_indices, "<i8")
        tensor.sparse_csr.values = scores[_csr_indices(row_offsets, columns)].tobytes()
    else:
        tensor.dense = scores.tobytes()


def _write_top(message: Message, top: Top) -> None:
    """Writes the most likely tokens at each place into a message."""
    message.length, message.k = top.ids.shape
    message.token_ids = top.ids.astype("<i4").tobytes()
    message.logprobs = top.logprobs.astype("<f4").tobytes()


def _read_config(message: Message, loss: str) -> Mapping[str, float]:
    """Returns the numbers that configure a loss."""
    known_names = _CONFIG_NAMES.get(loss, ())
    config = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        if not value.HasField("number"):
            raise RequestError(f"loss_fn_config {name[:40]!r} is not a number. Pass a number.")
        config[name] = value.number
    for name, number in config.items():
        if name not in known_names:
            names = (
                f"Use {', '.join(known_names)}." if known_names else "This loss has no settings."
            )
            raise RequestError(f"loss_fn_config {name[:40]!r} is unknown to {loss}. {names}")
        if not math.isfinite(number):
            raise RequestError(f"loss_fn_config {name!r} is {number}. Pass a finite number.")
    return config


class _ByteBudget:
    """Limits the total bytes of a request's arrays, because sparse ones may expand a lot."""

    def __init__(self) -> None:
        self._bytes_left = MOST_BYTES

    def take(self, n_elements: int, label: str) -> None:
        """Counts the bytes of an array; raises a RequestError if the limit is exceeded."""
        self._bytes_left -= 8 * n_elements
        if self._bytes_left < 0:
            raise RequestError(
                f"With {label}, all arrays together have more than {MOST_BYTES} bytes. Send fewer "
                "data at once."
            )


def _read_datum(
    message: Message, label: str, loss: str, facts: EngineFacts, budget: _ByteBudget
) -> Datum:
    """Returns a datum with the inputs of its loss."""
    if not all(chunk.HasField("encoded_text") for chunk in message.model_input):
        raise RequestError(
            f"{label} has a chunk that is not text. Pass only chunks of encoded_text."
        )
    chunks = [chunk.encoded_text.tokens for chunk in message.model_input]
    tokens = tokens_of(chunks, facts, label)
    tensors = message.loss_fn_inputs
    bounds = sorted(set(_CLIP_BOUNDS) & set(tensors))
    if bounds:
        raise RequestError(
            f"{label} has the tensor {bounds[0]}. Pass it as a number in loss_fn_config."
        )
    names = ("target_tokens", *LOSSES[loss])
    for name in names:
        if name not in tensors and name != "weights":
            raise RequestError(f"{label} lacks {name}. The loss {loss} takes {', '.join(names)}.")
    target_tensor = _read_tensor(tensors["target_tokens"], f"target_tokens of {label}", budget)
    targets = _check_targets(target_tensor, len(tokens), facts, label)
    inputs = {"target_tokens": targets}
    for name in LOSSES[loss]:
        if name in tensors:
            tensor = _read_tensor(tensors[name], f"{name} of {label}", budget)
            inputs[name] = _check_input(tensor, targets, name, label)
        else:  # weights, by default 1
            inputs[name] = np.ones(targets.shape, np.float32)
    return Datum(tokens, inputs)


def _check_targets(
    targets: np.ndarray, n_tokens: int, facts: EngineFacts, label: str
) -> np.ndarray:
    """Returns the targets of a datum as int32; raises a RequestError for a wrong shape or type."""
    if targets.ndim not in (1, 2) or len(targets) != n_tokens or targets.size == 0:
        raise RequestError(
            f"target_tokens of {label} have the shape {targets.shape}, but it has {n_tokens} "
            f"tokens. Pass [n] or [n, k] with n = {n_tokens}."
        )
    if targets.dtype.kind != "i":
        raise RequestError(f"target_tokens of {label} are not integers. Pass token ids.")
    return _check_ids(targets, facts, f"target_tokens of {label}")


def _check_input(array: np.ndarray, targets: np.ndarray, name: str, label: str) -> np.ndarray:
    """Returns an input of a loss as fp32; raises a RequestError for a wrong shape or value."""
    if array.shape != targets.shape:
        raise RequestError(
            f"{name} of {label} have the shape {array.shape}, but its target_tokens have "
            f"{targets.shape}. Pass the same shape."
        )
    values = array.astype(np.float32)
    if not np.isfinite(values).all():
        raise RequestError(f"{name} of {label} are not finite. Pass finite numbers.")
    return values


def _read_ids(chunk: bytes | Sequence[int], label: str) -> np.ndarray:
    """Returns the tokens of a chunk as int64, from a message's bytes or from a JSON list."""
    if isinstance(chunk, bytes):
        return _read_array(chunk, _TYPES[_I32], label).astype(np.int64)
    if not all(type(token) is int and 0 <= token < 2**31 for token in chunk):
        raise RequestError(f"{label} has a token that is not an id. Pass integers.")
    return np.array(chunk, np.int64)


def _check_ids(ids: np.ndarray, facts: EngineFacts, label: str) -> np.ndarray:
    """Returns token ids as int32; raises a RequestError for an id outside the vocabulary."""
    if ids.min() < 0 or ids.max() >= facts.vocab_size:
        wrong_id = int(ids.min() if ids.min() < 0 else ids.max())
        raise RequestError(
            f"{label}: {wrong_id} is not a token of the model. Pass ids from 0 to "
            f"{facts.vocab_size - 1}."
        )
    return ids.astype(np.int32)


def _read_array(data: bytes, dtype: np.dtype, label: str) -> np.ndarray:
    """Returns bytes as an array, [n]."""
    if len(data) % dtype.itemsize:
        raise RequestError(
            f"{label} has {len(data)} bytes, which is not a multiple of {dtype.itemsize}. Send "
            "whole elements."
        )
    return np.frombuffer(data, dtype)


def _read_tensor(message: Message, label: str, budget: _ByteBudget, fill: int = 0) -> np.ndarray:
    """Returns a tensor as a dense array, with `fill` for the missing elements of a sparse one."""
    if message.dtype not in _TYPES:
        raise RequestError(f"{label} has the unknown type {message.dtype}. Use the types 1 to 4.")
    dtype = _TYPES[message.dtype]
    shape = list(message.shape)
    if len(shape) > 2 or any(not 0 <= size <= MOST_BYTES for size in shape):
        raise RequestError(f"{label} has the shape {shape[:8]}. Pass [n] or [n, k].")
    if message.HasField("sparse_csr"):
        array = _densify(message.sparse_csr, dtype, shape, label, budget, fill)
    else:
        array = _read_array(message.dense, dtype, label)
        budget.take(array.size, label)
        if math.prod(shape or [array.size]) != array.size:
            raise RequestError(
                f"{label} has {array.size} elements, but the shape {shape}. Correct the shape."
            )
        array = array.reshape(shape or [-1])
    if message.dtype == _BF16:  # the upper half of a float32
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array


def _densify(
    csr: Message, dtype: np.dtype, shape: list[int], label: str, budget: _ByteBudget, fill: int
) -> np.ndarray:
    """Returns a CSR tensor as a dense array, with `fill` for missing elements."""
    values = _read_array(csr.values, dtype, label)
    row_offsets = _read_array(csr.crow_indices, _TYPES[I64], label)
    columns = _read_array(csr.col_indices, _TYPES[I64], label)
    if len(shape) != 2 or len(row_offsets) != shape[0] + 1 or len(columns) != len(values):
        raise RequestError(
            f"{label} is not a valid CSR tensor. Pass rows, columns and values of matching lengths."
        )
    row_lengths = np.diff(row_offsets)
    is_ascending = row_offsets[0] == 0 and (row_lengths >= 0).all()
    if not is_ascending or row_offsets[-1] != len(values):
        raise RequestError(
            f"{label} is not a valid CSR tensor. Pass row indices that ascend to the number of "
            "values."
        )
    if len(columns) and not 0 <= columns.min() <= columns.max() < shape[1]:
        raise RequestError(
            f"{label} has a column outside its shape {shape}. Correct the columns or the shape."
        )
    budget.take(math.prod(shape), label)
    array = np.full(shape, fill, dtype)
    array[_csr_indices(row_offsets, columns)] = values
    return array


def _csr_indices(row_offsets: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row and column indices of a CSR tensor's elements."""
    rows = np.repeat(np.arange(len(row_offsets) - 1), np.diff(row_offsets))
    return rows, columns
