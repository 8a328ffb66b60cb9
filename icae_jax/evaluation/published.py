"""Published figures to compare with ours: what the papers and their replications report.

Scores are in percent, losses in nats per token, times in seconds. Bases, data and training differ
from ours and from table to table.
"""

from typing import NamedTuple

SUITES = ("autoencode", "continue", "memorise", "qa", "ablate", "speed")
NOT_STATED = "not stated"  # of the base, where the figure comes without it
DIFFERS = "Published figures: their bases, data and training differ from ours."

ICAE = "ICAE, arXiv 2307.06945"
X500 = "500xCompressor, arXiv 2408.03094"
IC_FORMER = "Replication in IC-Former, arXiv 2406.13618"
FLEXCOMP = "Replication in FlexComp"
BENCHPRESS = "BenchPress, arXiv 2510.20797"
ARC = "Replication in ARC-Encoder, arXiv 2510.20535"
UPL = "Training log of the recipe 1azybug/UPL"


class Record(NamedTuple):
    """One published number."""

    source: str  # the paper and its arXiv id, or where it was replicated
    suite: str  # of ours, to compare with: one of SUITES
    base: str
    data: str  # the set or the kind of text
    tokens: int | None  # of the context, at most; None where it is not stated
    memory: int | None  # memory tokens; None without a memory, or where only the ratio is stated
    ratio: int | None  # tokens per memory token, where it is stated instead
    arm: str
    metric: str  # with its unit
    value: float | int


class _Table(NamedTuple):
    caption: str
    rows: tuple[str, ...]  # fields of a record that give its row
    columns: tuple[str, ...]  # fields that give its column
    records: tuple[Record, ...]


def _table(caption, source, suite, rows, columns, header, body, **fixed):
    """Makes a table's records.

    rows, columns: names of fields, joined by spaces. header: for each column, the values of its
    fields. body: by the values of a row's fields, its figures; None where none is stated. fixed:
    fields that all records share.
    """
    fixed = {
        "source": source,
        "suite": suite,
        "base": NOT_STATED,
        "tokens": None,
        "memory": None,
        "ratio": None,
    } | fixed
    rows, columns, records = rows.split(), columns.split(), []
    for row, values in body.items():
        for column, value in zip(header, values, strict=True):
            if value is not None:
                fields = zip(rows + columns, (*row, *column), strict=True)
                records.append(Record(**fixed | dict(fields), value=value))
    return _Table(caption, tuple(rows), tuple(columns), tuple(records))


_QA_SETS = [
    ("ArxivQA",),
    ("SQuAD",),
    ("RelationExtraction",),
    ("HotpotQA",),
    ("RACE",),
    ("average of the five",),
]
_QA_OF_500X = {"base": "Llama-3-8B-Instruct", "tokens": 500}
_MRQA = [("MRQA, in domain",), ("MRQA, out of domain",)]

