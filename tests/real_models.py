"""Where the published GGUF files are that tests compare with transformers.

They are in the folder that ICAE_MODELS names, or in the one that `.ci/run` fills. They are never
part of the project.
"""

import os
import pathlib

import pytest

FOLDER = pathlib.Path(
    os.environ.get("ICAE_MODELS") or pathlib.Path.home() / ".cache" / "icae_jax_models"
)
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA3 = "gemma-3-270m-q4_k_m.gguf"


def find(name):
    """The path of a file, wherever within the folder; the test skips where it is not."""
    path = next(iter(sorted(FOLDER.rglob(name))), None)
    if path is None:
        pytest.skip(f"needs {name} in {FOLDER}, which .ci/run fetches, or where ICAE_MODELS says")
    return path
