"""A job's folder: what is refused before it is made, what it takes, what it leaves behind."""

import os
from pathlib import Path

import pytest
from folder_jobs import FINGERPRINT, assemble, finish_part, opened, partial_of, run_job, weights_of

from rotq.errors import CheckFailed, RotqError, Stopped
from rotq.job.opening import find_place, job_inputs, open_folder
from rotq.recipe import load_recipe


def refused(output: Path, *words: str, resume: str = "auto", overwrite: bool = False) -> None:
    """By ``find_place``, with nothing changed on the disk."""
    before = snapshot(output.parent)
    with pytest.raises(RotqError) as caught:
        find_place(output, resume=resume, overwrite=overwrite, inputs={})
    for word in words:
        assert word in str(caught.value)
    assert snapshot(output.parent) == before


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def stop_job(output: Path) -> Path:
    """A job that has finished two parts; returns its folder."""
    with opened(output) as folder:
        folder.claim(FINGERPRINT)
        finish_part(folder, "outer", "o")
        finish_part(folder, "block-00000", "b")
    return partial_of(output)


def test_a_job_leaves_its_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    run_job(tmp_path / "new" / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "model.safetensors",
        "new",
        "out",
        "rotq_provenance.json",
    ]


def test_the_mark_is_there_before_anything_else(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as folder:
        assert [path.name for path in folder.path.iterdir()] == ["rotq.lock"]
        assert folder.is_new


def test_neighbours_of_the_users_own(tmp_path: Path) -> None:
    """The name of a backup is nobody's; the name of the job's folder must be free or rotq's."""
    for name in ("out.old", "out.bak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    run_job(tmp_path / "out")
    run_job(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out.old" / "mine").read_text() == "mine"
    assert (tmp_path / "out.bak" / "mine").read_text() == "mine"


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("name", ["mine.txt", "block-00000.safetensors", "job.json"])
def test_a_partial_folder_without_the_mark(tmp_path: Path, resume: str, name: str) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / name).write_text("mine")
    refused(
        tmp_path / "out", str(partial), f"holds {name} and is no folder of a job", resume=resume
    )


@pytest.mark.parametrize("resume", ["auto", "required", "never"])
def test_a_file_of_the_users_own_in_a_jobs_folder(tmp_path: Path, resume: str) -> None:
    partial = stop_job(tmp_path / "out")
    (partial / "notes.txt").write_text("mine")
    refused(tmp_path / "out", "holds notes.txt, which rotq did not make", resume=resume)


def test_below_the_folders_of_a_job(tmp_path: Path) -> None:
    partial = stop_job(tmp_path / "out")
    (partial / "checkpoint").mkdir()
    (partial / "checkpoint" / "model-00001-of-00002.safetensors").write_text("x")
    (partial / "checkpoint" / "tokenizer.json").write_text("copied from the model")
    find_place(tmp_path / "out", resume="never", overwrite=False, inputs={})
    (partial / "checkpoint" / "notes.txt").write_text("mine")
    refused(tmp_path / "out", "checkpoint, which holds notes.txt", resume="never")
    (partial / "checkpoint" / "notes.txt").unlink()
    (partial / "source").mkdir()
    (partial / "source" / "mine").write_text("mine")
    refused(tmp_path / "out", "source, which holds mine", resume="never")


def test_links_in_the_place_of_a_jobs_folder_and_in_it(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (tmp_path / "out.partial").symlink_to(scratch)
    refused(tmp_path / "out", "leads to another place")
    (tmp_path / "out.partial").unlink()
    (tmp_path / "out.partial").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "out", "leads to another place")
    partial = stop_job(tmp_path / "other")
    (partial / "checkpoint").symlink_to(scratch)
    refused(tmp_path / "other", "holds checkpoint, which rotq did not make", resume="never")


def test_an_output_that_is_there(tmp_path: Path) -> None:
    output = tmp_path / "out"
    run_job(output)
    refused(output, "exists; choose another output or pass --overwrite")
    (output / "notes.txt").write_text("mine")
    refused(output, "holds notes.txt, which rotq did not write", overwrite=True)
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", "is a file", overwrite=True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("mine")
    refused(tmp_path / "folder", "holds x and is no checkpoint of rotq's", overwrite=True)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "exists")
    run_job(tmp_path / "empty", overwrite=True)
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_the_current_folder_and_its_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    refused(tmp_path / "out", "holds the current folder", overwrite=True)
    with pytest.raises(RotqError, match="holds the current folder"):
        find_place(Path(), resume="auto", overwrite=True, inputs={})


def test_where_a_disk_is_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "other.partial").mkdir()
    monkeypatch.setattr("rotq.job.opening.is_mount", lambda path: True)
    refused(tmp_path / "out", "is where a disk is mounted", overwrite=True)
    refused(tmp_path / "other", "leads to another place")