TABLES = (
    # ----------------------------------------------------------------------------------- autoencode
    _table(
        "Text restored from memory after pretraining, 512 tokens into 128 slots",
        ICAE, "autoencode",
        "base", "metric", [("BLEU-4 (%)",), ("AE loss (nats per token)",)],
        {
            ("Llama-7b",): (99.1, 0.017),
            ("Llama-2-7b",): (99.5, 0.009),
            ("Llama-2-13b",): (99.8, 0.004),
        },
        data="the Pile", tokens=512, memory=128, arm="memory",
    ),
    _table(
        "Text restored from memory, contexts of 96 and of 480 tokens", X500, "autoencode",
        "tokens memory", "metric arm", [("ROUGE-L (%)", "500x"), ("ROUGE-L (%)", "ICAE")],
        {
            (96, 16): (99.7, 90.6),
            (96, 4): (93.1, 73.0),
            (96, 1): (72.6, 54.6),
            (480, 16): (49.6, 51.0),
            (480, 4): (52.9, 40.0),
            (480, 1): (40.3, 31.0),
        },
        base="Llama-3-8B-Instruct", data="arXiv abstracts from after the base's training",
    ),
    _table(
        "AE loss over the steps of a recipe that converges (5x, batch 16), mean over 200 "
        "steps on either side",
        UPL, "autoencode",
        "arm", "metric", [("AE loss (nats per token)",)],
        {
            ("memory, step 100",): (1.08,),
            ("memory, step 500",): (0.23,),
            ("memory, step 1000",): (0.12,),
            ("memory, step 2000",): (0.10,),
            ("memory, step 3000",): (0.05,),
            ("memory, step 10000",): (0.035,),
            ("memory, lowest single step near step 1000",): (0.049,),
        },
        base="Llama-3.2-1B", data="the recipe's training text", ratio=5,
    ),
    # ------------------------------------------------------------------------------------- continue
    _table(
        "Perplexity of the text after 512 tokens, which stand in the prompt or in 128 slots",
        ICAE, "continue",
        "base", "metric arm", [("perplexity", "full context"), ("perplexity", "memory")],
        {
            ("Llama-7b",): (9.01, 9.50),
            ("Llama-2-7b",): (8.81, 9.18),
            ("Llama-2-13b",): (8.15, 8.45),
        },
        data="the Pile", tokens=512, memory=128,
    ),
    _table(
        "Perplexity of the text after 128, 256 and 512 tokens, which stand in the prompt or "
        "in 128 slots",
        ICAE, "continue",
        "tokens", "metric arm", [("perplexity", "full context"), ("perplexity", "memory")],
        {
            (128,): (9.99, 10.15),
            (256,): (9.45, 9.77),
            (512,): (9.01, 9.50),
        },
        base="Llama-7b", data="the Pile", memory=128,
    ),
    # ------------------------------------------------------------------------------------- memorise
    _table(
        "Restoring 512 tokens by what they are", ICAE, "memorise",
        "data", "metric", [("AE loss (nats per token)",), ("BLEU-4 (%)",)],
        {
            ("normal text",): (0.01, 99.3),
            ("patterned random text (every token id + 1)",): (1.63, 3.5),
            ("completely random text",): (4.55, 0.2),
        },
        tokens=512, memory=128, arm="memory",
    ),
    # ------------------------------------------------------------------------------------------- qa
    _table(
        "Answers with the memory against the same chat model with the full context, GPT-4 as judge",
        ICAE, "qa",
        "base memory", "metric", [("win + tie (%)",)],
        {
            ("Llama-2-7b-chat", 64): (48.4,),
            ("Llama-2-7b-chat", 128): (54.6,),
            ("Llama-2-7b-chat", 256): (77.8,),
            ("Llama-2-13b-chat", 256): (79.2,),
        },
        data="PwC", tokens=512, arm="memory against full context",
    ),
    _table(
        "Answers with the memory against those with a summary of as many tokens by GPT-4, "
        "GPT-4 as judge",
        ICAE, "qa",
        "arm", "metric", [("win (%)",), ("lose (%)",), ("tie (%)",)],
        {("memory against a summary of 128 tokens",): (34.1, 17.6, 48.3)},
        data="PwC", tokens=512, memory=128,
    ),
    _table(
        "Answers to the prompts of PwC without a judge", IC_FORMER, "qa",
        "arm memory", "metric", [("ROUGE-1 F (%)",), ("ROUGE-2 F (%)",), ("ROUGE-L F (%)",)],
        {
            ("full context", None): (50.1, 33.1, 46.8),
            ("ICAE", 128): (55.5, 37.7, 51.9),
        },
        data="PwC",
    ),
    _table(
        "F1 of extractive answers, contexts of up to 500 tokens", X500, "qa",
        "arm memory", "data", _QA_SETS,
        {
            ("no context", None): (28.41, 29.95, 25.75, 29.32, 15.31, 25.75),
            ("full context", None): (55.90, 70.65, 71.36, 69.37, 39.52, 61.36),
            ("500x", 16): (40.77, 50.01, 68.73, 41.68, 25.42, 45.32),
            ("ICAE", 16): (38.70, 51.94, 65.94, 42.11, 23.69, 44.48),
            ("500x", 4): (38.30, 49.66, 63.72, 36.86, 21.49, 42.00),
            ("ICAE", 4): (33.31, 47.48, 67.28, 40.39, 20.06, 41.70),
            ("500x", 1): (29.73, 42.86, 63.09, 37.47, 21.75, 38.98),
            ("ICAE", 1): (20.50, 27.20, 44.46, 22.44, 13.71, 25.66),
        },
        metric="F1 (%)", **_QA_OF_500X,
    ),
    _table(
        "Exact match of extractive answers, contexts of up to 500 tokens", X500, "qa",
        "arm memory", "data", _QA_SETS,
        {
            ("no context", None): (0.04, 1.02, 1.39, 3.42, 0.59, 1.29),
            ("full context", None): (13.74, 36.79, 53.15, 43.19, 13.94, 32.16),
            ("500x", 16): (14.00, 28.59, 50.44, 22.99, 10.97, 25.40),
            ("ICAE", 16): (13.44, 30.37, 44.64, 24.57, 9.49, 24.50),
            ("500x", 4): (10.64, 27.54, 45.69, 19.69, 7.86, 22.28),
            ("ICAE", 4): (7.54, 26.49, 50.91, 23.75, 6.82, 23.10),
            ("500x", 1): (10.60, 22.75, 45.31, 21.13, 7.56, 21.47),
            ("ICAE", 1): (3.40, 10.66, 27.10, 9.38, 4.16, 10.94),
        },
        metric="exact match (%)", **_QA_OF_500X,
    ),
    _table(
        "What 500x keeps of the full context's F1: the unweighted mean of the ratios of the "
        "five sets",
        X500, "qa",
        "memory", "metric", [("F1 kept (%)",)],
        {(16,): (72.89,), (4,): (67.12,), (1,): (62.26,)},
        arm="500x", data="average of the five", **_QA_OF_500X,
    ),
    _table(
        "F1 at the same training budget (20k + 20k steps of 128)", FLEXCOMP, "qa",
        "arm ratio", "data", _MRQA,
        {
            ("ICAE", 15): (44.7, 30.1),
            ("500x", 15): (49.1, 35.2),
            ("SAC", 15): (54.9, 40.1),
            ("ICAE, one model for many ratios", 15): (43.5, 30.6),
            ("500x, one model for many ratios", 15): (48.8, 34.6),
            ("ICAE", 51): (41.2, 28.1),
            ("500x", 51): (43.1, 30.7),
            ("SAC", 51): (46.3, 32.3),
            ("ICAE", 510): (36.9, 26.9),
            ("500x", 510): (34.6, 25.2),
            ("SAC", 510): (39.1, 26.9),
        },
        base="Llama-3.2-1B", metric="F1 (%)",
    ),
    _table(
        "F1 on SQuAD by how the memory is made", BENCHPRESS, "qa",
        "arm ratio", "metric", [("F1 (%)",)],
        {
            ("full context", None): (86.5,),
            ("causal memory tokens", 4): (77.1,),
            ("causal memory tokens", 16): (57.1,),
            ("bidirectional memory tokens", 4): (80.0,),
            ("bidirectional memory tokens", 16): (64.8,),
            ("mean pooling", 4): (83.8,),
            ("mean pooling", 16): (71.4,),
        },
        base="Qwen3-8B", data="SQuAD",
    ),
    _table(
        "Exact match on SQuAD of a baseline like ICAE, 32 slots (about 5x)", ARC, "qa",
        "base", "metric", [("exact match (%)",)],
        {("Mistral",): (58.8,), ("Llama-3.1-8B",): (61.6,)},
        data="SQuAD", memory=32, arm="ICAE",
    ),
    # --------------------------------------------------------------------------------------- ablate
    _table(
        "Answers with the memory against those with a memory pretrained otherwise, 128 slots, "
        "GPT-4 as judge",
        ICAE, "ablate",
        "arm", "metric", [("win (%)",), ("lose (%)",), ("tie (%)",)],
        {
            ("pretrained against not pretrained",): (60.4, 9.5, 30.1),
            ("pretrained against AE only",): (36.4, 28.5, 35.1),
            ("pretrained against LM only",): (35.1, 24.9, 40.0),
        },
        data="PwC", tokens=512, memory=128,
    ),
    _table(
        "What a decoder that stays frozen costs, on average", BENCHPRESS, "ablate",
        "arm", "metric", [("F1 lost (points)",)],
        {("frozen decoder against a tuned one",): (3.6,)},
        data="average of its sets",
    ),
    _table(
        "What one model for random ratios costs against one for each ratio, about and at most",
        FLEXCOMP, "ablate",
        "arm", "metric", [("F1 lost (points)",)],
        {("one model for many ratios against one for each",): (1,)},
        base="Llama-3.2-1B", data="MRQA",
    ),
    # ---------------------------------------------------------------------------------------- speed
    _table(
        "Seconds to answer with 128 new tokens", ICAE, "speed",
        "data tokens", "arm metric",
        [
            ("full context", "time (s)"), ("memory, compress", "time (s)"),
            ("memory, decode", "time (s)"), ("memory", "speed-up (x)"),
        ],
        {
            ("batch of 8", 2048): (24.0, 3.4, 3.9, 3.3),
            ("batch of 8", 512): (9.3, 0.6, 3.7, 2.2),
            ("batch of 32", 512): (24.3, 2.6, 4.2, 3.6),
        },
        base="Llama-7b",
    ),
    _table(
        "Speed-up claimed for slots that are kept, at least", ICAE, "speed",
        "arm", "metric", [("speed-up (x)",)],
        {("memory, cached",): (7,)},
        base="Llama-7b", data="128 new tokens",
    ),
    _table(
        "Seconds for one forward pass alone, over 2048 tokens", IC_FORMER, "speed",
        "arm", "metric", [("time (s)",)],
        {("full context",): (1.85,), ("ICAE",): (3.58,)},
        data="batch of 8", tokens=2048,
    ),
    _table(
        "What 500x saves when it generates 100 to 400 tokens",
        X500 + " (ACL 2025, abstract)", "speed",
        "metric", "arm", [("500x, least",), ("500x, most",)],
        {("calculations saved (%)",): (27, 90), ("memory saved (%)",): (55, 83)},
        base="Llama-3-8B-Instruct", data="arXiv abstracts", ratio=500,
    ),
)  # fmt: skip
RECORDS = tuple(record for table in TABLES for record in table.records)

