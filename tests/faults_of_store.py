"""Deliberate faults of stores (`faults.py` has those of the rest)."""

from faults import Mutant

MUTANTS = [
    Mutant(
        "damaged bytes are read", "inference/store/reader.py",
        "if checksum(data) != span.checksum:",
        "if False:", "test_store_faults.py -k flipped_bit",
    ),
    Mutant(
        "a shard that has grown is whole", "inference/store/upkeep.py",
        'if size not in (None, shard["nbytes"]):',
        "if size is False:", "test_store_faults.py -k cut_short",
    ),
    Mutant(
        "sizes of the index are believed", "inference/store/entries.py",
        'if row["nbytes"] != info.nbytes(info.memory_shape(count)):',
        "if False:", "test_store_faults.py -k tampered",
    ),
    Mutant(
        "a later release's store is read", "inference/store/info.py",
        "if version != str(FORMAT_VERSION):",
        "if False:", "test_store_faults.py -k newer_version",
    ),
    Mutant(
        "only the first difference is named", "inference/store/info.py",
        'raise UserError("\\n".join(different))',
        "raise UserError(different[0])", "test_store_faults.py -k another_compressor",
    ),
    Mutant(
        "SQLite's full disk is none", "inference/store/index.py",
        "    sqlite3.SQLITE_FULL: errno.ENOSPC,\n",
        "", "test_store_faults.py -k no_room",
    ),
    Mutant(
        "a read-only index is read without its log", "inference/store/index.py",
        "if not _has_log(folder):",
        "if True:", "test_store_faults.py -k media",
    ),
    Mutant(
        "an index that was unchanging is so for ever", "inference/store/reader.py",
        "connected[2] is None or connected[2] == self._version()",
        "True", "test_store_faults.py -k media",
    ),
    Mutant(
        "verify does not look at numbers", "inference/store/upkeep.py",
        'return "its numbers are not finite"',
        'return ""', "test_store_faults.py -k not_finite",
    ),
    Mutant(
        "padding is stored", "inference/store/codec.py",
        "real, axis = np.asarray(memory.mask)[0], memory.TEXT_AXIS",
        "real, axis = np.ones_like(memory.mask[0]), memory.TEXT_AXIS", "test_store.py -k is_read_again",
    ),
    Mutant(
        "a prefix may be of another head", "inference/store/entries.py",
        "    if not np.array_equal(positions,",
        "    if False and not np.array_equal(positions,", "test_store.py -k do_not_fit",
    ),
    Mutant(
        "true is 1", "inference/store/reader.py",
        " and isinstance(have[key], bool) == isinstance(value, bool)",
        "", "test_store.py -k finding",
    ),
    Mutant(
        "a shard is named by its ids alone", "inference/store/entries.py",
        'NAMING = ("id", "content_hash", "checksum", "kv_checksum")',
        'NAMING = ("id",)', "test_store.py -k written_twice",
    ),
    Mutant(
        "what others left waits for the next merge", "inference/store/writer.py",
        '.get("store", ""))\n            self.merge()\n',
        '.get("store", ""))\n', "test_store.py -k processes_leave",
    ),
    Mutant(
        "a later version of a text is merged first", "inference/store/writer.py",
        'return sorted((store / PENDING).glob("[!.]*.json"))',
        'return sorted((store / PENDING).glob("[!.]*.json"))[::-1]', "test_store.py -k processes_leave",
    ),
    Mutant(
        "a shard is an orphan while its writer lives", "inference/store/upkeep.py",
        'stack.enter_context(lock.only_writer(folder, "--store"))',
        "pass", "test_store_upkeep.py -k waits_for",
    ),
    Mutant(
        "shards in use are rewritten", "inference/store/upkeep.py",
        'if shard["data_nbytes"] - shard["live"] > unused * shard["data_nbytes"]:',
        "if True:", "test_store_upkeep.py -k test_compacting",
    ),
    Mutant(
        "old shards go before the index names new ones", "inference/store/upkeep.py",
        "            _move(writer, entries)\n",
        "            list(map(store.shards.remove, list(store.shards.names())))\n            _move(writer, entries)\n", "test_store_upkeep.py -k killed",
    ),
    Mutant(
        "a reader does not follow its entry", "inference/store/reader.py",
        "return self._moved_bytes(entry, part)",
        'raise self._damage(entry, part, "is not there")', "test_store_upkeep.py -k bucket",
    ),
    Mutant(
        "a place of shards is taken twice", "inference/store/shards.py",
        "if owner != store:",
        "if False:", "test_store_upkeep.py -k bucket",
    ),
    Mutant(
        "an exported text loses its metadata", "inference/store/exchange.py",
        "{_KNOWN: known}",
        "{}", "test_store_cli.py -k memory_files",
    ),
    Mutant(
        "damage is no fault of the command's", "cli/store.py",
        "    if seen.damage:\n        raise",
        "    if False:\n        raise", "test_store_cli.py -k damage_is_told",
    ),
]  # fmt: skip
