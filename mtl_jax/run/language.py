"""Fine-tuning of a language model on domains: an adapter each, measured on all."""

import dataclasses
import hashlib
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mtl_jax import data, decoding, io, models, report, train, tree
from mtl_jax.data import corpora
from mtl_jax.data.instruct import encode_text
from mtl_jax.data.packing import Packed
from mtl_jax.run.experiment import Experiment
from mtl_jax.train import causal_lm, optim
from mtl_jax.transforms.quantization import nf4
from mtl_jax.zoo import language as zoo_language

BASE, BOTH = "before", "all adapters, averaged"
# Of a decoder over bytes; 256 ends a text.
BYTES = {"vocab_size": 257, "max_positions": 256}


class _Bytes:
    """A tokenizer without a file: the numbers are those of the bytes."""

    def encode(self, text: str, add_special_tokens: bool = False) -> Any:
        del add_special_tokens
        return dataclasses.make_dataclass("Encoding", ["ids"])(list(text.encode()))

    def decode(self, ids: Any, **options: Any) -> str:
        del options
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def _smollm2(options: dict[str, Any], progress: Any) -> zoo_language.LanguageModel:
    return zoo_language.smollm2(progress=progress.log, **options)


def _random(options: dict[str, Any], progress: Any) -> zoo_language.LanguageModel:
    """A decoder over bytes with random weights."""
    del progress
    module = models.Decoder(**{**BYTES, **options})
    start = jnp.zeros((1, 4), jnp.int32)
    params = jax.jit(module.init)(jax.random.key(0), start)["params"]
    roles = ("bos", "eos", "end_of_turn", "unknown", "padding")
    special = {**dict.fromkeys(roles), "eos": 256}
    return zoo_language.LanguageModel(
        name="random decoder",
        module=module,
        params=params,
        tokenizer=_Bytes(),
        chat=None,
        special=special,
    )


