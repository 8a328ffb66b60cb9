"""A run of `icae compress --store` that is killed fifty times."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from cli_helpers import sentence
from conftest import ROOT, write_adapter, write_jsonl

from icae_jax.interop.hub import base as bases

KILLS, DOCUMENTS = 50, 240


@pytest.mark.nightly
def test_a_run_that_is_killed_fifty_times(tmp_path, tiny_base):
    """Breaks when a kill at any moment damages a store, loses what was reported done, or makes the
    run end with other shards or rows than one that was left alone.
    """
    adapter = write_adapter(tmp_path / "adapter", bases.load_base(tiny_base))
    rng = np.random.default_rng(0)
    rows = [
        {"id": f"d{i}", "text": sentence(rng, int(rng.integers(9, 60))), "metadata": {"i": i}}
        for i in range(DOCUMENTS)
    ]
    source = write_jsonl(tmp_path / "docs.jsonl", rows)
    script = str(pathlib.Path(__file__).with_name("kill_storm.py"))
    argv = [sys.executable, script, str(tmp_path), str(adapter), source, str(KILLS)]
    ended = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        timeout=550,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    about = json.loads(ended.stdout)
    assert about["kills"] == KILLS and not about["damage"] and not about["lost"] and about["same"]
    assert about["documents"] == DOCUMENTS and about["shards"] == DOCUMENTS // 2
    # Many kills came while documents were being stored, not before and not after.
    partly = [count for count in about["after_each_kill"] if 0 < count < DOCUMENTS]
    assert len(partly) >= KILLS // 3 and len(set(partly)) >= KILLS // 5
