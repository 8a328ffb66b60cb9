"""What the builders share: a TFDS set made of the user's own files, written as array_record shards, without TensorFlow or Beam."""

import collections
import contextlib
import functools
import io
import pathlib
import shutil
import tempfile

import tensorflow_datasets as tfds

from icae_jax.data import reading, rows
from icae_jax.data.builders import shards
from icae_jax.errors import UserError

TEXTS = {"id": tfds.features.Text(), "text": tfds.features.Text()}
QUESTIONS = {
    "context": tfds.features.Text(),
    "question": tfds.features.Text(),
    "answers": tfds.features.Sequence(tfds.features.Text()),
}


def check_field(raw, field):
    """UserError where a JSON object has no such field."""
    if field not in raw:
        raise UserError(f"no field {field}; the fields are {rows.listed(raw)}")


def text_of(raw, field):
    """A text field of a JSON object, "" where it is null. UserError names the field, also where it is absent."""
    check_field(raw, field)
    return rows.text_of(raw, field)


def row_of(text, row_id="", question=None, answers=None):
    """A `Row` whose place is the reader's to know."""
    return rows.Row(text, question, answers, "", row_id)


def _fingerprint(entry):
    size = pathlib.Path(entry.path).stat().st_size
    return [pathlib.Path(entry.path).name, entry.subset, size, reading.ends(entry.path, size)]


class LocalBuilder(tfds.core.DatasetBuilder, skip_registration=True):
    """A TFDS set made of files that the user has. A set says in `sources` which, and in `parse` what rows a raw row holds.

    request: `inputs.Request`, None to read what is prepared. processes: how many write shards. strict: the flag by which the user asks
    for an error in place of rows that are left out for being empty, "" where it is not set. Other arguments: those of
    `tfds.core.DatasetBuilder`. A set is read by its files alone, so that builders stay out of TFDS's register, which other sets of
    their names may be in. UserError, before anything is written, for what the request lacks.
    """

    VERSION = tfds.core.Version("1.0.0")
    ABOUT = ""  # what it is made of, in a line
    FLAGS = ("from", "only")  # the parts of a request that it takes
    FEATURES = None  # `{name: tfds feature}` of an example

    def __init__(self, *, request=None, processes=1, strict="", **kwargs):
        super().__init__(**kwargs)
        self.info.set_file_format("array_record")
        self.request, self.processes, self.sieve = request, processes, rows.Sieve(strict)
        self.inputs = self.sources(request) if request else {}

    def sources(self, request):
        """`{split: [Input]}` of a request."""
        raise NotImplementedError

    @staticmethod
    def parse(raw, subset):
        """Yields the rows of one JSON object, see `shards.write_shards`."""
        raise NotImplementedError

    def options(self):
        """Keyword arguments of `parse` that the request sets."""
        return {}

    def jobs(self, folder):
        """(`{split: [parts of one job, …]}`, `{what: count}` of what was noted on the way); the sieve counts what was left out.

        folder: for files of passing use.
        """
        return {
            s: [[part] for i in files for part in shards.parts_of(*i)]
            for s, files in self.inputs.items()
        }, {}

    def columns(self):
        """The columns that are wanted of a table."""
        return rows.FIELDS

    # --------------------------------------------------------------------------------------------------------- preparing

    @property
    def origin(self):
        """What the set is made of, as JSON: recorded with it, and compared when it is asked for again."""
        return {split: [_fingerprint(i) for i in files] for split, files in self.inputs.items()} | {
            "options": self.options()
        }

    def prepare(self):
        """Prepares the set, whole or not at all. Returns whether there was anything to do.

        UserError names file and line of malformed rows, a split that is left without examples, or a set of another origin in its place.
        """
        if self.data_path.exists():
            if (self.info.metadata or {}).get("origin") != self.origin:
                raise UserError(
                    f"{self.data_path} was prepared from other files or with other options; give this one a name of its own with --name, "
                    "or another --tfds_dir, or delete that folder"
                )
            self.sieve.add((self.info.metadata or {}).get("left_out", {}))
            return False
        # TFDS speaks of downloads, and wants a folder for them; there are none.
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as none:
            self.download_and_prepare(download_dir=none)
        return True

    def left_overs(self):
        """Folders that preparations of this set that were killed left behind; one that is running has such a folder too."""
        return sorted(self.data_path.parent.glob(f"incomplete.*_{self.data_path.name}"))

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.ABOUT,
            features=tfds.features.FeaturesDict(self.FEATURES),
            metadata=tfds.core.MetadataDict(),
        )

    def _download_and_prepare(self, dl_manager, download_config=None):
        folder = pathlib.Path(self.data_dir)  # TFDS gives it its name when all is done
        passing = folder / "passing"
        passing.mkdir()
        jobs, noted = self.jobs(passing)
        parse = functools.partial(self.parse, **self.options())
        tasks, names = [], []
        for split, of_split in jobs.items():
            for number, parts in enumerate(of_split):
                prefix = str(passing / f"{split}.{number:06d}")
                tasks.append(
                    (parts, parse, self.info.features, prefix, self.sieve.fresh(), self.columns())
                )
                names.append(split)
        written = collections.defaultdict(list)
        for split, result in zip(
            names,
            shards.run(shards.write_shards, tasks, self.processes, "writing shards"),
            strict=True,
        ):
            written[split] += result.shards
            self.sieve.add(result.left_out)
        empty = [split for split in jobs if not written[split]] if jobs else list(self.inputs)
        if empty:
            why = f"left out {self.sieve}" if self.sieve.left_out else "its files have no rows"
            raise UserError(f"{self.name}: no examples for split {empty[0]!r}: {why}")
        self.info.set_splits(
            tfds.core.SplitDict(
                [self._name_shards(folder, split, written[split]) for split in jobs]
            )
        )
        noted = {
            f"{reason} left out": count for reason, (count, _) in self.sieve.left_out.items()
        } | dict(noted)
        self.info.metadata.update(origin=self.origin, noted=noted, left_out=self.sieve.left_out)
        shutil.rmtree(passing)

    def _name_shards(self, folder, split, written):
        """Gives shards the names that TFDS reads them by, which hold their number."""
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
