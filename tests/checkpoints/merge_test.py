import json
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from mtl_jax import cli
from mtl_jax.checkpoints import merge as M
from mtl_jax.checkpoints.source import open_source
from mtl_jax.io import safetensors

WEIGHTS = (0.5, 1.5)
LINEAR = "merge_method: linear\nmodels: [one, two]\nparameters: {weight: 1}\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, save_llama):
    """`base` and two fine-tunings of it, `a` and `b`; their tensors in float64."""
    root = tmp_path_factory.mktemp("models")
    base = save_llama(root / "base", 0)
    found = {"base": base}
    for i, name in enumerate("ab"):
        found[name] = save_llama(root / name, i + 1, near=base)
    return root, {
        name: {k: v.astype(np.float64) for k, v in tensors.items()}
        for name, tensors in found.items()
    }


def write(root, text, name="recipe.yaml"):
    path = root / name
    path.write_text(text)
    return path


def read(folder):
    return {name: view.whole() for name, view in open_source(folder).items()}


# Oracles in float64, by the definitions of the methods, of one tensor.


def linear(base, experts, **_):
    return sum(w * x for w, x in zip(WEIGHTS, experts, strict=True)) / sum(WEIGHTS)


def add(base, deltas, normalize=False, elect=False, lambda_=1.0):
    weighted = [w * d for w, d in zip(WEIGHTS, deltas, strict=True)]
    mixed, total = sum(weighted), np.full(base.shape, sum(WEIGHTS))
    if elect:
        sign = np.where(mixed >= 0, 1.0, -1.0)
        keep = [np.sign(d) == sign for d in weighted]
        mixed = sum(d * k for d, k in zip(weighted, keep, strict=True))
        total = sum(w * k for w, k in zip(WEIGHTS, keep, strict=True))
        total = np.where(total == 0, 1, total)
    return base + lambda_ * (mixed / total if normalize else mixed)


def trimmed(delta, density, gamma=0.0):
    """Without the largest `gamma`, the next `density` of the entries."""
    order = np.argsort(-np.abs(delta).reshape(-1), kind="stable")
    top, count = int(gamma * delta.size), int(density * delta.size)
    out = np.zeros(delta.size)
    keep = order[top : top + count]
    out[keep] = delta.reshape(-1)[keep]
    return out.reshape(delta.shape)


def ties(base, experts):
    deltas = [trimmed(x - base, 0.5) for x in experts]
    return add(base, deltas, normalize=True, elect=True, lambda_=0.7)


def breadcrumbs(base, experts, elect=False):
    deltas = [trimmed(x - base, 0.5, 0.1) for x in experts]
    return add(base, deltas, elect=elect)


def angle(a, b):
    return np.arccos(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))


def great_circle(a, b, t):
    w = angle(a, b)
    return (np.sin((1 - t) * w) * a + np.sin(t * w) * b) / np.sin(w)


def slerp(base, experts):
    cosine = np.cos(angle(base, experts[0]))
    if cosine > 0.9995:
        return 0.7 * base + 0.3 * experts[0]
    return great_circle(base, experts[0], 0.3)


def nuslerp(base, experts):
    a, b = (x - base for x in experts)
    return base + great_circle(a, b, WEIGHTS[1] / sum(WEIGHTS))


def karcher(base, experts):
    """Of two: the middle of the arc, with the mean norm."""
    a, b = (x / np.linalg.norm(x) for x in experts)
    return (a + b) / np.linalg.norm(a + b) * np.mean(list(map(np.linalg.norm, experts)))


def model_stock(base, experts):
    a, b = (x - base for x in experts)
    cosine = np.cos(angle(a, b))
    t = 2 * cosine / (1 + cosine)
    return t * np.mean(experts, axis=0) + (1 - t) * base


def nearswap(base, experts):
    share = np.clip(0.05 / np.maximum(np.abs(base - experts[0]), 1e-6), 0, 1)
    return base * (1 - share) + experts[0] * share


