"""Reads a pickle without unpickling it: the stream is a program, and this is a reader that calls
nothing it names.

Python's own tokeniser gives the opcodes; a small stack machine builds plain containers from them.
A global becomes a `Name`, and only if it is on the list below. Where the stream says "call", the
name decides what stands there instead: a description of a tensor, a container, an `Object` with a
name and a state. So there is no import, no attribute, no constructor, no code for a file to reach.
`Refused` names what was asked for.
"""

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

MOST_OPCODES = 5_000_000  # the largest published file has some 100,000


class Refused(Exception):
    """What the file asks for and does not get, or what is wrong with it; one line."""


@dataclass(frozen=True)
class Name:
    """A global that is on the list. It is a name and nothing else."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Object:
    """An instance of a class that is never looked at: its name, and what was stored of it."""

    name: str
    state: Any = None


@dataclass
class Storage:
    """The numbers behind tensors; `data` is called when they are wanted."""

    dtype: str  # of DTYPES
    count: int
    data: Callable[[], bytes] | None = None


@dataclass(frozen=True)
class View:
    """A tensor: offset and strides are in elements of the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# torch's storage classes -> safetensors' name of the numbers in them, bytes each.
DTYPES = {
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
SIZES = dict(DTYPES.values())

_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since numpy 2
_CONTAINERS = {
    f"{module}.{name}": make
    for module in ("builtins", "__builtin__")
    for name, make in {
        "set": set,
        "frozenset": set,
        "list": list,
        "tuple": tuple,
        "dict": dict,
    }.items()
}
_DICTS = {"collections.OrderedDict", "dnnlib.util.EasyDict"}
_CALLED = {
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.storage._load_from_bytes",
    "torch_utils.persistence._reconstruct_persistent_obj",
    "copyreg._reconstructor",
    "copy_reg._reconstructor",
    "_codecs.encode",
    "builtins.getattr",
    "__builtin__.getattr",
    "torch.Size",
    "torch.device",
    "numpy.dtype",
    *(f"{module}.{name}" for module in _NUMPY for name in ("scalar", "_reconstruct")),
}
_MENTIONED = {
    "builtins.object",
    "__builtin__.object",
    "numpy.ndarray",
    "torch.storage.UntypedStorage",
    *(f"torch.{name}" for name in DTYPES),
    *(f"torch.{name}" for name in ("float16", "bfloat16", "float32", "float64", "int64", "bool")),
}
_LISTED = _DICTS | _CALLED | _MENTIONED | set(_CONTAINERS)


def name_of(module: Any, name: Any) -> Name:
    """The global, if it is on the list. Raises Refused."""
    found = Name(str(module), str(name))
    layer = found.module.startswith("torch.nn.modules.") and found.name.isidentifier()
    if str(found) not in _LISTED and not layer:
        raise Refused(f"it asks for {shown(str(found))}")
    return found


def shown(text: str) -> str:
    """Text from the file, fit for a line of a terminal."""
    plain = "".join(c if c.isprintable() else "?" for c in text[:100])
    return plain + ("..." if len(text) > 100 else "")


@dataclass
class Machine:
    """Reads one pickle after the other from a stream.

    numbers    what a persistent id stands for (torch keeps storages outside of its pickles)
    from_bytes the storage that `torch.storage._load_from_bytes` would load
    """

    file: IO[bytes]
    numbers: Callable[[Any], Storage] | None = None
    from_bytes: Callable[[bytes], Any] | None = None
    opcodes: int = 0
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """The next pickle's value. Raises Refused."""
        self.stack, self.marks, self.memo = [], [], {}
        try:
            for opcode, argument, _ in pickletools.genops(self.file):
                self.opcodes += 1
                if self.opcodes > MOST_OPCODES:
                    raise Refused(f"more than {MOST_OPCODES:,} steps")
                if opcode.name == "STOP":
                    return self.stack.pop()
                self._step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise Refused(f"damaged or cut short: {shown(str(error))}") from None
        raise Refused("cut short: it ends before its last step")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSHED:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._marked()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name == "LIST":
            stack.append(self._marked())
        elif name == "DICT":
            self._fill({}, self._marked())
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._marked()
            _require(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._marked()
            self._fill(_require(stack.pop(), dict), items)
        elif name == "ADDITEMS":
            items = self._marked()
            _require(stack[-1], set).update(map(_key, items))
        elif name == "FROZENSET":
            stack.append({_key(item) for item in self._marked()})
        elif name == "GLOBAL":
            stack.append(name_of(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            module, attribute = stack.pop(-2), stack.pop()
            stack.append(name_of(_require(module, str), _require(attribute, str)))
        elif name == "REDUCE":
            function, arguments = stack.pop(-2), stack.pop()
            stack.append(self._called(_require(function, Name), _require(arguments, tuple)))
        elif name == "NEWOBJ":
            made, _ = stack.pop(-2), stack.pop()
            stack.append(_new(str(_require(made, Name))))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Object):
                stack[-1].state = state
            elif not isinstance(stack[-1], dict):  # attributes of an OrderedDict: not wanted
                raise Refused(f"it sets the state of a {type(stack[-1]).__name__}")
        elif name == "BINPERSID" and self.numbers is not None:
            stack.append(self.numbers(stack.pop()))
        else:
            raise Refused(f"it holds the step {name}")

    def _marked(self) -> list[Any]:
        """What lies above the last mark, taken off."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _fill(self, target: dict[Any, Any], items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value
        self.stack.append(target)

    def _called(self, function: Name, arguments: tuple[Any, ...]) -> Any:
        """What stands where the pickle would have the result of a call."""
        name = str(function)
        if name in _DICTS:
            return _ordered(*arguments)
        if name in _CONTAINERS:
            return _contained(name, *arguments)
        if name == "torch._utils._rebuild_tensor_v2":
            return _view(*arguments[:4])
        if name == "torch._utils._rebuild_parameter":
            return _require(arguments[0], View)
        if name == "torch.storage._load_from_bytes" and self.from_bytes is not None:
            return self.from_bytes(_require(arguments[0], bytes))
        if name == "torch_utils.persistence._reconstruct_persistent_obj":
            meta = _require(arguments[0], dict)  # its module_src, a program, is left where it is
            return Object(_require(meta["class_name"], str), meta["state"])
        if name.endswith("._reconstructor"):
            return _new(str(_require(arguments[0], Name)))
        if name == "_codecs.encode" and arguments[1:] == ("latin1",):
            return _require(arguments[0], str).encode("latin1")
        if name == "torch.Size":
            return tuple(_require(arguments[0], list | tuple))
        if name.endswith(".scalar"):
            return _scalar(*arguments)
        if name.endswith(".getattr"):
            return _method(*arguments)
        if name == "numpy.dtype":
            return Object(f"{name} {_require(arguments[0], str)}")
        if name == "torch.device" or name.endswith("._reconstruct"):
            return Object(name, arguments)
        raise Refused(f"it calls {shown(name)}")


_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}


def _require(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        wanted = getattr(kind, "__name__", str(kind)).lower()
        raise Refused(f"it has a {type(value).__name__} where a {wanted} must be")
    return value


def _key(key: Any) -> Any:
    """What may be a key: nothing whose hash or equality takes long."""
    if key is not None and not isinstance(key, str | int | float | bytes | Name):
        raise Refused(f"it has a {type(key).__name__} as a key")
    return key


def _new(name: str) -> Any:
    if name in _DICTS:
        return {}
    if not name.startswith("torch.nn.modules."):
        raise Refused(f"it makes a {shown(name)}")
    return Object(name)


def _method(owner: Any, name: Any) -> Object:
    """A method that was stored with its own object, as ECT's loss does: set aside by name."""
    if not isinstance(_require(owner, Object).state, dict) or _require(name, str)[:1] == "_":
        raise Refused(f"it calls getattr for {shown(str(name))}")
    return Object(f"{owner.name}.{name}")


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    return {_key(key): value for key, value in _require(pairs, list | tuple)}


def _contained(name: str, items: Any = ()) -> Any:
    items = _require(items, list | tuple)
    return {*map(_key, items)} if name.endswith("set") else _CONTAINERS[name](items)


def _view(storage: Any, offset: Any, shape: Any, strides: Any) -> View:
    """Every element of a view must lie in its storage, and none be told twice by the shape."""
    _require(storage, Storage)
    shape, strides = tuple(_require(shape, tuple)), tuple(_require(strides, tuple))
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > 8:
        raise Refused(f"it has a tensor of {len(shape)} sides and {len(strides)} strides")
    if not all(type(number) is int and 0 <= number < 2**40 for number in numbers):
        raise Refused("it has a tensor whose shape is none")
    count = 1
    for side in shape:
        count *= side
    last = offset + sum((side - 1) * step for side, step in zip(shape, strides, strict=True))
    if count > storage.count or (count and last >= storage.count):
        raise Refused(f"it has a tensor {list(shape)} of {storage.count} stored numbers")
    return View(storage, offset, shape, strides)


def _scalar(dtype: Any, data: Any) -> Any:
    """A number of numpy's, such as a constructor's sigma_data."""
    dtype, data = _require(dtype, Object), _require(data, bytes)
    little = not (isinstance(dtype.state, tuple) and ">" in dtype.state)
    code = _NUMBERS.get(dtype.name.removeprefix("numpy.dtype "))
    if code is None or not little or struct.calcsize(code) != len(data):
        raise Refused("it has a number of an unknown kind")
    return struct.unpack(f"<{code}", data)[0]


_NUMBERS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "b1": "?"}
