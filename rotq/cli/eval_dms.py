"""``rotq eval dms``: how well a protein model's scores of variants agree with assays."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.loading import choose, fills_masks, find, load, say, show
from rotq.cli.options import (
    FilePath,
    ModelName,
    Words,
    device_option,
    model_options,
    output_options,
)
from rotq.errors import RotqError

if TYPE_CHECKING:
    from rotq.calibration.residues import ResidueCodec
    from rotq.checkpoint.location import Location
    from rotq.evaluation.assays import Assay
    from rotq.evaluation.dms import ResultsFolder
    from rotq.evaluation.variants import Kind, VariantProtocol

_KINDS = ("masked-marginals", "wt-marginals", "pll", "likelihood")


@click.command("dms")
@click.argument("checkpoint", type=ModelName())
@click.option(
    "--assay",
    "assays",
    type=FilePath(),
    multiple=True,
    required=True,
    help="CSV file of variants in ProteinGym's form, or a folder of them, packed or not; may be "
    "repeated.",
)
@click.option("--reference", type=ModelName(), help="Original model to compare with.")
@click.option(
    "--score",
    "kinds",
    type=click.Choice(_KINDS),
    multiple=True,
    help="May be repeated. Masked models: the two marginals unless said; pll takes a pass for each "
    "residue of each variant. Causal models: likelihood.",
)
@click.option(
    "--score-column",
    type=Words(),
    default="DMS_score",
    show_default=True,
    help="What was measured.",
)
@click.option(
    "--wild-type",
    type=FilePath(),
    help="File of the protein (FASTA or other), for assays without mutated_sequence.",
)
@click.option(
    "--window",
    type=click.IntRange(min=8),
    default=1024,
    show_default=True,
    help="Tokens of a pass; longer proteins are cut around each mutation.",
)
@click.option(
    "--variants",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Taken from the start of each file; 0 takes all.",
)
@click.option(
    "-o",
    "--output",
    type=FilePath(),
    help="Folder for the scores of all variants; a run that stopped goes on there.",
)
@click.option("--plot", is_flag=True, help="Write a scatter plot of each assay to --output.")
@device_option
@model_options
@output_options
def eval_dms(
    checkpoint: str,
    assays: tuple[Path, ...],
    reference: str | None,
    kinds: tuple[Kind, ...],
    score_column: str,
    wild_type: Path | None,
    window: int,
    variants: int,
    output: Path | None,
    plot: bool,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Spearman's rho of CHECKPOINT's scores of variants with what assays measured.

    With --reference also its correlation with the original model's own scores, which tells what
    quantization changed however well either predicts the assay.

    \b
    rotq eval dms out/esm-w4 --assay BLAT_ECOLX.csv --reference models/esm
    rotq eval dms out/esm-w4 --assay ProteinGym/ --reference models/esm -o scores --plot
    """
    if plot and output is None:
        raise click.UsageError("--plot writes to --output, which is missing")
    from rotq.evaluation.dms import means
    from rotq.evaluation.variants import VariantProtocol

    choose(device)
    given = [
        assay.first(variants)
        for assay in _read(_files(assays), score_column=score_column, wild_type=wild_type)
    ]
    places = [find(name) for name in (checkpoint, reference) if name is not None]
    models = _Models(places, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    protocol = models.within(VariantProtocol(kinds=models.kinds(kinds), window=window))
    folder = None if output is None else _folder(output, places, protocol, dtype, given, plot)
    found = {}
    for number, assay in enumerate(given, 1):
        found[assay.name] = _figures(models, assay, protocol, folder, f"{number}/{len(given)}")
        if folder is not None and plot:
            from rotq.report.plots import plot_variants

            plot_variants(folder.scores(assay.name), folder.plot(assay.name))
    report = {"assays": found, "mean": means(found, protocol.kinds)}
    if as_json:
        click.echo(json.dumps(report))
        return
    from rotq.report.protein_tables import dms_table

    click.echo(dms_table(report), nl=False)


class _Models:
    """The checkpoint and its reference, which are loaded when one is asked."""

    def __init__(self, places: list[Location], **options: Any) -> None:
        """
        Args:
            places: Of the checkpoint, and of its reference if there is one.
            options: As for ``load``.
        """
        self.places, self.options = places, options

    @cached_property
    def loaded(self) -> list[tuple[Any, ResidueCodec]]:
        """Each with the codec of its tokenizer.

        Raises:
            RotqError: one cannot be read, or does not read residues.
        """
        from rotq.calibration.residues import ResidueCodec

        found = (load(place, in_integers=True, **self.options) for place in self.places)
        return [(model, ResidueCodec(tokenizer)) for model, tokenizer in found]

    def kinds(self, asked: tuple[Kind, ...]) -> tuple[Kind, ...]:
        """What is scored, of what every model can be asked.

        Raises:
            RotqError: one of them cannot be asked that.
        """
        from rotq.evaluation.variants import CAUSAL_KINDS, MASKED_KINDS

        for place in self.places:
            masked = fills_masks(place, trust_remote_code=self.options["trust_remote_code"])
            possible = MASKED_KINDS if masked else CAUSAL_KINDS
            asked = asked or tuple(kind for kind in possible if kind != "pll")
            wrong = [kind for kind in asked if kind not in possible]
            if wrong:
                raise RotqError(f"{place} cannot give {wrong[0]}, only {', '.join(possible)}")
        return tuple(dict.fromkeys(asked))

    def within(self, protocol: VariantProtocol) -> VariantProtocol:
        """The protocol with a window that every model has positions for; a line where it is cut."""
        from rotq.calibration.limits import Limits
        from rotq.checkpoint.limits import read_limits

        limits = Limits()
        for place in self.places:
            trusted = self.options["trust_remote_code"]
            limits = limits.within(read_limits(place, trust_remote_code=trusted))
        window = limits.cut(protocol.window, least=8)
        say([limits.note(protocol.window, window)])
        return replace(protocol, window=window)


def _figures(
    models: _Models,
    assay: Assay,
    protocol: VariantProtocol,
    folder: ResultsFolder | None,
    number: str,
) -> dict[str, Any]:
    """Of one assay, as an earlier run left them or new."""
    from rotq.evaluation.dms import score_assay

    known = None if folder is None else folder.found(assay)
    if known is not None:
        return known

    def progress(kind: str, done: int, total: int) -> None:
        line = show(f"{assay.name} ({number}), {kind}: pass")
        if line is not None:
            line(done, total)

    scores = score_assay(models.loaded, assay, protocol, progress)
    return scores.figures() if folder is None else folder.add(scores)


def _files(given: tuple[Path, ...]) -> list[Path]:
    """The CSV files, those of folders sorted.

    Raises:
        RotqError: a folder without any.
    """
    from rotq.calibration.files import unpacked_name

    files: list[Path] = []
    for path in given:
        inside = sorted(
            file for file in path.glob("*.csv*") if unpacked_name(file.name).endswith(".csv")
        )
        if path.is_dir() and not inside:
            raise RotqError(f"{path} holds no .csv file")
        files += inside if path.is_dir() else [path]
    return files


def _read(files: list[Path], *, score_column: str, wild_type: Path | None) -> list[Assay]:
    from rotq.calibration.sequences import read_proteins
    from rotq.evaluation.assays import read_assay

    protein = None if wild_type is None else read_proteins(wild_type).records[0].sequence
    found = [read_assay(file, score=score_column, wild_type=protein) for file in files]
    names = [assay.name for assay in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RotqError(f"two assays are called {twice[0]}; results are told apart by file names")
    return found


def _folder(
    output: Path,
    places: list[Location],
    protocol: VariantProtocol,
    dtype: str,
    assays: list[Assay],
    plot: bool,
) -> ResultsFolder:
    """Where results go.

    Raises:
        RotqError: it has files that are not its own, or results of something else.
    """
    from rotq.disk.destination import resolve_output
    from rotq.evaluation.dms import ResultsFolder, described

    read = {f"the model {place}": place.path for place in places}
    path = resolve_output(output, read)
    models = [place.stamp() for place in places]
    folder = ResultsFolder(path, {"models": models, "dtype": dtype, **described(protocol)})
    folder.check([assay.name for assay in assays])
    if plot:
        from rotq.report.plots import check_plots

        check_plots([folder.plot(assay.name) for assay in assays])
    return folder
