import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "icae_jax" / "__init__.py").read_text())[1]

SERVE = [
    "fastapi>=0.120",
    "uvicorn>=0.35",
    "pydantic>=2.10",
    "sse-starlette>=3.3",
    "prometheus-client",
]

setup(
    name="icae_jax",
    version=VERSION,
    description="Compress an LLM's context into a few memory tokens, in JAX (ICAE, 500xCompressor)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    author="The icae_jax authors",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords=["JAX", "LLM", "context compression", "memory tokens", "ICAE", "500xCompressor"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["icae_jax", "icae_jax.*"]), "icae_jax.configs"],
    package_dir={"icae_jax.configs": "configs"},
    package_data={
        "icae_jax": [
            "py.typed",
            "data/tiny_base/*",
            "interop/*/*.md",
            "interop/export/scripts/*",
            "server/page/*",
        ],
        "icae_jax.configs": ["README.md"],
    },
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.15",
        "transformers>=5.0",
        "huggingface_hub",
        "etils[epath]",
        "tensorstore",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources",  # tensorflow-datasets imports it and does not ask for it
        "ml-collections>=1.1",
        "ml_dtypes",
        "jaxtyping",
        "numpy",
        "safetensors",
        "gguf>=0.17",
        "sacrebleu",
        "rouge-score",
        "tensorboardX",
        "sentencepiece",  # bases with a tokenizer.model alone
        "zstandard",
        "pyarrow",  # tables as data: parquet, arrow, csv
        "matplotlib",
        "tqdm",
    ],
    extras_require={
        # `icae serve`
        "serve": SERVE,
        # libtpu compiles for TPUs on any machine; another version of ruff may format otherwise
        "test": [
            *SERVE,
            "kubernetes-validate",  # the published schemas, for launch/serve
            "openai",
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "beartype",
            "schemathesis",
            "selenium",
            "ruff>=0.17,<0.18",
            "torch==2.13.0",
            "peft",
            "jax[tpu]",
        ],
        "bench": ["torch==2.13.0", "peft"],  # the PyTorch baseline of launch/benchmarks
        "tpu": ["jax[tpu]"],
        "gpu": ["jax[cuda13]"],
    },
    entry_points={"console_scripts": ["icae=icae_jax.cli.main:command"]},
)
