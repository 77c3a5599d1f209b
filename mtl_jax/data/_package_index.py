"""A source archive from the package index, without running any of its code.

`pip download` executes an sdist's `setup.py` to learn its metadata, so archives are
taken through the index's simple API instead, with the index, certificate and proxy
that the user's pip is configured with.
"""

import ast
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request

_DEFAULT_TIMEOUT = 60.0


class IndexFailure(Exception):
    """The index could not serve the file; the text is one line for the user."""


def redact(text: str) -> str:
    """Removes credentials from URLs in `text` and keeps its first line."""
    return re.sub(r"//[^/@\s]*@", "//", text).strip().split("\n")[0]


@functools.cache
def _pip_config() -> dict[str, str]:
    """Pip's own settings, the more specific section winning."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False)
    found: dict[str, dict[str, str]] = {"global": {}, "download": {}, ":env:": {}}
    for line in listing.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in found and value[:1] in "'\"":
            found[section][name] = ast.literal_eval(value)
    return {**found["global"], **found["download"], **found[":env:"]}


def setting(name: str) -> str:
    """A pip option such as `index-url`, from PIP_* variables or pip's files."""
    variable = "PIP_" + name.upper().replace("-", "_")
    return os.environ.get(variable) or _pip_config().get(name, "")


def _local_folders() -> list[pathlib.Path]:
    """The find-links that are folders on this machine."""
    folders = []
    for link in setting("find-links").split():
        if link.startswith("file:"):
            link = urllib.request.url2pathname(urllib.parse.urlsplit(link).path)
        if "://" not in link:
            folders.append(pathlib.Path(link).expanduser())
    return folders


def download(name: str, filename: str, into: pathlib.Path) -> pathlib.Path:
    """Copies one archive of project `name` into the folder `into`.

    Raises:
      IndexFailure: no index client, no connection, or no such file.
    """
    target = into / filename
    for folder in _local_folders():
        if (folder / filename).is_file():
            shutil.copyfile(folder / filename, target)
            return target
    try:
        import pypi_simple
        import requests
    except ImportError as error:
        raise IndexFailure(
            "a source archive needs the package pypi-simple (mtl_jax[demo])"
        ) from error
    indexes = [setting("index-url") or pypi_simple.PYPI_SIMPLE_ENDPOINT]
    indexes += setting("extra-index-url").split()
    reason = "no index has that file"
    with requests.Session() as session:
        session.verify = setting("cert") or True
        if proxy := setting("proxy"):
            session.proxies = {"http": proxy, "https": proxy}
        for index in indexes:
            if not index.startswith(("http://", "https://")):
                continue
            timeout = float(setting("timeout") or _DEFAULT_TIMEOUT)
            try:
                client = pypi_simple.PyPISimple(index, session=session)
                page = client.get_project_page(name, timeout=timeout)
                for package in page.packages:
                    if package.filename == filename:
                        client.download_package(package, target, timeout=timeout)
                        return target
            except pypi_simple.NoSuchProjectError:
                continue
            except (requests.RequestException, pypi_simple.DigestMismatchError) as e:
                reason = f"{type(e).__name__}: {redact(str(e))}"
    raise IndexFailure(reason)
