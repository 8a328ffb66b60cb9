"""Deliberate faults of chats (`faults.py` has those of the rest)."""

from faults import Mutant

MUTANTS = [
    Mutant(
        "a chat's documents are in another order", "workflows/chat.py",
        "parts = [document.memory for document in self.documents]",
        "parts = [document.memory for document in self.documents[::-1]]", "test_chat.py -k first_answer",
    ),
    Mutant(
        "a chat does not take the sampling", "workflows/chat.py",
        "asked = Request([plan.prompt], plan.most, sampling=self.sampling)",
        "asked = Request([plan.prompt], plan.most)", "test_chat.py -k first_answer",
    ),
    Mutant(
        "a chat makes an engine for each question", "workflows/chat.py",
        "if engine is not None and (needed <= engine.tokens and memory <= engine.memory_tokens):",
        "if False:", "test_chat.py -k stand_behind",
    ),
    Mutant(
        "a mesh reads a single row", "workflows/chat.py",
        "read(memory[[0] * rows], objective)",
        "read(memory[[0]], objective)", "test_chat.py -k mesh",
    ),
    Mutant(
        "the last turn is left out of a prompt", "workflows/chat_history.py",
        "prompt = self.prompt(turns[split.compressed :], question, memory)",
        "prompt = self.prompt(turns[split.compressed : -1], question, memory)", "test_chat.py -k stand_behind",
    ),
    Mutant(
        "the memory of older turns stands before the documents", "workflows/chat.py",
        "parts += [] if older is None else [older]",
        "parts = [*([] if older is None else [older]), *parts]", "test_chat.py -k are_compressed",
    ),
    Mutant(
        "older turns are not read", "workflows/chat.py",
        "older = self._older_memory(split)\n",
        "older = None\n", "test_chat.py -k are_compressed",
    ),
    Mutant(
        "turns that are compressed later are not", "workflows/chat.py",
        "key = text, self.k\n",
        "key = self.k\n", "test_chat.py -k are_compressed",
    ),
    Mutant(
        "answers are not compressed", "workflows/chat_history.py",
        'f"{turn.question}\\n{turn.answer}\\n"',
        'f"{turn.question}\\n"', "test_chat.py -k no_turn",
    ),
    Mutant(
        "without a memory, a chat is asked behind no head", "workflows/chat_history.py",
        "return without_memory(template, tokenizer, (), ids)",
        "return ids", "test_chat.py -k are_compressed",
    ),
    Mutant(
        "no turn is ever forgotten", "workflows/chat_history.py",
        "if taken > (room - answer) // MEMORY_SHARE:",
        "if False:", "test_chat.py -k long_chat",
    ),
    Mutant(
        "turns take the answer's room", "workflows/chat_history.py",
        "room = self.positions - start - answer - alone",
        "room = self.positions - start - 1 - alone", "test_chat.py -k long_chat",
    ),
    Mutant(
        "turns are compressed one at a time", "workflows/chat_history.py",
        "if len(prompt) - alone > room // slack:",
        "if len(prompt) - alone > room:", "test_chat.py -k no_turn",
    ),
    Mutant(
        "turns are always compressed", "workflows/chat_history.py",
        "if plan := self._fitted(question, turns, split, answer):",
        "if plan := self._fitted(question, turns, split, answer, SLACK):", "test_chat.py -k no_turn",
    ),
    Mutant(
        "history_tokens is not heeded", "workflows/chat_history.py",
        "room = min(room, self.history_tokens)",
        "room = max(room, self.history_tokens)", "test_chat.py -k no_turn",
    ),
    Mutant(
        "a question that needs the answer's room is refused", "workflows/chat_history.py",
        "if plan := self._fitted(question, turns, nothing, 1):",
        "if plan := self._fitted(question, turns, nothing, answer):", "test_chat.py -k fails_leaves",
    ),
    Mutant(
        "a question that fails moves turns", "workflows/chat.py",
        "        memory, prefix = self._memory(plan.split)\n",
        "        self.split = Split(len(self.turns), len(self.turns))\n        memory, prefix = self._memory(plan.split)\n",
        "test_chat.py -k fails_leaves",
    ),
    Mutant(
        "an answer that is stopped is lost", "workflows/chat.py",
        "if running is not None and (ended or running.stream.text):",
        "if ended:", "test_chat.py -k is_stopped",
    ),
    Mutant(
        "an answer of which nothing came is a turn", "workflows/chat.py",
        "ended = running.done ",
        "ended = True ", "test_chat.py -k is_stopped",
    ),
    Mutant(
        "a chat cannot be stopped", "workflows/chat.py",
        "        self._stop = True\n",
        "        pass\n", "test_chat.py -k is_stopped",
    ),
    Mutant(
        "a stop ends the next answer too", "workflows/chat.py",
        "        self._stop = self.stopped = False\n        with",
        "        with", "test_chat.py -k is_stopped",
    ),
    Mutant(
        "stored K/V are computed again", "workflows/chat_documents.py",
        "        return self.entry.prefix\n",
        "        return None\n", "test_chat.py -k of_a_store",
    ),
    Mutant(
        "K/V behind a head are read without one", "workflows/chat_documents.py",
        "if self.entry is None or self.entry.store.info.head != tuple(head):",
        "if self.entry is None:", "test_chat.py -k of_a_store",
    ),
    Mutant(
        "K/V of the first document stand for all", "workflows/chat.py",
        "if len(self.documents) == len(parts) == 1:",
        "if self.documents:", "test_chat.py -k of_a_store",
    ),
    Mutant(
        "texts keep their ratio", "workflows/chat.py",
        "or (text is not None and document.k != k)",
        "", "test_chat.py -k test_ratios",
    ),
    Mutant(
        "older turns keep their ratio", "workflows/chat.py",
        "([context], self.k, BATCH_SIZE)",
        "([context], self.compressor.config.k, BATCH_SIZE)", "test_chat.py -k test_ratios",
    ),
    Mutant(
        "a ratio overrules the store's documents", "workflows/chat.py",
        "if stored is not None and stored != k:",
        "if False:", "test_chat.py -k test_ratios",
    ),
    Mutant(
        "documents may fill all positions", "workflows/chat.py",
        "        self._window(documents, k).check()\n",
        "", "test_chat.py -k no_room",
    ),
    Mutant(
        "one id may name two documents", "workflows/chat.py",
        "if document.id in known:",
        "if False:", "test_chat.py -k test_ratios",
    ),
    Mutant(
        "turns in memory are shown as in full", "workflows/chat_commands.py",
        '"memory" if i < compressed',
        '"memory" if i < forgotten', "test_chat.py -k commands",
    ),
    Mutant(
        "a transcript overwrites a file", "workflows/chat_commands.py",
        "if os.path.lexists(path):",
        "if False:", "test_chat.py -k cannot_be_done",
    ),
    Mutant(
        "a piped chat that failed ends well", "cli/chat.py",
        "return flags.BAD_INPUT if failed and not typed else 0",
        "return 0", "test_chat_cli.py -k piped",
    ),
    Mutant(
        "a status line is piped", "cli/chat.py",
        "    if seen and not command:\n",
        "    if not command:\n", "test_chat_cli.py -k piped",
    ),
    Mutant(
        "ids are looked up when the base is loaded", "cli/chat.py",
        "            looked.get(args.id)\n",
        "            pass\n", "test_chat_cli.py -k before_anything",
    ),
    Mutant(
        "an answer moves the cursor", "cli/chat.py",
        "print(piece.translate(_UNSEEN) if seen else piece",
        "print(piece", "test_chat_cli.py -k shows_prompt",
    ),
    Mutant(
        "Ctrl-C is caught for ever", "cli/chat.py",
        "        signal.signal(signal.SIGINT, before)\n",
        "        pass\n", "test_chat_cli.py -k ctrl_c",
    ),
    Mutant(
        "a command after Ctrl-C counts as interrupted too", "workflows/chat_commands.py",
        "        self.chat.stopped = False\n",
        "", "test_chat_cli.py -k ctrl_c",
    ),
    Mutant(
        "Ctrl-C is an exception", "cli/chat.py",
        "before = signal.signal(signal.SIGINT, lambda number, frame: chat.stop())",
        "before = signal.getsignal(signal.SIGINT)", "test_chat_cli.py -k ctrl_c",
    ),
]  # fmt: skip
