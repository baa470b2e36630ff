"""Pickles that would run code, crash their reader, or keep it busy for ever."""

import pickle
from functools import partial
from pathlib import Path

from tests.hostile.case import Case
from tests.hostile.pickling import (
    before,
    call,
    mapping,
    model,
    named,
    number,
    tensor,
    text,
    zipped,
)

_FILE = "pytorch_model.bin"


def _mark(root: Path) -> bytes:
    """Return a command that leaves a trace."""
    return text(f"touch {root}/ran")


# what is called, with a command, a path or a line of Python
_CALLS = (
    "posix.system", "os.popen", "nt.system", "subprocess.Popen", "subprocess.check_output", "pty.spawn",
    "builtins.eval", "builtins.exec", "__builtin__.eval", "builtins.compile", "builtins.__import__",
    "builtins.open", "builtins.getattr", "builtins.globals", "importlib.import_module", "runpy.run_path",
    "code.interact", "shutil.rmtree", "os.remove", "os.chmod", "webbrowser.open",
    "urllib.request.urlopen", "socket.create_connection", "ctypes.CDLL", "pickle.loads", "_pickle.loads",
    "marshal.loads", "functools.partial", "operator.methodcaller", "torch.load", "torch.jit.load",
    "torch.hub.load", "torch.storage._load_from_bytes", "torch.classes.load_library",
    "torch.utils.collect_env.run", "torch._inductor.codecache.compile_file", "torch.save",
    "torch.serialization.add_safe_globals", "torch.FloatTensor", "torch.from_file",
    "torch.nn.modules.linear.Linear", "numpy.load", "numpy.core.multiarray._reconstruct",
    "numpy.f2py.crackfortran.myeval", "pathlib.PosixPath", "transformers.AutoModel.from_pretrained",
    "argparse.FileType", "collections.namedtuple", "collections.defaultdict",
)  # fmt: skip


def _calling(root: Path, *, name: str) -> list[str]:
    """Call a name with one argument, beside a matrix."""
    return ["inspect", str(zipped(root / "input" / _FILE, model(x=call(name, _mark(root)))))]


def _earlier(root: Path, *, name: str) -> list[str]:
    return ["inspect", str(before(root / "input" / _FILE, model(x=call(name, _mark(root)))))]


def _within(root: Path) -> list[str]:
    """Put a pickle into a pickle."""
    inner = pickle.dumps(b"cposix\nsystem\n", 2)
    inside = call("_codecs.encode", text(inner.decode("latin1")), text("latin1"))
    return [
        "inspect",
        str(zipped(root / "input" / _FILE, model(x=call("torch.storage._load_from_bytes", inside)))),
    ]


def _written(root: Path, *, pickled: bytes, old: bool = False) -> list[str]:
    return ["inspect", str((before if old else zipped)(root / "input" / _FILE, pickled))]


