"""Model files made to harm: nothing in them runs, nothing outgrows the file, a line says why."""

import io
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from infra.errors import UserError
from pipelines import foreign_file, foreign_pickle, importing
from tests import foreign_files

MARKER = "marker-of-code-that-ran"


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    """Whatever the file says, no file of that name appears, nor any outside of the folder."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    yield
    assert [p for p in tmp_path.rglob("*") if p.name == MARKER or "escaped" in p.name] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def refusal(path: Path) -> str:
    """The one line that a file is refused with."""
    with pytest.raises(UserError) as caught:
        importing.read(str(path), kind="denoiser", size=16)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < 1000
    return message.removeprefix(f"{path}: ")


class Call:
    """Pickles as a call of what a global names."""

    def __init__(self, module: str, name: str, *arguments: Any) -> None:
        self.called = module, name, arguments


class Pickler(pickle._Pickler):  # type: ignore[name-defined]  # the one in Python can be extended
    """Writes `Call`s without importing what they name."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(obj, Call):
            super().save(obj, save_persistent_id)
            return
        module, name, arguments = obj.called
        self.save(module)
        self.save(name)
        self.write(pickle.STACK_GLOBAL)
        self.save(arguments)
        self.write(pickle.REDUCE)


def pickled(value: Any) -> bytes:
    file = io.BytesIO()
    Pickler(file, 4).dump(value)
    return file.getvalue()


