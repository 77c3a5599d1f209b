import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from mtl_jax.checkpoints.source import TensorSpec, open_source
from mtl_jax.checkpoints.writer import CheckpointWriter

pytestmark = pytest.mark.fast

DTYPES = [
    np.float32,
    np.float64,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    np.int64,
    np.int32,
    np.uint8,
    np.bool_,
]
SHARDS = pytest.mark.parametrize("shard_bytes", [1 << 40, 300])


def tensors(seed=0):
    """One of each dtype, and awkward shapes."""
    rng = np.random.default_rng(seed)
    values = {
        f"t{i}": (9 * rng.normal(size=(5, 7))).astype(dtype)
        for i, dtype in enumerate(DTYPES)
    }
    return values | {
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float16(seed + 0.5).reshape(()),
        "one": np.full((1, 1), seed, np.int64),
    }


def specs(values):
    return {name: TensorSpec(x.shape, x.dtype) for name, x in values.items()}


def fill(writer, values, names=None, step=11):
    for name in values if names is None else names:
        if name not in writer.done:
            flat = values[name].reshape(-1)
            for start in range(0, flat.size, step):
                writer.write(name, start, flat[start : start + step])


def make(out, values, **options):
    files = {"config.json": b"{}", "tokenizer.json": b"[1]"}
    with CheckpointWriter(out, specs(values), **{"plan": "p", **options}) as writer:
        fill(writer, values)
        writer.finish(files)
    return contents(out)


def contents(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def whole(folder):
    """Whether programs that load checkpoints would take a folder for one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
        return all((folder / file).exists() for file in files)
    return (folder / "model.safetensors").exists()


def assert_holds(folder, values):
    source = open_source(folder)
    assert set(source) == set(values)
    for name, value in values.items():
        assert source[name].whole().dtype == value.dtype
        np.testing.assert_array_equal(source[name].whole(), value)


@SHARDS
def test_what_was_written_is_read(tmp_path, shard_bytes):
    files = make(tmp_path / "new/out", tensors(), shard_bytes=shard_bytes)
    out = tmp_path / "new/out"
    assert_holds(out, tensors())
    assert files["config.json"] == b"{}" and files["tokenizer.json"] == b"[1]"
    weights = sorted(name for name in files if name.endswith(".safetensors"))
    index = files.get("model.safetensors.index.json")
    if index is None:
        assert weights == ["model.safetensors"] and len(files) == 3
    else:
        total = len(weights)
        numbers = range(1, total + 1)
        assert weights == [f"model-{i:05}-of-{total:05}.safetensors" for i in numbers]
        nbytes = sum(x.nbytes for x in tensors().values())
        assert total > 2 and len(files) == total + 3
        assert json.loads(index)["metadata"] == {"total_size": nbytes}


@SHARDS
def test_other_libraries_read_it(tmp_path, shard_bytes):
    safetensors = pytest.importorskip("safetensors.numpy")
    make(tmp_path, tensors(), shard_bytes=shard_bytes)
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        with safetensors.safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            names = [n for n in file.keys() if n not in ("t4", "t5")]  # noqa: SIM118
            found |= {n: file.get_tensor(n) for n in names if n != "t3"}
    for name, value in found.items():
        np.testing.assert_array_equal(value, tensors()[name])
    assert len(found) == len(tensors()) - 3


@hypothesis.given(st.randoms(use_true_random=False), st.integers(1, 40))
@hypothesis.settings(max_examples=15)
def test_order_and_chunks_do_not_matter(tmp_path_factory, random, step):
    values, folder = tensors(), tmp_path_factory.mktemp("out")
    wanted = make(folder / "a", values, shard_bytes=300)
    chunks = [
        (name, start, value.reshape(-1)[start : start + step])
        for name, value in values.items()
        for start in range(0, value.size, step)
    ]
    random.shuffle(chunks)
    with CheckpointWriter(
        folder / "b", specs(values), plan="p", shard_bytes=300, buffer_bytes=64
    ) as writer:
        threads = [
            threading.Thread(
                target=lambda i=i: [writer.write(*c) for c in chunks[i::3]]
            )
            for i in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.finish({"config.json": b"{}", "tokenizer.json": b"[1]"})
    assert contents(folder / "b") == wanted


CHILD = """
import sys
import numpy as np
from mtl_jax.checkpoints.writer import CheckpointWriter
out, path, shard_bytes = sys.argv[1:]
with np.load(path) as file:
    values = dict(file)
from mtl_jax.checkpoints.source import TensorSpec
specs = {n: TensorSpec(x.shape, x.dtype) for n, x in values.items()}
writer = CheckpointWriter(out, specs, plan="p", shard_bytes=int(shard_bytes))
for name in ("a", "b"):
    writer.write(name, 0, values[name].reshape(-1))
writer.write("c", 0, values["c"][:500])
writer._spool.drain()
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_killed_run_is_continued(tmp_path, shard_bytes=5000):
    rng = np.random.default_rng(0)
    values = {n: rng.normal(size=1000).astype(np.float32) for n in "abcd"}
    out, data = tmp_path / "out", tmp_path / "values.npz"
    np.savez(data, **values)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out), str(data), str(shard_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=pathlib.Path(__file__).parents[2],
    )
    with child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        with pytest.raises(ValueError, match="another process is writing there"):
            make(out, values, shard_bytes=shard_bytes)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert not whole(out) and all(name.startswith(".") for name in contents(out))
    with CheckpointWriter(
        out, specs(values), plan="p", shard_bytes=shard_bytes
    ) as writer:
        assert writer.done == {"a", "b"}
        with pytest.raises(ValueError, match="'a' is done already"):
            writer.write("a", 0, values["a"])
        fill(writer, values)
        writer.finish({"config.json": b"{}", "tokenizer.json": b"[1]"})
    assert contents(out) == make(tmp_path / "other", values, shard_bytes=shard_bytes)