MODELS = {"random": _random, "smollm2": _smollm2}


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one row of the table.

    Attributes:
      loss: [S, D] mean test loss of a token in nats, per seed and domain.
      curve: [S, steps] training loss; empty where nothing was trained.
      step_seconds: median over steps and seeds; None where nothing was timed.
    """

    loss: np.ndarray
    curve: np.ndarray
    step_seconds: float | None = None


class LanguageStudy(Experiment):
    """Trains an adapter per domain and seed; measures each on every domain."""

    results: dict[str, Result]
    claims_title = "What was expected, and what was measured"

    def __init__(
        self,
        config: ConfigDict,
        document: report.Report,
        progress: report.Progress,
        mesh: jax.sharding.Mesh,
    ):
        super().__init__(config, document, progress)
        options = config.model.options.to_dict()
        maker = MODELS.get(config.model.name)
        if maker is None:
            raise ValueError(
                f"model {config.model.name!r} does not exist; known: "
                f"{', '.join(MODELS)}"
            )
        self.domains = tuple(config.domains)
        if len(self.domains) < 2:
            raise ValueError(f"domains: wants two or more, found {self.domains}")
        self.model = maker(options, progress)
        if rules := tuple(config.model.nf4):
            small = nf4.quantize(self.model.params, *rules)
            self.model = dataclasses.replace(self.model, params=small)
        self.lora = causal_lm.LoraSettings(**config.lora.to_dict())
        self.seeds = tuple(config.seeds)
        self.sources = {name: self._packed(name, "train") for name in self.domains}
        self.tests = {name: self._test_rows(name) for name in self.domains}
        self.trainer = train.Trainer(self._trainable(), mesh=mesh)
        compute = causal_lm.token_losses(self.model.module, self.lora)
        self.sums = jax.jit(lambda p, b: [jnp.sum(x) for x in compute(p, b)])
        self.samples: list[tuple[str, ...]] = []
        self.decoding: list[tuple[int, float]] = []  # (tokens, seconds) of a batch

    def _documents(self, name, split, limit):
        end = self.model.special["eos"]
        return [
            encode_text(text, self.model.tokenizer, end=end)
            for text in corpora.texts(name, split, limit=limit)
        ]

    def _packed(self, name, split, **options):
        rows = self.config.packing
        documents = self._documents(name, split, rows.documents)
        return Packed(documents, rows.row_length, **options)

    def _test_rows(self, name):
        """In the order of the documents: those packed first are no special ones."""
        packed = self._packed(name, "test", method="next_fit")
        batch = self.config.training.batch_size
        rows = min(self.config.evaluation.rows, len(packed)) // batch * batch
        if not rows:
            raise ValueError(
                f"{name}: {len(packed)} test rows fill no batch of {batch}"
            )
        arrays = data.to_arrays(packed, limit=rows)
        return [
            {k: v[i : i + batch] for k, v in arrays.items()}
            for i in range(0, rows, batch)
        ]

    def _trainable(self):
        settings = self.config.training
        return causal_lm.causal_lm(
            self.model.module,
            self.model.params,
            tx=optim.over_steps(settings.steps, settings.optimizer.to_dict()),
            lora=self.lora,
        )

    def start(self, seed: int) -> dict[str, Any]:
        """The model with an adapter that changes nothing yet."""
        return self.lora.start(jax.random.key(seed), self.model.params)

    def measure(self, params: Any) -> list[float]:
        """Mean loss of a token of each domain's test rows."""
        found = []
        for name in self.domains:
            total = np.zeros(2)
            for batch in self.tests[name]:
                total += np.array(jax.device_get(self.sums(params, batch)))
            found.append(float(total[0] / total[1]))
        return found

    def fit(self, name: str, seed: int, folder: epath.Path) -> tuple[Any, dict]:
        """An adapter and how its training went; read back where it is there already."""
        identity = _identity(self.config, name, seed)
        path = folder / f"{name}-{seed}-{identity}.safetensors"
        like = self.start(seed)["lora"]
        if path.exists():
            return io.load_tree(path, like)
        settings = self.config.training
        batches = data.pipeline(
            self.sources[name], batch_size=settings.batch_size, seed=seed
        )
        moments = []
        with self.progress.task(f"{name}, seed {seed}", total=settings.steps) as bar:

            def shown(step, steps, metrics):
                moments.append(time.monotonic())
                bar(step, steps, metrics)

            done = self.trainer.fit(
                batches.__getitem__,
                steps=settings.steps,
                seed=seed,
                params=self.start(seed),
                log_every=1,
                progress=shown,
            )
        about = {
            "loss": [record["loss"] for record in done.history],
            "step_seconds": float(np.median(np.diff(moments))),
        }
        lora = jax.device_get(done.params["lora"])
        folder.mkdir(parents=True, exist_ok=True)
        io.save_tree(path, lora, about)
        return lora, about

    def run(self, folder: epath.Path) -> None:
        """Everything that is measured, then the claims."""
        adapters, about = {}, {}
        total = len(self.domains) * len(self.seeds)
        with self.progress.task("adapters", total=total) as bar:
            for seed in self.seeds:
                for name in self.domains:
                    adapters[name, seed], about[name, seed] = self.fit(
                        name, seed, folder
                    )
                    bar.advance()
        before = self.measure(self.start(self.seeds[0]))
        self.results[BASE] = Result(np.array([before] * len(self.seeds)), np.zeros(0))
        for name in self.domains:
            params = [
                {"base": self.model.params, "lora": adapters[name, seed]}
                for seed in self.seeds
            ]
            mine = [about[name, seed] for seed in self.seeds]
            self.results[name] = Result(
                np.array([self.measure(p) for p in params]),
                np.array([each["loss"] for each in mine]),
                float(np.median([each["step_seconds"] for each in mine])),
            )
        merged = [self._averaged(adapters, seed) for seed in self.seeds]
        losses = np.array([self.measure(params) for params in merged])
        self.results[BOTH] = Result(losses, np.zeros(0))
        self._sample(adapters)
        self._claims()

    def _averaged(self, adapters, seed):
        """The mean of the products, which is not that of the factors."""
        share = dataclasses.replace(
            self.lora, alpha=self.lora.alpha / len(self.domains)
        )
        params = self.start(seed)
        for name in self.domains:
            merged = share.merge({**params, "lora": adapters[name, seed]})
            params = {**params, "base": merged}
        return params

    def _sample(self, adapters):
        options, seed = self.config.samples, self.seeds[0]
        model = decoding.from_decoder(self.model.module)
        tokenizer, end = self.model.tokenizer, self.model.special["eos"]
        for name in self.domains:
            documents = self._documents(name, "test", options.prompts)
            prompts = [d["input_ids"][: options.prompt_tokens] for d in documents]
            texts = [tuple(tokenizer.decode(list(map(int, p))) for p in prompts)]
            after = {"base": self.model.params, "lora": adapters[name, seed]}
            plain = nf4.dequantize(self.model.params)
            for params in jax.block_until_ready((plain, self.lora.merge(after))):
                start = time.monotonic()
                found = decoding.generate(
                    model,
                    params,
                    prompts,
                    max_new_tokens=options.max_new_tokens,
                    stop=() if end is None else end,
                )
                tokens = int(found.lengths.sum())
                self.decoding.append((tokens, time.monotonic() - start))
                texts.append(tuple(tokenizer.decode(row) for row in found.rows()))
            self.samples += [(name, *row) for row in zip(*texts, strict=True)]

    def _claims(self):
        base = self.results[BASE].loss
        for i, name in enumerate(self.domains):
            own = self.results[name].loss[:, i]
            self._claim(
                f"An adapter trained on {name} predicts it better than the model did",
                base[:, i] - own,
            )
            rest = [self.results[other].loss[:, i] for other in self.domains]
            del rest[i]
            self._claim(
                f"Of all adapters that of {name} predicts it best",
                np.min(rest, axis=0) - own,
            )
        both = self.results[BOTH].loss
        self._claim(
            "The average of the adapters is better than the model on every domain",
            np.min(base - both, axis=1),
        )

    def _claim(self, text, gain):
        """Of gains [S] in nats: it holds where every seed agrees."""
        shown = ", ".join(f"{x:+.3f}" for x in gain)
        self.claim(text, f"{shown} nats a token, by seed", bool(np.all(gain > 0)))