def sce(base, experts):
    deltas = np.stack([x - base for x in experts])
    variance = deltas.var(0).reshape(-1)
    count = int(0.5 * np.count_nonzero(variance))
    mask = np.zeros(variance.size)
    mask[np.argsort(-variance, kind="stable")[:count]] = 1
    deltas = deltas * mask.reshape(base.shape)
    keep = np.sign(deltas) == np.where(deltas.sum(0) >= 0, 1, -1)
    squares = (deltas**2).mean(tuple(range(1, deltas.ndim)))
    weights = (squares / squares.sum()).reshape(-1, *[1] * base.ndim) * keep
    return base + (deltas * weights).sum(0) / np.maximum(weights.sum(0), 1e-6)


def ram(base, experts):
    deltas = np.stack([x - base for x in experts])
    changed = np.abs(deltas) > 1e-5
    return base + (deltas * changed).sum(0) / np.maximum(changed.sum(0), 1)


BOTH = "models:\n- {model: a, parameters: {weight: 0.5}}\n"
BOTH += "- {model: b, parameters: {weight: 1.5}}\n"
PLAIN = "models: [{model: a}, {model: b}]\n"
ONE = "models: [{model: a}]\n"
CASES = {  # Method -> models, parameters, oracle.
    "linear": (BOTH, "", linear),
    "passthrough": (ONE, "scale: 2", lambda base, experts: 2 * experts[0]),
    "slerp": (ONE, "t: 0.3", slerp),
    "nuslerp": (BOTH, "", nuslerp),
    "karcher": (PLAIN, "max_iter: 50, tol: 1e-9", karcher),
    "model_stock": (PLAIN, "filter_wise: false", model_stock),
    "nearswap": (ONE, "t: 0.05", nearswap),
    "ram": (PLAIN, "", ram),
    "task_arithmetic": (
        BOTH,
        "lambda: 0.7",
        lambda base, e: add(base, [x - base for x in e], lambda_=0.7),
    ),
    "ties": (BOTH, "density: 0.5, lambda: 0.7, int8_mask: true", ties),
    "breadcrumbs": (BOTH, "density: 0.5, gamma: 0.1", breadcrumbs),
    "breadcrumbs_ties": (
        BOTH,
        "density: 0.5, gamma: 0.1",
        lambda base, e: breadcrumbs(base, e, elect=True),
    ),
    # Nothing is drawn where everything is kept.
    "dare_linear": (
        BOTH,
        "density: 1",
        lambda base, e: add(base, [x - base for x in e]),
    ),
    "dare_ties": (
        BOTH,
        "density: 1",
        lambda base, e: add(base, [x - base for x in e], elect=True),
    ),
    "della_linear": (
        BOTH,
        "density: 1",
        lambda base, e: add(base, [x - base for x in e]),
    ),
    "della": (
        BOTH,
        "density: 1",
        lambda base, e: add(base, [x - base for x in e], normalize=True, elect=True),
    ),
    "sce": (PLAIN, "select_topk: 0.5", sce),
}
BASELESS = ("linear", "passthrough", "karcher")


def recipe_of(method, models, parameters):
    text = f"merge_method: {method}\n{models}dtype: float32\n"
    text += "" if method in BASELESS else "base_model: base\n"
    return text + (f"parameters: {{{parameters}}}\n" if parameters else "")


@pytest.mark.parametrize("method", CASES)
def test_methods_that_mergekit_has(folders, tmp_path, method):
    root, tensors = folders
    models, parameters, oracle = CASES[method]
    path = write(root, recipe_of(method, models, parameters))
    done = M.merge(path, tmp_path / "out")
    found = read(tmp_path / "out")
    assert set(found) == set(tensors["base"]) and done.tensors == len(found)
    for name, base in tensors["base"].items():
        wanted = oracle(base, [tensors[m][name] for m in "ab"])
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(
            found[name], wanted, rtol=2e-4, atol=2e-5, err_msg=name
        )


@pytest.mark.parametrize("method", ["multislerp", "ramplus_tl", "arcee_fusion"])
def test_equal_models_stay_as_they_are(tmp_path, method):
    """Whatever the rule makes of task vectors that are zero."""
    tensors = {"w": np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)}
    for name in ("a", "same"):
        (tmp_path / name).mkdir()
        safetensors.save(tmp_path / name / "model.safetensors", tensors)
    text = f"merge_method: {method}\n"
    if method == "multislerp":
        text += "models: [{model: a}, {model: same}]\nparameters: {weight: 1}"
    else:
        text += "base_model: a\nmodels: [{model: same}]"
    M.merge(write(tmp_path, text), tmp_path / "out")
    (values,) = read(tmp_path / "out").values()
    np.testing.assert_allclose(values, tensors["w"], rtol=1e-5, atol=1e-6)


