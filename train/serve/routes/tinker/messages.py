"""The protobuf messages of Tinker's protocol, built from a table of their fields."""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# Each message's fields, "name number type": ? has presence, * is repeated, % is a map from strings.
# Members of a oneof have presence; enums are int32, as they are on the wire.
_FIELDS = {
    "SparseCsr": "values 1 bytes, crow_indices 2 bytes, col_indices 3 bytes",
    "Tensor": "dense 1 ?bytes, sparse_csr 2 SparseCsr, dtype 3 int32, shape 4 *int64",
    "EncodedText": "tokens 1 bytes",
    "Other": "data 1 bytes",
    "Chunk": "encoded_text 1 EncodedText, image 2 Other, dmel 3 Other",
    "Datum": "model_input 1 *Chunk, loss_fn_inputs 2 %Tensor",
    "LossConfigValue": "number 1 ?double, text 2 ?string",
    "ForwardBackwardRequest": "model_id 1 string, seq_id 2 int32, data 3 *Datum, "
    "loss_fn 4 string, loss_fn_config 5 %double, forward_only 6 bool, "
    "loss_fn_config_v2 7 %LossConfigValue",
    "BatchedTensor": "data 1 bytes, offsets 2 bytes, dtype 3 int32, trailing_shape 4 *int64",
    "ArrayRecord": "type_tag 1 string, fields 2 %BatchedTensor, num_datums 3 int64",
    "ForwardBackwardOutput": "loss_fn_output_type 1 string, loss_fn_outputs 2 *ArrayRecord, "
    "metrics 3 %double",
    "TopkLogprobs": "token_ids 1 bytes, logprobs 2 bytes, k 3 uint32, length 4 uint32",
    "SampledSequence": "stop_reason 1 int32, tokens 2 bytes, logprobs 3 ?bytes, "
    "topk_sampled_logprobs 4 TopkLogprobs",
    "SampleResponse": "sequences 1 *SampledSequence, prompt_logprobs 2 ?bytes, "
    "topk_prompt_logprobs 3 TopkLogprobs, prompt_cache_hit_tokens 4 int32, "
    "target_prompt_logprobs 5 Tensor",
}
Message = Any  # of a class made here: its fields are unknown to type checkers
_PACKAGE = "lora_jax.tinker"
_Field = descriptor_pb2.FieldDescriptorProto


def _set_type(field: descriptor_pb2.FieldDescriptorProto, kind: str) -> None:
    """Sets the type of a field: one of the messages, or a type of protobuf."""
    if kind in _FIELDS:
        field.type = _Field.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{kind}"
    else:
        field.type = getattr(_Field, f"TYPE_{kind.upper()}")


def _add_map(
    message: descriptor_pb2.DescriptorProto, field: descriptor_pb2.FieldDescriptorProto, kind: str
) -> None:
    """Declares a field as a map, with the nested message for entries that protoc generates."""
    entry = message.nested_type.add(name=f"{field.name.title().replace('_', '')}Entry")
    entry.options.map_entry = True
    key = entry.field.add(name="key", number=1, label=_Field.LABEL_OPTIONAL)
    _set_type(key, "string")
    value = entry.field.add(name="value", number=2, label=_Field.LABEL_OPTIONAL)
    _set_type(value, kind)
    field.type = _Field.TYPE_MESSAGE
    field.type_name = f".{_PACKAGE}.{message.name}.{entry.name}"


def _messages() -> dict[str, Message]:
    """Returns the classes of the messages, by name."""
    file = descriptor_pb2.FileDescriptorProto(
        name="lora_jax/tinker.proto", package=_PACKAGE, syntax="proto3"
    )
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for declaration in fields.split(", "):
            field_name, number, kind = declaration.split()
            field = message.field.add(name=field_name, number=int(number))
            is_map = kind.startswith("%")
            is_repeated = is_map or kind.startswith("*")
            field.label = _Field.LABEL_REPEATED if is_repeated else _Field.LABEL_OPTIONAL
            if is_map:
                _add_map(message, field, kind[1:])
                continue
            _set_type(field, kind.lstrip("*?"))
            has_presence = kind.startswith("?")
            if has_presence:
                field.proto3_optional = True
                field.oneof_index = len(message.oneof_decl)
                message.oneof_decl.add(name=f"_{field_name}")
    pool = descriptor_pool.DescriptorPool()  # the SDK's own messages may live in this process
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in _FIELDS
    }


_CLASSES = _messages()
ForwardBackwardRequest = _CLASSES["ForwardBackwardRequest"]
ForwardBackwardOutput = _CLASSES["ForwardBackwardOutput"]
SampleResponse = _CLASSES["SampleResponse"]
Tensor = _CLASSES["Tensor"]
