"""The one trainer: everything that learns by gradient steps goes through it."""

import collections
import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtl_jax import tree as mtl_tree
from mtl_jax.train import fingerprint, sharding
from mtl_jax.train.diagnose import nonfinite_error
from mtl_jax.train.feed import Data, Feed
from mtl_jax.train.signals import Interrupted, StopRequest
from mtl_jax.train.state import TrainState, abstract_state, init_state, merge
from mtl_jax.train.step import make_step
from mtl_jax.train.trainable import Trainable
from mtl_jax.train.writers import MetricLog, Record

Progress = Callable[[int, int, dict[str, float]], None]
EvalFn = Callable[[chex.ArrayTree], dict[str, float]]

_IN_FLIGHT = 2  # Steps the host runs ahead of the metrics it has read.


class FitResult(NamedTuple):
    """What `Trainer.fit` returns.

    Attributes:
      params: the whole tree of parameters, frozen leaves included.
      state: the final state; its arrays are those of `params`.
      history: one dict per record, with `step` and metrics, as in `metrics.jsonl`.
    """

    params: chex.ArrayTree
    state: TrainState
    history: list[Record]


class Trainer:
    """Compiles one step and runs it, as often and on as much data as asked.

    The step is compiled on the first call and shared by all later ones, so a family
    of experts costs one compilation. The state is donated from step to step.

    Args:
      trainable: what to train.
      mesh: where; all devices on the axis "data" by default.
      accumulate: microbatches per step, run one after another.
      ema: decay of a float32 running average of the trained leaves, in (0, 1).

    Raises:
      ValueError: when an option is out of range, when the mesh does not fit, or when
        the rules do not cover or do not fit a leaf.
    """

    def __init__(
        self,
        trainable: Trainable,
        *,
        mesh: Mesh | None = None,
        accumulate: int = 1,
        ema: float | None = None,
    ):
        if accumulate < 1:
            raise ValueError(f"Trainer: accumulate wants >= 1, found {accumulate}")
        if ema is not None and not 0 < ema < 1:
            raise ValueError(f"Trainer: ema wants a decay in (0, 1), found {ema}")
        self.trainable = trainable
        self.mesh = sharding.make_mesh() if mesh is None else mesh
        sharding.check_mesh("Trainer", self.mesh)
        self.accumulate = accumulate
        self.ema = ema
        self.abstract_state = abstract_state(trainable, self.mesh, ema=ema is not None)
        self.compiled_step = jax.jit(
            make_step(trainable, self.mesh, accumulate=accumulate, ema=ema),
            donate_argnums=0,
            out_shardings=(
                jax.tree.map(lambda x: x.sharding, self.abstract_state),
                NamedSharding(self.mesh, PartitionSpec()),
            ),
        )
        self._start = jax.jit(
            lambda params, key: init_state(trainable, params, key, ema=ema is not None),
            out_shardings=jax.tree.map(lambda x: x.sharding, self.abstract_state),
        )
        self._init = jax.jit(trainable.init, out_shardings=self._param_shardings())

    def init_state(self, seed: int = 0, params: Any = None) -> TrainState:
        """The state before step 0; `params` are copied, never donated.

        Args:
          seed: seeds both `trainable.init` and the keys of the steps.
          params: start here instead of at `trainable.init`.

        Raises:
          ValueError: naming the leaf, when `params` differ in structure, shape or
            dtype from what `trainable.init` makes.
        """
        init_key, run_key = jax.random.split(jax.random.key(seed))
        if params is None:
            params = self._init(init_key)
        else:
            like = merge(self.abstract_state.params, self.abstract_state.frozen)
            mtl_tree.check_match(
                "fit", like, params, reference_name="init", other_name="params"
            )
            for (path, x), wanted in zip(
                jax.tree_util.tree_leaves_with_path(params),
                jax.tree.leaves(like),
                strict=True,
            ):
                if x.dtype != wanted.dtype:
                    raise ValueError(
                        f"fit: {mtl_tree.path_str(path)!r} is {x.dtype} in params, "
                        f"{wanted.dtype} in init"
                    )
            params = sharding.place(params, self._param_shardings())
        return self._start(params, run_key)

    def step(
        self, state: TrainState, batch: Any
    ) -> tuple[TrainState, dict[str, chex.Array]]:
        """Runs one step; `state` is donated, `batch` may be on the host."""
        return self.compiled_step(
            state, sharding.shard_batch(self.mesh, batch, accumulate=self.accumulate)
        )

    def fit(
        self,
        data: Data,
        *,
        steps: int,
        seed: int = 0,
        params: Any = None,
        workdir: Any = None,
        checkpoint_every: int | None = None,
        keep: int = 2,
        log_every: int = 10,
        progress: Progress | None = None,
        eval_fn: EvalFn | None = None,
        eval_every: int | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> FitResult:
        """Trains up to `steps` optimizer steps, from the newest checkpoint if any.

        With a `workdir`, the last step is always saved; SIGTERM and SIGINT save at the
        next step boundary and end the process with code 143 or 130; several processes
        look for each other's signals every `log_every` steps and at the end. The same
        call then goes on bit for bit on the same devices; a finished run is read back.

        A workdir belongs to one run. Another seed, optimizer chain, `accumulate`,
        `ema`, frozen set, batch shape or `identity` is refused. What a checkpoint
        cannot know, such as a learning rate inside `tx`, the data or the loss, is
        compared only as far as `identity` tells it.

        Args:
          data: batches: an iterable, one with `get_state`/`set_state`, or a function
            `batch(step)`; on several processes, each hands in its own part.
          steps: total number of optimizer steps.
          seed: of initial parameters and of the keys given to the loss.
          params: initial parameters instead of `trainable.init`; not changed.
          workdir: folder for checkpoints, `metrics.jsonl` and TensorBoard events.
          checkpoint_every: steps between checkpoints; None saves at the end only.
          keep: newest checkpoints kept.
          log_every: steps between records of the training metrics.
          progress: called as `progress(step, steps, metrics)` after every step.
          eval_fn: `eval_fn(params) -> metrics`, on the average when there is one;
            recorded under `eval/...`.
          eval_every: steps between evaluations; None evaluates at the end only.
          identity: plain data that tells this run from others, such as its config.

        Returns:
          Parameters, state and history.

        Raises:
          ValueError: on bad arguments, data that end early, or a checkpoint that is
            damaged, of another shape or of another run (naming what differs).
          NonFiniteError: when a loss or gradient is not finite.
          Interrupted: a SystemExit, after a signal.
        """
        _check_counts(
            steps=steps,
            log_every=log_every,
            checkpoint_every=checkpoint_every,
            eval_every=eval_every,
        )
        if checkpoint_every is not None and workdir is None:
            raise ValueError("fit: checkpoint_every wants a workdir")
        with contextlib.ExitStack() as stack:
            run = _Run(self, Feed(data), steps, seed, workdir, keep, stack)
            run.log_every, run.progress = log_every, progress
            run.checkpoint_every = checkpoint_every
            run.eval_fn, run.eval_every = eval_fn, eval_every
            run.begin(params, identity)
            return run.loop()

    def _param_shardings(self) -> Any:
        whole = merge(self.abstract_state.params, self.abstract_state.frozen)
        return jax.tree.map(lambda x: x.sharding, whole)


class _Run:
    """One call of `fit`: the state, what is in flight, and the open files."""

    log_every: int
    checkpoint_every: int | None
    eval_every: int | None
    progress: Progress | None
    eval_fn: EvalFn | None

    def __init__(
        self,
        trainer: Trainer,
        feed: Feed,
        steps: int,
        seed: int,
        workdir: Any,
        keep: int,
        stack: contextlib.ExitStack,
    ):
        self.trainer, self.feed, self.steps, self.seed = trainer, feed, steps, seed
        self.stack = stack
        self.workdir = None if workdir is None else epath.Path(workdir)
        self.checkpoints = None
        if self.workdir is not None:
            from mtl_jax.io.checkpoint import Checkpointer

            self.checkpoints = stack.enter_context(
                Checkpointer(self.workdir / "checkpoints", keep=keep)
            )
        self.in_flight = collections.deque()
        self.latest: dict[str, float] = {}
        self.batches: list[dict[str, str]] = []  # Each shape that was seen.

    def begin(self, params: Any, identity: Mapping[str, Any] | None) -> None:
        """Sets the state and the position in the data."""
        self.about = fingerprint.describe_run(
            self.trainer.abstract_state,
            seed=self.seed,
            accumulate=self.trainer.accumulate,
            ema=self.trainer.ema,
            identity=identity,
        )
        step = self.checkpoints.latest() if self.checkpoints else None
        if step is None:
            self.state = self.trainer.init_state(self.seed, params)
        else:
            assert self.checkpoints is not None
            meta = self.checkpoints.meta(step)
            fingerprint.refuse(self.workdir, meta.get("run", {}), self.about)
            if step > self.steps:
                raise ValueError(
                    f"fit: {self.workdir} holds a run of {step} steps, "
                    f"found steps={self.steps}"
                )
            self.state = self.checkpoints.restore(self.trainer.abstract_state, step)
            self.batches = meta["batches"]
            if step < self.steps:
                self.feed.restore(meta["data"], step)
        self.start = step or 0
        self.log = self.stack.enter_context(MetricLog(self.workdir, step=self.start))

    def look_at(self, batch: Any, index: int) -> None:
        """Notes the shape of a batch; the first of a resumed run must be known.

        A run whose batches have come in several shapes may meet one more of them.
        """
        found = fingerprint.describe_batch(batch)
        if index == self.start > 0 and len(self.batches) == 1:
            fingerprint.refuse(
                self.workdir, {"batch": self.batches[0]}, {"batch": found}
            )
        if found not in self.batches:
            self.batches.append(found)

    def loop(self) -> FitResult:
        stop = self.stack.enter_context(
            StopRequest(enabled=self.checkpoints is not None)
        )
        for index in range(self.start, self.steps):
            batch = sharding.shard_batch(
                self.trainer.mesh,
                self.feed.next(index),
                accumulate=self.trainer.accumulate,
            )
            self.look_at(batch, index)
            self.state, metrics = self.trainer.compiled_step(self.state, batch)
            self.in_flight.append((index + 1, metrics, batch))
            if len(self.in_flight) > _IN_FLIGHT:
                self.read_one()
            self.boundary(index + 1, stop)
        # A signal after the last boundary, or with no step left to run.
        number = self.agreed(stop.received, self.steps)
        if number:
            self.end(number, self.steps)
        state = self.state
        return FitResult(merge(state.params, state.frozen), state, self.log.records)

    def boundary(self, done: int, stop: StopRequest) -> None:
        """What may happen between two steps: evaluate, save, end."""
        last = done == self.steps
        number = self.agreed(stop.received, done)
        if (
            last
            or number
            or _due(self.eval_every, done)
            or _due(self.checkpoint_every, done)
        ):
            self.drain()
        if self.eval_fn and (last or _due(self.eval_every, done)):
            self.evaluate(done)
        if self.checkpoints is None:
            return
        if last or number or _due(self.checkpoint_every, done):
            meta = {
                "run": self.about,
                "batches": self.batches,
                "data": self.feed.get_state(),
            }
            self.checkpoints.save(done, self.state, meta)
        if last or number:
            self.checkpoints.wait()
        if number:
            self.end(number, done)

    def end(self, number: int, done: int) -> None:
        """Says where the run stands and ends the process."""
        error = Interrupted(number, done)
        if jax.process_index() == 0:
            sys.stderr.write(f"{error}\n")
        raise error

    def agreed(self, received: int | None, done: int) -> int:
        """The signal to act on now, the same on every process.

        Several processes ask each other only where they log anyway.
        """
        if jax.process_count() == 1:
            return received or 0
        now = done == self.steps or _due(self.log_every, done)
        if self.checkpoints is None or not now:
            return 0
        from jax.experimental import multihost_utils

        return int(np.max(multihost_utils.process_allgather(np.int32(received or 0))))

    def drain(self) -> None:
        while self.in_flight:
            self.read_one()

    def read_one(self) -> None:
        """Waits for the oldest step in flight and reports it."""
        done, metrics, batch = self.in_flight.popleft()
        host = {name: x.item() for name, x in jax.device_get(metrics).items()}
        host = {"loss": host.pop("loss"), **host}
        if not host.pop("finite"):
            raise nonfinite_error(
                self.trainer.trainable, self.state, batch, host, self.workdir
            )
        self.latest.update(host)
        if done % self.log_every == 0 or done == self.steps:
            self.log.write(done, host)
        if self.progress:
            self.progress(done, self.steps, dict(self.latest))

    def evaluate(self, done: int) -> None:
        assert self.eval_fn is not None
        state = self.state
        params = state.params
        if state.ema is not None:
            params = jax.tree.map(lambda e, p: e.astype(p.dtype), state.ema, params)
        found = self.eval_fn(merge(params, state.frozen))
        metrics = {f"eval/{name}": float(value) for name, value in found.items()}
        self.log.write(done, metrics)
        self.latest.update(metrics)


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"fit: {name} wants at least 1, found {count}")


def _due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0