class Killed(BaseException):
    """As if the process had ended there."""


CALLS = ("rename", "unlink", "fsync", "pwrite", "write")


class Countdown:
    """Lets so many calls of the operating system happen, and then none."""

    def __init__(self, patch, left):
        self.left = left
        for name in CALLS:
            patch.setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, call):
        def wrapped(*args, **kwargs):
            if self.left <= 0:
                raise Killed
            self.left -= 1
            return call(*args, **kwargs)

        return wrapped


@pytest.mark.parametrize("replaces", [False, True])
@SHARDS
def test_no_moment_leaves_what_looks_whole(
    tmp_path, monkeypatch, shard_bytes, replaces
):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # It is slow.
    values, old = tensors(), tensors(1)
    names = ["t0", "t3", "t6", "empty", "t8"]
    values, old = ({n: v[n] for n in names} for v in (values, old))
    options = {"shard_bytes": shard_bytes, "overwrite": replaces}
    wanted = make(tmp_path / "wanted", values, **options)
    if replaces:
        make(tmp_path / "old", old, shard_bytes=shard_bytes)
    for left in range(1000):
        out = tmp_path / str(left)
        if replaces:
            shutil.copytree(tmp_path / "old", out)
        killed = False
        with pytest.MonkeyPatch.context() as patch:
            Countdown(patch, left)
            try:
                make(out, values, **options)
            except Killed:
                killed = True
        if out.exists() and whole(out):
            # Only ever all of the one or all of the other.
            held = open_source(out)["t0"].whole()
            is_old = np.array_equal(held, old["t0"])
            assert_holds(out, old if is_old else values)
            shown = {n: x for n, x in contents(out).items() if not n.startswith(".")}
            assert (replaces and is_old) or shown == wanted
        if not killed:
            break
        assert make(out, values, **options) == wanted
    assert left > 15


def test_torn_or_false_journals_are_not_believed(tmp_path):
    values = {n: np.arange(50, dtype=np.float32) for n in "abc"}
    with CheckpointWriter(tmp_path, specs(values), plan="p") as writer:
        fill(writer, values)
    partial, journal = (
        tmp_path / ".model.safetensors.partial",
        tmp_path / ".mtl_jax_journal",
    )
    raw, lines = partial.read_bytes(), journal.read_bytes()

    def done():
        with CheckpointWriter(tmp_path, specs(values), plan="p") as writer:
            return writer.done

    assert done() == {"a", "b", "c"}
    journal.write_bytes(lines[:-3])
    assert done() == {"a", "b"}
    assert done() == {"a", "b"}  # The torn line is gone, and nothing hangs on to it.
    changed = bytearray(raw)
    changed[-1 - 200] ^= 1  # In b.
    partial.write_bytes(changed)
    assert done() == {"a"}
    partial.write_bytes(raw[:-1])
    assert done() == frozenset()


def test_another_plan_or_layout_is_refused(tmp_path):
    values = tensors()
    with CheckpointWriter(tmp_path, specs(values), plan="p") as writer:
        fill(writer, values)
    for options in ({"plan": "q"}, {"shard_bytes": 300}, {"metadata": {"a": "b"}}):
        with pytest.raises(ValueError, match="unfinished write of another plan"):
            make(tmp_path, values, **options)
    with CheckpointWriter(tmp_path, specs(values), plan="p") as writer:
        assert writer.done == set(values)
    make(tmp_path, values, plan="q", shard_bytes=300, overwrite=True)
    assert_holds(tmp_path, values)
    assert not list(tmp_path.glob(".*"))


