"""Deliberate faults of quantised bases (`faults.py` has those of the rest)."""

from faults import Mutant

MUTANTS = [
    Mutant(
        "int8 has one scale for each input", "models/schemes.py",
        'return {"scales": np.abs(w).max(axis, keepdims=True) / np.float32(127)}',
        'return {"scales": np.abs(w).max(-3 - axis, keepdims=True) / np.float32(127)}', "test_quantize.py -k nearest",
    ),
    Mutant(
        "products go without scales", "models/quantize.py",
        "            y = y * _as_row(self.scales, inner, y.ndim)\n", "", "test_quantize.py -k products",
    ),
    Mutant(
        "the halves of a byte change places", "models/schemes.py",
        "return even | odd << 4", "return odd | even << 4", "test_quantize.py -k nearest",
    ),
    Mutant(
        "dequantised matrices are saved for the backward pass", "models/quantize.py",
        "return _product(x, w, jnp.dtype(x.dtype), dtype, False)", "return w.matmul(x, dtype)",
        "test_quantize.py -k no_dequantised_matrix",
    ),
    Mutant(
        "a layer's chunks have the scales of their place in another axis", "interop/hub/quantizing.py",
        "whole[self.axis] = (0, None)", "whole[self.across] = (0, None)", "test_quantized_base.py -k streamed",
    ),
    Mutant(
        "a chunk's checksums count from the matrix's start", "interop/hub/quantizing.py",
        "identity.matrix_checksums(matrix, *starts, width)", "identity.matrix_checksums(matrix, 0, 0, width)",
        "test_quantized_base.py -k streamed",
    ),
    Mutant(
        "a quantised base is known by its rounded weights", "interop/hub/weights.py",
        "loaded = loaded._replace(fingerprint=held.fingerprint, weights=held.weights)", "pass",
        "test_quantized_base.py -k a_copy_is",
    ),
    Mutant(
        "scales of int8 blocks are made anew", "interop/hub/quantizing.py",
        "scales = {} if stored else schemes.host_scales(w, self.kind, self.axis)",
        "scales = schemes.host_scales(w, self.kind, self.axis)", "test_quantized_base.py -k int8_blocks",
    ),
    Mutant(
        "a run does not record its base's scheme", "training/compressor_task.py",
        "            base_quantize=self.base.quantize,\n", "", "test_quantized_use.py -k says_what_base",
    ),
    Mutant(
        "another quantisation goes unsaid", "interop/hub/identity.py",
        "    if stated != have:\n        errors.say(", "    if False:\n        errors.say(", "test_quantized_use.py -k quantisation",
    ),
    Mutant(
        "a memory hides what wrote it", "inference/origin.py",
        '        written["base_quantize"] = origin.base_quantize\n', "        pass\n", "test_quantized_use.py -k compressing_to",
    ),
    Mutant(
        "nf4 cuts a width that its blocks do not divide", "models/schemes.py",
        'if parsed.kind == "nf4" and leaf.shape[axis] % NF4_BLOCK:', "if False:",
        "test_quantize.py -k shapes_are",
    ),
    Mutant(
        "the last piece of a matrix counts twice", "interop/hub/identity.py",
        "counted = places >= jnp.asarray(first, jnp.uint32)", "counted = True", "test_identity.py -k pieces",
    ),
    Mutant(
        "every process sums its own part of the checksums alone", "interop/hub/quantizing.py",
        "sums, damaged = _over_processes(sums), _over_processes(damaged)", "pass", "test_quantized_base.py -k two_processes -m nightly",
    ),
    Mutant(
        "a damaged number is seen by one process alone", "interop/hub/quantizing.py",
        "        damaged += not finite\n", "", "test_quantized_base.py -k is_not_finite_is",
    ),
    Mutant(
        "dequantised numbers pass for the source's", "interop/hub/weights.py",
        "    return loaded._replace(\n        params=", '    return loaded._replace(\n        quantize="", params=',
        "test_quantized_base.py -k a_copy_is",
    ),
    Mutant(
        "a converted folder still points to the GGUF file", "workflows/convert_base.py",
        "orbax_copy.ORBAX_URL, gguf_folder.NOTE)", "orbax_copy.ORBAX_URL)", "test_gguf.py -k hub_folder",
    ),
]  # fmt: skip
