"""What the config.json of a folder with quantised weights says of them.

    "quantization_config": {"quant_method": "icae_jax", "scheme": "int8",
                            "fingerprint": …, "weights": …}

The two fingerprints are those of the full-precision base that was quantised. Other programs refuse
the method's name.
"""

import dataclasses
import pathlib

from icae_jax import files
from icae_jax.errors import UserError
from icae_jax.models.families.config_fields import QUANTIZATION, QUANTIZED_HERE
from icae_jax.models.schemes import SCHEMES


@dataclasses.dataclass(frozen=True)
class StoredScheme:
    """How stored weights are quantised, and the identity of the weights they were made of."""

    scheme: str
    fingerprint: str
    weights: str

    def as_json(self) -> dict[str, object]:
        """The field of config.json."""
        return {QUANTIZATION: {"quant_method": QUANTIZED_HERE, **dataclasses.asdict(self)}}


def read(folder: str | pathlib.Path) -> StoredScheme | None:
    """How a folder's weights are quantised, None if they are not. UserError if that is malformed.

    Quantisations of other programs are refused by `config_json.parse_config`.
    """
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        return None
    field = files.read_json(path, "the base model's configuration").get(QUANTIZATION)
    if not isinstance(field, dict) or field.get("quant_method") != QUANTIZED_HERE:
        return None
    names = [f.name for f in dataclasses.fields(StoredScheme)]
    files.check_fields(field, dict.fromkeys(names, str), f"{path}: {QUANTIZATION}")
    if field["scheme"] not in SCHEMES:
        raise UserError(
            f"{path}: {QUANTIZATION} has the scheme {field['scheme']!r:.40}; this version reads "
            f"{', '.join(SCHEMES)}"
        )
    return StoredScheme(*(field[name] for name in names))
