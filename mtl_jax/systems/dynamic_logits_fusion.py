"""Dynamic logit fusion: small experts steer a large model, token by token."""

from ml_collections import ConfigDict

from mtl_jax import decoding
from mtl_jax.catalog import SystemSpec
from mtl_jax.zoo import serving

SPEC = SystemSpec(
    name="dynamic-logits-fusion",
    title=("On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion"),
    year=2024,
    family="instruction",
    kind="servable",
    summary=(
        "Steers a large frozen model at decoding time by logit shifts of small "
        "experts, re-weighted at every token."
    ),
    reference="""@inproceedings{dynamic-logits-fusion,
  title = {{On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion}},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  eprint = {2406.15480},
  archiveprefix = {arXiv}
}""",
    uses=(
        "decoding.DynamicFusion",
        "decoding.StaticFusion",
    ),
    deviations=(
        "Divergences come from moments of one pass over the vocabulary, and the best "
        "step is sought anew at every token; the printed pseudo-code never resets it.",
        "Of experts that tie the first is taken: the objective sees how far to move, "
        "not which expert fits.",
        "Bisection of the objective's slope is ours, beside the paper's grid.",
        "Small decoders trained here on invented strings, and SmolLM2-135M with copies "
        "of 20 of its 30 layers, stand for LLaMA-2 and TinyLlama.",
    ),
)


def build(config: ConfigDict) -> serving.Steering:
    """One model alone, static shifts, and shifts that are solved at every token."""
    study = config.study
    rows = [
        serving.Steered(name="large", role="large"),
        serving.Steered(name="small", role="small"),
        serving.Steered(name="small expert", role="expert"),
    ]
    if study.tuned:
        rows.append(serving.Steered(name="large, fine-tuned", role="tuned"))
    rows += [
        serving.Steered(name=_static(alpha), fuse=decoding.StaticFusion(alpha))
        for alpha in study.alphas
    ]
    grid = decoding.DynamicFusion(high=study.high, step=study.step)
    halved = decoding.DynamicFusion(method="bisect", high=study.high)
    rows += [
        serving.Steered(name="dynamic", fuse=grid),
        serving.Steered(name="dynamic, bisected", fuse=halved),
        serving.Steered(
            name="proxy, all experts", fuse=decoding.StaticFusion(1.0), every=True
        ),
        serving.Steered(name="dynamic, all experts", fuse=grid, every=True),
    ]
    return serving.Steering(rows=tuple(rows), analyses=(_claims,))


def _static(alpha: float) -> str:
    return "proxy tuning" if alpha == 1 else f"static {alpha:g}"


def _claims(study) -> None:
    """Dynamic against static steps, and against its own expert."""
    config, total = study.config.study, len(study.seeds)
    for alpha in config.alphas:
        _claim(study, "dynamic", _static(alpha), total)
    best = max(
        map(_static, config.alphas),
        key=lambda name: study.sign * study.results[name].mean.mean(),
    )
    won, gap = study.wins("dynamic", best)
    noise = gap.std(ddof=1) if total > 1 else 0.0
    study.claim(
        "Dynamic steps are as good as the best static one, within a deviation",
        f"{gap.mean():+.3f} against {best}, deviation {noise:.3f}; {won} of {total}",
        gap.mean() >= -noise,
    )
    _claim(study, "dynamic", "small expert", total)
    _claim(study, "dynamic", "large", total)
    _claim(study, "dynamic, all experts", "proxy, all experts", total)


def _claim(study, first, second, total) -> None:
    won, gap = study.wins(first, second)
    study.claim(
        f"{first.capitalize()}: at least as good as {second}, in 4 of 5 seeds",
        f"{won} of {total}; {', '.join(f'{x:+.3f}' for x in gap)}",
        won >= 0.8 * total,
    )
