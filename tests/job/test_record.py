"""The record of a job: what it says is what is there."""

import json
from pathlib import Path

import pytest

from rotq.disk.files import sha256_of
from rotq.errors import RotqError
from rotq.job.record import FinishedPart, JobRecord


@pytest.fixture
def record(tmp_path: Path) -> JobRecord:
    made = JobRecord(tmp_path / "job.json")
    made.fingerprint = {"recipe": {"bits": 3}, "tokenizer.json": "abc"}
    for name in ("outer", "block-00000", "block-00001"):
        (tmp_path / name).write_text(name)
        made.add(name, {name: sha256_of(tmp_path / name)}, {"loss": 0.1, "shape": (3, 4)})
    made.write()
    return made


def read(record: JobRecord) -> JobRecord:
    found = JobRecord.read(record.file)
    assert found is not None
    return found


def test_round_trip(record: JobRecord) -> None:
    found = read(record)
    assert found.fingerprint == record.fingerprint
    assert found.parts == record.parts
    assert list(found.parts) == ["outer", "block-00000", "block-00001"]
    assert found.parts["outer"].results == {"loss": 0.1, "shape": [3, 4]}
    assert JobRecord.read(record.file.with_name("none")) is None


@pytest.mark.parametrize("place", [5, 25, 60, 130, 200, 300, 400, 500, 600])
def test_a_flipped_bit_of_the_record_is_found(record: JobRecord, place: int) -> None:
    data = bytearray(record.file.read_bytes())
    data[place] ^= 1
    record.file.write_bytes(data)
    with pytest.raises(RotqError, match=r"job\.json is damaged; use --resume never"):
        read(record)


def test_a_record_of_another_kind_is_damaged(record: JobRecord) -> None:
    for content in ({}, {"recipe": {}}, {"job": {}, "sha256": ""}, {"job": None, "sha256": None}):
        record.file.write_text(json.dumps(content))
        with pytest.raises(RotqError, match="damaged"):
            read(record)


def test_damage_of_a_part(record: JobRecord, tmp_path: Path) -> None:
    part = record.parts["outer"]
    assert part.damage(tmp_path) is None
    (tmp_path / "outer").write_text("0uter")
    assert part.damage(tmp_path) == f"{tmp_path / 'outer'} was changed on the disk " + (
        "after it was written"
    )
    (tmp_path / "outer").unlink()
    assert part.damage(tmp_path) == f"{tmp_path / 'outer'} is missing"
    (tmp_path / "outer").symlink_to(tmp_path / "block-00000")
    assert FinishedPart(files=part.files, results={}).damage(tmp_path) is not None


def test_forgetting_takes_what_was_made_later(record: JobRecord) -> None:
    record.forget("block-00000")
    assert list(record.parts) == ["outer"]
    assert record.files == {"outer"}


def test_another_job_is_named_by_what_differs(record: JobRecord) -> None:
    record.check(dict(record.fingerprint))
    for other, named in (
        ({**record.fingerprint, "recipe": {"bits": 4}}, "another recipe;"),
        ({**record.fingerprint, "tokenizer.json": "abd"}, "another tokenizer.json;"),
        ({**record.fingerprint, "vocab.txt": "x"}, "another vocab.txt;"),
        ({"recipe": {"bits": 3}}, "another tokenizer.json;"),
    ):
        with pytest.raises(RotqError, match=named):
            record.check(other)


def test_published_is_the_checkpoint_that_was_made(record: JobRecord, tmp_path: Path) -> None:
    assert not record.has_published(tmp_path)
    (tmp_path / "rotq_provenance.json").write_text("{}")
    assert not record.has_published(tmp_path)
    record.published = sha256_of(tmp_path / "rotq_provenance.json")
    record.write()
    assert read(record).has_published(tmp_path)
    (tmp_path / "rotq_provenance.json").write_text("{ }")
    assert not record.has_published(tmp_path)