def test_a_finished_checkpoint_is_not_lost(tmp_path):
    before = make(tmp_path, tensors())
    with pytest.raises(ValueError, match=r"holds a checkpoint \(model\.safetensors\)"):
        make(tmp_path, tensors(1))
    assert contents(tmp_path) == before
    make(tmp_path, tensors(1), overwrite=True, shard_bytes=300)
    assert_holds(tmp_path, tensors(1))
    make(tmp_path, tensors(2), overwrite=True)
    assert_holds(tmp_path, tensors(2))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_nothing_of_a_replaced_checkpoint_is_mixed_in(tmp_path):
    """Its tokenizer and its bank go with it; files that are no part of it stay."""
    specs = {"w": TensorSpec((2,), np.dtype(np.float32))}
    old = {"config.json", "tokenizer.json", "vocab.txt", "chat_template.jinja"}
    old |= {"bank.json", "task.0123456789ab.config.json"}
    for number, names in enumerate((old, {"config.json", "tokenizer.json"})):
        with CheckpointWriter(tmp_path, specs, plan="p", overwrite=True) as writer:
            writer.write("w", 0, np.ones(2, np.float32))
            writer.finish(dict.fromkeys(names, str(number).encode()))
        (tmp_path / "task.py").write_text("mine")
    (tmp_path / "model.safetensors").unlink()
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    wanted = {"config.json": "1", "tokenizer.json": "1", "task.py": "mine"}
    assert found == wanted


def test_what_was_not_written_is_named(tmp_path):
    values = tensors()
    with CheckpointWriter(tmp_path, specs(values), plan="p") as writer:
        fill(writer, values, [n for n in values if n not in ("t2", "scalar")])
        writer.write("t2", 0, values["t2"].reshape(-1)[:34])
        with pytest.raises(ValueError, match="not written completely: 'scalar', 't2'"):
            writer.finish()
        fill(writer, values, ["scalar"])
        writer.write("t2", 34, values["t2"].reshape(-1)[34:])
        writer.finish()
    assert_holds(tmp_path, values)


def test_chunks_that_do_not_fit_are_refused(tmp_path):
    values = {"a": np.arange(6, dtype=np.float32)}
    with CheckpointWriter(tmp_path, specs(values), plan="p") as writer:
        for name, start, chunk, message in [
            ("b", 0, values["a"], "'b' is not in the specs"),
            ("a", 0, values["a"].astype(np.float64), "wants a flat chunk of float32"),
            ("a", 0, values["a"].reshape(2, 3), r"found float32\[2, 3\]"),
            ("a", 1, values["a"], "has 6 entries, found 1 to 7"),
            ("a", -1, values["a"][:2], "has 6 entries, found -1 to 1"),
        ]:
            with pytest.raises(ValueError, match=message):
                writer.write(name, start, chunk)
        writer.write("a", 2, values["a"][2:4])
        with pytest.raises(ValueError, match="3 to 5 was written before"):
            writer.write("a", 3, values["a"][3:5])
        writer.write("a", 6, values["a"][6:])
        writer.write("a", 4, values["a"][::-1][:2][::-1])
        writer.write("a", 0, values["a"][:2])
        writer.finish()
    assert_holds(tmp_path, values)


def no_room(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_found_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    out = tmp_path / "out"
    with pytest.raises(OSError, match=r"cannot write .*out: No space left") as caught:
        CheckpointWriter(out, specs(tensors()), plan="p")
    assert "\n" not in str(caught.value) and not out.exists()


def test_a_disk_that_fills_up_is_reported_and_can_be_continued(tmp_path, monkeypatch):
    values = tensors()
    real, calls = os.pwrite, []

    def pwrite(*args):
        calls.append(args)
        return real(*args) if len(calls) < 9 else no_room()

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match=r"cannot write .*: No space left") as caught:
        make(tmp_path, values)
    assert "\n" not in str(caught.value)
    assert not whole(tmp_path)
    monkeypatch.setattr(os, "pwrite", real)
    with CheckpointWriter(tmp_path, specs(values), plan="p") as writer:
        assert "t0" in writer.done and "t9" not in writer.done
    assert make(tmp_path, values) == make(tmp_path / "other", values)


def test_a_disk_that_reserves_nothing_is_asked_for_its_room(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    make(tmp_path / "out", tensors())
    assert_holds(tmp_path / "out", tensors())
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="no room for"):
        CheckpointWriter(tmp_path / "full", specs(tensors()), plan="p")
    assert not (tmp_path / "full").exists()


