"""Whatever stands in a file: a result without NaN, or a `UserError`; never another exception."""

import functools
import json
import math
import shutil
import struct

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import TINY, write_adapter
from hypothesis import strategies as st

from icae_jax.compression import memory as memories
from icae_jax.compression.config import CompressionConfig
from icae_jax.data import sources
from icae_jax.errors import UserError
from icae_jax.inference import memory_file
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.interop.hub.text import user_ids
from icae_jax.models import llama
from icae_jax.models.families import config_json

FEW, MANY = 150, 2000  # examples of each kind, in every run and in nightly ones


READ = []  # what the running test's examples gave where they were not refused: with none at all it would show nothing


def examples(**strategies):
    """Has a test run with a few examples, the same ones every time, and with many, marked `nightly`. strategies: of its arguments."""
    return functools.partial(_runs, strategies)


def _runs(strategies, test):
    @pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.nightly)])
    def run(request, count):
        settings = hypothesis.settings(
            max_examples=count,
            derandomize=count == FEW,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        READ.clear()
        settings(hypothesis.given(**strategies)(test))(request.getfixturevalue)
        print(
            f"{test.__name__}: {count} examples gave {len(READ)} results, the others were refused"
        )
        assert READ

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


ODD_TEXTS = [
    "",
    "8",
    "8.0",
    "1e-05",
    "nan",
    "inf",
    "null",
    "silu",
    "linear",
    "yarn",
    "\ud83d",
    "\x00",
    "../x",
    "a" * 300,
]
ODD_NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    8,
    2**31,
    2**63,
    10**400,
    -0.0,
    0.5,
    8.0,
    1e-9,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(ODD_NUMBERS),
    st.integers(),
    st.floats(),
    st.sampled_from(ODD_TEXTS),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(ODD_TEXTS) | st.text(max_size=8), inner, max_size=4)
    ),
)


def changed(valid, more=()):
    """A valid JSON object with some fields removed, and some, its own or others, of any value, nested ones too."""
    names = st.sampled_from([*valid, *more]) | st.text(max_size=8)

    def change(removed, fields):
        return {name: value for name, value in valid.items() if name not in removed} | fields

    return st.builds(
        change,
        st.sets(st.sampled_from(list(valid)), max_size=2),
        st.dictionaries(names, VALUES, max_size=3),
    )


def finite(values):
    return all(
        math.isfinite(value)
        for value in values
        if isinstance(value, int | float) and abs(value) < 10**300
    )


# --------------------------------------------------------------------------------------------------------- configurations

CONFIG = config_json.hub_config(TINY, "float32", {"bos_token_id": 1, "eos_token_id": 2})
ROPES = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "llama3", "yarn", "dynamic"]) | VALUES,
        "type": st.sampled_from(["linear", "yarn"]) | VALUES,
        **{
            name: st.sampled_from(ODD_NUMBERS) | VALUES
            for name in ("factor", "low_freq_factor", "high_freq_factor", "rope_theta")
        },
        **{
            name: st.sampled_from(ODD_NUMBERS) | VALUES
            for name in ("original_max_position_embeddings", "attention_factor", "beta_fast")
        },
    },
)


@examples(
    raw=changed(
        CONFIG,
        (
            "sliding_window",
            "layer_types",
            "attention_bias",
            "quantization_config",
            "num_experts",
            "rope_scaling",
            "auto_map",
        ),
    ),
    architecture=st.sampled_from([*config_json.FAMILIES, ""]) | VALUES,
    rope=st.none() | ROPES,
)
def test_any_config_json(fixture, raw, architecture, rope):
    """Breaks when a field of config.json of any value is a traceback, or gives sizes or constants that are no numbers."""
    raw = (
        raw
        | ({"architectures": [architecture]} if architecture != "" else {})
        | ({"rope_parameters": rope} if rope is not None else {})
    )
    try:
        config = config_json.parse_config(raw)
    except UserError as error:
        assert (
            str(error).startswith("config.json: ")
            or "of the model" in str(error)
            or "num_heads" in str(error)
        )
        return
    READ.append(1)
    assert all(
        type(n) is int and n > 0
        for n in (config.vocab_size, config.num_layers, config.head_dim, config.hidden_size)
    )
    scaling = vars(config.rope_scaling).values() if config.rope_scaling else ()
    assert finite([config.rms_norm_eps, config.rope_theta, *scaling])
    if config.num_layers < 100:
        llama.param_shapes(config)


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory):
    """(adapter folder, its base)."""
    base = bases.load_base(tiny_base)
    return write_adapter(tmp_path_factory.mktemp("adapter") / "a", base), base


