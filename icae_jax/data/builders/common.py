"""What the builders share: a TFDS set made of the user's own files, as array_record shards.

Neither TensorFlow nor Beam is needed.
"""

import collections
import contextlib
import functools
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import tensorflow_datasets as tfds

from icae_jax.data import forms, reading
from icae_jax.data.builders import inputs, shards
from icae_jax.data.builders.inputs import Input, Request
from icae_jax.data.rows import Row, Sieve
from icae_jax.errors import UserError

TEXTS = {"id": tfds.features.Text(), "text": tfds.features.Text()}
QUESTIONS = {
    "context": tfds.features.Text(),
    "question": tfds.features.Text(),
    "answers": tfds.features.Sequence(tfds.features.Text()),
}


def check_field(raw: dict, field: str) -> None:
    """UserError if a JSON object has no such field."""
    if field not in raw:
        raise UserError(f"no field {field}; the fields are {forms.listed(raw)}")


def text_of(raw: dict, field: str) -> str:
    """A text field of a JSON object, "" if it is null. UserError if it is absent or not a text."""
    check_field(raw, field)
    return forms.text_of(raw, field)


def row_of(
    text: str,
    row_id: str = "",
    question: str | None = None,
    answers: tuple[str, ...] | None = None,
) -> Row:
    """A `Row` whose place is left to the reader."""
    return Row(text, question, answers, "", row_id)


def _fingerprint(file):
    size = pathlib.Path(file.path).stat().st_size
    return [pathlib.Path(file.path).name, file.subset, size, reading.ends_hash(file.path, size)]


class LocalBuilder(tfds.core.DatasetBuilder, skip_registration=True):
    """A TFDS set made of the user's own files.

    A subclass says in `FILES` or `sources` which files these are, and in `parse` which rows a raw
    row holds.
    Builders are not in TFDS's registry, where other sets may have their names: a prepared set is
    read by its files alone.

    Args:
      request: what the user asks for; None to read what is prepared.
      processes: how many processes write shards.
      strict: the flag by which the user asks for an error instead of leaving empty rows out; ""
        if not set.
      **kwargs: those of `tfds.core.DatasetBuilder`.

    Raises:
      UserError: the request lacks something; nothing is written.
    """

    VERSION = tfds.core.Version("1.0.0")
    ABOUT = ""  # what it is made of, in one line
    FLAGS = ("from", "only")  # the parts of a request that it takes
    FEATURES = None  # `{name: tfds feature}` of an example
    FILES = ()  # the `inputs.Published` files of a published set

    def __init__(
        self,
        *,
        request: Request | None = None,
        processes: int = 1,
        strict: str = "",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.info.set_file_format("array_record")
        self.request, self.processes, self.sieve = request, processes, Sieve(strict)
        self.inputs = self.sources(request) if request else {}

    def sources(self, request: Request) -> dict[str, list[Input]]:
        """The files of each split; by default those of `FILES` that the request asks for."""
        return inputs.find(self.FILES, request)

    @staticmethod
    def parse(raw: dict, subset: str) -> Iterator[Row]:
        """Yields the rows of one JSON object, see `shards.write_shards`."""
        raise NotImplementedError

    def options(self) -> dict[str, str]:
        """Keyword arguments of `parse` that the request sets."""
        return {}

    def jobs(
        self, folder: pathlib.Path
    ) -> tuple[dict[str, list[list[shards.Part]]], dict[str, int]]:
        """(the parts of each job of each split, counts of what was noted while making the jobs).

        The sieve counts what was left out. folder: for temporary files.
        """
        return {
            split: [[part] for file in files for part in shards.parts_of(*file)]
            for split, files in self.inputs.items()
        }, {}

    def columns(self) -> frozenset[str]:
        """The columns that are wanted of a table."""
        return forms.FIELDS

    # --------------------------------------------------------------------------------- preparing

    @property
    def origin(self) -> dict:
        """What the set is made of, as JSON; recorded, and compared when it is asked for again."""
        files = {split: [_fingerprint(i) for i in inputs] for split, inputs in self.inputs.items()}
        return files | {"options": self.options()}

    def prepare(self) -> bool:
        """Prepares the set, whole or not at all. Returns whether there was anything to do.

        UserError if a row is malformed (names file and line), a split has no examples, or a set of
        another origin is in its place.
        """
        if self.data_path.exists():
            metadata = self.info.metadata or {}
            if metadata.get("origin") != self.origin:
                raise UserError(
                    f"{self.data_path} was prepared from other files or with other options; give "
                    "this one a name of its own with --name, or another --tfds_dir, or delete that "
                    "folder"
                )
            self.sieve.add(metadata.get("left_out", {}))
            return False
        # TFDS prints about downloads and wants a folder for them, though there are none.
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as empty:
            self.download_and_prepare(download_dir=empty)
        return True

    def left_overs(self) -> list[os.PathLike]:
        """Folders of unfinished preparations of this set, killed or still running."""
        return sorted(self.data_path.parent.glob(f"incomplete.*_{self.data_path.name}"))

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.ABOUT,
            features=tfds.features.FeaturesDict(self.FEATURES),
            metadata=tfds.core.MetadataDict(),
        )

    def _download_and_prepare(self, dl_manager, download_config=None):
        folder = pathlib.Path(self.data_dir)  # TFDS renames it when all is done
        temporary = folder / "passing"
        temporary.mkdir()
        jobs, noted = self.jobs(temporary)
        written = self._write(jobs, temporary)
        empty = [split for split in jobs if not written[split]] if jobs else list(self.inputs)
        if empty:
            why = f"left out {self.sieve}" if self.sieve.left_out else "its files have no rows"
            raise UserError(f"{self.name}: no examples for split {empty[0]!r}: {why}")
        splits = [self._name_shards(folder, split, written[split]) for split in jobs]
        self.info.set_splits(tfds.core.SplitDict(splits))
        left_out = self.sieve.left_out
        counts = {f"{reason} left out": count for reason, (count, _) in left_out.items()}
        self.info.metadata.update(origin=self.origin, noted=counts | dict(noted), left_out=left_out)
        shutil.rmtree(temporary)

    def _write(self, jobs, folder):
        """Writes the shards of all jobs; returns `{split: Written.shards}`."""
        parse = functools.partial(self.parse, **self.options())
        tasks, splits = [], []
        for split, split_jobs in jobs.items():
            for number, parts in enumerate(split_jobs):
                prefix = str(folder / f"{split}.{number:06d}")
                sieve = self.sieve.fresh()
                tasks.append((parts, parse, self.info.features, prefix, sieve, self.columns()))
                splits.append(split)
        results = shards.run(shards.write_shards, tasks, self.processes, "writing shards")
        written = collections.defaultdict(list)
        for split, result in zip(splits, results, strict=True):
            written[split] += result.shards
            self.sieve.add(result.left_out)
        return written

    def _name_shards(self, folder, split, written):
        """Gives shards the names by which TFDS reads them, which hold their number."""
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=self.name, split=split, filetype_suffix="array_record"
        )
        for number, (path, _, _) in enumerate(written):
            pathlib.Path(path).rename(
                template.sharded_filepath(shard_index=number, num_shards=len(written))
            )
        lengths, sizes = [count for _, count, _ in written], [size for _, _, size in written]
        return tfds.core.SplitInfo(
            name=split, shard_lengths=lengths, num_bytes=sum(sizes), filename_template=template
        )

    def _as_dataset(self, *args, **kwargs):
        raise NotImplementedError(
            "array_record sets are read with tfds.data_source, not as a tf.data.Dataset"
        )
