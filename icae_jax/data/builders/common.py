"""What the builders share: a TFDS set made of the user's own files, written as array_record shards, without TensorFlow or Beam."""

import collections
import contextlib
import functools
import io
import pathlib
import shutil
import tempfile

import tensorflow_datasets as tfds

from icae_jax.data import reading
from icae_jax.data.builders import shards
from icae_jax.errors import UserError

TEXTS = {"id": tfds.features.Text(), "text": tfds.features.Text()}
QUESTIONS = {
    "context": tfds.features.Text(),
    "question": tfds.features.Text(),
    "answers": tfds.features.Sequence(tfds.features.Text()),
}


def text_of(raw, field):
    """A text field of a JSON object. UserError names the field."""
    if field not in raw:
        raise UserError(f"no field {field}; the fields are {', '.join(raw) or 'none'}")
    return checked(raw[field], field)


def checked(value, field):
    """A text, if it is one that can be stored. UserError names the field."""
    if not isinstance(value, str):
        raise UserError(f"{field} is {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, UTF-8 cannot
        raise UserError(f"{field} is not valid text ({error})") from error
    return value


def _fingerprint(entry):
    size = pathlib.Path(entry.path).stat().st_size
    return [pathlib.Path(entry.path).name, entry.subset, size, reading.ends(entry.path, size)]


class LocalBuilder(tfds.core.DatasetBuilder, skip_registration=True):
    """A TFDS set made of files that the user has. A set says in `sources` which, and in `parse` how a line becomes examples.

    request: `inputs.Request`, None to read what is prepared. processes: how many write shards. Other arguments: those of
    `tfds.core.DatasetBuilder`. A set is read by its files alone, so that builders stay out of TFDS's register, which other sets of
    their names may be in. UserError, before anything is written, for what the request lacks.
    """

    VERSION = tfds.core.Version("1.0.0")
    ABOUT = ""  # what it is made of, in a line
    FLAGS = ("from", "only")  # the parts of a request that it takes
    FEATURES = None  # `{name: tfds feature}` of an example

    def __init__(self, *, request=None, processes=1, **kwargs):
        super().__init__(**kwargs)
        self.info.set_file_format("array_record")
        self.request, self.processes = request, processes
        self.inputs = self.sources(request) if request else {}

    def sources(self, request):
        """`{split: [Input]}` of a request."""
        raise NotImplementedError

    @staticmethod
    def parse(raw, subset, noted):
        """Yields the examples of one JSON object, see `shards.write_shards`."""
        raise NotImplementedError

    def options(self):
        """Keyword arguments of `parse` that the request sets."""
        return {}

    def jobs(self, folder):
        """(`{split: [parts of one job, …]}`, `{what: count}` of what was noted on the way). folder: for files of passing use."""
        return {s: [[part] for i in files for part in shards.parts_of(*i)] for s, files in self.inputs.items()}, {}

    # --------------------------------------------------------------------------------------------------------- preparing

    @property
    def origin(self):
        """What the set is made of, as JSON: recorded with it, and compared when it is asked for again."""
        return {split: [_fingerprint(i) for i in files] for split, files in self.inputs.items()} | {"options": self.options()}

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
                tasks.append((parts, parse, self.info.features, str(passing / f"{split}.{number:06d}")))
                names.append(split)
        written = collections.defaultdict(list)
        noted = collections.Counter(noted)
        for split, result in zip(names, shards.run(shards.write_shards, tasks, self.processes, "writing shards"), strict=True):
            written[split] += result.shards
            noted.update(result.noted)
        empty = [split for split in jobs if not written[split]] if jobs else list(self.inputs)
        if empty:
            why = "; ".join(f"{count} {what}" for what, count in noted.items()) or "its files have no rows"
            raise UserError(f"{self.name}: no examples for split {empty[0]!r}: {why}")
        self.info.set_splits(tfds.core.SplitDict([self._name_shards(folder, split, written[split]) for split in jobs]))
        self.info.metadata.update(origin=self.origin, noted=dict(noted))
        shutil.rmtree(passing)

    def _name_shards(self, folder, split, written):
        """Gives shards the names that TFDS reads them by, which hold their number."""
        template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=self.name, split=split, filetype_suffix="array_record")
        for number, (path, _, _) in enumerate(written):
            pathlib.Path(path).rename(template.sharded_filepath(shard_index=number, num_shards=len(written)))
        lengths, sizes = [count for _, count, _ in written], [size for _, _, size in written]
        return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=sum(sizes), filename_template=template)

    def _as_dataset(self, *args, **kwargs):
        raise NotImplementedError("array_record sets are read with tfds.data_source, not as a tf.data.Dataset")