def zipped(data: bytes, *, extra: Callable[[zipfile.ZipFile], None] | None = None) -> bytes:
    """A .pt whose data.pkl is the one given."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        if extra is not None:
            extra(archive)
    return file.getvalue()


def before_zip(data: bytes) -> bytes:
    """A .pt of torch.save before 1.6 whose third pickle is the one given."""
    head = [foreign_pickle.MAGIC, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(part, 2) for part in head) + data


# --- calls ---------------------------------------------------------------------------------------

TOUCH = f"touch {MARKER}"
PYTHON = f"open({MARKER!r}, 'w')"
CALLS = [
    Call("os", "system", TOUCH),
    Call("posix", "system", TOUCH),
    Call("subprocess", "check_output", ["touch", MARKER]),
    Call("builtins", "eval", PYTHON),
    Call("builtins", "exec", PYTHON),
    Call("builtins", "open", MARKER, "w"),
    Call("builtins", "__import__", "os"),
    Call("builtins", "getattr", Call("builtins", "__import__", "os"), "system"),
    Call("builtins", "tuple.__class__.__base__.__subclasses__"),
    Call("functools", "partial", Call("os", "system"), TOUCH),
    Call("operator", "attrgetter", "system"),
    Call("importlib", "import_module", "os"),
    Call("pickle", "loads", pickled(Call("os", "system", TOUCH))),
    Call("torch", "load", MARKER),
    Call("torch.serialization", "load", MARKER),
    Call("torch.hub", "load", "a/b", "c"),
    Call("torch.jit", "load", MARKER),
    Call("torch._utils", "_rebuild_parameter.__globals__"),
    Call("torch.nn.modules.module", "Module.__init__.__globals__"),
    Call("torch.nn.modules.conv.os", "system.x", TOUCH),
    Call("numpy.testing._private.utils", "runstring", PYTHON, {}),
    Call("torch_utils.persistence", "persistent_class", 1),
    Call("training.networks", "EDMPrecond"),
    Call("dnnlib.util", "construct_class_by_name"),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: ".".join(call.called[:2]))
@pytest.mark.parametrize("wrap", [bytes, zipped, before_zip])
def test_no_call_of_a_file_is_made_and_its_name_is_told(tmp_path, call, wrap, monkeypatch):
    monkeypatch.setattr(foreign_pickle, "_limit", lambda size: None)  # that is this process's
    path = tmp_path / "a" / "edm.pkl"
    for value in (call, {"ema": call}, {"weight": 1, "x": [call]}):
        path.write_bytes(wrap(pickled(value)))
        code, said = child(path)
        assert code == 2
        module, name, arguments = call.called
        inner = [a for a in arguments if isinstance(a, Call)]  # asked for first, where there is one
        asked = [f"{module}.{name}", *(".".join(a.called[:2]) for a in inner)]
        assert any(f"it asks for {one}" in said for one in asked), said


@pytest.mark.parametrize("wrap", [bytes, zipped, before_zip])
def test_the_same_through_the_front_door(tmp_path, wrap):
    path = tmp_path / "a" / "edm.pkl"
    path.write_bytes(wrap(pickled({"ema": CALLS[0]})))
    assert refusal(path) == "refused: it asks for os.system"


def child(path: Path) -> tuple[int, str]:
    """Exit code and words of the reader, called here."""
    folder = path.parent / f"left-{random.getrandbits(64)}"
    folder.mkdir()
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreign_pickle, "_say", lambda what: said.append(str(what)) or 2)
        code = foreign_pickle.main([str(path), str(folder)])
    if code == 0:
        load_file(folder / "tensors.safetensors")
    for left in folder.iterdir():
        left.unlink()
    folder.rmdir()
    return code, "".join(said)


RAW = {
    "a class and its instance": b"(ios\nsystem\nX\x01\x00\x00\x00a.",
    "an instance by a class on the stack": b"(cos\nsystem\nX\x01\x00\x00\x00ao.",
    "an extension code": b"\x82\x01.",
    "a persistent id": b"Pabc\n.",
    "a persistent id on the stack": b"X\x01\x00\x00\x00aQ.",
    "a buffer outside": b"\x80\x05\x97.",
    "state for a list": b"]}b.",
    "a call of a string": b"X\x01\x00\x00\x00a)R.",
    "an object of a function": b"ctorch._utils\n_rebuild_tensor_v2\n)\x81.",
    "a name made of numbers": b"\x80\x04K\x01K\x02\x93.",
    "nothing on the stack": b"\x80\x04.",
    "a memo that is not there": b"\x80\x04h\x07.",
    "no mark": b"\x80\x04]e.",
    "a dict with a key too many": b"(K\x01d.",
    "a list as a key": b"}]K\x01s.",
    "a deep tuple as a key": b"})" + b"\x85" * 100_000 + b"K\x01s.",
    "text that is none": b"\x80\x04X\x02\x00\x00\x00\xff\xfe.",
    "a number with too many digits": b"L" + b"9" * 10_000 + b"L\n.",
    "an unknown step": b"\x80\x04\xff.",
    "only a beginning": b"\x80\x04",
}


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
@pytest.mark.parametrize("wrap", [bytes, zipped, before_zip])
def test_odd_programs_end_with_a_line(tmp_path, raw, wrap, monkeypatch):
    monkeypatch.setattr(foreign_pickle, "_limit", lambda size: None)
    path = tmp_path / "a" / "edm.pkl"
    path.write_bytes(wrap(raw))
    code, said = child(path)
    assert code == 2
    assert said.isprintable()


def test_code_within_the_bytes_of_a_tensor_is_refused(tmp_path):
    inner = before_zip(pickled(Call("os", "system", TOUCH)))
    path = tmp_path / "a" / "edm.pkl"
    path.write_bytes(pickled({"ema": Call("torch.storage", "_load_from_bytes", inner)}))
    assert refusal(path) == "refused: it asks for os.system"
    nested = pickled(Call("torch.storage", "_load_from_bytes", inner))
    path.write_bytes(pickled(Call("torch.storage", "_load_from_bytes", before_zip(nested))))
    assert refusal(path) == "refused: it calls torch.storage._load_from_bytes"
    path.write_bytes(pickled(Call("torch.storage", "_load_from_bytes", b"PK\x03\x04")))
    assert "refused: damaged or cut short" in refusal(path)


def test_attributes_are_never_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign_pickle, "_limit", lambda size: None)
    path = tmp_path / "a" / "edm.pkl"
    meta = {"class_name": "ECMLoss", "state": {"q": 2}}
    made = Call("torch_utils.persistence", "_reconstruct_persistent_obj", meta)
    method = Call("builtins", "getattr", made, "snr")
    for owner, name, words in [
        (made, "__class__", "it calls getattr for __class__"),
        (method, "im_func", "it calls getattr for im_func"),
        ({"a": 1}, "clear", "it has a dict where a object must be"),
        (Call("torch", "Size", (1,)), "count", "it has a tuple where a object must be"),
    ]:
        path.write_bytes(pickled({"loss_fn": Call("builtins", "getattr", owner, name)}))
        assert child(path) == (2, words)
    path.write_bytes(pickled({"loss_fn": method}))
    assert child(path)[1].endswith("it holds loss_fn: ECMLoss.snr")
    path.write_bytes(pickled(method)[:-1] + b")R.")  # and called
    assert child(path) == (2, "it has a Object where a name must be")


def test_names_from_a_file_cannot_paint_the_terminal(tmp_path):
    path = tmp_path / "a" / "edm.pkl"
    path.write_bytes(pickled(Call("os\n\x1b[31mDone", "x" * 10_000)))
    assert refusal(path).startswith("refused: it asks for os??[31mDone.xxx")


# --- growth --------------------------------------------------------------------------------------


def tensor(count: int, shape: Any, strides: Any, offset: int = 0, numbers: bytes = b"") -> bytes:
    """A .pkl with one tensor whose storage says it has `count` floats."""
    identity = "storage", Named("torch", "FloatStorage"), "1", "cpu", count, None
    kept = pickled_with_identity(identity) + pickle.dumps(["1"], 2)
    inner = before_zip(kept + struct.pack("<q", count) + numbers)
    storage = Call("torch.storage", "_load_from_bytes", inner)
    view = Call("torch._utils", "_rebuild_tensor_v2", storage, offset, shape, strides, False, {})
    return pickled({"w": view})


class Named:
    def __init__(self, module: str, name: str) -> None:
        self.line = f"c{module}\n{name}\n".encode()


def pickled_with_identity(identity: tuple[Any, ...]) -> bytes:
    parts = [p.line if isinstance(p, Named) else pickle.dumps(p, 2)[2:-1] for p in identity]
    return b"\x80\x02(" + b"".join(parts) + b"tQ."


def test_a_tensor_made_by_hand_is_read(tmp_path):
    path = tmp_path / "a" / "edm.pkl"
    path.write_bytes(tensor(2, (2,), (1,), numbers=bytes(8)))
    assert "tensors of no layout that is known here: w" in refusal(path)


@pytest.mark.parametrize(
    ("count", "shape", "strides", "offset", "words"),
    [
        (2, (10**6, 10**6), (0, 0), 0, "of 2 stored numbers"),  # one number, said often
        (2, (3,), (1,), 0, "of 2 stored numbers"),
        (2, (2,), (1,), 1, "of 2 stored numbers"),
        (2, (2,), (5,), 0, "of 2 stored numbers"),
        (2, (2,), (-1,), 1, "whose shape is none"),
        (2, (-2,), (1,), 0, "whose shape is none"),
        (2, (10**13,), (1,), 0, "whose shape is none"),
        (2, (True,), (1,), 0, "whose shape is none"),
        (2, (1, 1), (1,), 0, "of 2 sides and 1 strides"),
        (2, (1,) * 9, (1,) * 9, 0, "of 9 sides"),
        (10**11, (10**11,), (1,), 0, "claims 100,000,000,000 numbers"),
        (3, (3,), (1,), 0, "numbers are missing"),
    ],
)
def test_tensors_that_are_more_than_their_numbers(
    tmp_path, monkeypatch, count, shape, strides, offset, words
):
    monkeypatch.setattr(foreign_pickle, "_limit", lambda size: None)
    path = tmp_path / "a" / "edm.pkl"
    path.write_bytes(tensor(count, shape, strides, offset, bytes(8)))
    code, said = child(path)
    assert code == 2
    assert words in said


def test_one_storage_written_out_many_times_is_refused(tmp_path):
    numbers = torch.zeros(1000)
    path = foreign_files.state_file(
        tmp_path / "a" / "edm.pt", {f"w{i}": numbers.view(10, 100) for i in range(1000)}
    )
    assert "refused: its tensors would be 4,000,000 bytes" in refusal(path)


def test_lists_that_double_end_at_the_limit_of_memory(tmp_path):
    # 100,000 numbers once, then 20,000 steps of a few bytes that each ask for a copy of them.
    grow = b"ctorch\nSize\n" + b"(" + b"K\x01" * 100_000 + b"t\x85R"
    again = b"cbuiltins\nlist\n(h\x00tR"
    path = tmp_path / "a" / "edm.pkl"
    path.write_bytes(b"\x80\x04" + grow + b"q\x000](" + again * 20_000 + b"e.")
    assert path.stat().st_size < 1 << 20
    assert "refused: it asks for more memory than its size gives reason for" in refusal(path)


def test_a_module_that_holds_itself_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign_pickle, "_limit", lambda size: None)
    module = torch.nn.Sequential(torch.nn.Identity())
    module._modules["0"]._modules["up"] = module
    path = tmp_path / "a" / "edm.pkl"
    path.write_bytes(pickle.dumps({"ema": module}))
    assert child(path) == (2, "its modules are nested without end")
    # 2^40 paths through 40 modules
    shared = torch.nn.Identity()
    for _ in range(30):
        above = torch.nn.Identity()
        above._modules = {"a": shared, "b": shared}
        shared = above
    path.write_bytes(pickle.dumps({"ema": shared}))
    assert child(path) == (2, "its modules are nested without end")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": "a" * 2000}, "a constructor argument is a long text"),
        ({"x": torch.zeros(3)}, "a constructor argument is a tensor"),
        ({"x": {1, 2}}, "a constructor argument is a set"),
        ({"x": list(range(2000))}, "a constructor argument is a list"),
    ],
)
def test_constructor_arguments_are_numbers_and_words(tmp_path, monkeypatch, arguments, words):
    monkeypatch.setattr(foreign_pickle, "_limit", lambda size: None)
    network = foreign_files.persistent("EDMPrecond", 16, 3, **arguments)
    path = foreign_files.dump(tmp_path / "a" / "edm.pkl", network)
    assert child(path) == (2, words)
    nested: Any = []
    for _ in range(100):
        nested = [nested]
    network = foreign_files.persistent("EDMPrecond", 16, 3, x=nested)
    foreign_files.dump(path, network)
    assert child(path) == (2, "constructor arguments are nested too deeply")


# --- zips ----------------------------------------------------------------------------------------

PLAIN = pickle.dumps({"a": 1}, 2)


def compressed(archive: zipfile.ZipFile) -> None:
    archive.writestr("archive/data/0", bytes(100_000_000), zipfile.ZIP_DEFLATED)


def link(archive: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("archive/data/0")
    info.external_attr = 0o120777 << 16
    archive.writestr(info, "/etc/passwd")


def at(name: str) -> Callable[[zipfile.ZipFile], None]:
    return lambda archive: archive.writestr(name, b"x")


def twice(archive: zipfile.ZipFile) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data.pkl", PLAIN)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (compressed, "a compressed member: archive/data/0"),
        (link, "a path that leads outside: archive/data/0"),
        (at("../escaped"), "a path that leads outside: ../escaped"),
        (at("archive/../../escaped"), "a path that leads outside: archive/../../escaped"),
        (at("/escaped"), "a path that leads outside: /escaped"),
        (at("other/data.pkl"), "it has no data.pkl"),
        (at("archive/byteorder"), "its numbers are big-endian"),
        (twice, "two members of one name"),
    ],
)
def test_zips_that_are_not_torchs(tmp_path, monkeypatch, extra, words):
    monkeypatch.setattr(foreign_pickle, "_limit", lambda size: None)
    path = tmp_path / "a" / "edm.pt"
    path.write_bytes(zipped(PLAIN, extra=extra))
    code, said = child(path)
    assert code == 2
    assert words in said


def test_members_that_claim_more_than_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign_pickle, "_limit", lambda size: None)
    path = foreign_files.state_file(tmp_path / "a" / "edm.pt", {"w": torch.ones(4)})
    data = path.read_bytes()
    start = data.rindex(b"PK\x01\x02", 0, data.rindex(b"data/0"))
    claimed = struct.pack("<II", 1 << 30, 1 << 30)
    path.write_bytes(data[: start + 20] + claimed + data[start + 28 :])
    code, said = child(path)
    assert code == 2
    assert "claim more bytes than the file has" in said


def test_zips_of_other_things(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign_pickle, "_limit", lambda size: None)
    path = tmp_path / "a" / "edm.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    assert child(path) == (2, "a zip, but not one of torch.save: it has no data.pkl")


# --- what is no model, cut short or damaged ------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1, 2], "it holds a list, not a state dict"),
        ({}, "it holds {}"),
        ({"a": torch.zeros(1), "b": "text"}, "it holds a: tensor, b: str"),
        ({"model": {"w": {"deep": torch.zeros(1)}}}, "it holds model: dict"),
        ({"ema": {"w": torch.zeros(1)}, "net": {"w": torch.zeros(1)}}, "several models: ema, net"),
        ({3: torch.zeros(1)}, "a int as a tensor's name"),
    ],
)
def test_what_is_no_state_dict_is_told(tmp_path, monkeypatch, value, words):
    monkeypatch.setattr(foreign_pickle, "_limit", lambda size: None)
    path = tmp_path / "a" / "edm.pt"
    torch.save(value, path)
    code, said = child(path)
    assert code == 2
    assert words in said


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no safetensors, .pt or .pkl file"),
        (b"\x00" * 100, "no safetensors, .pt or .pkl file"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "git lfs pull"),
        (b"\x1f\x8b\x08\x00", "gzipped"),
        (struct.pack("<Q", 10) + b"{", "damaged or cut short"),
        (struct.pack("<Q", 1 << 60) + b"{}", "damaged or cut short"),
        (struct.pack("<Q", 3) + b"{}}" + bytes(8), "damaged or cut short"),
        (b"PK\x03\x04" + bytes(100), "refused: damaged or cut short"),
    ],
)
def test_what_is_no_checkpoint_is_told(tmp_path, data, words):
    path = tmp_path / "a" / "edm.pt"
    path.write_bytes(data)
    assert words in refusal(path)


def test_folders_and_pipes_are_no_files(tmp_path):
    with pytest.raises(UserError, match="no such model"):
        importing.read(str(tmp_path))
    pipe = tmp_path / "a" / "pipe.pt"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="no such model"):
        importing.read(str(pipe))


STATE = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(3).half()}


def written(how: str, path: Path) -> bytes:
    if how == "safetensors":
        return bytes(save(STATE))
    if how == "pickle":
        network = foreign_files.persistent("EDMPrecond", 16, 3, sigma_data=0.5)
        network.weight = torch.nn.Parameter(STATE["w"])
        return foreign_files.dump(path, network).read_bytes()
    return foreign_files.state_file(path, STATE, zipped=how == "zip").read_bytes()


@pytest.mark.parametrize("how", ["zip", "before zip", "pickle", "safetensors"])
def test_wherever_a_file_is_cut_a_line_says_so(tmp_path, monkeypatch, how):
    monkeypatch.setattr(foreign_pickle, "_limit", lambda size: None)
    path = tmp_path / "a" / "edm.pt"
    data = written(how, path)
    for length in sorted({*range(0, len(data), max(1, len(data) // 60)), len(data) - 1}):
        path.write_bytes(data[:length])
        if how == "safetensors":
            assert refusal(path)
        else:
            code, said = child(path)
            assert code == 2
            assert said.isprintable()


@pytest.mark.parametrize("how", ["zip", "before zip", "pickle"])
def test_any_change_of_a_byte_is_read_or_refused(tmp_path, monkeypatch, how):
    monkeypatch.setattr(foreign_pickle, "_limit", lambda size: None)
    path = tmp_path / "a" / "edm.pt"
    data = written(how, path)
    chance = random.Random(0)
    codes = set()
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(chance.choice([1, 1, 2, 8])):
            changed[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(changed)
        codes.add(child(path)[0])
    assert codes == {0, 2}


def test_the_reader_is_told_no_secrets(tmp_path):
    ours = {"PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "s", "PYTHONPATH": "/x", "PYTHONSTARTUP": "y"}
    assert foreign_file._environment(ours, Path("/code")) == {
        "PATH": "/bin", "PYTHONPATH": "/code:/x", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip


def test_the_process_that_reads_a_pickle_has_no_torch_and_no_unpickler_in_use():
    root = Path(foreign_pickle.__file__).parent
    for name in ("foreign_pickle.py", "inert_pickle.py"):
        source = (root / name).read_text()
        assert "import torch" not in source
        assert "import pickle\n" not in source