def _identity(config: ConfigDict, name: str, seed: int) -> str:
    """What an adapter depends on, in short."""
    parts = {k: config[k].to_dict() for k in ("model", "packing", "training", "lora")}
    text = json.dumps([parts, name, seed], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _spread(values: np.ndarray) -> str:
    if len(values) == 1 or not np.ptp(values):
        return f"{values[0]:.2f}"
    return f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"


def _add_table(study: LanguageStudy) -> None:
    rows = study.config.training.batch_size
    tokens = {
        name: rows * study.config.packing.row_length * source.fill
        for name, source in study.sources.items()
    }
    study.report.add_table(
        report.Table(
            title="Perplexity of a token on test rows",
            columns=("adapter", *study.domains, "tokens per second", "step, s"),
            rows=tuple(
                (
                    name,
                    *(_spread(np.exp(found.loss[:, i])) for i in range(len(tokens))),
                    None
                    if found.step_seconds is None
                    else tokens[name] / found.step_seconds,
                    found.step_seconds,
                )
                for name, found in study.results.items()
            ),
            formats={"tokens per second": ",.0f", "step, s": ".2f"},
            caption=f"{study.model.name}; mean and standard deviation over "
            f"{len(study.seeds)} seeds of order and adapter. Times: median of the "
            "training steps, beside whatever else the machine did.",
        )
    )


def _speed(batches: list[tuple[int, float]]) -> str:
    """Of all batches but the first, which was compiled."""
    tokens, seconds = (sum(each) for each in zip(*batches[1:], strict=True))
    return f"{tokens / seconds:,.1f} tokens a second, all rows of a batch together."


def _add_details(study: LanguageStudy) -> None:
    curves = {name: study.results[name].curve for name in study.domains}
    steps = len(next(iter(curves.values()))[0])
    study.report.add_figure(
        "Training loss",
        report.Lines(
            x=list(range(1, steps + 1)),
            series={name: curve.mean(0).tolist() for name, curve in curves.items()},
            x_label="step",
            y_label="nats a token, mean over seeds",
        ),
    )
    study.report.add_table(
        report.Table(
            title="Greedy continuations of test texts, before and after",
            columns=("domain", "prompt", "before", "after"),
            rows=tuple(study.samples),
            caption=_speed(study.decoding),
        )
    )
    adapter = study.start(study.seeds[0])["lora"]
    study.report.add_text(
        f"An adapter has {tree.size(adapter):,} weights in "
        f"{report.format_bytes(tree.nbytes(adapter))}, beside "
        f"{report.format_bytes(tree.nbytes(study.model.params))} of the frozen base. "
        + " ".join(
            f"Packed rows of {name} are {source.fill:.1%} full."
            for name, source in study.sources.items()
        )
    )


def run(
    config: ConfigDict,
    document: report.Report,
    workdir: epath.Path,
    progress: report.Progress,
    mesh: jax.sharding.Mesh,
) -> None:
    """Runs a language experiment; adapters are kept in `workdir` and read back."""
    if not config.domains:
        raise ValueError("this variant has no domains: it is for mtl-jax preflight")
    study = LanguageStudy(config, document, progress, mesh)
    study.run(workdir / "adapters")
    study.write(
        workdir,
        table=lambda: _add_table(study),
        rests_on=f"{len(study.seeds)} seeds.",
        details=lambda: _add_details(study),
    )
