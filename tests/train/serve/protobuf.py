"""Protobuf by hand: the requests that clients send, and what is in the answers."""

import struct

import numpy as np

F32, I64, I32, BF16 = 1, 2, 3, 4
CODES = {F32: "<f4", I64: "<i8", I32: "<i4"}


def varint(number):
    number &= 2**64 - 1
    found = b""
    while number > 127:
        found += bytes([number & 127 | 128])
        number >>= 7
    return found + bytes([number])


def field(number, value):
    """A field: integers as varints, floats as doubles, all else by its length."""
    if isinstance(value, float):
        return varint(number << 3 | 1) + struct.pack("<d", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def dense(values, dtype, shape=None):
    data = np.asarray(values).astype(CODES[dtype])
    sizes = b"".join(varint(one) for one in (data.shape if shape is None else shape))
    return field(1, data.tobytes()) + field(3, dtype) + field(4, sizes)


def sparse(array, dtype):
    """A CSR tensor, element by element."""
    values, columns, rows = [], [], [0]
    for row in array:
        for column, value in enumerate(row):
            if value:
                values.append(value)
                columns.append(column)
        rows.append(len(values))
    parts = [np.array(values, CODES[dtype]), np.array(rows, "<i8"), np.array(columns, "<i8")]
    csr = b"".join(field(n, part.tobytes()) for n, part in enumerate(parts, 1))
    return field(2, csr) + field(3, dtype) + b"".join(field(4, n) for n in array.shape)


def datum(chunks, **inputs):
    found = b""
    for chunk in chunks:
        found += field(1, field(1, field(1, np.array(chunk, "<i4").tobytes())))
    for name, tensor in inputs.items():
        found += field(2, field(1, name) + field(2, tensor))
    return found


def request(*data, loss="cross_entropy", config=(), only=0, model="s:train:0", seq=3):
    found = field(1, model) + field(2, seq)
    found += b"".join(field(3, one) for one in data) + field(4, loss) + field(6, only)
    for name, value in config:
        found += field(7, field(1, name) + field(2, field(1, value)))
    return found


def fields(data):
    """The fields of a message: their values in order, by number."""
    found, place = {}, 0

    def number():
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        tag = number()
        if tag & 7 == 0:
            value = number()
        else:
            size = {1: 8, 5: 4}.get(tag & 7) or number()
            value = data[place : place + size]
            place += size
        found.setdefault(tag >> 3, []).append(value)
    return found
