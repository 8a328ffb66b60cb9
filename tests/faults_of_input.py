"""More deliberate faults: what files of others may hold, and how machines may be set up (`faults.py` has those of the rest)."""

from faults import Mutant

MUTANTS = [
    # -------------------------------------------------------------------------------------------------------- base models
    Mutant(
        "a field of config.json that is false counts as null", "models/families/config_fields.py",
        "        value is None\n", "        not value\n", "test_config_json.py -k refused_by_field",
    ),
    Mutant(
        "tensors of the model's own parts are left out", "interop/hub/stored.py",
        "(unread if own or _OTHER_WEIGHTS.fullmatch(name) else other).append(name)", "other.append(name)", "test_stored.py -k announce",
    ),
    Mutant(
        "an old index comes before the one file", "interop/hub/stored.py",
        "if whole.exists() and WHOLE not in names.values():", "if False:", "test_stored.py -k before_shards",
    ),
    Mutant(
        "a tied base's own head is dropped", "interop/hub/stored.py",
        "if tied_head is not None and not _equal(stored[TABLE][1], tied_head[1]):", "if False:", "test_stored.py -k tied",
    ),
    Mutant(
        "o_proj loses its bias", "models/blocks.py", 'self.config.o_bias, name="o_proj"', 'name="o_proj"', "test_llama.py -k bias",
    ),
    Mutant(
        "rows of q and k stay in the order of GGUF", "interop/hub/gguf_tensors.py",
        "        return head * 2 * half + row % half * 2 + row // half\n", "        return head * 2 * half + row\n",
        "test_gguf.py -k was_made_of",
    ),
    Mutant(
        "int8 blocks of a file are taken for nf4's", "interop/hub/weights.py",
        'read_int8 = files.int8_reader(path) if scheme.kind == "int8" else None', "read_int8 = files.int8_reader(path)",
        "test_quantized_base.py -k int8_blocks",
    ),
    Mutant(
        "columns of a block begin at its start", "interop/hub/gguf_tensors.py",
        "first = start // numbers", "first = (start := start // numbers * numbers) // numbers", "test_gguf.py -k any_part",
    ),
    Mutant(
        "other factors of RoPE pass for Llama 3.1's", "interop/hub/gguf_config.py",
        "if not (np.abs(again - stored) <= _FACTORS_BOUND * stored).all():", "if False:", "test_gguf.py -k llama3s_scaling",
    ),
    Mutant(
        "Gemma's windows are one layer off", "interop/hub/gguf_config.py",
        "return [(i + 1) % stated != 0 for", "return [i % stated != 0 for", "test_gguf.py -k gemmas_layers",
    ),
    Mutant(
        "a key that is not computed is passed over", "interop/hub/gguf_config.py",
        "if own == key or own in _READ | _HARMLESS:", "if True:", "test_gguf.py -k not_computed",
    ),
    Mutant(
        "tensors of a GGUF file may overlap", "interop/hub/gguf_file.py",
        "            if start < stop:\n", "            if False:\n", "test_gguf_bad.py -k damaged_files",
    ),
    Mutant(
        "a GGUF file that changed is taken as it was", "interop/hub/gguf_folder.py",
        "key.update(file.read(_HASHED_BYTES))", "pass", "test_gguf.py -k changed_file",
    ),
    Mutant(
        "pieces merge by their ids and not their scores", "interop/hub/gguf_tokenizer.py",
        "    merges.sort(key=lambda merge: -merge[0])\n", "", "test_gguf_tokenizer.py -k sentencepieces",
    ),
    Mutant(
        "SmolLM's digits stay together", "interop/hub/gguf_tokenizer.py",
        '"smollm": PreTokenizer((r"\\p{N}",), gpt2=True)', '"smollm": PreTokenizer(gpt2=True)',
        "test_gguf_tokenizer.py -k of_the_hub",
    ),
    # ------------------------------------------------------------------------------------------------------- tokenizers, ids
    Mutant(
        "transformers decides how a text is read", "interop/hub/tokenizer.py",
        "tokenizer = _load(folder, _from_json)", "tokenizer = _load(folder, _from_class)",
        "test_tokenizer.py -k file_decides",
    ),
    Mutant(
        "a tokenizer that contradicts its file is taken", "interop/hub/tokenizer.py", "    if ids == expected:", "    if True:",
        "test_tokenizer.py -k contradicts",
    ),
    Mutant(
        "another tokenizer is not noticed", "interop/hub/identity.py",
        'if stated.get(name) not in (None, "", own):', 'if name == "weights" and stated.get(name) not in (None, "", own):',
        "test_identity.py -k know_their",
    ),
    Mutant(
        "a fine-tune is taken for its base", "interop/hub/identity.py",
        'if stated.get(name) not in (None, "", own):', 'if name == "tokenizer" and stated.get(name) not in (None, "", own):',
        "test_identity.py -k fine_tune",
    ),
    Mutant(
        "an id without a row reaches JAX", "interop/hub/tokenizer.py",
        "if len(ids) and not (-special_rows <= min(ids) and max(ids) < table_rows):", "if False:", "test_tokenizer.py -k without_a_row",
    ),
    Mutant(
        "a memory that is not finite is kept", "inference/memory_file.py", "        if not finite.all():", "        if False:",
        "test_tokenizer.py -k not_finite",
    ),
    Mutant(
        "a run asks in today's words", "training/compressor_task.py", "if stored is None or stored == template.as_json():", "if True:",
        "test_identity.py -k words_that_it",
    ),
    # ------------------------------------------------------------------------------------------------------------- adapters
    Mutant(
        "a LoRA's tensors that are not read are passed over", "interop/adapters/folder.py",
        "    if unread:\n        shown", "    if False:\n        shown", "test_peft_config.py -k every_tensor",
    ),
    Mutant(
        "an unknown field of adapter_config.json is passed over", "interop/adapters/peft_config.py",
        "if name not in COMPUTED | HARMLESS | REFUSED and value is not None:", "if False:", "test_peft_config.py -k by_name",
    ),
    Mutant(
        "another module's scale is not folded into B", "interop/adapters/lora_tensors.py",
        "stated.scale_of(naming.module(layer, projection)) / stated.scale", "1.0", "test_peft_config.py -k peft_computes",
    ),
    Mutant(
        "a memory names no commit of the hub", "interop/hub/locations.py",
        '@{commit}" if commit else text', '@{commit}" if not commit else text', "test_hub_adapters.py -k from_compressing",
    ),
    Mutant(
        "an adapter that does not restore is pushed", "workflows/convert_adapter.py",
        "if (options.publication or not base_is_certain) and not options.force:",
        "if not base_is_certain and not options.force:",
        "test_hub_adapters.py -k nothing_is_pushed",
    ),
    # ----------------------------------------------------------------------------------------------------------------- rows
    Mutant(
        "an unanswerable question takes its text along", "data/rows.py",
        "self.count(NO_ANSWER, row.where)", "self.count(NO_ANSWER, row.where)\n            return None", "test_rows.py -k left_out",
    ),
    Mutant(
        "texts without tokens are counted among the others", "data/tokenising.py",
        "kept = [key for key in new if ids[key]]", "kept = list(new)", "test_tokens.py -k no_tokens",
    ),
    Mutant(
        "an answer of one's own is no part of the key", "data/sources.py",
        'result + ([["no_answer", no_answer]] if no_answer else [])', "result", "test_tokens.py -k ones_own",
    ),
    Mutant(
        "a number ends where a piece of the file does", "data/json_rows.py",
        'cut = end == len(self.buffer) and not has_end', "cut = False", "test_data_formats.py -k seams",
    ),
    Mutant(
        "a folder's files come in the order of the disk", "data/places.py",
        "sorted(set(paths), key=lambda p: pathlib.PurePath(p).parts)", "list(dict.fromkeys(paths))[::-1]",
        "test_places.py -k 'folder or glob'",
    ),
    # -------------------------------------------------------------------------------------- one writer, half-set machines
    Mutant("a second run is let in", "lock.py", "alive = not free", "alive = False", "test_lock.py -k refused"),
    Mutant(
        "a lock that another took is freed", "lock.py", "if self.held and self._is_mine():", "if self.held:",
        "test_lock.py -k passed_over",
    ),
    Mutant(
        "damage without a whole checkpoint is a new start", "training/checkpoint.py", "    if damaged and resumed is None:", "    if False:",
        "test_checkpoint.py -k without_a_whole",
    ),
    Mutant(
        "another user's folder serves as the cache", "cache.py", "            and not there.st_mode & 0o022\n", "",
        "test_cache.py -k another_users",
    ),
    Mutant(
        "a flag that stops XLA is not looked for", "runtime/platforms.py", "if trial.returncode and wrong:", "if False:",
        "test_platforms.py -k stops_jax",
    ),
    # ------------------------------------------------------------------------------------------------- of a second reading
    Mutant(
        "a word added to a tokenizer is not noticed", "interop/hub/tokenizer.py", "        if not token.special:", "        if False:",
        "test_identity.py -k fingerprint",
    ),
    Mutant(
        "an end that is named late is no control", "interop/hub/text.py", "if _SPELLED.get(tokenizer, (None,))[0] != special:",
        "if tokenizer not in _SPELLED:", "test_tokenizer.py -k named_late",
    ),
    Mutant(
        "a text spells what ends texts by the base alone", "interop/hub/text.py", "for i in (*tokenizer.all_special_ids, *stops)",
        "for i in tokenizer.all_special_ids", "test_tokenizer.py -k whatever_the_tokenizer",
    ),
    Mutant(
        "ids that are numbers are not found", "inference/memory_file.py", "names = [str(text_id) for text_id in ids]", "names = list(ids)",
        "test_cli.py -k ask",
    ),
    Mutant(
        "an offline address of the hub is an outage", "interop/hub/fetching.py", "if _not_in_cache(error) and is_offline():",
        "if at_hub and _not_in_cache(error) and is_offline():", "test_locations.py -k hubs_own_urls",
    ),
    Mutant(
        "what stands beside a file may be junk", "interop/adapters/formats.py", "    files.check_fields(stated, READING_FIELDS, beside)\n", "",
        "test_formats.py -k of_its_type",
    ),
    Mutant(
        "times in tables are no texts", "data/tables.py", "_times_as_text(batch.slice(start, step)).to_pylist()",
        "batch.slice(start, step).to_pylist()", "test_data_formats.py -k times",
    ),
    Mutant(
        "an impossible question is answered", "data/forms.py", "if _is_impossible(raw):", "if False:",
        "test_rows.py -k impossible",
    ),
    Mutant(
        "damaged tokens end every run", "data/tokens.py", "        _arrays(folder)\n    except", "    except", "test_tokens.py -k damaged",
    ),
    Mutant(
        "a folder takes its place before it is on the disk", "files.py", "        flush(tmp)\n        # Children",
        "        # Children", "test_files.py -k on_the_disk",
    ),
    Mutant(
        "a half-zeroed index is no damage", "training/checkpoint_files.py", r"|\bError decoding |[Cc]orrupt", "",
        "test_checkpoint.py -k half_zero",
    ),
]  # fmt: skip
