"""``PackedCache``: transformers' cache with packed keys and values.

    cache = PackedCache(model)  # or PackedCache(model, "llama-kv.safetensors")
    model.generate(**inputs, past_key_values=cache)

``Cache.update`` is told neither positions nor which tokens are padding, so a hook in front of the
model's decoder tells the cache what each forward pass is about to add; see ``sequences``. The hook
also takes the attention mask away: what is visible follows from positions. All layers are packed,
sliding ones with their window, whose pages are released when they leave it.

What cannot be served is refused, not approximated: masks that hide cached tokens, positions with
gaps, attention with softcaps or learned sinks, layers that keep something else than keys and
values, gradients.
"""

from __future__ import annotations

import copy
import functools
import weakref
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import Cache

from rotq.errors import RotqError
from rotq.kv.cache.attention import NAME
from rotq.kv.cache.batched_encoding import BatchedEncoder, batched_encoders
from rotq.kv.cache.hooks import WatchingCache, attach, attention_name
from rotq.kv.cache.layer import PackedLayer
from rotq.kv.cache.masks import plain_mask
from rotq.kv.cache.norm_watch import NormWatch
from rotq.kv.cache.pages import PageTable
from rotq.kv.cache.placement import Placement
from rotq.kv.cache.report import CacheReport
from rotq.kv.cache.sequences import Sequences, Step
from rotq.kv.cache.support import check_served, windows
from rotq.kv.cache.trial import try_out
from rotq.kv.calibration.automatic import calibrated, tokenizer_of
from rotq.kv.calibration.file import KVCalibration, load_calibration
from rotq.kv.presets import preset
from rotq.models.rotary import POSITIONS_FROM_MASK
from rotq.models.task import is_multimodal