@pytest.fixture(scope="module")
def spoiled(adapter, tmp_path_factory):
    """A copy of the adapter's folder, of which an example changes one file and puts it back."""
    return shutil.copytree(adapter[0], tmp_path_factory.mktemp("spoiled") / "a")


def load_with(fixture, name, raw):
    """Loads the adapter with another content of a JSON file; None where that is refused."""
    (good, base), folder = fixture("adapter"), fixture("spoiled")
    (folder / name).write_text(json.dumps(raw))
    try:
        return adapters.load_adapter(folder, base)
    except UserError as error:
        assert "\n" not in str(error).split(":\n  ")[0]
        return None
    finally:
        shutil.copyfile(good / name, folder / name)


PEFT = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj"], "bias": "none", "inference_mode": True,
}  # fmt: skip
PEFT_MORE = (
    "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "modules_to_save", "lora_bias",
    "fan_in_fan_out", "exclude_modules", "layer_replication", "trainable_token_indices", "target_parameters", "megatron_config", "revision",
)  # fmt: skip


@examples(raw=changed(PEFT, PEFT_MORE) | VALUES)
def test_any_adapter_config_json(fixture, raw):
    """Breaks when a field of adapter_config.json of any value is a traceback, or makes a LoRA of NaN."""
    loaded = load_with(fixture, "encoder/adapter_config.json", raw)
    if loaded is not None:
        READ.append(1)
        assert finite([loaded.lora.scale, loaded.lora.dropout]) and loaded.lora.rank >= 1
        for of in loaded.trained["lora"]["layers"].values():
            assert all(
                np.isfinite(np.asarray(x)).all() for pair in of.values() for x in pair.values()
            )


@examples(data=st.data())
def test_any_icae_json(fixture, data):
    """Breaks when a field of icae.json, or of its groups, of any value is a traceback."""
    valid = json.loads((fixture("adapter")[0] / "icae.json").read_text())
    group = data.draw(st.sampled_from([None, "compression", "template"]))
    raw = (
        data.draw(changed(valid, ("origin",)))
        if group is None
        else valid | {group: data.draw(changed(valid[group]) | VALUES)}
    )
    loaded = load_with(fixture, "icae.json", raw)
    if loaded is not None:
        READ.append(1)
        assert finite([loaded.compression.rate]) and loaded.compression.k == 4


TOKENIZER = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512,
}  # fmt: skip
TOKENIZER_MORE = (
    "added_tokens_decoder",
    "add_bos_token",
    "chat_template",
    "extra_special_tokens",
    "auto_map",
    "pad_token",
    "split_special_tokens",
)


@pytest.fixture(scope="module")
def tokenizer_folder(tiny_base, tmp_path_factory):
    return shutil.copytree(
        tiny_base,
        tmp_path_factory.mktemp("tokenizer") / "base",
        ignore=shutil.ignore_patterns("*.safetensors"),
    )


