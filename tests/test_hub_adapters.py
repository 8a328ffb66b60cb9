"""Adapters by hub id and URL in every verb, and pushed with a model card: against a stand-in for
the hub that its own client talks to.
"""

import json
import os
import re
import shutil

import hub_server
import huggingface_hub
import numpy as np
import pytest
import restoring
import safetensors
import yaml
from conftest import WORDS, same, write_jsonl
from etils import epath
from huggingface_hub import constants
from restoring import CONTEXT, K

from icae_jax import errors
from icae_jax.cli import main as cli
from icae_jax.evaluation import evaluate
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import locations
from icae_jax.training import trained
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.config import TrainConfig
from icae_jax.training.config_file import from_dict
from icae_jax.workflows import convert_adapter

TOKEN = "hf_good"
OTHER_FILES = (
    "modeling.py",
    "adapter_model.bin",
    "optimizer.pt",
    "encoder/adapter_model.bin",
    "encoder/code.py",
    "checkpoint-5/icae.json",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, texts, and an adapter that restores them and names the base by its hub id."""
    folder = tmp_path_factory.mktemp("hub")
    restoring.make_base(folder)
    shutil.copytree(restoring.TRAINED / "icae", folder / "adapter")
    edit(folder / "adapter" / "encoder" / "adapter_config.json", base_model_name_or_path="org/base")
    return folder


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def hub(world, tmp_path, monkeypatch):
    """The hub with the base in org/base and the adapter, beside files that it does not need, in
    org/adapter.
    """
    monkeypatch.setattr(errors, "FIRST_DELAY", 0)
    with hub_server.serving(tmp_path / "cache", monkeypatch) as hub:
        hub.upload("org/base", world / "base")
        files = {
            p.relative_to(world / "adapter").as_posix(): p.read_bytes()
            for p in (world / "adapter").rglob("*")
            if p.is_file()
        }
        hub.commit("org/adapter", files | dict.fromkeys(OTHER_FILES, b"x"))
        yield hub


def run(*argv):
    return cli.main([str(part) for part in argv])


# --- in ---


def test_from_compressing_to_asking(world, hub, tmp_path, monkeypatch, capsys):
    """Breaks when a verb takes no hub id, a memory does not name its adapter's commit, a newer
    commit is read in that one's place, or the hub is asked although it need not be.
    """
    (commit, _), memory = hub.find("org/adapter", "main"), tmp_path / "memory.safetensors"
    assert (
        run(
            "compress",
            "--adapter",
            "org/adapter",
            "--input",
            world / "texts.jsonl",
            "--output",
            memory,
        )
        == 0
    )
    with safetensors.safe_open(memory, framework="numpy") as f:
        assert f.metadata()["adapter"] == f"org/adapter@{commit}"
    hub.commit("org/adapter", {"icae.json": b"{}"})
    capsys.readouterr()
    assert run("restore", "--memory", memory) == 0
    texts = [json.loads(line)["text"] for line in (world / "texts.jsonl").read_text().splitlines()]
    assert capsys.readouterr().out.splitlines() == texts
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert (
        run("ask", "--memory", memory, "--question", "who sat ?", "--max_new_tokens", "2", "--json")
        == 0
        and not hub.requests
    )


def test_what_is_fetched(world, hub):
    """Breaks when code or pickles of a repository are fetched, or a file that an adapter needs is
    not.
    """
    folder, name = adapters.locate("org/adapter")
    fetched = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert fetched == {
        p.relative_to(world / "adapter").as_posix()
        for p in (world / "adapter").rglob("*")
        if p.is_file()
    }
    assert not [
        request for request in hub.requests if any(request.endswith(name) for name in OTHER_FILES)
    ]
    assert name == f"org/adapter@{hub.find('org/adapter', 'main')[0]}" == adapters.locate(name).name


def test_a_folder_here_comes_first(world, hub, tmp_path, monkeypatch):
    """Breaks when a folder that is named like a hub id is looked for on the hub, or a memory names
    it other than by its whole path.
    """
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "adapter", tmp_path / "org" / "adapter")
    folder, name = adapters.locate("org/adapter")
    assert (
        str(folder) == "org/adapter"
        and name == str(tmp_path / "org" / "adapter")
        and not hub.requests
    )


def test_the_other_verbs(world, hub, tmp_path, capsys):
    """Breaks when inspect, evaluate, convert or fine-tuning takes no hub id, or evaluate does not
    say which commit it measured.
    """
    assert run("inspect", "org/adapter", "--base", "org/base", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["base"] == "org/base" and told["fits"] == {"org/base": True} and told["k"] == K
    (compressor,) = evaluate.load(
        evaluate.find({"adapter": "org/adapter"}), None, "float32", None
    ).values()
    assert compressor.path == f"org/adapter@{hub.find('org/adapter', 'main')[0]}"
    base = bases.load_base(world / "base")
    want = adapters.load_adapter(world / "adapter", base)
    same(compressor.adapter.trained, want.trained)
    same(
        trained.open_adapter(trained.find("org/adapter"), base)[1].trained,
        want.trained,
    )
    rows = [
        {"context": "the cat sat on a mat", "question": "who sat ?", "answers": ["the cat"]}
    ] * 2
    raw = {
        "phase": "finetune",
        "init_from": "org/adapter",
        "base": str(world / "base"),
        "steps": 2,
        "batch_size": 1,
        "compression": {"k": K, "rate": CONTEXT / K, "layout": "sequential"},
        "lora": {"rank": 16, "targets": ("v_proj", "q_proj")},
        "objectives": {"ae": 0.0, "lm": 0.0, "qa": 1.0},
        "data": {
            "train": write_jsonl(tmp_path / "qa.jsonl", rows),
            "context_lengths": [CONTEXT],
            "cache_dir": str(tmp_path / "tokens"),
        },
    }
    same(CompressorTask(from_dict(TrainConfig, raw), base).init(), want.trained)


REFUSED = {
    "no such repository": (
        "org/none",
        "there is no folder org/none in .* the hub says: RepositoryNotFoundError",
    ),
    "no such revision": (
        "org/adapter@v9",
        "RevisionNotFoundError.*give a folder that is here, or a repository that you may read",
    ),
    "closed": ("org/gated", "GatedRepoError.*hf auth login"),
    "an ordinary LoRA": (
        "org/lora",
        r"'org/lora@\w{40}' has no icae\.json, so it is an ordinary PEFT adapter, without",
    ),
    "a base": (
        "org/base",
        r"has no icae\.json, so it is no adapter of this package; .*another implementation's file",
    ),
    "neither path nor id": (
        "no-such-folder",
        "adapter no-such-folder: no such file or folder; give .* a hub id such as org/name",
    ),
    "nothing": ("", "adapter '': no such file or folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_adapter(name, hub, world, tmp_path, capsys):
    """Breaks when what cannot be had, or is something else, ends in a traceback or in a path within
    a cache.
    """
    lora = world / "adapter" / "encoder"
    hub.commit("org/lora", {p.name: p.read_bytes() for p in lora.iterdir()})
    hub.commit("org/gated", {"icae.json": b"{}"})
    hub.gated.add("org/gated")
    given, message = REFUSED[name]
    for verb in (
        ["inspect", given],
        ["convert", "adapter", "--from", given, "--base", world / "base", "--to", tmp_path / "to"],
    ):
        assert run(*verb) == 2
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(message, err) and "snapshots" not in err, err


def test_without_a_network(hub, monkeypatch):
    """Breaks when an adapter that was fetched once is not read offline, or what is not there does
    not say why.
    """
    folder = adapters.locate("org/adapter").folder
    hub.commit("org/half", {"README.md": b"x", "icae.json": b"{}"})
    huggingface_hub.hf_hub_download("org/half", "README.md")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert adapters.locate("org/adapter").folder == folder
    for name in ("org/none", "org/adapter@v9"):
        with pytest.raises(
            errors.UserError,
            match=f"adapter '{name}': .*no copy is in the local cache, and HF_HUB_OFFLINE is set",
        ):
            adapters.locate(name)
    with pytest.raises(
        errors.UserError, match=r"cache holds of it has no icae\.json, and HF_HUB_OFFLINE is set"
    ):
        adapters.locate("org/half")


def test_an_outage_is_not_the_users_fault(hub):
    """Breaks when a hub that is down ends a launched run for good, or is not asked again."""
    hub.status = ("GET", "/api/models", 503)
    with pytest.raises(
        ConnectionError, match=r"adapter 'org/adapter': .* the hub cannot be reached"
    ) as caught:
        adapters.locate("org/adapter")
    assert (
        not errors.is_users(caught.value)
        and sum("/api/models" in r for r in hub.requests) >= errors.TRIES
    )


def test_an_adapter_in_a_bucket(world, tmp_path, monkeypatch):
    """Breaks when a URL of an adapter folder or of a training workdir is not read, a changed file
    is not copied again, or one that is there no more stays.
    """
    monkeypatch.setenv("ICAE_CACHE", str(tmp_path / "cache"))
    remote = shutil.copytree(world / "adapter", tmp_path / "bucket" / "run" / "adapter")
    (remote / "encoder" / "code.py").write_text("x")

    def mapped(original, path, *args, **kw):
        return original(
            os.fspath(path).replace("gs://bucket", str(tmp_path / "bucket")), *args, **kw
        )

    with epath.testing.mock_epath(
        open=mapped, isdir=mapped, listdir=mapped, stat=mapped, exists=mapped
    ):
        folder, name = adapters.locate("gs://bucket/run")
        assert (
            name == "gs://bucket/run/adapter"
            and adapters.locate(name) == (folder, name)
            and locations.is_remote(name)
        )
        want = {
            p.relative_to(world / "adapter").as_posix(): p.read_bytes()
            for p in (world / "adapter").rglob("*")
            if p.is_file()
        }
        assert {
            p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*")
            if p.is_file()
        } == want
        shutil.move(remote / "encoder" / "adapter_config.json", remote / "adapter_config.json")
        edit(remote / "icae.json", icae_jax_version="another")
        folder, _ = adapters.locate("gs://bucket/run")
        assert (folder / "adapter_config.json").exists() and not (
            folder / "encoder" / "adapter_config.json"
        ).exists()
        assert "another" in (folder / "icae.json").read_text()
        (remote / "icae.json").unlink()
        with pytest.raises(
            errors.UserError,
            match=r"adapter 'gs://bucket/run/adapter' has no icae\.json; give the URL of",
        ):
            adapters.locate("gs://bucket/run/adapter")


# --- out ---


@pytest.fixture
def push(world, hub, tmp_path, monkeypatch, capsys):
    """Pushes the adapter, which names its base by a folder, to me/new: (exit code, stdout, stderr).
    good: what the check finds.
    """
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = shutil.copytree(world / "adapter", tmp_path / "run" / "adapter")
    edit(folder / "encoder" / "adapter_config.json", base_model_name_or_path=str(world / "base"))
    (tmp_path / "run" / "DONE").write_text("7\n")
    lines = [
        {"step": 3, "eval": {"memory": {"ae": 9.0}}},
        {"step": 7, "eval": {"memory": {"ae": 0.25}, "wrong_memory": {"ae": 4.5}}},
    ]
    write_jsonl(tmp_path / "run" / "metrics.jsonl", lines)

    def pushing(*flags, good=True, to="me/new", base_id="org/base"):
        measured = convert_adapter.Restoring(0.1 if good else 4.0, 4.0, 98.7, 4.0)
        monkeypatch.setattr(convert_adapter, "check", lambda *_: (measured, ""))
        flags = [*flags, *(["--base_id", base_id] if base_id else [])]
        capsys.readouterr()
        code = run(
            "convert",
            "adapter",
            "--from",
            tmp_path / "run",
            "--base",
            world / "base",
            "--push",
            to,
            *flags,
        )
        return (code, *capsys.readouterr())

    return pushing


def metadata_of(card):
    return yaml.safe_load(card.partition("---\n")[2].partition("\n---\n")[0])


def test_pushed_and_loaded_again(world, hub, push, tmp_path):
    """Breaks when a pushed adapter does not load by its hub id, here or in PEFT, names a folder of
    this machine, has a card without its base or its real figures, or keeps files of the form that
    it had before.
    """
    peft, transformers = (pytest.importorskip(name) for name in ("peft", "transformers"))
    want = adapters.load_adapter(world / "adapter", bases.load_base(world / "base"))
    base = bases.load_base(world / "base")
    common = ["README.md", "icae.json", "memory.safetensors"]
    for form, flags in (
        ("native", ["--license", "apache-2.0"]),
        ("peft", ["--format", "peft", "--to", tmp_path / "out"]),
    ):
        code, out, err = push(*flags)
        assert code == 0 and "pushed http://127.0.0.1:" in out and f"({form})" in out, err
        _, files = hub.find("me/new", "main")
        lora = ["adapter_config.json", "adapter_model.safetensors"]
        assert sorted(files) == sorted(
            [*common, *(lora if form == "peft" else [f"encoder/{name}" for name in lora])]
        )
        assert not [
            name
            for name, content in files.items()
            if str(world).encode() in content or str(tmp_path).encode() in content
        ]
        loaded = adapters.load_adapter(adapters.locate("me/new").folder, base)
        same(loaded.trained, want.trained)
        assert loaded.base_path == "org/base"
        card = files["README.md"].decode()
        told = metadata_of(card)
        assert (
            told["base_model"] == "org/base"
            and told["library_name"] == {"native": "icae_jax", "peft": "peft"}[form]
        )
        assert (
            told.get("license") == ("apache-2.0" if form == "native" else None)
            and "icae" in told["tags"]
        )
        for line in (
            "Restoring a paragraph: AE loss 0.100 nats per token (behind another text's memory "
            "4.000), BLEU-4 98.7, at 4.0x",
            "Held-out losses at the end of training (step 7), nats per token: memory: ae 0.2500; "
            "wrong memory: ae 4.5000",
            'icae_jax.load("me/new")',
            "| memory tokens | 4 for each segment of up to 16 text tokens |",
            "| method | ICAE |",
        ):
            assert line in card, card
        # The code of the card runs in the folder that the hub's client makes.
        folder = huggingface_hub.snapshot_download("me/new")
        code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[1]
        here = os.getcwd()
        try:
            os.chdir(folder)
            exec(
                code.replace("from_pretrained(base,", f"from_pretrained({str(world / 'base')!r},"),
                names := {},
            )
        finally:
            os.chdir(here)
        assert names["base"] == "org/base" and names["compress"](" ".join(WORDS[8:12])).shape == (
            K,
            32,
        )
    assert (tmp_path / "out" / "README.md").read_text() == card
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "base")
    model = peft.PeftModel.from_pretrained(model, "me/new")
    got = model.state_dict()[
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
    ].numpy()
    np.testing.assert_array_equal(
        got.T, want.trained["lora"]["layers"]["self_attn"]["q_proj"]["a"][1]
    )


def test_what_need_not_be_said(hub, push):
    """Breaks when the base's hub id must be said although --base is one, or --force does not push
    what does not restore.
    """
    assert push("--base", "org/base", "--force", base_id=None, good=False)[0] == 0
    _, files = hub.find("me/new", "main")
    assert json.loads(files["encoder/adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert (
        b"AE loss 4.000 nats per token (behind another text's memory 4.000)" in files["README.md"]
    )


NOT_PUSHED = {
    "not logged in": (
        {},
        [],
        "nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN",
    ),
    "a wrong token": (
        {},
        [],
        "--push me/new the hub says: .*401.*give a repository that you may write to, with a token",
    ),
    "offline": ({}, [], "HF_HUB_OFFLINE is set; take it away to push"),
    "others' name": (
        {"to": "others/new"},
        [],
        "--push others/new the hub says: .*403.*don't have the rights",
    ),
    "read only": (
        {"to": "me/read-only"},
        [],
        "--push me/read-only the hub says: .*403.*not the required permissions",
    ),
    "public already": (
        {"to": "org/adapter"},
        ["--private"],
        "--push org/adapter is there already, and public",
    ),
    "no hub id": ({"to": "new"}, [], "--push 'new' is no repository of the hub; give ORG/NAME"),
    "a revision": ({"to": "me/new@v1"}, [], "--push 'me/new@v1' is no repository of the hub"),
    "another format": (
        {},
        ["--format", "icae-v2"],
        "--push takes --format native or peft, not icae-v2",
    ),
    "a base of this machine": (
        {"base_id": None},
        [],
        "is this machine's own name of the base; say with --base_id ORG/NAME",
    ),
    "another base": (
        {"base_id": "org/other"},
        [],
        "org/other has fingerprint .*, but the adapter's base .*; give its own --base_id",
    ),
    "a base that is none": ({"base_id": "/base"}, [], "--base_id '/base' is no hub id"),
    "far from restoring": (
        {"good": False},
        [],
        "nothing was written or pushed; --force does it all the same",
    ),
}


@pytest.mark.parametrize("name", NOT_PUSHED)
def test_nothing_is_pushed(name, world, hub, push, tmp_path, monkeypatch):
    """Breaks when a mistake, a closed door or an adapter that does not restore is pushed all the
    same, or ends in a traceback.
    """
    hub.commit("me/read-only", {"mine": b"x"})
    hub.forbidden.add("me/read-only")
    hub.upload(
        "org/other", world / "base", only=("config.json", "tokenizer.json", "tokenizer_config.json")
    )
    before = {repository: len(commits) for repository, commits in hub.repositories.items()}
    if name == "not logged in":
        monkeypatch.delenv("HF_TOKEN")
    if name == "a wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_bad")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", name == "offline")
    if name == "another base":
        monkeypatch.setattr(bases, "identify", lambda base: (None, "0" * 64))
    named, flags, message = NOT_PUSHED[name]
    code, _, err = push(*flags, **named)
    assert code == 2 and re.search(message, err), err
    assert {
        repository: len(commits) for repository, commits in hub.repositories.items() if commits
    } == before


def test_an_outage_while_pushing(hub, push):
    """Breaks when a hub that is down counts as bad input, or is not asked again."""
    hub.status = ("POST", "/commit/", 503)
    with pytest.raises(ConnectionError, match="--push me/new: the hub cannot be reached"):
        push()
    assert sum("/commit/" in request for request in hub.requests) == errors.TRIES


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --to DIR to write the adapter, --push ORG/NAME to upload it, or both"),
        (["--to", "out", "--private"], "--private counts only with --push"),
        (["--to", "out", "--license", "mit"], "--license counts only with --push"),
    ],
)
def test_flags_that_do_nothing(flags, message, world, tmp_path, monkeypatch, capsys):
    """Breaks when a flag is taken and does nothing."""
    monkeypatch.chdir(tmp_path)
    assert (
        run("convert", "adapter", "--from", world / "adapter", "--base", world / "base", *flags)
        == 2
    )
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
