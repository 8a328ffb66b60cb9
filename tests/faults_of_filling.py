"""Deliberate faults of filling a store and of reading from it, and of the opener (`faults.py` has those of the rest)."""

from faults import Mutant

MUTANTS = [
    # ------------------------------------------------------------------------------------------------------- the input
    Mutant(
        "a window has no end",
        "workflows/store_work.py",
        "len(window) == WINDOW or characters + len(document.text) > WINDOW_CHARACTERS",
        "len(window) == WINDOW",
        "test_compress_store.py -k window_at_a_time",
    ),
    Mutant(
        "two processes take one group",
        "workflows/store_work.py",
        "if (number + i) % self.processes == self.process",
        "if (number + i) % self.processes <= self.process",
        "test_compress_store.py -k without_a_word",
    ),
    Mutant(
        "other sizes count as the same memory",
        "inference/texts.py",
        "json.dumps([text, asked])",
        "json.dumps([text])",
        "test_compress_store.py -k content_hash",
    ),
    Mutant(
        "other metadata count as unchanged",
        "workflows/store_work.py",
        "elif there.metadata != value:",
        "elif False:",
        "test_compress_store.py -k what_changed",
    ),
    Mutant(
        "a context is stored once for each of its questions",
        "data/documents.py",
        "if self._look_up(text) is not None:",
        "if False:",
        "test_compress_store.py -k are_named",
    ),
    Mutant(
        "--strict passes what cannot be stored",
        "workflows/store_work.py",
        "        if self.strict:\n",
        "        if False:\n",
        "test_compress_store.py -k bad_documents",
    ),
    # -------------------------------------------------------------------------------------------------------- filling
    Mutant(
        "another adapter is found out when the base is loaded",
        "workflows/compress_store.py",
        "        there.check(request.store, info)\n",
        "        pass\n",
        "test_compress_store.py -k go_together",
    ),
    Mutant(
        "what the input has is pruned",
        "workflows/compress_store.py",
        "if entry_id not in documents:",
        "if entry_id in documents:",
        "test_compress_store.py -k what_changed",
    ),
    Mutant(
        "segments are joined from the last",
        "inference/writing.py",
        "for part in parts[span]]",
        "for part in parts[span][::-1]]",
        "test_compress_store.py -k that_compress_gives",
    ),
    Mutant(
        "all segments are padded to the longest",
        "inference/batching.py",
        "tokens = min(round_up(lengths[order[start]], step), longest)",
        "tokens = longest",
        "test_compress_store.py -k little_padding",
    ),
    Mutant(
        "rows are more than devices can split",
        "inference/batching.py",
        "rows = max(least, rounded(-(-rows // 2)))",
        "rows = max(1, -(-rows // 2))",
        "test_compress_store.py -k little_padding",
    ),
    Mutant(
        "a document gets another's K/V",
        "workflows/compress_store.py",
        "at = slice(row, row + 1)",
        "at = slice(0, 1)",
        "test_stored_memories.py -k what_the_decoder_reads",
    ),
    # -------------------------------------------------------------------------------------------------------- reading
    Mutant(
        "K/V behind any head are used",
        "inference/stored.py",
        "opened.info.head == tuple(head), iter(entries)",
        "True, iter(entries)",
        "test_stored_memories.py -k head_agrees",
    ),
    Mutant(
        "a text is measured behind any memory of its id",
        "evaluation/stored.py",
        "if (entry.k, entry.tokens) == (k, len(context)):",
        "if True:",
        "test_stored_memories.py -k needs_its_texts",
    ),
    Mutant(
        "bytes of a stored memory are those of float32",
        "evaluation/suites/common.py",
        "self.stored.bytes_per_token if stored else memory.bytes_per_token",
        "memory.bytes_per_token",
        "test_stored_memories.py -k those_of_compressing",
    ),
    # ------------------------------------------------------------------------------------------------------ the opener
    Mutant(
        "a memory names the workdir of a training that goes on",
        "training/trained.py",
        "return os.path.abspath(step), adapter",
        "return trained.name, adapter",
        "test_opener.py -k names_the_checkpoint",
    ),
    Mutant(
        "the latest checkpoint is opened",
        "training/checkpoint_files.py",
        "max(steps) if best is None else best",
        "max(steps)",
        "test_opener.py -k every_place",
    ),
]