def test_where_nothing_may_be_written(tmp_path, monkeypatch):
    def denied(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    if os.geteuid():
        (tmp_path / "out").mkdir(mode=0o500)
    else:  # Nothing is forbidden to root.
        monkeypatch.setattr(os, "open", denied)
    with pytest.raises(OSError, match=r"cannot write .*Permission denied"):
        CheckpointWriter(tmp_path / "out", specs(tensors()), plan="p")
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file: File exists"):
        CheckpointWriter(tmp_path / "file", specs(tensors()), plan="p")
    with pytest.raises(ValueError, match="wants a local folder"):
        CheckpointWriter("gs://bucket/out", specs(tensors()), plan="p")


def test_files_beside_the_weights(tmp_path):
    values = {"a": np.zeros(3, np.float32)}
    (tmp_path / "source").write_bytes(b"words")
    with CheckpointWriter(tmp_path / "out", specs(values), plan="p") as writer:
        fill(writer, values)
        for name in ("../x", "/tmp/x"):
            with pytest.raises(ValueError, match="is no name of a file"):
                writer.finish({name: b""})
        with pytest.raises(OSError, match=r"No such file .*\(.*gone\)"):
            writer.finish({"x": tmp_path / "gone"})
        assert not whole(tmp_path / "out")
        writer.finish({"vocab.txt": tmp_path / "source", "sub/x.json": b"1"})
    found = contents(tmp_path / "out")
    assert found.pop("model.safetensors")
    assert found == {"vocab.txt": b"words", "sub/x.json": b"1"}


def test_nothing_to_write_and_wrong_sizes(tmp_path):
    with pytest.raises(ValueError, match="no tensors to write"):
        CheckpointWriter(tmp_path / "out", {}, plan="p")
    with pytest.raises(ValueError, match="shard_bytes wants at least 1, found 0"):
        CheckpointWriter(tmp_path / "out", specs(tensors()), plan="p", shard_bytes=0)
    complex128 = {"a": TensorSpec((1,), np.dtype(np.complex128))}
    with pytest.raises(ValueError, match="'a' has dtype complex128"):
        CheckpointWriter(tmp_path / "out", complex128, plan="p")
    assert not (tmp_path / "out").exists()


def test_errors_of_the_thread_are_raised_and_end_it(tmp_path, monkeypatch):
    values = {n: np.zeros(10, np.float32) for n in "ab"}
    threads = threading.active_count()
    writer = CheckpointWriter(tmp_path, specs(values), plan="p")
    monkeypatch.setattr(os, "pwrite", no_room)
    with pytest.raises(OSError, match="No space"), writer:
        for start in range(10):
            writer.write("a", start, values["a"][start : start + 1])
        writer.finish()
    assert threading.active_count() == threads
    with pytest.raises(OSError, match="No space"):
        writer.write("b", 0, values["b"])


def held(kind):
    """Bytes of this process in memory: RssAnon = of no file, RssFile = mapped."""
    with open("/proc/self/status") as f:
        found = [line.split()[1] for line in f if line.startswith(f"{kind}:")]
    return int(found[0]) << 10


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_memory_is_bounded_by_the_buffer(tmp_path):
    chunk, count, buffer = 1 << 20, 50, 8 << 20  # 200 MB of float32.
    spec = {"a": TensorSpec((count * chunk,), np.dtype(np.float32))}
    before, peak = held("RssAnon"), 0
    with CheckpointWriter(
        tmp_path, spec, plan="p", shard_bytes=1 << 40, buffer_bytes=buffer
    ) as writer:
        for i in range(count):
            writer.write("a", i * chunk, np.full(chunk, i, np.float32))
            peak = max(peak, held("RssAnon") - before)
        writer.finish()
        peak = max(peak, held("RssAnon") - before)
    assert peak <= buffer + 4 * 4 * chunk
    source, before, mapped = open_source(tmp_path), held("RssAnon"), held("RssFile")
    for i in range(count):
        assert float(source["a"].flat(i * chunk, (i + 1) * chunk).sum()) == i * chunk
    assert held("RssAnon") - before <= 4 * chunk
    assert held("RssFile") - mapped <= 80 << 20
    (tmp_path / "model.safetensors").unlink()


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard_bytes", [1 << 40, 2000])
def test_transformers_loads_it(tmp_path, shard_bytes):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=8,
            intermediate_size=12,
            vocab_size=11,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    model.save_pretrained(tmp_path / "in")
    source = open_source(tmp_path / "in")
    with CheckpointWriter(
        tmp_path / "out", source.specs, plan="p", shard_bytes=shard_bytes
    ) as writer:
        for name, view in source.items():
            writer.write(name, 0, view.flat(0, view.spec.size))
        with pytest.raises(OSError):
            transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
        writer.finish(source.side_files)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    wanted = model.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, wanted[name])
