"""What a packed cache is to be: bits, what is removed first, how numbers are chosen, by name.

A preset is a name for a ``KVSpec``. ``k3v3`` and its relatives are ours; ``turboquant``,
``turboquant-prod`` and ``turboesm`` are what others publish, kept as baselines.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass, fields, replace
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rotq.recipe.sections import shown


@dataclass(frozen=True, kw_only=True)
class KVSpec:
    """A scheme for the keys and values of every layer."""

    name: str
    k_bits: int
    """2 to 8."""
    v_bits: int
    """2 to 8."""
    mean: Literal["none", "static", "rope"] = "rope"
    """Removed from keys. ``rope``: the mean before RoPE, turned to each token's position."""
    value_mean: bool = True
    """Remove the mean of values."""
    basis: Literal["hadamard", "svd", "none"] = "hadamard"
    """Keys are coded in it. ``svd``: right singular vectors of the keys, not centred."""
    value_basis: Literal["hadamard", "svd", "none"] = "hadamard"
    alpha: float | None = None
    """A = basis x P^(1/2), P = C^-beta #_alpha M: C the keys' second moment, M the queries', # the
    weighted geometric mean; see ``metric``. None: chosen on calibration tokens, by head."""
    beta: float = 1.0
    """0 leaves the keys' own moment out: A = basis x M^(alpha / 2)."""
    value_metric: bool = True
    """The same for values, with M from the output projection and alpha 1/2."""
    boost: bool = True
    """Make decoded keys and values larger, as coding shrinks them on the average; ``boost``. Not
    with a residual, which is fitted to what is left."""
    codebook: Literal["gaussian", "kmeans"] = "gaussian"
    """Lloyd-Max for the unit normal, or k-means of the head's own y, for ``norm="none"``."""
    gain: Literal["lsq", "norm", "none"] = "lsq"
    """See ``rotq_kernels.kv.format.SideConstants``."""
    search: int = 4
    """Elements of a token that may leave their nearest level so that errors cancel where they
    cost most, twice as many at 2 bits; only encoding pays for it."""
    norm: Literal["log8", "float16", "none"] = "log8"
    residual: Literal["none", "sign", "qjl"] = "none"
    """One more bit per key element."""
    residual_scale: Literal["fitted", "mean", "unbiased"] = "fitted"
    """``fitted``: least squares on calibration keys; ``mean``: mean |residual| (sign);
    ``unbiased``: sqrt(pi / 2) by the sketch's norm (qjl)."""
    sketch: Literal["orthogonal", "gaussian"] = "orthogonal"
    """Of ``residual="qjl"``."""
    sinks: int = 4
    """First tokens of a sequence, kept in the model's precision."""
    recent: int = 0
    """Last tokens of a sequence, kept in the model's precision until they leave the window."""
    boundary: int = 0
    """Layers at either end that get ``boundary_bits`` for keys and values."""
    boundary_bits: int = 8
    average_bits: float | None = None
    """Stored bits per element, norms included, that keys and values of all layers have together;
    calibration gives each 2 to 4 (``calibration.budget``). None: ``k_bits`` and ``v_bits``."""
    billed_bits: float | None = None
    """Bits per element as the scheme's own code stores it, where that is more than is needed."""

    def __post_init__(self) -> None:
        for field, hint in get_type_hints(type(self)).items():
            _check_kind(field, getattr(self, field), hint)
        if not 0 < len(self.name) <= 100 or not self.name.isprintable():
            raise ValueError(f"name: {shown(self.name)} is not 1 to 100 printable characters")
        for field, low, high in (
            ("k_bits", 2, 8),
            ("v_bits", 2, 8),
            ("boundary_bits", 2, 8),
            ("sinks", 0, 1024),
            ("recent", 0, 65536),
            ("boundary", 0, 1024),
            ("search", 0, 32),
        ):
            value = getattr(self, field)
            if not low <= value <= high:
                raise ValueError(f"{field}: {value} is not between {low} and {high}")
        if self.alpha is not None and not 0 <= self.alpha <= 2:
            raise ValueError(f"alpha: {self.alpha} is not between 0 and 2")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta: {self.beta} is not between 0 and 1")
        self._check_average()
        if self.billed_bits is not None and not 0 < self.billed_bits <= 64:
            raise ValueError(f"billed_bits: {self.billed_bits} is not above 0, at most 64")
        if self.search and (self.gain != "lsq" or self.norm == "none"):
            raise ValueError("search needs gain lsq and a stored norm")
        if (self.codebook == "kmeans") != (self.norm == "none"):
            raise ValueError("codebook kmeans and norm none go together")
        if max(self.k_bits, self.v_bits) > 4 and self.codebook == "kmeans":
            raise ValueError("codebook kmeans has at most 4 bits")
        if self.boosts and (self.norm != "log8" or self.codebook != "gaussian"):
            raise ValueError("boost needs codes of the unit normal and norms of 8 bits")

    def _check_average(self) -> None:
        if self.average_bits is None:
            return
        if not 2 <= self.average_bits <= 8:
            raise ValueError(f"average_bits: {self.average_bits:g} is not between 2 and 8")
        if self.codebook != "gaussian" or self.residual != "none" or self.boundary:
            raise ValueError("average_bits is for codes of the unit normal, without more")

    def layer_bits(self, layer: int, num_layers: int) -> tuple[int, int]:
        """Bits of keys and values of one layer, before calibration spends ``average_bits``."""
        if layer < self.boundary or layer >= num_layers - self.boundary:
            return self.boundary_bits, self.boundary_bits
        return self.k_bits, self.v_bits

    @property
    def boosts(self) -> bool:
        """Whether its constants have factors."""
        return self.boost and self.residual == "none"

    @property
    def needs_calibration(self) -> bool:
        """Whether it takes statistics of the model."""
        return (
            self.mean != "none"
            or self.value_mean
            or "svd" in (self.basis, self.value_basis)
            or self.alpha != 0
            or self.beta != 0
            or self.value_metric
            or self.boosts
            or self.search != 0
            or self.codebook != "gaussian"
            or (self.residual != "none" and self.residual_scale != "unbiased")
            or self.average_bits is not None
        )

    def oblivious(self) -> KVSpec:
        """The nearest scheme that needs no statistics, under a name that says so; or itself.

        Raises:
            ValueError: nothing is left of the scheme without statistics.
        """
        if not self.needs_calibration:
            return self
        fitted = self.codebook == "kmeans" or "svd" in (self.basis, self.value_basis)
        if fitted or self.average_bits is not None:
            raise ValueError(f"{self.name} does not exist without calibration")
        return replace(
            self,
            name=f"{self.name}-oblivious",
            mean="none",
            value_mean=False,
            alpha=0.0,
            beta=0.0,
            value_metric=False,
            boost=False,
            search=0,
            codebook="gaussian",
            residual_scale="unbiased",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> KVSpec:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: an unknown key, one that is missing, or a value of another type or out of
                range.
        """
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            names = shown(", ".join(sorted(unknown))).strip("'")
            raise ValueError(f"unknown keys of a KV scheme: {names}")
        missing = [name for name in ("name", "k_bits", "v_bits") if name not in values]
        if missing:
            raise ValueError(f"a KV scheme without {', '.join(missing)}")
        return cls(**values)


def _check_kind(field: str, value: object, hint: Any) -> None:
    """Raise ValueError unless a value is of its field's type, or one of its words."""
    if get_origin(hint) is Literal:
        words = get_args(hint)
        if value not in words:
            raise ValueError(f"{field}: {shown(value)} is not one of {', '.join(words)}")
        return
    kinds = get_args(hint) or (hint,)
    whole = int if float in kinds else None
    if type(value) not in (*kinds, whole):
        names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
        raise ValueError(f"{field}: {shown(value)} is no {names}")


def _ours(k_bits: int, v_bits: int) -> KVSpec:
    return KVSpec(name=f"k{k_bits}v{v_bits}", k_bits=k_bits, v_bits=v_bits)


_TURBOQUANT = KVSpec(
    name="turboquant",
    k_bits=3,
    v_bits=3,
    mean="none",
    value_mean=False,
    alpha=0.0,
    beta=0.0,
    value_metric=False,
    boost=False,
    codebook="gaussian",
    search=0,
    gain="none",
    norm="float16",
)

PRESETS: dict[str, KVSpec] = {
    spec.name: spec
    for spec in (
        *(_ours(*bits) for bits in ((3, 3), (4, 3), (4, 2), (8, 3), (4, 4), (2, 2))),
        _TURBOQUANT,
        replace(
            _TURBOQUANT,
            name="turboquant-prod",
            k_bits=2,
            residual="qjl",
            residual_scale="unbiased",
            sketch="gaussian",
        ),
        replace(
            _TURBOQUANT,
            name="turboesm",
            basis="svd",
            value_basis="none",
            codebook="kmeans",
            norm="none",
            residual="sign",
            residual_scale="mean",
            billed_bits=4.5,
        ),
    )
}


_AVERAGE = re.compile(r"kv(\d(?:\.\d+)?)")


def averaged(bits: float) -> KVSpec:
    """Keys and values of 2 to 4 bits each, by layer, that take so many bits together.

    Raises:
        ValueError: not between 2 and 8.
    """
    return replace(_ours(2, 2), name=f"kv{bits:g}", average_bits=float(bits))


def preset(name: str) -> KVSpec:
    """A scheme by name; ``kv2.5`` is ``averaged(2.5)``.

    Raises:
        ValueError: no such name; says the nearest.
    """
    if name in PRESETS:
        return PRESETS[name]
    if average := _AVERAGE.fullmatch(name):
        return averaged(float(average[1]))
    near = difflib.get_close_matches(name, PRESETS, n=len(PRESETS))
    nearest = max(near, key=lambda known: known.startswith(name), default="")
    hint = f"did you mean {nearest}?" if near else f"known: {', '.join(PRESETS)}"
    raise ValueError(f"no KV preset {name!r}; {hint}")