@examples(raw=changed(TOKENIZER, TOKENIZER_MORE) | VALUES)
def test_any_tokenizer_config_json(fixture, raw):
    """Breaks when a field of tokenizer_config.json of any value is a traceback, or makes other ids of a text than tokenizer.json does."""
    folder = fixture("tokenizer_folder")
    (folder / "tokenizer_config.json").write_text(json.dumps(raw))
    try:
        tokenizer = tokenizers.load_tokenizer(folder)
    except UserError as error:
        assert str(folder) in str(error)
        return
    READ.append(1)
    assert user_ids(tokenizer, "the cat saw 2024") == [8, 9, 17, 0] and tokenizers.fingerprint(
        tokenizer
    )


# ------------------------------------------------------------------------------------------------------------------ rows

ROW = {"text": "the cat", "id": "a", "subset": "s"}
QUESTION = {"context": "the cat", "question": "who ?", "answers": ["the cat"], "id": 3}
FIELDS = (
    "input",
    "prompt",
    "answer",
    "instruction",
    "output",
    "messages",
    "title",
    "is_impossible",
)
CONTENT = st.one_of(
    st.lists(changed(ROW, FIELDS) | changed(QUESTION, FIELDS) | VALUES, max_size=3).map(
        lambda rows: "\n".join(map(json.dumps, rows)).encode()
    ),
    st.lists(changed(QUESTION, FIELDS) | VALUES, max_size=3).map(
        lambda rows: json.dumps(rows, indent=1).encode()
    ),
    st.lists(changed(QUESTION, FIELDS), max_size=2).map(
        lambda qas: json.dumps(
            {
                "version": "v2.0",
                "data": [{"title": "t", "paragraphs": [{"context": "the cat", "qas": qas}]}],
            }
        ).encode()
    ),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(["utf-8-sig", "utf-16", "utf-16-le", "latin-1"]).map(
        lambda code: 'text,id\n"thé, cat",1\n'.encode(code)
    ),
    st.binary(max_size=60),
)
SUFFIXES = [
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".txt",
    ".parquet",
    ".arrow",
    ".jsonl.gz",
    ".json.zst",
    ".csv.xz",
    ".txt.bz2",
    "",
    ".pdf",
]


@examples(content=CONTENT, suffix=st.sampled_from(SUFFIXES))
def test_any_rows(fixture, content, suffix):
    """Breaks when a data file of any content and name is a traceback, or gives a row that is no text or cannot be written."""
    path = fixture("tmp_path_factory").getbasetemp() / f"rows{suffix}"
    path.write_bytes(content)
    check_rows(path)


def check_rows(path):
    """Reads a data file: rows whose fields are texts that can be written, or a `UserError` of one line that names the file."""
    try:
        rows = list(sources.read_rows(str(path)))
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    READ.extend(rows)
    for row in rows:
        texts = [
            row.text,
            row.id,
            row.subset,
            *([] if row.question is None else [row.question, *row.answers]),
        ]
        assert all(isinstance(text, str) and text.encode() is not None for text in texts)


NUMBERS = st.integers(-(2**31), 2**31 - 1)
COLUMNS = {  # types of Arrow, and the values that make a column of each
    pa.string(): st.text(max_size=6), pa.large_string(): st.text(max_size=6), pa.binary(): st.binary(max_size=6), pa.int64(): NUMBERS,
    pa.float64(): st.floats(), pa.bool_(): st.booleans(), pa.list_(pa.string()): st.lists(st.text(max_size=3), max_size=2),
    pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})): st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": st.text(max_size=3)}), max_size=3
    ),
    pa.struct({"text": pa.list_(pa.string())}): st.fixed_dictionaries({"text": st.lists(st.text(max_size=3), max_size=2)}),
    **{kind: NUMBERS for kind in (pa.date32(), pa.timestamp("ns"), pa.timestamp("us", "UTC"), pa.timestamp("s"), pa.duration("s"))},
    pa.list_(pa.date32()): st.lists(NUMBERS, max_size=2), pa.struct({"t": pa.timestamp("ns")}): st.fixed_dictionaries({"t": NUMBERS}),
}  # fmt: skip


