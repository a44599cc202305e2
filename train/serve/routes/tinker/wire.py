"""Tinker's protobuf bodies, to and from the engine's requests and results."""

import math
from collections.abc import Mapping, Sequence
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
# The types of tensors by their numbers on the wire; bf16 is read as its bits.
_TYPES: dict[int, np.dtype] = {
    1: np.dtype("<f4"),
    2: np.dtype("<i8"),
    3: np.dtype("<i4"),
    4: np.dtype("<u2"),
}
_F32, I64, _BF16 = 1, 2, 4
_CLIP = ("clip_low_threshold", "clip_high_threshold")
_CONFIG = {"ppo": _CLIP, "cispo": _CLIP, "gspo": _CLIP, "dro": ("beta",)}
_STOP, _LENGTH = 0, 1


def _decompressed(body: bytes, encoding: str) -> bytes:
    if encoding in ("", "identity"):
        return body
    if encoding != "zstd":
        raise RequestError(f"Content-Encoding {encoding[:40]!r} is unknown; there is zstd")
    try:
        with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(body) as reader:
            content = reader.read(MOST_BYTES + 1)
    except (zstandard.ZstdError, MemoryError) as error:
        raise RequestError(f"the body is not zstd: {error}") from error
    if len(content) > MOST_BYTES:
        raise RequestError(f"the body has more than {MOST_BYTES} bytes: send fewer data at once")
    return content


def parse(body: bytes, encoding: str = "") -> tuple[bytes, Message]:
    """Returns the body of a forward_backward without its Content-Encoding, and its message.

    Raises:
      RequestError: It is garbage, has an unknown encoding, or more than `MOST_BYTES`.
    """
    body = _decompressed(body, encoding)
    try:
        return body, ForwardBackwardRequest.FromString(body)
    except (DecodeError, UnicodeDecodeError) as error:
        raise RequestError("the body is no ForwardBackwardRequest in protobuf") from error


def gradient_of(message: Message, facts: EngineFacts) -> Gradient:
    """Returns the engine's command.

    Raises:
      RequestError: A loss, an input, a shape or a token that there is not.
    """
    loss = message.loss_fn
    if loss not in LOSSES:
        raise RequestError(f"loss_fn {loss[:40]!r} is unknown; there are {', '.join(LOSSES)}")
    if not message.data:
        raise RequestError("data is empty: send a datum at least")
    room = _Room()
    data = [
        _datum(datum, f"datum {number}", loss, facts, room)
        for number, datum in enumerate(message.data)
    ]
    return Gradient(data, loss, _config(message, loss), message.forward_only)


def tokens_of(
    chunks: Sequence[bytes | Sequence[int]], facts: EngineFacts, where: str
) -> np.ndarray:
    """Returns the tokens in chunks of a text, [n] int32.

    Raises:
      RequestError: None, too many, or ids that the vocabulary has not.
    """
    tokens = np.concatenate([_ids(chunk, where) for chunk in chunks] or [np.zeros(0, np.int64)])
    if not 1 <= len(tokens) <= facts.max_length:
        raise RequestError(
            f"{where} has {len(tokens)} tokens; a sequence here has 1 to {facts.max_length}"
        )
    return _checked_ids(tokens, facts, where)


def encode_gradient(outputs: GradientResult) -> bytes:
    """Returns the body that holds what a `Gradient` found."""
    message = ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    for trailing, group in groupby(outputs.logprobs, key=lambda array: array.shape[1:]):
        arrays = [np.ascontiguousarray(array, "<f4") for array in group]
        record = message.loss_fn_outputs.add(num_datums=len(arrays))
        field = record.fields["logprobs"]
        field.data = b"".join(array.tobytes() for array in arrays)
        field.offsets = np.cumsum([0, *(array.nbytes for array in arrays)]).astype("<i8").tobytes()
        field.dtype = _F32
        field.trailing_shape.extend(trailing)
    for name, value in outputs.metrics.items():
        message.metrics[name] = value
    return message.SerializeToString()


def target_ids(message: Message) -> np.ndarray:
    """Returns the tokens of a tensor, int32 [prompt - 1, k], -1 where it lists none.

    Raises:
      RequestError: It is no tensor.
    """
    return _tensor(message, "target_prompt_logprobs", _Room(), fill=-1).astype(np.int32)


