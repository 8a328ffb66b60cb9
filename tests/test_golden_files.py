"""The reference implementations' own files through the command line: in from each, read as they
were trained, and out again.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import GOLDEN, make_tokenizer

from icae_jax.cli import main as cli
from icae_jax.compression.memory import Memory
from icae_jax.inference.loading import load
from icae_jax.interop.adapters import formats, tensor_files

FILES = {
    # Tensors tell no version; the template is a flag.
    "icae_v1_llama/icae.safetensors": "icae-v2",
    "icae_v1_llama/icae_v1_zeroweight.pt": "icae-v1",
    "icae_v2_llama/icae.safetensors": "icae-v2",
    "icae_v2_mistral/icae.safetensors": "icae-v2",
    "icae_v2_mistral/icae_full.safetensors": "icae-v2",
    "x500_llama/lora_params.pt": "x500",
    "x500_llama/lora_params.safetensors": "x500",
}


# One file of each format; the others hold the same kinds of tensors in other ways, and are read by
# night.
DAILY = (
    "icae_v1_llama/icae_v1_zeroweight.pt",
    "icae_v2_mistral/icae.safetensors",
    "x500_llama/lora_params.safetensors",
)


@pytest.fixture(
    params=[
        name if name in DAILY else pytest.param(name, marks=pytest.mark.nightly) for name in FILES
    ]
)
def case(request, tmp_path):
    """(the file, its format, its case's folder, its base with a tokenizer that the case does not
    have).
    """
    path = GOLDEN / request.param
    if not path.exists():
        pytest.skip(f"needs {path}, which is not here")
    pytest.importorskip("torch")
    base = shutil.copytree(path.parent / "base", tmp_path / "base", copy_function=shutil.copyfile)
    base.chmod(0o755)
    tokenizer = make_tokenizer(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 320))])
    tokenizer.add_special_tokens({"additional_special_tokens": []})
    tokenizer.save_pretrained(base)
    return path, FILES[request.param], path.parent, base


def tensors_of(path):
    return {name: np.asarray(t) for name, t in tensor_files.open_tensors(path)[0].items()}


def test_in_and_out(case, tmp_path, capsys):
    """Breaks when a file is not recognised, is read otherwise than it was trained, or comes back
    with other tensors.
    """
    path, form, folder, base = case
    meta = json.loads((folder / "meta.json").read_text())
    flags = (
        ["--method", "x500", "--context_length", str(meta["max_length"])] if form == "x500" else []
    )
    convert = ["convert", "adapter", "--base", str(base)]
    assert cli.main([*convert, "--from", str(path), "--to", str(tmp_path / "in"), *flags]) == 2, (
        "random tensors restore nothing"
    )
    assert not (tmp_path / "in").exists() and "far from restoring" in capsys.readouterr().err
    assert (
        cli.main([*convert, "--from", str(path), "--to", str(tmp_path / "in"), *flags, "--force"])
        == 0
    )

    compressor = load(tmp_path / "in")
    if form == "x500":
        golden = np.load(folder / "ae.npz")
        rows = [
            row[: np.flatnonzero(row != meta["eos"])[-1] + 1].tolist()
            for row in golden["input_ids"]
        ]
        memory = compressor.compress_ids(rows)
        prefix = jax.jit(Memory.read)(memory, compressor.decoder)
        for got, want in ((prefix.k, golden["memory_k"]), (prefix.v, golden["memory_v"])):
            np.testing.assert_allclose(
                np.transpose(got, (0, 1, 3, 2, 4)), want, atol=1e-4 * np.abs(want).max()
            )
        restored = compressor.restore(memory, golden["regenerate_greedy"].shape[1], details=True)
        want = golden["regenerate_greedy"].tolist()
        want = [row[: row.index(meta["eos"])] if meta["eos"] in row else row for row in want]
        assert [g.ids for g in restored] == want
    else:
        golden = np.load(folder / "compress.npz")
        memory = compressor.compress_ids([golden["input_ids"][0].tolist()])
        np.testing.assert_allclose(
            memory.slots[0], golden["slots"], atol=1e-4 * np.abs(golden["slots"]).max()
        )
        template = compressor.adapter.template
        assert (template.name, template.stop) == (
            ("v1", 1) if form == "icae-v1" else ("mistral", 2)
        )

    out = tmp_path / "out"
    assert (
        cli.main(
            [
                *convert,
                "--from",
                str(tmp_path / "in"),
                "--to",
                str(out),
                "--format",
                form,
                "--force",
            ]
        )
        == 0
    )
    got, want = tensors_of(out / formats.FORMATS[form].file_name), tensors_of(path)
    want = {
        name: t
        for name, t in want.items()
        if "lora_" in name or "memory" in name or form == "icae-v1"
    }
    assert len(want) >= 13 and set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)


def test_the_wrong_base_is_refused(case, tmp_path, capsys):
    """Breaks when a file loads on a base of other sizes, forced or not."""
    path, form, folder, _ = case
    other = (
        folder.with_name("icae_v1_llama" if folder.name != "icae_v1_llama" else "icae_v2_llama")
        / "base"
    )
    argv = [
        "convert",
        "adapter",
        "--from",
        str(path),
        "--base",
        str(other),
        "--to",
        str(tmp_path / "to"),
        "--force",
    ]
    assert cli.main([*argv, *(["--method", "x500"] if form == "x500" else [])]) == 2
    err = capsys.readouterr().err
    assert (
        "v_proj.lora_B.default.weight: (" in err
        and "with this base it is" in err
        and not (tmp_path / "to").exists()
    )
