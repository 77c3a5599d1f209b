"""Every check on every supported pair of Python and JAX: `pip install nox && nox`."""

import nox

nox.options.sessions = ["lint", "oldest", "newest"]


@nox.session(python="3.11")
def lint(session):
    """Format, lint and types."""
    session.install("-e", ".[test]", "-c", "constraints.txt")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("pyright")


@nox.session(python="3.11")
def oldest(session):
    """The oldest pair: Python 3.11 and jax 0.10.2."""
    session.install("-e", ".[test]", "jax==0.10.2", "-c", "constraints.txt")
    session.run("pytest", *session.posargs)


@nox.session(python=["3.12", "3.13"])
def newest(session):
    """The newest pair: whatever the package index serves."""
    session.install("-e", ".[test]", "--upgrade-strategy", "eager", "--upgrade")
    session.run("pytest", *session.posargs)