_ENDLESS = b"]" * 5_000_001
_SYSTEM = named("posix.system")
_OBJECTS = "it holds objects or instructions beside tensors, and opening that could run code"
# name, instructions that leave something beside the matrix, what must be said
_REFUSED: tuple[tuple[str, bytes, str], ...] = (
    ("state for a module", named("sys.modules") + b"}b", "sys.modules"),
    ("state for a function of torch's", named("torch._utils._rebuild_tensor_v2") + b"}b", _OBJECTS),
    ("state for a tensor", tensor() + b"}b", _OBJECTS),
    ("state for text", text("a") + b"}b", _OBJECTS),
    ("an instance in the old way", b"(" + text("id") + b"iposix\nsystem\n", _OBJECTS),
    ("an object in the old way", b"(" + _SYSTEM + b"o", "posix.system"),
    ("a name from the stack", text("posix") + text("system") + b"\x93", _OBJECTS),
    ("an extension", b"\x82\x01", _OBJECTS),
    ("a buffer from outside", b"\x97", _OBJECTS),
    ("a call of text", text("id") + b")R", _OBJECTS),
    ("a call of a storage's class", call("torch.FloatStorage", number(10**12)), "is broken"),
    ("a call with no tuple", named("collections.OrderedDict") + b"]R", _OBJECTS),
    ("a new object of another class", named("torch.Tensor") + b")\x81", "is broken"),
    ("another persistent object", b"(" + text("module") + b"tQ", "is broken"),
    ("persistent text", text("storage") + b"Q", "is broken"),
    ("a name of many dots", named("os.path.os.system"), "os.path.os.system"),
    ("a name with an escape", named("os\x1b[31m.system"), "[31m.system"),
    ("a name of 100 kB", named("o" * 100_000 + ".system"), "ooo"),
    ("a name that is no text", b"c\xff\xfe\nsystem\n", "is broken"),
    ("a name without an end", b"cposix", "posix"),
    ("text longer than the file", b"X\xff\xff\xff\xff", "is broken"),
    ("nothing remembered", b"h\x07", "is broken"),
    ("an item for a tuple", b")" + text("a") + b"a", "is broken"),
    ("an entry for a list", b"]" + text("a") + text("b") + b"s", "is broken"),
    ("half an entry", b"}(" + text("a") + b"u", "is broken"),
    ("items without a mark", b"]e", "is broken"),
    ("a key twice", mapping({"a": b"N"})[:-1] + text("a") + b"Nu", "the key 'a' twice"),
    ("a million arguments", named("collections.OrderedDict") + b"(" + b"N" * 1_000_000 + b"tR", "is broken"),
    ("five million instructions", _ENDLESS, "more than 5,000,000 instructions"),
    ("text of 70 MB", text("x" * 70_000_000), "larger than 64,000,000 bytes"),
)  # fmt: skip

# name, instructions: torch's own reader crashes on them, hangs or takes all memory; here the matrix is found
_HARMLESS: tuple[tuple[str, bytes], ...] = (
    ("punycode of 200,000 letters",
     call("_codecs.encode", text("".join(map(chr, range(0x4E00, 0x9E00))) * 10), text("punycode"))),
    ("a key nested a million deep", b"})" + b"\x85" * 1_000_000 + b"Ns"),
    ("a list nested a million deep", b"]" * 1_000_000 + b"a" * 999_999),
    ("a terabyte of zeros", call("builtins.bytearray", number(10**12))),
    ("50,000 copies of a megabyte",
     b"(" + text("x" * 1_000_000) + b"\x85q\x01" + (named("builtins.bytearray") + b"h\x01R") * 50_000 + b"t"),
    ("100,000 copies of a long list",
     b"((" + b"N" * 100_000 + b"t\x85q\x01" + (named("builtins.set") + b"h\x01R") * 100_000 + b"t"),
    ("an entry far off in the memory", b"Nr\xff\xff\xff\xff"),
    ("a mapping that holds itself", b"}q\x01(" + b"".join(
        text(name) + b"h\x01" for name in ("model", "module", "state_dict", "net", "params")) + b"u"),
    ("a method replaced", call("collections.OrderedDict") + mapping({"items": named("torch.device")}) + b"b"),
    ("a number of 250 digits", number(10**250)),
)  # fmt: skip


def _beside(root: Path, *, value: bytes, old: bool = False) -> list[str]:
    return _written(root, pickled=model(x=value), old=old)


def _shown(name: str) -> str:
    return name.replace("__builtin__", "builtins")


def _case(name: str, build: partial[list[str]], *says: str) -> Case:
    return Case(f"pickle: {name}", "pickles", build, "refused", (_FILE, *says))


CASES: tuple[Case, ...] = (
    *(_case(f"{name} is called", partial(_calling, name=name), _shown(name)) for name in _CALLS),
    *(_case(f"{name} in an old file", partial(_earlier, name=name), name) for name in _CALLS[:4]),
    _case("a pickle in a pickle", partial(_within), "torch.storage._load_from_bytes"),
    *(_case(name, partial(_beside, value=value), words) for name, value, words in _REFUSED),
    _case(
        "five million instructions in an old file", partial(_beside, value=_ENDLESS, old=True), "more than"
    ),
    _case("nothing", partial(_written, pickled=b""), "is broken"),
    _case("an end and nothing else", partial(_written, pickled=b"."), "is broken"),
    _case("no end", partial(_written, pickled=model()[:-1]), "is broken"),
    *(
        Case(f"pickle: {name}", "pickles", partial(_beside, value=value), "told", ("gate_proj",))
        for name, value in _HARMLESS
    ),
)