class PackedCache(WatchingCache, Cache):
    """Keys and values in 2 to 8 bits, read without being dequantized.

    Sets the model's attention implementation to one that reads codes; for other caches that one is
    sdpa. A cache is for one model.

    Args:
        model: A causal language model of transformers with rotary positions.
        calibration: Made for this model, or the path of a file of ``rotq calibrate-kv``. Left out,
            ``k3v3`` is calibrated with the tokenizer of the folder that the model was loaded from,
            in seconds and once: see ``automatic``. For several caches of a model, call
            ``automatic.calibrated`` and hand its result to each.

    Raises:
        RotqError: the model or the calibration cannot be served, or the file cannot be read.
    """

    def __init__(self, model: Any, calibration: KVCalibration | Path | str | None = None) -> None:
        if calibration is None:
            calibration = calibrated(model, tokenizer_of(model), preset("k3v3"))
        elif not isinstance(calibration, KVCalibration):
            calibration = load_calibration(Path(calibration), model.config)
        check_served(model, calibration)
        self.calibration = calibration
        self.sequences = Sequences(sinks=calibration.sinks, recent=calibration.recent)
        self.recording = False
        self._step: Step | None = None
        self._watch, self._is_broken = NormWatch(), False
        self._encoders: list[BatchedEncoder] | None = None
        placements: dict[tuple[int, int], Placement] = {}
        layers = []
        for index, window in enumerate(windows(model.config.get_text_config(decoder=True))):
            size = calibration.layers[index].format.page_size
            if (size, window) not in placements:
                placements[size, window] = Placement(
                    sequences=self.sequences, table=PageTable(page_size=size), window=window
                )
            layers.append(PackedLayer(calibration, index, placements[size, window]))
        self.placements = list(placements.values())
        super().__init__(layers=layers)
        self._decoder = weakref.ref(attach(model, functools.partial(self._try_out, model)))

    def _try_out(self, model: nn.Module, decoder: nn.Module) -> None:
        """Run a few tokens, and forget them."""
        self._decoder = weakref.ref(decoder)
        # in front of the decoder of several parts' models masks and positions may be made
        whole = model if is_multimodal(model.config) else decoder

        def run(ids_1T: Tensor, position_1T: Tensor) -> None:
            whole(input_ids=ids_1T, past_key_values=self, use_cache=True)

        try_out(decoder, run)
        self.reset()

    def begin(self, decoder: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        """Prepare for a forward pass of the decoder with these arguments; returns what to pass.

        Raises:
            RotqError: the pass cannot be served.
        """
        if self._decoder() is not decoder:
            raise RotqError("this PackedCache was made for another model")
        if self._step is not None or self._is_broken:
            raise RotqError("a forward pass with this PackedCache failed halfway; call reset()")
        self._settle()
        name = attention_name(decoder)
        if name != NAME:
            raise RotqError(f"the model's attention is now {name!r}; PackedCache needs {NAME!r}")
        if given.get("output_attentions"):
            raise RotqError("packed attention has no attention weights to return")
        source = given.get("input_ids")
        source = given["inputs_embeds"] if source is None else source
        if given.get("use_cache") is False:
            raise RotqError(
                "use_cache=False runs all tokens again at each step, and a PackedCache takes each "
                "once; leave one of them out"
            )
        batch, length = source.shape[:2]
        mask, position = plain_mask(given.get("attention_mask"), length), given.get("position_ids")
        config: Any = decoder.config
        sections = "mrope_section" in (getattr(config, "rope_parameters", None) or ())
        if position is not None and position.ndim == 3 and sections:
            # time, height and width of what an image shows; tokens are in order all the same
            position = self.sequences.counted(batch, length, mask)
        elif position is not None and position.ndim != 2:
            raise RotqError("PackedCache needs 2-D positions for this model")
        elif position is None and config.model_type in POSITIONS_FROM_MASK:
            position = self.sequences.counted(batch, length, mask).to(source.device)
            given = given | {"position_ids": position}
        step = self.sequences.plan(batch, length, mask, position)
        self._step = step
        layouts = {
            id(placement): placement.begin(step, recording=self.recording)
            for placement in self.placements
        }
        for layer in self._packed_layers():
            layer.layout = layouts[id(layer.placement)]
        # four dimensions: transformers passes it on as it is, and builds none of its own
        return given | {"attention_mask": torch.empty(batch, 1, length, 0, dtype=torch.bool)}

    def finish(self) -> None:
        """Take over what a forward pass added.

        Raises:
            RotqError: the model did not use the cache as a decoder does, or keys or values are
                beyond what can be coded.
        """
        assert self._step is not None
        for index, layer in enumerate(self._packed_layers()):
            if layer.visible is None or not layer.visible.was_read:
                raise RotqError(f"layer {index} of the model did not attend to the packed cache")
        if self._encoders is None:
            self._encoders = batched_encoders(self._packed_layers(), self.calibration)
        for encoder in self._encoders:
            encoder.encode()
        self._watch.look(self._packed_layers())
        for layer in self._packed_layers():
            layer.layout = layer.visible = None
        self.sequences.advance(self._step)
        self._step = None

    def _settle(self) -> None:
        """What the last pass has stored is right, or nothing more is done with it."""
        try:
            self._watch.settle()
        except RotqError:
            self._is_broken = True
            raise

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled, and to be copied but by ``deepcopy``.

        Raises:
            RotqError: always.
        """
        raise RotqError(
            "a PackedCache belongs to its model and cannot be pickled; copy.deepcopy copies it, "
            "and another process makes its own"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedCache:
        """For the same model, with the same tokens."""
        self._settle()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        for name, value in vars(self).items():
            setattr(copied, name, copy.deepcopy(value, memo))
        return copied

    def reset(self) -> None:
        """Forget everything and free its memory."""
        super().reset()
        self.sequences.clear()
        self.recording, self._step = False, None
        self._watch.forget()
        self._is_broken = False
        for placement in self.placements:
            placement.clear()

    def activate_past_recording(self) -> None:
        """Keep what leaves a window until ``crop``, which then is exact."""
        self.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns: exactly, or not at all.

        Args:
            tokens_to_remove: Minus the number of columns.

        Raises:
            RotqError: tokens that would be whole again are packed; see
                ``activate_past_recording``.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens, got {tokens_to_remove}")
        if not self.sequences.counts:
            return
        columns = -tokens_to_remove
        if columns > self.sequences.num_columns:
            raise ValueError(f"cannot remove {columns} of {self.sequences.num_columns} columns")
        counts = self.sequences.without_last(columns)
        for placement in self.placements:
            placement.check_crop(counts)
        held = {id(item): item.crop(counts, columns) for item in self.placements}
        for layer in self._packed_layers():
            layer.hold(held[id(layer.placement)])
        self.sequences.crop(columns)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i be what sequence ``beam_idx[i]`` was; full pages are shared."""
        indices = beam_idx.tolist()
        if not self.sequences.counts:
            return
        self.sequences.select(indices)
        for placement in self.placements:
            placement.select(indices)
        for layer in self._packed_layers():
            layer.select(indices)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order."""
        self.reorder_cache(torch.arange(len(self.sequences.counts))[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        self.reorder_cache(torch.arange(len(self.sequences.counts)).repeat_interleave(repeats))

    @property
    def nbytes(self) -> int:
        """Allocated bytes of the tokens."""
        return self.report().total

    def report(self) -> CacheReport:
        """Memory by allocated bytes."""
        layers = self._packed_layers()
        packed, whole = zip(*(layer.nbytes() for layer in layers), strict=True)
        tokens = sum(self.sequences.counts)
        widths = [2 * layer.constants.format.head_dim * layer.num_heads for layer in layers]
        return CacheReport(
            tokens=tokens,
            packed=sum(packed),
            whole=sum(whole),
            tables=sum(
                item.table.tensor().nbytes + item.recent_BN.nbytes for item in self.placements
            )
            + (0 if self.sequences.padded_BN is None else self.sequences.padded_BN.nbytes),
            constants=sum(item.constant_bytes() for item in (*layers, *(self._encoders or ()))),
            elements=tokens * sum(widths),
        )

    def _packed_layers(self) -> list[PackedLayer]:
        return self.layers