@st.composite
def tables(draw):
    """The bytes of a table as Parquet or Arrow, of fields that are read with values of any type, some of them damaged; and its suffix."""
    columns = {}
    for name in draw(
        st.sampled_from(
            [
                ("text", "id"),
                ("context", "question", "answers", "id"),
                ("messages", "system"),
                ("context", "qas"),
            ]
        )
    ):
        kind = draw(st.sampled_from([pa.string(), *COLUMNS]))
        columns[name] = pa.array(
            draw(st.lists(st.none() | COLUMNS[kind], min_size=2, max_size=2)), kind
        )
    sink, suffix, table = (
        pa.BufferOutputStream(),
        draw(st.sampled_from([".parquet", ".arrow"])),
        pa.table(columns),
    )
    if suffix == ".parquet":
        pa.parquet.write_table(table, sink)
    else:
        with draw(st.sampled_from([pa.ipc.new_file, pa.ipc.new_stream]))(
            sink, table.schema
        ) as writer:
            writer.write_table(table)
    content = sink.getvalue().to_pybytes()
    changes = draw(
        st.dictionaries(st.integers(0, len(content) - 1), st.integers(0, 255), max_size=3)
    )
    return bytes(changes.get(i, byte) for i, byte in enumerate(content)), suffix


@examples(table=tables())
def test_any_table(fixture, table):
    """Breaks when a column of a type that Python has not, a value of another type than is expected, or a damaged byte is a traceback."""
    content, suffix = table
    path = fixture("tmp_path_factory").getbasetemp() / f"table{suffix}"
    path.write_bytes(content)
    check_rows(path)


# -------------------------------------------------------------------------------------------------------------- memory files

SMALL = CompressionConfig(k=2, rate=4)


@pytest.fixture(scope="module")
def memory_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "m.safetensors"
    slots = np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)
    memory = memories.place(memories.Slots, {"slots": slots}, np.asarray([[8, 3], [5, 0]]), SMALL)
    origin = memory_file.Origin(SMALL, "b" * 64, "a" * 64, path.parent)
    memory_file.save(path, memory, ["a", "b"], origin)
    return path.read_bytes()


def rebuilt(content, header):
    length = int.from_bytes(content[:8], "little")
    data = json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data + content[8 + length :]


@examples(data=st.data())
def test_any_memory_file(fixture, data):
    """Breaks when a memory file with another header, other metadata or other bytes is a traceback, or is read as NaN."""
    content = fixture("memory_bytes")
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    kind = data.draw(st.sampled_from(["metadata", "tensor", "header", "bytes", "cut"]))
    if kind == "metadata":
        texts = st.sampled_from(ODD_TEXTS[:10]) | st.text(max_size=8) | VALUES.map(json.dumps)
        fields = data.draw(
            st.dictionaries(st.sampled_from(list(header["__metadata__"])), texts, max_size=2)
        )
        content = rebuilt(content, header | {"__metadata__": header["__metadata__"] | fields})
    elif kind == "tensor":
        name = data.draw(st.sampled_from(["slots", "lengths"]))
        content = rebuilt(content, header | {name: data.draw(changed(header[name]))})
    elif kind == "header":
        content = rebuilt(content, data.draw(changed(header, ("k", "v"))))
    elif kind == "bytes":
        changes = data.draw(
            st.dictionaries(
                st.integers(0, len(content) - 1), st.integers(0, 255), min_size=1, max_size=6
            )
        )
        content = bytes(changes.get(i, byte) for i, byte in enumerate(content))
    else:
        content = content[: data.draw(st.integers(0, len(content)))]
    path = fixture("tmp_path_factory").getbasetemp() / "m.safetensors"
    path.write_bytes(content)
    try:
        memory, ids = memory_file.load(path, memory_file.Origin(SMALL, "b" * 64, "a" * 64))
    except UserError as error:
        assert str(path) in str(error)
        return
    READ.append(1)
    assert len(ids) == len(memory) and all(np.isfinite(x).all() for x in memory.contents.values())