def encode_samples(drawn: SampleResult, last: int | None = None, targets: Message = None) -> bytes:
    """Returns the body that holds completions.

    Args:
      drawn: the completions.
      last: how many of the prompt's tokens were to be scored; None for all.
      targets: the tensor of tokens that were to be scored, too, whose layout their scores get.
    """
    message = SampleResponse(prompt_cache_hit_tokens=drawn.cached)
    for completion in drawn.completions:
        sequence = message.sequences.add(
            stop_reason=_STOP if completion.stopped else _LENGTH,
            tokens=completion.tokens.astype("<i4").tobytes(),
            logprobs=completion.logprobs.astype("<f4").tobytes(),
        )
        if completion.top is not None:
            _write_top(sequence.topk_sampled_logprobs, completion.top)
    skipped = slice(0 if last is None else -last)
    if drawn.prompt_logprobs is not None:
        values = drawn.prompt_logprobs.astype("<f4")
        values[skipped] = np.nan
        message.prompt_logprobs = values.tobytes()
    if drawn.top_prompt is not None:
        top = Top(drawn.top_prompt.ids.copy(), drawn.top_prompt.logprobs.copy())
        top.ids[skipped], top.logprobs[skipped] = 0, -99999.0
        _write_top(message.topk_prompt_logprobs, top)
    if drawn.targets is not None:
        scores, logps = message.target_prompt_logprobs, drawn.targets.astype("<f4")
        scores.CopyFrom(targets)
        scores.dtype = _F32
        if targets.HasField("sparse_csr"):
            csr = targets.sparse_csr
            listed = (np.frombuffer(x, "<i8") for x in (csr.crow_indices, csr.col_indices))
            scores.sparse_csr.values = logps[_places(*listed)].tobytes()
        else:
            scores.dense = logps.tobytes()
    return message.SerializeToString()


def _write_top(message: Message, top: Top) -> None:
    message.length, message.k = top.ids.shape
    message.token_ids = top.ids.astype("<i4").tobytes()
    message.logprobs = top.logprobs.astype("<f4").tobytes()


def _config(message: Message, loss: str) -> Mapping[str, float]:
    known = _CONFIG.get(loss, ())
    config = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        if not value.HasField("number"):
            raise RequestError(f"loss_fn_config {name[:40]!r} is no number")
        config[name] = value.number
    for name, number in config.items():
        if name not in known:
            offered = f"there are {', '.join(known)}" if known else "it has none"
            raise RequestError(f"loss_fn_config {name[:40]!r} is unknown to {loss}; {offered}")
        if not math.isfinite(number):
            raise RequestError(f"loss_fn_config {name!r} is {number}: give a finite number")
    return config


class _Room:
    """Counts the bytes of the arrays of a request, which a few sparse ones could make many."""

    def __init__(self) -> None:
        self._left = MOST_BYTES

    def take(self, size: int, where: str) -> None:
        """Raises a RequestError if there is no room for so many elements more."""
        self._left -= 8 * size
        if self._left < 0:
            raise RequestError(f"{where} makes the arrays larger than {MOST_BYTES} bytes together")