_NAMES = {
    "memory": "memory tokens",
    "ratio": "tokens per memory token",
    "data": "",
    "arm": "",
    "metric": "",
}


def tables(suite: str) -> list[tuple[str, list[str], list[list[str]]]]:
    """The published tables of a suite as (caption, header, rows), of text cells.

    A caption names the source, what all rows share, and that bases and data differ. Numbers have
    the decimals of the most precise one of their column. ValueError for a suite not in `SUITES`.
    """
    if suite not in SUITES:
        raise ValueError(f"suite is {suite!r}; it must be one of {', '.join(SUITES)}")
    return [_text(table) for table in TABLES if table.records[0].suite == suite]


def _text(table: _Table) -> tuple[str, list[str], list[list[str]]]:
    """(caption, header, rows) of a table."""
    rows = dict.fromkeys(_key(record, table.rows) for record in table.records)
    columns = dict.fromkeys(_key(record, table.columns) for record in table.records)
    values = {(_key(r, table.rows), _key(r, table.columns)): r.value for r in table.records}
    cells = [[_cell(x) for x in row] for row in rows]
    for column in columns:
        shown = [values.get((row, column)) for row in rows]
        decimals = max(len(str(v).partition(".")[2]) for v in shown if v is not None)
        for line, value in zip(cells, shown, strict=True):
            line.append("–" if value is None else f"{value:.{decimals}f}")
    record = table.records[0]
    shared = [
        value
        for field, value in (
            ("base", f"base {record.base}"),
            ("data", record.data),
            ("metric", record.metric),
        )
        if field not in table.rows + table.columns
    ]
    header = [
        *(_NAMES.get(field, field) for field in table.rows),
        *(", ".join(map(_cell, column)) for column in columns),
    ]
    return f"{table.caption}; {', '.join(shared)}. {record.source}. {DIFFERS}", header, cells


def _key(record: Record, fields: tuple[str, ...]) -> tuple:
    return tuple(getattr(record, field) for field in fields)


def _cell(value) -> str:
    return "–" if value is None else str(value)