def test_a_link_as_output_keeps_pointing_to_the_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "there").mkdir(parents=True)
    (tmp_path / "out").symlink_to(disk / "there")
    (tmp_path / "dangling").symlink_to(disk / "new" / "x")
    run_job(tmp_path / "out", overwrite=True)
    run_job(tmp_path / "dangling")
    for link, place in (("out", "there"), ("dangling", "new/x")):
        assert (tmp_path / link).is_symlink()
        assert (disk / place / "model.safetensors").read_text() == weights_of(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "disk", "out"]
    assert sorted(path.name for path in disk.iterdir()) == ["new", "there"]


def test_what_a_job_reads_is_never_in_its_way(tmp_path: Path) -> None:
    model, text = tmp_path / "m", tmp_path / "out" / "text.txt"
    for path in (model / "config.json", text, tmp_path / "x.partial" / "recipe.yaml"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    recipe = load_recipe(None, {"calibration.source": str(text)})
    others = {"the recipe": tmp_path / "x.partial" / "recipe.yaml"}
    inputs = job_inputs(model, recipe, others)
    for output, words in (
        (model, "is the model"),
        (tmp_path / "out", "holds the calibration text"),
        (tmp_path / "x", "x.partial holds the recipe"),
        (model / "w3", "lies inside the model"),
        (tmp_path, "holds the model"),
    ):
        for resume in ("auto", "never"):
            with pytest.raises(RotqError, match=words):
                find_place(output, resume=resume, overwrite=True, inputs=inputs)


class RefusalError(RotqError):
    pass


@pytest.mark.parametrize("reason", [RefusalError, ValueError, KeyboardInterrupt])
def test_a_refused_start_leaves_nothing(tmp_path: Path, reason: type[BaseException]) -> None:
    def start() -> None:
        with opened(tmp_path / "a" / "b" / "out"):
            raise reason

    with pytest.raises(reason):
        start()
    assert not list(tmp_path.iterdir())


def test_parents_that_were_there_stay(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()

    def start() -> None:
        with opened(tmp_path / "a" / "out"):
            raise RefusalError

    with pytest.raises(RefusalError):
        start()
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


def test_a_stopped_conversion_is_kept(tmp_path: Path) -> None:
    def start(reason: type[Exception]) -> None:
        with opened(tmp_path / "out") as folder:
            folder.source.mkdir(exist_ok=True)
            (folder.source / "rotq_gguf.json").write_text("{}")
            raise reason

    with pytest.raises(Stopped):
        start(Stopped)
    assert (tmp_path / "out.partial" / "source").is_dir()
    with pytest.raises(RefusalError):
        start(RefusalError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_refused_start_leaves_the_job_before_it_as_it_was(tmp_path: Path, resume: str) -> None:
    partial = stop_job(tmp_path / "out")
    before = snapshot(partial)

    def start() -> None:
        with opened(tmp_path / "out", resume=resume):
            raise RefusalError

    with pytest.raises(RefusalError):
        start()
    assert snapshot(partial) == before


def test_a_job_goes_on_with_its_parts(tmp_path: Path) -> None:
    stop_job(tmp_path / "out")
    with opened(tmp_path / "out", resume="required") as folder:
        assert not folder.is_new
        folder.claim(FINGERPRINT)
        assert folder.finished("block-00000")
        assert folder.results("block-00000") == {"content": "b"}
        assert not folder.finished("block-00001")


def test_another_job_is_refused_and_discarded_on_request(tmp_path: Path) -> None:
    stop_job(tmp_path / "out")
    other = {**FINGERPRINT, "tokenizer.json": "abd"}
    with (
        opened(tmp_path / "out") as folder,
        pytest.raises(RotqError, match=r"another tokenizer\.json; use --resume never"),
    ):
        folder.claim(other)
    with opened(tmp_path / "out", resume="never") as folder:
        folder.claim(other)
        assert not folder.finished("outer")
        assert not list(folder.path.glob("*.safetensors"))


def test_parts_that_the_record_does_not_name_are_not_there(tmp_path: Path) -> None:
    partial = stop_job(tmp_path / "out")
    for name in ("block-00001.safetensors", ".rotq-0123456789abcdef.partial"):
        (partial / name).write_text("cut off by a kill")
    with opened(tmp_path / "out") as folder:
        folder.claim(FINGERPRINT)
        assert not folder.finished("block-00001")
        assert sorted(path.name for path in partial.iterdir()) == [
            "block-00000.safetensors",
            "job.json",
            "outer.safetensors",
            "rotq.lock",
        ]


def test_a_damaged_part_is_refused_once_and_made_anew_then(tmp_path: Path) -> None:
    partial = stop_job(tmp_path / "out")
    (partial / "outer.safetensors").write_text("0")
    with opened(tmp_path / "out") as folder:
        folder.claim(FINGERPRINT)
        with pytest.raises(CheckFailed, match=r"outer\.safetensors was changed on the disk"):
            folder.finished("outer")
    with opened(tmp_path / "out") as folder:
        folder.claim(FINGERPRINT)
        assert not folder.finished("outer")
        assert not folder.finished("block-00000"), "it was made after the damaged one"


def test_damage_is_found_before_publishing(tmp_path: Path) -> None:
    stop_job(tmp_path / "out")
    with opened(tmp_path / "out") as folder:
        folder.claim(FINGERPRINT)
        assert folder.finished("block-00000")
        folder.verify()
        folder.part("block-00000").write_text("flipped")
        assert folder.finished("block-00000"), "looked at once"
        with pytest.raises(CheckFailed, match="block-00000"):
            folder.verify()


def test_states_of_a_training_go_when_it_has_ended(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as folder:
        folder.claim(FINGERPRINT)
        for step in ("00016", "00032"):
            folder.part(f"transform-model-{step}").write_text(step)
            folder.record("transform-model", {"at": step}, [f"transform-model-{step}"])
        names = [path.name for path in folder.path.glob("transform*")]
        assert names == ["transform-model-00032.safetensors"]
        finish_part(folder, "transform", "t")
        folder.drop_states("transform")
        names = [path.name for path in folder.path.glob("transform*")]
        assert names == ["transform.safetensors"]


def test_an_output_that_came_into_being_meanwhile(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with opened(output) as folder:
        folder.claim(FINGERPRINT)
        finish_part(folder, "outer", "o")
        assemble(folder)
        output.mkdir()
        with pytest.raises(RotqError, match="has come into being"):
            folder.publish()
    output.rmdir()
    with opened(output) as folder:
        folder.claim(FINGERPRINT)
        assert folder.finished("outer")


def test_an_output_that_was_changed_meanwhile(tmp_path: Path) -> None:
    output = tmp_path / "out"
    run_job(output)
    with opened(output, overwrite=True) as folder:
        folder.claim(FINGERPRINT)
        finish_part(folder, "outer", "o")
        assemble(folder)
        (output / "notes.txt").write_text("mine")
        with pytest.raises(RotqError, match=r"holds notes\.txt"):
            folder.publish()
    assert (output / "notes.txt").read_text() == "mine"


def test_a_file_that_came_into_the_folder_meanwhile_stays(tmp_path: Path) -> None:
    told: list[str] = []
    place = find_place(tmp_path / "out", resume="auto", overwrite=False, inputs={})
    with open_folder(place, tell=told.append) as folder:
        folder.claim(FINGERPRINT)
        assemble(folder)
        (folder.path / "notes.txt").write_text("mine")
        folder.publish()
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"
    assert told == [f"{tmp_path / 'out.partial'} stays: rotq did not make notes.txt"]


def test_nothing_to_resume_and_unknown_ways(tmp_path: Path) -> None:
    refused(tmp_path / "out", "nothing to resume in", resume="required")
    with pytest.raises(ValueError, match="resume must be"):
        find_place(tmp_path / "out", resume="sometimes", overwrite=False, inputs={})


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as folder:
        folder.claim(FINGERPRINT)
        (tmp_path / "link").symlink_to(tmp_path / "out")
        for name in ("out", "link"):
            with pytest.raises(RotqError, match="another process"), opened(tmp_path / name):
                pass
    assert (tmp_path / "out.partial" / "job.json").is_file()


def test_a_damaged_record(tmp_path: Path) -> None:
    partial = stop_job(tmp_path / "out")
    (partial / "job.json").write_text("{")
    refused(tmp_path / "out", "job.json is damaged; use --resume never")
    with opened(tmp_path / "out", resume="never") as folder:
        folder.claim(FINGERPRINT)
        assert not folder.finished("outer")