TIES = recipe_of("ties", BOTH, "density: 0.5")


def test_the_folder(folders, tmp_path):
    root, _ = folders
    path = write(root, TIES)
    out = tmp_path / "out"
    done = M.merge(path, out, seed=3, shard_bytes=6000)
    names = {p.name for p in out.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert len(shards) > 1 and not any(name.startswith(".") for name in names)
    assert names - shards == {
        "README.md",
        "config.json",
        "model.safetensors.index.json",
        "mtl_jax_recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (out / "mtl_jax_recipe.yaml").read_text() == TIES
    assert "seed 3" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    assert done.summary.bytes_written == sum(v.nbytes for v in read(out).values())
    assert done.table().rows[0][0] == 21


def test_vocabularies_are_joined(tmp_path, save_llama):
    tokens = {"x": 0, "<s>": 1, "</s>": 2}
    one = save_llama(tmp_path / "one", 1, rows=4, tokens={**tokens, "p": 3})
    two = save_llama(tmp_path / "two", 2, rows=4, tokens={**tokens, "q": 3})
    M.merge(write(tmp_path, LINEAR + "tokenizer_source: union"), tmp_path / "out")
    name = "model.embed_tokens.weight"
    a, b = (t[name].astype(np.float64) for t in (one, two))
    # Tokens that both have are averaged, others come from the model that has them.
    wanted = np.concatenate([(a[:3] + b[:3]) / 2, a[3:], b[3:]])
    found = read(tmp_path / "out")[name].astype(np.float64)
    np.testing.assert_allclose(found, wanted, rtol=2**-8, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 5


def files_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


DARE = recipe_of("dare_ties", BOTH, "density: 0.5")


def test_a_killed_merge_resumes(folders, tmp_path):
    root, _ = folders
    path = write(root, DARE)
    M.merge(path, tmp_path / "whole", seed=5)
    code = (
        "import os, signal, sys, time\n"
        "from mtl_jax.checkpoints.merge import merge\n"
        "calls = []\n"
        "def progress(done, total):\n"
        "    calls.append(done)\n"
        "    if len(calls) == 8:\n"
        "        time.sleep(0.5)\n"  # The writer's thread journals what it got.
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "merge(sys.argv[1], sys.argv[2], seed=5, progress=progress)\n"
    )
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", code, str(path), str(out)])
    assert killed.returncode == -signal.SIGKILL
    assert not any(p.suffix in (".safetensors", ".json") for p in out.iterdir())
    with pytest.raises(ValueError):
        M.merge(path, out, seed=6)  # Another plan.
    done = M.merge(path, out, seed=5)
    assert 0 < done.resumed < done.tensors == 21
    wanted = files_of(tmp_path / "whole")
    wanted["README.md"] = wanted["README.md"].replace(b"# whole", b"# out")
    assert files_of(out) == wanted


def test_seeds(folders, tmp_path):
    root, _ = folders
    path = write(root, DARE)
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        M.merge(path, tmp_path / name, seed=seed)
    one, same, other = (read(tmp_path / n) for n in ("one", "same", "other"))
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(one[name], same[name])
    assert np.any(one[name] != other[name])


def test_an_adapter_is_added(folders, tmp_path, save_adapter):
    root, tensors = folders
    name = "model.layers.1.mlp.up_proj.weight"
    product = save_adapter(root / "lora", name, (32, 16))
    text = "merge_method: linear\nmodels: ['a+lora']\nparameters: {weight: 1}\n"
    M.merge(write(root, text), tmp_path / "out")
    found = read(tmp_path / "out")
    assert found[name].dtype == ml_dtypes.bfloat16
    wanted = tensors["a"][name] + product
    np.testing.assert_allclose(
        found[name].astype(np.float64), wanted, rtol=2**-8, atol=1e-6
    )


@pytest.fixture
def save_adapter():
    """`save_adapter(folder, name, shape)`: returns what it adds."""

    def save(folder, name, shape):
        rng = np.random.default_rng(0)
        a = rng.normal(size=(2, shape[1])).astype(np.float32)
        b = rng.normal(size=(shape[0], 2)).astype(np.float32)
        folder.mkdir(exist_ok=True)
        inner = f"base_model.model.{name.removesuffix('.weight')}"
        safetensors.save(
            folder / "adapter_model.safetensors",
            {f"{inner}.lora_A.weight": a, f"{inner}.lora_B.weight": b},
        )
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
        config["target_modules"] = [name.split(".")[-2]]
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return 2.0 * b.astype(np.float64) @ a

    return save


# The command.


def run(capsys, *arguments):
    code = cli.main(["merge", *map(str, arguments)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_command(folders, tmp_path, capsys):
    path, out = write(folders[0], TIES), tmp_path / "out"
    code, shown, _ = run(capsys, path, out, "--dtype", "bfloat16", "--shard-size", "1M")
    assert code == 0 and "ties" in shown and "GB/s" in shown
    assert {v.dtype.name for v in read(out).values()} == {"bfloat16"}
    code, _, err = run(capsys, path, out)
    assert code == 2 and "holds a checkpoint" in err.splitlines()[-1]
    assert run(capsys, path, out, "--overwrite")[0] == 0
    assert {v.dtype.name for v in read(out).values()} == {"float32"}


def test_dry_run(folders, tmp_path, capsys):
    path = write(folders[0], TIES)
    code, shown, err = run(capsys, path, tmp_path / "out", "--dry-run")
    assert code == 0 and err == "" and " 21 " in shown
    assert not (tmp_path / "out").exists()


def test_dry_run_looks_at_the_folder(folders, tmp_path, capsys):
    """What the merge would refuse, and nothing else, with nothing touched."""
    path, out = write(folders[0], TIES), tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    (out / "notes.txt").write_text("mine")
    for more in ([], ["--dry-run"]):
        code, _, err = run(capsys, path, out, *more)
        assert code == 2 and "holds README.md, which would be replaced" in err
    assert run(capsys, path, out, "--dry-run", "--overwrite")[0] == 0
    assert {f.name: f.read_text() for f in out.iterdir()} == {
        "README.md": "mine",
        "notes.txt": "mine",
    }
    file = out / "notes.txt"
    code, _, err = run(capsys, path, file / "deep", "--dry-run")
    assert code == 2 and f"{file} is a file" in err
    code, _, err = run(capsys, path, "gs://bucket/out")
    assert code == 2 and "wants a local folder" in err
    (out / "README.md").unlink()
    assert run(capsys, path, out)[0] == 0
    code, _, err = run(capsys, path, out, "--dry-run")
    assert code == 2 and "holds a checkpoint" in err
    assert file.read_text() == "mine"


def test_inputs_are_not_written_over(folders, capsys):
    path = write(folders[0], TIES)
    before = files_of(folders[0] / "a")
    code, _, err = run(capsys, path, folders[0] / "a", "--overwrite")
    assert code == 2 and "is read from" in err.splitlines()[-1]
    assert files_of(folders[0] / "a") == before


def opposite(root, save):
    base = save(root / "base", 0)
    for name, sign in (("one", 1), ("two", -1)):
        deltas = np.random.default_rng(1)
        save(root / name, 1)
        tensors = {
            k: (v.astype(np.float64) + sign * 2.0 ** deltas.integers(-9, -4, v.shape))
            for k, v in base.items()
        }
        safetensors.save(
            root / name / "model.safetensors",
            {k: v.astype(np.float32) for k, v in tensors.items()},
        )
    return base


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "sce"])
def test_opposite_deltas(tmp_path, save_llama, method):
    """What cancels leaves the base; elected signs keep one side, nothing is NaN."""
    base = opposite(tmp_path, save_llama)
    weight = "" if method == "sce" else "parameters: {weight: 1}\n"
    text = f"merge_method: {method}\nbase_model: base\nmodels: [one, two]\n{weight}"
    M.merge(write(tmp_path, text), tmp_path / "out")
    for name, values in read(tmp_path / "out").items():
        values = values.astype(np.float64)
        assert np.isfinite(values).all()
        gap = np.abs(values - base[name].astype(np.float64))
        if method == "task_arithmetic":
            assert gap.max() < 1e-6
        else:
            assert gap.max() > 2.0**-10


def broken(root, save, fault):
    """Models with one fault; the recipe, and what the message says."""
    save(root / "one", 1)
    save(root / "two", 2)
    file = root / "two" / "model.safetensors"
    text, message = LINEAR, ""
    if fault == "missing shard":
        file.rename(root / "two" / "model-00001-of-00002.safetensors")
        names = list(open_source(root / "one"))
        index = {n: "model-00001-of-00002.safetensors" for n in names}
        index["lm_head.weight"] = "model-00002-of-00002.safetensors"
        (root / "two" / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )
        message = "model-00002-of-00002.safetensors"
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
        message = "model.safetensors"
    elif fault == "wrong tokenizer":
        tokens = {"b": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 24)}
        save(root / "two", 2, tokens=tokens)
        message = "tokenizers of one and two differ: 'a' (0 and absent)"
    elif fault == "wrong path":
        text, message = LINEAR.replace("two", "thre"), "line 2: models[1]: no such"
    elif fault == "hub":
        text, message = LINEAR.replace("two", "org/model"), "only local folders"
    elif fault == "method":
        text, message = LINEAR.replace("linear", "liner"), "did you mean 'linear'?"
    elif fault == "empty folder":
        file.unlink()
        message = "two holds no checkpoint"
    return text, message


@pytest.mark.parametrize(
    "fault",
    [
        "missing shard",
        "truncated",
        "wrong tokenizer",
        "wrong path",
        "hub",
        "method",
        "empty folder",
    ],
)
def test_faults_end_in_one_line(tmp_path, save_llama, capsys, fault):
    text, message = broken(tmp_path, save_llama, fault)
    path, out = write(tmp_path, text), tmp_path / "out"
    code, shown, err = run(capsys, path, out)
    assert code == 2 and shown == "" and not out.exists()
    assert err.count("\n") == 1 and err.startswith("mtl-jax merge: ")
    assert message in err and "Traceback" not in err


def test_an_adapter_of_another_base(folders, tmp_path, capsys, save_adapter):
    root, _ = folders
    name = "model.layers.7.mlp.up_proj.weight"
    save_adapter(root / "other", name, (32, 16))
    text = "merge_method: linear\nmodels: ['a+other']\nparameters: {weight: 1}\n"
    code, shown, err = run(capsys, write(root, text), tmp_path / "out")
    assert code == 2 and shown == "" and err.count("\n") == 1
    assert "model.layers.7.mlp.up_proj" in err


def test_values_that_are_not_finite(tmp_path, save_llama, capsys):
    save_llama(tmp_path / "one", 1)
    tensors = save_llama(tmp_path / "two", 2)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = np.nan
    safetensors.save(tmp_path / "two" / "model.safetensors", tensors)
    path, out = write(tmp_path, LINEAR), tmp_path / "out"
    code, _, err = run(capsys, path, out)
    last = err.splitlines()[-1]
    assert code == 2 and name in last and "two" in last
    # Nothing that a loader would take for a model.
    left = [p.name for p in out.iterdir()] if out.exists() else []
    assert not any(n == "config.json" or n.endswith(".safetensors") for n in left)
    assert run(capsys, path, out, "--no-check-finite", "--overwrite")[0] == 0
    assert np.isnan(read(out)[name].astype(np.float32)).sum() == 1


def test_recipe_wants_a_known_dtype(folders):
    with pytest.raises(ValueError, match="dtype must be one of"):
        M.make_plan(write(folders[0], TIES), dtype="int8")


@pytest.mark.slow
@pytest.mark.reference
def test_transformers_reads_it(folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    root, _ = folders
    text = (
        "merge_method: passthrough\nslices:\n"
        "- sources: [{model: a, layer_range: [0, 2]}]\n"
        "- sources: [{model: b, layer_range: [1, 2]}]\n"
        "tokenizer_source: base\nbase_model: a\n"
    )
    M.merge(write(root, text), tmp_path / "out", shard_bytes=8000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert model.config.num_hidden_layers == 3 and not any(
        info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    found = model.model.layers[2].mlp.up_proj.weight.detach().float().numpy()
    wanted = read(root / "b")["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(found, wanted.astype(np.float32))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        out = model(torch.tensor([tokenizer("w3 w4")["input_ids"]])).logits
    assert out.shape == (1, 2, 24) and torch.isfinite(out).all()
