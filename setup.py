"""Package metadata. `kernels/` is installed as `recurrentgemma.kernels`."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent

# Read, not imported: importing the package would need its dependencies installed.
VERSION = re.search(
    r'^__version__ = "([^"]+)"$',
    (HERE / "recurrentgemma" / "__init__.py").read_text(encoding="utf-8"),
    re.MULTILINE,
).group(1)

KERNEL_PACKAGES = ["linear_scan", "rg_lru", "recurrent_step", "local_attention"]
PLOT = ["matplotlib"]
TENSORBOARD = ["tensorboardX"]
NOTEBOOKS = ["nbclient>=0.10", "ipykernel", *PLOT]

setup(
    name="recurrentgemma",
    version=VERSION,
    description="The Griffin family in JAX: recurrent blocks beside local attention.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "recurrentgemma",
        "recurrentgemma.benchmarks",
        "recurrentgemma.benchmarks.device_suite",
        "recurrentgemma.benchmarks.opponents",
        "recurrentgemma.benchmarks.recall",
        "recurrentgemma.blocks",
        "recurrentgemma.checkpoints",
        "recurrentgemma.commands",
        "recurrentgemma.evaluation",
        "recurrentgemma.generation",
        "recurrentgemma.planning",
        "recurrentgemma.training",
        "recurrentgemma.kernels",
        *(f"recurrentgemma.kernels.{name}" for name in KERNEL_PACKAGES),
    ],
    package_dir={
        "recurrentgemma": "recurrentgemma",
        "recurrentgemma.kernels": "kernels",
        **{
            f"recurrentgemma.kernels.{name}": f"kernels/{name}"
            for name in KERNEL_PACKAGES
        },
    },
    package_data={
        "recurrentgemma": ["py.typed", "assets/**/*"],
        "recurrentgemma.kernels.linear_scan": ["*.json"],
    },
    entry_points={"console_scripts": ["recurrentgemma = recurrentgemma.cli:main"]},
    install_requires=[
        "jax>=0.7.2",
        "flax>=0.11.2",
        "optax",
        "orbax-checkpoint",
        "sentencepiece",
        "einops",
        "chex",
        "absl-py",
        "numpy",
        "safetensors",
        "tqdm",
    ],
    extras_require={
        "hub": ["huggingface_hub", "kagglehub"],
        "eval": ["lm_eval"],
        "tpu-plan": ["libtpu"],
        "cuda12": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        "notebooks": NOTEBOOKS,
        "plot": PLOT,
        "data": ["grain", "pyarrow"],
        "tensorboard": TENSORBOARD,
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "basedpyright",
            *TENSORBOARD,
            *NOTEBOOKS,
        ],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