def _datum(message: Message, where: str, loss: str, facts: EngineFacts, room: _Room) -> Datum:
    if not all(chunk.HasField("encoded_text") for chunk in message.model_input):
        raise RequestError(f"{where} has a chunk that is no text; there is encoded_text alone")
    texts = [chunk.encoded_text.tokens for chunk in message.model_input]
    tokens = tokens_of(texts, facts, where)
    given = message.loss_fn_inputs
    if bounds := sorted(set(_CLIP) & set(given)):
        raise RequestError(f"{where} has {bounds[0]}, a tensor; it is a number of loss_fn_config")
    wanted = ("target_tokens", *LOSSES[loss])
    inputs: dict[str, np.ndarray] = {}
    for name in wanted:
        if name not in given:
            if name != "weights":
                raise RequestError(f"{where} lacks {name}; {loss} takes {', '.join(wanted)}")
            inputs[name] = np.ones(inputs["target_tokens"].shape, np.float32)
            continue
        array = _tensor(given[name], f"{name} of {where}", room)
        if name == "target_tokens":
            if array.ndim not in (1, 2) or len(array) != len(tokens) or array.size == 0:
                raise RequestError(
                    f"target_tokens of {where} have the shape {array.shape}; its {len(tokens)} "
                    "tokens take as many targets, [n] or [n, k]"
                )
            if array.dtype.kind != "i":
                raise RequestError(f"target_tokens of {where} are no integers")
            inputs[name] = _checked_ids(array, facts, f"target_tokens of {where}")
            continue
        if array.shape != inputs["target_tokens"].shape:
            raise RequestError(
                f"{name} of {where} have the shape {array.shape}, its target_tokens "
                f"{inputs['target_tokens'].shape}: they are to agree"
            )
        inputs[name] = array.astype(np.float32)
        if not np.isfinite(inputs[name]).all():
            raise RequestError(f"{name} of {where} are not finite")
    return Datum(tokens, inputs)


def _ids(chunk: bytes | Sequence[int], where: str) -> np.ndarray:
    if isinstance(chunk, bytes):
        return _array(chunk, _TYPES[3], where).astype(np.int64)
    if not all(type(token) is int and 0 <= token < 2**31 for token in chunk):
        raise RequestError(f"{where} has a token that is no id")
    return np.array(chunk, np.int64)


def _checked_ids(ids: np.ndarray, facts: EngineFacts, where: str) -> np.ndarray:
    if ids.min() < 0 or ids.max() >= facts.vocab_size:
        worst = int(ids.min() if ids.min() < 0 else ids.max())
        raise RequestError(f"{where}: {worst} is no token; ids are 0 to {facts.vocab_size - 1}")
    return ids.astype(np.int32)


def _array(data: bytes, dtype: np.dtype, where: str) -> np.ndarray:
    if len(data) % dtype.itemsize:
        raise RequestError(f"{where} has {len(data)} bytes, no multiple of {dtype.itemsize}")
    return np.frombuffer(data, dtype)


def _tensor(message: Message, where: str, room: _Room, fill: int = 0) -> np.ndarray:
    """Returns a tensor as an array, with `fill` where a sparse one has nothing."""
    if message.dtype not in _TYPES:
        raise RequestError(f"{where} has the unknown type {message.dtype}; there are 1 to 4")
    dtype, shape = _TYPES[message.dtype], list(message.shape)
    if len(shape) > 2 or any(not 0 <= size <= MOST_BYTES for size in shape):
        raise RequestError(f"{where} has the shape {shape[:8]}; there are [n] and [n, k]")
    if message.HasField("sparse_csr"):
        array = _densified(message.sparse_csr, dtype, shape, where, room, fill)
    else:
        array = _array(message.dense, dtype, where)
        room.take(array.size, where)
        if math.prod(shape or [array.size]) != array.size:
            raise RequestError(f"{where} has {array.size} elements, but the shape {shape}")
        array = array.reshape(shape or [-1])
    if message.dtype == _BF16:  # the upper half of a float32
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array


def _densified(
    csr: Message, dtype: np.dtype, shape: list[int], where: str, room: _Room, fill: int
) -> np.ndarray:
    values = _array(csr.values, dtype, where)
    rows = _array(csr.crow_indices, _TYPES[2], where)
    columns = _array(csr.col_indices, _TYPES[2], where)
    if len(shape) != 2 or len(rows) != shape[0] + 1 or len(columns) != len(values):
        raise RequestError(f"{where} is no CSR tensor: rows, columns and values do not agree")
    steps = np.diff(rows)
    if rows[0] != 0 or rows[-1] != len(values) or (steps < 0).any():
        raise RequestError(f"{where} is no CSR tensor: its row indices do not ascend to the end")
    if len(columns) and not 0 <= columns.min() <= columns.max() < shape[1]:
        raise RequestError(f"{where} has a column outside its shape {shape}")
    room.take(math.prod(shape), where)
    array = np.full(shape, fill, dtype)
    array[_places(rows, columns)] = values
    return array


def _places(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of what a CSR tensor lists."""
    return np.repeat(np.arange(len(rows) - 1), np.diff(rows)), columns
